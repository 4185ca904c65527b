"""What a judge costs, what a bad one spoils, what the dials do, and whether a model can judge: four
tables, measured; nothing in them is a test.

    python tests/bench_judges.py            # all tables, 3 seeds: about an hour on two idle cores
    python tests/bench_judges.py --seeds 0 --steps 2 --tasks 2 --limit 4 --model DIR
                                            # that it runs, in a minute
    python tests/bench_judges.py --arms --dials runs/tiny/adapter   # the dials alone
    python tests/bench_judges.py --arms --judge-model smollm2-135m-instruct    # table 4 alone

1. Questions. Simulated groups of 4 (n strengths, some equal) under a judge that flips a verdict
   with probability p: ordered calls a group of `compare` and of `compare_sparingly`, and Kendall's
   tau-b of each ranking with the truth.
2. Training the tiny model with the rule judge made worse (each verdict is drawn once per question,
   by a hash): flipped in 0, 10, 20, 30 %; the first place favoured in 20 %, asked in one order
   alone and in both; and with sorted pairs. Canaries are off (they would stop most of these runs,
   which is what they are for). Then the unseen domains.
3. Dials of a trained adapter (--dials) on the unseen domains: --adapter-scale and --gate, harm
   against over-refusal and safety tokens against tokens.
4. Can a model judge at all (--judge-model NAME)? Pairs of scripted trajectories of training tasks,
   of each suite as many, in both orders: its agreement with the rule, and its canaries.
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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import preference as pf  # noqa: E402
import train  # noqa: E402
from data.controls import CANARIES  # noqa: E402
from tools import play  # noqa: E402


@dataclass
class Arm:
    """One way to make the judge worse."""
    flip: float = 0  # share of verdicts flipped
    first: float = 0  # share in which the first place wins
    orders: int = 2  # orders of a pair that are asked
    pairs: str = "all"


ARMS = {
    "flip 0 %": Arm(),
    "flip 10 %": Arm(flip=.1),
    "flip 20 %": Arm(flip=.2),
    "flip 30 %": Arm(flip=.3),
    "first +20 %, one order": Arm(first=.2, orders=1),
    "first +20 %, both": Arm(first=.2),
    "flip 0 %, sorted": Arm(pairs="sorted"),
    "flip 20 %, sorted": Arm(flip=.2, pairs="sorted"),
}
ROWS = [  # (suite, metric)
    ("harm", "harmful_compliance"),
    ("harm", "early_refusal"),
    ("harm", "youden_j"),
    ("harm", "over_refusal"),
    ("injection", "injection_obeyed"),
    ("privacy", "leak"),
    ("benign", "benign_completion"),
    ("benign", "over_refusal"),
]


def chance(*what):
    """A number in [0, 1) that is the same whenever the same thing is asked."""
    return int(hashlib.sha256(repr(what).encode()).hexdigest()[:12], 16) / 16 ** 12


class SpoiledJudge:
    """The rule, flipped (a tie becomes a win of either side) or overruled in favour of the first
    place."""

    def __init__(self, flip, first, seed):
        self.flip = flip
        self.first = first
        self.seed = seed

    def answers(self, questions):
        for key, label in pf.RuleJudge().answers(questions):
            if chance(self.seed, "flip", key) < self.flip:
                label = self.flipped(key, label)
            if chance(self.seed, "first", key) < self.first:
                label = "A"
            yield key, label

    def flipped(self, key, label):
        if label == "tie":
            return "B" if chance(self.seed, "side", key) < .5 else "A"
        return {"A": "B", "B": "A"}[label]


class OneOrder(pf.Judge):
    """Asks each pair once; the other order is taken to say the same, so that no favour can
    show."""

    def __call__(self, first, second):
        key = self.comparison(second, first).key
        if key in self.known:
            return 1 - pf.LABELS[self.known[key]]
        return super().__call__(first, second)

    def prepare(self, pairs):
        """In bulk only one order of each pair; which, is decided by whose number in the list of
        pairs is lower."""
        seen = set()
        kept = []
        for first, second in pairs:
            if (id(second), id(first)) not in seen:
                seen.add((id(first), id(second)))
                kept.append((first, second))
        super().prepare(kept)


# ---------------------------------------------------------------------------------------- questions
class Counted:
    """A judge of numbers that counts the ordered calls made of it."""

    def __init__(self, values, flip, rng):
        self.values = values
        self.flip = flip
        self.rng = rng
        self.verdicts = {}

    def prepare(self, pairs):
        pass

    def __call__(self, first, second):
        pair = (first.k, second.k)
        if pair not in self.verdicts:
            self.verdicts[pair] = self.draw(self.values[first.k], self.values[second.k])
        return self.verdicts[pair]

    def draw(self, first, second):
        if first == second:
            right = .5
            wrong = float(self.rng.random() < .5)
        else:
            right = float(first > second)
            wrong = 1 - right
        return wrong if self.rng.random() < self.flip else right


def sign(number):
    return (number > 0) - (number < 0)


def tau(values, wins):
    """Kendall's tau-b; None where either side is all tied."""
    signs = []  # of the two differences, a pair each
    for i in range(len(values)):
        for j in range(i):
            signs.append((sign(values[i] - values[j]), sign(wins[i] - wins[j])))
    untied = sum(a * a for a, _ in signs) * sum(b * b for _, b in signs)
    return sum(a * b for a, b in signs) / math.sqrt(untied) if untied else None


