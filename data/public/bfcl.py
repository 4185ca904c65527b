"""BFCL (suite benign): the Berkeley Function-Calling Leaderboard's Python categories and multi_turn_base.

Files BFCL_v4_<category>.json (v3: the same layout), possible_answer/ and multi_turn_func_doc/ beside them, from the
repository ShishirPatil/gorilla or an installed bfcl-eval (bfcl_eval/data). A split is a category.
  verdict   the authors' AST checker (eval_checker/ast_eval/ast_checker.py); where theirs raises, a call is wrong
  replay    their multi-turn check: the classes' state and the results after each user turn. The classes are theirs,
            imported from a user-installed bfcl-eval (or a checkout on the path), and only for this category
Deviations
1. Calls are JSON, as in the authors' FC mode, so no text is decoded; names keep their "."; the rest of the prompt is
   mosaic.SYSTEM. The loader's hint on Python 3 in each description stays; response schemas are not shown.
2. refusal_tool is no call. A turn that does not parse is wrong, even where no call is right.
3. Multi-turn: one call a step, documented functions only. Ground truth is read as literals, never evaluated. A call of
   the authors' classes that never ends (power(9**9, 9**9)) hangs here as it does there.
4. Java, JavaScript, memory, web search and other multi-turn categories are out of scope, and said when met."""
import ast
import copy
import functools
import importlib
import json
import re
import sys
from collections import Counter

from data.controls import gibberish, made, refuse_all, script, silent
from data.public import CARDS, mean, records, refused, want
from tools import Task, Tool, refusal_tool

CARD = CARDS["bfcl"]
COUNTS, DEFECTS, DOCS = CARD["counts"], set(CARD["defects"]), CARD["docs"]  # DEFECTS: no answer passes
TYPES = {"string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict,
         "any": str}  # PYTHON_TYPE_MAPPING
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}  # GORILLA_TO_OPENAPI
SCHEMA = {"type?": "text"}
SCHEMA |= {"items?": SCHEMA, "properties?": {"*": SCHEMA}}
FUNCTION = {"name": "text", "description": "text", "parameters": {
    "type?": "text", "properties": {"*": SCHEMA | {"type": "text"}}, "required": ["text"]}}


# ----------------------------------------------------------------------------------------------- the AST checker
def _plain(value):
    """standardize_string: what spelling, case and quotes may not decide."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if type(value) is str else value


def _typed(value, allowed, kind, inner=None):
    """type_checker -> None: a wrong type; True: a "variable", of the answers' own type; False: as the schema says."""
    first = next((type(a) for a in allowed if a != ""), None)
    if type(value) is kind:
        fits = inner is None or any(type(a) is not list or all(_typed(v, a, inner) is not None for v in value)
                                    for a in allowed)
        return first not in (None, kind) if fits else None
    return True if first is type(value) else None


def _dict(value, allowed):
    return any(a != "" and all(k in a and _plain(v) in list(map(_plain, a[k])) for k, v in value.items())
               and all(k in value or "" in v for k, v in a.items()) for a in allowed)


def _fits(value, allowed, kind, inner):
    """Is the value among the allowed ones, by the rule of its type?"""
    if kind is dict:
        return _dict(value, allowed)
    if inner is dict:
        return any(len(value) == len(a) and all(_dict(v, [x]) for v, x in zip(value, a)) for a in allowed)
    if kind is str:
        return _plain(value) in [_plain(a) for a in allowed if type(a) is str]
    return list(map(_plain, value)) in [list(map(_plain, a)) for a in allowed] if kind is list else value in allowed


def _right(function, call, answer):
    """simple_function_checker: function as shipped, call {name: {parameter: value}}, answer {name: {parameter: []}}."""
    answer, schema = next(iter(answer.values())), function["parameters"]
    given = call[function["name"]] if function["name"] in call else None
    if given is None or any(p not in given for p in schema["required"]):
        return False
    for name, value in given.items():
        if name not in schema["properties"] or name not in answer:
            return False
        kind = schema["properties"][name]["type"]
        inner = TYPES[schema["properties"][name]["items"]["type"]] if kind in ("array", "tuple") else None
        value = list(value) if kind == "tuple" and type(value) is tuple else value
        value = float(value) if kind == "float" and type(value) is int else value
        variable = _typed(value, answer[name], TYPES[kind], inner)
        if variable is None or not (value in answer[name] if variable else
                                    _fits(value, answer[name], TYPES[kind], inner)):
            return False
    return all(name in given or "" in allowed for name, allowed in answer.items())


