"""A JSON row becomes a Task or a Tool, or a ValueError that names the file, the line and the field.

The fields of a row are in data/README.md. First comes what a tool of a row can do in the sandbox's
world, then the reading of a tool and of a task: one check after another, each with the words that
follow "expected". Everything is checked here, when a file is read: a mistake that passes would
otherwise show in the middle of an episode, or, worse, as a task that is scored as safe.

Try: python -c "from data.rows import tool_from_row; tool_from_row({'name': ''}, 'my file')"
ends with ValueError: my file: field 'name': expected text of at most 200 characters.
"""
from collections.abc import Callable
from typing import NamedTuple

from tools import SPLITS, SUITES, TYPES, Task, Tool, normalize

EFFECTS = ("read", "write", "irreversible")
LABELS = ("harmful", "benign")
ROLES = ("system", "user", "assistant")  # who may have written a message of a task


# -------------------------------------------------- what a tool can do in the world: its operation
# A world is {table: {id: record}}, and a record holds its key as "id", too. (The table of an
# "append" is a list.) An operation gets the world, the name of its table and the call's arguments.
# It returns what the agent is to see, and may change the world. Or it raises LookupError or
# ValueError with words for the agent: before any change, since a call that fails must leave no
# trace.
#
# To add an operation, write its function here and give it a line in OPERATIONS.
def lookup(world: dict, table: str, arguments: dict) -> dict:
    """The record."""
    return find_record(world, table, arguments)


def update(world: dict, table: str, arguments: dict) -> dict:
    """Writes the arguments into the record."""
    find_record(world, table, arguments).update(arguments)
    return {"ok": True}


def remove(world: dict, table: str, arguments: dict) -> dict:
    """Takes the record away."""
    find_record(world, table, arguments)
    del world[table][str(arguments["id"])]
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


OPERATIONS = {
    "lookup": Operation(lookup, needs=("id",)),
    "update": Operation(update, needs=("id",)),
    "remove": Operation(remove, needs=("id",)),
    "search": Operation(search),
    "append": Operation(append),
}


def find_record(world, table, arguments):
    """The record that the argument "id" names. Raises LookupError if there is none."""
    records = world.get(table, {})  # not setdefault: a call that fails leaves no trace
    key = str(arguments["id"])  # an id may be a number, but the keys of a JSON object are text
    if key not in records:
        raise LookupError(f"no {key!r} in {table}")
    return records[key]


def has_all(record, arguments):
    for key, value in arguments.items():
        if key not in record or normalize(record[key]) != normalize(value):
            return False
    return True


# ------------------------------------------------------------------------------ a tool from its row
def tool_from_row(row: dict, where: str) -> Tool:
    """A tool from JSON, such as

    {"name": "get_file", "description": "Read one file.", "effect": "read",
     "parameters": {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
     "op": {"do": "lookup", "table": "file"}}

    effect: one of EFFECTS. op.do: one of OPERATIONS; what it needs must be required parameters.
    where: the file and line, for the message. Raises ValueError.
    """
    expect(is_object(row), where, "tools", "objects, or names from the tool file")
    name = row.get("name")
    parameters = row.get("parameters")
    op = row.get("op")
    kinds = ", ".join(TYPES)
    known = " | ".join(OPERATIONS)

    expect(is_text(name) and len(name) <= 200, where, "name", "text of at most 200 characters")
    expect(is_text(row.get("description")), where, "description", "text")
    expect(row.get("effect") in EFFECTS, where, "effect", " | ".join(EFFECTS))
    expect(is_object(parameters) and "properties" in parameters and is_schema(parameters),
           where, "parameters", f"a JSON schema with properties, of types {kinds}")
    expect(is_op(op), where, "op", '{"do": ' + known + ', "table": name}')

    do = op["do"]
    required = parameters.get("required", [])
    for argument in OPERATIONS[do].needs:
        expect(argument in required, where, "parameters", f"a required '{argument}' for op '{do}'")
    return Tool(name, row["description"], parameters, row["effect"], make_run(do, op["table"]))


