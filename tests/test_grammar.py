"""The automaton over a tokenizer's bytes: it can only write turns that parse, and it can write
all of them."""
import functools
import json
import math
import random
import re
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer as BPE, decoders, models, pre_tokenizers, trainers

import model
import mosaic
from mosaic import (
    CALL,
    DEAD,
    FAMILIES,
    FINAL,
    JSON,
    constrain,
    encode_trusted,
    gate_probability,
    get_grammar,
)
from test_episode import CHECKED_CALL, ODDLY_NAMED_CALL, TURNS
from tools import TAGS, parse_turn

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
REAL = {"qwen2.5": "qwen2.5-7b", "qwen3": "qwen3-4b-thinking", "phi-4": "phi-4"}
NAMES = ["get_weather", "get", "send_email", "refusal_tool", 'odd"\\name é']  # of the offered tools
AMPLE = 99  # a budget that cuts nothing


# --------------------------------------- what these tests know of the inside of mosaic.py, all here
def first_tag_state():
    """States below it expect bytes of text or JSON; from it on they stand inside of a run of
    tags."""
    states, _ = mosaic.byte_automaton()
    return len(states)


def count_name_states(grammar):
    """Nodes in the pool of tries over names; their states follow the grammar's S."""
    return len(grammar._nodes)


def prompt_opens_turns(tok):
    """Does the family's prompt hold the first line of the agent's turn?"""
    return FAMILIES[tok.family]["prompt"].endswith("<think>\n")


def forced_token(grammar, state):
    """The one live token of a state; -1 where there are more."""
    token = grammar.forced(state)
    return -1 if token is None else token


# --------------------------------------------------------------------------------------- tokenizers
CONTROL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<tool_response>", "</tool_response>",
    "<think>", "</think>",
    "<safety_thoughts>", "</safety_thoughts>",
    "<tool_call>", "</tool_call>",
    "<answer>", "</answer>",
]
CONFIG = {
    "model_type": "qwen2",
    "mosaic_family": "tiny",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 400,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
TRAINING_TEXT = [
    'the plan is to look up a record, then send it: '
    '{"name": "send_email", "arguments": {"to": "ann"}}\n\n',
    "weather in oslo: sunny, 21 degrees\n",
    "safety thoughts answer tool call\n",
    "naïve — 你好 true}}\n",
]


@functools.lru_cache(maxsize=None)
def tiny():
    """A tokenizer like the embedded one, with padding rows: under 400 tokens, 13 of them added,
    in 400 rows."""
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        min_frequency=0,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TRAINING_TEXT * 9, trainer)
    bpe.add_special_tokens(CONTROL)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save(str(Path(folder) / "tokenizer.json"))
        config = model.Config({**CONFIG, "eos_token_id": bpe.token_to_id("<|im_end|>")})
        return model.Tokenizer(Path(folder), config)


@functools.lru_cache(maxsize=None)
def real(family):
    """The family's own tokenizer, or None where its files are not at hand."""
    path = MODELS / REAL[family]
    if not path.is_dir():
        print(f"left out: {family}, no {path}")
        return None
    return model.Tokenizer(path, model.Config(model.read_json(path / "config.json")))


def tokenizers():
    """tiny's, and those of the real families that are at hand."""
    found = [tiny()]
    for family in REAL:
        if real(family):
            found.append(real(family))
    return found


@functools.lru_cache(maxsize=None)
def single_bytes(tok):
    """{byte: the id of the token that is this byte alone}."""
    found = {}
    for token, word in enumerate(tok.token_bytes):
        if len(word) == 1:
            found[word[0]] = token
    return found


# ------------------------------------------------------------------------- walks through the tables
def walk(grammar, ids, state=None):
    """The states along ids, the first included."""
    root = grammar.names(NAMES)
    states = [grammar.start if state is None else state]
    for token in ids:
        states.append(grammar.step(states[-1], root, token))
    return states


def state_after_bytes(grammar, text, state):
    """Where a text leads that is written byte by byte: the spelling that no tokenizer would
    give."""
    letters = single_bytes(grammar.tokenizer)
    return walk(grammar, [letters[byte] for byte in text], state)[-1]


def step_rows(grammar, states, root, tokens):
    """A step of many rows: states (B,), tokens (B,) -> (B,)."""
    pairs = zip(states.tolist(), tokens.tolist())
    return torch.tensor([grammar.step(state, root, token) for state, token in pairs])


