"""train.py on an untrained tiny base: what is trained, and that a run can be repeated, stopped and
gone on with. Each docstring names the bug that the test would catch."""
import copy
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import model as model_
import mosaic
import preference
import train
from data import tiny
from mosaic import rollout
from preference import open_judge

TIMES = ("seconds", "sample_tok/s", "train_tok/s", "cores")  # of a log, different in each run


# ----------------------------------------------------------------------------- a base, and its runs
@pytest.fixture(scope="module")
def base(base_folder):
    """(path, model, tokenizer) of a base after a few steps."""
    model, tokenizer = model_.load(base_folder, device="cpu")
    return base_folder, model, tokenizer


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Short episodes, as nothing here is about what is sampled, and few watched tasks: sixteen
    would cost more than the three that a step trains on."""
    monkeypatch.setattr(train, "N_FIXED", 3)
    short = mosaic.LIMITS["tiny"] | {"max_turns": 3, "turn_tokens": 40}
    monkeypatch.setitem(mosaic.LIMITS, "tiny", short)


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


def assert_logs_explain_themselves(out):
    """An advantage that nobody can trace: rollouts.jsonl holds all that it came from."""
    lines = [json.loads(line) for line in (out / "rollouts.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 3 * 3 * 4  # steps, tasks, trajectories
    for group in train.slices(lines, 4):
        mean = sum(line["reward"] for line in group) / 4
        for line in group:
            assert line["advantage"] == pytest.approx((line["reward"] - mean) / 1.118, abs=1e-2)
            assert line["rewards"]["align"] == sum(win for win in line["wins"] if win is not None)
            written = sum(n for source, n in line["spans"] if source in ("sampled", "forced"))
            assert written == line["tokens"]
            others = [j for j in range(4) if j != line["index"]]
            for j in others:
                shown_first, shown_second = line["verdicts"][j]
                assert (shown_first + shown_second) / 2 == line["wins"][j]
    first = lines[0]
    slide = train.explain_run(f"0:{first['task']}", out)
    assert f"A {first['advantage']:+.2f} = (R {first['reward']:.2f}" in slide
    assert first["task"] in (out / "report.html").read_text("utf-8")


def test_the_win_rate_is_looked_at_when_it_is_due(base, tmp_path, one_side_wins, monkeypatch):
    """Tasks that are played and never compared; a win rate of other tasks than the base's; a step
    without one that is logged as a loss."""
    monkeypatch.setitem(train.RECIPE, "tiny", replace(train.RECIPE["tiny"], watch_every=2))
    sizes = []
    original = train.sample

    def sample(model, tokenizer, tasks, fixed, recipe, generator):
        sizes.append(len(fixed))
        return original(model, tokenizer, tasks, fixed, recipe, generator)
    monkeypatch.setattr(train, "sample", sample)
    run(base, tmp_path / "run")
    assert sizes == [3, 3, 0, 3]  # the base, then steps 0, 1 and 2
    rates = [row["win_rate"] for row in metrics(tmp_path / "run")]
    assert rates[1] is None and None not in (rates[0], rates[2])


# ------------------------------------------------------------------------------------- the gradient
def with_adapter(model):
    model = copy.deepcopy(model)
    model_.add_lora(model, 4, 8, ["q_proj", "v_proj"], torch.Generator().manual_seed(0))
    return model


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in train.trained_parameters(model)])


def test_a_step_draws_every_suite_s_share_and_twins_together():
    """Five harmless tasks in a step, and the gate shuts; a task twice; a draw that never ends where
    a suite is used up, or where rows have no twin."""
    tasks = data.load("train", training=True)
    share = Counter(task.suite for task in tasks)
    rng = random.Random(0)
    first = set()
    for n in (10, 48, len(tasks)):
        drawn = train.draw_tasks(tasks, n, rng)
        ids = [task.id for task in drawn]
        assert len(ids) == len(set(ids)) == n
        for suite, count in Counter(task.suite for task in drawn).items():
            assert abs(count - n * share[suite] / len(tasks)) < 2, (n, suite, count)
        without_twin = [task for task in drawn if task.twin and task.twin not in ids]
        assert len(without_twin) <= 1  # the last place may cut a pair
        first.add(ids[0])
    assert len(first) > 1
    lone = [task for task in tasks if task.label == "harmful"][:3]
    assert {task.id for task in train.draw_tasks(lone, 3, rng)} == {task.id for task in lone}
    assert len(train.draw_tasks(tasks, 1, rng)) == 1


def test_micro_batches_change_nothing(base):
    """GRPO-Zero 8ca8b08: a mean per micro-batch weighs tokens by the batch they fell into."""
    _, plain, tokenizer = base
    model = with_adapter(plain)
    generator = torch.Generator().manual_seed(1)
    rollouts = rollout(
        plain, tokenizer, data.load("train")[:4], 4, grammar="free", generator=generator)
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
    advs = [train.group_advantages(terms)]
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
    """tqdm's, left by SIGTERM, which schedulers send, between two steps."""
    write = staticmethod(print)

    def __init__(self, steps, **options):
        super().__init__(steps)

    def __iter__(self):
        yield from self[:2]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # the handler comes between two instructions


