"""Tasks, prompts and the base model: what the six files ask of this folder.

    load("harm")           the tasks of an embedded suite, your own JSONL file or a public benchmark
    prompt("agent")        a text of data/prompts with its version
    ensure_base("tiny")    builds a base model of ours if it is not there
    built_whole(folder)    where a recipe writes: the folder is there whole, or not at all
    demo_task("Get A12.")  the task of `python mosaic.py "Get A12."`

A row of a JSONL file is described in data/README.md. A tool in a row is an object, ours or one of
the usual lists', or the name of one in data/tools.json."""
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from data import public
from data.rows import can_be_written, task_from_row, tool_from_row
from tools import Task, Tool

HERE = Path(__file__).resolve().parent
NAMES = ("train", "train_varied", "harm", "injection", "benign", "privacy")


def load(name_or_path: str, split: str | None = None, skip: list | None = None,
         training: bool = False, with_twins: bool = False) -> list[Task]:
    """Reads tasks: one of NAMES, a .jsonl path, or a public benchmark's file, folder or name
    (data/public).

    split: keep only that split. skip: a list that collects a public file's bad records, which would
    refuse the file otherwise. training: what must not be trained on is refused. with_twins: so is a
    row of suite harm without its twin, as pairs are measured. ValueError names the file, the line
    and the field."""
    if name_or_path in NAMES:
        path = HERE / f"{name_or_path}.jsonl"
    else:
        path = Path(name_or_path)
        tasks = public.load(path, split, skip, training)
        if tasks is not None:
            return tasks
        if path.suffix != ".jsonl" or not path.is_file():
            raise ValueError(unknown_data(name_or_path))

    tasks = read_rows(path, with_twins)
    if not tasks:
        raise ValueError(f"{path}: it holds no tasks")
    chosen = [task for task in tasks if split is None or task.split == split]
    if not chosen:
        splits = sorted({task.split for task in tasks})
        raise ValueError(f"{path}: field 'split': expected one of {', '.join(splits)}, "
                         f"got {split!r}")
    return chosen


def unknown_data(name) -> str:
    known = []
    for benchmark, signs in public.SIGNS.items():
        if signs:
            known.append(f"{benchmark} ({', '.join(sorted(signs[0]))})")
    return (f"{name}: expected one of {', '.join(NAMES)}, agentdojo, an existing .jsonl file, or a "
            "file or folder of a public benchmark, known by the fields of its first record: "
            f"{'; '.join(known)}")


def read_rows(path: Path, with_twins: bool = False) -> list[Task]:
    """All tasks of a .jsonl file. with_twins: see `load`."""
    tools = tool_table()
    tasks = []
    places = {}  # {id: file and line}
    assumed = set()  # names of tools that do not tell their effect
    # Lines end at \n alone: JSON text may hold the other separators that Python would split at.
    # utf-8-sig: some editors begin a file with a byte order mark.
    with open(path, encoding="utf-8-sig", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                task = read_row(line, f"{path}:{number}", tools, assumed)
                # Ids key the judge's ledger and the pairs: two rows of one id would be one task.
                if task.id in places:
                    raise ValueError(f"{path}:{number}: field 'id': expected an id not used "
                                     f"before, got {task.id!r}")
                places[task.id] = f"{path}:{number}"
                tasks.append(task)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: field '(row)': expected UTF-8 text ({error})") from None
    if with_twins:
        check_twins(tasks, places)
    tell_assumed(str(path), assumed)
    return tasks


def read_row(line: str, where: str, tools: dict, assumed: set) -> Task:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: field '(row)': expected one JSON object a line "
                         f"({error})") from None
    return task_from_row(row, where, tools, assumed)


def check_twins(tasks: list[Task], places: dict):
    """Raises ValueError if a row of suite harm has no twin: without pairs there is no Youden's J,
    and a pair of two splits would drop out of it in silence."""
    by_id = {task.id: task for task in tasks}
    for task in tasks:
        if task.suite == "harm" and not is_twin(by_id.get(task.twin), task):
            raise ValueError(f"{places[task.id]}: field 'twin': expected the id of a row of suite "
                             f"harm, split {task.split} and the other label in this file, got "
                             f"{task.twin!r}")


def is_twin(other: Task | None, task: Task) -> bool:
    if other is None or other.label == task.label:
        return False
    return (other.suite, other.split) == (task.suite, task.split)


def tell_assumed(file: str, names: set):
    """Says on standard error which tools count as writes because nothing tells their effect."""
    if names:
        print(f"{file}: no effect is told for {', '.join(sorted(names))}: each counts as a write",
              file=sys.stderr)


