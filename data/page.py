"""The page that is read in a browser: eval.py --report, and a run's report.html.

`data/report.html` is the page, a file that can be opened and edited; here is only the JSON that it
shows, and how that is put into it. The page loads nothing: its Content-Security-Policy names the
hashes of its own style and script. What models and tools wrote is JSON text in it, never markup.

    results {suite: {split: ...}}, items    eval.py's               `evaluation`
    the logs of a run's folder              train.py's              `training`
    both, and what was run                  -> one file             `page`

Each text stands once in "texts", and trajectories say its number: a prompt of four trajectories, or
the result of the same call, costs its place once. A trajectory is a list of blocks (`blocks`): what
the user said, a plan, a check, an action and so on, in the order of the page's strips.

    python eval.py --report page.html      # then open page.html; --report and --json hold the same
"""
import base64
import hashlib
import json
import math
import re
from collections import defaultdict
from pathlib import Path

from tools import is_refusal

TEMPLATE_FILE = Path(__file__).resolve().with_name("report.html")
# Bytes of the texts of a training run that one page holds. A run of a 7B writes some 20 KB a
# trajectory and 12,800 of them, which no browser opens in a moment.
TRAINING_BYTES = 40_000_000

# The numbers that stand on top: (suite, metric, which way is better).
HEADLINE = (
    ("harm", "harmful_compliance", "low"),
    ("harm", "early_refusal", "high"),
    ("harm", "over_refusal", "low"),
    ("injection", "injection_obeyed", "low"),
    ("privacy", "leak", "low"),
    ("benign", "benign_completion", "high"),
)


def page(title: str, about: dict, parts: list[dict]) -> str:
    """The whole page. about: {label: value} of what was run. parts: those of `evaluation` and
    `training`, or one of them."""
    texts = Texts()
    content = {
        "title": title,
        "about": [[label, "-" if value is None else str(value)] for label, value in about.items()],
        "controls": None,
        "columns": [],
        "headline": [],
        "plane": [],
        "tables": [],
        "summary": [],
        "paper": [],
        "meanings": {},
        "evaluated": [],
        "trained": [],
        "trained_note": "",
        "curves": {"step": []},
    }
    tasks = {}
    for part in parts:
        content |= part["shown"]
        content["evaluated"] += pack_items(part["items"], content["columns"], tasks, texts)
        content["trained"] += pack_groups(part["records"], tasks, texts)
    content["tasks"] = [pack_task(record) for record in tasks.values()]
    content["texts"] = texts.all
    return fill(TEMPLATE_FILE.read_text("utf-8"), content)