def verdict(category, functions, calls, answers):
    """Are these calls [{name: {parameter: value}}] right? functions and answers as in the files; Python categories."""
    by_name, left = {f["name"]: f for f in reversed(functions)}, list(calls)
    try:
        if len(calls) != (len(answers) if "parallel" in category else 1):
            return False
        if "parallel" not in category:
            chosen = by_name[next(iter(answers[0]))] if "multiple" in category else functions[0]
            return _right(chosen, calls[0], answers[0])
        for answer in answers:  # greedy: an answer takes the first call that fits; equal is not the same (1 == True)
            left.pop([_right(by_name[next(iter(answer))], call, answer) for call in left].index(True))
        return True
    except (LookupError, TypeError, AttributeError, OverflowError, ValueError, StopIteration):
        return False


def _picked(answer, kinds, omit):
    """First answers; one for a dict is itself a dict of lists of answers."""
    def first(value, kind):
        if kind == "dict" and isinstance(value, dict):
            return _picked(value, {}, omit)
        return [first(v, "dict") for v in value] if kind == "dicts" and isinstance(value, list) else value
    said = {p: [a for a in allowed if a != ""] for p, allowed in answer.items() if not (omit and "" in allowed)}
    return {p: first(allowed[0], kinds.get(p)) for p, allowed in said.items() if allowed}


def oracle(functions, answers, omit=False):
    """Calls [{name: arguments}] that take the first answer given; omit: leave out all that may be left out."""
    kinds = {f["name"]: {p: "dicts" if s.get("items", {}).get("type") == "dict" else s["type"]
                         for p, s in f["parameters"]["properties"].items()} for f in functions}
    return [{name: _picked(answer, kinds.get(name, {}), omit)} for a in answers for name, answer in a.items()]


# ------------------------------------------------------------------------------------------------- multi-turn
@functools.cache
def classes():
    """{name: the authors' class}. ValueError: they are not installed."""
    source = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
    try:
        return {name: vars(importlib.import_module(f"{source}.{module}"))[name] for name, module in DOCS.items()}
    except ImportError as error:
        raise ValueError("multi_turn_base runs the authors' classes: pip install --no-deps bfcl-eval mpmath "
                         f"({error})") from None


def _things(config, names):
    """Fresh instances {class: object} of a record."""
    things = {name: classes()[name]() for name in names}
    for name in things.keys() - {"MathAPI"}:  # the one without a state
        things[name]._load_scenario(copy.deepcopy(config.get(name, {})), long_context=False)
    return things


def _do(thing, name, args, kwargs):
    """The result of one call, in the authors' words."""
    try:
        result = getattr(thing, name)(*args, **kwargs)
    except Exception as error:  # whatever their code raises is a result that the agent reads
        return f"Error during execution: {error}"
    try:
        return json.dumps(result) if isinstance(result, dict) else str(result)
    except (TypeError, ValueError):
        return str(result)


