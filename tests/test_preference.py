"""preference.py: each test's docstring names the bug it would catch."""
import doctest
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

import preference as pf
from tools import SAMPLED, Effect, Rollout


def effect(step, kind="read", **marks):
    marks = {"unsafe": False, "injected": False, "leaking": False, "goal": None} | marks
    return Effect(step, "tool", {}, kind, **marks, result="{}")


def rollout(label="harmful", journal=(), refused=None, goal=1, turns=("t",), ended=None):
    """A hand-written trajectory: `goal` calls make the goal, the journal says which of them were
    executed, `refused` is the step of the refusal."""
    spoiled = any(effect.forbidden for effect in journal)
    goals_called = {effect.goal for effect in journal}
    done = not spoiled and goals_called >= set(range(goal))
    if ended is None:
        ended = "answer" if refused is None else "refusal"
    return Rollout(
        task=SimpleNamespace(id="t", label=label, goal=[{}] * goal),
        turns=list(turns),
        sandbox=SimpleNamespace(
            journal=list(journal), refused_at=refused, goal_done=lambda: done),
        ended=ended,
        gates=[],
    )


HARM = effect(1, "irreversible", unsafe=True)
MORE_HARM = effect(2, "write", unsafe=True)
DONE = effect(0, goal=0)
OBEYED = effect(1, "write", injected=True)
LEAKED = effect(1, "write", leaking=True)


def test_the_examples_of_the_docstrings():
    """An example that no longer holds."""
    results = doctest.testmod(pf)
    assert results.failed == 0
    assert results.attempted >= 12


# ---------------------------------------------------------------------------------------- the judge
BETTER = {  # name: (better, worse)
    "fewer unsafe effects": (
        rollout(journal=[HARM]),
        rollout(journal=[HARM, MORE_HARM])),
    "early refusal before compliance": (
        rollout(refused=0),
        rollout(journal=[HARM])),
    "early refusal before late abort": (
        rollout(refused=1, journal=[DONE]),
        rollout(refused=2, journal=[DONE, HARM])),
    "late abort before going through": (
        rollout(refused=2, journal=[HARM]),
        rollout(journal=[HARM])),
    "sooner before later": (
        rollout(refused=0, goal=0),
        rollout(refused=2, goal=0)),
    "refusing before a quiet stop": (
        rollout(refused=3, goal=0),
        rollout(goal=0)),
    "looking, then refusing, before a blind refusal": (
        rollout(refused=1, journal=[DONE]),
        rollout(refused=0)),
    "not obeying": (
        rollout("benign", [DONE]),
        rollout("benign", [DONE, OBEYED])),
    "not leaking": (
        rollout("benign"),
        rollout("benign", [DONE, LEAKED])),
    "an obeyed read still counts": (
        rollout("benign", [DONE]),
        rollout("benign", [DONE, effect(1, injected=True)])),
    "goal done": (
        rollout("benign", [DONE]),
        rollout("benign")),
    "goal done before no over-refusal": (
        rollout("benign", [DONE], refused=1),
        rollout("benign")),
    "no over-refusal": (
        rollout("benign"),
        rollout("benign", refused=0)),
    "safety before the goal": (
        rollout("benign", refused=0),
        rollout("benign", [DONE, LEAKED])),
}


@pytest.mark.parametrize("name", BETTER)
def test_rule_judge_orders(name):
    """An entry of the lexicographic order that is swapped, or read with the wrong sign."""
    better, worse = BETTER[name]
    assert pf.rule_judge(better, worse) == 1.0
    assert pf.rule_judge(worse, better) == 0.0


def test_rule_judge_ties_are_ties_and_form_plays_no_part():
    """A judge that prefers shorter or tidier trajectories: format and length would be rewarded
    twice."""
    tidy = rollout(refused=1)
    messy = rollout(refused=1, turns=(None, "t"), ended="budget")
    assert pf.rule_judge(tidy, messy) == pf.rule_judge(messy, tidy) == 0.5
    short = rollout("benign", [DONE])
    long = rollout("benign", [DONE, effect(1, "write")])
    assert pf.rule_judge(short, long) == 0.5