def fill(template: str, content: dict) -> str:
    """Puts the data and the policy's hashes into the template."""
    # ASCII: no direction mark, no lone surrogate and no line separator stands in the file as it is.
    # Without "<" no text can close the block that it stands in, or open a comment.
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    for name in ("style", "script"):
        [inner] = re.findall(rf"<{name}>(.*?)</{name}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        template = template.replace(f"{name}-src 'unsafe-inline'", f"{name}-src 'sha256-{digest}'")
    before, after = template.split(">null</script>")  # the block "data"
    return f"{before}>{text}</script>{after}"


class Texts:
    """Every text once: `number` says which of `all` it is."""

    def __init__(self):
        self.all = []
        self.numbers = {}

    def number(self, text: str) -> int:
        if text not in self.numbers:
            self.numbers[text] = len(self.all)
            self.all.append(text)
        return self.numbers[text]


# -------------------------------------------------------------------------------- an evaluation
def evaluation(results: dict, columns: list[str], items: list[dict], controls: dict, summary: dict,
               in_order, meanings: dict, paper: list) -> dict:
    """What eval.py found -> a part of the page.

    results, items, controls, summary: as its last line and --json have them. in_order:
    sorts the metrics of a table. meanings {metric: what it says}. paper: [(metric, figure)]."""
    tables = []
    for suite, by_split in results.items():
        for split, entry in by_split.items():
            tables.append(table(suite, split, entry, columns, in_order))
    control_rows = []
    for suite, rows in controls.items():
        control_rows += [{"suite": suite, **row} for row in rows]
    shown = {
        "controls": control_rows,
        "columns": columns,
        "headline": headline(results, columns),
        "plane": plane(results, columns),
        "tables": tables,
        "summary": summary_rows(summary),
        "paper": paper,
        "meanings": meanings,
    }
    return {"shown": shown, "items": items, "records": []}


def table(suite: str, split: str, entry: dict, columns: list[str], in_order) -> dict:
    metrics = []
    for column in columns:
        metrics += entry[column]
    rows = []
    for metric in in_order(metrics):
        rows.append({
            "metric": metric,
            "cells": [entry[column].get(metric) for column in columns],
            "test": entry["mcnemar"].get(metric),
        })
    return {"suite": suite, "split": split, "n": entry["n"], "rows": rows}


def main_split(by_split: dict) -> str:
    """Unseen domains, where a suite has that split: elsewhere its first."""
    return "domains" if "domains" in by_split else list(by_split)[0]


def headline(results: dict, columns: list[str]) -> list[dict]:
    """The numbers of HEADLINE that were measured."""
    found = []
    for suite, metric, better in HEADLINE:
        if suite not in results:
            continue
        split = main_split(results[suite])
        cells = [results[suite][split][column].get(metric) for column in columns]
        if any(cells):
            place = {"suite": suite, "split": split, "metric": metric}
            found.append(place | {"better": better, "cells": cells})
    return found


def plane(results: dict, columns: list[str]) -> list[dict]:
    """A point a split of suite harm and a column: over-refusal against harmful compliance."""
    points = []
    for split, entry in results.get("harm", {}).items():
        for number, column in enumerate(columns):
            x = entry[column].get("over_refusal")
            y = entry[column].get("harmful_compliance")
            if x and y and "low" in x and "low" in y:
                points.append({"split": split, "column": number, "x": x, "y": y})
    return points


def summary_rows(summary: dict) -> list:
    rows = []
    for suite, by_column in summary.items():
        for column, aggregates in by_column.items():
            for name, value, published in aggregates:
                rows.append([suite, column, name, value, str(published or "")])
    return rows


def pack_items(items: list[dict], columns: list[str], tasks: dict, texts: Texts) -> list:
    """Items of eval.py -> [[task's number, suite, split, [a trajectory a column, or None]]]."""
    rows = {}
    for item in items:
        place = (item["suite"], item["split"], item["task"])
        row = rows.setdefault(place, [None] * len(columns))
        packed = pack_trajectory(item, texts) + [outcome_word(item), is_right(item)]
        row[columns.index(item["column"])] = packed
        tasks.setdefault(place, item)
    numbers = {place: number for number, place in enumerate(tasks)}
    return [[numbers[place], place[0], place[1], row] for place, row in rows.items()]


def outcome_word(item: dict) -> str:
    """How an episode of eval.py went, in two words."""
    if not item["scored"]:
        return "unreadable"
    if item["harmful"]:
        return harmful_outcome(item)
    if item["leaked"]:
        return "leaked"
    if item["obeyed"]:
        return "obeyed an order"
    if item["refused_at"] is not None:
        return "over-refused"
    if item["benchmark"]:  # its own scorer says whether it is done: see the tables
        return f"ended by {item['ended']}"
    return "completed" if item["goal_done"] else "not completed"


def harmful_outcome(item: dict) -> str:
    if item["early"]:
        return "refused early"
    if item["late"]:
        return "refused late"
    return "complied" if item["unsafe"] else "stopped, no refusal"


def is_right(item: dict) -> bool | None:
    """Did the agent do what the task asks, by its label? None: a public benchmark decides that by
    rules of its own."""
    if item["benchmark"]:
        return None
    return outcome_word(item) in ("refused early", "completed")


# ------------------------------------------------------------------------------------- a training
def training(folder: Path | None, read_lines) -> dict:
    """The logs of a run's folder -> a part of the page; an empty one without a folder or logs.

    read_lines: model.read_lines, which leaves out a last line that was cut. ValueError: they are
    not train.py's, or of a version that did not write down the messages."""
    try:
        curves = curves_of(read_log(folder, "metrics", read_lines))
        records = read_log(folder, "rollouts", read_lines)
        for record in records:
            if "verdicts" not in record:  # nor messages
                raise LookupError("rollouts.jsonl is an older train.py's")
        kept, note = thinned(records)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: its logs are not those of this train.py ({error!r}); to leave "
                         "the training out, move its metrics.jsonl and rollouts.jsonl") from None
    shown = {"curves": {"step": []} | curves, "trained_note": note}
    return {"shown": shown, "items": [], "records": kept}


def read_log(folder: Path | None, name: str, read_lines) -> list[dict]:
    """The lines of one of train.py's logs; [] where there is no run, or no such file. ValueError:
    it is no log."""
    if folder is None:
        return []
    file = folder / f"{name}.jsonl"
    try:
        return [json.loads(line) for line in read_lines(file)]
    except ValueError as error:
        raise ValueError(f"{file}: not a log of train.py: {error}") from None


def curves_of(steps: list[dict]) -> dict:
    """{a number of metrics.jsonl: its value in each step, None where it has none}"""
    names = set()
    for step in steps:
        names |= {name for name, value in step.items() if is_finite(value)}
    curves = {}
    for name in sorted(names):
        values = [step.get(name) for step in steps]
        curves[name] = [value if is_finite(value) else None for value in values]
    return curves


def is_finite(value) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # NaN and Infinity are no JSON


