"""The sampler and the rollouts on an untrained tiny base: what is sampled is what is trained,
exactly."""
import copy
import random
from collections import Counter, namedtuple
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import data
import model as model_
import mosaic
import train
from data import tiny
from data.demonstrator import MIX, Demonstrator, demonstration
from mosaic import (
    Dialogue,
    encode_trusted,
    get_grammar,
    rollout,
    safety_tokens,
    sampled_logprobs,
)
from preference import advantages, grpo_loss
from tools import FORCED, SAMPLED, TOOL, USER, Episode, FormatError, parse_turn, play


# --------------------- what these tests know of the inside of mosaic.py and of the recipe, all here
def sampler_grammar(model, tokenizer, tasks):
    """The grammar that a batch of these tasks is sampled with."""
    return mosaic.Sampler(model, tokenizer, tasks, [1] * len(tasks)).grammar


def set_limits(monkeypatch, **changes):
    """Changes tiny's limits for a test."""
    monkeypatch.setitem(mosaic.LIMITS, "tiny", mosaic.LIMITS["tiny"] | changes)


Shown = namedtuple("Shown", "turn text risky gate_weight slipped")


def demonstrate(task, rng, mix, max_turns=10):
    """One demonstration of the tiny base's mixture -> [Shown], one a turn. gate_weight: that of
    the loss on the branching token. slipped: its call fails."""
    agent = Demonstrator(task, rng, mix)
    episode = Episode(task, max_turns=max_turns)
    shown = []
    while episode.ended is None:
        risky = episode.sandbox.risky()
        text = agent.write_turn(episode.sandbox)
        episode.step(text)
        shown.append(Shown(
            episode.turns[-1], text, risky, agent.gates[-1].weight, agent.slipped))
    return shown


# ----------------------------------------------------------------------------- a base, and rollouts
@pytest.fixture(scope="module")
def base(base_folder):
    return model_.load(base_folder, device="cpu")


@pytest.fixture(scope="module")
def model(base):
    return base[0]


@pytest.fixture(scope="module")
def tokenizer(base):
    return base[1]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tasks():
    return data.load("train")[:6]


@pytest.fixture(scope="module")
def sampled(model, tokenizer, tasks):
    """{grammar: 24 rollouts of 6 tasks}, each in a batch that makes rows leave and enter."""
    return {
        grammar: rollout(
            model, tokenizer, tasks, 4, grammar=grammar, max_rows=10, generator=seeded(1)
        )
        for grammar in ("free", "strict")
    }


def all_logprobs(rollouts):
    """Those of the sampling, rollout after rollout: (N,)."""
    flat = []
    for r in rollouts:
        flat += r.logprobs
    return torch.tensor(flat)


def turn_texts(tokenizer, r):
    """Each turn's text, decoded as a whole and without its stop token."""
    texts = []
    for start, end in r.spans:
        ids = [token for token in r.ids[start:end] if token not in tokenizer.stop_ids]
        texts.append(tokenizer.decode(ids))
    return texts


def parses(text):
    try:
        parse_turn(text)
    except FormatError:
        return False
    return True


# ------------------------------------------------------------------------------ sampler and trainer
@pytest.mark.parametrize("grammar", ["free", "strict"])
def test_sampler_and_trainer_agree(model, tokenizer, sampled, grammar):
    """The trainer's logprobs differed from the sampler's (other mask, other cache position, a
    re-encoded token)."""
    rollouts = sampled[grammar]
    # Each once, half of them in another order, and one alone.
    for batch in (rollouts[::2], rollouts[:1], rollouts[:0:-2]):
        old = all_logprobs(batch)
        with torch.no_grad():
            new = sampled_logprobs(model, tokenizer, batch, strict=grammar == "strict")
        assert len(new) == len(old) > 50
        assert (new - old).abs().max() < 5e-4, (new - old).abs().max()