def stop_in_third_step(monkeypatch, error, out):
    """The error is raised where the third step would be judged. What kill -9 would leave there is
    looked at first: lines of what was printed, and --save-every's state."""
    real = train.judge_pairs
    calls = []

    def judge_pairs(*given):
        calls.append(given)
        if len(calls) == 3:
            assert [row["step"] for row in metrics(out)] == [0, 1]
            assert (out / "rollouts.jsonl").read_bytes().endswith(b"}\n")
            assert torch.load(out / "state" / "state.pt", weights_only=False)["step"] == 2
            raise error
        return real(*given)
    monkeypatch.setattr(train, "judge_pairs", judge_pairs)


def test_repeat_and_resume_are_exact(base, tmp_path, monkeypatch, one_side_wins):
    """ms-swift PR #9935: resume overwrote the restored generator. Same seed: same rollouts,
    verdicts, adapter bytes; stopped inside of a step or between two, and resumed: the same again,
    and the logs hold each step once. Another judge's run is not gone on with, nor the run that
    --out held before a fresh start. A run that was killed left no state and logs of 0 bytes."""
    run(base, tmp_path / "whole")
    run(base, tmp_path / "again")
    # Any error: here a prompt too long, found when it is drawn.
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no room"):
        stop_in_third_step(patch, ValueError("no room"), tmp_path / "inside")
        run(base, tmp_path / "inside", "--save-every", "1")
    stopped = pytest.raises(KeyboardInterrupt, match="stopped in step 2")
    with monkeypatch.context() as patch, stopped, mosaic.as_command():
        patch.setattr(train, "tqdm", Bar)
        run(base, tmp_path / "between")

    for name in ("inside", "between"):
        with pytest.raises(ValueError, match="--judge of .* is rule, not human"):
            run(base, tmp_path / name, "--resume", "--judge", "human")
        run(base, tmp_path / name, "--resume")
    for name in ("again", "inside", "between"):
        assert_same_run(tmp_path / "whole", tmp_path / name)

    assert_logs_explain_themselves(tmp_path / "whole")

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
        patch.setattr(train, "judge_from_flags", lambda *given: open_judge("rule"))
        run(base, out, "--judge", "human", "--resume")
    (out / "verdicts.jsonl").write_bytes((tmp_path / "whole" / "verdicts.jsonl").read_bytes())
    assert_same_run(tmp_path / "whole", out)