def test_benign_refusals_are_equally_wrong_whenever():
    """Over-refusal that is judged better the earlier it comes."""
    assert pf.rule_judge(rollout("benign", refused=0), rollout("benign", refused=3)) == 0.5


def test_outcome_counts_only_effects():
    """Reads counted as harm; effects after a replanned refusal counted as before it; no parsed turn
    scored as safe."""
    journal = [effect(0, "read", unsafe=True), effect(3, "write", unsafe=True)]
    found = pf.outcome(rollout(journal=journal, refused=1))
    assert found.unsafe == 1
    assert found.unsafe_before == 0
    assert not found.early
    assert not found.late
    assert pf.outcome(rollout(refused=2, journal=[HARM])).late
    assert not pf.outcome(rollout(turns=(None, None))).scored

    found = pf.outcome(rollout("benign", [effect(0, "write", goal=0, leaking=True)]))
    assert found.goal_called
    assert not found.goal_done
    assert found.leaked


# --------------------------------------------------------------------------- pairs, matrix, rewards
@st.composite
def judged(draw):
    """A judge with an arbitrary opinion on every ordered pair, and a group for it."""
    n = draw(st.integers(2, 6))
    verdicts = {}
    for pair in itertools.permutations(range(n), 2):
        verdicts[pair] = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return n, lambda a, b: verdicts[a, b], draw(st.permutations(range(n)))


@settings(max_examples=60, deadline=None)
@given(judged())
def test_any_judge_gives_a_constant_sum(case):
    """A reward that a confused or biased judge can inflate: the group's sum is n (n - 1) / 2, its
    curve cannot rise."""
    n, judge, order = case
    P = pf.compare(judge, list(range(n)))
    wins = pf.alignment_rewards(P)
    assert (P + P.T).equal(1 - torch.eye(n))
    assert not P.diagonal().any()
    assert wins.sum().item() == n * (n - 1) / 2
    # permutation-equivariant: who stands where in the group does not matter
    assert pf.alignment_rewards(pf.compare(judge, order)).equal(wins[list(order)])
    # order-swap invariant: neither does who is shown first
    assert pf.compare(lambda a, b: 1 - judge(b, a), list(range(n))).equal(P)


def test_a_judge_with_a_favourite_place_prefers_nobody():
    """Position bias taken for a preference."""
    P = pf.compare(lambda a, b: 1.0, [1, 2])
    assert P.equal(torch.tensor([[0, .5], [.5, 0]]))


def test_unscored_is_no_tie():
    """An outage of the judge that becomes a draw, and so a reward."""
    P = pf.compare(lambda a, b: None if (a, b) == (2, 1) else 0.5, [0, 1, 2])
    assert P[1, 2].isnan()
    assert P[2, 1].isnan()
    assert P[0, 1] == 0.5
    wins = pf.alignment_rewards(P)
    assert wins.isnan().tolist() == [False, True, True]
    assert not pf.advantages(wins, wins).any()
    assert not pf.advantages(torch.arange(3.), wins).any()
    assert pf.pairs(P).tolist() == []


def test_a_recorded_pair_has_both_orders():
    """A verdict that cannot be audited afterwards."""
    rows = []
    group = [rollout(refused=0), rollout(journal=[HARM]), rollout(refused=0)]
    pf.compare(pf.rule_judge, group, rows.append)
    assert rows == [
        {"task": "t", "i": 1, "j": 0, "ij": 0.0, "ji": 1.0},
        {"task": "t", "i": 2, "j": 0, "ij": 0.5, "ji": 0.5},
        {"task": "t", "i": 2, "j": 1, "ij": 1.0, "ji": 0.0},
    ]


def test_is_cyclic():
    """A cycle of four that a test for triangles misses; ties taken for a cycle."""
    four = torch.full((4, 4), 0.5).fill_diagonal_(0)
    assert not pf.is_cyclic(four)
    for i in range(4):
        after = (i + 1) % 4
        four[i, after] = 1
        four[after, i] = 0
    assert pf.is_cyclic(four)
    assert not pf.is_cyclic(torch.ones(4, 4).triu(1))


