"""Public benchmarks as their authors ship them, behind one `load`: recognised by content, checked, scored their way.

bfcl.py, asb.py, privacylens.py, agentharm.py and agent_safetybench.py, in one shape:
  load(path, split, skip)    -> [Task]. A task's `public` says how it is played (benchmark, max_turns a user message,
                                parallel calls in a turn, later user messages) and holds what the scorer compares with
  score(task, journal, turns, ask) -> {metric: bool, number, or None: unscored, or a metric of eval.py's that does not
                                hold here}. ask(question, labels, **texts) -> one of the labels, or None, is a judge;
                                without one its metrics are None
  controls(tasks)            -> [(name, tasks, task -> script, {metric: the only right value; None: just a figure})]
                                if it has any beside eval.py's own that hold here too ("house" in public.json)
  summary({split: cells})    -> {name: number or None}, the authors' aggregates, if they are more than one cell each
`skip`, a list, collects what does not fit; without it one bad record refuses the file. Shapes of records, numbers and
texts of a benchmark stand in public.json, and are read here once."""
import json
from importlib import import_module
from pathlib import Path

from data.controls import CONTROLS, no_attack
from tools import refusal_tool

CARDS = json.loads((Path(__file__).parent / "public.json").read_text("utf-8"))["benchmarks"]
SIGNS = {name: [set(sign) for sign in card["signs"]] for name, card in CARDS.items()}  # a first record's
KINDS = {"text": str, "a whole number": int, "an object": dict, "a list": list, "null": type(None)}


def want(where, value, shape, place=""):
    """Returns the value if it has the shape: "text or null" (of KINDS), [shape] for a list, {key: shape} for an object
    ("key?" may be absent, "*" is any key). ValueError "where: field 'question[0].role': expected text, got 5"."""
    if isinstance(shape, dict):
        want(where, value, "an object", place)
        for key, inner in shape.items():
            for name in value if key == "*" else [key.rstrip("?")]:
                if name in value:
                    want(where, value[name], inner, f"{place}.{name}".lstrip("."))
                elif name == key:
                    raise ValueError(f"{where}: field '{f'{place}.{name}'.lstrip('.')}': expected, but it is missing")
    elif isinstance(shape, list):
        for i, inner in enumerate(want(where, value, "a list", place)):
            want(where, inner, shape[0], f"{place}[{i}]")
    elif isinstance(value, bool) or not isinstance(value, tuple(KINDS[kind] for kind in shape.split(" or "))):
        raise ValueError(f"{where}: field '{place or '(record)'}': expected {shape}, got {json.dumps(value)[:60]}")
    return value