def sample_turns(grammar, budgets, logits, generator):
    """Strict turns (lists of ids), one a budget, drawn from `logits(states)` under the mask."""
    root = grammar.names(NAMES)
    states = torch.full((len(budgets),), grammar.start)
    remaining = torch.tensor(budgets)
    turns = [[] for _ in budgets]
    while True:
        rows = (states != FINAL).nonzero()[:, 0]  # those that still write
        if not len(rows):
            return turns
        assert (remaining[rows] > 0).all()
        masked = constrain(grammar, logits(states[rows]), states[rows], remaining[rows])
        tokens = torch.multinomial(masked.softmax(-1), 1, generator=generator)[:, 0]
        states[rows] = step_rows(grammar, states[rows], root, tokens)
        remaining[rows] -= 1
        for row, token in zip(rows.tolist(), tokens.tolist()):
            turns[row].append(token)


def exploring(grammar):
    """Logits that give every next state the same chance, and runs of tags a greater one: random
    walks that see checks, calls and deep JSON."""
    tags_begin = first_tag_state()

    @functools.lru_cache(maxsize=None)
    def logits_of(state):
        if state >= grammar.S:  # inside a name
            return torch.zeros(grammar.V)
        after = grammar.next_state[state].long()  # (V,)
        # how many tokens lead to each state; DEAD, which is -1, comes first
        ways = torch.bincount(after + 1, minlength=grammar.S + 1)
        bonus = torch.where(after >= tags_begin, 5.0, 0.0)
        return bonus - ways.float().log()[after + 1]

    return lambda states: torch.stack([logits_of(state) for state in states.tolist()])


def babbling(grammar):
    """Logits as of a base model: text, and seldom a tag."""
    return lambda states: 2 * torch.randn(len(states), grammar.V)


# ------------------------------------------------------------------------------------ sampled turns
def check_sampled_turns(tok, budgets, logits):
    """Samples a turn for each budget -> the set of (kind, with a check, with arguments) seen."""
    grammar = get_grammar(tok, "cpu")
    stop = tok.added["<|im_end|>"]
    seen = set()
    turns = sample_turns(grammar, budgets, logits, torch.Generator().manual_seed(0))
    for ids, budget in zip(turns, budgets):
        assert len(ids) <= budget
        assert ids[-1] == stop and stop not in ids[:-1]
        assert max(ids) < tok.n, "a padding row"
        text = b"".join(tok.token_bytes[token] for token in ids[:-1])
        turn = parse_turn(text, prompt_opens_turns(tok))
        assert turn.kind == "answer" or turn.name in NAMES
        seen.add((turn.kind, turn.check is not None, bool(turn.arguments)))
    return seen


def test_1000_random_turns_parse():
    """Catches: a path through the tables that is no turn, a budget that cuts a turn, a name that
    was not offered, stop tokens in the middle, branches that are never reached."""
    for tok in tokenizers():
        grammar = get_grammar(tok, "cpu")
        shortest = grammar.to_end[grammar.start].item()
        if tok.family != "tiny":
            budgets = [shortest + 9 * i for i in range(4)]
            check_sampled_turns(tok, budgets, exploring(grammar))
            continue

        some = [shortest, shortest + 3, 40, 64, 100]
        budgets = [random.Random(i).choice(some) for i in range(1000)]
        seen = check_sampled_turns(tok, budgets, exploring(grammar))
        seen |= check_sampled_turns(tok, budgets[:200], babbling(grammar))
        # an answer, a call with arguments and one without, each with a check and without
        assert len(seen) == 6, seen


# -------------------------------------------------------------------------------------- every state
def is_live(grammar, state, remaining):
    """May any token come in this state with so many tokens left?"""
    return bool(grammar.mask(torch.tensor([state]), torch.tensor([remaining])).any())


def fewest_tokens(grammar, state):
    """Fewest tokens to the end, by bisection over what the mask lets through."""
    low = 0    # with so many nothing is live,
    high = 64  # and with so many something is
    while high - low > 1:
        middle = (low + high) // 2
        if is_live(grammar, state, middle):
            high = middle
        else:
            low = middle
    return high


def test_padding_and_control_rows_are_never_live():
    """Catches: padding or control rows that are live, in strict or in free mode."""
    for tok in tokenizers():
        grammar = get_grammar(tok, "cpu")
        root = grammar.names(NAMES)
        padding = torch.tensor([not word for word in tok.token_bytes])
        assert not (grammar.next_state[:, padding] >= 0).any()
        assert not grammar.free_mask[padding].any()

        # a turn is written with four of the five tags, and ends with a stop token
        allowed = set(tok.stop_ids)
        for control, token in tok.added.items():
            if control.strip("</>") in ("think", "safety_thoughts", "tool_call", "answer"):
                allowed.add(token)
        control = [token for token in tok.added.values() if token not in allowed]
        assert not (grammar.next_state[:, control] >= 0).any()
        assert not grammar.free_mask[control].any()

        states = states_of(tok, grammar)
        last = torch.full_like(states, tok.vocab_size - 1)
        if padding[-1]:
            assert (step_rows(grammar, states, root, last) == DEAD).all()