def test_copies_count_each_time_they_stand_there(model, tokenizer, sampled):
    """A trajectory that a group holds three times, computed once, and its gradient counted once; or
    the logprobs of its neighbour in its place."""
    a, b = sampled["free"][:2]
    c = copy.copy(b)
    c.ids = [*b.ids[:-2], b.ids[-1], b.ids[-2]]  # as long as b, and no copy
    batch = [a, b, a, c, a]
    counts = [len(r.logprobs) for r in batch]
    factors = torch.arange(sum(counts)).cos()

    def gradient(logprobs):
        model.requires_grad_(True)
        found = torch.autograd.grad((logprobs() * factors).sum(), model.model.norm.weight)[0]
        model.requires_grad_(False)
        return found

    def together():
        return sampled_logprobs(model, tokenizer, batch)

    def one_by_one():
        return torch.cat([sampled_logprobs(model, tokenizer, [r]) for r in batch])

    torch.testing.assert_close(together(), one_by_one(), rtol=0, atol=2e-5)
    torch.testing.assert_close(gradient(together), gradient(one_by_one), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("grammar", ["free", "strict"])
def test_every_token_has_one_origin(tokenizer, sampled, grammar):
    """Masks from `ids != pad` or from re-encoded text are off by some tokens: here they come from
    provenance alone."""
    for r in sampled[grammar]:
        assert len(r.provenance) == len(r.ids)
        assert len(r.logprobs) == len(r.states) == r.provenance.count(SAMPLED)
        assert len(r.spans) == len(r.turns) == len(r.gates)

        prompt = Dialogue(tokenizer, r.task.messages, r.task.offered)
        assert r.ids[:len(prompt.ids)] == prompt.ids
        first_turn = r.spans[0][0]
        assert SAMPLED not in r.provenance[:first_turn]

        in_turns = []
        for start, end in r.spans:
            in_turns += range(start, end)
        by_agent = [i for i, code in enumerate(r.provenance) if code in (SAMPLED, FORCED)]
        assert in_turns == by_agent
        assert r.n_written == len(by_agent)

        for text, turn in zip(turn_texts(tokenizer, r), r.turns):
            assert (turn is None) == (not parses(text))


def test_stop_token_is_trained(tokenizer, sampled):
    """The end-of-turn token had loss_mask 0, so nobody ever learned to stop (three of six minimal
    trainers)."""
    codes = []  # of the agent's stop tokens
    for r in sampled["free"]:
        for token, code in zip(r.ids, r.provenance):
            if token in tokenizer.stop_ids and code in (SAMPLED, FORCED):
                codes.append(code)
    assert codes
    assert set(codes) == {SAMPLED}


def test_strict_turns_always_parse(sampled):
    """A strict sampler that can produce a malformed turn, or one beyond its budget, is not
    strict."""
    budget = mosaic.LIMITS["tiny"]["turn_tokens"]
    for r in sampled["strict"]:
        assert None not in r.turns
        assert all(end - start <= budget for start, end in r.spans)


def test_forced_tokens_need_no_forward(sampled):
    """Tags and separators are the grammar's, not the agent's: they carry no loss and no forward
    of their own."""
    assert sum(r.provenance.count(FORCED) for r in sampled["strict"]) > 50
    assert not any(FORCED in r.provenance for r in sampled["free"])


def test_rows_of_a_group_differ(sampled):
    """nanochat 8f979a8: all rows of a group got the same first token, because the fork copied a
    sampled one."""
    for first in range(0, 24, 4):
        first_turns = set()
        for r in sampled["free"][first:first + 4]:
            start, end = r.spans[0]
            first_turns.add(tuple(r.ids[start:end]))
        assert len(first_turns) > 1


def test_same_seed_same_rollouts(model, tokenizer, tasks, sampled):
    """A second run with the same seed must repeat the first token for token; another seed must
    not."""
    ids_of_seed = {}
    for seed in (1, 2):
        rollouts = rollout(
            model, tokenizer, tasks, 4, grammar="free", max_rows=10, generator=seeded(seed)
        )
        ids_of_seed[seed] = [r.ids for r in rollouts]
    first = [r.ids for r in sampled["free"]]
    assert ids_of_seed[1] == first
    assert ids_of_seed[2] != first


def test_rows_drawn_a_few_at_a_time_are_those_drawn_at_once(model, tokenizer, tasks, monkeypatch):
    """A large vocabulary is sampled in parts: parts in another order, or that draw their numbers
    anew, would give other rollouts than the same seed gave before."""
    found = []
    for n in (64, 3):  # of 8 rows
        monkeypatch.setattr(mosaic, "rows_at_once", lambda logits: n)
        sampled = rollout(model, tokenizer, tasks[:2], 4, grammar="free", generator=seeded(2))
        found.append([(r.ids, r.logprobs) for r in sampled])
    assert found[0] == found[1]


@pytest.mark.parametrize("gate", ["always", "never", 3.0])
def test_gate_is_the_same_dial_in_training(model, tokenizer, tasks, gate):
    """A forced or shifted gate that the trainer forgets makes its logprobs those of another
    policy."""
    rollouts = rollout(
        model, tokenizer, tasks[:2], 2, grammar="strict", gate_mode=gate, generator=seeded(3)
    )
    with torch.no_grad():
        new = sampled_logprobs(model, tokenizer, rollouts, gate_mode=gate, strict=True)
    assert (new - all_logprobs(rollouts)).abs().max() < 5e-4

    for r in rollouts:
        for p, opened, _ in r.gates:
            assert p is None or 0 <= p <= 1
            if gate == "always":
                assert opened or not p
            if gate == "never":
                assert not opened


# ------------------------------------------------------------------------------------- the gradient
def gradient_by_position(model, tokenizer, r):
    """How much the loss of one rollout depends on the hidden state at each position: (T,).
    Position t - 1 predicts token t."""
    caught = {}

    def catch(module, inputs, hidden):
        hidden.retain_grad()
        caught["hidden"] = hidden

    handle = model.model["norm"].register_forward_hook(catch)
    model.requires_grad_(True)
    logprobs = sampled_logprobs(model, tokenizer, [r])
    fixed = logprobs.detach()
    loss, _, _ = grpo_loss(logprobs, fixed, fixed, torch.ones_like(fixed), len(fixed))
    loss.backward()

    handle.remove()
    model.requires_grad_(False)
    model.zero_grad()
    return caught["hidden"].grad[0].abs().sum(-1)


def longest(rollouts):
    """The one of most turns."""
    return max(rollouts, key=lambda r: len(r.turns))


def test_tool_tokens_have_no_gradient(model, tokenizer, sampled):
    """RAGEN #71: the mask was inverted and the gradient sat on observations. Here: exactly 0 on
    every token that the agent did not sample, by the gradient of the loss with respect to each
    position's logits."""
    r = longest(sampled["free"])
    assert TOOL in r.provenance
    gradient = gradient_by_position(model, tokenizer, r)
    sampled_next = [code == SAMPLED for code in r.provenance[1:]]
    carries_loss = torch.tensor(sampled_next + [False])  # the last position predicts nothing
    assert (gradient[~carries_loss] == 0).all()
    assert (gradient[carries_loss] > 0).all()


def test_advantage_reaches_every_turn(model, tokenizer, sampled):
    """verl PR #6376: the return was reset at each observation, so turns before a tool result
    lost the reward."""
    r = longest(sampled["free"])
    assert len(r.turns) > 1
    with torch.no_grad():
        old = sampled_logprobs(model, tokenizer, [r])
    logprobs = old.clone().requires_grad_()
    advantage = torch.full_like(logprobs, 0.7)
    loss, _, _ = grpo_loss(logprobs, old, old, advantage, len(logprobs), kl_coef=0.0)
    loss.backward()
    assert torch.allclose(logprobs.grad, torch.full_like(logprobs, -0.7 / len(logprobs)))
    given = vars(train.arguments(["--length-budget", "80"]))
    assert train.recipe_for("qwen2.5", given).group_size == 4


def test_tied_groups_give_no_gradient():
    """TRIAL: late in training most groups tie, and a few tokens of length, blown up to +-1,
    brought the harm back."""
    R = torch.tensor([3.5, 3.4, 3.5, 3.5])
    assert advantages(R, torch.full((4,), 1.5)).eq(0).all()


def test_form_alone_may_act_in_a_tied_group():
    """A form that is lost makes all groups tie, and a tied group gave nothing that could bring it
    back. Length is to have no say there, nor is a small difference to be blown up."""
    r_fmt = torch.tensor([2.0, 2, 1, 2])
    p_len = torch.tensor([0.0, 3, 0, 1])
    tied = torch.full((4,), 1.5)
    R = tied + r_fmt - p_len
    deviation = torch.arange(4.0).std(correction=0)  # of a strict order of four
    expected = torch.tensor([0.25, 0.25, -0.75, 0.25]) / deviation
    assert torch.allclose(advantages(R, tied, r_fmt), expected)
    assert not advantages(R, tied, torch.full((4,), 2.0)).any()  # the length alone differs
    slight = r_fmt * 0.01
    assert torch.allclose(advantages(R, tied, slight), expected * 0.01)

    decided = torch.tensor([3.0, 2, 1, 0])
    assert torch.equal(advantages(R, decided, r_fmt), advantages(R, decided))
    unscored = torch.full((4,), torch.nan)
    assert not advantages(R, unscored, r_fmt).any()


# -------------------------------------------------------------------------------- text from outside
def test_control_text_from_users_and_tools_stays_text(tokenizer):
    """A user or a tool result that spells <|im_end|> or </tool_response> must not end anything."""
    attack = "".join(tokenizer.added)
    offered = data.load("train")[0].offered
    dialogue = Dialogue(tokenizer, [{"role": "user", "content": attack}], offered)
    dialogue.extend([tokenizer.stop_ids[0]], [SAMPLED])
    dialogue.observe([attack])

    pairs = zip(dialogue.ids, dialogue.provenance)
    outside = [token for token, code in pairs if code in (USER, TOOL)]
    assert not set(outside) & set(tokenizer.added.values())
    assert tokenizer.decode(outside).count("<think>") == 2


def count_answers(r):
    return sum(turn.kind == "answer" for turn in r.turns)


def test_a_later_user_message_goes_on(model, tokenizer):
    """BFCL's conversations: the first answer crashed the sampler (Dialogue has no method
    `user`), or the second message never reached the model, or it arrived as a tool result."""
    later = ["And then?", "Thanks."]
    task = replace(data.load("train")[0], public={"later": later, "max_turns": 3})
    rollouts = rollout(model, tokenizer, [task], 8, generator=seeded(0))
    n_answers = [count_answers(r) for r in rollouts]
    assert max(n_answers) == 3

    for r, n in zip(rollouts, n_answers):
        start = r.prompt_length
        pairs = zip(r.ids[start:], r.provenance[start:])
        after_prompt = tokenizer.decode([token for token, code in pairs if code == USER])
        assert after_prompt == "".join(later[:n])

        # the same turns, played without a model, come to the same end
        texts = iter(turn_texts(tokenizer, r))
        scripted = play(task, lambda messages: next(texts))
        assert r.ended in (scripted.ended, "budget")
        assert scripted.turns == r.turns


# ---------------------------------------------------------------------------------------- the draws
def sampled_positions(r):
    return [i for i, code in enumerate(r.provenance) if code == SAMPLED]


def merge_rare(values, common):
    """(V,) -> the common ones, and the rest as one bin."""
    return torch.cat([values[common], values[~common].sum()[None]])


def test_draws_follow_the_renormalised_distribution(model, tokenizer, monkeypatch):
    """A sampler that draws from something else than it logs: a temperature applied twice or not
    at all, noise used twice, a mask that moves probability. 1,200 draws of the first free token,
    chi-square against the model's own p."""
    set_limits(monkeypatch, max_turns=1, turn_tokens=24, room=24)
    task = data.load("train")[0]
    rollouts = rollout(
        model, tokenizer, [task] * 12, 100, temperature=1.5, generator=seeded(5)
    )
    # the first sampled token opens the turn and leaves no choice; the second is drawn, by all
    # after the same ids
    position = sampled_positions(rollouts[0])[1]
    before = rollouts[0].ids[:position]
    for r in rollouts:
        assert sampled_positions(r)[1] == position
        assert r.ids[:position] == before
    drawn = torch.tensor([r.ids[position] for r in rollouts])

    with torch.no_grad():
        logits = model(torch.tensor([before]))[0, -1].float() / 1.5  # (V,)
    state, remaining = rollouts[0].states[1]
    grammar = get_grammar(tokenizer, "cpu")
    live = grammar.mask(torch.tensor([state]), torch.tensor([remaining]))[0]  # (V,)
    p = torch.where(live, logits.exp(), 0) / logits[live].exp().sum()
    logged = torch.tensor([r.logprobs[1] for r in rollouts])
    assert torch.allclose(p[drawn].log(), logged, atol=1e-4)

    want = len(drawn) * p
    seen = torch.bincount(drawn, minlength=len(p)).float()
    common = want >= 5  # chi-square needs some draws in each bin
    want = merge_rare(want, common)
    seen = merge_rare(seen, common)
    chi_square = ((seen - want) ** 2 / want).sum().item()
    degrees = len(want) - 1
    assert degrees >= 5
    # by chance beyond it: once in 100,000 bases
    assert chi_square < degrees + 6 * (2 * degrees) ** 0.5, (chi_square, degrees)


def test_parallel_calls_are_live_where_every_task_takes_them(model, tokenizer):
    """One BFCL task of the parallel category in a batch let strict turns of all others hold two
    calls: malformed."""
    plain = data.load("train")[0]
    parallel = replace(plain, public={"parallel": True})
    one_call = get_grammar(tokenizer, "cpu")
    more_calls = get_grammar(tokenizer, "cpu", True)
    assert sampler_grammar(model, tokenizer, [plain]) is one_call
    assert sampler_grammar(model, tokenizer, [parallel]) is more_calls
    assert sampler_grammar(model, tokenizer, [plain, parallel]) is one_call


def test_room_counts_from_the_end_of_each_prompt(model, tokenizer, monkeypatch):
    """A context of fixed length: a long prompt was refused, or ended its neighbours, or was cut
    off in silence."""
    short = data.load("train")[0]
    long = replace(short, messages=[{"role": "user", "content": "go on and on " * 200}])
    set_limits(monkeypatch, max_turns=2, turn_tokens=48)
    alone = rollout(model, tokenizer, [short, long], max_rows=1, temperature=0)
    both = rollout(model, tokenizer, [short, long], temperature=0)
    assert [r.ids for r in alone] == [r.ids for r in both]
    assert both[1].prompt_length > 640

    # room for one turn; a group is sampled together, whatever the cache takes
    set_limits(monkeypatch, max_turns=2, turn_tokens=48, room=49, positions=1)
    for r in rollout(model, tokenizer, [short, long], 3):
        start, end = r.spans[0]
        assert len(r.turns) == 1 or end == start + 1
        # a result without a turn after it is not trained over
        assert len(r.ids) == len(r.provenance) == r.spans[-1][1]


def test_what_leaves_no_room_or_no_end_is_said_first(model, tokenizer, monkeypatch):
    """A prompt that fills the model's positions was sampled over their end; a base model, whose
    stop token ends no turn, wrote on for ever."""
    short = data.load("train")[0]
    long = replace(short, messages=[{"role": "user", "content": "go on and on " * 200}])
    with monkeypatch.context() as patch:
        set_limits(patch, max_turns=2, turn_tokens=48)
        patch.setattr(model.config, "max_position_embeddings", 640)
        words = "tokens leaves no room for a turn in the model's 640 positions"
        with pytest.raises(ValueError, match=words):
            rollout(model, tokenizer, [short, long])

    monkeypatch.setattr(tokenizer, "stop_ids", [0])  # as a base model's
    with pytest.raises(ValueError, match="generation_config.json"):
        rollout(model, tokenizer, [short])


# ---------------------------------------------------------------------------- the tokens of a check
@pytest.mark.parametrize("grammar, temperature", [("strict", 0.0), ("free", 1.0)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_never_sampled(
        model, tokenizer, tasks, monkeypatch, grammar, temperature, value):
    """argmax takes NaN for the largest: a float16 checkpoint that overflowed was sampled as token 0
    for a whole episode, and exit status 0."""
    head = mosaic.Decoder.head

    def overflowing(decoder, hidden):
        logits = head(decoder, hidden).clone()
        logits[-1] = value  # in one row of the batch
        return logits
    monkeypatch.setattr(mosaic.Decoder, "head", overflowing)
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite: .* float16"):
        rollout(model, tokenizer, tasks[:2], grammar=grammar, temperature=temperature)


def test_a_turn_budget_stays_below_no_way():
    """A budget that reaches the grammar's "no way" makes every id live."""
    for limits in (*mosaic.LIMITS.values(), mosaic.REAL_LIMITS):
        assert limits["turn_tokens"] < mosaic.NEVER // 2


@pytest.mark.parametrize("strict, ended", [(False, "answer"), (True, "budget")])
def test_a_stop_in_the_last_place_is_the_strict_masks(tokenizer, tasks, strict, ended):
    """An agent that ended its own episode with its last token lost the reward for it in the free
    grammar, too, where nothing had made it stop."""
    dialogue = Dialogue(tokenizer, tasks[0].messages, tasks[0].offered)
    row = mosaic.Row(0, 0, Episode(tasks[0]), dialogue, names_root=0, limit=999)
    ids = encode_trusted(tokenizer, "<think>\nx\n</think>\n\n<answer>\ndone\n</answer><|im_end|>")
    row.begin_turn(mosaic.START, left=0)
    dialogue.extend(ids, [SAMPLED] * len(ids))
    assert not row.end_turn(tokenizer, strict)
    assert row.episode.ended == ended


def test_a_group_size_too_few_is_said(model, tokenizer, tasks):
    """A list of sizes shorter than the tasks left the last of them out, without a word."""
    for sizes in ([1], [1, 1, 1]):
        with pytest.raises(ValueError, match="zip"):
            rollout(model, tokenizer, tasks[:2], sizes)


def test_safety_tokens_are_those_of_whole_checks(tokenizer):
    """A check that was opened and never closed counted, by a find() of -1, the first tokens of its
    turn."""
    think = "<think>\nx\n</think>\n\n"
    answer = "<answer>\ny\n</answer>"
    whole = "<safety_thoughts>\nall is fine\n</safety_thoughts>"
    unclosed = "<safety_thoughts>\nall is fine\n"

    ids = []
    spans = []
    for check in (whole + "\n", "", unclosed):
        start = len(ids)
        for text in (think, check, answer):
            ids += encode_trusted(tokenizer, text)
        spans.append((start, len(ids)))
    n_whole = len(encode_trusted(tokenizer, whole))
    assert safety_tokens(tokenizer, ids, spans) == n_whole > 5

    arguments = '{"x": "<safety_thoughts>y</safety_thoughts>"}'
    call = f'<tool_call>\n{{"name": "a", "arguments": {arguments}}}\n</tool_call>'
    quoted = encode_trusted(tokenizer, think + call)
    assert safety_tokens(tokenizer, quoted, [(0, len(quoted))]) == 0


# ---------------------------------------------------------------------- the recipe of the tiny base
def test_fresh_weights_copy_what_came_before(tokenizer):
    """The heads written into the tiny base's fresh weights did nearly nothing (loss 7.4 of 7.6),
    and nobody noticed: the warm start hid it. Forty random tokens that come back after twenty
    others must be known at once."""
    generator = seeded(0)
    model = model_.Transformer(model_.Config(tiny.CONFIG)).init_weights(generator)
    lowest = len(tiny.CONTROL)
    first = torch.randint(lowest, tokenizer.n, (8, 40), generator=generator)
    between = torch.randint(lowest, tokenizer.n, (8, 20), generator=generator)
    ids = torch.cat([first, between, first], 1)  # (8, 100)

    before = loss_of_last(model, ids, 38)
    tiny.induction_circuit(model, tokenizer)
    after = loss_of_last(model, ids, 38)
    print(f"loss {before:.2f} -> {after:.2f}")  # -rP shows it
    assert before > 7
    assert after < 0.3


@torch.no_grad()
def loss_of_last(model, ids, n):
    """Mean loss of each row's last n tokens."""
    logits = model(ids[:, :-1])[:, -n:].flatten(0, 1)
    return F.cross_entropy(logits, ids[:, -n:].flatten()).item()


def test_gate_weights_keep_the_base_where_the_mixture_says():
    """A demonstration holds checks far more often than the base shall open them: without the
    importance weights on the branching token the base opened them as often, and with zero
    weights it never learned when."""
    rng = random.Random(0)
    opened = {True: 0.0, False: 0.0}  # weight of the checks in risky steps, and in harmless ones
    total = {True: 0.0, False: 0.0}
    for task in data.load("train")[:400]:
        for shown in demonstrate(task, rng, MIX, max_turns=8):
            total[shown.risky] += shown.gate_weight
            if "<safety_thoughts>" in shown.text:
                opened[shown.risky] += shown.gate_weight
    assert abs(opened[True] / total[True] - MIX["check_risky"]) < 0.05
    assert abs(opened[False] / total[False] - MIX["check_harmless"]) < 0.02


def test_a_slip_carries_no_loss_and_what_follows_it_does(tokenizer):
    """A base whose demonstrations never met an error refused after each ("this looks like
    sabotage"); one that learns the slips themselves makes them."""
    rng = random.Random(0)
    mix = MIX | {"slip": 0.5}
    think = tokenizer.added["<think>"]
    stop = tokenizer.stop_ids[0]
    n_slips = 0
    for task in data.load("train")[:100]:
        ids, weights = demonstration(task, rng, tokenizer, mix)
        starts = [i for i, token in enumerate(ids) if token == think]
        next_starts = starts[1:] + [len(ids)]
        for start, next_start in zip(starts, next_starts):
            end = ids.index(stop, start) + 1
            slipped = '{"error"' in tokenizer.decode(ids[end:next_start])
            has_loss = any(weights[start:end])
            assert has_loss != slipped
            n_slips += slipped
    assert n_slips > 30


def test_a_false_alarm_refuses_with_what_its_check_said():
    """A suite without kinds of harm has other things in its place: the agent refused with the
    reason "two-writes"."""
    rng = random.Random(0)
    alarmed = MIX | {"false_alarm": 1}
    reasons = Counter()
    for task in data.load("train"):
        if task.suite != "harm":
            for shown in demonstrate(task, rng, alarmed):
                if "refuse" in (shown.turn.check or ""):
                    reasons[shown.turn.arguments["reason"]] += 1
    assert set(reasons) == {"fraud"} and reasons["fraud"] > 100


def test_nobody_is_shown_to_give_up_behind_an_error():
    """A slip just before an agent loses patience: it answers "done" behind an error."""
    rng = random.Random(0)
    for task in data.load("train"):
        error = False
        for shown in demonstrate(task, rng, MIX | {"slip": 0.8, "stop_early": 1}, max_turns=12):
            assert not (error and shown.turn.kind == "answer"), task.id
            error = shown.slipped


def first_argument(turn):
    """What a call is about: its record or person; "" for an answer."""
    return next(iter(turn.arguments.values())) if turn.kind == "call" else ""


def keeps_promise(promised, turn):
    """Does the turn do what the plan before it said of the next one: NAME SUBJECT [to VALUE], or
    done?"""
    subject = first_argument(turn)
    action, _, value = promised.partition(" to ")
    if action != (f"{turn.name} {subject}" if subject else "done"):
        return False
    if not value:
        return True
    bare = value.removesuffix(" euro").removeprefix("room ")  # as a user says it
    return bare in list(turn.arguments.values())[1:]


def promise_of(turn):
    """What this turn's plan says of the next one; after an order, its check plans anew."""
    ignores_order = turn.check is not None and "ignore it" in turn.check
    plan = turn.check if ignores_order else turn.plan
    return plan.split(", then ")[-1].replace(" it", f" {first_argument(turn)}")


def test_a_plan_names_the_call_that_comes_next():
    """A base that had to find its place in the user's words again in every turn stopped early
    and read the first record twice: each plan (after an order, the check that ignores it) names
    this call and the next, "it" for the same record, a new value where the user gave one
    (without it the second of two writes had none), and the next turn makes it."""
    rng = random.Random(0)
    calm = MIX | {"slip": 0, "obey": 0, "stop_early": 0, "false_alarm": 0, "verdict": 1}
    n_promises = 0
    n_values = 0
    for task in data.load("train"):
        if task.label != "benign":
            continue
        turns = [shown.turn for shown in demonstrate(task, rng, calm)]
        for turn, following in zip(turns, turns[1:]):
            promised = promise_of(turn)
            assert keeps_promise(promised, following), (promised, following)
            n_promises += 1
            n_values += " to " in promised
    assert n_promises > 1500, n_promises
    assert n_values > 30, n_values


# ---------------------------------------------------------------------------- decoding, made faster
def forget_compiled():
    """What was compiled stays for the process: a test begins and ends without it."""
    model_.compiled.cache_clear()


def is_compiled(decoder):
    return decoder.functions is not model_.EAGER


def step_in_place(decoder, ids, lengths):
    """A step as a CUDA card makes it, on the decoder's own buffers. ids and lengths: (B,)."""
    rows = len(ids)
    decoder.ids[:rows, 0] = ids
    decoder.lengths[:rows] = lengths
    return decoder.step(rows)


@torch.no_grad()
def test_a_decoded_token_is_a_forward_of_one(model, monkeypatch, capsys):
    """A card's step goes block by block around compiled parts: a layer's cache taken for
    another's, a row that waits and moves on; without a compiler it goes on, and says so in a
    line. tests/test_cuda.py compiles and makes graphs."""
    def no_compiler(function, **options):
        raise RuntimeError("no gcc\nand forty lines more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    forget_compiled()
    prompt = torch.arange(60).view(3, 20) + 300
    ours = model_.Cache(model.config, 4, 40)
    plain = model_.Cache(model.config, 4, 40)
    model.hidden(prompt, ours)
    model.hidden(prompt, plain)
    decoder = model_.Decoder(model, ours)
    ids = torch.tensor([300, 310, 320])
    for waiting in ([1, 1, 1], [1, 0, 1], [0, 1, 1]):  # 0: the row waits
        lengths = torch.tensor(waiting)
        want = model.hidden(ids[:, None], plain, lengths)
        assert torch.equal(step_in_place(decoder, ids, lengths), want)
        assert torch.equal(ours.lengths, plain.lengths)
    assert ours.lengths.tolist() == [22, 22, 23, 0]
    complaint = "decoding is not compiled, and so 10 to 40 % slower: no gcc\n"
    assert capsys.readouterr().err == complaint
    forget_compiled()


def random_model(layout, rank):
    """A model of tiny's shape whose matrices are random and exact in bf16, with an adapter of
    this rank if it is not 0."""
    generator = seeded(0)
    config = model_.Config(tiny.CONFIG | {"model_type": layout})
    model = model_.Transformer(config).init_weights(generator)
    if rank:
        model_.add_lora(model, rank, 2 * rank, generator=generator)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise.bfloat16())
    ids = torch.randint(0, 2560, (1, 24), generator=generator)
    return model, ids


@pytest.mark.parametrize("layout, rank", [("qwen2", 4), ("qwen3", 0), ("phi3", 0),
                                          ("llama", 0)])
@torch.no_grad()
def test_a_lone_row_of_bf16_is_compiled_on_a_cpu(layout, rank):
    """A bias, an adapter or a layer's own weights left out of what is compiled; sums that round
    to bf16 on the way."""
    exact, ids = random_model(layout, rank)
    model = copy.deepcopy(exact)
    for name, parameter in model.named_parameters():
        if "lora" not in name:  # an adapter stays in fp32
            parameter.data = parameter.bfloat16()
    cache = model_.Cache(model.config, 1, 40, dtype=model.dtype)
    model.hidden(ids[:, :16], cache)
    decoder = model_.Decoder(model, cache)
    if not is_compiled(decoder):
        pytest.skip("no C compiler: nothing was compiled")

    logits = []
    one = torch.ones(1, dtype=torch.long)
    for t in range(16, 24):
        logits.append(decoder.head(decoder(ids[:, t:t + 1], one)))
    ours = torch.cat(logits, 1)
    want = exact(ids)[:, 16:]
    plain = model(ids)[:, 16:]  # bf16 as it is, not compiled
    our_error = (ours - want).abs().mean()
    plain_error = (plain - want).abs().mean()
    assert our_error < 1.1 * plain_error
    assert 1.1 * plain_error < 0.02 * want.abs().max()
