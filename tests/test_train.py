"""train.py on an untrained tiny base: what is trained, and that a run can be repeated, stopped and
gone on with. Each docstring names the bug that the test would catch."""
import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import model as model_
import preference
import train
from data import tiny
from mosaic import rollout
from preference import open_judge

TIMES = ("seconds", "sample_tok/s", "train_tok/s")  # of a log, and different in each run


# ----------------------------------------------------------------------------- a base, and its runs
@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(path, model, tokenizer) of a base after a few steps: it can close a turn now and then, and
    its logits are far from flat."""
    path = tiny.build(0, tmp_path_factory.mktemp("base") / "tiny", steps=25, n=150)
    model, tokenizer = model_.load(path, device="cpu")
    return path, model, tokenizer


@pytest.fixture
def one_side_wins(monkeypatch):
    """Under the rule an untrained base ties everywhere; and canaries have no ids to compare."""
    monkeypatch.setattr(train, "canaries", lambda judge, step: None)
    monkeypatch.setattr(preference, "rule_judge", larger_ids_lose)


def larger_ids_lose(first, second):
    if first.ids == second.ids:
        return 0.5
    return float(first.ids < second.ids)


def run(base, out, *more):
    """Three steps of training on three tasks each."""
    path = base[0]
    train.run(train.arguments([
        "--model", str(path), "--out", str(out), "--tasks", "3", "--steps", "3", "--no-eval", *more,
    ]))


def metrics(out):
    """The lines of metrics.jsonl, without what a clock says."""
    rows = []
    for line in (out / "metrics.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        rows.append({name: value for name, value in row.items() if name not in TIMES})
    return rows


def assert_same_run(one, other):
    for file in ("adapter/adapter_model.safetensors", "rollouts.jsonl", "verdicts.jsonl"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), (other, file)
    rows = metrics(one)
    assert rows == metrics(other)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["grad_norm"] > 0 for row in rows)  # else any two adapters were equal


# ------------------------------------------------------------------------------------- the gradient
def with_adapter(model):
    model = copy.deepcopy(model)
    model_.add_lora(model, 4, 8, ["q_proj", "v_proj"], torch.Generator().manual_seed(0))
    return model


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in train.trained_parameters(model)])


def test_micro_batches_change_nothing(base):
    """GRPO-Zero 8ca8b08: a mean per micro-batch weighs tokens by the batch they fell into."""
    _, plain, tokenizer = base
    model = with_adapter(plain)
    generator = torch.Generator().manual_seed(1)
    rollouts = rollout(
        plain, tokenizer, data.load("train")[:6], 4, grammar="free", generator=generator)
    groups = train.slices(rollouts, 4)
    advs = [torch.tensor([1.0, -1, 0.5, -0.5]) for _ in groups]
    no_pairs = [torch.zeros(4, 4) for _ in groups]

    longest = max(len(rollout.ids) for rollout in groups[0])
    gradients = []
    for budget in (longest + 30, 600, 100_000):  # the first cuts a group into slices
        recipe = train.Recipe(micro_tokens=budget, kl_coef=0.02)
        log = train.accumulate(model, tokenizer, groups, advs, no_pairs, recipe)
        assert log["drift"] < 1e-4
        gradients.append(flat_gradient(model))
        model.zero_grad()
    assert gradients[0].abs().max() > 0
    for gradient in gradients[1:]:
        assert (gradients[0] - gradient).abs().max() < 1e-6


@pytest.mark.parametrize("budget, size", [(500, 4), (499, 3), (400, 3), (399, 2), (299, 1), (1, 1)])
def test_a_group_is_cut_no_smaller_than_the_budget_asks(budget, size):
    """A group that is always cut to single trajectories computes its prompt once for each; one that
    never is runs out of memory."""
    group = [SimpleNamespace(prompt_length=100, ids=[0] * 200) for _ in range(4)]
    assert train.largest_fitting(group, budget) == size


@pytest.mark.parametrize("objective", ["grpo", "dpo"])
def test_a_group_with_an_unscored_pair_gives_no_gradient(base, objective):
    """An outage that becomes an opinion: the direct loss took the pairs that were left of such a
    group."""
    _, plain, tokenizer = base
    recipe = train.Recipe(objective=objective, kl_coef=0, length_budget=80, group_size=3,
                          micro_tokens=4096)
    generator = torch.Generator()
    group = rollout(
        plain, tokenizer, data.load("train")[:1], 3, grammar="free", generator=generator)
    for is_silent in (False, True):
        model = with_adapter(plain)
        train.accumulate(model, tokenizer, *judged(group, is_silent, recipe), recipe)
        gradients = [p.grad for p in train.trained_parameters(model) if p.grad is not None]
        has_trained = any(gradient.any() for gradient in gradients)
        assert has_trained != is_silent


def judged(group, is_silent, recipe):
    """([group], its advantages, its preferences) under a judge that prefers the earlier rollout. A
    silent one has no verdict on the first two."""
    def judge(first, second):
        i = group.index(first)
        j = group.index(second)
        if is_silent and {i, j} == {0, 1}:
            return None
        return float(i < j)
    judge.prepare = lambda pairs: None

    verdicts = train.judge_pairs(judge, [group], [], [], "all", step=1)
    terms = train.reward_terms(group, verdicts.preferences[0], "pairwise", recipe.length_budget)
    advs = [train.advantages(sum(terms.values()), terms["align"])]
    return [group], advs, verdicts.preferences


@pytest.mark.parametrize("objective", ["grpo", "dpo"])
def test_a_sampler_that_differs_stops_the_run(
        base, tmp_path, monkeypatch, one_side_wins, objective):
    """verl #7495: two months on a trail of samples that another model had drawn. One token of each
    trajectory whose logprob is off by 0.05 stops a run in fp32 in its first step, and nothing has
    moved."""
    real = train.rollout

    def off(*given, **options):
        rollouts = real(*given, **options)
        for rollout in rollouts:
            rollout.logprobs[0] += 0.05
        return rollouts
    monkeypatch.setattr(train, "rollout", off)
    with pytest.raises(RuntimeError, match="sampler and trainer disagree"):
        run(base, tmp_path, "--objective", objective)
    assert not (tmp_path / "adapter").exists()
    assert not (tmp_path / "metrics.jsonl").read_text("utf-8")


def test_a_new_reward_term_is_logged_under_its_own_name(
        base, tmp_path, monkeypatch, capsys, one_side_wins):
    """By first letters alone a term "late" would pass for the length; or a term that is trained on
    and nowhere logged."""
    real = train.reward_terms

    def with_one_more(*given):
        terms = real(*given)
        terms["late"] = -terms["align"] / 2
        return terms
    monkeypatch.setattr(train, "reward_terms", with_one_more)
    run(base, tmp_path, "--steps", "1")
    [row] = metrics(tmp_path)
    assert list(row["shares"]) == ["align", "format", "length", "late"]
    assert row["shares"]["late"] < 0
    assert re.search(r"shares a \S+ f \S+ le \S+ la \S+ tied", capsys.readouterr().out)

    assert train.shares_text({"align": 1, "format": 0.5, "length": -0.5}) == (
        "a +1.00 f +0.50 l -0.50")
    assert train.shares_text({"length": 0, "len": 1}) == "leng +0.00 len +1.00"
    assert train.shares_text({}) == "-"


def test_learning_rate_rises_in_five_steps_and_falls_to_a_tenth():
    """A warm-up that begins at 0 wastes a step; a decay to 0 wastes the last ones."""
    rates = [train.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:4] == [0.2, 0.4, 0.6, 0.8]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert math.isclose(rates[-1], 0.109)


# --------------------------------------------------------------------------- to repeat, stop, go on
class Bar(list):
    """tqdm's, left by Ctrl-C between two steps."""
    write = staticmethod(print)

    def __init__(self, steps, **options):
        super().__init__(steps)

    def __iter__(self):
        yield from self[:2]
        raise KeyboardInterrupt