def states_of(tok, grammar):
    """States in which a token comes, those inside names included: tiny's all, of others every
    80th."""
    every = range(grammar.S + count_name_states(grammar))
    states = torch.tensor([state for state in every if state not in (FINAL, CALL)])
    return states if tok.family == "tiny" else states[::80]


def test_every_reachable_state_has_a_live_token_and_dead_rows_none():
    """Catches: a state one can enter and not leave; dead rows that are live; a budget off by one; a
    forced token where there was a choice."""
    for tok in tokenizers():
        grammar = get_grammar(tok, "cpu")
        grammar.names(NAMES)  # a mask needs one trie
        n_live = (grammar.next_state >= 0).sum(1)
        assert (n_live > 0).sum() == grammar.S - 2
        assert n_live[FINAL] == n_live[CALL] == n_live[DEAD] == 0

        states = states_of(tok, grammar)
        need = torch.tensor([fewest_tokens(grammar, state) for state in states.tolist()])
        outside_names = states < grammar.S
        assert torch.equal(need[outside_names], grammar.to_end[states[outside_names]])
        assert grammar.mask(states, need).any(1).all()
        assert not grammar.mask(states, need - 1).any()

        live = grammar.mask(states, torch.full_like(states, 10 ** 4))
        forced = torch.tensor([forced_token(grammar, state) for state in states.tolist()])
        is_forced = forced >= 0
        assert torch.equal(is_forced, live.sum(1) == 1)
        assert live[is_forced, forced[is_forced]].all()


def test_no_budget_makes_a_dead_end_live():
    """"No way to the end" was the cost 10,000: with turn_tokens of 10,001 and more every id was
    live, padding rows included, and the grammar was off."""
    tok = tiny()
    grammar = get_grammar(tok, "cpu")
    grammar.names(NAMES)
    states = states_of(tok, grammar)
    ample = grammar.mask(states, torch.full_like(states, 1000))
    for budget in (10_001, 2 ** 31, mosaic.NEVER // 2 - 1):
        assert torch.equal(grammar.mask(states, torch.full_like(states, budget)), ample)
    assert not ample[:, [not word for word in tok.token_bytes]].any()
    ways = grammar.to_end[:-1]
    assert ways.max() < 1000 < grammar.to_end[-1]  # the last is that of DEAD


# ---------------------------------------------------------------------------------- canonical turns
def test_canonical_turns_walk_to_the_end_and_pass_one_gate():
    """Catches: structural runs compiled to other ids than the tokenizer gives for the same bytes
    (the model would be forced off its own tokenisation), and a gate that is missed or met
    twice."""
    for tok in tokenizers():
        grammar = get_grammar(tok, "cpu")
        for text in TURNS:
            if prompt_opens_turns(tok):
                text = text.removeprefix("<think>\n")
            ids = encode_trusted(tok, text + "<|im_end|>")
            if tok.family in REAL:
                own = BPE.from_file(str(MODELS / REAL[tok.family] / "tokenizer.json"))
                assert ids == own.encode(text + "<|im_end|>", add_special_tokens=False).ids
            states = walk(grammar, ids)
            assert states[-1] == FINAL, tok.decode(ids[:states.index(DEAD)])
            assert states.count(grammar.gate_state) == 1
            after_plan = ids[states.index(grammar.gate_state)]
            assert (after_plan == grammar.safety_token) == ("<safety" in text)


TEXT_FIELDS = [  # each as far as its text's first letter
    "<think>\nx",
    "<think>\nx\n</think>\n\n<safety_thoughts>\nx",
    "<think>\nx\n</think>\n\n<answer>\nx",
]
HARMLESS = ["<<b></b>", "a </ b", "<s>", "<the>", "</t>", "\n<\n/<//an>"]
NOT_UTF8 = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xbd\n"]


def test_no_tag_is_live_in_a_text_by_any_spelling():
    """Catches: a tag written byte by byte inside a text, which `parse_turn` would read as the
    end of the field."""
    tok = tiny()
    grammar = get_grammar(tok, "cpu")
    for field in TEXT_FIELDS:
        inside = walk(grammar, encode_trusted(tok, field))[-1]
        for tag in TAGS:
            for mark in (f"<{tag}>", f"</{tag}>", f"\n</{tag}>", f"<</{tag}>"):
                assert state_after_bytes(grammar, mark.encode(), inside) == DEAD, mark
        for text in HARMLESS:
            assert state_after_bytes(grammar, text.encode(), inside) != DEAD, text
        for wrong in NOT_UTF8:
            assert state_after_bytes(grammar, wrong, inside) == DEAD, wrong


# ------------------------------------------------------------------------------- the JSON of a call
JSON_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9.eE+-]+|[a-z]+|[{}\[\]]|: |, ', re.S)
HIGH_SURROGATE = re.compile(r"(?<!\\)(\\\\)*\\u[dD][89abAB]")
LOW_SURROGATE = re.compile(r"(?<!\\)(\\\\)*\\u[dD][c-fC-F]")


