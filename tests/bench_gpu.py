"""What the three real shapes cost on one CUDA card: random bf16 weights, made there; transformers
on the very same tensors. Nothing in it is a test; tests/test_cuda.py says whether what is timed is
right.

    python tests/bench_gpu.py                       # every row for all three shapes, some 4 minutes
    python tests/bench_gpu.py decode --model phi-4  # one row, one shape

Rows: decode, context, grammar, update, loop, small. Tokenizers and configs are read from --files
NAME (checkpoints/ or ../shared/models by default). Prints tables and, last, one JSON line. Needs
80 GB; "small" caps itself at 24.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch

import bench_speed
import model as model_
import mosaic
import train
from bench_speed import (
    ROOT,
    batch_of,
    fixed_training,
    generate,
    peft_update,
    sampler,
    table,
    with_peft,
)

MODELS = ("qwen2.5-7b", "qwen3-4b-thinking", "phi-4")


def files(name):
    for place in (args.files, ROOT / "checkpoints", ROOT.parent / "shared" / "models"):
        if place and (place / name / "tokenizer.json").is_file():
            return place / name
    sys.exit(f"bench_gpu.py: no config.json and tokenizer.json of {name}; "
             f"put them in checkpoints/{name}")


def random_model(name):
    """(Transformer, Tokenizer) of the family's true config: matrices normal(0, 0.02), norms 1."""
    path = files(name)
    config = model_.Config(model_.read_json(path / "config.json"), path / "config.json")
    tokenizer = model_.Tokenizer(path, config)
    with torch.device("meta"):
        model = model_.Transformer(config).to(config.dtype)
    model.to_empty(device="cuda").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 0.02)
            else:
                p.fill_(float("norm" in key))
    return model, tokenizer


def theirs(name, model):
    """transformers' model around the same tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.from_pretrained(files(name))
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation="sdpa")
    hf.eval()
    hf.load_state_dict(model.state_dict(), assign=True, strict=False)
    hf.tie_weights()
    with model.device:  # its buffer is in no file
        hf.model.rotary_emb = type(hf.model.rotary_emb)(config=hf.config)
    hf.generation_config.eos_token_id = None
    return hf


def seconds(call):
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def best_of(repeats, call):
    return min(seconds(call) for _ in range(repeats))


def bandwidth():
    """Bytes a second of a copy inside the card, read and written."""
    a = torch.ones(2 ** 31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * len(a) / best_of(6, lambda: b.copy_(a))


def bytes_read(model):
    """Of bf16 weights that a token reads: an embedding that is not the head is looked up only."""
    total = 0
    for name, p in model.named_parameters():
        if model.config.tied or "embed" not in name:
            total += p.numel() * 2
    return total


def decode(prompt=128, new=64):
    rows = []
    copy = bandwidth()
    for name in args.model:
        model, tokenizer = random_model(name)
        hf = theirs(name, model)
        read = bytes_read(model)
        alone = None  # tokens a second of one row
        for batch in (1, 8):
            ids = torch.randint(0, 1000, (batch, prompt), device="cuda")

            def ours(n):
                sampler(model, tokenizer, batch, prompt, n)()

            # seconds of a token more, without the prompt
            short = best_of(3, lambda: ours(new))
            long = best_of(3, lambda: ours(3 * new))
            our_token = (long - short) / (2 * new)
            short = best_of(2, lambda: generate(hf, ids, new // 8))
            long = best_of(2, lambda: generate(hf, ids, new // 2))
            their_token = (long - short) / (new // 2 - new // 8)

            alone = alone or batch / our_token
            rows.append((
                name, batch, batch / our_token, batch / their_token, their_token / our_token,
                read / our_token / 1e9, read / our_token / copy, batch / our_token / alone))
        del model, hf
        torch.cuda.empty_cache()
    table(f"decode, bf16, prompt {prompt}: tokens a second; GB of weights read a second, and its "
          f"share of a copy's {copy / 1e9:.0f}",
          ("model", "rows", "ours", "generate", "ratio", "GB/s", "share", "x one row"), rows)


def stepper(model, batch, context):
    """A call that decodes one token of `batch` rows behind `context` positions, by graph."""
    cache = model_.Cache(model.config, batch, context + 8, "cuda", model.dtype)
    cache.lengths[:] = context
    step = model_.Decoder(model, cache)
    ids = torch.zeros(batch, 1, dtype=torch.long, device="cuda")

    @torch.no_grad()
    def run():
        cache.bound = context
        # of length 0: the next call finds the same context
        step(ids, torch.zeros_like(cache.lengths))
    for _ in range(3):
        run()
    return run


def repeated(call, n):
    for _ in range(n):
        call()


def context():
    """A step of the 7B as the context grows."""
    model, _ = random_model("qwen2.5-7b")
    rows = []
    for batch in (1, 8):
        for n in (500, 2000, 8000):
            run = stepper(model, batch, n)
            rows.append((batch, n, seconds(lambda: repeated(run, 20)) / 20 * 1e3))
    table("7B, ms a step without head and draw", ("rows", "context", "ms"), rows)


def grammar():
    """The strict grammar's mask beside the forward of one token; any wait for the card inside is an
    error."""
    model, tokenizer = random_model("qwen2.5-7b")
    g = mosaic.get_grammar(tokenizer, "cuda")
    g.names(["read_note"])
    rows = []
    for batch in (1, 16):
        logits = torch.randn(batch, tokenizer.vocab_size, device="cuda")
        states = torch.full((batch,), mosaic.PLAN, device="cuda")
        left = torch.full((batch,), 99, device="cuda")

        def mask():
            mosaic.constrain(g, logits, states, left)
        mask()  # makes the pool's tensor
        torch.cuda.set_sync_debug_mode("error")
        try:
            mask()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        run = stepper(model, batch, 512)
        forward_ms = best_of(3, lambda: repeated(run, 10)) * 100
        mask_ms = best_of(3, lambda: repeated(mask, 10)) * 100
        rows.append((batch, forward_ms, mask_ms, mask_ms / forward_ms))
    table("grammar, 7B, ms a step; no wait for the card inside",
          ("rows", "forward", "mask", "share"), rows)


def adapted(name):
    model, tokenizer = random_model(name)
    recipe = train.RECIPE[tokenizer.family]
    model.recompute = recipe.recompute
    generator = torch.Generator().manual_seed(0)
    model_.add_lora(model, recipe.rank, recipe.alpha, generator=generator)
    return model, tokenizer


def timed(model, step):
    """-> seconds of the second of two steps, AdamW included; GB at its peak."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def whole_step():
        step()
        optimizer.step()
    whole_step()
    torch.cuda.reset_peak_memory_stats()
    return seconds(whole_step), torch.cuda.max_memory_allocated() / 1e9


