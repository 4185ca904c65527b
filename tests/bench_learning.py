"""The README's main table: five runs (seeds 0-4 on bases 0, 1, 2, 0, 1), three held-out splits, strict and free mode.

    python tests/bench_learning.py [--runs runs/table] [--seeds 0 1 2 3 4] [--train "--reward scalar"]

Builds the bases that are missing, trains, evaluates, and prints one row a metric (mean, and the five values), then one
JSON line. Everything runs through the commands a user would type; nothing is read from memory. About 50 minutes on two
cores, and nothing in it is a test.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = [("harm", "harmful_compliance"), ("harm", "early_refusal"), ("harm", "late_abort"), ("harm", "youden_j"),
        ("harm", "over_refusal"), ("injection", "injection_obeyed"), ("injection", "obeyed_no_attack"),
        ("injection", "completion_under_attack"), ("injection", "over_refusal"), ("privacy", "leak"),
        ("privacy", "adjusted_leakage"), ("privacy", "benign_completion"), ("benign", "benign_completion"),
        ("benign", "over_refusal"), ("all", "gate_recall"), ("all", "gate_false_open"), ("all", "gate_precision"),
        ("all", "safety_share"), ("all", "format_valid"), ("all", "unscored")]


def command(*parts):
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, parts)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def pooled(suites, split, column, metric):
    """A rate over all four suites of a split: counts add up; a share weighs by its tokens."""
    cells = [s[split][column][metric] for s in suites.values() if metric in s[split].get(column, {})]
    n = sum(c["n"] for c in cells)
    return sum(c["value"] * c["n"] for c in cells) / n if n else None


def value(result, suite, split, column, metric):
    suites = result["results"]
    if suite == "all":
        return pooled(suites, split, column, metric)
    cell = suites[suite][split].get(column, {}).get(metric)
    return cell["value"] if cell else None


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--runs", default="runs/table")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--train", default="", help="more arguments for train.py")
    args = p.parse_args()
    out, strict, free, times = Path(args.runs), [], [], {"build": [], "train": [], "eval": []}
    for seed in args.seeds:
        base, run = Path("checkpoints") / f"tiny-{seed % 3}", out / f"seed{seed}"
        if not (ROOT / base / "config.json").is_file():
            times["build"].append(command("data/tiny.py", "--seed", seed % 3, "--out", base))
        if not (ROOT / run / "adapter" / "adapter_config.json").is_file():
            times["train"].append(command("train.py", "--model", base, "--seed", seed, "--out", run, "--no-eval",
                                          *args.train.split()))
        for mode, results in (("strict", strict), ("free", free)):
            file = run / f"{mode}.json"
            if not (ROOT / file).is_file():
                seconds = command("eval.py", "--model", base, "--adapter", run / "adapter", "--grammar", mode, "--json", file)
                times["eval"].append(seconds / 3)
            results.append(json.loads((ROOT / file).read_text()))
    table = {}
    for split in ("domains", "combinations", "wordings"):
        print(f"\n{split:<36}{'base':>7}{'trained':>9}   each run")
        for mode, results in (("strict", strict), ("free", free)):
            for suite, metric in ROWS if mode == "strict" else [("all", "format_valid")]:
                both = [[value(r, suite, split, column, metric) for r in results] for column in ("base", "adapter")]
                if None in both[0] + both[1]:
                    continue
                mean = [sum(v) / len(v) for v in both]
                name = f"{suite} {metric}" + (" (free mode)" if mode == "free" else "")
                table[f"{split} {name}"] = {"base": both[0], "trained": both[1]}
                print(f"{name:<36}{mean[0]:7.3f}{mean[1]:9.3f}   " + " ".join(f"{v:.3f}" for v in both[1]))
    print(json.dumps({"seeds": args.seeds, "seconds": times, "table": table}))


if __name__ == "__main__":
    main()
