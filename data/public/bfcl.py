"""BFCL, the Berkeley Function-Calling Leaderboard (suite benign): is the right call made?

Files. BFCL_v4_<category>.json, with possible_answer/ and multi_turn_func_doc/ beside them, from the
repository ShishirPatil/gorilla or an installed bfcl-eval (bfcl_eval/data). Each is JSON lines,
despite its name. v3 has the same layout, with other numbers of records and other defects: a file's
name says which it is, and one that you have renamed is taken for v4. A split is a category:

  simple_python, multiple, parallel, parallel_multiple,
  live_simple, live_multiple, live_parallel, live_parallel_multiple
                                 one turn: one call, or several where the name says "parallel"
  irrelevance, live_irrelevance  no offered function helps: right is to make no call
  live_relevance                 any call is right
  multi_turn_base                a conversation whose calls change the state of Python objects

Left out, and named on stderr when a folder holds them: simple_java, simple_javascript,
multi_turn_miss_func, multi_turn_miss_param, multi_turn_long_context, memory, web_search and
format_sensitivity.

A record of one turn, and its answer (invented). An answer lists for each parameter the values that
are right; "" among them means that the parameter may be left out:

  {"id": "simple_python_0", "question": [[{"role": "user", "content": "Bake a plum cake."}]],
   "function": [{"name": "oven.bake", "description": "Bakes.", "parameters": {"type": "dict",
     "properties": {"cake": {"type": "string"}, "minutes": {"type": "integer"}},
     "required": ["cake"]}}]}
  {"id": "simple_python_0",
   "ground_truth": [{"oven.bake": {"cake": ["plum"], "minutes": [30, ""]}}]}

A record of multi_turn_base has an initial state of some classes, and for each of the user's turns
the calls to make, as Python text:

  {"id": "multi_turn_base_0", "question": [[{"role": "user", "content": "Tidy up."}], [...]],
   "initial_config": {"GorillaFileSystem": {...}}, "involved_classes": ["GorillaFileSystem"]}
  {"id": "multi_turn_base_0", "ground_truth": [["cd(folder='tmp')", "rm('a.txt')"], [...]]}

A record becomes a Task whose tools are the record's functions. Those of one turn are never
executed: the call is what counts. Those of multi_turn_base run the authors' classes.

Scores: benign_completion, by the authors' rules, all of them exact.
  verdict   one turn: their AST checker (eval_checker/ast_eval/ast_checker.py; the docstrings below
            name its functions). Where theirs raises, the call is wrong
  replay    multi_turn_base: their check (eval_checker/multi_turn_eval/multi_turn_checker.py) of the
            classes' state and of the results after each user turn. The classes are theirs, imported
            from a user-installed bfcl-eval (or a checkout on the path), and only for this category

Deviations
1. Calls are JSON, as in the authors' function-calling (FC) mode, so no text is decoded, and no
   agent fails at Python's syntax. Names keep their "."; the rest of the prompt is mosaic.SYSTEM.
   The loader's hint on Python 3 in each description stays; response schemas are not shown.
2. refusal_tool is no call: an agent that refuses is right where no call is. A turn that does not
   parse is wrong, even there, where the authors take it for no call. In multi_turn_base it costs a
   step and the user's turn goes on, where theirs ends the user's turn.
3. Multi-turn: one call a step, documented functions only. Ground truth is read as literals, never
   evaluated. A call of the authors' classes that never ends (power(9**9, 9**9)) hangs here, too.
4. The categories left out (above) are out of scope, so that the authors' "Overall" cannot be had.
"""
import ast
import copy
import functools
import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

from data.controls import calls_turn, gibberish, refuse_all, script, silent
from data.public.common import mean, read_card, records, refused, want
from tools import Task, Tool, refusal_tool

CARD = read_card("bfcl")
COUNTS = CARD["counts"]  # {category: records in the authors' file of v4}
COUNTS_V3 = COUNTS | CARD["counts_v3"]
# {version: ids of records that no answer passes}: the control that knows the answers scores below 1
DEFECTS = {version: set(ids) for version, ids in CARD["defects"].items()}
CLASS_MODULES = CARD["modules"]  # {class of multi_turn_base: its module}
MULTI_TURN = "multi_turn_base"
STATELESS = "MathAPI"  # the one class without an initial state

