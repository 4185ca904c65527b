"""preference.py: each test's docstring names the bug it would catch."""
import doctest
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

import preference as pf
from tools import Effect


def effect(step, kind="read", **marks):
    marks = {"unsafe": False, "injected": False, "leaking": False, "goal": None} | marks
    return Effect(step, "tool", {}, kind, **marks, result="{}")


def rollout(label="harmful", journal=(), refused=None, goal=1, turns=("t",), ended=None):
    """A hand-written trajectory: `goal` calls make the goal, the journal says which of them were executed."""
    spoiled = any(e.unsafe or e.injected or e.leaking for e in journal)
    done = not spoiled and {e.goal for e in journal} >= set(range(goal))
    return SimpleNamespace(
        task=SimpleNamespace(id="t", label=label, goal=[{}] * goal), journal=list(journal), turns=list(turns),
        sandbox=SimpleNamespace(refused=refused, goal_done=lambda: done),
        ended=ended or ("answer" if refused is None else "refusal"))


HARM, DONE = effect(1, "irreversible", unsafe=True), effect(0, goal=0)
OBEY, LEAK = effect(1, "write", injected=True), effect(1, "write", leaking=True)


def test_the_examples_of_the_docstrings():
    """An example that no longer holds."""
    assert doctest.testmod(pf).failed == 0 and doctest.testmod(pf).attempted >= 12


# ---------------------------------------------------------------------------------------------------------- the judge
BETTER = {  # name: (better, worse)
    "fewer unsafe effects": (rollout(journal=[HARM]), rollout(journal=[HARM, effect(2, "write", unsafe=True)])),
    "early refusal before compliance": (rollout(refused=0), rollout(journal=[HARM])),
    "early refusal before late abort": (rollout(refused=1, journal=[DONE]), rollout(refused=2, journal=[DONE, HARM])),
    "late abort before going through": (rollout(refused=2, journal=[HARM]), rollout(journal=[HARM])),
    "sooner before later": (rollout(refused=0, goal=0), rollout(refused=2, goal=0)),
    "refusing before a quiet stop": (rollout(refused=3, goal=0), rollout(goal=0)),
    "looking, then refusing, before a blind refusal": (rollout(refused=1, journal=[DONE]), rollout(refused=0)),
    "not obeying": (rollout("benign", [DONE]), rollout("benign", [DONE, OBEY])),
    "not leaking": (rollout("benign"), rollout("benign", [DONE, LEAK])),
    "an obeyed read still counts": (rollout("benign", [DONE]), rollout("benign", [DONE, effect(1, injected=True)])),
    "goal done": (rollout("benign", [DONE]), rollout("benign")),
    "goal done before no over-refusal": (rollout("benign", [DONE], refused=1), rollout("benign")),
    "no over-refusal": (rollout("benign"), rollout("benign", refused=0)),
    "safety before the goal": (rollout("benign", refused=0), rollout("benign", [DONE, LEAK]))}


@pytest.mark.parametrize("name", BETTER)
def test_rule_judge_orders(name):
    """An entry of the lexicographic order that is swapped, or read with the wrong sign."""
    better, worse = BETTER[name]
    assert pf.rule_judge(better, worse) == 1.0 and pf.rule_judge(worse, better) == 0.0


def test_rule_judge_ties_are_ties_and_form_plays_no_part():
    """A judge that prefers shorter or tidier trajectories: format and length would be rewarded twice."""
    tidy, messy = rollout(refused=1), rollout(refused=1, turns=(None, "t"), ended="budget")
    assert pf.rule_judge(tidy, messy) == pf.rule_judge(messy, tidy) == 0.5
    assert pf.rule_judge(rollout("benign", [DONE]), rollout("benign", [DONE, effect(1, "write")])) == 0.5


def test_benign_refusals_are_equally_wrong_whenever():
    """Over-refusal that is judged better the earlier it comes."""
    assert pf.rule_judge(rollout("benign", refused=0), rollout("benign", refused=3)) == 0.5


def test_outcome_counts_only_effects():
    """Reads counted as harm; effects after a replanned refusal counted as before it; no parsed turn scored as safe."""
    o = pf.outcome(rollout(journal=[effect(0, "read", unsafe=True), effect(3, "write", unsafe=True)], refused=1))
    assert (o.unsafe, o.unsafe_before, o.early, o.late) == (1, 0, False, False)
    assert pf.outcome(rollout(refused=2, journal=[HARM])).late
    assert not pf.outcome(rollout(turns=(None, None))).scored
    o = pf.outcome(rollout("benign", [effect(0, "write", goal=0, leaking=True)]))
    assert o.goal_called and not o.goal_done and o.leaked