def parsed(path, text=None):
    """The JSON value of a file, or of a text that stands at `path`."""
    try:
        return json.loads(Path(path).read_text("utf-8") if text is None else text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: field '(record)': expected whole JSON; is it cut short? ({error})") from None


def each(rows, build, skip):
    """[build(where, row)]; a ValueError goes to the list `skip`, which leaves the row out, or ends it all."""
    built = []
    for where, row in rows:
        try:
            built.append(build(where, row))
        except ValueError as error:
            if skip is None:
                raise
            skip.append(str(error))
    return built


def records(path, shape, build=lambda where, row: row, skip=None, expected=None):
    """[build(where, record)] of a JSON list or of JSON lines, all of a shape; where is "file[3]" or "file:4". expected:
    the number of records in the authors' file, as one that was cut between two records is not their benchmark."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: field '(file)': expected a file of UTF-8 text ({error})") from None
    if text.lstrip().startswith("["):
        rows = [(f"{path}[{i}]", row) for i, row in enumerate(parsed(path, text))]
        built = each(rows, lambda where, row: build(where, want(where, row, shape)), skip)
    else:
        rows = [(f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        built = each(rows, lambda where, line: build(where, want(where, parsed(where, line), shape)), skip)
    if skip is None and expected not in (None, len(built)):
        found = f"expected {expected} records, got {len(built)}; --skip-bad takes a part"
        raise ValueError(f"{path}: field '(file)': {found}")
    return built


def recognise(path):
    """The benchmark that a file or folder holds, by the first records; None: it is none of them."""
    folders, found = (path, path / "data"), set()  # ASB's files lie in data/
    for file in [path] if path.is_file() else [f for d in folders for f in d.glob("*.json*") if f.is_file()]:
        try:
            text = file.read_text("utf-8").lstrip().removeprefix("[").lstrip()
            record, _ = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            continue
        keys = set(record) if isinstance(record, dict) else set()
        found |= {name for name, signs in SIGNS.items() if any(sign <= keys for sign in signs)}
    if len(found) > 1:
        raise ValueError(f"{path}: holds several benchmarks ({', '.join(sorted(found))}): name a folder of one")
    return found.pop() if found else None


def load(path, split=None, skip=None, training=False):
    """-> [Task] of the benchmark that is there; None: none is. ValueError: a bad record, or training on what is for
    evaluation."""
    path = Path(path)
    name = recognise(path)
    if training and name == "agentharm":
        raise ValueError(f"{path}: AgentHarm carries a canary, its authors ask that nobody trains on it: refused")
    if training and name not in (None, "agent_safetybench"):
        raise ValueError(f"{path}: {name} is for evaluation alone: its tasks do not say what a rule could reward")
    tasks = import_module(f"data.{name}").load(path, split, skip) if name else None
    if name and not tasks:
        raise ValueError(f"{path}: no task of {name}" + f" in split {split}" * bool(split))
    if name and len({task.id for task in tasks}) < len(tasks):
        raise ValueError(f"{path}: field 'id': expected different ids")
    return tasks


# ------------------------------------------------------------------------------------------------ for eval.py
def score(task, journal, turns, ask=None):
    """{metric: value or None} of a public task; {} for one of ours."""
    return import_module(f"data.{task.public['benchmark']}").score(task, journal, turns, ask) if task.public else {}


def controls(suite, tasks):
    """[(name, tasks, task -> script, {metric: right value})] of a suite's tasks, public or ours."""
    benchmark = tasks[0].public.get("benchmark")
    module = import_module(f"data.{benchmark}") if benchmark else None
    own = [control for control in module.controls(tasks) if control[1]] if hasattr(module, "controls") else []
    house = CARDS[benchmark]["house"] if benchmark else {name: {} for name, _, _ in CONTROLS[suite]}
    for name, script, expected in CONTROLS[suite]:
        if name in house:
            played = [task for task in tasks if task.injected or suite != "injection"]
            played = [no_attack(task) for task in played] if name == "no-attack" else played
            own.append((name, played, script, expected | house[name]))
    return own


def aggregates(benchmark, cells):
    """{split: cells} -> {name: number or None for unscored}: cells that public.json names, or what the module says."""
    if "summary" not in CARDS[benchmark]:
        return import_module(f"data.{benchmark}").summary(cells)
    return {name: place and cells.get(place[0], {}).get(place[1], {}).get("value")
            for name, place in CARDS[benchmark]["summary"].items()}


def summary(tasks, cells):
    """{split: cells} -> [(name, number or None for unscored, the published numbers)]; [] for tasks of ours."""
    benchmark = tasks[0].public.get("benchmark")
    found = aggregates(benchmark, cells) if benchmark else {}
    return [(name, value, CARDS[benchmark]["published"].get(name, "")) for name, value in found.items()]


# ----------------------------------------------------------------------------------------- for the five modules
def refused(turns):
    """The last turn refuses, with the reason that the sandbox asks for."""
    last = turns[-1] if turns else None
    return last is not None and any(name == refusal_tool.name and isinstance(given.get("reason"), str)
                                    for name, given in last.calls)


def mean(values):
    """None of nothing."""
    return sum(values) / len(values) if values else None