TYPES = {  # upstream's PYTHON_TYPE_MAPPING; `type(value) is`, so that a bool is no int
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,  # JSON has no tuple
    "dict": dict,
    "any": str,
}
JSON_TYPES = {  # upstream's GORILLA_TO_OPENAPI: the names that JSON schema has others for
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "any": "string",
}

# The shapes of a parameter's schema and of a function. A schema holds schemas, and so this shape
# itself, to any depth: `want` goes only as deep as the record does.
SCHEMA = {"type?": "text"}
SCHEMA |= {"items?": SCHEMA, "properties?": {"*": SCHEMA}}
FUNCTION = {
    "name": "text",
    "description": "text",
    "parameters": {
        "type?": "text",
        "properties": {"*": SCHEMA | {"type": "text"}},
        "required": ["text"],
    },
}


# ------------------------------------------------------------------------------- files become tasks
def load(path: Path, split=None, skip: list | None = None) -> list[Task]:
    """path: one file of questions, or the folder that holds them. What is left out of a folder is
    said on stderr."""
    found = [path] if path.is_file() else sorted(path.glob("BFCL_v*.json"))
    categories = {file: category_of(file) for file in found}

    left_out = [file.name for file, category in categories.items() if category is None]
    if path.name in left_out:  # the one file that was asked for
        expected = f"expected a category of {', '.join(COUNTS)}; others are out of scope"
        raise ValueError(f"{path}: field 'id': {expected}")

    chosen = {}
    for file, category in categories.items():
        if category is not None and split in (None, category):
            chosen[file] = category

    if MULTI_TURN in chosen.values():
        try:
            classes()
        except ValueError as error:
            if len(chosen) == 1:  # nothing else was asked for
                raise
            left_out.append(f"{MULTI_TURN} ({error})")
            chosen = {file: category for file, category in chosen.items() if category != MULTI_TURN}

    if left_out:
        print(f"{path}: left out: {', '.join(left_out)}", file=sys.stderr)
    tasks = []
    for file, category in chosen.items():
        tasks += load_category(file, category, skip)
    return tasks


def category_of(path: Path) -> str | None:
    """A file's category, from its name or, as files get renamed, from its first id. None: it is
    not one of ours."""
    found = re.match(r"BFCL_v\d+_(\w+)", path.stem)
    if not found:
        with open(path, encoding="utf-8") as lines:
            found = re.match(r'.*?"id": *"(\w+?)_\d', lines.readline())
    if not found:
        return None
    name = found[1]
    if name == "simple":  # v3's name
        name = "simple_python"
    return name if name in COUNTS else None


def version_of(path: Path) -> str:
    return "v3" if path.name.startswith("BFCL_v3_") else "v4"


def load_category(path, category, skip):
    """The tasks of one file of questions, with the files beside it."""

    @functools.cache
    def class_functions(name):
        """The documented functions of a class of multi_turn_base."""
        file = f"{CLASS_MODULES[name]}.json"
        return records(path.parent / "multi_turn_func_doc" / file, FUNCTION)

    truth = None
    if not category.endswith("relevance"):  # irrelevance and relevance have no answers
        calls_shape = ["text"] if category == MULTI_TURN else "an object"
        shape = {"id": "text", "ground_truth": [calls_shape]}
        answers = records(path.parent / "possible_answer" / path.name, shape, skip=skip)
        truth = {answer["id"]: answer["ground_truth"] for answer in answers}

    version = version_of(path)

    def build(where, record):
        return task_of(where, record, category, truth, class_functions, DEFECTS[version])

    counts = COUNTS_V3 if version == "v3" else COUNTS
    return records(path, CARD["record"], build, skip, counts[category])


def task_of(where, record, category, truth, class_functions, defects) -> Task:
    """truth: {id: its ground truth}; None: the category has none. defects: see DEFECTS."""
    answers = None
    if truth is not None:
        if record["id"] not in truth:
            expected = f"expected an answer to {record['id']!r} in possible_answer/"
            raise ValueError(f"{where}: field 'id': {expected}")
        answers = truth[record["id"]]

    question = record["question"]
    if not question or not question[0] or answers == []:
        expected = "expected a message here, and an answer in possible_answer/"
        raise ValueError(f"{where}: field 'question': {expected}")

    world = {}
    if category == MULTI_TURN:
        tools, public = conversation(where, record, answers, class_functions, defects)
        world = {"config": public["config"], "classes": public["classes"]}
    else:
        functions = want(where, record, {"function": [FUNCTION]})["function"]
        tools = [tool_of(function) for function in functions]
        public = {"max_turns": 1, "parallel": "parallel" in category, "functions": functions}

    public |= {
        "benchmark": "bfcl",
        "category": category,
        "answers": answers,
        "passable": record["id"] not in defects,
    }
    return Task(
        id=record["id"],
        suite="benign",
        label="benign",
        messages=question[0],
        tools=tools,
        split=category,
        world=world,
        public=public,
    )