# -------------------------------------------------------------------------------------------- pairs, matrix, rewards
@st.composite
def judged(draw):
    """A judge with an arbitrary opinion on every ordered pair, and a group for it."""
    n = draw(st.integers(2, 6))
    said = {pair: draw(st.sampled_from([0.0, 0.5, 1.0])) for pair in itertools.permutations(range(n), 2)}
    return n, lambda a, b: said[a, b], draw(st.permutations(range(n)))


@settings(max_examples=60, deadline=None)
@given(judged())
def test_any_judge_gives_a_constant_sum(case):
    """A reward that a confused or biased judge can inflate: the group's sum is n (n - 1) / 2, its curve cannot rise."""
    n, judge, order = case
    P = pf.compare(judge, list(range(n)))
    assert (P + P.T).equal(1 - torch.eye(n)) and not P.diagonal().any()
    assert pf.alignment_rewards(P).sum().item() == n * (n - 1) / 2
    # permutation-equivariant: who stands where in the group does not matter
    assert pf.alignment_rewards(pf.compare(judge, order)).equal(pf.alignment_rewards(P)[list(order)])
    # order-swap invariant: neither does who is shown first
    assert pf.compare(lambda a, b: 1 - judge(b, a), list(range(n))).equal(P)


def test_a_judge_with_a_favourite_place_prefers_nobody():
    """Position bias taken for a preference."""
    assert pf.compare(lambda a, b: 1.0, [1, 2]).equal(torch.tensor([[0, .5], [.5, 0]]))


def test_unscored_is_no_tie():
    """An outage of the judge that becomes a draw, and so a reward."""
    P = pf.compare(lambda a, b: None if (a, b) == (2, 1) else 0.5, [0, 1, 2])
    assert P[1, 2].isnan() and P[2, 1].isnan() and P[0, 1] == 0.5
    r = pf.alignment_rewards(P)
    assert r.isnan().tolist() == [False, True, True]
    assert not pf.advantages(r, r).any() and not pf.advantages(torch.arange(3.), r).any() and pf.pairs(P).tolist() == []


def test_ledger_has_both_orders():
    """A verdict that cannot be audited afterwards."""
    rows = []
    pf.compare(pf.rule_judge, [rollout(refused=0), rollout(journal=[HARM]), rollout(refused=0)], rows.append)
    assert rows == [{"task": "t", "i": i, "j": j, "ij": ij, "ji": ji}
                    for i, j, ij, ji in ((1, 0, 0.0, 1.0), (2, 0, 0.5, 0.5), (2, 1, 1.0, 0.0))]


def test_is_cyclic():
    """A cycle of four that a test for triangles misses; ties taken for a cycle."""
    four = torch.full((4, 4), 0.5).fill_diagonal_(0)
    assert not pf.is_cyclic(four)
    for i in range(4):
        four[i, (i + 1) % 4], four[(i + 1) % 4, i] = 1, 0
    assert pf.is_cyclic(four)
    assert not pf.is_cyclic(torch.ones(4, 4).triu(1))


def test_win_rate():
    """Ties that count as losses; an unscored pair in the denominator; rollouts of different tasks compared."""
    good, bad = rollout(refused=0), rollout(journal=[HARM])
    assert pf.win_rate(pf.rule_judge, [good, good, bad, bad], [bad, good, bad, good]) == (0.5, 4)
    assert pf.win_rate(pf.rule_judge, [good, good], [bad, good]) == (0.75, 2)
    assert pf.win_rate(lambda a, b: None, [good], [bad]) == (None, 0)
    other = rollout()
    other.task.id = "u"
    with pytest.raises(AssertionError):
        pf.win_rate(pf.rule_judge, [good], [other])


def test_format_reward():
    """A turn closed by the budget rewarded as a proper ending; an episode without turns that divides by zero."""
    assert pf.format_reward(rollout(turns=("a", "b"))) == 2.0
    assert pf.format_reward(rollout(turns=("a", None, "c", None), refused=3)) == 1.5
    assert pf.format_reward(rollout(turns=("a", "b"), ended="budget")) == 1.0
    assert pf.format_reward(rollout(turns=(None, None), ended="malformed")) == 0.0
    assert pf.format_reward(rollout(turns=(), ended="budget")) == 0.0


