"""Public benchmarks as their authors ship them, behind one `load`.

A file or folder is recognised by what is in it, checked, and scored by its authors' rules as far as
these can be had: each module says what is a proxy or ours. AgentDojo is a package of its authors,
and recognised by its name. bfcl.py (suite benign), asb.py and agentdojo.py (injection),
privacylens.py (privacy), agentharm.py (harm) and agent_safetybench.py (training) have one shape:

  load(path, split, skip)   -> [Task]. A task's field `public` says of which "benchmark" it is and
                               how it is played ("max_turns" after a user message, "parallel" calls
                               in a turn, "later" user messages, "room" for tokens), and holds what
                               else the benchmark's module needs, for its scores above all.
  score(task, journal, turns, ask)
                            -> {metric: bool or number; None: unscored, or a metric of eval.py's
                               that does not hold here}. ask(question, labels, **texts) -> one of
                               the labels, or None, is a judge; without one its metrics are None
                               or absent.
  controls(tasks)           -> [(name, tasks, task -> script, {metric: the only right value; None:
                               just a figure})]: the controls that eval.py does not have.
  summary({split: cells})   -> {name: number or None}: the authors' aggregates, in bfcl and asb,
                               where one is more than a metric of a split.

`skip`, a list, collects the errors of records that do not fit; without it one bad record refuses
the file. What a loader knows by heart (numbers, words, the shapes of records) stands in the JSON
file beside it, of the same name. Its fields, but for those that it has no use for:

  signs      the fields by which a first record is recognised; each list suffices, none is a name
  record     the shape of a record, as `want` takes it (ASB: agent, normal, attack)
  counts     how many records the authors' files hold (AgentHarm: hashes)
  house      eval.py's own controls that hold here too, with the benchmark's right values in them
  published  what others measured, to stand beside an aggregate
  summary    {aggregate: [split, metric]}; null: it needs what is not here, a judge or graders of
             the authors. Without it the module has its own `summary`
  about      what the other fields mean, and where the published numbers are from

    python -c "import data; print(len(data.load('FOLDER')))"      # of ASB's data/: 4010

Next file: common.py, which reads the files; then the six, in any order.
"""
import json
from pathlib import Path

from data.controls import CONTROLS, no_attack, paste_leaks
from data.public import agent_safetybench, agentdojo, agentharm, asb, bfcl, privacylens
from tools import Task

MODULES = {
    "bfcl": bfcl,
    "asb": asb,
    "privacylens": privacylens,
    "agentharm": agentharm,
    "agent_safetybench": agent_safetybench,
    "agentdojo": agentdojo,
}
CARDS = {name: module.CARD for name, module in MODULES.items()}
SIGNS = {name: list(map(set, card["signs"])) for name, card in CARDS.items()}


# ------------------------------------------------------------------------------------------ loading
def load(path, split=None, skip: list | None = None, training=False) -> list[Task] | None:
    """The tasks of the benchmark that is there; None: none is.

    split: one of the benchmark's; None: all. ValueError: a bad record, nothing in the split, or
    training on what is for evaluation."""
    path = Path(path)
    found = recognise(path)
    if found is None:
        return None
    name, place = found
    if training:
        refuse_training(path, name)

    tasks = MODULES[name].load(place, split, skip)
    if not tasks:
        in_split = f" in split {split}" if split else ""
        raise ValueError(f"{path}: no task of {name}{in_split}")
    if len({task.id for task in tasks}) < len(tasks):
        raise ValueError(f"{path}: field 'id': expected different ids")
    return tasks


def refuse_training(path, name):
    """ValueError, but for Agent-SafetyBench: the others are only for evaluation."""
    if name == "agentharm":
        reason = "AgentHarm carries a canary, its authors ask that nobody trains on it: refused"
        raise ValueError(f"{path}: {reason}")
    if name != "agent_safetybench":
        reason = "is for evaluation alone: its tasks do not say what a rule could reward"
        raise ValueError(f"{path}: {name} {reason}")


