"""model.py, mosaic.py and train.py on a CUDA card against the CPU; skipped, and said so, where
there is none.

Covered: graphs, masks of fewer kv heads, the grammar, drift, gradients, resuming, the three layouts
in fp32 and bf16. Not covered: several cards, speed (tests/bench_gpu.py)."""
import json

import pytest
import torch

import data
import model as M
import mosaic
import train
from data import tiny

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA card: nothing of it was run on one")
LAYOUTS = {
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "phi3": {"tie_word_embeddings": False},
    "llama": {},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """What is compiled counts against a limit for a process, past which it runs as it is."""
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def base(base_folder):
    return base_folder, *M.load(base_folder, "cpu")


def on_card(path, dtype=None):
    return M.load(path, "cuda", dtype)[0]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def small(layout, device, dtype):
    """A random model with four query heads a kv head, the same on every device."""
    raw = tiny.CONFIG | {
        "model_type": layout,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    }
    config = M.Config(raw | LAYOUTS[layout])
    return M.Transformer(config).init_weights(seeded(0)).to(device, dtype).eval()


def test_episodes_on_the_card_are_those_of_the_cpu(base):
    """A graph that reads stale lengths, a waiting row that writes, a slot that is taken again:
    greedy strict episodes of ragged groups, three times as many as fit at once."""
    path, model, tokenizer = base
    tasks = data.load("train")[:24]
    sizes = [1, 2, 3] * 8
    here = mosaic.rollout(model, tokenizer, tasks, sizes, temperature=0.0, max_rows=16)
    there = mosaic.rollout(on_card(path), tokenizer, tasks, sizes, temperature=0.0, max_rows=16)
    same = [(a, b) for a, b in zip(here, there) if a.ids == b.ids]
    assert len(same) >= len(here) - 1  # one near-tie may fall the other way
    drift = []
    for a, b in same:
        drift += [abs(x - y) for x, y in zip(a.logprobs, b.logprobs)]
    assert max(drift) < 1e-4 and len(drift) > 500


BOUNDS = [
    ("qwen2", torch.float32, 2e-4),
    ("qwen3", torch.float32, 2e-4),
    ("phi3", torch.float32, 2e-4),
    ("llama", torch.float32, 2e-4),
    ("qwen2", torch.bfloat16, 0.06),
]


@pytest.mark.parametrize("layout, dtype, bound", BOUNDS)
@torch.no_grad()
def test_a_step_by_graph_is_the_forward(layout, dtype, bound):
    """A graph of the wrong span or rows: tokens one by one past the border of 512, rows that wait,
    then one row alone, against the whole forward without a cache, in fp32, and in bf16 to its
    rounding."""
    model = small(layout, "cuda", dtype)
    ids = torch.randint(0, 1024, (3, 560), generator=seeded(1)).cuda()
    whole = model.hidden(ids)  # (3, 560, C)
    cache = M.Cache(model.config, 4, 600, "cuda", dtype)
    decode = M.Decoder(model, cache)
    model.hidden(ids[:, :450], cache)
    done = [450] * 3  # positions that each row holds
    for step in range(400):
        n = 3 if step < 120 else 1
        rows = [i for i in range(n) if done[i] < 560 and (step + i) % 3]  # a third waits
        lengths = torch.tensor([int(i in rows) for i in range(n)]).cuda()
        tokens = torch.stack([ids[i, min(done[i], 559)] for i in range(n)])
        cache.bound = max(done)
        hidden = decode(tokens[:, None], lengths)
        # or copy() would leave the newest position behind
        assert cache.bound > max(done[:n])
        for i in rows:
            difference = (hidden[i, 0] - whole[i, done[i]]).abs().max()
            assert difference < bound * whole[i].abs().max()
            done[i] += 1
    assert done[0] == 560 and min(done) > 512
    assert set(decode.graphs) == {(4, 512), (4, 600), (1, 600)}


def logprobs_and_gradients(model, ids, prompt, layout=None):
    """Of all tokens behind the prompt; the model's gradients are cleared first."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, prompt:] = True
    model.zero_grad()
    logprobs = M.token_logprobs(model, ids, mask, layout=layout)
    logprobs.sum().backward()
    return [logprobs.detach(), *(p.grad for p in M.adapter_state(model).values())]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shared_prompt_on_the_card(layout):
    """A mask and fewer kv heads: few fused CUDA kernels take both; without one, (B, H, T, T) scores
    in fp32 are made. The group's values and gradients are those of separate rows, and memory does
    not grow with H x T x T."""
    model = small(layout, "cuda", torch.float32)
    M.add_lora(model, 4, 8, generator=seeded(0))
    with torch.no_grad():
        for p in M.adapter_state(model).values():
            p.normal_(0, 0.05)
    ids = torch.randint(0, 1024, (3, 90), generator=seeded(1)).cuda()
    ids[:, :40] = ids[:1, :40].clone()
    packed = torch.cat((ids[:1, :40], ids[:, 40:].reshape(1, -1)), 1)
    shared = M.SharedPrompt([[40, 50, 50, 50]], "cuda", torch.float32)
    separate = logprobs_and_gradients(model, ids, 40)
    together = logprobs_and_gradients(model, packed, 40, shared)
    for a, b in zip(separate, together):
        assert (a - b).abs().max() <= 1e-4 * max(1, a.abs().max().item())

    model = small(layout, "cuda", torch.bfloat16)
    T = 4096
    shared = M.SharedPrompt([[T // 2, T // 4, T // 4]], "cuda", torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        model.hidden(torch.zeros(1, T, dtype=torch.long, device="cuda"), shared)
    scores = 8 * T * T * 2  # bytes of one layer's scores alone
    assert torch.cuda.max_memory_allocated() - before < scores


def test_the_grammar_never_waits_for_the_card(base):
    """A mask that asks the card for a number stalls each token: any such wait is an error here."""
    g = mosaic.Grammar(base[2], "cuda")
    root = g.names(["read_file", "send_mail"])
    logits = torch.randn(3, g.V, device="cuda")
    states, left = torch.tensor([[g.start, 90], [root, 50], [g.gate_state, 70]]).cuda().T
    plain = mosaic.Grammar(base[2], "cpu")
    plain.names(["read_file", "send_mail"])
    expected = mosaic.constrain(plain, logits.cpu(), states.cpu(), left.cpu(), 1.5)
    mosaic.constrain(g, logits, states, left)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = mosaic.constrain(g, logits, states, left, 1.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), expected) and found.isinf().any()


def test_training_on_the_card_and_going_on(base, tmp_path, monkeypatch, decided):
    """A sampler and a trainer that disagree there, a generator or a state of the wrong device: one
    run of four steps, and one that is stopped before its third and goes on, end with the same
    adapter to the byte."""
    def run(out, *more):
        train.run(train.arguments([
            "--model", str(base[0]), "--tasks", "8", "--steps", "4", "--no-eval",
            "--out", str(tmp_path / out), *more]))
        lines = (tmp_path / out / "metrics.jsonl").read_text("utf-8").splitlines()
        adapter = tmp_path / out / "adapter" / "adapter_model.safetensors"
        return [json.loads(line) for line in lines], adapter.read_bytes()

    log, adapter = run("whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["device"].startswith("cuda")
    assert len(log) == 4 and all(row["drift"] < 1e-3 and row["grad_norm"] > 0 for row in log)

    def stopped(*given, gradient=train.gradient):
        if given[-1] == 2:  # the step
            raise KeyboardInterrupt
        return gradient(*given)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "gradient", stopped)
        run("halves")
    assert run("halves", "--resume")[1] == adapter


def test_a_gradient_on_the_card_is_that_of_the_cpu(base):
    """The same rollouts, the same loss: the adapter's gradient on both devices."""
    path, model, tokenizer = base
    tasks = data.load("train")[:4]
    rollouts = mosaic.rollout(model, tokenizer, tasks, 2, grammar="free", generator=seeded(0))
    found = []
    for other in (M.load(path, "cpu")[0], on_card(path)):
        M.add_lora(other, 8, 16, generator=seeded(0))
        logprobs = mosaic.sampled_logprobs(other, tokenizer, rollouts)
        logprobs.sum().backward()
        results = [logprobs.detach().cpu()]
        for name, p in M.adapter_state(other).items():
            if "lora_B" in name:
                results.append(p.grad.cpu())
        found.append(results)
    for a, b in zip(*found):
        assert (a - b).abs().max() <= 2e-4 * max(1, a.abs().max().item())
