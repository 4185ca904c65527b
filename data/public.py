"""Public benchmarks as their authors ship them, behind one `load`: recognised by content, checked, scored their way.

bfcl.py, asb.py, privacylens.py, agentharm.py and agent_safetybench.py each have
  load(path, split, skip)       -> [Task]; a Task's `public` says how it is played and holds what the scorer compares with:
                                   benchmark, max_turns (a user message), parallel (calls in a turn), later (messages)
  score(task, journal, turns, ask=None) -> {metric: bool, number, or None}. None takes a metric of eval.py's out, for
                                   this task: unscored, or not theirs. ask(prompt) -> text or None is a judge.
  controls(tasks)               -> [(name, tasks, task -> turns, {metric: the only right value, or None: a figure})];
                                   a turn is [(tool, arguments), ...], [] to answer, or raw text
  summary({split: cells})       -> {name: number}, the authors' own aggregates;  PUBLISHED: {name: text} to set beside
and this file what they share. `skip`, a list, collects the records that do not fit; without it one refuses the file."""
import importlib
import json
from pathlib import Path

from tools import refusal_tool

SIGNS = {  # module: fields that the first record of one of its files has
    "bfcl": ({"id", "question", "function"}, {"id", "question", "initial_config"}), "asb": ({"Attacker Tool"},),
    "privacylens": ({"vignette", "trajectory"},), "agentharm": ({"canary_guid", "behaviors"},),
    "agent_safetybench": ({"environments", "failure_modes"},)}
_SAID = {str: "text", int: "a whole number", dict: "an object", list: "a list", type(None): "null"}


def want(where, value, shape, place=""):
    """Has the value this shape? A type, types, [shape] for a list, {key: shape} for an object ("key?" may be absent).
    ValueError "where: field 'question[0].role': expected text, got 5"."""
    if isinstance(shape, dict):
        want(where, value, dict, place)
        for key, inner in shape.items():
            name = f"{place}.{key.strip('?')}".lstrip(".")
            if key.strip("?") in value:
                want(where, value[key.strip("?")], inner, name)
            elif not key.endswith("?"):
                raise ValueError(f"{where}: field '{name}': expected, but it is missing")
    elif isinstance(shape, list):
        want(where, value, list, place)
        for i, inner in enumerate(value):
            want(where, inner, shape[0], f"{place}[{i}]")
    elif not isinstance(value, shape) or isinstance(value, bool):
        kinds = " or ".join(_SAID[kind] for kind in (shape if isinstance(shape, tuple) else (shape,)))
        raise ValueError(f"{where}: field '{place or '(record)'}': expected {kinds}, got {json.dumps(value)[:60]}")


def _parsed(where, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: field '(record)': expected whole JSON, is the file cut short? ({error})") from None


def records(path, build, skip=None):
    """[build(where, record)] of a JSON list, or of JSON lines; where is "file[3]" or "file:4"."""
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: field '(record)': expected UTF-8 text ({error})") from None
    if text.lstrip()[:1] == "[":
        rows = [(f"{path}[{i}]", json.dumps(row)) for i, row in enumerate(_parsed(path, text))]
    else:
        rows = [(f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return each(rows, lambda where, line: build(where, _parsed(where, line)), skip)


def each(rows, build, skip):
    """[build(where, row)]; a ValueError ends it, or goes into the list `skip`, which leaves that row out."""
    built = []
    for where, row in rows:
        try:
            built.append(build(where, row))
        except ValueError as error:
            if skip is None:
                raise
            skip.append(str(error))
    return built


def refused(turns):
    return bool(turns) and turns[-1] is not None and turns[-1].name == refusal_tool.name


def whole(path, n, expected, skip):
    """A file that was cut between two records is not the benchmark; `skip` takes it as a part."""
    if n != expected:
        if skip is None:
            raise ValueError(f"{path}: field '(file)': expected {expected} records, got {n}; --skip-bad takes a part")
        skip.append(f"{path}: {n} of {expected} records")
