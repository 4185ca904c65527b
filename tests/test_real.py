"""A dry run of the real thing: for each family a random narrow checkpoint in its own layout, with
its own tokenizer, template and vocabulary, through train.py and eval.py.

Where ../shared/models does not hold the family's public files, a stand-in (a small byte-level BPE
with the family's control tokens) still runs the same path, and the test says so.

Covered: that everything runs, agrees and parses at 152k and 100k tokens. Not covered: trained
weights, GPUs.
"""
import functools
import json
import random
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPE

import data
import eval as evaluation
import model as model_
import mosaic
import train

SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"
FILES = {"qwen2.5": "qwen2.5-7b", "qwen3": "qwen3-4b-thinking", "phi-4": "phi-4"}
NARROW = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# What all three families split text by before BPE.
PIECES = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# Of a family's stand-in: what its config adds to NARROW; added tokens flagged special; those that
# are not.
CONFIGS = {
    "qwen2.5": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "phi-4": {"model_type": "phi3"},
    "chatml": {"model_type": "llama", "tie_word_embeddings": True},
}
SPECIAL = {
    "qwen2.5": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "phi-4": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
ADDED = {
    "qwen2.5": ["<tool_call>", "</tool_call>"],
    "qwen3": ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
              "<think>", "</think>"],
    "phi-4": [],
    "chatml": [],
}


def write_stand_in(family, folder):
    """Writes a small tokenizer.json in the family's layout -> the config.json that goes with it,
    with padding rows."""
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([mosaic.SYSTEM] * 3, trainer)
    bpe.add_special_tokens(SPECIAL[family])
    bpe.add_tokens(ADDED[family])
    bpe.save(str(folder / "tokenizer.json"))

    config = {
        "vocab_size": 512,  # above the tokenizer's: the rest are padding rows
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
        "eos_token_id": bpe.token_to_id("<|im_end|>"),
    }
    return config | CONFIGS[family]


def checkpoint(family, kind, folder):
    """Writes a random bf16 checkpoint, with the family's public files (kind "true") or the
    stand-in's -> its folder."""
    public_files = None
    if kind == "true":
        public_files = SHARED / FILES[family]
        if not public_files.is_dir():
            pytest.skip(f"{public_files} is not there: only the stand-in was run")
        config = model_.read_json(public_files / "config.json")
    else:
        config = write_stand_in(family, folder)

    # These two speak of the layers that NARROW leaves out.
    config = {key: value for key, value in config.items()
              if key not in ("layer_types", "max_window_layers")}
    config |= NARROW
    if config.get("head_dim"):
        config["head_dim"] = 16
    model = model_.Transformer(model_.Config(config))
    model.init_weights(torch.Generator().manual_seed(0))
    model_.save_pretrained(model.to(torch.bfloat16), folder, public_files)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A function of family and kind -> the folder of a checkpoint, each made once."""
    @functools.cache
    def build(family, kind):
        return checkpoint(family, kind, tmp_path_factory.mktemp(f"{family}-{kind}"))

    return build


EVERY = pytest.mark.parametrize("family, kind", [
    ("qwen2.5", "stand-in"), ("qwen3", "stand-in"), ("phi-4", "stand-in"),
    ("chatml", "stand-in"),
    ("qwen2.5", "true"), ("qwen3", "true"), ("phi-4", "true"),
])


def train_two_steps(folder, work, objective):
    """Two steps on three training rows -> the run's folder."""
    lines = (Path(data.__file__).parent / "train.jsonl").read_text("utf-8").splitlines()
    (work / "few.jsonl").write_text("\n".join(lines[:3]), "utf-8")
    run = work / "run"
    train.run(train.arguments([
        "--model", str(folder), "--data", str(work / "few.jsonl"), "--out", str(run),
        "--steps", "2", "--tasks", "2", "--group-size", "2", "--no-eval",
        "--objective", objective,
    ]))
    return run


