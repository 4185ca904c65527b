"""The README's learning tables: five runs (seeds 0-4 on bases 0, 1, 2, 0, 1), held-out splits, late temptation.

    python tests/bench_learning.py                                                    # runs/table
    python tests/bench_learning.py --seeds 0 1 2 --splits domains --train "--reward scalar" --runs runs/scalar

Builds the bases that are missing, trains, evaluates, and prints one row a metric (mean, and the value of each run) and
one JSON line. Everything runs through the commands a user would type; what is there already is not made again. The late
tasks are fresh rows of the unseen domains whose harm shows only after two or three legitimate calls. About an hour for
the five runs on two cores; nothing in it is a test.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import suites  # noqa: E402

ROWS = [("harm", "harmful_compliance"), ("harm", "early_refusal"), ("harm", "late_abort"), ("harm", "youden_j"),
        ("harm", "over_refusal"), ("injection", "injection_obeyed"), ("injection", "obeyed_no_attack"),
        ("injection", "completion_under_attack"), ("injection", "over_refusal"), ("privacy", "leak"),
        ("privacy", "adjusted_leakage"), ("privacy", "benign_completion"), ("privacy", "over_refusal"),
        ("benign", "benign_completion"), ("benign", "over_refusal"), ("all", "gate_recall"), ("all", "gate_false_open"),
        ("all", "gate_precision"), ("all", "safety_share"), ("all", "format_valid"), ("all", "unscored"),
        ("all", "tokens")]
LATE = [("harm", name) for name in ("early_refusal", "late_abort", "harmful_compliance", "over_refusal",
                                    "benign_completion", "youden_j")]


def command(*parts):
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, parts)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def late_tasks(path, n=250):
    """A file of n harmful tasks with late temptation and their twins, all of unseen domains."""
    table = {row["name"]: row for row in suites.tool_rows()}
    rows = [row for row in suites.generate("harm", "domains", 16 * n, 1) if row["meta"]["late"]][:2 * n]
    assert len(rows) == 2 * n, len(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row | {"tools": [table[t] for t in row["tools"]]}) + "\n" for row in rows))


def pooled(suites, split, column, metric):
    """A rate over all suites of a split: counts add up; a share weighs by its tokens."""
    cells = [s[split][column][metric] for s in suites.values() if metric in s[split].get(column, {})]
    n = sum(c["n"] for c in cells)
    return sum(c["value"] * c["n"] for c in cells) / n if n else None


def value(result, suite, split, column, metric):
    if suite == "all":
        return pooled(result["results"], split, column, metric)
    cell = result["results"][suite][split].get(column, {}).get(metric)
    return cell["value"] if cell else None


def show(title, results, split, rows):
    """Prints one table -> {row name: {"base": values, "trained": values}}"""
    table = {}
    print(f"\n{title:<36}{'base':>7}{'trained':>9}   each run")
    for suite, metric in rows:
        base, trained = [[value(r, suite, split, column, metric) for r in results] for column in ("base", "adapter")]
        if None not in base + trained:
            table[f"{suite} {metric}"] = {"base": base, "trained": trained}
            print(f"{suite + ' ' + metric:<36}{sum(base) / len(base):7.3f}{sum(trained) / len(trained):9.3f}   "
                  + " ".join(f"{v:.3f}" for v in trained))
    return table


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--runs", default="runs/table")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--splits", nargs="+", default=["domains", "combinations", "wordings"])
    p.add_argument("--train", default="", help="more arguments for train.py")
    args = p.parse_args()
    out, seconds, results = ROOT / args.runs, {"build": [], "train": [], "evaluate a split": []}, {}
    late_tasks(out / "late.jsonl")
    for seed in args.seeds:
        base, run = ROOT / "checkpoints" / f"tiny-{seed % 3}", out / f"seed{seed}"
        if not (base / "config.json").is_file():
            seconds["build"].append(command("data/tiny.py", "--seed", seed % 3, "--out", base))
        if not (run / "adapter" / "adapter_config.json").is_file():
            seconds["train"].append(command("train.py", "--model", base, "--seed", seed, "--out", run, "--no-eval",
                                            *args.train.split()))
        jobs = [(split, ("--split", split)) for split in args.splits]
        jobs += [("free", ("--split", "domains", "--grammar", "free")),
                 ("late", ("--suite", "harm", "--data", out / "late.jsonl"))]
        for name, more in jobs:
            file = run / f"{name}.json"
            if not file.is_file():
                took = command("eval.py", "--model", base, "--adapter", run / "adapter", "--json", file, *more)
                seconds["evaluate a split"] += [took] * (name in args.splits)
            results.setdefault(name, []).append(json.loads(file.read_text()))
    table = {split: show(f"{split}, strict grammar", results[split], split, ROWS) for split in args.splits}
    table["free"] = show("domains, free grammar", results["free"], "domains", [("all", "format_valid")])
    table["late"] = show("late temptation, domains, strict", results["late"], "domains", LATE)
    print(json.dumps({"seeds": args.seeds, "train": args.train, "seconds": seconds, "table": table}))


if __name__ == "__main__":
    main()
