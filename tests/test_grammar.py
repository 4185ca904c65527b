"""The grammar of a turn: the parser, and the automaton over a tokenizer's bytes that can only write what parses."""
import functools
import json
import math
import random
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from tokenizers import Tokenizer as BPE, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model  # noqa: E402
from mosaic import (CALL, DEAD, FAMILIES, FINAL, JSON, TAGS, FormatError, _moves,  # noqa: E402
                    encode_trusted, get_grammar, parse_turn)

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
REAL = {"qwen2.5": "qwen2.5-7b", "qwen3": "qwen3-4b-thinking", "phi-4": "phi-4"}
NAMES = ["get_weather", "get", "send_email", "refusal_tool", 'odd"\\name é']
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
           "<safety_thoughts>", "</safety_thoughts>", "<tool_call>", "</tool_call>", "<answer>", "</answer>"]
CONFIG = {"model_type": "qwen2", "mosaic_family": "tiny", "hidden_size": 8, "intermediate_size": 8,
          "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 400,
          "rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 64,
          "hidden_act": "silu", "torch_dtype": "float32", "eos_token_id": 2}


@functools.lru_cache(maxsize=None)
def tiny():
    """A tokenizer like the embedded one, with padding rows: under 400 tokens, 13 of them added, in 400 rows."""
    words = 'the plan is to look up a record, then send it: {"name": "send_email", "arguments": {"to": "ann"}}\n\n'
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    bpe.decoder = decoders.ByteLevel()
    texts = [words, "weather in oslo: sunny, 21 degrees\n", "safety thoughts answer tool call\n", "naïve — 你好 true}}\n"]
    bpe.train_from_iterator(texts * 9, trainers.BpeTrainer(vocab_size=380, show_progress=False, min_frequency=0,
                                                           initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens(CONTROL)
    with tempfile.TemporaryDirectory() as path:
        bpe.save(str(Path(path) / "tokenizer.json"))
        return model.Tokenizer(Path(path), model.Config({**CONFIG, "eos_token_id": bpe.token_to_id("<|im_end|>")}))


@functools.lru_cache(maxsize=None)
def real(family):
    path = MODELS / REAL[family]
    if not path.is_dir():
        print(f"left out: {family}, no {path}")
        return None
    return model.Tokenizer(path, model.Config(model.read_json(path / "config.json")))


def tokenizers():
    return [t for t in (tiny(), *map(real, REAL)) if t]


def opened(tok):
    return FAMILIES[tok.family]["prompt"].endswith("<think>\n")


def walk(grammar, ids, states=None, names=NAMES):
    """States along ids, the first included."""
    root, states = grammar.names(names), [grammar.start if states is None else states]
    for i in ids:
        states.append(grammar.step(states[-1], root, i))
    return states


def steps(grammar, states, roots, tokens):
    """A step of many rows: (B,) each -> (B,)."""
    return torch.tensor([grammar.step(*row) for row in zip(states.tolist(), roots.tolist(), tokens.tolist())])


def sample(grammar, budgets, logits, generator):
    """Strict turns (ids), one a budget, from `logits(states)` under the mask."""
    n = len(budgets)
    states, roots = torch.full((n,), grammar.start), torch.full((n,), grammar.names(NAMES))
    remaining, out = torch.tensor(budgets), [[] for _ in budgets]
    while True:
        rows = (states != grammar.final).nonzero()[:, 0]
        if not len(rows):
            return out
        assert (remaining[rows] > 0).all()
        masked = grammar.constrain(logits(states[rows]), states[rows], remaining[rows])
        tokens = torch.multinomial(masked.softmax(-1), 1, generator=generator)[:, 0]
        states[rows] = steps(grammar, states[rows], roots[rows], tokens)
        remaining[rows] -= 1
        for i, token in zip(rows.tolist(), tokens.tolist()):
            out[i].append(token)


def exploring(grammar):
    """Logits that give every next state the same chance, so that random walks see checks, calls and deep JSON."""
    nodes = len(_moves([b""])[0])  # the inner nodes of tags come after the states of bytes

    @functools.lru_cache(maxsize=None)
    def row(state):
        if state >= grammar.S:
            return torch.zeros(grammar.V)
        after = grammar.next_state[state].long() + 1
        structure = 5.0 * (after - 1 >= nodes)
        return structure - torch.bincount(after, minlength=grammar.S + 1).float().log()[after]
    return lambda states: torch.stack([row(s) for s in states.tolist()])


def test_1000_random_turns_parse():
    """Catches: a path through the tables that is no turn, a budget that cuts a turn, a name that was not offered, stop
    tokens in the middle, branches that are never reached."""
    for tok in tokenizers():
        grammar, n = get_grammar(tok), 1000 if tok.family == "tiny" else 4
        least_, seen = grammar.to_end[grammar.start].item(), set()
        some = [least_, least_ + 3, 40, 64, 100]
        budgets = [random.Random(i).choice(some) if n == 1000 else least_ + 9 * i for i in range(n)]
        flat = [lambda states: 2 * torch.randn(len(states), grammar.V)]  # as a base model: text, seldom a tag
        for logits in [exploring(grammar)] + flat * (n == 1000):
            budgets = budgets if logits not in flat else budgets[:200]
            for ids, budget in zip(sample(grammar, budgets, logits, torch.Generator().manual_seed(0)), budgets):
                assert len(ids) <= budget and ids[-1] == tok.added["<|im_end|>"] and ids[-1] not in ids[:-1]
                assert max(ids) < tok.n, "a padding row"
                turn = parse_turn(b"".join(tok.token_bytes[i] for i in ids[:-1]), opened(tok))
                assert turn.kind == "answer" or turn.name in NAMES
                seen.add((turn.kind, turn.check is not None, bool(turn.arguments)))
        assert n < 1000 or len(seen) == 6, seen


def least(grammar, state):
    """Fewest tokens to the end, by bisection over what the mask lets through."""
    state = torch.tensor([state])
    low, high = 0, 64  # with `low` tokens nothing is live, with `high` something is
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if grammar.mask(state, torch.tensor([middle])).any() else (middle, high)
    return high


def test_every_reachable_state_has_a_live_token_and_dead_rows_none():
    """Catches: a state one can enter and not leave; padding or control rows that are live; a budget off by one."""
    for tok in tokenizers():
        grammar = get_grammar(tok)
        root = grammar.names(NAMES)
        pool = len(grammar._nodes)
        live = (grammar.next_state >= 0).sum(1)
        assert (live > 0).sum() == grammar.S - 2 and live[FINAL] == live[CALL] == live[DEAD] == 0
        dead = torch.tensor([not word for word in tok.token_bytes])
        assert not (grammar.next_state[:, dead] >= 0).any() and not grammar.free_mask[dead].any()
        tags = {i for c, i in tok.added.items() if c.strip("</>") in TAGS[:4]}
        control = [i for i in tok.added.values() if i not in tags and i not in tok.stop_ids]
        assert not (grammar.next_state[:, control] >= 0).any() and not grammar.free_mask[control].any()
        states = torch.tensor([s for s in range(grammar.S + pool) if s not in (FINAL, CALL)])
        if tok.family != "tiny":
            states = states[::80]
        roots = torch.full_like(states, root)
        need = torch.tensor([least(grammar, s) for s in states.tolist()])
        own = states[states < grammar.S]
        assert torch.equal(need[torch.isin(states, own)], grammar.to_end[own])
        assert grammar.mask(states, need).any(1).all() and not grammar.mask(states, need - 1).any()
        most = grammar.mask(states, torch.full_like(states, 10 ** 4))
        forced = torch.tensor([grammar.forced(s) for s in states.tolist()])
        assert torch.equal(forced >= 0, most.sum(1) == 1) and most[forced >= 0, forced[forced >= 0]].all()
        last = torch.full_like(states, tok.vocab_size - 1)
        assert not dead[-1] or (steps(grammar, states, roots, last) == DEAD).all()


TURNS = ["<think>\nWeather.\n</think>\n\n"
         "<safety_thoughts>\nFine: <b>a</b> < b </div> <table>.\n</safety_thoughts>\n<tool_call>\n"
         '{"name": "get", "arguments": {"a": [1, -2.5e3, true, null, {"b": "x</b>\\n\\u00e9 你好"}], "c": {}}}\n'
         "</tool_call>",
         '<think>\na\nb\n\n</think>\n\n<tool_call>\n{"name": "odd\\"\\\\name é", "arguments": {}}\n</tool_call>',
         "<think>\nDone.\n</think>\n\n<answer>\nIt is sunny — 你好.\n</answer>",
         "<think>\nDone.\n</think>\n\n<safety_thoughts>\nok\n</safety_thoughts>\n"
         "<answer>\nA line may begin like a tag:\n</b>\n</s>\n</the\n</ and <th>.\n</answer>"]


def test_canonical_turns_walk_to_the_end_and_pass_one_gate():
    """Catches: structural runs compiled to other ids than the tokenizer gives for the same bytes (the model would be
    forced off its own tokenisation), and a gate that is missed or met twice."""
    for tok in tokenizers():
        grammar = get_grammar(tok)
        for text in TURNS:
            text = text.removeprefix("<think>\n") if opened(tok) else text
            ids = encode_trusted(tok, text + "<|im_end|>")
            if tok.family in REAL:
                own = BPE.from_file(str(MODELS / REAL[tok.family] / "tokenizer.json"))
                assert ids == own.encode(text + "<|im_end|>", add_special_tokens=False).ids
            states = walk(grammar, ids)
            assert states[-1] == grammar.final, tok.decode(ids[:states.index(DEAD)])
            assert states.count(grammar.gate_state) == 1
            assert (ids[states.index(grammar.gate_state)] == grammar.safety_token) == ("<safety" in text)


def test_no_tag_is_live_in_a_text_by_any_spelling():
    """Catches: a tag written byte by byte inside a text, which `parse_turn` would read as the end of the field."""
    tok = tiny()
    grammar, letters = get_grammar(tok), {w: i for i, w in enumerate(tok.token_bytes) if len(w) == 1}
    for field in ("<think>\nx", "<think>\nx\n</think>\n\n<safety_thoughts>\nx", "<think>\nx\n</think>\n\n<answer>\nx"):
        inside = walk(grammar, encode_trusted(tok, field))[-1]
        for tag in TAGS:
            for mark in (f"<{tag}>", f"</{tag}>", f"\n</{tag}>", f"<</{tag}>"):
                assert walk(grammar, [letters[bytes([b])] for b in mark.encode()], inside)[-1] == DEAD, mark
        for word in ("<<b></b>", "a </ b", "<s>", "<the>", "</t>", "\n<\n/<//an>"):
            assert walk(grammar, [letters[bytes([b])] for b in word.encode()], inside)[-1] != DEAD, word
        for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xbd\n"):
            assert walk(grammar, [letters[bytes([b])] for b in bad], inside)[-1] == DEAD, bad


PIECES = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9.eE+-]+|[a-z]+|[{}\[\]]|: |, ', re.S)


def strict_json(text):
    """The oracle: Python's json, single spaces after : and , alone, nesting <= 3, no \\ud800-\\udfff."""
    def nan(name):
        raise ValueError(name)

    def depth(v):
        inner = v.values() if isinstance(v, dict) else v if isinstance(v, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)
    try:
        value = json.loads(text, parse_constant=nan)
    except ValueError:
        return False
    pieces = PIECES.findall(text)
    return (isinstance(value, dict) and "".join(pieces) == text and depth(value) <= 3
            and not any(re.search(r"(?<!\\)(\\\\)*\\u[dD][89abAB]", p) or re.search(r"(?<!\\)(\\\\)*\\u[dD][c-fC-F]", p)
                        for p in pieces))


def mutated_objects(count, rng):
    def value(depth):
        kind = rng.randrange(9 if depth < 3 else 6)
        if kind >= 6:
            inner = [value(depth + 1) for _ in range(rng.randrange(3))]
            return inner if kind == 8 else {text(): v for v in inner}
        return [None, True, False, rng.randrange(-99, 99), rng.choice([1.5, -2e-7, 1e30, 0.0]), text()][kind]

    def text():
        return "".join(rng.choice('ab"\\/\n\té你😀{}[]:,<1 \x01') for _ in range(rng.randrange(5)))
    for _ in range(count):
        s = json.dumps({text(): value(1) for _ in range(rng.randrange(4))}, ensure_ascii=rng.random() < .3)
        for _ in range(rng.choice([0, 1, 1, 2])):
            at = rng.randrange(len(s) + 1)
            new = rng.choice(["", *'{}[]:,"\\ -+.eE0123tfnu\n', "\\u00e9", "\\ud83d", "NaN", "01", "[1]"])
            s = s[:at] + new + s[at + rng.randrange(2):]
        yield s


def test_json_part_equals_python_on_mutated_objects():
    """Catches: a grammar that lets through what json.loads rejects (01, 1., raw control characters, NaN, ",}"), or that
    rejects what it accepts within the stated layout."""
    tok = tiny()
    grammar, letters = get_grammar(tok), {w: i for i, w in enumerate(tok.token_bytes) if len(w) == 1}
    texts = list(mutated_objects(4000, random.Random(0)))
    rows = [[letters[bytes([b])] for b in f" {t}}}\n".encode()] for t in texts]
    states, roots = torch.full((len(rows),), JSON), torch.full((len(rows),), grammar.names(NAMES))
    ends = torch.full_like(states, DEAD)
    for i in range(max(map(len, rows))):
        tokens = torch.tensor([row[i] if i < len(row) else 0 for row in rows])
        states = steps(grammar, states, roots, tokens)
        ends = torch.where(torch.tensor([i == len(row) - 1 for row in rows]), states, ends)
    close = walk(grammar, encode_trusted(tok, TURNS[1]))[-2]
    accepted = (ends == close).tolist()
    wrong = [(t, a) for t, a in zip(texts, accepted) if a != strict_json(t)]
    assert not wrong and 1000 < sum(accepted) < 3500, (wrong[:5], sum(accepted))
    for t in (t for t, a in zip(texts, accepted) if a):
        parse_turn(f'<think>\nx\n</think>\n\n<tool_call>\n{{"name": "get", "arguments": {t}}}\n</tool_call>')


def test_frequencies_follow_the_renormalised_distribution():
    """Catches: a mask that moves probability (masking after the softmax, or a temperature applied twice)."""
    grammar = get_grammar(tiny())
    logits = torch.randn(grammar.V, generator=torch.Generator().manual_seed(1)) * 2
    for state, budget in ((grammar.gate_state, 99), (walk(grammar, encode_trusted(tiny(), "<think>\nx"))[-1], 99),
                          (grammar.names(NAMES) + 1, 99)):
        states, roots, left = (torch.tensor([x]) for x in (state, grammar.names(NAMES), budget))
        p = grammar.constrain(logits[None], states, left).softmax(-1)[0]
        live = grammar.mask(states, left)[0]
        want = logits[live].exp() / logits[live].exp().sum()
        assert torch.allclose(p[live], want, atol=1e-6) and (p[~live] == 0).all()
        draws = torch.multinomial(p, 20000, True, generator=torch.Generator().manual_seed(2))
        seen = torch.bincount(draws, minlength=grammar.V) / 20000
        assert ((seen - p).abs() <= 5 * (p * (1 - p) / 20000).sqrt() + 1e-9).all()


def test_gate_is_one_probability_and_can_be_forced():
    """Catches: a gate that reads another token's mass, a forced gate that leaks, a bias applied away from the gate, a
    forced check that the budget cannot pay for."""
    for tok in tokenizers():
        grammar = get_grammar(tok)
        rows = 3
        states = torch.tensor([grammar.gate_state, grammar.start, grammar.gate_state])
        grammar.names(NAMES)  # a mask needs one trie
        left = torch.tensor([99, 99, 12])
        logits = torch.randn(rows, grammar.V)
        for strict in (True, False):
            gates = ("learned", "always", "never", 1.5)
            out = {g: grammar.constrain(logits, states, left, g, strict) for g in gates}
            p = {g: grammar.gate_p(x.log_softmax(-1), states) for g, x in out.items()}
            assert all(math.isnan(x[1]) for x in p.values())
            assert p["always"][0] == 1 and p["never"][0] == 0 and out["never"][0].isfinite().any()
            assert torch.allclose(p[1.5][0].logit(), p["learned"][0].logit() + 1.5, atol=1e-3)
            assert all(torch.equal(x[1], out["learned"][1]) for x in out.values())
            if strict:
                need = grammar.to_end[walk(grammar, [grammar.safety_token], grammar.gate_state)[-1]]
                left[2] = need
                tight = grammar.constrain(logits, states, left, "always")
                assert tight[2].isfinite().any() and grammar.gate_p(tight.log_softmax(-1), states)[2] == 0
                left[2] = 12


def test_free_mode_follows_a_strict_turn_and_stays_dead_after_a_slip():
    """Catches: a row that comes back to life after leaving the grammar and logs a gate that was none."""
    grammar = get_grammar(tiny())
    ids = encode_trusted(tiny(), TURNS[0])
    states = walk(grammar, ids[:5] + [tiny().added["<think>"]] + ids[5:])
    assert DEAD not in states[:6] and set(states[6:]) == {DEAD}
    dead = torch.tensor([DEAD])
    out = grammar.constrain(torch.zeros(1, grammar.V), dead, dead, "always", strict=False)
    assert torch.equal(out.isfinite()[0], grammar.free_mask) and grammar.forced(DEAD) == -1


def test_names_are_pooled_and_only_offered_ones_are_live():
    """Catches: a trie per dialogue instead of per set, one dialogue's names live in another, a prefix that hides."""
    tok = tiny()
    grammar = get_grammar(tok)
    a, b = grammar.names(["get", "get_weather"]), grammar.names(["send_email"])
    assert grammar.names(["get_weather", "get", "get"]) == a != b
    head = encode_trusted(tok, "<think>\nx\n</think>\n\n<tool_call>\n")
    for name, root, alive in (
            ("get", a, 1), ("get_weather", a, 1), ("send_email", a, 0), ("send_email", b, 1), ("ge", a, 0)):
        ids = head + tok.encode(f'{{"name": "{name}", "arguments":') + tok.encode(" {}}\n")
        state = grammar.start
        for i in ids:
            state = grammar.step(state, root, i)
        assert (state != DEAD) == bool(alive), name
    assert grammar.names([]) == grammar.names(["refusal_tool"])


def test_parse_turn_reads_what_was_written():
    """Catches: fields that gain or lose a byte, `opened` and `parallel` ignored."""
    turn = parse_turn(TURNS[0])
    assert (turn.plan, turn.check) == ("Weather.", "Fine: <b>a</b> < b </div> <table>.")
    assert turn.kind == "call" and turn.name == "get" and turn.arguments["a"][4] == {"b": "x</b>\né 你好"}
    assert turn.calls == [("get", turn.arguments)] and turn.text is None
    assert parse_turn(TURNS[2]).text == "It is sunny — 你好." and parse_turn(TURNS[1].encode()).plan == "a\nb\n"
    assert parse_turn(TURNS[0].removeprefix("<think>\n"), opened=True) == turn
    call = TURNS[1][TURNS[1].index("<tool_call>"):]
    assert len(parse_turn(TURNS[1] + call + "\n" + call, parallel=True).calls) == 3
    loose = '{"name":"get",\n "arguments":{"a" :1e999, "b": %s}}' % ("9" * 4000)
    loose = f"<think>\nx\n</think>\n\n<tool_call>\n{loose}\n</tool_call>"
    tagged = parse_turn(TURNS[0].replace("x</b>", "\\n</tool_call>"))  # a JSON string is no text field
    assert tagged.arguments["a"][4]["b"].startswith("\n</tool_call>")
    assert parse_turn(loose).arguments == {"a": sys.float_info.max, "b": 10 ** 4000 - 1}


ANSWER, OBJECT = "\n\n<answer>\nx\n</answer>", "{}}"
BROKEN = [  # (turn, place)
    ("", 0), ("think", 0), ("<think>x\n</think>" + ANSWER, 0), ("<think>\n\n</think>" + ANSWER, 8),
    ("<think>\nx</think>" + ANSWER, 8), ("<think>\nx\n</think>" + ANSWER[1:], 18), ("<think>\nx\n</think>\n\n", 20),
    ("<think>\n<think>\n</think>" + ANSWER, 8), ("<think>\nx </answer>\n</think>" + ANSWER, 8), (TURNS[2] + "\n", 60),
    (TURNS[2] + TURNS[2], 60), (TURNS[1] + TURNS[1], 90), (TURNS[0].replace("Fine", "<answer>"), 45),
    (TURNS[0].replace("true", "NaN"), 111), (TURNS[0].replace('"get"', "1"), 111), (b"<think>\n\xff", 8), ("\ud800", 0),
    *((TURNS[1].replace(OBJECT, new), 35) for new in (
        "[]}", "null}", "{}", "{}, 1}", '{"a": "\\ud800"}}', '{"a": ' + "[" * 16 + "]" * 16 + "}}",
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}}", "{} , }", '{"a":01}}', '{"a":%s}}' % ("9" * 5000))),
    *((TURNS[1].replace(*pair), place) for pair, place in (
        (('{"name"', ' {"name"'), 23), (('"arguments"', '"args"'), 35), (("}}\n", "}} \n"), 77)))]


def test_broken_turns_name_their_place():
    """Catches: a malformed turn that parses, or one that is reported without its place."""
    for text, place in BROKEN:
        with pytest.raises(FormatError) as caught:
            parse_turn(text)
        assert str(caught.value).split(":")[0] in (f"character {place}", f"byte {place}"), (text[:99], caught.value)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60), st.lists(st.sampled_from(
    [f"<{a}{t}>" for t in TAGS for a in ("", "/")]
    + ["\n", "\n\n", "x", '{"name": "a", "arguments": {', "}", '"', "[", "\ud800"])).map("".join)),
       st.booleans(), st.booleans())
@example("<think>\nx\n</think>\n\n<tool_call>\n" + "[" * 10 ** 5, False, False)
def test_parse_turn_is_total(text, opened, parallel):
    """Catches: any exception but FormatError (RecursionError, UnicodeDecodeError, IndexError) on some string."""
    try:
        turn = parse_turn(text, opened, parallel)
    except FormatError:
        return
    assert turn.plan and (turn.kind == "call") == bool(turn.calls)