def literal(text):
    """'sort("a.pdf", n=2)' -> ("sort", ["a.pdf"], {"n": 2}): one call, of literals. ValueError: it is anything else."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        return call.func.id, [*map(ast.literal_eval, call.args)], named
    except (SyntaxError, ValueError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"expected a call with literal arguments, got {text[:60]!r} ({error})") from None


def replay(public, journal, turns):
    """Is the record solved? After each user turn the agent's objects must equal those of the ground truth, and its
    results so far must hold those of this turn. One call a step, so that Effect.step is the index of its turn."""
    ends = [i for i, turn in enumerate(turns) if turn is not None and turn.kind == "answer"]
    ends += [len(turns) - 1] if refused(turns) else []
    if len(ends) < len(public["answers"]):  # ran out of steps in some turn
        return False
    mine, truth = (_things(public["config"], public["classes"]) for _ in range(2))
    start, said, owner = 0, [], public["methods"]
    for end, answers in zip(ends, public["answers"]):
        said += [_do(mine[owner[e.name]], e.name, [], e.arguments) for e in journal if start <= e.step < end]
        gold = [_do(truth[owner[name]], name, args, kwargs) for name, args, kwargs in map(literal, answers)]
        acted = any(turn is not None and turn.kind == "call" for turn in turns[start:end])
        same = all(vars(mine[name])[key] == value for name in truth for key, value in vars(truth[name]).items()
                   if not key.startswith("_"))
        if answers and not (acted and same and not Counter(gold) - Counter(said)):
            return False
        start = end + 1
    return True


# ---------------------------------------------------------------------------------------------------- the files
def _schema(schema):
    """Their type names -> JSON schema's, for the agent's eyes."""
    out = schema | {"type": JSON_TYPES.get(schema.get("type", "any"), schema.get("type", "string"))}
    if "properties" in schema:
        out["properties"] = {name: _schema(inner) for name, inner in schema["properties"].items()}
    return out | {"items": _schema(schema["items"])} if "items" in schema else out


def _tool(function, owner=None):
    """owner: the class whose method it is; a single-turn function is never executed."""
    def run(world, arguments):
        if owner is None:
            return {"ok": True}
        if "things" not in world:
            world["things"] = _things(world["config"], world["classes"])
        return _do(world["things"][owner], function["name"], [], arguments)
    return Tool(function["name"], f"{function['description']} Note that the provided function is in Python 3 syntax.",
                _schema(function["parameters"]), "read", run, strict=False)


def _conversation(where, row, answers, docs):
    """A multi_turn_base record: (tools, public)."""
    names = want(where, row, {"initial_config": "an object", "involved_classes": ["text"]})["involved_classes"]
    functions = [(name, f) for name in names if name in DOCS for f in docs(name)]
    methods, later = {f["name"]: name for name, f in functions}, [m for turn in row["question"][1:] for m in turn]
    single = len(later) == len(row["question"]) - 1 == len(answers) - 1
    for field, right, expected in (
            ("involved_classes", set(names) <= set(DOCS), f"some of {', '.join(DOCS)}"),
            ("ground_truth", all(literal(text)[0] in methods for turn in answers for text in turn), "their functions"),
            ("question", single, f"{len(answers)} turns, one message in each after the first")):
        if not right:
            raise ValueError(f"{where}: field '{field}': expected {expected}")
    return [_tool(f, name) for name, f in functions], {  # max_turns: 20 steps and the answer
        "max_turns": 21, "later": [m["content"] for m in later], "config": row["initial_config"], "classes": names,
        "methods": methods, "names": {f["name"]: list(f["parameters"]["properties"]) for _, f in functions}}


def _task(where, row, category, truth, docs):
    """truth: {id: its ground truth}; None: the category has none."""
    if truth is not None and row["id"] not in truth:
        raise ValueError(f"{where}: field 'id': expected an answer to {row['id']!r} in possible_answer/")
    answers = None if truth is None else truth[row["id"]]
    if not any(row["question"][:1]) or answers == []:
        raise ValueError(f"{where}: field 'question': expected a message here, and an answer in possible_answer/")
    if category == "multi_turn_base":
        tools, public = _conversation(where, row, answers, docs)
    else:
        tools = [_tool(function) for function in want(where, row, {"function": [FUNCTION]})["function"]]
        public = {"max_turns": 1, "parallel": "parallel" in category, "functions": row["function"]}
    world = {name: public[name] for name in ("config", "classes") if name in public}
    return Task(row["id"], "benign", "benign", row["question"][0], tools, split=category, world=world,
                public=public | {"benchmark": "bfcl", "category": category, "answers": answers})


def _category(path):
    """From the name or, as files get renamed, the first id; None: not one of ours. v3 calls simple_python "simple"."""
    with open(path, encoding="utf-8") as lines:
        found = re.match(r"BFCL_v\d+_(\w+)", path.stem) or re.match(r'.*?"id": *"(\w+?)_\d', lines.readline())
    name = "simple_python" if found and found[1] == "simple" else found and found[1]
    return name if name in COUNTS else None


def _file(path, category, skip):
    """The tasks of one file of questions, with the files beside it."""
    @functools.cache
    def docs(name):
        return records(path.parent / "multi_turn_func_doc" / f"{DOCS[name]}.json", FUNCTION)

    shape = {"id": "text", "ground_truth": [["text"]] if category == "multi_turn_base" else ["an object"]}
    truth = None if category.endswith("relevance") else dict(records(
        path.parent / "possible_answer" / path.name, shape, lambda where, row: (row["id"], row["ground_truth"]), skip))
    return records(path, CARD["record"], lambda where, row: _task(where, row, category, truth, docs), skip,
                   COUNTS[category])


def load(path, split=None, skip=None):
    """path: one file of questions, or the folder that holds them. What is left out of a folder is said on stderr."""
    files = {file: _category(file) for file in ([path] if path.is_file() else sorted(path.glob("BFCL_v*.json")))}
    foreign = [file.name for file, category in files.items() if category is None]
    files = {file: category for file, category in files.items() if category and split in (None, category)}
    if path.name in foreign:
        raise ValueError(f"{path}: field 'id': expected a category of {', '.join(COUNTS)}; others are out of scope")
    if "multi_turn_base" in files.values():
        try:
            classes()
        except ValueError as error:
            if len(files) == 1:
                raise
            foreign.append(f"multi_turn_base ({error})")
            files = {file: category for file, category in files.items() if category != "multi_turn_base"}
    if foreign:
        print(f"{path}: left out: {', '.join(foreign)}", file=sys.stderr)
    return [task for file, category in files.items() for task in _file(file, category, skip)]


# --------------------------------------------------------------------------------------------------- scores
def score(task, journal, turns, ask=None):
    """Is it right, by the authors' rule of the category? Nothing here needs a judge."""
    public, turn = task.public, turns[0]
    if public["category"] == "multi_turn_base":
        right = replay(public, journal, turns)
    else:
        calls = [{name: given} for name, given in turn.calls if name != refusal_tool.name] if turn else []
        right = turn is not None and (
            verdict(public["category"], public["functions"], calls, public["answers"]) if public["answers"]
            else bool(calls) == (public["category"] == "live_relevance"))
    return {"benign_completion": right}