def test_another_judge_is_another_run(tmp_path):
    """--resume with --judge-model B of what A had judged: half of the run is trained on either, and
    config.json names B alone."""
    config = {train.MARKER: 1} | dict.fromkeys(train.IDENTITY) | {"judge_model": "A"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with closing(train.Folder(tmp_path)) as folder:
        same = {name: config[name] for name in train.IDENTITY}
        folder.open_state(same)
        with pytest.raises(ValueError, match="--judge-model of .* is A, not B"):
            folder.open_state(same | {"judge_model": "B"})


def test_a_rate_of_nothing_is_no_rate():
    """Records without labels (Agent-SafetyBench): "gate 0.00/0.00", whatever the agent opened."""
    opened = [SimpleNamespace(opened=True, risky=risky) for risky in (None, None, True)]
    assert train.opened_rate([SimpleNamespace(gates=opened[:2])], risky=True) is None
    assert train.opened_rate([SimpleNamespace(gates=opened)], risky=True) == 1
    assert train.opened_rate([SimpleNamespace(gates=opened)], risky=False) is None


def test_who_leaves_before_any_step_leaves_an_older_run_as_it_is(base, tmp_path, monkeypatch):
    """A finished run's folder, --judge human by mistake, q: its adapter and its state were gone.
    A run that has begun replaces them, and its report."""
    run(base, tmp_path / "out")
    (tmp_path / "out" / "report.html").write_text("of the older run")
    learned = [tmp_path / "out" / name for name in (
        "state/state.pt", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "report.html", "config.json")]
    before = [file.read_bytes() for file in learned]
    monkeypatch.setattr("builtins.input", lambda prompt: "q")
    with pytest.raises(KeyboardInterrupt, match="what was judged is kept"):
        run(base, tmp_path / "out", "--judge", "human")
    assert [file.read_bytes() for file in learned] == before

    def killed(*given):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "out")
    assert not any(file.exists() for file in learned[:-1])


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
    folder.close()

    lines = file.read_text("utf-8").split("\n")
    assert lines[0].encode() == row
    assert json.loads(lines[1])["step"] == 2
    assert lines[2:] == [""]


def test_a_kill_at_the_start_of_a_resumed_run_costs_no_log(tmp_path, monkeypatch):
    """--resume emptied metrics.jsonl and rollouts.jsonl before it wrote back the lines of the steps
    that are done: a kill in between took them."""
    folder = train.Folder(tmp_path)
    for name in ("metrics", "rollouts"):
        (tmp_path / f"{name}.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    before = contents(tmp_path)

    def killed(*given):
        raise KeyboardInterrupt
    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.open_logs(2)
    assert contents(tmp_path) == before


# ------------------------------------------------------------------ whose folder, and what is in it
def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def in_place_of_weights(monkeypatch):
    """(model, optimizer) for a Folder that saves: none has weights."""
    monkeypatch.setattr(train, "adapter_state", lambda model: {})
    monkeypatch.setattr(train, "fingerprint", lambda model: "a base")
    return None, SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)


def test_what_is_not_a_run_is_not_touched(base, tmp_path):
    """--model runs/mymodel made the model's own folder the default --out, and its config.json was
    replaced; a foreign adapter/ was removed, a foreign metrics.jsonl emptied; `--model ..` wrote
    into the current folder."""
    path = base[0]
    foreign = tmp_path / "foreign"
    (foreign / "adapter").mkdir(parents=True)
    (foreign / "adapter" / "adapter_config.json").write_text("{}")
    (foreign / "metrics.jsonl").write_text("mine")
    for folder in (path, foreign):
        before = contents(folder)
        with pytest.raises(ValueError, match="something else than a run of train.py"):
            run(base, folder)
        assert contents(folder) == before

    link = tmp_path / "link"
    link.symlink_to(path)
    for out in (path / "new", link / "new"):
        with pytest.raises(ValueError, match="overlaps with --model"):
            run(base, out)
        assert not out.exists()
    with pytest.raises(ValueError, match="overlaps with --model"):
        train.check_apart(tmp_path, "--model", tmp_path / "runs" / "merged")

    # The run's own folder, but what it would overwrite lies elsewhere.
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps({train.MARKER: 1}))
    (ours / "adapter").symlink_to(foreign / "adapter")
    with pytest.raises(ValueError, match="its adapter is a link"):
        run(base, ours)
    assert (foreign / "adapter" / "adapter_config.json").exists()


