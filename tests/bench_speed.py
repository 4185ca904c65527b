"""How fast, how small: each row of the README's speed table, beside transformers (and peft) on the same weights, tokens
and threads. Nothing in it is a test; weights are random, made once in --work.

    python tests/bench_speed.py decode-tiny           # or any other row below; "all" runs them one after the other
    python tests/bench_speed.py decode --threads 1

Each row prints a table and, last, one JSON line. Times are medians of runs that alternate, ours, theirs, ours, theirs,
so that a busy machine slows both; ratio is theirs / ours for times and memory: above 1, ours is the faster or smaller.
The 0.5B rows and those at V = 152k need Qwen's tokenizer: checkpoints/qwen2.5-7b or ../shared/models/qwen2.5-7b.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import conftest  # noqa: F401  (finds the six files, keeps transformers offline)
import data
import model as model_
import mosaic
import train
from data import tiny
from mosaic import DEAD, SAMPLED, TEMPLATE
from tools import Task, Tool

ROOT = Path(__file__).resolve().parents[1]
HALF = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 32768,
        "hidden_act": "silu", "torch_dtype": "float32", "bos_token_id": 151643, "eos_token_id": 151645}
WORDS = "the note says that a friend of the owner may read it but nobody else should ever see what it holds "


def checkpoint(shape, dtype="float32"):
    """The directory of a random checkpoint: "tiny", or "half", which is Qwen2.5-0.5B's shape."""
    path = args.work / f"{shape}-{dtype}"
    if (path / "config.json").is_file():
        return path
    if shape == "tiny":
        return tiny.build(0, path, steps=1, n=300)
    found = [p for p in (ROOT / "checkpoints", ROOT.parent / "shared" / "models") if (p / "qwen2.5-7b").is_dir()]
    if not found:
        sys.exit("bench_speed.py: no Qwen tokenizer; put one in checkpoints/qwen2.5-7b")
    model = model_.Transformer(model_.Config(HALF)).init_weights(torch.Generator().manual_seed(0))
    model_.save_pretrained(model.to(model_.DTYPES[dtype]), path, found[0] / "qwen2.5-7b")
    (path / "generation_config.json").unlink(missing_ok=True)
    return path


def theirs(path, dtype="float32"):
    from transformers import AutoModelForCausalLM
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=model_.DTYPES[dtype], attn_implementation="sdpa").eval()
    hf.generation_config.eos_token_id = None  # every row samples all its tokens, as ours do here
    return hf


def alternate(repeats, **calls):
    """{name: median seconds}, one warm-up each, runs interleaved."""
    times = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def table(title, head, rows):
    """Prints the rows and remembers them for the JSON line."""
    print(f"\n{title}\n" + "".join(f"{h:>16}" for h in head))
    for row in rows:
        print("".join(f"{x:16.4g}" if isinstance(x, float) else f"{x!s:>16}" for x in row), flush=True)
    results[title] = [dict(zip(head, row)) for row in rows]


# ---- episodes of fixed length: random weights end no turn, so tokens, turns and results are counted beforehand ----
class Counted(mosaic.Episode):
    """Every turn ends by its budget and is answered by a fixed result, until max_turns."""
    result = ""

    def step(self, text, p=None):
        self.sandbox.advance()
        self.turns.append(None)
        self.ended = "budget" if len(self.turns) == self.max_turns else None
        return [] if self.ended else [self.result]


class CountedRow(mosaic.Row):
    """A turn's last token passes for a stop token: else the episode would end with it."""

    def end_turn(self, tokenizer):
        tokenizer.stop_ids = self.dialogue.ids[-1:]
        going = super().end_turn(tokenizer)
        tokenizer.stop_ids = [-1]
        return going