def reject_constant(name):
    """Python's json reads NaN and Infinity; RFC 8259 knows neither."""
    raise ValueError(name)


def depth(value):
    """How deep objects and arrays nest: 0 for a plain value."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return 0
    return 1 + max([depth(inner) for inner in value], default=0)


def is_strict_json(text):
    """The oracle: an object by Python's json, single spaces after : and , alone, nesting <= 3, no
    \\ud800-\\udfff."""
    try:
        value = json.loads(text, parse_constant=reject_constant)
    except ValueError:
        return False
    pieces = JSON_PIECE.findall(text)
    if not isinstance(value, dict) or "".join(pieces) != text or depth(value) > 3:
        return False
    return not any(HIGH_SURROGATE.search(piece) or LOW_SURROGATE.search(piece) for piece in pieces)


def random_text(rng):
    letters = 'ab"\\/\n\té你😀{}[]:,<1 \x01'
    return "".join(rng.choice(letters) for _ in range(rng.randrange(5)))


def random_value(rng, level):
    kind = rng.randrange(9 if level < 3 else 6)
    if kind < 6:
        plain = [
            None,
            True,
            False,
            rng.randrange(-99, 99),
            rng.choice([1.5, -2e-7, 1e30, 0.0]),
            random_text(rng),
        ]
        return plain[kind]
    inner = [random_value(rng, level + 1) for _ in range(rng.randrange(3))]
    if kind == 8:
        return inner
    return {random_text(rng): value for value in inner}


def mutated(text, rng):
    """The text with a few letters put in, taken out or put in another's place; often none."""
    pieces = ["", *'{}[]:,"\\ -+.eE0123tfnu\n', "\\u00e9", "\\ud83d", "NaN", "01", "[1]"]
    for _ in range(rng.choice([0, 1, 1, 2])):
        place = rng.randrange(len(text) + 1)
        new = rng.choice(pieces)
        text = text[:place] + new + text[place + rng.randrange(2):]
    return text


def mutated_objects(count, rng):
    found = []
    for _ in range(count):
        value = {random_text(rng): random_value(rng, 1) for _ in range(rng.randrange(4))}
        text = json.dumps(value, ensure_ascii=rng.random() < .3)
        found.append(mutated(text, rng))
    return found


def test_json_part_equals_python_on_mutated_objects():
    """Catches: a grammar that lets through what json.loads rejects (01, 1., raw control
    characters, NaN, ",}"), or that rejects what it accepts within the stated layout."""
    tok = tiny()
    grammar = get_grammar(tok, "cpu")
    # where a turn stands when only the closing tag is left to come
    closing = walk(grammar, encode_trusted(tok, ODDLY_NAMED_CALL))[-2]
    n_accepted = 0
    for text in mutated_objects(4000, random.Random(0)):
        accepted = state_after_bytes(grammar, f" {text}}}\n".encode(), JSON) == closing
        assert accepted == is_strict_json(text), text
        if accepted:
            n_accepted += 1
            call = f'<tool_call>\n{{"name": "get", "arguments": {text}}}\n</tool_call>'
            parse_turn(f"<think>\nx\n</think>\n\n{call}")
    assert 1000 < n_accepted < 3500, n_accepted