def tool_table() -> dict[str, Tool]:
    """{name: Tool} of the embedded suites."""
    path = HERE / "tools.json"
    table = {}
    for row in json.loads(path.read_text("utf-8")):
        table[row["name"]] = tool_from_row(row, str(path))
    return table


def prompt(name: str) -> tuple[int, str]:
    """A prompt of data/prompts -> (version, text).

    Its first line holds the version, which is written into a run's folder and into the keys of the
    judge's ledger: raise it with any change of a word.
    """
    first_line, text = (HERE / "prompts" / f"{name}.txt").read_text("utf-8").split("\n", 1)
    return int(first_line.removeprefix("version ")), text.removesuffix("\n")


class Base(NamedTuple):
    """A base model that a recipe of this folder makes."""
    recipe: str  # its file
    family: str  # of its chat template, data/families.json
    takes: str   # how long, in words


BASES = {
    "tiny": Base("tiny.py", "tiny", "4 to 15 minutes on two cores"),
    "smollm2-135m": Base("smollm2.py", "compact", "about an hour on two cores"),
}


def is_built(name: str) -> bool:
    return (HERE.parent / "checkpoints" / name / "config.json").is_file()


def ensure_base(name: str) -> None:
    """Builds a base model of ours if it is the one asked for and is not there yet.

    That takes minutes, so call it after all other checks. The recipe runs as a process of its own:
    it imports the model and the loop, which import this package. RuntimeError: it failed, and its
    own line says why."""
    if name not in BASES or is_built(name):
        return
    base = BASES[name]
    print(f"building the base {name}: once, {base.takes}", flush=True)
    with subprocess.Popen([sys.executable, str(HERE / base.recipe)]) as recipe:
        try:
            status = recipe.wait()
        except KeyboardInterrupt:
            recipe.terminate()  # a kill, as subprocess.run does it, would leave half a base behind
            raise
    if status == 130:
        raise KeyboardInterrupt
    if status != 0:
        raise RuntimeError(f"the base {name} was not built; the line above says why")


def family_of_base(folder: Path) -> str | None:
    """By its config.json: a run's folder has one, too, and so has somebody's 7B."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("mosaic_family") if isinstance(config, dict) else None


@contextmanager
def built_whole(out: Path, family: str | None = None) -> Iterator[Path]:
    """Yields an empty folder that becomes `out` at the end, so that `out` is whole or not there.

    A base of ours of the same family that was there is replaced. ValueError: something else is.
    """
    if out.exists() and (family is None or family_of_base(out) != family):
        wanted = f"{family} base" if family else "checkpoint"
        raise ValueError(f"{out}: is there and no {wanted}: move it away, or take another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    # beside `out`, so that the last step is a rename; hidden, so that nobody takes it for a model
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    folder = work / "whole"
    folder.mkdir()  # with the umask's mode: what mkdtemp makes is only for its owner
    try:
        yield folder
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def demo_task(text: str, tools_file: str | None = None) -> Task:
    """The Task of `python mosaic.py TEXT`.

    An embedded task, if TEXT is its id; else TEXT with the tools and records of a file
    {"tools": [...], "world": {...}}, by default those of a small office with files and messages.
    """
    for suite in NAMES:
        for task in load(suite):
            if task.id == text and tools_file is not None:
                raise ValueError(f"--tools {tools_file}: {text} is an embedded task, which has its "
                                 "own tools: leave --tools out")
            if task.id == text:
                return task
    if not can_be_written(text):  # the terminal's bytes were not UTF-8
        raise ValueError(f"{text!r}: expected a task in UTF-8")
    if tools_file is None:
        return office_task(text)

    try:
        given = json.loads(Path(tools_file).read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{tools_file}: expected JSON: {error}") from None
    if not isinstance(given, dict):
        given = {"tools": given}
    row = {
        "id": "demo",
        "suite": "benign",
        "label": "benign",
        "messages": [{"role": "user", "content": text}],
    }
    for field in row:
        if field in given:  # a whole row: its words would take the place of TEXT
            raise ValueError(f"{tools_file}: field '{field}': expected tools and world alone, as "
                             "the command gives the task")
    row |= given
    assumed = set()
    task = task_from_row(row, str(tools_file), tool_table(), assumed)
    tell_assumed(str(tools_file), assumed)
    return task


def office_task(text: str) -> Task:
    table = tool_table()
    names = ("get_file", "update_file", "send_message", "delete_file")
    files = {
        "A12": {"id": "A12", "owner": "Ann", "status": "open", "phone": "012 34 56"},
        "B34": {"id": "B34", "owner": "Ben", "status": "locked",
                "note": "the court said: keep it as it is"},
    }
    return Task(
        id="demo",
        suite="benign",
        label="benign",
        messages=[{"role": "user", "content": text}],
        tools=[table[name] for name in names],
        world={"file": files},
    )