class Prompt(mosaic.Dialogue):
    """A prompt of exactly `length` tokens."""
    length = 0

    def __init__(self, *given):
        super().__init__(*given)
        for part in ("ids", "provenance"):
            setattr(self, part, (getattr(self, part) * (1 + self.length // len(getattr(self, part))))[:self.length])


def fixed(tokenizer, prompt, turn, turns=1, result=0, positions=1):
    """From here on every episode of this tokenizer has exactly these lengths."""
    mosaic.Episode, mosaic.Row, mosaic.Dialogue, tokenizer.stop_ids = Counted, CountedRow, Prompt, [-1]
    Counted.result, Prompt.length = tokenizer.decode(tokenizer.encode(WORDS * 99)[:result]), prompt
    mosaic.LIMITS[tokenizer.family] = dict(max_turns=turns, turn_tokens=turn, positions=positions,
                                           room=turns * (turn + result + 40) + turn)


def sampler(model, tokenizer, rows, prompt, turn, turns=1, result=0, tasks=1):
    """-> a call that samples `rows` episodes of `tasks` tasks, of exactly these lengths, in the free grammar."""
    tool = Tool("read_note", "Read one.", {"type": "object", "properties": {}}, "read", lambda world, arguments: {})
    given = [Task("bench", "benign", "benign", [{"role": "user", "content": "go"}], [tool])] * tasks

    @torch.no_grad()
    def run():
        fixed(tokenizer, prompt, turn, turns, result)
        return mosaic.Sampler(model, tokenizer, given, [rows // tasks] * tasks, grammar="free", max_rows=rows,
                              generator=torch.Generator(model.device).manual_seed(0)).run()
    return run


def generate(hf, ids, new):
    return hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=True, top_k=0, top_p=1.0,
                       temperature=1.0, pad_token_id=0)


# ---- the rows ----
def decode(shape, dtype, batches, new, repeats):
    path, rows = checkpoint(shape, dtype), []
    hf, (model, tokenizer) = theirs(path, dtype), model_.load(path, "cpu", model_.DTYPES[dtype])
    for batch in batches:
        ids = torch.randint(0, 1000, (batch, 128), generator=torch.Generator().manual_seed(0))
        t = alternate(repeats, ours=sampler(model, tokenizer, batch, 128, new, tasks=batch),
                      theirs=lambda: generate(hf, ids, new))
        rows.append((dtype, batch, batch * new / t["ours"], batch * new / t["theirs"], t["theirs"] / t["ours"]))
    table(f"decode {shape}, tokens a second, prompt 128, {new} sampled",
          ("dtype", "batch", "ours", "generate", "ratio"), rows)
    return model, tokenizer


def decode_tiny():
    decode("tiny", "float32", (1, 16, 64), 200, 5)


def decode_half():
    rows = []
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = decode("half", dtype, (1,), 32, 3)
        weights = [p.detach().view(torch.float32) for p in model.parameters()]  # the same pages, whatever they hold
        t = alternate(7, short=sampler(model, tokenizer, 1, 128, 32), long=sampler(model, tokenizer, 1, 128, 96),
                      sum=lambda: [w.sum() for w in weights])
        size = sum(w.nbytes for w in weights)
        read, best = 64 * size / (t["long"] - t["short"]), size / t["sum"]  # a token more, without the prompt
        rows.append((dtype, read / 1e9, best / 1e9, read / best))
    table("weights read while decoding, GB/s", ("dtype", "decode", "a plain sum", "share"), rows)


def group(shape, repeats, turn=48, turns=3, prompt=512, result=64, rows=4):
    """Ours: prefill once, keep every row's cache. Theirs: generate on the whole dialogue again at each turn."""
    path = checkpoint(shape)
    hf, (model, tokenizer) = theirs(path), model_.load(path, "cpu")
    ours = sampler(model, tokenizer, rows, prompt, turn, turns, result)
    rollout = ours()[0]
    spans = rollout.spans
    assert [b - a for a, b in spans] == [turn] * turns and spans[0][0] == prompt, spans
    between = [rollout.ids[b:c] for (_, b), (c, _) in zip(spans, spans[1:])]  # the result tokens that ours appended

    def loop():
        ids = torch.tensor([rollout.ids[:prompt]] * rows)
        for observed in [*between, []]:
            ids = generate(hf, ids, turn)
            ids = torch.cat((ids, torch.tensor([observed] * rows, dtype=torch.long)), 1)
        assert ids.shape == (rows, len(rollout.ids))
    t = alternate(repeats, ours=ours, theirs=loop)
    table(f"group rollout {shape}, s: {rows} rows x {turns} turns, prompt {prompt}, results of {len(between[0])}, "
          f"{turn} sampled a turn", ("ours", "generate loop", "ratio"),
          [(t["ours"], t["theirs"], t["theirs"] / t["ours"])])


def grammar():
    """The step of the sampler with the strict grammar beside the same without any, at V = 151,936."""
    model, tokenizer = model_.load(checkpoint("half"), "cpu")
    rows = []
    for batch in (1, 16):
        logits = torch.randn(batch, tokenizer.vocab_size)
        g, names = mosaic.get_grammar(tokenizer, "cpu"), ["read_note"]
        state, root, token = mosaic.PLAN, g.names(names), tokenizer.encode(" the")[0]
        states, left = (torch.full((batch,), x) for x in (state, 99))
        cache = model_.Cache(model.config, batch, 160, dtype=model.dtype)
        with torch.no_grad():
            model.hidden(torch.zeros(batch, 128, dtype=torch.long), cache)

            def step():
                cache.lengths[:], cache.bound = 128, 128
                model(torch.zeros(batch, 1, dtype=torch.long), cache)

            def strict():  # as Sampler.sample does: the mask beside the logits, the states on the host
                g.constrain(logits, states, left)
                for _ in range(batch):
                    g.forced(g.step(state, root, token))
            t = alternate(15, step=step, strict=strict)
        rows.append((batch, t["step"] * 1e3, t["strict"] * 1e3, t["strict"] / t["step"]))
    table("grammar at V = 151,936, fp32, ms a step", ("batch", "forward", "grammar", "share"), rows)


def product():
    """model.linear beside F.linear, fp32: why it is not F.linear. Weights in turn, so that none waits in the cache."""
    rows = []
    for out, n in ((128, 128), (352, 128), (896, 896), (4864, 896)):
        weights = [torch.randn(out, n) for _ in range(max(2, min(100, 10 ** 8 // (4 * out * n))))]
        for count in (1, 4, 16, 64, 512, 2048):
            x = torch.randn(count, n)
            with torch.no_grad():
                t = alternate(3, ours=lambda: [model_.linear(x, w) for w in weights],
                              theirs=lambda: [torch.nn.functional.linear(x, w) for w in weights])
            rows.append((f"{out} x {n}", count, *(t[k] / len(weights) * 1e6 for k in ("ours", "theirs")),
                         t["theirs"] / t["ours"]))
    table("a product, fp32, us", ("weight", "rows", "linear", "F.linear", "ratio"), rows)


def forced():
    """Strict turns of the tiny base, and of random weights (which chat until the budget ends): how many of the agent's
    tokens needed no forward of their own."""
    rows = []
    data.ensure_base("tiny")
    for name, path in (("the tiny base", "tiny"), ("random", checkpoint("tiny"))):
        model, tokenizer = model_.load(path, "cpu")
        generator = torch.Generator().manual_seed(0)
        done = mosaic.rollout(model, tokenizer, data.load("train")[:32], 2, generator=generator)
        n, own = sum(r.provenance.count(mosaic.FORCED) for r in done), sum(r.n_sampled for r in done)
        rows.append((name, own, n, n / own))
    table("forced tokens, tiny shape, strict grammar", ("weights", "agent's tokens", "forced", "share"), rows)


def peak():
    """MB of this process at its peak, and now. VmHWM counts this program alone; ru_maxrss also what forked it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(status[key].split()[0]) / 1024 for key in ("VmHWM", "VmRSS")]


def worker(*parts):
    """Runs `_name arguments` of this file in a process of its own -> what it printed last, as JSON."""
    command = [sys.executable, __file__, *map(str, parts), "--threads", str(args.threads), "--work", str(args.work)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _load(who):
    path = args.work / "half-float32"
    if who == "theirs":
        from transformers import AutoModelForCausalLM, AutoTokenizer
    before, start = peak()[1], time.perf_counter()
    if who == "ours":
        model, _ = model_.load(path, "cpu")
    else:
        model, _ = AutoModelForCausalLM.from_pretrained(path, dtype="auto"), AutoTokenizer.from_pretrained(path)
    loaded = time.perf_counter() - start
    with torch.no_grad():  # theirs maps the file, and reads it here
        model(torch.zeros(1, 1, dtype=torch.long))
    print(json.dumps([time.perf_counter() - start, loaded, peak()[0] - before]))


def load():
    path, rows = checkpoint("half"), []
    size = (path / "model.safetensors").stat().st_size / 2 ** 20
    for kind in ("cold", "warm"):
        runs = {"ours": [], "theirs": []}
        for who in list(runs) * 3:
            with open(path / "model.safetensors") as file:
                if kind == "cold":
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            runs[who].append(worker("_load", who))
        ours, other = (sorted(runs[w])[1] for w in runs)
        rows.append((kind, ours[0], other[0], other[0] / ours[0], ours[1], other[1], ours[2] / size, other[2] / size))
    table(f"load model and tokenizer, 0.5B shape, fp32 ({size:.0f} MB): seconds to the first token, to the return of "
          "load; peak memory above imports / file",
          ("cache", "ours", "from_pretrained", "ratio", "load ours", "load theirs", "peak ours", "peak theirs"), rows)


def batch_of(G, P, R, V):
    """One judged group of G random trajectories, as train.accumulate takes it, and its ids (G, P + R)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V - 1000, (G, P + R), generator=generator)
    ids[:, :P] = ids[:1, :P].clone()
    group = [mosaic.Rollout(None, [], None, "answer", [], row, [TEMPLATE] * P + [SAMPLED] * R, [-12.0] * R,
                            [(DEAD, 1)] * R, [(P, P + R)]) for row in ids.tolist()]
    adv = torch.linspace(-1, 1, G)
    return SimpleNamespace(groups=[group], adv=[adv], P=[torch.zeros(G, G)], n_tokens=G * R), ids, adv


def with_peft(model, recompute):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def peft_update(model, ids, adv, P):
    """Reference, policy, loss and backward of separate rows ids (G, P + R), with all logits of the completions."""
    def logprobs():
        logits = model(input_ids=ids, logits_to_keep=ids.shape[1] - P + 1, use_cache=False).logits[:, :-1]
        return logits.gather(2, ids[:, P:, None])[..., 0] - logits.logsumexp(2)  # (G, R)
    with torch.no_grad(), model.disable_adapter():
        ref = logprobs()
    new = logprobs()
    train.grpo_loss(new, torch.full_like(new, -12.0), ref, adv[:, None], new.numel())[0].backward()


def _step(who, shape, G, P, R, option):
    """One GRPO step, LoRA r = 16 on every linear layer: reference, policy, loss, backward, AdamW."""
    G, P, R, path = int(G), int(P), int(R), args.work / f"{shape}-float32"
    if who == "ours":
        model, tokenizer = model_.load(path, "cpu")
        model_.add_lora(model, 16, 32, generator=torch.Generator().manual_seed(0))
        model.recompute = option == "recompute"
        batch, ids, adv = batch_of(G, P, R, tokenizer.vocab_size)
        mosaic.get_grammar(tokenizer, "cpu")
        given = SimpleNamespace(objective="grpo", micro_tokens=P + G * R, gate="learned", kl_coef=0.02)
    else:
        model = with_peft(theirs(path), option == "recompute")
        batch, ids, adv = batch_of(G, P, R, model.config.vocab_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    before, start = peak()[1], time.perf_counter()
    if who == "ours":
        train.accumulate(model, tokenizer, batch, given)
    else:
        peft_update(model, ids, adv, P)
    optimizer.step()
    print(json.dumps([time.perf_counter() - start, peak()[0], before]))


def step(shape="half", G=4, P=512, R=256):
    checkpoint(shape)
    rows = []
    for option in ("plain", "recompute"):
        ours, other = (worker("_step", who, shape, G, P, R, option) for who in ("ours", "theirs"))
        rows.append((option, ours[0], other[0], other[0] / ours[0], ours[1] / 1024, other[1] / 1024,
                     other[1] / ours[1]))
    table(f"GRPO step, LoRA r = 16, {shape} shape, fp32, group {G}, P {P}, R {R}: seconds; GB at the peak with weights",
          ("blocks", "ours", "peft", "ratio", "GB ours", "GB peft", "ratio "), rows)


def _logprobs(B, T, kind):
    C, V, B, T = 896, 151936, int(B), int(T)
    g = torch.Generator().manual_seed(0)
    weight, h = torch.randn(V, C, generator=g) * 0.02, torch.randn(B, T, C, generator=g).requires_grad_()
    ids, mask = torch.randint(0, V, (B, T), generator=g), torch.ones(B, T, dtype=torch.bool)
    mask[:, 0] = False
    stub = SimpleNamespace(hidden=lambda ids, layout=None: h, head=lambda x: torch.nn.functional.linear(x, weight))
    before, start = peak()[1], time.perf_counter()
    if kind == "full":
        logits = stub.head(h)[:, :-1].flatten(0, 1)
        lp = -torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    else:
        lp = model_.token_logprobs(stub, ids, mask)
    lp.sum().backward()
    seconds, top = time.perf_counter() - start, peak()[0] - before
    torch.save((lp.detach(), h.grad), args.work / f"logprobs-{kind}.pt")
    print(json.dumps([seconds, top]))


def logprobs():
    full, ours = (worker("_logprobs", 2, 512, kind) for kind in ("full", "chunks"))
    a, b = (torch.load(args.work / f"logprobs-{kind}.pt") for kind in ("full", "chunks"))
    worst = [(x - y).abs().max().item() for x, y in zip(a, b)]
    big = worker("_logprobs", 8, 2048, "chunks")
    table("logprobs at V = 151,936, C = 896, fp32: seconds, MB above the inputs, largest |difference| to full logits",
          ("B x T", "full s", "chunks s", "full MB", "chunks MB", "of (B, T, V)", "value", "gradient"),
          [("2 x 512", full[0], ours[0], full[1], ours[1], ours[1] * 2 ** 20 / (2 * 512 * 151936 * 4), *worst),
           ("8 x 2048", "-", big[0], "-", big[1], big[1] * 2 ** 20 / (8 * 2048 * 151936 * 4), "-", "-")])


def prefix(G=4, R=256):
    """Logprobs of a group and their gradient, LoRA r = 16: the prompt once, beside one row for each rollout."""
    rows = []
    for shape, config in (("tiny", tiny.CONFIG), ("half / 6", HALF | {"num_hidden_layers": 4, "vocab_size": 25600})):
        model = model_.Transformer(model_.Config(config | {"torch_dtype": "float32"}))
        model_.add_lora(model, 16, 32)
        for P in (256, 1024, 4096):
            ids = batch_of(G, P, R, 2000)[1]
            packed = torch.cat((ids[:1, :P], ids[:, P:].reshape(1, -1)), 1)

            def run(ids, layout):
                mask = torch.zeros_like(ids, dtype=torch.bool)
                mask[:, P:] = True
                model.zero_grad()
                model_.token_logprobs(model, ids, mask, layout=layout).sum().backward()
            calls = dict(shared=lambda: run(packed, model_.SharedPrompt([[P] + [R] * G])),
                         rows=lambda: [run(row[None], None) for row in ids])
            t = alternate(1, **calls)
            print(shape, P, t, file=sys.stderr)
            rows.append((shape, P, G * (P + R), P + G * R, t["rows"], t["shared"], t["rows"] / t["shared"]))
    table(f"shared prefix in the update, group {G}, R {R}, LoRA r = 16, fp32, both passes; half / 6: a sixth of "
          "the 0.5B shape's layers and vocabulary",
          ("shape", "P", "tokens rows", "tokens shared", "rows s", "shared s", "ratio"), rows)


def scaling():
    """Step time against context, group size, prompt length and LoRA rank; tiny shape, fp32."""
    model, tokenizer = model_.load(checkpoint("tiny"), "cpu")
    rows = []
    for context in (256, 512, 1024, 2048, 4096, 8192):
        for batch in (1, 16):
            cache = model_.Cache(model.config, batch, context + 8, dtype=model.dtype)
            with torch.no_grad():
                def one():
                    cache.lengths[:], cache.bound = context, context
                    model(torch.zeros(batch, 1, dtype=torch.long), cache)
                rows.append(("context", context, batch, alternate(30, one=one)["one"] * 1e3))
    for n in (1, 2, 4, 8, 16, 32, 64):
        rows.append(("group", n, n, alternate(3, one=sampler(model, tokenizer, n, 256, 64))["one"] / 64 * 1e3))
    for prompt in (256, 512, 1024, 2048, 4096):
        ids = torch.zeros(1, prompt, dtype=torch.long)
        with torch.no_grad():
            rows.append(("prefill", prompt, 1, alternate(5, one=lambda: model.hidden(ids))["one"] * 1e3))
    for rank in (0, 4, 16, 64):
        model, tokenizer = model_.load(checkpoint("tiny"), "cpu")
        if rank:
            model_.add_lora(model, rank, 2 * rank)
        run = sampler(model, tokenizer, 16, 128, 64)
        rows.append(("rank", rank, 16, alternate(3, one=run)["one"] / 64 * 1e3))
    table("cost as work grows, tiny shape: ms a decoded step (prefill: of the whole prompt)",
          ("against", "value", "rows", "ms"), rows)


def training(path, out, *more):
    """Arguments of a short training run in which every pair is won by one side: an untrained base ties everywhere."""
    judged = mosaic.__dict__.setdefault("_judged", train.compare)
    train.compare = lambda judge, group, ledger=None: judged(lambda a, b: float(sum(a.ids) > sum(b.ids)), group, ledger)
    train.canaries = lambda judge, step: None  # this one would fail them
    return train.arguments(["--model", str(path), "--out", str(out), "--no-eval", *more])


def fixed_training(loaded, path, out, lengths, *more):
    """The same with a (model, tokenizer) at hand, all episodes of the `lengths` that `fixed` takes."""
    fixed(loaded[1], *lengths)
    model_.load, model_.find = lambda _: loaded, lambda _: path
    # past rollout's look at the stop ids, of which there is none here
    train.rollout = torch.no_grad()(lambda *given, **options: mosaic.Sampler(*given, **options).run())
    return training(path, out, *more)


def where():
    """Where a training step's time goes. 0.5B shape: a task of 4 trajectories and a watched one, prompt 512, 3 turns of
    48 tokens with results of 64 between."""
    parts, rows = ((mosaic.Sampler, "run", "sampling"), (mosaic.Sampler, "admit", "prefill"),
                   (mosaic.Sampler, "forward", "decode"), (mosaic.Sampler, "sample", "draw"),
                   (train, "Batch", "judging"), (train, "gradient", "gradient")), []
    real = {name: getattr(owner, name) for owner, name, _ in parts}
    for shape in ("tiny", "half"):
        path, out = checkpoint(shape), args.work / "where"
        spent = dict.fromkeys([label for *_, label in parts], 0.0)
        for owner, name, label in parts:
            def timed(*a, _call=real[name], _label=label, **k):
                start = time.perf_counter()
                try:
                    return _call(*a, **k)
                finally:
                    spent[_label] += time.perf_counter() - start
            setattr(owner, name, timed)
        if shape == "tiny":
            given = training(path, out, "--steps", "3")
        else:
            train.N_FROZEN = 1
            given = fixed_training(model_.load(path, "cpu"), path, out, (512, 48, 3, 64, 8192), "--steps", "1",
                                   "--tasks", "1")
        start = time.perf_counter()
        train.run(given)
        total = time.perf_counter() - start
        host = spent["sampling"] - spent["prefill"] - spent["decode"] - spent["draw"]
        rest = total - spent["sampling"] - spent["judging"] - spent["gradient"]
        rows.append((shape, total, *(spent[k] / total for k in ("prefill", "decode", "draw")), host / total,
                     *(spent[k] / total for k in ("judging", "gradient")), rest / total))
    table("where a training step's time goes: seconds, then shares (sandbox: parsing, tools, dialogues; rest: loading)",
          ("shape", "seconds", "prefill", "decode", "draw", "sandbox", "judging", "gradient", "rest"), rows)


def processes():
    """Data-parallel: seconds a step of one process with one thread, and of two."""
    path, seconds = checkpoint("tiny"), {}
    for n in (1, 2):
        out = args.work / f"processes{n}"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
        subprocess.run([*torchrun, str(ROOT / "train.py"), "--model", str(path), "--out", str(out), "--steps", "4",
                        "--no-eval"], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        seconds[n] = statistics.median(row["seconds"] for row in steps[1:])
    table("processes by torchrun (gloo), one thread each, tiny: seconds a step", ("one", "two", "ratio"),
          [(seconds[1], seconds[2], seconds[1] / seconds[2])])


COMMANDS = {"decode-tiny": decode_tiny, "decode-half": decode_half, "group-tiny": lambda: group("tiny", 5),
            "group-half": lambda: group("half", 1), "grammar": grammar, "forced": forced, "load": load, "step": step,
            "logprobs": logprobs, "prefix": prefix, "scaling": scaling,
            "where": where, "processes": processes, "product": product}
WORKERS = {"_load": _load, "_step": _step, "_logprobs": _logprobs}

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("row", choices=[*COMMANDS, "all", *WORKERS], metavar=" | ".join([*COMMANDS, "all"]))
    p.add_argument("more", nargs="*", help=argparse.SUPPRESS)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--work", type=Path, default=ROOT / "runs" / "bench", help="where the random checkpoints go: 4 GB")
    args, results = p.parse_args(), {}
    torch.set_num_threads(args.threads)
    if args.row in WORKERS:
        WORKERS[args.row](*args.more)
    elif args.row == "all":  # each in a process of its own: some put other parts in place of the six files'
        for name in COMMANDS:
            subprocess.run([sys.executable, __file__, name, *sys.argv[2:]], check=True)
    else:
        args.work.mkdir(parents=True, exist_ok=True)
        COMMANDS[args.row]()
        print(json.dumps({"threads": args.threads, "torch": torch.__version__, "results": results}))