def thinned(records: list[dict]) -> tuple[list[dict], str]:
    """As many steps, evenly spread, as a page can hold -> (their records, what to say of it)."""
    sizes = defaultdict(int)  # {step: bytes}
    for record in records:
        sizes[record["step"]] += len(json.dumps(record["messages"]))
    steps = sorted(sizes)
    every = 1
    while sum(sizes[step] for step in steps[::every]) > TRAINING_BYTES and every < len(steps):
        every *= 2
    kept = set(steps[::every])
    note = "A group: the trajectories of one task, all verdicts, rewards and advantages."
    if every > 1:
        note += f" One of {every} steps is here, for size; rollouts.jsonl holds all {len(steps)}."
    return [record for record in records if record["step"] in kept], note


def pack_groups(records: list[dict], tasks: dict, texts: Texts) -> list:
    """Records of rollouts.jsonl -> [[step, task's number, [member, ...]]]."""
    groups = defaultdict(list)
    for record in records:
        groups[record["step"], record["task"]].append(record)
        tasks.setdefault(("trained", record["task"]), record)
    numbers = {place: number for number, place in enumerate(tasks)}
    packed = []
    for (step, task), members in groups.items():
        rows = [pack_member(record, texts) for record in members]
        packed.append([step, numbers["trained", task], rows])
    return packed


def pack_member(record: dict, texts: Texts) -> dict:
    member = {name: record[name] for name in ("rewards", "reward", "advantage", "wins", "verdicts")}
    return member | {"seen": pack_trajectory(record, texts) + [None, None]}


# --------------------------------------------------------------------------- one trajectory, packed
def pack_task(record: dict) -> dict:
    packed = {
        "id": record["task"],
        "suite": record["suite"],
        "label": record["label"],
        "twin": record["twin"],
        "order": record["order"],
        "secrets": record["secrets"],
    }
    if "canary" in record:  # whoever collects pages to train on leaves this one out
        packed["canary"] = record["canary"]
    return packed


def pack_trajectory(record: dict, texts: Texts) -> list:
    packed = []
    for kind, text, faults in blocks(record):
        packed.append([kind, texts.number(text), faults])
    return [packed, record["gates"], record["ended"], record["tokens"]]


PARTS = re.compile(
    r"<think>\n(.*?)\n</think>"
    r"(?:\n\n<safety_thoughts>\n(.*?)\n</safety_thoughts>)?"
    r"(?:\n\n<answer>\n(.*?)\n</answer>)?", re.DOTALL)  # as data/record.py writes a turn


def blocks(record: dict) -> list:
    """A record's messages -> [(kind, text, faults)], in the order in which they happened.

    kind: system, user, plan, check, action, refusal, answer, malformed (a turn that did not parse),
    result or error (what such a turn was shown). faults: what the journal says of that call."""
    faults = {effect[0]: effect[3] for effect in record["journal"]}  # {step: faults}
    messages = record["messages"]
    step = 0  # as the sandbox counts: one a call, one an answer, one a turn that did not parse
    found = []
    for place, message in enumerate(messages):
        text = message.get("content") or ""
        if message["role"] != "assistant":
            found.append((plain_kind(message), text, []))
            continue
        found += turn_blocks(text, followed_by_error(messages, place))
        calls = call_texts(message)
        is_history = place < record["given"]  # of the task itself: nothing was executed
        for kind, shown in calls:
            found.append((kind, shown, [] if is_history else faults.get(step, [])))
            step += 1
        if not calls:
            step += 1
        if is_history:
            step = 0
    return found


def call_texts(message: dict) -> list:
    """[("action" or "refusal", the call as text)]"""
    found = []
    for call in message.get("tool_calls") or []:
        call = call.get("function") or call  # some benchmarks record it without its shell
        name = call["name"]
        arguments = call["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        kind = "refusal" if refuses(name, arguments) else "action"
        found.append((kind, f"{name} {arguments}"))
    return found


def plain_kind(message: dict) -> str:
    if message["role"] == "tool":
        return "result"
    if message.get("name") == "sandbox":
        return "error"
    return "system" if message["role"] == "system" else "user"


def followed_by_error(messages: list[dict], place: int) -> bool:
    return place + 1 < len(messages) and plain_kind(messages[place + 1]) == "error"


def turn_blocks(text: str, did_not_parse: bool) -> list:
    """What an assistant's message says beside its calls."""
    parts = PARTS.fullmatch(text)
    if did_not_parse:
        return [("malformed", text, [])]
    if parts is None:  # of a task's own history, which has no such form
        return [("answer", text, [])] if text else []
    found = []
    for kind, part in zip(("plan", "check", "answer"), parts.groups()):
        if part is not None:
            found.append((kind, part, []))
    return found


def refuses(name: str, arguments: str) -> bool:
    try:
        return is_refusal(name, json.loads(arguments))
    except ValueError:  # a benchmark's history may hold any text
        return False
