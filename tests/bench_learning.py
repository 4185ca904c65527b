"""The learning tables: several runs on several bases, held-out splits, late temptation.

    python tests/bench_learning.py       # tiny: seeds 0-4 on bases 0, 1, 2, 0, 1; in runs/table
    python tests/bench_learning.py --seeds 0 1 2 --splits domains \
        --train "--reward scalar" --runs runs/scalar
    python tests/bench_learning.py --base smollm2-135m --seeds 0 1 2 3 --bases 0 0 0 1 \
        --splits wordings domains --pairs 100 --runs runs/smollm2-table

Builds the bases that are missing, trains, evaluates, and prints one row a metric (mean, and the
value of each run) and one JSON line. Everything runs through the commands a user would type; what
is there already is not made again, so it can be stopped and started; other --base, --pairs or
--train belong into another --runs. The late tasks are fresh rows of the unseen domains whose harm
shows only after two or three legitimate calls. On two cores about an hour for the five runs of
tiny, and some two hours for one of SmolLM2-135M; nothing in it is a test.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import mosaic  # noqa: E402
from data import suites  # noqa: E402
from tools import SPLITS, SUITES  # noqa: E402

# (suite, metric); suite "all": over all suites, see `pooled`
ROWS = [
    ("harm", "harmful_compliance"),
    ("harm", "early_refusal"),
    ("harm", "late_abort"),
    ("harm", "youden_j"),
    ("harm", "over_refusal"),
    ("injection", "injection_obeyed"),
    ("injection", "obeyed_no_attack"),
    ("injection", "completion_under_attack"),
    ("injection", "over_refusal"),
    ("privacy", "leak"),
    ("privacy", "adjusted_leakage"),
    ("privacy", "benign_completion"),
    ("privacy", "over_refusal"),
    ("benign", "benign_completion"),
    ("benign", "over_refusal"),
    ("all", "gate_recall"),
    ("all", "gate_false_open"),
    ("all", "gate_precision"),
    ("all", "safety_share"),
    ("all", "format_valid"),
    ("all", "unscored"),
    ("all", "tokens"),
]
FREE = [("all", "format_valid")]
LATE = [
    ("harm", "early_refusal"),
    ("harm", "late_abort"),
    ("harm", "harmful_compliance"),
    ("harm", "over_refusal"),
    ("harm", "benign_completion"),
    ("harm", "youden_j"),
]


def run_command(*parts):
    """Runs a command of the repository -> the seconds it took."""
    start = time.perf_counter()
    command = [sys.executable, *map(str, parts)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def write_late_tasks(path, n=250):
    """A file of n harmful tasks with late temptation and their twins, all of unseen domains."""
    tools = {row["name"]: row for row in suites.tool_rows()}
    drawn = suites.generate("harm", "domains", 16 * n, 1)
    rows = [row for row in drawn if row["meta"]["late"]][:2 * n]
    assert len(rows) == 2 * n, len(rows)
    lines = []
    for row in rows:
        row["tools"] = [tools[name] for name in row["tools"]]
        lines.append(json.dumps(row) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))


def pooled(results, split, column, metric):
    """A rate over all suites of a split: counts add up; a share weighs by its tokens."""
    cells = []
    for splits in results.values():
        cells_of_column = splits[split].get(column, {})
        if metric in cells_of_column:
            cells.append(cells_of_column[metric])
    n = sum(cell["n"] for cell in cells)
    if n == 0:
        return None
    return sum(cell["value"] * cell["n"] for cell in cells) / n


def value(result, suite, split, column, metric):
    """One number of an eval.py --json file; None: it is not there."""
    if suite == "all":
        return pooled(result["results"], split, column, metric)
    cell = result["results"][suite][split].get(column, {}).get(metric)
    return cell["value"] if cell else None


def show(title, results, split, rows):
    """Prints one table -> {row name: {"base": values, "trained": values}}, a value a run."""
    table = {}
    print(f"\n{title:<36}{'base':>7}{'trained':>9}   each run")
    for suite, metric in rows:
        base = [value(result, suite, split, "base", metric) for result in results]
        trained = [value(result, suite, split, "adapter", metric) for result in results]
        if None in base + trained:
            continue
        name = f"{suite} {metric}"
        table[name] = {"base": base, "trained": trained}
        each = " ".join(f"{number:.3f}" for number in trained)
        base_mean = sum(base) / len(base)
        trained_mean = sum(trained) / len(trained)
        print(f"{name:<36}{base_mean:7.3f}{trained_mean:9.3f}   {each}")
    return table


def train_one(name, base_seed, seed, out, more, seconds):
    """The base and the run of a seed, made if they are not there -> their two folders.

    name: tiny | smollm2-135m."""
    # The base of seed 0 is the one that train.py makes.
    base = ROOT / "checkpoints" / (f"{name}-{base_seed}" if base_seed else name)
    run = out / f"seed{seed}"
    if not (base / "config.json").is_file():
        recipe = data.HERE / data.BASES[name].recipe
        seconds["build"].append(run_command(recipe, "--seed", base_seed, "--out", base))
    if not (run / "adapter" / "adapter_config.json").is_file():
        goes_on = ["--resume"] if (run / "state").is_dir() else []
        took = run_command("train.py", "--model", base, "--seed", seed, "--out", run, "--no-eval",
                           *more, *goes_on)
        seconds["train"].append(took)
    return base, run


def evaluate(base, run, base_run, name, options, pairs):
    """eval.py, suite by suite -> (its JSON, the seconds).

    pairs: so many tasks of each suite, and of harm as many pairs; None: all tasks. base_run: where
    the base's own figures are kept. It is greedy, so one evaluation serves all runs on it.
    """
    took = 0
    results = {}
    base_run.mkdir(parents=True, exist_ok=True)
    for suite in ("harm",) if name == "late" else SUITES:
        limit = []
        if pairs is not None:
            limit = ["--limit", 2 * pairs if suite == "harm" else pairs]
        play = ["eval.py", "--model", base, "--suite", suite, *limit, *options]

        base_file = base_run / f"{name}-{suite}.json"
        if not base_file.is_file():
            took += run_command(*play, "--json", base_file, "--no-adapter")
        file = run / f"{name}-{suite}.json"
        if not file.is_file():
            took += run_command(*play, "--json", file, "--adapter", run / "adapter", "--no-base")

        found = json.loads(file.read_text())["results"][suite]
        of_base = json.loads(base_file.read_text())["results"][suite]
        for split in found:
            found[split]["base"] = of_base[split]["base"]
        results[suite] = found
    return {"results": results}, took


def evaluations(splits, late_file):
    """{name: the arguments of eval.py}"""
    table = {split: ("--split", split) for split in splits}
    table["free"] = ("--split", "domains", "--grammar", "free")
    table["late"] = ("--data", late_file)
    return table


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", choices=list(data.BASES), default="tiny")
    parser.add_argument("--runs", default="runs/table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--bases", type=int, nargs="+", default=[0, 1, 2, 0, 1],
                        help="the seed of each run's base")
    parser.add_argument("--splits", nargs="+", choices=SPLITS,
                        default=["domains", "combinations", "wordings"])
    parser.add_argument("--pairs", type=mosaic.count_option,
                        help="tasks of a suite, pairs of harm (default: all)")
    parser.add_argument("--train", default="", help="more arguments for train.py")
    args = parser.parse_args()
    if len(args.bases) < len(args.seeds):
        parser.error("--bases: one for each of --seeds")
    bases = args.bases[:len(args.seeds)]

    out = ROOT / args.runs
    late_file = out / "late.jsonl"
    write_late_tasks(late_file)
    jobs = evaluations(args.splits, late_file)
    seconds = {"build": [], "train": [], "evaluate a split": []}
    results = {name: [] for name in jobs}  # {name: [eval.py's JSON of each seed]}
    for base_seed, seed in zip(bases, args.seeds):
        base, run = train_one(args.base, base_seed, seed, out, args.train.split(), seconds)
        base_run = out / f"base{base_seed}"
        for name, options in jobs.items():
            found, took = evaluate(base, run, base_run, name, options, args.pairs)
            results[name].append(found)
            if took and name in args.splits:
                seconds["evaluate a split"].append(took)

    table = {}
    for split in args.splits:
        table[split] = show(f"{split}, strict grammar", results[split], split, ROWS)
    table["free"] = show("domains, free grammar", results["free"], "domains", FREE)
    table["late"] = show("late temptation, domains, strict", results["late"], "domains", LATE)
    log = {"base": args.base, "bases": bases, "seeds": args.seeds, "train": args.train,
           "pairs": args.pairs, "seconds": seconds, "table": table}
    print(json.dumps(log))


if __name__ == "__main__":
    main()