def stop_in_third_step(monkeypatch, error):
    """The error is raised where the third step would be judged."""
    real = train.judge_pairs
    calls = []

    def judge_pairs(*given):
        calls.append(given)
        if len(calls) == 3:
            raise error
        return real(*given)
    monkeypatch.setattr(train, "judge_pairs", judge_pairs)


def test_repeat_and_resume_are_exact(base, tmp_path, monkeypatch, one_side_wins):
    """ms-swift PR #9935: resume overwrote the restored generator. Same seed: same rollouts,
    verdicts, adapter bytes; stopped inside of a step or between two, and resumed: the same again,
    and the logs hold each step once. Another judge's run is not gone on with, nor the run that
    --out held before a fresh start."""
    run(base, tmp_path / "whole")
    run(base, tmp_path / "again")
    # Any error: here a prompt too long, found when it is drawn.
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no room"):
        stop_in_third_step(patch, ValueError("no room"))
        run(base, tmp_path / "inside")
    stopped = pytest.raises(KeyboardInterrupt, match="stopped in step 2")
    with monkeypatch.context() as patch, stopped:
        patch.setattr(train, "tqdm", Bar)
        run(base, tmp_path / "between")

    for name in ("inside", "between"):
        with pytest.raises(ValueError, match="--judge of .* is rule, not human"):
            run(base, tmp_path / name, "--resume", "--judge", "human")
        run(base, tmp_path / name, "--resume")
    for name in ("again", "inside", "between"):
        assert_same_run(tmp_path / "whole", tmp_path / name)

    def killed(*given):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "whole")
    assert not (tmp_path / "whole" / "state" / "state.pt").exists()


