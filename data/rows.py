"""A JSON row becomes a Task or a Tool, or a ValueError that names the file, the line and the field.

The fields of a row are in data/README.md. First comes what a tool of a row can do in the sandbox's
world, then the reading of a tool and of a task: one check after another, each with the words that
follow "expected". Everything is checked here, when a file is read: a mistake that passes would
otherwise show in the middle of an episode, or, worse, as a task that is scored as safe.

Try: python -c "from data.rows import tool_from_row; tool_from_row({'name': ''}, 'my file')"
ends with ValueError: my file: field 'name': expected text of at most 200 characters.
"""
import json
import re
from collections.abc import Callable
from typing import NamedTuple

from tools import (
    SPLITS,
    SUITES,
    TYPES,
    Task,
    Tool,
    composed,
    is_closed,
    is_of_type,
    normalize,
    plain_text,
    pointed_at,
    too_deep,
)

EFFECTS = ("read", "write", "irreversible")
LABELS = ("harmful", "benign")
ROLES = ("system", "user", "assistant")  # who may have written a message of a task


# -------------------------------------------------- what a tool can do in the world: its operation
# A world is {table: {id: record}}, and a record holds its key as "id", too. (The table of an
# "append" is a list of objects.) An operation gets the world, the name of its table and the call's
# arguments. It returns what the agent is to see, and may change the world. Or it raises LookupError
# or ValueError with words for the agent: before any change, since a call that fails must leave no
# trace.
#
# To add an operation, write its function here and give it a line in OPERATIONS.
def lookup(world: dict, table: str, arguments: dict) -> dict:
    """The record."""
    return world[table][find_key(world, table, arguments)]


def update(world: dict, table: str, arguments: dict) -> dict:
    """Writes the arguments into the record."""
    world[table][find_key(world, table, arguments)].update(arguments)
    return {"ok": True}


def remove(world: dict, table: str, arguments: dict) -> dict:
    """Takes the record away."""
    del world[table][find_key(world, table, arguments)]
    return {"ok": True}


def search(world: dict, table: str, arguments: dict) -> dict:
    """Every record that has all the arguments, compared as text without case."""
    records = world.get(table, {})  # not setdefault: a search leaves no trace
    return {"found": [record for record in records.values() if has_all(record, arguments)]}


def append(world: dict, table: str, arguments: dict) -> dict:
    """Adds the arguments to a list, as an outbox does."""
    world.setdefault(table, []).append(arguments)
    return {"ok": True}


class Operation(NamedTuple):
    """One value of a tool row's op.do."""
    act: Callable
    needs: tuple = ()  # the arguments that it cannot do without, so its tool must require them
    table: type = dict  # what its table is: records by their ids, or a list


OPERATIONS = {
    "lookup": Operation(lookup, needs=("id",)),
    "update": Operation(update, needs=("id",)),
    "remove": Operation(remove, needs=("id",)),
    "search": Operation(search),
    "append": Operation(append, table=list),
}


def find_key(world, table, arguments) -> str:
    """The key of the record that the argument "id" names. Raises LookupError if there is none."""
    # The id may be a number, but the keys of an object are text. And an agent that was shown the
    # key composed writes it so.
    wanted = composed(plain_text(arguments["id"]))
    for key in world.get(table, {}):  # not setdefault: a call that fails leaves no trace
        if composed(key) == wanted:
            return key
    raise LookupError(f"no {wanted!r} in {table}")


def has_all(record, arguments):
    for key, value in arguments.items():
        if key not in record or normalize(record[key]) != normalize(value):
            return False
    return True


class Run(NamedTuple):
    """The `run` of a Tool: the operation, bound to its table."""
    do: str
    table: str

    def __call__(self, world: dict, arguments: dict):
        return OPERATIONS[self.do].act(world, self.table, arguments)


