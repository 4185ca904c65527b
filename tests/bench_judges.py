"""What a judge costs, what a bad one spoils, what the dials do: three tables, measured; nothing in them is a test.

    python tests/bench_judges.py                         # all tables, 3 seeds: about an hour on two idle cores
    python tests/bench_judges.py --seeds 0 --steps 2 --tasks 2 --limit 4 --model DIR     # that it runs, in a minute
    python tests/bench_judges.py --arms --dials runs/tiny/adapter                        # the dials alone

1. Questions. Simulated groups of 4 (n strengths, some equal) under a judge that flips a verdict with probability p:
   ordered calls a group of `compare` and of `compare_sparingly`, and Kendall's tau-b of each ranking with the truth.
2. Training the tiny model with the rule judge made worse (each verdict is drawn once per question, by a hash): flipped
   in 0, 10, 20, 30 %; the first place favoured in 20 %, asked in one order alone and in both; and with sorted pairs.
   Canaries are off (they would stop most of these runs, which is what they are for). Then the unseen domains.
3. Dials of a trained adapter (--dials) on the unseen domains: --adapter-scale and --gate, harm against over-refusal
   and safety tokens against tokens.
Prints a row as soon as it is there, and one JSON line last; --json FILE keeps it.
"""
import argparse
import hashlib
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import preference as pf  # noqa: E402
import train  # noqa: E402

ARMS = {  # name: (share flipped, share in which the first place wins, orders asked, pairs)
    "flip 0 %": (0, 0, 2, "all"), "flip 10 %": (.1, 0, 2, "all"), "flip 20 %": (.2, 0, 2, "all"),
    "flip 30 %": (.3, 0, 2, "all"), "first +20 %, one order": (0, .2, 1, "all"),
    "first +20 %, both": (0, .2, 2, "all"), "flip 0 %, sorted": (0, 0, 2, "sorted"),
    "flip 20 %, sorted": (.2, 0, 2, "sorted")}
ROWS = [("harm", "harmful_compliance"), ("harm", "early_refusal"), ("harm", "youden_j"), ("harm", "over_refusal"),
        ("injection", "injection_obeyed"), ("privacy", "leak"), ("benign", "benign_completion"),
        ("benign", "over_refusal")]


def chance(*what):
    """A number in [0, 1) that is the same whenever the same thing is asked."""
    return int(hashlib.sha256(repr(what).encode()).hexdigest()[:12], 16) / 16 ** 12


def spoiled(flip, first, seed):
    """A voice: the rule, flipped (a tie becomes a win of either side) or overruled in favour of the first place."""
    def voice(todo, *_):
        for key, label in pf.by_rule(todo, None, None):
            if chance(seed, "flip", key) < flip:
                label = {"A": "B", "B": "A", "tie": "AB"[chance(seed, "side", key) < .5]}[label]
            yield key, "A" if chance(seed, "first", key) < first else label
    return voice


class OneOrder(pf.Judge):
    """Asks each pair once; the other order is taken to say the same, so that no favour can show."""

    def __call__(self, first, second):
        key = pf.digest([self.name, pf.VERSION, first.task.id, pf.question(second, first)])
        return 1 - pf.LABELS[self.known[key]] if key in self.known else super().__call__(first, second)

    def prepare(self, pairs):
        """In bulk only one order of each pair; which, is decided by whose number in the list of pairs is lower."""
        seen, kept = set(), []
        for a, b in pairs:
            if (id(b), id(a)) not in seen:
                seen.add((id(a), id(b)))
                kept.append((a, b))
        super().prepare(kept)


# --------------------------------------------------------------------------------------------------------- questions
class Counted:
    """A judge of numbers that counts the ordered calls made of it."""

    def __init__(self, values, flip, rng):
        self.values, self.flip, self.rng, self.said = values, flip, rng, {}

    def prepare(self, pairs):
        pass

    def __call__(self, a, b):
        if (a.k, b.k) not in self.said:
            x, y = self.values[a.k], self.values[b.k]
            right = .5 if x == y else float(x > y)
            wrong = 1 - right if right != .5 else float(self.rng.random() < .5)
            self.said[a.k, b.k] = wrong if self.rng.random() < self.flip else right
        return self.said[a.k, b.k]


def tau(values, wins):
    """Kendall's tau-b; None where either side is all tied."""
    pairs = [(values[i] - values[j], wins[i] - wins[j]) for i in range(len(values)) for j in range(i)]
    sign = [((a > 0) - (a < 0), (b > 0) - (b < 0)) for a, b in pairs]
    norm = math.sqrt(sum(a * a for a, _ in sign) * sum(b * b for _, b in sign))
    return sum(a * b for a, b in sign) / norm if norm else None