@EVERY
def test_train_and_eval_run_through(family, kind, built, tmp_path, monkeypatch, capsys, decided):
    """A family that nobody ever ran: a prompt that does not fit, a bf16 tensor where the grammar
    wants fp32, a mask of the wrong width, an adapter that eval.py does not open.

    Two training steps, then all four suites, strict.
    """
    folder = built(family, kind)
    limits = mosaic.REAL_LIMITS | {"max_turns": 2, "turn_tokens": 24}
    monkeypatch.setattr(mosaic, "REAL_LIMITS", limits)
    monkeypatch.setattr(train, "N_FIXED", 2)  # most of the time would be theirs
    if (family, kind) != ("qwen2.5", "stand-in"):  # seconds each: test_rollout.py has every layout
        monkeypatch.setattr(model_, "compiled", lambda device, tune: model_.EAGER)
    objective = "dpo" if (family, kind) == ("qwen3", "stand-in") else "grpo"
    run = train_two_steps(folder, tmp_path, objective)

    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(log) == 2
    for step in log:
        assert step["grad_norm"] > 0 and step["drift"] < 0.05 and step["tied"] == 0
    moved = model_.read_tensors([run / "adapter" / "adapter_model.safetensors"])
    assert all(tensor.any() for _, tensor in moved)  # B begins as zeros

    capsys.readouterr()
    status = evaluation.main(["--model", str(folder), "--adapter", str(run / "adapter"),
                              "--limit", "1", "--split", "domains"])
    assert status == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["valid"]
    assert list(result["results"]) == ["harm", "injection", "benign", "privacy"]
    for splits in result["results"].values():
        for column in ("base", "adapter"):
            cells = splits["domains"][column]
            assert cells["format_valid"]["value"] == 1 and cells["unscored"]["value"] == 0


def strict_turns(folder, n, budgets):
    """Samples n strict turns from the random model of a folder, a share by each budget.

    A budget is what a turn may have beyond the fewest tokens that any turn needs; 0: just those.
    Returns (valid turns, sampled tokens, processor's seconds of compilation, seconds of
    sampling).
    """
    model, tokenizer = model_.load(folder, "cpu", torch.float32)
    mosaic.compiled_grammar.cache_clear()
    start = time.process_time()
    grammar = mosaic.get_grammar(tokenizer, "cpu")
    compiled = time.process_time() - start
    least = grammar.to_end[grammar.start].item()

    tasks = random.Random(0).choices(data.load("train"), k=n)
    generator = torch.Generator().manual_seed(0)
    valid = 0
    sampled = 0
    start = time.perf_counter()
    for i, extra in enumerate(budgets):
        part = tasks[i::len(budgets)]
        limits = mosaic.REAL_LIMITS | {"max_turns": 1, "turn_tokens": least + extra}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mosaic, "REAL_LIMITS", limits)
            rollouts = mosaic.rollout(model, tokenizer, part, max_rows=50, generator=generator)
        for rollout in rollouts:
            valid += is_valid(rollout, tokenizer, least + extra)
            sampled += len(rollout.logprobs)
    return valid, sampled, compiled, time.perf_counter() - start


def is_valid(rollout, tokenizer, limit):
    """One turn, which parses, ends within the limit by a stop token, and holds no padding row."""
    [turn] = rollout.turns
    [(start, end)] = rollout.spans
    stopped = rollout.ids[end - 1] in tokenizer.stop_ids
    is_inside = end - start <= limit and max(rollout.ids) < tokenizer.n
    return turn is not None and stopped and is_inside


@EVERY
def test_a_random_model_only_writes_valid_turns(family, kind, built):
    """At 152,064 tokens: a padding row that is live, a token whose bytes cross a tag, a budget that
    cuts a turn, a grammar that takes a minute.

    100 turns here; `python tests/bench_real.py` samples 1,000 a family.
    """
    valid, sampled, compiled, seconds = strict_turns(built(family, kind), 100, (0, 2, 8))
    print(f"{family}, {kind}: {valid} of 100 valid, compiled in {compiled:.1f} s, "
          f"{sampled} tokens in {seconds:.1f} s")
    assert valid == 100 and sampled > 500
    assert compiled < 12  # 3 s on an idle core; this catches a compiler that became quadratic