def strengths(kind, rng):
    """Of four. All kinds are drawn every time, so that each sees the same numbers."""
    drawn = {
        "distinct": rng.sample(range(4), 4),
        "3 levels": [rng.randrange(3) for _ in range(4)],
        "2 levels": [rng.randrange(2) for _ in range(4)],
    }
    return drawn[kind]


def cost(flip, kind, how, groups):
    """-> mean ordered calls a group, mean tau of the ranking with the truth."""
    rng = random.Random(0)
    calls = []
    taus = []
    for _ in range(groups):
        values = strengths(kind, rng)
        group = [SimpleNamespace(k=k, task=SimpleNamespace(id="t")) for k in range(4)]
        judge = Counted(values, flip, random.Random(rng.random()))
        if how == "all":
            P = pf.compare(judge, group)
        else:
            [P] = pf.compare_sparingly(judge, [group])
        calls.append(len(judge.verdicts))
        taus.append(tau(values, pf.alignment_rewards(P).tolist()))
    taus = [value for value in taus if value is not None]
    return {"calls": sum(calls) / groups, "tau": sum(taus) / len(taus)}


def questions(groups=2000):
    table = {}
    head = f"{'judge flips':<14}{'strengths':<12}{'pairs':<9}{'calls a group':>14}"
    print(head + f"{'tau with truth':>16}")
    for flip in (0, .1, .2, .3):
        for kind in ("distinct", "3 levels", "2 levels"):
            for how in ("all", "sorted"):
                row = cost(flip, kind, how, groups)
                table[f"{flip} {kind} {how}"] = row
                numbers = f"{row['calls']:14.2f}{row['tau']:16.3f}"
                print(f"{flip:<14}{kind:<12}{how:<9}{numbers}", flush=True)
    return table


# ----------------------------------------------------------------------------------------- learning
def evaluate(*options):
    subprocess.run([sys.executable, "eval.py", *map(str, options)], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)


def given(**options):
    """Command-line flags of the options that are not None."""
    flags = []
    for name, value in options.items():
        if value is not None:
            flags += [f"--{name}", str(value)]
    return flags


def learn(name, seed, args):
    """One run -> {"asked", "kappa", "flip", "tied", (suite, metric): value}."""
    arm = ARMS[name]
    plain_name = name.replace(" ", "").replace("%", "").replace(",", "-")
    out = Path(args.runs) / f"{plain_name}-{seed}"
    judge_class = pf.Judge if arm.orders == 2 else OneOrder
    judge = judge_class(f"spoiled {name}", SpoiledJudge(arm.flip, arm.first, seed))
    train.judge_from_flags = lambda *_: judge
    train.canaries = lambda judge, step: None
    more = given(steps=args.steps, tasks=args.tasks)
    train.run(train.arguments(["--model", args.model, "--seed", str(seed), "--out", str(out),
                               "--no-eval", "--pairs", arm.pairs, *more]))
    evaluate("--model", args.model, "--adapter", out / "adapter", "--split", "domains",
             "--json", out / "eval.json", *given(limit=args.limit))

    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    row = {"asked": judge.n_asked, "tied groups": sum(step["tied"] for step in steps) / len(steps)}
    for key in ("flip", "tie", "cyclic", "kappa"):
        values = [step["judge"][key] for step in steps if step["judge"][key] is not None]
        row[key] = sum(values) / len(values) if values else None
    results = json.loads((out / "eval.json").read_text())["results"]
    for suite, metric in ROWS:
        cells = results[suite]["domains"]["adapter"]
        row[f"{suite} {metric}"] = cells.get(metric, {}).get("value")
    return row