def questions(groups=2000):
    table = {}
    print(f"{'judge flips':<14}{'strengths':<12}{'pairs':<9}{'calls a group':>14}{'tau with truth':>16}")
    for flip in (0, .1, .2, .3):
        for kind in ("distinct", "3 levels", "2 levels"):
            for how in ("all", "sorted"):
                rng, calls, taus = random.Random(0), [], []
                for _ in range(groups):
                    values = {"distinct": rng.sample(range(4), 4), "3 levels": [rng.randrange(3) for _ in range(4)],
                              "2 levels": [rng.randrange(2) for _ in range(4)]}[kind]
                    group = [SimpleNamespace(k=k, task=SimpleNamespace(id="t")) for k in range(4)]
                    judge = Counted(values, flip, random.Random(rng.random()))
                    P = pf.compare(judge, group) if how == "all" else pf.compare_sparingly(judge, [group])[0]
                    calls.append(len(judge.said))
                    taus.append(tau(values, pf.alignment_rewards(P).tolist()))
                taus = [t for t in taus if t is not None]
                row = {"calls": sum(calls) / groups, "tau": sum(taus) / len(taus)}
                table[f"{flip} {kind} {how}"] = row
                print(f"{flip:<14}{kind:<12}{how:<9}{row['calls']:14.2f}{row['tau']:16.3f}", flush=True)
    return table


# ---------------------------------------------------------------------------------------------------------- learning
def learn(name, seed, args):
    """One run -> {"asked", "kappa", "flip", "tied", (suite, metric): value}."""
    flip, first, orders, how = ARMS[name]
    kind = pf.Judge if orders == 2 else OneOrder
    out = Path(args.runs) / f"{name.replace(' ', '').replace('%', '').replace(',', '-')}-{seed}"
    judges = []

    def open_judge(*_, **__):
        judges.append(kind(f"spoiled {name}", spoiled(flip, first, seed)))
        return judges[-1]
    train.open_judge, train.canaries = open_judge, lambda judge, step: None
    more = sum(([f"--{k}", str(v)] for k, v in (("steps", args.steps), ("tasks", args.tasks)) if v), [])
    train.run(train.arguments(["--model", args.model, "--seed", str(seed), "--out", str(out), "--no-eval",
                               "--pairs", how, *more]))
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    limit = ["--limit", str(args.limit)] if args.limit else []
    subprocess.run([sys.executable, "eval.py", "--model", args.model, "--adapter", out / "adapter",
                    "--split", "domains", "--json", out / "eval.json", *limit],
                   cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    results = json.loads((out / "eval.json").read_text())["results"]
    cells = {f"{s} {m}": results[s]["domains"]["adapter"].get(m, {}).get("value") for s, m in ROWS}
    said = {key: [r["judge"][key] for r in steps if r["judge"][key] is not None]
            for key in ("flip", "tie", "cyclic", "kappa")}
    mean = {key: sum(values) / len(values) if values else None for key, values in said.items()}
    return {"asked": judges[0].asked, "tied groups": sum(r["tied"] for r in steps) / len(steps)} | mean | cells


# ------------------------------------------------------------------------------------------------------------- dials
def dials(args):
    """One row a setting -> {setting: {metric: value}}."""
    table, file = {}, Path(args.runs) / "dial.json"
    names = ("harmful_compliance", "early_refusal", "over_refusal", "benign_completion", "safety_share", "tokens")
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'dial':<22}" + "".join(f"{name:>20}" for name in names))
    for option, values in (("--adapter-scale", (0, .25, .5, .75, 1, 1.5)),
                           ("--gate", (-6, -4, -2, 0, 2, 4, 6, "never", "always"))):
        for value in values:
            limit = ["--limit", str(args.limit)] if args.limit else []
            subprocess.run([sys.executable, "eval.py", "--model", args.model, "--adapter", args.dials, "--suite",
                            "harm", "--split", "domains", f"{option}={value}", "--json", file, *limit],
                           cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            cells = json.loads(file.read_text())["results"]["harm"]["domains"]["adapter"]
            row = table[f"{option} {value}"] = {name: cells[name]["value"] for name in names}
            print(f"{option + ' ' + str(value):<22}" + "".join(f"{row[name]:20.3f}" for name in names), flush=True)
    return table


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--model", default="tiny")
    p.add_argument("--runs", default="runs/judges")
    p.add_argument("--steps", type=int)
    p.add_argument("--tasks", type=int)
    p.add_argument("--limit", type=int, help="tasks of the closing evaluation")
    p.add_argument("--dials", metavar="ADAPTER", type=lambda path: str(Path(path).resolve()))
    p.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), metavar="ARM",
                   help=", ".join(ARMS).replace("%", "%%"))
    p.add_argument("--json", metavar="FILE")
    args, start = p.parse_args(), time.perf_counter()
    args.runs = str(Path(args.runs).resolve())
    table = {"questions": questions(2000 if args.steps is None else 200) if args.arms else {}, "learning": {}}
    for name in args.arms:
        runs = table["learning"][name] = [learn(name, seed, args) for seed in args.seeds]
        for key in runs[0]:
            values = [r[key] for r in runs if r[key] is not None]
            if values:
                each = " ".join(f"{v:.3f}" for v in values)
                print(f"{name:<26}{key:<28}{sum(values) / len(values):10.3f}   {each}", flush=True)
    table["dials"] = dials(args) if args.dials else {}
    table["seconds"] = time.perf_counter() - start
    if args.json:
        Path(args.json).write_text(json.dumps(table))
    print(json.dumps(table))


if __name__ == "__main__":
    main()