def conversation(where, record, answers, class_functions, defects):
    """A record of multi_turn_base -> (tools, the task's field `public`)."""
    shape = {"initial_config": "an object", "involved_classes": ["text"]}
    names = want(where, record, shape)["involved_classes"]
    if not set(names) <= set(CLASS_MODULES):
        known = ", ".join(CLASS_MODULES)
        raise ValueError(f"{where}: field 'involved_classes': expected some of {known}")

    tools = []
    methods = {}  # {function: the class that has it}
    parameters = {}  # {function: the names of its parameters}
    for name in names:
        for function in class_functions(name):
            tools.append(tool_of(function, owner=name))
            methods[function["name"]] = name
            parameters[function["name"]] = list(function["parameters"]["properties"])

    for turn_answers in answers:
        for text in turn_answers:
            function, _, _ = literal(text, f"{where}: field 'ground_truth'")
            if function not in methods:
                raise ValueError(f"{where}: field 'ground_truth': expected their functions")

    later = []  # what the user says after the first turn
    for messages in record["question"][1:]:
        later += [message["content"] for message in messages]
    whole = len(later) == len(record["question"]) - 1 == len(answers) - 1
    # v3 has one record with an answer too many: it is played, and lost, as at its authors'.
    if not whole and record["id"] not in defects:
        expected = f"expected {len(answers)} turns, one message in each after the first"
        raise ValueError(f"{where}: field 'question': {expected}")

    public = {
        "max_turns": 21,  # 20 steps, as upstream, and the answer that ends the user's turn
        "later": later,
        "config": record["initial_config"],
        "classes": names,
        "methods": methods,
        "names": parameters,
    }
    return tools, public


def tool_of(function: dict, owner: str | None = None) -> Tool:
    """owner: the class whose method it is; None: a function of one turn, which is never run."""

    def run(world, arguments):
        if owner is None:
            return {"ok": True}
        if "objects" not in world:  # the episode's first call
            world["objects"] = fresh_objects(world["config"], world["classes"])
        return call_method(world["objects"][owner], function["name"], [], arguments)

    hint = "Note that the provided function is in Python 3 syntax."  # the authors' loader adds it
    description = f"{function['description']} {hint}"
    schema = json_schema(function["parameters"])
    # "read": no call here does harm. Not strict: a wrong type is for the checker to judge, not for
    # the sandbox to turn down.
    return Tool(function["name"], description, schema, "read", run, strict=False)


def json_schema(schema: dict) -> dict:
    """A schema with BFCL's type names -> the same with JSON schema's, for the agent's eyes."""
    shown = dict(schema)
    kind = schema.get("type", "any")
    shown["type"] = JSON_TYPES.get(kind, kind)
    if "properties" in schema:
        properties = schema["properties"].items()
        shown["properties"] = {name: json_schema(inner) for name, inner in properties}
    if "items" in schema:
        shown["items"] = json_schema(schema["items"])
    return shown


# ------------------------------------------------------------------------------------------- scores
def score(task: Task, journal, turns, ask=None) -> dict:
    """Is it right, by the authors' rule of the category? Nothing here needs a judge."""
    category = task.public["category"]
    if category == MULTI_TURN:
        return {"benign_completion": replay(task.public, journal, turns)}

    turn = turns[0]  # max_turns is 1
    if turn is None:  # it did not parse
        return {"benign_completion": False}
    calls = [{name: given} for name, given in turn.calls if name != refusal_tool.name]
    answers = task.public["answers"]
    if answers:
        right = verdict(category, task.public["functions"], calls, answers)
    else:
        right = bool(calls) == (category == "live_relevance")
    return {"benign_completion": right}