def test_a_fresh_start_takes_away_its_own_files_alone(tmp_path):
    """A fresh start that removes whatever lies beside the older run's adapter; a run of an earlier
    version, whose config.json has no marker, taken for a stranger's."""
    config = vars(train.RECIPE["tiny"]) | {"model": "tiny"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (adapter / name).write_text("{}")
    folder = train.Folder(tmp_path)
    folder.begin({train.MARKER: 1}, resume=False)
    folder.close()
    assert [file.name for file in adapter.iterdir()] == ["README.md"]
    train.Folder(tmp_path).close()
    assert train.is_run(tmp_path)


def test_one_run_at_a_time(tmp_path):
    """Two runs in one folder both ended with exit status 0, and with a mixture of both. The lock of
    a run that was killed keeps nobody out."""
    def hold(path):
        folder = train.Folder(path)
        folder.claim({train.MARKER: 1})
        time.sleep(60)
        folder.close()

    out = tmp_path / "run"
    other = multiprocessing.get_context("fork").Process(target=hold, args=(out,))
    other.start()
    while not (out / "config.json").exists():
        assert other.is_alive()
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another run is writing there"):
        train.Folder(out)
    other.kill()
    other.join()

    first = train.Folder(out)
    with pytest.raises(ValueError, match="another run is writing there"):
        train.Folder(out)
    first.close()
    train.Folder(out).close()


def test_a_run_that_loses_the_form_stops_and_keeps_its_last_good_state(
        tmp_path, in_place_of_weights):
    """At too high a rate `valid` fell from 1.00 to .33 and on to 0: all groups tied, none gave a
    gradient, the broken state took the good one's place, and the run ended with exit status 0."""
    folder = train.Folder(tmp_path)
    model, optimizer = in_place_of_weights
    generator, rng = train.seeded_generators(0, torch.device("cpu"))
    stopped = pytest.raises(RuntimeError, match=r"0\.25 of the turns parse, where 1\.00 did.*state")
    with stopped, train.resumable(folder, model, optimizer, generator, rng) as start:
        # Shares of the turns that parse; half of the best, or a slip of two steps, is no loss.
        for share in (0.75, 1.0, 0.5, 0.25, 0.25, 0.75, 1.0, *[0.25] * 9):
            turns = ["turn"] * int(4 * share) + [None] * int(4 - 4 * share)
            folder.keep(model, optimizer, start, [[SimpleNamespace(turns=turns)]])
            start.move_to(start.step + 1, start.random)
    folder.close()
    assert start.step == 9
    saved = torch.load(folder.state_file, weights_only=False)
    assert saved["step"] == 0  # not of step 9, as after any other error

    # A base that never kept the form has none to lose.
    start = train.StepStart(0, ())
    for _ in range(10):
        start.check_form(0.4, folder.state_file)
        start.check_form(0.0, folder.state_file)
    assert start.lost == 0


def test_a_resumed_run_remembers_that_its_turns_did_parse(tmp_path):
    """With --resume --lr 0.5 valid fell to 0.00 at once: a run that looks at its own steps only has
    never seen it higher."""
    rows = [{"step": 0, "valid": 0.9}, {"step": 1, "valid": 0.8}, {"step": 2, "valid": 1.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({train.MARKER: 1}))
    folder = train.Folder(tmp_path)
    assert folder.open_logs(2) == 0.9
    folder.close()


def test_logits_that_are_not_finite_leave_the_saved_state(tmp_path, in_place_of_weights):
    """A state whose logits are NaN, saved over the last one whose were not."""
    folder = train.Folder(tmp_path)
    model, optimizer = in_place_of_weights
    generators = train.seeded_generators(0, torch.device("cpu"))
    for error in (FloatingPointError, RuntimeError):
        with pytest.raises(error):
            with train.resumable(folder, model, optimizer, *generators):
                raise error
        folder.close()
        assert folder.state_file.exists() == (error is RuntimeError)


def test_a_full_disk_is_said_with_its_file(tmp_path, monkeypatch, in_place_of_weights):
    """torch says of a full disk "enforce fail at inline_container.cc", Python names no file; and
    the state before it has to be there still."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    folder = train.Folder(tmp_path)
    model, optimizer = in_place_of_weights
    start = train.StepStart(3, ())
    folder.save(model, optimizer, start)
    start.step = 4
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_whole", lambda path, write: write(full))
        with pytest.raises(OSError, match="state.pt: cannot be written: No space left on device"):
            folder.save(model, optimizer, start)
    assert torch.load(folder.state_file, weights_only=False)["step"] == 3

    folder.files["metrics"] = full.open("a", buffering=1)
    with pytest.raises(OSError, match="metrics.jsonl: cannot be written: No space left"):
        folder.log("metrics", {})


def test_a_state_of_another_device_is_refused(tmp_path):
    """"RNG state is wrong size", after the adapter was already exchanged."""
    folder = train.Folder(tmp_path)
    of_a_card = torch.zeros(16, dtype=torch.uint8)  # the size of a CUDA generator's
    state = {"step": 1, "adapter": {}, "optimizer": {}, "random": ([of_a_card], ())}
    folder.state_file.parent.mkdir()
    torch.save(state, folder.state_file)
    folder.config_file.write_text(json.dumps({train.MARKER: 1}))
    with pytest.raises(ValueError, match="written on another kind of device than"):
        folder.open_state({})


# -------------------------------------------------------------------------------- several processes
def wait_for_a_slow_judge(rank, port):
    """One of two processes whose collectives give up after two seconds."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank),
                      WORLD_SIZE="2")
    train.RANK = rank
    train.WORLD = 2
    begin = train.dist.init_process_group
    train.dist.init_process_group = lambda kind: begin("gloo", timeout=timedelta(seconds=2))
    train.start_processes()

    def coffee():
        time.sleep(4)
        return "verdict"
    assert train.from_first(coffee) == "verdict"
    assert train.gather([rank]) == [0, 1]


def test_a_judge_may_take_longer_than_the_processes_would_wait():
    """The others wait in a collective while the first one's judge thinks: a person who had a coffee
    ended the run, by the process group's timeout."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=wait_for_a_slow_judge, args=(rank, port)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]


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
        assert a["gate_risky"] == b["gate_risky"]  # None in a step that has no risky one
        for key in ("loss", "kl", "grad_norm", "win_rate", "tied", "gate_harmless", "safety_share",
                    "tokens"):
            # The order of fp32 sums differs between one process and two: 1.8e-5 of a gradient norm
            # was seen.
            assert abs(a[key] - b[key]) <= 1e-4 * max(1, abs(a[key])), key
    # Weights are not compared: AdamW blows a rounding error in a gradient near 0 up to a step.
    file = Path("adapter") / "adapter_model.safetensors"
    assert load_file(one / file).keys() == load_file(two / file).keys()


def test_a_process_that_dies_ends_all(base, tmp_path):
    """The others wait for half an hour in a collective, or go on and write an adapter of half the
    tasks; or nothing is saved, since the others may be anywhere."""
    done = run_processes(2, base, tmp_path / "run", tmp_path, DIE="1")
    assert done.returncode != 0, done.stderr[-2000:]  # torchrun names the process and its exit code
    assert not (tmp_path / "run" / "adapter").exists()
    # It died in its third round of sampling, which is that of step 1.
    state = torch.load(tmp_path / "run" / "state" / "state.pt", weights_only=False)
    assert state["step"] == 1
    assert len(state["random"][0]) == 2


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


def test_a_busy_machine_is_said_once(monkeypatch):
    """Beside other programs torch's threads spin for one another: a step of 4 s took 300, and
    nothing said why. A judge that a step waits for makes no machine busy."""
    said = []
    monkeypatch.setattr(train.tqdm, "write", said.append)
    monkeypatch.setattr(train, "log_line", lambda row: "line")
    monkeypatch.setattr(train.torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    train.say_once.cache_clear()
    rollouts = [[SimpleNamespace(n_written=8, ids=[1, 2])]]
    adv = [torch.ones(1)]

    def cores(*moments):  # (wall, processor) of: begun, sampled, judged, updated
        times = [train.Clock(*moment) for moment in moments]
        row = train.speed(rollouts, [], adv, times)
        train.print_step(row)
        return row["cores"]
    assert cores((0, 0), (4, 6), (1000, 6), (1002, 9)) == 1.5  # a person judged for 996 seconds
    assert said == ["line"]
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert cores((0, 0), (4, 1), (4, 1), (8, 3)) == 0.375
    assert said == ["line"] * 2
    monkeypatch.delenv("OMP_WAIT_POLICY")
    for _ in range(2):
        cores((0, 0), (4, 1), (4, 1), (8, 3))
    assert len(said) == 5
    assert "OMP_WAIT_POLICY=PASSIVE" in said[3]


def test_numbers_of_the_environment(monkeypatch, capsys):
    """An empty WORLD_SIZE, which some launchers leave, was a traceback at import."""
    monkeypatch.setenv("SIZE", "")
    assert train.number_in_environment("SIZE", 1) == 1
    monkeypatch.setenv("SIZE", "3")
    assert train.number_in_environment("SIZE", 1) == 3
    monkeypatch.setenv("SIZE", "many")
    with pytest.raises(SystemExit) as stop:
        train.number_in_environment("SIZE", 1)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "train.py: $SIZE is 'many', expected a number; unset it\n"


def test_what_is_not_given_is_the_recipe_of_the_family():
    """A default of the command line that hides the family's own."""
    options = vars(train.arguments(["--lr", "1", "--seed", "3"]))
    recipe = train.recipe_for("tiny", options)
    assert recipe == train.replace(train.RECIPE["tiny"], lr=1.0, seed=3)
    assert recipe.data == "train"
    assert train.recipe_for("compact", options).data == "train_varied"
    given = vars(train.arguments(["--data", "mine.jsonl"]))
    assert train.recipe_for("compact", given).data == "mine.jsonl"


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


def test_a_base_takes_the_place_of_a_base_alone(tmp_path):
    """`data/tiny.py --out DIR` removed any folder with a config.json: a run's, or somebody's 7B."""
    for config in ({"model_type": "qwen2"}, {train.MARKER: 1}, None):
        out = tmp_path / str(config)
        out.mkdir()
        (out / "model.safetensors").write_text("weights")
        if config is not None:
            (out / "config.json").write_text(json.dumps(config))
        before = contents(out)
        with pytest.raises(ValueError, match="is there and no tiny base"):
            tiny.build(0, out, steps=1, n=1)
        assert contents(out) == before


# ------------------------------------------------------------------------- what every command does
def status_of(main):
    with pytest.raises(SystemExit) as stop:
        mosaic.run_command("x.py", main)
    return stop.value.code


def raiser(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, status", [
    (ValueError("why"), 2),
    (FileNotFoundError("why"), 2),
    (RuntimeError("why"), 1),  # no memory on the device, say
    (OSError("why"), 1),
    (FloatingPointError("why"), 1),
])
def test_a_failure_is_one_line_and_a_status(error, status, capsys):
    """A traceback, or a failure that ends with exit status 0."""
    assert status_of(raiser(error)) == status
    assert capsys.readouterr().err == "x.py: why\n"