# ------------------------------------------------------------------------------ a tool from its row
def tool_from_row(row: dict, where: str, assumed: set | None = None) -> Tool:
    """A tool from JSON, such as

    {"name": "get_file", "description": "Read one file.", "effect": "read",
     "parameters": {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
     "op": {"do": "lookup", "table": "file"}}

    effect: one of EFFECTS. op.do: one of OPERATIONS; what it needs must be required parameters. Or
    a tool as OpenAI, Anthropic and MCP list them, see `from_list_form`. assumed: a set that
    collects the names of those that say nothing of their effect. where: the file and line, for the
    message. Raises ValueError.
    """
    expect(is_object(row), where, "tools", "objects, or names from the tool file")
    foreign = from_list_form(row, where)
    silent = foreign is not None and foreign["effect"] is None
    if foreign is not None:
        row = foreign
    if silent:
        row = row | {"effect": "write"}
    name = row.get("name")
    op = row.get("op")
    known = " | ".join(OPERATIONS)

    expect(is_text(name) and len(name) <= 200, where, "name", "text of at most 200 characters")
    expect(is_text(row.get("description")), where, "description", "text")
    expect(row.get("effect") in EFFECTS, where, "effect", " | ".join(EFFECTS))
    check_parameters(row.get("parameters"), where, name)
    if silent and assumed is not None:
        assumed.add(name)
    if foreign is not None and op is None:
        return Tool(name, row["description"], row["parameters"], row["effect"], acknowledge)

    expect(is_op(op), where, "op", '{"do": ' + known + ', "table": name}')
    required = row["parameters"].get("required", [])
    for argument in OPERATIONS[op["do"]].needs:
        expect(argument in required,
               where, "parameters", f"a required '{argument}' for op '{op['do']}'")
    run = Run(op["do"], op["table"])
    return Tool(name, row["description"], row["parameters"], row["effect"], run)


def is_op(value):
    if not is_object(value):
        return False
    # Compared with a tuple: to ask a dict for a list, which JSON may hold here, would raise.
    return value.get("do") in tuple(OPERATIONS) and is_text(value.get("table"))


# ------------------------------------------------------------- a tool as others write it in a list
def acknowledge(world: dict, arguments: dict) -> dict:
    """Of a tool behind which there is nothing."""
    return {"ok": True}


def from_list_form(row: dict, where: str) -> dict | None:
    """A tool of OpenAI's, Anthropic's or MCP's list -> a row of ours, but that its effect may be
    None; None: it is none of theirs.

    OpenAI     {"type": "function", "function": {"name", "description", "parameters"}}, or all of
               it in one object
    Anthropic  {"name", "description", "input_schema"}
    MCP        {"name", "description", "inputSchema", "annotations": {"readOnlyHint",
               "destructiveHint"}}

    Our "effect" and "op" may stand beside them. Without the first the effect is that of MCP's
    hints, and without the second the tool answers {"ok": true} to every call."""
    if row.get("type") == "function" or "function" in row:
        inner = row.get("function", row)
        expect(is_object(inner), where, "function", "an object")
        # OpenAI: a function without parameters takes none.
        parameters = inner.get("parameters") or {"type": "object", "properties": {}}
    elif "input_schema" in row or "inputSchema" in row:
        inner = row
        parameters = row.get("input_schema", row.get("inputSchema"))
    else:
        return None

    return {
        "name": inner.get("name"),
        "description": inner.get("description") or inner.get("title") or inner.get("name"),
        "parameters": parameters,
        "effect": row.get("effect", effect_by_hints(row, where)),
        "op": row.get("op"),
    }


def effect_by_hints(row, where) -> str | None:
    """The effect that MCP's annotations tell; None: they tell none.

    MCP itself takes a tool for destructive where nothing is said. That would make nearly every tool
    in use irreversible, so here silence is a write, and it is said which tools that meant."""
    hints = row.get("annotations") or {}
    expect(is_object(hints), where, "annotations", "an object")
    for name in ("readOnlyHint", "destructiveHint"):
        expect(hints.get(name) in (None, True, False),
               where, f"annotations.{name}", "true or false")
    if hints.get("readOnlyHint"):  # of a read, MCP's other hint means nothing
        return "read"
    effects = {True: "irreversible", False: "write", None: None}
    return effects[hints.get("destructiveHint")]