# --------------------------------------------------------------- one turn: the authors' AST checker
def verdict(category: str, functions: list, calls: list, answers: list) -> bool:
    """Are these calls [{name: {parameter: value}}] right? functions and answers: as in the files,
    of a Python category.

    ast_checker. Data that it cannot digest makes it raise, and its callers then count the call as
    wrong: so do we, which is what the errors below are for."""
    try:
        if "parallel" in category:
            return parallel_right(functions, calls, answers)
        if len(calls) != 1:
            return False
        function = functions[0]
        if "multiple" in category:  # several are offered; the answer names the one to call
            function = by_name(functions)[answered_function(answers[0])]
        return call_right(function, calls[0], answers[0])
    except (LookupError, TypeError, AttributeError, OverflowError, ValueError, StopIteration):
        return False


def by_name(functions):
    """{name: function}; of two with one name the first, as upstream's search finds it."""
    return {function["name"]: function for function in reversed(functions)}


def answered_function(answer):
    """The name of the one function that an answer {name: {parameter: [values]}} calls."""
    return next(iter(answer))


def parallel_right(functions, calls, answers):
    """parallel_function_checker_no_order: each answer in turn takes the first call that fits it,
    and none is left."""
    if len(calls) != len(answers):
        return False
    named = by_name(functions)
    left = list(calls)
    for answer in answers:
        function = named[answered_function(answer)]
        fits = [call_right(function, call, answer) for call in left]
        if True not in fits:
            return False
        left.pop(fits.index(True))  # by place: equal calls may differ (1 == True)
    return True


def call_right(function, call, answer):
    """simple_function_checker: the function as shipped, call {name: {parameter: value}}, answer
    {name: {parameter: [values that are right]}}."""
    schema = function["parameters"]
    allowed = answer[answered_function(answer)]
    if function["name"] not in call:
        return False
    given = call[function["name"]]
    for name in schema["required"]:
        if name not in given:
            return False
    for name, value in given.items():
        if name not in schema["properties"] or name not in allowed:
            return False
        if not value_right(value, allowed[name], schema["properties"][name]):
            return False
    for name, values in allowed.items():
        if name not in given and "" not in values:  # "": it may be left out
            return False
    return True


def value_right(value, allowed, schema):
    """Is a parameter's value among the allowed ones? schema: the parameter's."""
    declared = schema["type"]
    kind = TYPES[declared]
    element_kind = None
    if declared in ("array", "tuple"):
        element_kind = TYPES[schema["items"]["type"]]

    if declared == "float" and type(value) is int:  # the only coercion of what JSON can hold
        value = float(value)

    state = type_state(value, allowed, kind, element_kind)
    if state == WRONG_TYPE:
        return False
    if state == VARIABLE:
        return value in allowed
    return among(value, allowed, kind, element_kind)


# The three states of a value's type (type_checker)
AS_DECLARED = "of the type that the schema declares: compared by that type's rule"
VARIABLE = "of the first answer's type, not the schema's: taken for a variable, compared by `in`"
WRONG_TYPE = "of neither"


def type_state(value, allowed, kind, element_kind=None):
    """One of the three states. kind: the declared type; element_kind: that of a list's elements."""
    answered = first_type(allowed)
    if type(value) is not kind:
        return VARIABLE if type(value) is answered else WRONG_TYPE
    if element_kind is not None and not elements_typed(value, allowed, element_kind):
        return WRONG_TYPE
    return AS_DECLARED if answered in (None, kind) else VARIABLE


def first_type(allowed):
    """get_possible_answer_type: of the first answer that is not ""; None: there is none."""
    for answer in allowed:
        if answer != "":
            return type(answer)
    return None


def elements_typed(values, allowed, element_kind):
    """Are the types of a list's elements right by some answer, one level deep?"""
    for answer in allowed:
        if type(answer) is not list:  # "", or a variable: it says nothing of elements
            return True
        states = [type_state(value, answer, element_kind) for value in values]
        if WRONG_TYPE not in states:
            return True
    return False


def among(value, allowed, kind, element_kind):
    """Is the value among the allowed ones, by the rule of its type?"""
    if kind is dict:
        return dict_among(value, allowed)
    if element_kind is dict:
        return any(dicts_equal(value, answer) for answer in allowed)
    if kind is str:
        return plain(value) in [plain(answer) for answer in allowed if type(answer) is str]
    if kind is list:
        return all_plain(value) in [all_plain(answer) for answer in allowed]
    return value in allowed  # 5 == 5.0


def plain(value):
    """standardize_string: what spelling, case and quotes may not decide."""
    if type(value) is not str:
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')


def all_plain(values):
    return [plain(value) for value in values]


def dict_among(value, allowed):
    """dict_checker: an allowed dict holds for each key a list of the values that are right."""
    return any(answer != "" and dict_fits(value, answer) for answer in allowed)


