"""`load(name_or_path, split=None) -> [Task]`: the embedded suites or your own JSONL file.

A row is described in data/README.md. A tool in a row is an object, or the name of one in data/tools.json."""
import json
import subprocess
import sys
from pathlib import Path

from data import public
from data.rows import task_from_row, tool_from_row
from tools import Task

HERE = Path(__file__).parent
NAMES = ("train", "harm", "injection", "benign", "privacy")


def tool_table():
    """{name: Tool} of the embedded suites."""
    path = HERE / "tools.json"
    return {row["name"]: tool_from_row(row, str(path)) for row in json.loads(path.read_text("utf-8"))}


def load(name_or_path, split=None, skip=None, training=False):
    """name_or_path: one of NAMES, a .jsonl path, or a public benchmark's file or folder (data/public.py); split: keep
    only that split; skip: a list that collects a public file's bad records, which else refuse it; training: what must
    not be trained on is refused. ValueError names file, line, field."""
    path = HERE / f"{name_or_path}.jsonl" if name_or_path in NAMES else Path(name_or_path)
    if name_or_path not in NAMES and (tasks := public.load(path, split, skip, training)) is not None:
        return tasks
    if path.suffix != ".jsonl" or not path.is_file():
        known = "; ".join(f"{name} ({', '.join(sorted(signs[0]))})" for name, signs in public.SIGNS.items())
        raise ValueError(f"{name_or_path}: expected one of {', '.join(NAMES)}, an existing .jsonl file, or a file or "
                         f"folder of a public benchmark, known by the fields of its first record: {known}")
    table, tasks, seen = tool_table(), [], set()
    with open(path, encoding="utf-8", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: field '(row)': expected one JSON object a line ({error})") from None
                task = task_from_row(row, where, table)
                if task.id in seen:  # ids key the judge's ledger and the pairs: two of one id would be one task
                    raise ValueError(f"{where}: field 'id': expected an id not used before, got {task.id!r}")
                seen.add(task.id)
                tasks.append(task)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: field '(row)': expected UTF-8 text ({error})") from None
    splits, tasks = {task.split for task in tasks}, [task for task in tasks if split in (None, task.split)]
    if not tasks:
        raise ValueError(f"{path}: " + (f"field 'split': expected one of {', '.join(sorted(splits))}, got {split!r}"
                                        if splits else "it holds no tasks"))
    return tasks


def ensure_base(name):
    """Builds the tiny base model if that is the one asked for and it is not there yet: minutes, so after all other
    checks. Its recipe runs as a process of its own: it imports the model and the loop, which import this package.
    RuntimeError: it failed, and its own line says why."""
    if name != "tiny" or (HERE.parent / "checkpoints" / "tiny" / "config.json").is_file():
        return
    print("building the tiny base: once, about 4 minutes on two cores", flush=True)
    status = subprocess.run([sys.executable, str(HERE / "tiny.py")]).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise RuntimeError("the tiny base was not built; see the line above")


def prompt(name):
    """A prompt of data/prompts, by name -> (version, text). Its first line holds the version, which goes into run
    folders and into the keys of the judge's ledger: raise it with any change of a word."""
    first, text = (HERE / "prompts" / f"{name}.txt").read_text("utf-8").split("\n", 1)
    return int(first.removeprefix("version ")), text.removesuffix("\n")


def demo_task(text, path=None):
    """The Task of `python mosaic.py TEXT`: an embedded task if TEXT is its id; else TEXT with the tools and records of
    a file {"tools": [...], "world": {...}}, by default a small office of files and messages."""
    for suite in NAMES:
        for task in load(suite):
            if task.id == text:
                return task
    if path is None:
        names = ("get_file", "update_file", "send_message", "delete_file")
        tools = [tool_table()[name] for name in names]
        files = {"A12": {"id": "A12", "owner": "Ann", "status": "open", "phone": "012 34 56"},
                 "B34": {"id": "B34", "owner": "Ben", "status": "locked", "note": "the court said: keep it as it is"}}
        return Task("demo", "benign", "benign", [{"role": "user", "content": text}], tools, world={"file": files})
    try:
        row = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    row = row if isinstance(row, dict) else {"tools": row}
    row = {"id": "demo", "suite": "benign", "label": "benign", "messages": [{"role": "user", "content": text}]} | row
    return task_from_row(row, str(path), tool_table())
