"""A dry run of the real thing: for each family a random narrow checkpoint in its own layout, with its own tokenizer,
template and vocabulary, through train.py and eval.py. Where ../shared/models does not hold the family's public files, a
stand-in (a small byte-level BPE with the family's control tokens) still runs the same path, and the test says so.

Covered: that everything runs, agrees and parses at 152k and 100k tokens. Not covered: trained weights, GPUs."""
import functools
import json
import random
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer as BPE, decoders, models, pre_tokenizers, trainers

import data
import eval as evaluation
import model as M
import mosaic
import train

SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"
FILES = {"qwen2.5": "qwen2.5-7b", "qwen3": "qwen3-4b-thinking", "phi-4": "phi-4"}
NARROW = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # what all three split by
STAND_IN = {  # family: (its config beside NARROW, added tokens flagged special, added tokens that are not)
    "qwen2.5": ({"model_type": "qwen2"}, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                ["<tool_call>", "</tool_call>"]),
    "qwen3": ({"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
              ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
              ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]),
    "phi-4": ({"model_type": "phi3"}, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"], [])}


def stand_in(family, path):
    """config.json and tokenizer.json of a small model in the family's layout, with padding rows."""
    change, special, added = STAND_IN[family]
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([mosaic.SYSTEM] * 3, trainers.BpeTrainer(
        vocab_size=480, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens(special), bpe.add_tokens(added)
    bpe.save(str(path / "tokenizer.json"))
    raw = dict(vocab_size=512, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False, hidden_act="silu",
               max_position_embeddings=32768, torch_dtype="bfloat16", eos_token_id=bpe.token_to_id("<|im_end|>"))
    return raw | change


def checkpoint(family, kind, path):
    """Writes a random bf16 checkpoint, with the family's public files (kind "true") or the stand-in's -> its folder."""
    source = SHARED / FILES[family]
    if kind == "true" and not source.is_dir():
        pytest.skip(f"{source} is not there: only the stand-in was run")
    raw = M.read_json(source / "config.json") if kind == "true" else stand_in(family, path)
    raw = {k: v for k, v in raw.items() if k not in ("layer_types", "max_window_layers")} | NARROW
    raw |= {"head_dim": 16} if raw.get("head_dim") else {}
    model = M.Transformer(M.Config(raw)).init_weights(torch.Generator().manual_seed(0))
    M.save_pretrained(model.to(torch.bfloat16), path, source if kind == "true" else None)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return functools.cache(lambda family, kind: checkpoint(family, kind, tmp_path_factory.mktemp(f"{family}-{kind}")))


EVERY = pytest.mark.parametrize("family, kind", [(family, kind) for kind in ("stand-in", "true") for family in FILES])


@EVERY
def test_train_and_eval_run_through(family, kind, built, tmp_path, monkeypatch, capsys, decided):
    """A family that nobody ever ran: a prompt that does not fit, a bf16 tensor where the grammar wants fp32, a mask of
    the wrong width, an adapter that eval.py does not open. Two training steps, then all four suites, strict."""
    folder, rows = built(family, kind), (Path(data.__file__).parent / "train.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:3]), "utf-8")
    monkeypatch.setattr(mosaic, "REAL_LIMITS", mosaic.REAL_LIMITS | {"max_turns": 2, "turn_tokens": 24})
    objective = "dpo" if (family, kind) == ("qwen3", "stand-in") else "grpo"
    args = ["--steps", "2", "--tasks", "2", "--group-size", "2", "--no-eval", "--objective", objective]
    train.run(train.arguments(["--model", str(folder), "--data", str(tmp_path / "few.jsonl"), *args,
                               "--out", str(tmp_path / "run")]))
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(row["grad_norm"] > 0 and row["drift"] < 0.05 and row["tied"] == 0 for row in log)
    moved = M.read_tensors([tmp_path / "run" / "adapter" / "adapter_model.safetensors"])
    assert all(t.any() for _, t in moved)  # B begins as zeros
    capsys.readouterr()
    assert evaluation.main(["--model", str(folder), "--adapter", str(tmp_path / "run" / "adapter"), "--limit", "1",
                            "--split", "domains"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["valid"] and list(result["results"]) == ["harm", "injection", "benign", "privacy"]
    for cells in (split["domains"][column] for split in result["results"].values() for column in ("base", "adapter")):
        assert cells["format_valid"]["value"] == 1 and cells["unscored"]["value"] == 0


def strict_turns(folder, n, budgets):
    """Samples n strict turns from the random model of a folder, a share by each budget (0: the fewest tokens a turn can
    have) -> (valid turns, sampled tokens, seconds of compilation, seconds of sampling)."""
    model, tokenizer = M.load(folder, "cpu", torch.float32)
    mosaic.get_grammar.cache_clear()
    start = time.perf_counter()
    grammar = mosaic.get_grammar(tokenizer, "cpu")
    compiled, least = time.perf_counter() - start, grammar.to_end[grammar.start].item()
    tasks, valid, sampled, before = data.load("train"), 0, 0, mosaic.REAL_LIMITS
    tasks = random.Random(0).choices(tasks, k=n)
    generator = torch.Generator().manual_seed(0)
    try:
        for i, extra in enumerate(budgets):
            mosaic.REAL_LIMITS = before | {"max_turns": 1, "turn_tokens": least + extra}
            part = tasks[i::len(budgets)]
            for r in mosaic.rollout(model, tokenizer, part, max_rows=50, generator=generator):
                [turn], [(a, b)] = r.turns, r.spans
                inside = b - a <= least + extra and r.ids[b - 1] in tokenizer.stop_ids and max(r.ids) < tokenizer.n
                valid += turn is not None and inside
                sampled += len(r.logprobs)
    finally:
        mosaic.REAL_LIMITS = before
    return valid, sampled, compiled, time.perf_counter() - start - compiled


@EVERY
def test_a_random_model_only_writes_valid_turns(family, kind, built):
    """At 152,064 tokens: a padding row that is live, a token whose bytes cross a tag, a budget that cuts a turn, a
    grammar that takes a minute. 100 turns here; `python tests/bench_real.py` samples 1,000 a family."""
    valid, sampled, compiled, seconds = strict_turns(built(family, kind), 100, (0, 2, 8))
    print(f"{family}, {kind}: {valid} of 100 valid, compiled in {compiled:.1f} s, {sampled} tokens in {seconds:.1f} s")
    assert valid == 100 and sampled > 500
    assert compiled < 12  # 3 s on an idle core; this catches a compiler that became quadratic