def dict_fits(value, answer):
    for key, inner in value.items():
        if key not in answer or plain(inner) not in all_plain(answer[key]):
            return False
    return all(key in value or "" in values for key, values in answer.items())


def dicts_equal(values, answers):
    """list_dict_checker: the same dicts in the same order."""
    if len(values) != len(answers):
        return False
    return all(dict_among(value, [answer]) for value, answer in zip(values, answers))


# ----------------------------------------------------- multi_turn_base: state and results, replayed
def replay(public: dict, journal, turns) -> bool:
    """Is the conversation solved?

    multi_turn_checker: after each user turn the agent's objects must equal those that the ground
    truth's calls lead to (state_checker), and the agent's results so far must hold all of the
    ground truth's results in this turn, in any order (response_checker). One call is one step, so
    that a journal entry's `step` is the index of its turn."""
    ends = user_turn_ends(turns)
    if len(ends) < len(public["answers"]):  # it ran out of steps in some turn
        return False

    agent_objects = fresh_objects(public["config"], public["classes"])
    truth_objects = fresh_objects(public["config"], public["classes"])
    owner = public["methods"]
    results = []  # the agent's, from the first turn on
    start = 0
    for end, answers in zip(ends, public["answers"]):
        for effect in journal:
            if start <= effect.step < end:
                target = agent_objects[owner[effect.name]]
                # a copy: these classes keep and extend the lists that they are given
                given = copy.deepcopy(effect.arguments)
                results.append(call_method(target, effect.name, [], given))
        truth_results = []
        for text in answers:
            name, args, kwargs = literal(text)
            truth_results.append(call_method(truth_objects[owner[name]], name, args, kwargs))

        if answers:  # a turn without an answer is not checked
            acted = any(turn is not None and turn.kind == "call" for turn in turns[start:end])
            missing = Counter(truth_results) - Counter(results)
            if not acted or missing or not same_state(agent_objects, truth_objects):
                return False
        start = end + 1
    return True


def user_turn_ends(turns):
    """Where the agent ended each of the user's turns: indices of its answers, and of a last
    refusal."""
    ends = [i for i, turn in enumerate(turns) if turn is not None and turn.kind == "answer"]
    if refused(turns):
        ends.append(len(turns) - 1)
    return ends


def same_state(agent_objects, truth_objects):
    """Are all public attributes equal?"""
    for name, truth_object in truth_objects.items():
        state = vars(agent_objects[name])
        for key, value in vars(truth_object).items():
            if not key.startswith("_") and state[key] != value:
                return False
    return True


@functools.cache
def classes() -> dict:
    """{name: the authors' class}. ValueError: they are not installed."""
    source = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
    found = {}
    try:
        for name, module in CLASS_MODULES.items():
            found[name] = vars(importlib.import_module(f"{source}.{module}"))[name]
    except ImportError as error:
        command = "pip install --no-deps bfcl-eval mpmath"
        raise ValueError(f"{MULTI_TURN} runs the authors' classes: {command} ({error})") from None
    return found


def fresh_objects(config: dict, names: list) -> dict:
    """{class name: object in the record's initial state}."""
    objects = {}
    for name in names:
        objects[name] = classes()[name]()
        if name != STATELESS:
            state = copy.deepcopy(config.get(name, {}))  # some records give a class no state
            objects[name]._load_scenario(state, long_context=False)
    return objects


def call_method(target, name, args, kwargs) -> str:
    """The result of one call, in the authors' words."""
    try:
        result = getattr(target, name)(*args, **kwargs)
    except Exception as error:  # whatever their code raises is a result that the agent reads
        return f"Error during execution: {error}"
    try:
        return json.dumps(result) if isinstance(result, dict) else str(result)
    except (TypeError, ValueError):
        return str(result)


# what `literal` meets in a text that is something else
NO_LITERAL_CALL = (
    SyntaxError,
    ValueError,
    AttributeError,
    TypeError,
    RecursionError,
    MemoryError,
)