# -------------------------------------------------------------------- the schema of its parameters
# keyword: the form of its value, a key of FORMS. All of these are applied (tools.SchemaCheck).
KEYWORDS = {
    "type": "a type or a list of types: " + ", ".join(TYPES),
    "enum": "a list",
    "const": "anything",
    "nullable": "true or false",
    "minimum": "a number",
    "maximum": "a number",
    "exclusiveMinimum": "a number",
    "exclusiveMaximum": "a number",
    "multipleOf": "a number above 0",
    "minLength": "a count",
    "maxLength": "a count",
    "pattern": "a regular expression of Python's",
    "minItems": "a count",
    "maxItems": "a count",
    "uniqueItems": "true or false",
    "prefixItems": "a list of schemas",
    "items": "a schema",
    "properties": "an object of schemas",
    "patternProperties": "an object of schemas by regular expressions",
    "additionalProperties": "a schema",
    "propertyNames": "a schema",
    "required": "a list of names",
    "dependentRequired": "an object of lists of names",
    "minProperties": "a count",
    "maxProperties": "a count",
    "$ref": "# or #/ and a path in this schema",
    "$defs": "an object of schemas",
    "definitions": "an object of schemas",
    "allOf": "a list of schemas",
    "anyOf": "a list of schemas",
    "oneOf": "a list of schemas",
    "not": "a schema",
    "if": "a schema",
    "then": "a schema",
    "else": "a schema",
}
# What describes and does not bind: the agent is shown it, and no value can break it. So says the
# standard of `format`, too.
NOTES = ("$comment", "$schema", "contentEncoding", "contentMediaType", "default", "deprecated",
         "description", "discriminator", "example", "examples", "format", "readOnly", "title",
         "writeOnly")


def check_parameters(root, where: str, tool: str):
    """Raises ValueError if `root` is no schema of a tool's arguments, or if it holds what is not
    applied: that would let through, in an episode, what its author ruled out."""
    def check(holds, wanted, place="#"):
        expect(holds, where, "parameters", f"{wanted} at {place} of tool {tool!r}")

    check(is_object(root), "a JSON schema")
    todo = [("#", root)]
    seen = {}  # {id: schema}
    while todo:
        place, part = todo.pop()
        if isinstance(part, bool) or id(part) in seen:
            continue
        seen[id(part)] = part
        for keyword, value in part.items():
            if keyword in NOTES or keyword.startswith("x-") or (keyword == "$id" and part is root):
                continue
            check(keyword in KEYWORDS, f"no keyword {keyword!r} (it is not applied here)", place)
            form = KEYWORDS[keyword]
            check(FORMS[form](value), f"as '{keyword}' {form}", place)
        todo += inner_schemas(part, place)
        if "$ref" in part:
            target = target_of(root, part["$ref"])
            check(is_schema(target), f"a '$ref' to a schema, not {part['$ref']!r}", place)
            todo.append((part["$ref"], target))

    known = {}
    for part in seen.values():
        check(reach(part, root, (), known) <= DEEPEST, f"'$ref' to end within {DEEPEST} steps")
    check("object" in listed(root.get("type", "object")), "the type 'object'")
    if is_closed(root):
        # Without it the call is refused, and with it, too, as unknown: nobody could call the tool.
        unknown = set(root.get("required", [])) - set(root["properties"])
        check(not unknown, "in 'required' what stands in 'properties'")


def inner_schemas(part: dict, place: str) -> list:
    """[(place, schema)] of the schemas that stand in one."""
    found = []
    for keyword, value in part.items():
        form = KEYWORDS.get(keyword, "")
        if form == "a schema":
            found.append((f"{place}/{keyword}", value))
        elif form == "a list of schemas":
            found += [(f"{place}/{keyword}/{i}", inner) for i, inner in enumerate(value)]
        elif form.startswith("an object of schemas"):
            found += [(f"{place}/{keyword}/{key}", inner) for key, inner in value.items()]
    return found


def target_of(root, reference):
    """What a $ref points at; None: nothing."""
    try:
        return pointed_at(root, reference)
    except LookupError:
        return None


def reach(part, root, above: tuple, known: dict) -> int:
    """How many schemas does this one ask, each through the last, whether a value fits? More than
    DEEPEST: too many, or without end, as where a $ref leads back to itself.

    What asks about a part of the value (items, properties) ends where the value does: it may lead
    back. above: the ids of the schemas that led here; known: {id: reach}."""
    if isinstance(part, bool):
        return 0
    if id(part) in above or len(above) > DEEPEST:
        return DEEPEST + 1
    if id(part) not in known:
        same_value = [part[keyword] for keyword in ("not", "if", "then", "else") if keyword in part]
        for keyword in ("allOf", "anyOf", "oneOf"):
            same_value += part.get(keyword, [])
        if "$ref" in part:
            same_value.append(pointed_at(root, part["$ref"]))
        below = [reach(inner, root, (*above, id(part)), known) for inner in same_value]
        known[id(part)] = 1 + max(below, default=0)
    return known[id(part)]