def ours_update(model, tokenizer, G, P, R):
    batch, *_ = batch_of(G, P, R, tokenizer.vocab_size)
    recipe = train.Recipe(micro_tokens=8192, kl_coef=0.02)
    return timed(model, lambda: train.accumulate(model, tokenizer, *batch, recipe))


def update():
    """A micro-batch of the recipe's 8,192 tokens: four trajectories on one prompt; one trajectory
    of T = 8,192."""
    rows = []
    for name in args.model:
        model, tokenizer = adapted(name)
        size = sum(p.numel() for n, p in model.named_parameters() if "layers" in n)
        for G, P, R in ((4, 1024, 1792), (1, 1024, 7168)):
            tokens = P + G * R
            t, peak = ours_update(model, tokenizer, G, P, R)
            # FLOPs a token and parameter: 2 for each of reference, policy, recomputation and the
            # gradient of the inputs
            rows.append((name, f"{G} x {R}", t, tokens / t, 8 * tokens * size / t / 1e12, peak))
        del model
        torch.cuda.empty_cache()
    hf = with_peft(theirs("qwen2.5-7b", random_model("qwen2.5-7b")[0]), True)
    _, ids, adv = batch_of(4, 1024, 1792, hf.config.vocab_size)
    ids = ids.cuda()
    adv = adv.cuda()
    t, peak = timed(hf, lambda: peft_update(hf, ids, adv, 1024))
    rows.append(("7b, peft", "4 x 1792", t, 8192 / t, "", peak))
    del hf
    torch.cuda.empty_cache()
    table("update on prompts of 1,024, LoRA r = 16 on every linear layer, blocks recomputed: s, "
          "tokens/s (a prompt counts once), TFLOP/s of the base's products, GB at the peak",
          ("model", "batch", "seconds", "tokens/s", "TFLOP/s", "GB"), rows)


def loop(prompt=1024, turns=3, turn=96, result=64):
    """Two full training steps by train.run: 2 tasks of 4 trajectories and 2 watched ones, of fixed
    lengths."""
    rows = []
    columns = ("step", "seconds", "sample_tok/s", "train_tok/s", "drift", "drift_mean", "grad_norm")
    train.N_FIXED = 2
    lengths = (prompt, turn, turns, result, 131_072)
    for name in args.model:
        loaded = random_model(name)
        torch.cuda.reset_peak_memory_stats()
        out = args.work / f"loop-{name}"
        given = fixed_training(loaded, files(name), out, lengths, "--steps", "2", "--tasks", "2")
        train.run(given)
        for line in (out / "metrics.jsonl").read_text().splitlines():
            logged = json.loads(line)
            values = [logged[column] for column in columns]
            rows.append((name, *values, torch.cuda.max_memory_allocated() / 1e9))
        train.load = None  # where fixed_training left the weights
        loaded = None
        torch.cuda.empty_cache()
    table(f"two training steps (the first compiles), 10 trajectories: {turns} turns of {turn} on a "
          f"prompt of {prompt}",
          ("model", "step", "seconds", "sampled/s", "trained/s", "diff", "mean diff", "|g|", "GB"),
          rows)


def small():
    """The 7B within 24 GB: positions = 32,768 for sampling, the recipe as it is for an update at
    T = 8,192."""
    card = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(24e9 / card)
    model, tokenizer = adapted("qwen2.5-7b")
    sampler(model, tokenizer, 4, 1024, 32, 2, 64)()
    sampled = torch.cuda.max_memory_allocated() / 1e9
    # what positions = 32,768 would add to it
    cache = model_.Cache(model.config, 4, 8192 - 8, "cuda", model.dtype)
    held = torch.cuda.memory_allocated() / 1e9
    del cache
    update_s, peak = ours_update(model, tokenizer, 1, 1024, 7168)
    torch.cuda.set_per_process_memory_fraction(1.0)
    table("7B capped at 24 GB: GB while sampling, with a cache of 32,768 positions, in an update "
          "at T = 8,192",
          ("GB", "GB with cache", "update s", "GB "), [(sampled, held, update_s, peak)])
    del model
    torch.cuda.empty_cache()


COMMANDS = {
    "decode": decode,
    "context": context,
    "grammar": grammar,
    "update": update,
    "loop": loop,
    "small": small,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("row", nargs="*", help=" | ".join(COMMANDS))
    parser.add_argument("--model", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench_speed.results = {}
    for name in args.row or COMMANDS:
        COMMANDS[name]()
    print(json.dumps({
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "results": bench_speed.results,
    }))