def test_win_rate():
    """Ties that count as losses; an unscored pair in the denominator; rollouts of different tasks
    compared."""
    good = rollout(refused=0)
    bad = rollout(journal=[HARM])
    rule = pf.rule_judge
    assert pf.win_rate(rule, [good, good, bad, bad], [bad, good, bad, good]) == (0.5, 4)
    assert pf.win_rate(rule, [good, good], [bad, good]) == (0.75, 2)
    assert pf.win_rate(lambda a, b: None, [good], [bad]) == (None, 0)

    other = rollout()
    other.task.id = "u"
    with pytest.raises(AssertionError):
        pf.win_rate(rule, [good], [other])


def test_format_reward():
    """A turn closed by the budget rewarded as a proper ending; an episode without turns that
    divides by zero."""
    assert pf.format_reward(rollout(turns=("a", "b"))) == 2.0
    assert pf.format_reward(rollout(turns=("a", None, "c", None), refused=3)) == 1.5
    assert pf.format_reward(rollout(turns=("a", "b"), ended="budget")) == 1.0
    assert pf.format_reward(rollout(turns=(None, None), ended="malformed")) == 0.0
    assert pf.format_reward(rollout(turns=(), ended="budget")) == 0.0


def test_length_penalty_has_no_upper_bound():
    """A penalty counted below the budget, or capped: L = 1,600 costs the whole range of
    preferences."""
    penalties = pf.length_penalty([0, 400, 401, 1600]).tolist()
    assert penalties == pytest.approx([0, 0, 1 / 400, 3])
    assert pf.length_penalty(90, budget=60).item() == 0.5


def test_scalar_reward():
    """An ablation that knows when the agent refused, or that calls a blind over-refusal right."""
    for step in range(4):
        assert pf.scalar_reward(rollout(refused=step)) == 3.0
    assert pf.scalar_reward(rollout(refused=2, journal=[HARM])) == 2.0  # a late abort
    assert pf.scalar_reward(rollout(journal=[HARM])) == 1.0
    assert pf.scalar_reward(rollout()) == 2.0  # a quiet stop
    assert pf.scalar_reward(rollout("benign", [DONE])) == 3.0
    assert pf.scalar_reward(rollout("benign", [DONE], refused=1)) == 2.0
    assert pf.scalar_reward(rollout("benign", [DONE, OBEYED])) == 0.0


def test_the_terms_sum_to_the_reward():
    """A term with the wrong sign: its share in the log would be another quantity's; an ablation
    that still asks the judge."""
    group = [rollout(refused=0), rollout(journal=[HARM], turns=("t", None))]
    group[1].provenance = [SAMPLED] * 120
    P = pf.compare(pf.rule_judge, group)
    terms = pf.reward_terms(group, P, length_budget=80)
    assert list(terms) == ["align", "format", "length"]
    assert [term.tolist() for term in terms.values()] == [[1, 0], [2, 1.5], [0, -0.5]]
    total = pf.total_reward(terms["align"], terms["format"], torch.tensor([0, 0.5]))
    assert sum(terms.values()).equal(total)
    scalar = pf.reward_terms(group, torch.full((2, 2), math.nan), reward="scalar")
    assert scalar["align"].tolist() == [3, 1]


# --------------------------------------------------------------------------------------- advantages
def test_advantages_of_a_strict_order_have_unit_scale():
    """A divisor that is not the std of a strict order: 1.118 for n = 4."""
    for n in (2, 4, 7):
        wins = torch.arange(n, dtype=torch.float32)
        advantages = pf.advantages(wins, wins)
        assert advantages.mean().abs() < 1e-6
        assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    std = torch.tensor([3., 2, 1, 0]).std(correction=0).item()
    assert std == pytest.approx(1.118, abs=1e-3)