def listed(value):
    return value if isinstance(value, list) else [value]


def is_count(value):
    return is_of_type(value, "integer") and value >= 0


def is_above_zero(value):
    return is_of_type(value, "number") and value > 0


def is_regex(value):
    try:
        re.compile(value)
    except (TypeError, re.error, OverflowError, RecursionError):
        return False
    return isinstance(value, str)


def are_types(value):
    kinds = listed(value)
    return kinds != [] and all(kind in tuple(TYPES) for kind in kinds)  # a tuple, as in `is_op`


def is_reference(value):
    return isinstance(value, str) and (value == "#" or value.startswith("#/"))


def is_schema(value):
    return isinstance(value, dict | bool)


def are_names(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def are_schemas(value):
    return isinstance(value, list) and value != [] and all(map(is_schema, value))


def are_named_schemas(value):
    return is_object(value) and all(map(is_schema, value.values()))


FORMS = {
    KEYWORDS["type"]: are_types,
    "anything": lambda value: True,
    "true or false": lambda value: isinstance(value, bool),
    "a number": lambda value: is_of_type(value, "number"),
    "a number above 0": is_above_zero,
    "a count": is_count,
    KEYWORDS["pattern"]: is_regex,
    "a list": lambda value: isinstance(value, list),
    "a list of names": are_names,
    "an object of lists of names":
        lambda value: is_object(value) and all(map(are_names, value.values())),
    "a schema": is_schema,
    "a list of schemas": are_schemas,
    "an object of schemas": are_named_schemas,
    "an object of schemas by regular expressions":
        lambda value: are_named_schemas(value) and all(map(is_regex, value)),
    KEYWORDS["$ref"]: is_reference,
}


# ------------------------------------------------------------------------------ a task from its row
CALLS = 'a list of {"name": an offered tool, "arguments": {a parameter of it: value}}'
MESSAGES = '[{"role": system | user | assistant, "content": text}, ...], not empty'
WRITABLE = "JSON in UTF-8: no NaN, no number beyond 1.7e308, no lone \\ud800 to \\udfff"
DEEPEST = 100  # levels of lists and objects in a row; an episode copies a world level by level
# Not `public`: what a public benchmark needs beside the task is set by its loader, never by a row.
FIELDS = [name for name in Task.__dataclass_fields__ if name != "public"]


def task_from_row(row: dict, where: str, table: dict | None = None,
                  assumed: set | None = None) -> Task:
    """A task from one row of a JSONL file.

    table: {name: Tool}; a tool of the row may be a name in it. where: the file and line. assumed:
    see `tool_from_row`. Raises ValueError "where: field ...: expected ...". An absent field has the
    default of `tools.Task`.
    """
    expect(is_object(row), where, "(row)", "an object")
    for name in row:  # a typo would leave the default in place: a task with no harm in it
        expect(name in FIELDS, where, name, "one of " + ", ".join(FIELDS))
    check_values(row, where)

    tools = tools_of(row, where, table or {}, assumed)
    offered = [tool.name for tool in tools]
    twin = row.get("twin")
    world = row.get("world", {})
    reveals = row.get("reveals")

    expect(is_text(row.get("id")), where, "id", "text")
    expect(row.get("suite") in SUITES, where, "suite", " | ".join(SUITES))
    expect(row.get("label") in LABELS, where, "label", " | ".join(LABELS))
    expect(row.get("split", "train") in SPLITS, where, "split", " | ".join(SPLITS))
    expect(twin is None or is_text(twin), where, "twin", "an id or null")
    expect(is_object(row.get("meta", {})), where, "meta", "an object")
    # refusal_tool is added to every task: one in the row would stand there twice.
    expect("refusal_tool" not in offered and len(set(offered)) == len(offered),
           where, "tools", "different names, without refusal_tool")
    expect(are_messages(row.get("messages")), where, "messages", MESSAGES)
    expect(is_world(world), where, "world",
           "an object of tables, each {id: {key: value}} or a list of objects")
    check_tables(world, tools, where)
    for name in ("goal", "unsafe", "injected"):
        expect(are_calls(row.get(name, []), tools), where, name, CALLS)
    expect(are_secrets(row.get("secrets", [])),
           where, "secrets", '[{"value": text, "allowed": [recipients]}]')
    expect(reveals is None or reveals in offered,
           where, "reveals", "an offered tool's name or null")
    return Task(**(row | {"tools": tools}))


def check_values(row, where):
    """Raises ValueError if an episode could not copy a value, or nobody could write it again."""
    if not too_deep(row, DEEPEST) and can_be_written(row):  # all at once is fast
        return
    for name, value in row.items():
        expect(not too_deep(value, DEEPEST - 1), where, name, f"at most {DEEPEST} levels")
        expect(can_be_written(value), where, name, WRITABLE)


def tools_of(row, where, table, assumed):
    """The row's tools, each from the table or from its own JSON."""
    entries = row.get("tools")
    wanted = "tools, or names from the tool file"
    expect(isinstance(entries, list), where, "tools", wanted)
    for entry in entries:
        expect(not isinstance(entry, str) or entry in table, where, "tools", wanted)

    tools = []
    for entry in entries:
        if isinstance(entry, str):
            tools.append(table[entry])
        else:
            tools.append(tool_from_row(entry, where, assumed))
    return tools


def are_messages(value):
    if not are_objects(value) or not value:
        return False
    for message in value:
        # A role is text of the chat template: any other could open a turn of the system's.
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            return False
        if len(message) != 2:
            return False
    return True


def is_world(value):
    if not is_object(value):
        return False
    for table in value.values():
        records = list(table.values()) if is_object(table) else table
        if not are_objects(records):
            return False
    return True


def check_tables(world, tools, where):
    """Raises ValueError if a tool's table is not of the kind that its operation works on: every
    call of it would fail, and that would read as an agent's mistake."""
    words = {dict: "an object {id: record}", list: "a list, which it appends to"}
    kinds = {}  # {table: its kind}
    for name, table in world.items():
        kinds[name] = type(table)
    for tool in tools:
        if isinstance(tool.run, Run):
            kind = OPERATIONS[tool.run.do].table
            found = kinds.setdefault(tool.run.table, kind)  # none yet: the first tool says
            expect(found is kind, where, "world",
                   f"as table {tool.run.table!r} {words[kind]}, for tool {tool.name!r}")


def are_calls(value, tools):
    """Are they call patterns of these tools?"""
    if not are_objects(value):
        return False
    offered = {tool.name: tool.parameters for tool in tools}
    for pattern in value:
        name = pattern.get("name")
        arguments = pattern.get("arguments", {})
        if name not in tuple(offered) or not is_object(arguments):  # a tuple, as in `is_op`
            return False
        # No call that is carried out could match: harm that is misspelt would never be seen.
        schema = offered[name]
        if is_closed(schema) and not arguments.keys() <= schema["properties"].keys():
            return False
        if not all(is_wanted(wanted) for wanted in arguments.values()):
            return False
    return True


def is_wanted(value):
    """May a pattern want this value? Anything, but {"contains": ...}, wherever it stands, must hold
    a list of texts: a bare text there would be taken letter by letter."""
    if is_object(value) and list(value) == ["contains"]:
        texts = value["contains"]
        return isinstance(texts, list) and all(is_text(text) for text in texts)
    if is_object(value):
        value = list(value.values())
    return not isinstance(value, list) or all(map(is_wanted, value))


def are_secrets(value):
    if not are_objects(value):
        return False
    for secret in value:
        if not is_text(secret.get("value")) or not isinstance(secret.get("allowed"), list):
            return False
    return True


# ------------------------------------------------------------------------------ the smallest checks
def expect(holds: bool, where: str, field: str, wanted: str):
    """Raises the ValueError of a bad field. wanted: what should have stood there."""
    if not holds:
        raise ValueError(f"{where}: field '{field}': expected {wanted}")


def can_be_written(value) -> bool:
    """Can it be written again as JSON in UTF-8? Python reads NaN, and half a character (a lone
    \\ud800), and fails when the results of an evaluation are to be written."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return False
    return True


def is_text(value):
    return isinstance(value, str) and value.strip() != ""


def is_object(value):
    return isinstance(value, dict)


def are_objects(value):
    return isinstance(value, list) and all(is_object(entry) for entry in value)