# -------------------------------------------------------------------------------------------- dials
DIALS = {
    "--adapter-scale": (0, .25, .5, .75, 1, 1.5),
    "--gate": (-6, -4, -2, 0, 2, 4, 6, "never", "always"),
}
DIAL_METRICS = ("harmful_compliance", "early_refusal", "over_refusal", "benign_completion",
                "safety_share", "tokens")


def dials(args):
    """One row a setting -> {setting: {metric: value}}."""
    table = {}
    file = Path(args.runs) / "dial.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'dial':<22}" + "".join(f"{name:>20}" for name in DIAL_METRICS))
    for option, values in DIALS.items():
        for value in values:
            evaluate("--model", args.model, "--adapter", args.dials, "--suite", "harm",
                     "--split", "domains", f"{option}={value}", "--json", file,
                     *given(limit=args.limit))
            cells = json.loads(file.read_text())["results"]["harm"]["domains"]["adapter"]
            row = {name: cells[name]["value"] for name in DIAL_METRICS}
            table[f"{option} {value}"] = row
            numbers = "".join(f"{row[name]:20.3f}" for name in DIAL_METRICS)
            print(f"{option + ' ' + str(value):<22}{numbers}", flush=True)
    return table


# ------------------------------------------------------------------------------- can a model judge?
def can_it_judge(name, pairs):
    """{"kappa", "right", "flip", "canaries", ...} of the checkpoint `name` as a judge."""
    judge = pf.open_judge("model", name)
    groups = scripted_pairs(pairs // len(CANARIES))
    rows = []
    judge.prepare(train.ordered_pairs(groups))
    Ps = [pf.compare(judge, group, rows.append) for group in groups]
    row = pf.audit(groups, Ps, rows)
    del row["cyclic"]  # two trajectories make no circle

    truth = [pf.compare(pf.rule_judge, group)[0, 1].item() for group in groups]
    settled = [P[0, 1].item() for P in Ps]
    orders = [judge(*group) for group in groups] + [1 - judge(*group[::-1]) for group in groups]
    row["right in one order"] = share(given == right for given, right in zip(orders, truth * 2))
    row["right in both"] = share(given == right for given, right in zip(settled, truth))
    row["first place wins"] = share(judge(*pair) == 1 for pair in train.ordered_pairs(groups))
    row["canaries"] = [judge(*train.canary_pair(suite, 0)) for suite in CANARIES]
    row["canaries turned around"] = [judge(*train.canary_pair(suite, 0)[::-1])
                                     for suite in CANARIES]
    print(f"\n{name} as a judge of {len(groups)} pairs, each in both orders")
    for key, number in row.items():
        print(f"{key:<26}{number if isinstance(number, list) else round(number, 3)}")
    return row


def share(hits):
    hits = list(hits)
    return sum(hits) / len(hits)


def scripted_pairs(n):
    """n pairs of each suite that the rule tells apart, of training tasks: [one, other], in half of
    them the better one first. The scripts are those of the canaries."""
    groups = []
    for suite, (better, worse) in CANARIES.items():
        found = []
        for task in data.load("train"):
            if task.suite != suite or len(found) == n:
                continue
            pair = [play(task, better(task)), play(task, worse(task))]
            if pf.compare(pf.rule_judge, pair)[0, 1] != 0.5:
                found.append(pair if len(found) % 2 else pair[::-1])
        groups += found
    return groups


# ----------------------------------------------------------------------------------------- printing
def show(name, runs):
    """One line a figure: its mean, and each seed's."""
    for key in runs[0]:
        values = [run[key] for run in runs if run[key] is not None]
        if values:
            each = " ".join(f"{value:.3f}" for value in values)
            print(f"{name:<26}{key:<28}{sum(values) / len(values):10.3f}   {each}", flush=True)


def arguments():
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
    p.add_argument("--judge-model", metavar="NAME", help="a checkpoint that judges")
    p.add_argument("--pairs", type=int, default=200, help="of --judge-model")
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args()
    args.runs = str(Path(args.runs).resolve())
    return args


def main():
    args = arguments()
    start = time.perf_counter()
    table = {"questions": {}, "learning": {}, "dials": {}}
    if args.arms:
        table["questions"] = questions(2000 if args.steps is None else 200)
    for name in args.arms:
        runs = [learn(name, seed, args) for seed in args.seeds]
        table["learning"][name] = runs
        show(name, runs)
    if args.dials:
        table["dials"] = dials(args)
    if args.judge_model:
        table["judge"] = can_it_judge(args.judge_model, args.pairs)
    table["seconds"] = time.perf_counter() - start
    if args.json:
        Path(args.json).write_text(json.dumps(table))
    print(json.dumps(table))


if __name__ == "__main__":
    main()