def recognise(path: Path) -> tuple[str, Path] | None:
    """(benchmark, where it is): what a file, a folder or the folder data/ in it holds, by the
    fields of first records, or what a name means (agentdojo, agentdojo:slack). None: none of them.
    ValueError: several."""
    name = str(path).partition(":")[0]
    if name in SIGNS and not SIGNS[name]:  # it has no files
        return name, path

    found = {}  # {benchmark: the file or folder}
    for place in (path, path / "data"):  # a repository keeps its files in data/
        for name in held_in(place):
            found.setdefault(name, place)
    if len(found) > 1:
        several = ", ".join(sorted(found))
        raise ValueError(f"{path}: holds several benchmarks ({several}): name a folder of one")
    return found.popitem() if found else None


def held_in(place: Path) -> set:
    """The benchmarks that a file holds, or the files of a folder."""
    files = [place]
    if not place.is_file():
        files = [file for file in place.glob("*.json*") if file.is_file()]

    names = set()
    for file in files:
        fields = first_fields(file)
        for name, signs in SIGNS.items():
            if any(sign <= fields for sign in signs):
                names.add(name)
    return names


def first_fields(file: Path) -> set:
    """The fields of the first record of a JSON list or of JSON lines; empty: it is neither."""
    try:
        text = file.read_text("utf-8-sig").lstrip().removeprefix("[").lstrip()
        record, _ = json.JSONDecoder().raw_decode(text)  # stops where the first record ends
    except (ValueError, RecursionError):
        return set()
    return set(record) if isinstance(record, dict) else set()


# -------------------------------------------------------------------------------------- for eval.py
def score(task: Task, journal, turns, ask=None) -> dict:
    """{metric: value or None} of a public task; {} for one of ours.

    journal: the executed calls (tools.Effect); turns: tools.Turn, None for one that did not parse;
    ask: a judge, see above."""
    if not task.public:
        return {}
    return MODULES[task.public["benchmark"]].score(task, journal, turns, ask)


def takes_judge(task: Task) -> bool:
    """Does the score of this task have a part that only a judge can give?"""
    benchmark = task.public.get("benchmark")
    return benchmark == "agentharm" or (benchmark == "privacylens" and task.split == "action")


def canary(task: Task) -> dict:
    """{"canary": the GUID that the benchmark's authors mark its texts with}, or {}. It belongs into
    whatever holds a text of the task: whoever collects texts to train on leaves out what has it."""
    found = {}
    if "canary" in task.public:
        found["canary"] = task.public["canary"]
    return found


def controls(suite: str, tasks: list[Task]) -> list:
    """[(name, tasks, task -> script, {metric: right value})] of a suite's tasks, public or ours."""
    benchmark = tasks[0].public.get("benchmark")
    chosen = []
    if benchmark is None:
        house = {name: {} for name, _, _ in CONTROLS[suite]}  # all of eval.py's own, as they are
    else:
        house = CARDS[benchmark]["house"]
        for control in MODULES[benchmark].controls(tasks):
            if control[1]:  # it has tasks
                chosen.append(control)

    for name, script, expected in CONTROLS[suite]:
        if name not in house:
            continue
        played = tasks
        if suite == "injection":
            # in a task without an attack there is nothing to obey
            played = [task for task in tasks if task.injected]
        if name == "no-attack":
            played = [no_attack(task) for task in played]
        if name == "paste-all":
            played = [task for task in tasks if paste_leaks(task)]
        # A benchmark has controls of its own for what is left. Rows of ours have none: there a
        # control that nothing can be played on stays, and is invalid.
        if played or benchmark is None:
            chosen.append((name, played, script, expected | house[name]))
    return chosen


def aggregates(benchmark: str, cells: dict) -> dict:
    """{split: cells} -> {name: number or None for unscored}, as the card says, else the module."""
    card = CARDS[benchmark]
    if "summary" not in card:
        return MODULES[benchmark].summary(cells)

    found = {}
    for name, place in card["summary"].items():
        found[name] = None
        if place is not None:
            split, metric = place
            found[name] = cells.get(split, {}).get(metric, {}).get("value")
    return found


def version(tasks: list[Task]) -> str | None:
    """The version of a benchmark that is a package; None: of the others, whose files say it all."""
    return tasks[0].public.get("version")


def summary(tasks: list[Task], cells: dict) -> list:
    """{split: cells} -> [(name, number or None for unscored, the published numbers)]; [] for tasks
    of ours."""
    benchmark = tasks[0].public.get("benchmark")
    if benchmark is None:
        return []
    published = CARDS[benchmark]["published"]
    found = aggregates(benchmark, cells)
    return [(name, value, published.get(name, "")) for name, value in found.items()]