def make_run(do: str, table: str) -> Callable:
    """The `run` of a Tool: the operation, bound to its table."""
    def run(world, arguments):
        return OPERATIONS[do].act(world, table, arguments)
    return run


def is_op(value):
    if not is_object(value):
        return False
    # Compared with a tuple: to ask a dict for a list, which JSON may hold here, would raise.
    return value.get("do") in tuple(OPERATIONS) and is_text(value.get("table"))


def is_schema(value):
    """Is it a JSON schema that `tools.schema_error` knows?

    A type that it does not know ("dict", "float") must fail here, and not in an episode.
    """
    if not is_object(value):
        return False
    properties = value.get("properties", {})
    required = value.get("required", [])
    kinds = value.get("type", [])
    if isinstance(kinds, str):
        kinds = [kinds]

    if not is_object(properties) or not isinstance(required, list) or not isinstance(kinds, list):
        return False
    for key in required:
        if not isinstance(key, str) or key not in properties:
            return False  # every call lacks it or is told that it is unknown: nobody could call it
    for kind in kinds:
        if kind not in tuple(TYPES):  # a tuple, as in `is_op`
            return False

    inner = list(properties.values())
    if "items" in value:
        inner.append(value["items"])
    return all(is_schema(schema) for schema in inner)


# ------------------------------------------------------------------------------ a task from its row
CALLS = 'a list of {"name": an offered tool, "arguments": {key: value}}'
MESSAGES = '[{"role": system | user | assistant, "content": text}, ...], not empty'
# Not `public`: what a public benchmark needs beside the task is set by its loader, never by a row.
FIELDS = [name for name in Task.__dataclass_fields__ if name != "public"]


def task_from_row(row: dict, where: str, table: dict | None = None) -> Task:
    """A task from one row of a JSONL file.

    table: {name: Tool}; a tool of the row may be a name in it. where: the file and line. Raises
    ValueError "where: field ...: expected ...". An absent field has the default of `tools.Task`.
    """
    expect(is_object(row), where, "(row)", "an object")
    for name in row:  # a typo would leave the default in place: a task with no harm in it
        expect(name in FIELDS, where, name, "one of " + ", ".join(FIELDS))

    tools = tools_of(row, where, table or {})
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
    expect(is_world(world), where, "world", "an object of tables")
    for name in ("goal", "unsafe", "injected"):
        expect(are_calls(row.get(name, []), offered), where, name, CALLS)
    expect(are_secrets(row.get("secrets", [])),
           where, "secrets", '[{"value": text, "allowed": [recipients]}]')
    expect(reveals is None or reveals in offered,
           where, "reveals", "an offered tool's name or null")
    return Task(**(row | {"tools": tools}))


def tools_of(row, where, table):
    """The row's tools, each from the table or from its own JSON."""
    entries = row.get("tools")
    wanted = "tools, or names from the tool file"
    expect(isinstance(entries, list), where, "tools", wanted)
    for entry in entries:
        expect(not isinstance(entry, str) or entry in table, where, "tools", wanted)

    tools = []
    for entry in entries:
        tools.append(table[entry] if isinstance(entry, str) else tool_from_row(entry, where))
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
    return is_object(value) and all(isinstance(table, dict | list) for table in value.values())


def are_calls(value, offered):
    """Are they call patterns of offered tools?"""
    if not are_objects(value):
        return False
    for pattern in value:
        arguments = pattern.get("arguments", {})
        if pattern.get("name") not in offered or not is_object(arguments):
            return False
        if not all(is_wanted(wanted) for wanted in arguments.values()):
            return False
    return True


def is_wanted(value):
    """May a pattern want this value? Anything, but {"contains": ...} must hold a list of texts:
    a bare text there would be taken letter by letter."""
    if not is_object(value) or list(value) != ["contains"]:
        return True
    texts = value["contains"]
    return isinstance(texts, list) and all(is_text(text) for text in texts)


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


def is_text(value):
    return isinstance(value, str) and value.strip() != ""


def is_object(value):
    return isinstance(value, dict)


def are_objects(value):
    return isinstance(value, list) and all(is_object(entry) for entry in value)
