"""Tasks, prompts and the base model: what the six files ask of this folder.

    load("harm")           the tasks of an embedded suite, your own JSONL file or a public benchmark
    prompt("agent")        a text of data/prompts with its version
    ensure_base("tiny")    builds the tiny base model if it is not there
    demo_task("Get A12.")  the task of `python mosaic.py "Get A12."`

A row of a JSONL file is described in data/README.md. A tool in a row is an object, or the name of
one in data/tools.json."""
import json
import subprocess
import sys
from pathlib import Path

from data import public
from data.rows import task_from_row, tool_from_row
from tools import Task, Tool

HERE = Path(__file__).resolve().parent
NAMES = ("train", "harm", "injection", "benign", "privacy")


def load(name_or_path: str, split: str | None = None, skip: list | None = None,
         training: bool = False) -> list[Task]:
    """Reads tasks: one of NAMES, a .jsonl path, or a public benchmark's file or folder
    (data/public).

    split: keep only that split. skip: a list that collects a public file's bad records, which would
    refuse the file otherwise. training: what must not be trained on is refused. ValueError names
    the file, the line and the field."""
    if name_or_path in NAMES:
        path = HERE / f"{name_or_path}.jsonl"
    else:
        path = Path(name_or_path)
        tasks = public.load(path, split, skip, training)
        if tasks is not None:
            return tasks
        if path.suffix != ".jsonl" or not path.is_file():
            raise ValueError(unknown_data(name_or_path))

    tasks = read_rows(path)
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
        known.append(f"{benchmark} ({', '.join(sorted(signs[0]))})")
    return (f"{name}: expected one of {', '.join(NAMES)}, an existing .jsonl file, or a file or "
            "folder of a public benchmark, known by the fields of its first record: "
            f"{'; '.join(known)}")


def read_rows(path: Path) -> list[Task]:
    """All tasks of a .jsonl file."""
    tools = tool_table()
    tasks = []
    seen_ids = set()
    # Lines end at \n alone: JSON text may hold the other separators that Python would split at.
    with open(path, encoding="utf-8", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                task = read_row(line, f"{path}:{number}", tools)
                # Ids key the judge's ledger and the pairs: two rows of one id would be one task.
                if task.id in seen_ids:
                    raise ValueError(f"{path}:{number}: field 'id': expected an id not used "
                                     f"before, got {task.id!r}")
                seen_ids.add(task.id)
                tasks.append(task)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: field '(row)': expected UTF-8 text ({error})") from None
    return tasks


def read_row(line: str, where: str, tools: dict) -> Task:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: field '(row)': expected one JSON object a line "
                         f"({error})") from None
    return task_from_row(row, where, tools)


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


def ensure_base(name: str) -> None:
    """Builds the tiny base model if that is the one asked for and it is not there yet.

    That takes minutes, so call it after all other checks. The recipe runs as a process of its own:
    it imports the model and the loop, which import this package. RuntimeError: it failed, and its
    own line says why."""
    built = HERE.parent / "checkpoints" / "tiny" / "config.json"
    if name != "tiny" or built.is_file():
        return
    print("building the tiny base: once, about 4 minutes on two cores", flush=True)
    with subprocess.Popen([sys.executable, str(HERE / "tiny.py")]) as recipe:
        try:
            status = recipe.wait()
        except KeyboardInterrupt:
            recipe.terminate()  # a kill, as subprocess.run does it, would leave half a base behind
            raise
    if status == 130:
        raise KeyboardInterrupt
    if status != 0:
        raise RuntimeError("the tiny base was not built; the line above says why")


def demo_task(text: str, tools_file: str | None = None) -> Task:
    """The Task of `python mosaic.py TEXT`.

    An embedded task, if TEXT is its id; else TEXT with the tools and records of a file
    {"tools": [...], "world": {...}}, by default those of a small office with files and messages.
    """
    for suite in NAMES:
        for task in load(suite):
            if task.id == text:
                return task
    if tools_file is None:
        return office_task(text)

    try:
        given = json.loads(Path(tools_file).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{tools_file}: expected JSON: {error}") from None
    if not isinstance(given, dict):
        given = {"tools": given}
    row = {
        "id": "demo",
        "suite": "benign",
        "label": "benign",
        "messages": [{"role": "user", "content": text}],
        **given,
    }
    return task_from_row(row, str(tools_file), tool_table())


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