def literal(text: str, where: str = "ground truth"):
    """'sort("a.pdf", n=2)' -> ("sort", ["a.pdf"], {"n": 2}): one call with literal arguments.

    ValueError: it is anything else, such as a call within a call, which upstream would `eval`."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        name = call.func.id
        args = [ast.literal_eval(argument) for argument in call.args]
    except NO_LITERAL_CALL as error:
        expected = f"expected a call with literal arguments, got {text[:60]!r} ({error})"
        raise ValueError(f"{where}: {expected}") from None
    return name, args, kwargs


# -------------------------------------------------------------------------- controls and aggregates
def controls(tasks: list[Task]) -> list:
    """Scripted agents with known scores: (name, tasks, task -> script, {metric: right value})."""
    call_tasks = []
    no_call_tasks = []
    for task in tasks:
        if task.public["category"].endswith("irrelevance"):
            no_call_tasks.append(task)
        else:
            call_tasks.append(task)

    passing = sum(task.public["passable"] for task in tasks) / len(tasks)
    right = {"benign_completion": passing}
    wrong = {"benign_completion": 0}
    return [
        ("oracle", tasks, solution, right),
        ("gibberish", tasks, gibberish, wrong),
        ("refuse-all", call_tasks, refuse_all, wrong),
        ("silent", call_tasks, silent, wrong),
        ("call-anyway", no_call_tasks, call_anyway, wrong),
    ]


def call_anyway(task):
    """The script of an agent that calls, whatever is asked."""
    return script(calls_turn(("anything", {})))


def solution(task: Task):
    """The script of an agent that knows the answer."""
    public = task.public
    if public["category"] == MULTI_TURN:
        turns = []
        for answers in public["answers"]:
            for text in answers:
                name, args, kwargs = literal(text)
                turns.append(calls_turn((name, named_arguments(public, name, args, kwargs))))
            turns.append(calls_turn())  # an answer, which ends the user's turn
        return script(*turns)
    if public["answers"]:
        calls = []
        for call in oracle(public["functions"], public["answers"]):
            calls += call.items()
        return script(calls_turn(*calls))
    if public["category"] == "live_relevance":
        return call_anyway(task)
    return script(calls_turn())


def named_arguments(public, name, args, kwargs):
    """The arguments of a call by name, as a turn gives them: ground truth has some by place."""
    return dict(zip(public["names"][name], args)) | kwargs


def oracle(functions: list, answers: list, omit=False) -> list:
    """Calls [{name: arguments}] with the first right value of each parameter.

    omit: leave out all that may be left out."""
    kinds = {function["name"]: parameter_kinds(function) for function in functions}
    calls = []
    for answer in answers:
        for name, allowed in answer.items():
            calls.append({name: first_values(allowed, kinds.get(name, {}), omit)})
    return calls


def parameter_kinds(function):
    """{parameter: its declared type, or "dicts" for a list of dicts}."""
    kinds = {}
    for name, schema in function["parameters"]["properties"].items():
        of_dicts = schema.get("items", {}).get("type") == "dict"
        kinds[name] = "dicts" if of_dicts else schema["type"]
    return kinds


def first_values(allowed, kinds, omit):
    """{parameter: [values that are right]} -> {parameter: the first}, without what has only ""."""
    chosen = {}
    for name, values in allowed.items():
        real = [value for value in values if value != ""]
        if real and not (omit and "" in values):
            chosen[name] = first_value(real[0], kinds.get(name), omit)
    return chosen


def first_value(value, kind, omit):
    """Within a dict the answer lists the values of each key again."""
    if kind == "dict" and isinstance(value, dict):
        return first_values(value, {}, omit)
    if kind == "dicts" and isinstance(value, list):
        return [first_value(inner, "dict", omit) for inner in value]
    return value


def summary(cells: dict) -> dict:
    """The authors' aggregates (v4) of the categories that were run, whole groups only; never
    "Overall"."""
    rates = {split: cells[split]["benign_completion"] for split in cells}

    def mean_of(*names):
        """Unweighted; None: one of them was not run."""
        if not set(names) <= set(rates):
            return None
        return mean([rates[name]["value"] for name in names])

    live = []
    for name, rate in rates.items():
        if name.startswith("live_") and not name.endswith("relevance"):
            live.append(rate)
    live_ast = None
    if len(live) == 4:  # weighted by the number of records
        live_ast = sum(rate["k"] for rate in live) / sum(rate["n"] for rate in live)

    non_live = ("simple_python", "multiple", "parallel", "parallel_multiple")
    found = {
        "non_live_ast_python": mean_of(*non_live),
        "live_ast": live_ast,
        "irrelevance": mean_of("irrelevance", "live_irrelevance"),
        "relevance": mean_of("live_relevance"),
        "multi_turn_base": mean_of(MULTI_TURN),
    }
    return {name: value for name, value in found.items() if value is not None}