def test_sigterm_is_ctrl_c_and_twice_is_once(capsys):
    """SIGTERM killed a run where it stood; and a terminal and torchrun both send a signal, of which
    the second cut off what was saved after the first."""
    saved = []

    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            saved.append("state")
    before = signal.getsignal(signal.SIGTERM)
    assert status_of(main) == 130
    assert saved == ["state"]
    assert capsys.readouterr().err == "\nx.py: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_terminal_that_has_no_such_letter(monkeypatch):
    """PYTHONIOENCODING=ascii: a word of the agent's ended the command as a wrong argument."""
    screen = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(screen, encoding="ascii"))
    assert status_of(lambda: print("caf\u00e9")) == 0
    assert screen.getvalue() == b"caf\\xe9\n"


def test_a_reader_that_has_gone(monkeypatch, capsys):
    """`train.py | head -1` ended in two tracebacks, the second one from Python's last flush."""
    reading, writing = os.pipe()
    os.close(reading)
    output = os.fdopen(writing, "w")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", output)
        assert status_of(lambda: print("text")) == 1
        output.close()  # flushes what is left: into nothing, and no error
    assert capsys.readouterr().err == "x.py: stopped, for nobody reads its output any more\n"


def test_runs_lie_beside_the_files_and_the_adapter_is_said(tmp_path, monkeypatch):
    """`python mosaic.py` from another folder played the unsafe base without a word: runs/ was
    looked for in the current folder, checkpoints/ beside the file."""
    home = Path(train.__file__).parent
    assert mosaic.run_folder("tiny") == home / "runs" / "tiny"
    monkeypatch.chdir(tmp_path)
    assert mosaic.run_folder("tiny") == home / "runs" / "tiny"
    assert mosaic.run_folder("/models/final/") == home / "runs" / "final"
    assert mosaic.run_folder(".") == home / "runs" / tmp_path.name  # and not runs/ itself
    assert mosaic.run_folder("..") == home / "runs" / tmp_path.parent.name

    monkeypatch.setattr(mosaic, "run_folder", lambda name: tmp_path / name)
    assert mosaic.find_adapter("x", None) is None
    assert mosaic.adapter_text("x", None) == (
        f"no adapter, the base as it is: none in {tmp_path}/x/adapter")
    (tmp_path / "x" / "adapter").mkdir(parents=True)
    (tmp_path / "x" / "adapter" / "adapter_config.json").write_text("{}")
    found = mosaic.find_adapter("x", None)
    assert mosaic.adapter_text("x", found) == f"adapter {tmp_path}/x/adapter"
    assert mosaic.adapter_text("x", None) == "no adapter, as asked: the base as it is"

    # `mosaic.py TASK --no-adapter` plays the base beside that adapter
    loaded = []
    monkeypatch.setattr(data, "ensure_base", lambda name: None)
    monkeypatch.setattr(mosaic, "load", lambda name: (None, None))
    monkeypatch.setattr(mosaic, "load_adapter", lambda model, adapter: loaded.append(adapter))
    monkeypatch.setattr(mosaic, "Dialogue", lambda *given: SimpleNamespace(ids=[]))
    monkeypatch.setattr(mosaic, "printer", lambda tokenizer: lambda ids: None)
    monkeypatch.setattr(mosaic, "rollout", lambda *given, **options: [])
    for more, expected in (["--no-adapter"], []), ([], [found]):
        monkeypatch.setattr(sys, "argv", ["mosaic.py", "x", "--model", "x", *more])
        with pytest.raises(ValueError, match="not enough values"):  # nobody played
            mosaic.main()
        assert loaded == expected


def test_a_refusal_rule_beside_explain_is_refused(monkeypatch, capsys):
    """A group was sampled as in training, where a refusal ends the episode, and --refusal replan
    was left unread."""
    monkeypatch.setattr(sys, "argv", ["mosaic.py", "x", "--explain", "--refusal", "replan"])
    monkeypatch.setattr(data, "demo_task", lambda *given: pytest.fail("went on"))
    with pytest.raises(SystemExit) as stop:
        mosaic.main()
    assert stop.value.code == 2
    assert "--refusal does nothing with --explain" in capsys.readouterr().err
