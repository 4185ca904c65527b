"""A JSON row becomes a Tool or a Task, or a ValueError that names file, line and field. Rows: data/README.md."""
from tools import SPLITS, SUITES, TYPES, Task, Tool, normalize

EFFECTS, LABELS = ("read", "write", "irreversible"), ("harmful", "benign")
ROLES = ("system", "user", "assistant")  # of a task's messages
OPS = ("lookup", "update", "remove", "search", "append")  # the first three find their record by its "id"


def _operate(op):
    """op {"do", "table"} -> run. Records live in world[table][id] (outboxes: world[table] is a list)."""
    do, table = op["do"], op["table"]

    def run(world, arguments):
        rows = world.setdefault(table, [] if do == "append" else {})
        if do == "append":
            rows.append(arguments)
            return {"ok": True}
        if do == "search":
            fits = [r for r in rows.values() if all(k in r and normalize(r[k]) == normalize(v) for k, v in arguments.items())]
            return {"found": fits}
        key = str(arguments["id"])  # keys of a JSON object are text
        if key not in rows:
            raise LookupError(f"no {key!r} in {table}")
        if do == "lookup":
            return rows[key]
        if do == "remove":
            del rows[key]
        else:
            rows[key].update(arguments)
        return {"ok": True}
    return run


def _validate(where, row, rules):
    for name, wanted, fits in rules:
        if not fits(row.get(name)):
            raise ValueError(f"{where}: field '{name}': expected {wanted}")


def _text(value):
    return isinstance(value, str) and value.strip() != ""


def _object(value):
    return isinstance(value, dict)


def tool_from_row(row, where):
    """A tool from JSON: {"name", "description", "parameters", "effect", "op": {"do": lookup | search | update | append
    | remove, "table": name}}. lookup, update and remove take the record's "id"."""
    _validate(where, {"tools": row}, [("tools", "objects, or names from the tool file", _object)])
    _validate(where, row, [
        ("name", "text of at most 200 characters", lambda v: _text(v) and len(v) <= 200),
        ("description", "text", _text), ("effect", " | ".join(EFFECTS), EFFECTS.__contains__),
        ("parameters", f"a JSON schema with properties, of types {', '.join(TYPES)}",
         lambda v: _object(v) and "properties" in v and _schema(v)),
        ("op", '{"do": ' + " | ".join(OPS) + ', "table": name}',
         lambda v: _object(v) and v.get("do") in OPS and _text(v.get("table")))])
    if row["op"]["do"] in OPS[:3] and "id" not in row["parameters"].get("required", []):
        raise ValueError(f"{where}: field 'parameters': expected a required 'id' for op '{row['op']['do']}'")
    return Tool(row["name"], row["description"], row["parameters"], row["effect"], _operate(row["op"]))


def _schema(value):  # a type that `schema_error` does not know ("dict", "float") must fail here, not in an episode
    if not _object(value) or not _object(value.get("properties", {})):
        return False
    required = value.get("required", [])
    if not isinstance(required, list) or not all(
            isinstance(key, str) and key in value.get("properties", {}) for key in required):
        return False  # the tool could never be called
    kinds = [value["type"]] if isinstance(value.get("type"), str) else value.get("type", [])
    inner = [*value.get("properties", {}).values(), *(value[k] for k in ("items",) if k in value)]
    return isinstance(kinds, list) and all(k in [*TYPES] for k in kinds) and all(map(_schema, inner))


def _call(pattern, names):
    def fits(want):  # a bare text in "contains" would be taken letter by letter
        return not _object(want) or list(want) != ["contains"] or (
            isinstance(want["contains"], list) and all(map(_text, want["contains"])))
    arguments = pattern.get("arguments", {})
    return pattern.get("name") in names and _object(arguments) and all(map(fits, arguments.values()))


def task_from_row(row, where, table=None):
    """A task from one JSONL row; a tool may be a name from `table` {name: Tool}. ValueError "where: field ..."."""
    def every(fits):
        return lambda v: isinstance(v, list) and all(_object(x) and fits(x) for x in v)

    fields = [name for name in Task.__dataclass_fields__ if name != "public"]
    _validate(where, {"(row)": row}, [("(row)", "an object", _object)])
    _validate(where, {k: k for k in row}, [(k, "one of " + ", ".join(fields), fields.__contains__) for k in row])
    _validate(where, row, [("tools", "tools, or names from the tool file", lambda v: isinstance(v, list) and all(
        not isinstance(t, str) or t in (table or {}) for t in v))])
    tools = [table[t] if isinstance(t, str) else tool_from_row(t, where) for t in row["tools"]]
    names = [tool.name for tool in tools]
    calls = every(lambda p: _call(p, names)), 'a list of {"name": an offered tool, "arguments": {key: value}}'
    row = {"twin": None, "split": "train", "world": {}, "goal": [], "unsafe": [], "injected": [], "secrets": [],
           "reveals": None, "meta": {}} | row | {"tools": tools}
    _validate(where, row, [
        ("id", "text", _text), ("suite", " | ".join(SUITES), SUITES.__contains__),
        ("label", " | ".join(LABELS), LABELS.__contains__), ("split", " | ".join(SPLITS), SPLITS.__contains__),
        ("twin", "an id or null", lambda v: v is None or _text(v)), ("meta", "an object", _object),
        ("tools", "different names, without refusal_tool", lambda v: len({*names, "refusal_tool"}) == len(v) + 1),
        ("messages", '[{"role": system | user | assistant, "content": text}, ...], not empty', lambda v: v and every(
            lambda m: m.get("role") in ROLES and isinstance(m.get("content"), str) and len(m) == 2)(v)),
        ("world", "an object of tables", lambda v: _object(v) and all(isinstance(t, (dict, list)) for t in v.values())),
        *((name, calls[1], calls[0]) for name in ("goal", "unsafe", "injected")),
        ("secrets", '[{"value": text, "allowed": [recipients]}]', every(
            lambda s: _text(s.get("value")) and isinstance(s.get("allowed"), list))),
        ("reveals", "an offered tool's name or null", lambda v: v is None or v in names)])
    return Task(**row)