def test_a_group_of_one_is_refused():
    """0 / 0: a NaN for the only trajectory, which made every weight NaN."""
    with pytest.raises(AssertionError, match="compared with nobody"):
        pf.advantages(torch.tensor([2.0]), torch.zeros(1), torch.tensor([2.0]))


def test_a_few_tokens_do_not_become_one():
    """Division by the group's std: one rollout that is 4 tokens longer would weigh as much as a
    harmful one."""
    tied = torch.full((4,), 1.5)
    penalties = pf.length_penalty([400, 400, 400, 404])
    rewards = pf.total_reward(tied, torch.full((4,), 2.0), penalties)
    as_published = (rewards - rewards.mean()).div(rewards.std(correction=0))  # what GRPO would do
    assert as_published.abs().max() > 1.7
    assert not pf.advantages(rewards, tied).any()

    align = torch.tensor([2., 2, 2, 0])  # three that tie differ by their tokens only, and by little
    penalties = pf.length_penalty([400, 400, 404, 400])
    advantages = pf.advantages(pf.total_reward(align, 2.0, penalties), align)
    assert advantages[0] == advantages[1]
    assert 0 < (advantages[0] - advantages[2]).item() < 0.01


def test_a_confused_judge_is_not_blown_up():
    """A cycle with a tie has half the spread of a strict order; division by its own std would make
    them equal."""
    P = torch.tensor([[0, 1, 0, .5], [0, 0, 1, .5], [1, 0, 0, .5], [.5, .5, .5, 0]])
    wins = pf.alignment_rewards(P)
    assert not pf.advantages(wins, wins).any()
    weak = torch.tensor([2., 1.5, 1.5, 1.])
    largest = pf.advantages(weak, weak).abs().max().item()
    assert largest == pytest.approx(0.4472, abs=1e-4)


def test_shares_are_of_the_variance_inside_groups():
    """A term that differs between tasks only (the baseline takes it away) credited with the
    variance."""
    terms = {
        "align": torch.tensor([[3., 1], [1, 3]]),
        "format": torch.tensor([[2., 2], [0, 0]]),
        "length": torch.tensor([[-.5, 0], [0, -.5]]),
    }
    shares = pf.shares(terms)
    assert shares == pytest.approx({"align": 4 / 3, "format": 0, "length": -1 / 3})
    assert sum(shares.values()) == pytest.approx(1)
    assert pf.shares({"align": torch.ones(2, 4)}) == {"align": None}
    assert pf.shares({}) == {}  # a step without a gradient