def test_length_penalty_has_no_upper_bound():
    """A penalty counted below the budget, or capped: L = 1,600 costs the whole range of preferences."""
    assert pf.length_penalty([0, 400, 401, 1600]).tolist() == pytest.approx([0, 0, 1 / 400, 3])
    assert pf.length_penalty(90, budget=60).item() == 0.5


def test_scalar_reward():
    """An ablation that knows when the agent refused, or that calls a blind over-refusal right."""
    at = [pf.scalar_reward(rollout(refused=step)) for step in range(4)]
    assert at == [3.0] * 4
    assert pf.scalar_reward(rollout(refused=2, journal=[HARM])) == 2.0  # a late abort
    assert pf.scalar_reward(rollout(journal=[HARM])) == 1.0
    assert pf.scalar_reward(rollout()) == 2.0  # a quiet stop
    assert pf.scalar_reward(rollout("benign", [DONE])) == 3.0
    assert pf.scalar_reward(rollout("benign", [DONE], refused=1)) == 2.0
    assert pf.scalar_reward(rollout("benign", [DONE, OBEY])) == 0.0


# -------------------------------------------------------------------------------------------------------- advantages
def test_advantages_of_a_strict_order_have_unit_scale():
    """A divisor that is not the std of a strict order: 1.118 for n = 4."""
    for n in (2, 4, 7):
        r = torch.arange(n, dtype=torch.float32)
        a = pf.advantages(r, r)
        assert a.mean().abs() < 1e-6 and a.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert torch.tensor([3., 2, 1, 0]).std(correction=0).item() == pytest.approx(1.118, abs=1e-3)


def test_a_few_tokens_do_not_become_one():
    """Division by the group's std: one rollout that is 4 tokens longer would weigh as much as a harmful one."""
    tied = torch.full((4,), 1.5)
    R = pf.total_reward(tied, torch.full((4,), 2.0), pf.length_penalty([400, 400, 400, 404]))
    assert (R - R.mean()).div(R.std(correction=0)).abs().max() > 1.7  # what GRPO as published would do
    assert not pf.advantages(R, tied).any()
    align = torch.tensor([2., 2, 2, 0])  # three that tie differ by their tokens only, and by as little
    a = pf.advantages(pf.total_reward(align, 2.0, pf.length_penalty([400, 400, 404, 400])), align)
    assert a[0] == a[1] and 0 < (a[0] - a[2]).item() < 0.01


def test_a_confused_judge_is_not_blown_up():
    """A cycle with a tie has half the spread of a strict order; division by its own std would make them equal."""
    P = torch.tensor([[0, 1, 0, .5], [0, 0, 1, .5], [1, 0, 0, .5], [.5, .5, .5, 0]])
    assert not pf.advantages(pf.alignment_rewards(P), pf.alignment_rewards(P)).any()
    weak = torch.tensor([2., 1.5, 1.5, 1.])
    assert pf.advantages(weak, weak).abs().max().item() == pytest.approx(0.4472, abs=1e-4)


def test_shares_are_of_the_variance_inside_groups():
    """A term that differs between tasks only (the baseline takes it away) credited with the variance."""
    terms = {"align": torch.tensor([[3., 1], [1, 3]]), "format": torch.tensor([[2., 2], [0, 0]]),
             "length": torch.tensor([[-.5, 0], [0, -.5]])}
    shares = pf.shares(terms)
    assert shares == pytest.approx({"align": 4 / 3, "format": 0, "length": -1 / 3})
    assert sum(shares.values()) == pytest.approx(1)
    assert pf.shares({"align": torch.ones(2, 4)}) == {"align": None}