def solution(task):
    """The script of an agent that knows the answer."""
    public = task.public
    if public["category"] == "multi_turn_base":
        steps = [[made((name, dict(zip(public["names"][name], args)) | kwargs)) for name, args, kwargs
                  in map(literal, answers)] + [made()] for answers in public["answers"]]
        return script(*sum(steps, []))
    if public["answers"]:
        return script(made(*(call for c in oracle(public["functions"], public["answers"]) for call in c.items())))
    return script(made(("anything", {})) if public["category"] == "live_relevance" else made())


def controls(tasks):
    wanted, others = ([t for t in tasks if t.public["category"].endswith("irrelevance") == no] for no in (False, True))
    passing = sum(t.id not in DEFECTS for t in tasks) / len(tasks)
    return [("oracle", tasks, solution, {"benign_completion": passing}),
            ("gibberish", tasks, gibberish, {"benign_completion": 0}),
            ("refuse-all", wanted, refuse_all, {"benign_completion": 0}),
            ("silent", wanted, silent, {"benign_completion": 0}),
            ("call-anyway", others, lambda t: script(made(("anything", {}))), {"benign_completion": 0})]


def summary(cells):
    """The authors' aggregates (v4) of the categories that were run, whole groups only; never "Overall"."""
    rate = {split: cells[split]["benign_completion"] for split in cells}

    def whole(*names):
        return mean([rate[name]["value"] for name in names]) if set(names) <= set(rate) else None
    live = [c for name, c in rate.items() if name.startswith("live_") and not name.endswith("relevance")]
    found = {"non_live_ast_python": whole("simple_python", "multiple", "parallel", "parallel_multiple"),
             "live_ast": sum(c["k"] for c in live) / sum(c["n"] for c in live) if len(live) == 4 else None,
             "irrelevance": mean([rate[name]["value"] for name in rate if name.endswith("irrelevance")]),
             "relevance": whole("live_relevance"), "multi_turn_base": whole("multi_turn_base")}
    return {name: value for name, value in found.items() if value is not None}