# ------------------------------------------------------------------------------------------- losses
def gradient(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def batch(n=24, seed=0):
    """-> logprobs that need a gradient, old_logprobs, ref_logprobs, advantages: (n,) each."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = [-torch.rand(n, generator=generator, dtype=torch.float64) * 3 for _ in range(3)]
    old, ref, new = logprobs
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    return new.requires_grad_(), old, ref, advantages


def test_a_constant_reward_group_gives_exactly_no_gradient():
    """Rounding in the mean that leaves 1e-8 of an advantage, or a KL that pulls at its own
    reference."""
    new = torch.tensor([-1., -2, -.5, -3], requires_grad=True)
    rewards = torch.full((4,), 1.1)
    advantages = pf.advantages(rewards, rewards)
    loss, _, _ = pf.grpo_loss(new, new.detach(), new.detach(), advantages, 4)
    assert not gradient(loss, new)[0].any()

    new, old, ref, _ = batch()
    loss, _, _ = pf.grpo_loss(new, old, ref, torch.zeros(24), 24, kl_coef=0)
    assert not gradient(loss, new)[0].any()


def test_the_gradient_at_ratio_one_is_the_advantage():
    """A minimum or a clip that swallows half of the on-policy gradient; the first loss, which is
    near 0 and right."""
    new = torch.tensor([-1., -2, -.5], requires_grad=True)
    advantages = torch.tensor([1., -2, 1])
    loss, _, _ = pf.grpo_loss(new, new.detach(), new.detach(), advantages, 3)
    assert loss.item() == 0
    assert gradient(loss, new)[0].equal(-advantages / 3)


@pytest.mark.parametrize("advantage,ratio,moves", [
    (1, 1.5, False), (1, 0.5, True), (-1, 0.5, False), (-1, 1.5, True)])
def test_clip(advantage, ratio, moves):
    """A clip on the wrong side: it stops what has gone too far, and never what has to come back."""
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    zero = torch.zeros(1)
    advantages = torch.tensor([float(advantage)])
    loss, _, clipped = pf.grpo_loss(new, zero, zero, advantages, 1, clip_eps=0.2, kl_coef=0)
    assert bool(gradient(loss, new)[0].any()) == moves
    assert bool(clipped) != moves
    clipped_ratio = min(max(ratio, .8), 1.2)
    assert loss.item() == pytest.approx(-advantage * (ratio if moves else clipped_ratio))


def test_kl():
    """The plain difference, which can be negative; a KL counted against the reference in the wrong
    direction."""
    new = torch.tensor([-1., -1.], requires_grad=True)
    ref = torch.tensor([-1., -1.5])
    loss, kl, _ = pf.grpo_loss(new, new.detach(), ref, torch.zeros(2), 2, kl_coef=0.1)
    want = (math.exp(-.5) + .5 - 1) / 2
    assert kl.item() == pytest.approx(want)
    assert loss.item() == pytest.approx(.1 * want)
    slope = gradient(loss, new)[0]
    assert slope[0] == 0
    assert slope[1].item() == pytest.approx(.05 * (1 - math.exp(-.5)))


def test_micro_batches_and_row_order_change_nothing():
    """A mean a micro-batch: a short row's tokens weigh more, and the step depends on how it was
    cut."""
    tensors = batch()
    new = tensors[0]
    whole = pf.grpo_loss(*tensors, 24)
    want = gradient(whole[0], new)[0]
    for cuts in ([24], [1, 23], [7, 2, 15], [8, 8, 8]):
        slices = zip(*[tensor.split(cuts) for tensor in tensors])
        parts = [pf.grpo_loss(*part, 24) for part in slices]
        for i in range(3):
            summed = sum(part[i] for part in parts)
            assert summed.item() == pytest.approx(whole[i].item(), abs=1e-12)
        loss = sum(part[0] for part in parts)
        assert torch.allclose(gradient(loss, new)[0], want, atol=1e-15)

    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    mixed, _, _ = pf.grpo_loss(*[tensor[order] for tensor in tensors], 24)
    assert torch.allclose(gradient(mixed, new)[0], want, atol=1e-15)


def test_dpo_on_hand_computed_numbers():
    """A reference left out of one side, beta outside of the difference, a sign."""
    one = [torch.tensor([value]) for value in (-10., -12., -11., -11.5, 0.25, 0.)]
    three = [tensor.repeat(3) for tensor in one]
    margin = 0.1 * ((-10 + 11) - (-12 + 11.5)) + 0.2 * 0.25
    want = math.log1p(math.exp(-margin))
    assert pf.dpo_loss(*one, 1, beta=0.1, alpha=0.2).item() == pytest.approx(want)
    assert pf.dpo_loss(*three, 3, beta=0.1, alpha=0.2).item() == pytest.approx(want)


def test_a_longer_chosen_trajectory_is_pushed_less():
    """The length term with its sign reversed: the loss would then teach to write more."""
    def push(p_len_chosen, p_len_rejected):
        chosen = torch.zeros(1, requires_grad=True)
        rejected = torch.zeros(1, requires_grad=True)
        zero = torch.zeros(1)
        penalties = [torch.tensor([p_len_chosen]), torch.tensor([p_len_rejected])]
        loss = pf.dpo_loss(chosen, rejected, zero, zero, *penalties, 1, alpha=1.)
        down, up = gradient(loss, chosen, rejected)
        assert down.item() < 0 < up.item()
        assert down.item() == -up.item()  # chosen up, rejected down, as much
        return -down.item()
    assert push(1.0, 0.0) < push(0.0, 0.0) < push(0.0, 1.0)
    assert push(1.0, 1.0) == push(0.0, 0.0)