def test_a_person_may_leave_at_the_first_question(base, tmp_path, monkeypatch):
    """--judge human, q while the canaries were asked: no state had been written, so --resume said
    to start without it. Another run's folder, or an empty one, is still not gone on with."""
    out = tmp_path / "left"
    with pytest.raises(ValueError, match="no .*state.pt; start without --resume"):
        run(base, out, "--judge", "human", "--resume")
    monkeypatch.setattr(train, "N_FIXED", 3)
    answers = iter(["l", "q", "q"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    for more in ([], ["--resume"]):  # and at the first question that is left after it
        with pytest.raises(KeyboardInterrupt, match="what was judged is kept"):
            run(base, out, "--judge", "human", *more)
        assert len((out / "verdicts.jsonl").read_text("utf-8").splitlines()) == 1
    assert next(answers, None) is None
    with pytest.raises(ValueError, match="--seed of .* is 0, not 1"):
        run(base, out, "--judge", "human", "--resume", "--seed", "1")

    # The person comes back, and is as quick and sure as the rule.
    monkeypatch.setattr(train, "canaries", lambda judge, step: None)
    monkeypatch.setattr(preference, "rule_judge", larger_ids_lose)
    run(base, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train, "open_judge", lambda *given, **server: open_judge("rule"))
        run(base, out, "--judge", "human", "--resume")
    (out / "verdicts.jsonl").write_bytes((tmp_path / "whole" / "verdicts.jsonl").read_bytes())
    assert_same_run(tmp_path / "whole", out)


def test_resumed_logs_keep_whole_lines(tmp_path):
    """An agent that wrote a line separator, or a run that was killed inside of a line, made
    --resume end in a traceback before its first step; and the rows of steps that are done again
    stood there twice."""
    folder = train.Folder(tmp_path)
    file = tmp_path / "rollouts.jsonl"
    row = json.dumps({"step": 1, "turns": ["a\u2028b\x85\u00e9"]}, ensure_ascii=False).encode()
    cut = row[:-4]  # inside of a letter
    file.write_bytes(row + b'\n{"step": 2}\n' + cut)
    folder.open_logs(2)
    folder.log("rollouts", {"step": 2, "turns": ["\u2028"]})
    folder.files["rollouts"].close()

    lines = file.read_text("utf-8").split("\n")
    assert lines[0].encode() == row
    assert json.loads(lines[1])["step"] == 2
    assert lines[2:] == [""]


# -------------------------------------------------------------------------------- several processes
REPLAY = """
import os, sys, zlib
sys.path.insert(0, sys.argv.pop(1))
import mosaic, torch, train

mosaic.LIMITS["tiny"].update(max_turns=2, turn_tokens=24)
train.N_FIXED = 3
train.canaries = lambda judge, step: None  # they have no ids
compare = train.compare
rollout = train.rollout
calls = []

def by_ids(first, second):  # by the rule an untrained base ties everywhere
    a, b = sum(first.ids), sum(second.ids)
    return 0.5 if a == b else float(a > b)

def alone(model, tokenizer, tasks, sizes, **options):
    # What a task samples depends on nothing but the task and the step.
    calls.append(0)
    if os.environ.get("DIE") == str(train.RANK) and len(calls) == 3:
        os._exit(7)
    rollouts = []
    for task, n in zip(tasks, sizes):
        seed = zlib.crc32(f"{task.id} {len(calls)}".encode())
        options["generator"] = torch.Generator().manual_seed(seed)
        rollouts += rollout(model, tokenizer, [task], n, **options)
    return rollouts

train.compare = lambda judge, group, record_pair=None: compare(by_ids, group, record_pair)
train.rollout = alone
train.main()
"""


def run_processes(n, base, out, tmp_path, *more, **environment):
    """The same three steps in n processes, by torchrun."""
    script = tmp_path / "replay.py"
    script.write_text(REPLAY)
    torchrun = []
    if n > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    options = ["--model", base[0], "--out", out, "--tasks", "3", "--steps", "3", "--no-eval", *more]
    home = Path(train.__file__).parent
    command = [sys.executable, *torchrun, script, home, *options]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


@pytest.mark.parametrize("objective", ["grpo", "dpo"])
def test_two_processes_draw_the_curve_of_one(base, tmp_path, objective):
    """A mean of the processes' means instead of one sum over all tokens; groups dropped or taken
    twice when three tasks meet two processes; a gradient that one process alone applies; two
    processes that write one log."""
    one = tmp_path / "1"
    two = tmp_path / "2"
    for n, out in ((1, one), (2, two)):
        done = run_processes(n, base, out, tmp_path, "--objective", objective)
        assert done.returncode == 0, done.stderr[-2000:]

    assert (one / "rollouts.jsonl").read_text() == (two / "rollouts.jsonl").read_text()
    assert len(metrics(one)) == len(metrics(two)) == 3
    for a, b in zip(metrics(one), metrics(two)):
        assert a["grad_norm"] > 0
        for key in ("loss", "kl", "grad_norm", "win_rate", "tied", "gate_risky", "safety_share",
                    "tokens"):
            # The order of fp32 sums differs between one process and two: 1.8e-5 of a gradient norm
            # was seen.
            assert abs(a[key] - b[key]) <= 1e-4 * max(1, abs(a[key])), key
    # Weights are not compared: AdamW blows a rounding error in a gradient near 0 up to a step.
    file = Path("adapter") / "adapter_model.safetensors"
    assert load_file(one / file).keys() == load_file(two / file).keys()


def test_a_process_that_dies_ends_all(base, tmp_path):
    """The others wait for half an hour in a collective, or go on and write an adapter of half the
    tasks."""
    done = run_processes(2, base, tmp_path / "run", tmp_path, DIE="1")
    assert done.returncode != 0, done.stderr[-2000:]  # torchrun names the process and its exit code
    assert not (tmp_path / "run" / "adapter").exists()


# -------------------------------------------------------------------------------------- the options
@pytest.mark.parametrize("argv", [
    "--group-size 1", "--lr nan", "--objective dpo --reward scalar", "--gate 1e39",
])
def test_arguments_of_train_that_mean_nothing(argv, capsys):
    """A group without a pair, NaN for every weight, a reward that the objective never reads: said
    in one line."""
    with pytest.raises(SystemExit) as stop:
        train.arguments(argv.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert argv.split()[0] in error


def test_what_is_not_given_is_the_recipe_of_the_family():
    """A default of the command line that hides the family's own."""
    options = vars(train.arguments(["--lr", "1", "--seed", "3"]))
    recipe = train.recipe_for("tiny", options)
    assert recipe == train.replace(train.RECIPE["tiny"], lr=1.0, seed=3)


def test_a_recipe_without_steps_writes_nothing(tmp_path, monkeypatch, capsys):
    """`data/tiny.py --steps -1` put an untrained model in the place of the base, and said so with
    exit status 0."""
    out = tmp_path / "base"
    monkeypatch.setattr("sys.argv", ["tiny.py", "--steps", "-1", "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        tiny.main()
    assert stop.value.code == 2
    assert "--steps: expected a whole number from 1, got '-1'" in capsys.readouterr().err
    assert not out.exists()