# ----------------------------------------------------------------------- probabilities and the gate
def test_frequencies_follow_the_renormalised_distribution():
    """Catches: a mask that moves probability (masking after the softmax, or a temperature applied
    twice)."""
    n_draws = 20_000
    grammar = get_grammar(tiny(), "cpu")
    logits = torch.randn(grammar.V, generator=torch.Generator().manual_seed(1)) * 2
    inside_a_plan = walk(grammar, encode_trusted(tiny(), "<think>\nx"))[-1]
    inside_a_name = grammar.names(NAMES) + 1
    for state in (grammar.gate_state, inside_a_plan, inside_a_name):
        states = torch.tensor([state])
        remaining = torch.tensor([AMPLE])
        p = constrain(grammar, logits[None], states, remaining).softmax(-1)[0]  # (V,)
        live = grammar.mask(states, remaining)[0]  # (V,)
        want = logits[live].exp() / logits[live].exp().sum()
        assert torch.allclose(p[live], want, atol=1e-6)
        assert (p[~live] == 0).all()

        generator = torch.Generator().manual_seed(2)
        draws = torch.multinomial(p, n_draws, replacement=True, generator=generator)
        seen = torch.bincount(draws, minlength=grammar.V) / n_draws
        deviation = (p * (1 - p) / n_draws).sqrt()  # of a binomial's share
        assert ((seen - p).abs() <= 5 * deviation + 1e-9).all()


def test_gate_is_one_probability_and_can_be_forced():
    """Catches: a gate that reads another token's mass, a forced gate that leaks, a bias applied
    away from the gate."""
    for tok in tokenizers():
        grammar = get_grammar(tok, "cpu")
        grammar.names(NAMES)  # a mask needs one trie
        states = torch.tensor([grammar.gate_state, grammar.start])  # rows 0 and 1
        remaining = torch.tensor([AMPLE, AMPLE])
        logits = torch.randn(2, grammar.V)
        for strict in (True, False):
            out = {}  # {gate mode: logits (2, V)}
            p = {}    # {gate mode: probability of a check (2,)}
            for mode in ("learned", "always", "never", 1.5):
                out[mode] = constrain(grammar, logits, states, remaining, mode, strict)
                p[mode] = gate_probability(grammar, out[mode].log_softmax(-1), states)
                assert math.isnan(p[mode][1])
                assert torch.equal(out[mode][1], out["learned"][1])
            assert p["always"][0] == 1
            assert p["never"][0] == 0
            assert out["never"][0].isfinite().any()
            biased = p["learned"][0].logit() + 1.5
            assert torch.allclose(p[1.5][0].logit(), biased, atol=1e-3)


def test_a_forced_check_needs_a_budget():
    """Catches: a forced check that the budget cannot pay for, so that the turn has no way on."""
    for tok in tokenizers():
        grammar = get_grammar(tok, "cpu")
        grammar.names(NAMES)
        logits = torch.randn(1, grammar.V)
        gate = torch.tensor([grammar.gate_state])
        inside_the_check = walk(grammar, [grammar.safety_token], grammar.gate_state)[-1]
        # one too few: the token that opens the check costs one, too
        remaining = grammar.to_end[inside_the_check][None]
        out = constrain(grammar, logits, gate, remaining, "always")
        assert out[0].isfinite().any()
        assert gate_probability(grammar, out.log_softmax(-1), gate)[0] == 0


def test_free_mode_follows_a_strict_turn_and_stays_dead_after_a_slip():
    """Catches: a row that comes back to life after leaving the grammar and logs a gate that was
    none."""
    tok = tiny()
    grammar = get_grammar(tok, "cpu")
    ids = encode_trusted(tok, CHECKED_CALL)
    slip = tok.added["<think>"]
    states = walk(grammar, ids[:5] + [slip] + ids[5:])
    assert DEAD not in states[:6]
    assert set(states[6:]) == {DEAD}

    dead = torch.tensor([DEAD])
    out = constrain(grammar, torch.zeros(1, grammar.V), dead, dead, "always", strict=False)
    assert torch.equal(out.isfinite()[0], grammar.free_mask)
    assert forced_token(grammar, DEAD) == -1


# ------------------------------------------------------------------------------------ offered names
def test_names_are_pooled_and_only_offered_ones_are_live():
    """Catches: a trie per dialogue instead of per set, one dialogue's names live in another, a
    prefix that hides."""
    tok = tiny()
    grammar = get_grammar(tok, "cpu")
    weather = grammar.names(["get", "get_weather"])
    mail = grammar.names(["send_email"])
    assert grammar.names(["get_weather", "get", "get"]) == weather != mail
    assert grammar.names([]) == grammar.names(["refusal_tool"])

    begun = encode_trusted(tok, "<think>\nx\n</think>\n\n<tool_call>\n")
    for name, root, is_offered in (
        ("get", weather, True),
        ("get_weather", weather, True),
        ("send_email", weather, False),
        ("send_email", mail, True),
        ("ge", weather, False),
    ):
        call = tok.encode(f'{{"name": "{name}", "arguments":') + tok.encode(" {}}\n")
        state = grammar.start
        for token in begun + call:
            state = grammar.step(state, root, token)
        assert (state != DEAD) == is_offered, name