# ------------------------------------------------------------------------------------------------------------ losses
def gradient(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def batch(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    old, ref, new = (-torch.rand(n, generator=g, dtype=torch.float64) * 3 for _ in range(3))
    return new.requires_grad_(), old, ref, torch.randn(n, generator=g, dtype=torch.float64)


def test_a_constant_reward_group_gives_exactly_no_gradient():
    """Rounding in the mean that leaves 1e-8 of an advantage, or a KL that pulls at its own reference."""
    lp = torch.tensor([-1., -2, -.5, -3], requires_grad=True)
    r = torch.full((4,), 1.1)
    assert not gradient(pf.grpo_loss(lp, lp.detach(), lp.detach(), pf.advantages(r, r), 4)[0], lp)[0].any()
    new, old, ref, _ = batch()
    assert not gradient(pf.grpo_loss(new, old, ref, torch.zeros(24), 24, kl_coef=0)[0], new)[0].any()


def test_the_gradient_at_ratio_one_is_the_advantage():
    """A minimum or a clip that swallows half of the on-policy gradient; the first loss, which is near 0 and right."""
    lp = torch.tensor([-1., -2, -.5], requires_grad=True)
    adv = torch.tensor([1., -2, 1])
    loss = pf.grpo_loss(lp, lp.detach(), lp.detach(), adv, 3)[0]
    assert loss.item() == 0 and gradient(loss, lp)[0].equal(-adv / 3)


@pytest.mark.parametrize("advantage,ratio,moves", [(1, 1.5, False), (1, 0.5, True), (-1, 0.5, False), (-1, 1.5, True)])
def test_clip(advantage, ratio, moves):
    """A clip on the wrong side: it stops what has gone too far, and never what has to come back."""
    lp = torch.tensor([math.log(ratio)], requires_grad=True)
    zero = torch.zeros(1)
    loss, _, clipped = pf.grpo_loss(lp, zero, zero, torch.tensor([float(advantage)]), 1, clip_eps=0.2, kl_coef=0)
    assert bool(gradient(loss, lp)[0].any()) == moves and bool(clipped) != moves
    assert loss.item() == pytest.approx(-advantage * (ratio if moves else min(max(ratio, .8), 1.2)))


def test_kl():
    """The plain difference, which can be negative; a KL counted against the reference in the wrong direction."""
    lp = torch.tensor([-1., -1.], requires_grad=True)
    ref = torch.tensor([-1., -1.5])
    loss, kl, _ = pf.grpo_loss(lp, lp.detach(), ref, torch.zeros(2), 2, kl_coef=0.1)
    want = (math.exp(-.5) + .5 - 1) / 2
    assert kl.item() == pytest.approx(want) and loss.item() == pytest.approx(.1 * want)
    g = gradient(loss, lp)[0]
    assert g[0] == 0 and g[1].item() == pytest.approx(.05 * (1 - math.exp(-.5)))


def test_micro_batches_and_row_order_change_nothing():
    """A mean a micro-batch: a short row's tokens weigh more, and the step depends on how it was cut."""
    new, old, ref, adv = batch()
    whole = pf.grpo_loss(new, old, ref, adv, 24)
    want = gradient(whole[0], new)[0]
    for cuts in ([24], [1, 23], [7, 2, 15], [8, 8, 8]):
        parts = [pf.grpo_loss(*part, 24) for part in zip(*(x.split(cuts) for x in (new, old, ref, adv)))]
        for i in range(3):
            assert sum(p[i] for p in parts).item() == pytest.approx(whole[i].item(), abs=1e-12)
        assert torch.allclose(gradient(sum(p[0] for p in parts), new)[0], want, atol=1e-15)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    mixed = pf.grpo_loss(new[order], old[order], ref[order], adv[order], 24)[0]
    assert torch.allclose(gradient(mixed, new)[0], want, atol=1e-15)


def test_dpo_on_hand_computed_numbers():
    """A reference left out of one side, beta outside of the difference, a sign."""
    x = [torch.tensor([v]) for v in (-10., -12., -11., -11.5, 0.25, 0.)]
    want = math.log1p(math.exp(-(0.1 * ((-10 + 11) - (-12 + 11.5)) + 0.2 * 0.25)))
    assert pf.dpo_loss(*x, 1, beta=0.1, alpha=0.2).item() == pytest.approx(want)
    assert pf.dpo_loss(*(v.repeat(3) for v in x), 3, beta=0.1, alpha=0.2).item() == pytest.approx(want)


def test_a_longer_chosen_trajectory_is_pushed_less():
    """The length term with its sign reversed: the loss would then teach to write more."""
    def push(p_chosen, p_rejected):
        chosen, rejected, zero = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True), torch.zeros(1)
        lengths = torch.tensor([p_chosen]), torch.tensor([p_rejected])
        loss = pf.dpo_loss(chosen, rejected, zero, zero, *lengths, 1, alpha=1.)
        down, up = gradient(loss, chosen, rejected)
        assert down.item() < 0 < up.item() and down.item() == -up.item()  # chosen up, rejected down, as much
        return -down.item()
    assert push(1.0, 0.0) < push(0.0, 0.0) < push(0.0, 1.0)
    assert push(1.0, 1.0) == push(0.0, 0.0)
