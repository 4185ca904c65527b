"""The model: one decoder for three families, its KV cache, LoRA adapter, checkpoint files and tokenizer.

Qwen2.5 (biases on q, k, v), Qwen3 (an RMSNorm on every head of q and k) and Phi-4 (fused qkv and gate|up) are one
pre-norm decoder with rotary positions and grouped-query attention: three booleans tell them apart; `tiny` is a small
Qwen2. Modules are named as checkpoints name their tensors: `state_dict()` IS the file. Of the paper's parts, the policy
is `Transformer`, the reference the same weights under `adapter_off()`, log-probabilities are `token_logprobs`.

Deviations, all [ours]:
1. The policy is a LoRA adapter on a frozen base (the paper does not say which parameters it trained).
2. Plain text is encoded with a vocabulary that holds no control token: no text can ever become one.
3. Arithmetic rounds where transformers and peft round: logits (fp32: within 1e-5) and files are theirs. What
   `Decoder` compiles keeps more digits between its operations.

Shapes: B rows, T tokens of this call, S cached positions read, M positions a cache holds, C width, H heads, K kv heads,
D head dim (H * D != C for Qwen3-4B), V vocabulary rows, L layers, N selected tokens.

    python -c "import model; m, t = model.load('tiny'); print(t.family, sum(p.numel() for p in m.parameters()))"
prints tiny 1067136 (once data/tiny.py has built it). Next: mosaic.py, the loop around it."""
import contextlib
import functools
import json
import math
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as BPE
from tokenizers import models
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

HERE = Path(__file__).resolve().parent
CHECKPOINTS = {"tiny": None, "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
               "qwen3-4b-thinking": "Qwen/Qwen3-4B-Thinking-2507", "phi-4": "microsoft/phi-4"}
FAMILY = {"qwen2": "qwen2.5", "qwen3": "qwen3", "phi3": "phi-4"}  # config.json's model_type -> family
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMAT = {"format": "pt"}  # metadata that transformers insists on
ONEDNN = torch.backends.mkldnn.is_available()  # without it a convolution is slow
RECOMPUTE = {"use_reentrant": False, "preserve_rng_state": False}  # of checkpoint()

def read_json(path):
    """The JSON object in a file, or a ValueError of one line that names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        raise ValueError("it should be an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None

def read_lines(path):
    """The whole lines of a .jsonl file; [] if there is none. They end at line breaks alone, for JSON may hold other
    separators, and what comes after the last was cut by a kill."""
    path = Path(path)
    return path.read_text("utf-8", "replace").split("\n")[:-1] if path.is_file() else []

def required(raw, key, kind, where):
    """raw[key]: there, of type kind (true is no 1, an int is a float), if a number above 0 and below 2^53."""
    value, number = raw.get(key), kind in (int, float)
    if value is None:
        raise ValueError(f"{where}: missing key '{key}'")
    if type(value) not in ((int, float) if kind is float else (kind,)) or (number and not 0 < value < 2 ** 53):
        bounds = " above 0, below 2^53" if number else ""
        raise ValueError(f"{where}: '{key}' is {value!r}, expected {kind.__name__}{bounds}")
    return value

class Config:
    """A config.json in either dialect: hub files (rope_theta, rope_scaling, torch_dtype) or transformers 5
    (rope_parameters, dtype). Numbers keep the file's names. ValueError: a missing key, or what we would not honour."""

    def __init__(self, raw, where="config.json"):
        name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
        self.raw, rope = raw, {**raw, **(required(raw, name, dict, where) if raw.get(name) else {})}
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "vocab_size", "max_position_embeddings"):
            setattr(self, key, required(raw, key, int, where))
        self.rms_norm_eps, act = required(raw, "rms_norm_eps", float, where), required(raw, "hidden_act", str, where)
        self.rope_theta, kind = required(rope, "rope_theta", float, where), required(raw, "model_type", str, where)
        self.tied = required(raw, "tie_word_embeddings", bool, where)
        self.qkv_bias, self.qk_norm, self.fused = kind == "qwen2", kind == "qwen3", kind == "phi3"
        self.family = "tiny" if raw.get("mosaic_family") == "tiny" else FAMILY.get(kind)
        self.dtype_key = "torch_dtype" if raw.get("dtype") is None else "dtype"
        self.dtype = DTYPES.get(required(raw, self.dtype_key, str, where))
        C, H, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        D = C / H if raw.get("head_dim") is None else required(raw, "head_dim", int, where)
        self.head_dim, rope_type = int(D), rope.get("rope_type") or rope.get("type") or "default"
        # Qwen files name a window and switch it off beside it; Phi-3 has no switch: a window that is there is on
        window = raw.get("use_sliding_window", raw.get("sliding_window") is not None)
        for wrong, what in ((kind not in FAMILY, f"model_type '{kind}' (none of {', '.join(FAMILY)})"),
                            (self.dtype is None, f"{self.dtype_key} '{raw[self.dtype_key]}'"),
                            (act != "silu", f"hidden_act '{act}'"), (rope_type != "default", f"rope '{rope_type}'"),
                            (rope.get("partial_rotary_factor") not in (None, 1), "a partial_rotary_factor"),
                            (window or "sliding_attention" in str(raw.get("layer_types")), "a sliding window"),
                            (raw.get("attention_bias"), "attention_bias"),
                            (H % K or D % 2, f"{H} heads and {K} kv heads on width {C} do not divide: it")):
            if wrong:
                raise ValueError(f"{where}: {what} is not supported")

def linear(x, weight, bias=None):
    """F.linear(x, weight, bias), x (..., in). On a CPU in fp32 that is MKL's product, which has half of an AMD's speed:
    many rows go as a convolution of width 1, which is oneDNN's, a few long ones as a batch of parts, a thread each.
    Below the sizes named here it gains nothing: `python tests/bench_speed.py product`."""
    rows, n = x.numel() // x.shape[-1], x.shape[-1]
    if rows == 1 and torch.compiler.is_compiling():
        # a kernel made for it: on a CPU F.linear would be oneDNN's, on a card, with the bias inside, cuBLAS's
        y = F.linear(x, weight) if x.is_cuda else (weight * x.flatten()).sum(-1).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    if n < 512 and rows < 256 or not ONEDNN or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if rows >= 128:
        y = F.conv2d(x.reshape(1, rows, 1, n).permute(0, 3, 1, 2), weight[:, :, None, None], bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
    parts = math.gcd(len(weight), 16)
    x_, W = x.reshape(1, rows, n).expand(parts, rows, n), weight.unflatten(0, (parts, -1))
    if rows == 1 or x.numel() <= 6144:  # x stays in the 32 KB next to a core while the weight streams by, once
        y = (W @ x_.mT).flatten(0, 1).mT  # (parts, out / parts, rows) -> (rows, out)
    else:
        y = (x_ @ W.mT).transpose(0, 1)  # (rows, parts, out / parts)
    y = y.reshape(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias

class Linear(nn.Linear):
    """W x + b, and (alpha / r) B A x on top once `add_lora` gave it A and B: the base keeps its tensor names."""
    scale = 0  # of the adapter, where there is one

    def reset_parameters(self):
        """Left to init_weights: nn.Linear's own, on meta, imports 800 modules: 1.5 s and 70 MB a start."""

    def forward(self, x):
        if self.scale == 0:
            return linear(x, self.weight, self.bias)
        z = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        y = linear(x, self.weight, self.bias)  # after z: Block's recomputation ends before it, at z's last input
        return y.add_(z.mul_(self.scale))  # in fp32 and in this order, rounded once: bit for bit what peft computes

class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        # fp32 inside, x's dtype again BEFORE the weight, as transformers does; F.rms_norm's own weight would round once
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)

class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        C, H, K, D, I = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size
        self.layer, self.heads, self.fused, self.qk_norm = layer, (H, K, D), c.fused, c.qk_norm
        heads = {"qkv_proj": H + 2 * K} if c.fused else {"q_proj": H, "k_proj": K, "v_proj": K}
        self.self_attn = nn.ModuleDict({name: Linear(C, n * D, bias=c.qkv_bias) for name, n in heads.items()})
        self.self_attn["o_proj"] = Linear(H * D, C, bias=False)
        wide = {"gate_up_proj": 2 * I} if c.fused else {"gate_proj": I, "up_proj": I}
        self.mlp = nn.ModuleDict({name: Linear(C, n, bias=False) for name, n in wide.items()})
        self.mlp["down_proj"] = Linear(I, C, bias=False)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(C, c.rms_norm_eps), RMSNorm(C, c.rms_norm_eps)
        if c.qk_norm:
            self.self_attn.update({"q_norm": RMSNorm(D, c.rms_norm_eps), "k_norm": RMSNorm(D, c.rms_norm_eps)})

    def project(self, x, cos, sin):
        """x (B, T, C) -> q (B, H, T, D), k and v (B, K, T, D), all that comes before attention."""
        m, (B, T, _), (H, K, D), x = self.self_attn, x.shape, self.heads, self.input_layernorm(x)
        q, k, v = (m.qkv_proj(x).split((H * D, K * D, K * D), -1) if self.fused
                   else (m.q_proj(x), m.k_proj(x), m.v_proj(x)))  # (B, T, H * D), twice (B, T, K * D)
        q, k, v = q.view(B, T, H, D), k.view(B, T, K, D), v.view(B, T, K, D).transpose(1, 2)
        if self.qk_norm:
            q, k = m.q_norm(q), m.k_norm(k)
        # dim i is paired with i + D / 2, not with i + 1: roll swaps the halves, rotate_half's minus is in sin already
        return *(y * cos + y.roll(D // 2, -1) * sin for y in (q.transpose(1, 2), k.transpose(1, 2))), v

    def attend(self, q, k, v, cache):
        """-> (B, T, H * D)"""
        B, (H, K, D), T, mask = len(q), self.heads, q.shape[2], None if cache is None else cache.mask
        if mask is None or mask.shape[2] == T:
            if mask is not None and q.is_cuda and H != K:  # not every fused kernel takes a mask and fewer heads of k, v
                k, v = (y.repeat_interleave(H // K, 1) for y in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=k.shape[1] != H)
        else:  # the H / K query heads of a kv head become H / K * T queries of one: k and v are not copied for each
            y = F.scaled_dot_product_attention(q.reshape(B, K, H // K * T, D), k, v, mask)
        # reshape, not view: a CUDA kernel may leave heads inside of positions
        return y.reshape(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)

    def down(self, gate, up):
        return self.mlp.down_proj(F.silu(gate) * up)

    def finish(self, x, y):
        """The block's input (B, T, C) and its attention (B, T, H * D) -> its output (B, T, C)."""
        x, m = x + self.self_attn.o_proj(y), self.mlp
        h = self.post_attention_layernorm(x)
        gate, up = m.gate_up_proj(h).chunk(2, -1) if self.fused else (m.gate_proj(h), m.up_proj(h))
        # on a frozen base keep gate and up alone, a third less memory a block: their product is cheap to make again
        again = gate.requires_grad and not m.down_proj.weight.requires_grad
        return x + (checkpoint(self.down, gate, up, **RECOMPUTE) if again else self.down(gate, up))

    def forward(self, x, cos, sin, cache, parts):
        """parts: project and finish, as they are or as `compiled` made them."""
        q, k, v = parts[0](self, x, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, K, T or S, D)
        return parts[1](self, x, self.attend(q, k, v, cache))

class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size, _weight=torch.empty(c.vocab_size, c.hidden_size)),
            "layers": nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers)),
            "norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})
        if not c.tied:
            self.lm_head = Linear(c.hidden_size, c.vocab_size, bias=False)
        # a plain attribute: model.to(bfloat16) would round a buffer, and logits would move by 0.05
        self.inv_freq = 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device="cpu").float() / c.head_dim)
        self.lora, self.adapter_scale = None, 1  # {"r", "lora_alpha", "target_modules"} once there is an adapter
        self.recompute = False  # True: training keeps one input a block (the 14B in 80 GB needs it)
        if self.device.type != "meta":
            self.init_weights()

    device = property(lambda self: self.model.norm.weight.device)
    dtype = property(lambda self: self.model.norm.weight.dtype)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Fresh weights: matrices normal(0, 0.02), biases 0, norms 1."""
        for name, p in self.named_parameters():
            p[...] = torch.randn(p.shape, generator=generator) * 0.02 if p.dim() > 1 else float("norm" in name)
        return self

    def hidden(self, ids, cache=None, lengths=None, rows=None, parts=(Block.project, Block.finish)):
        """ids (B, T) -> (B, T, C) after the final norm. Without a cache: causal; rows are right-padded, and no padding
        reaches a real token. With a Cache: row i is cache row rows[i] (None: the first B rows, in place); its token t
        is at cache.lengths[row] + t and sees all up to there; lengths (B,): how many are real (None: T; 0: it waits).
        A SharedPrompt may stand in a cache's place: see there. parts: see Block."""
        x = self.model.embed_tokens(ids)  # (B, T, C)
        at = torch.arange(ids.shape[1], device=ids.device)[None] if cache is None else cache.begin(ids, lengths, rows)
        self.inv_freq = self.inv_freq.to(ids.device)
        angle = at[:, None, :, None] * torch.cat((-self.inv_freq, self.inv_freq))  # (B or 1, 1, T, D), in fp32
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)  # once for all layers, as is the cache's mask
        recompute, given = self.recompute and torch.is_grad_enabled(), (cos, sin, cache, parts)
        for block in self.model.layers:
            x = checkpoint(block, x, *given, **RECOMPUTE) if recompute else block(x, *given)
        return self.model.norm(x)

    def head(self, h):
        """h (..., C) -> logits (..., V) in the model's dtype: upcast before any softmax."""
        return linear(h, self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight)

    def forward(self, ids, cache=None, lengths=None, rows=None):
        """ids (B, T) -> logits (B, T, V); arguments as in `hidden`."""
        return self.head(self.hidden(ids, cache, lengths, rows))

    def set_adapter_scale(self, scale):
        """Weighs the adapter: 1 as trained, 0 the base exactly."""
        self.adapter_scale = scale
        for layer in lora_layers(self).values():
            layer.scale = scale * self.lora["lora_alpha"] / self.lora["r"]

    @contextlib.contextmanager
    def adapter_off(self):
        """The base, which is the reference policy, inside the block; after it, the scale that was set before."""
        before = self.adapter_scale
        self.set_adapter_scale(0)
        try:
            yield
        finally:
            self.set_adapter_scale(before)

PARTS = Block.project, Block.finish, Transformer.head  # what `compiled` may make faster

class Cache:
    """Keys and values k, v (L, rows, K, M, D) and lengths (rows,), what each row holds. `bound` is a host integer
    >= max(lengths): reads stop there without asking the device. A caller who knows better may lower it."""

    def __init__(self, config, rows, max_len, device=None, dtype=None):
        M = (max_len + 8) // 8 * 8  # one spare slot or more, where a full row's padding is written
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, M, config.head_dim)
        # zeros, not empty: a masked position has weight 0, and 0 * NaN is NaN
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype or config.dtype) for _ in "kv")
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.max_len, self.bound, self.group = max_len, 0, config.num_attention_heads // config.num_key_value_heads

    def begin(self, ids, lengths, rows):
        """Opens a forward of ids (B, T): fixes where its tokens are written and what they see -> positions (B, T)."""
        assert not torch.is_grad_enabled(), "a cache is for sampling: call under torch.no_grad()"
        (B, T), device = ids.shape, ids.device
        self.rows = slice(0, B) if rows is None else rows  # a slice is a view: decoding all rows copies nothing
        self.write = (torch.arange(B, device=device) if rows is None else rows)[:, None]  # (B, 1)
        start = self.lengths[self.rows]
        at = start[:, None] + torch.arange(T, device=device)  # (B, T)
        self.ends = start + (T if lengths is None else lengths)
        empty, self.bound = self.bound == 0, self.bound + T
        if self.bound > self.max_len:  # the exact answer is worth a wait for the device only here
            self.bound = max(int(self.ends.max()), int(self.lengths.max()))
            assert self.bound <= self.max_len, f"cache of {self.max_len} positions, {self.bound} needed"
        self.slot = at.clamp(max=self.k.shape[3] - 1)  # (B, T)
        self.span = min((self.bound + 7) // 8 * 8, self.k.shape[3])  # S: fused kernels want masks of a multiple of 8
        self.mask = None  # an empty cache: the chunk sees only itself, and is_causal does it
        if not empty:  # token t of a row sees positions <= lengths + t; is_causal would align to the upper left
            seen = torch.arange(self.span, device=device) <= at[:, :, None]  # (B, T, S)
            self.mask = as_bias(seen.repeat(1, self.group, 1), self.k.dtype)  # (B, 1, H / K * T, S), see attend
        self.lengths[self.rows] = self.ends
        return at

    def extend(self, layer, k, v):
        """Stores a layer's k, v (B, K, T, D) -> what its queries look at, (B, K, T or S, D)."""
        self.k[layer][self.write, :, self.slot] = k.transpose(1, 2)  # indices around a slice put B, T first
        self.v[layer][self.write, :, self.slot] = v.transpose(1, 2)
        if self.mask is None:
            return k, v
        return self.k[layer][self.rows, :, :self.span], self.v[layer][self.rows, :, :self.span]

    def copy(self, src, dst, other=None):
        """Row src (of `other`, if given) becomes rows dst (list): a prompt filled once and forked, or compaction."""
        source = other or self
        for mine, theirs in ((self.k, source.k), (self.v, source.v)):
            mine[:, dst, :, :source.bound] = theirs[:, [src], :, :source.bound]  # [src] copies: dst may include src
        self.lengths[dst] = source.lengths[[src]]
        self.bound = max(self.bound, source.bound)

@functools.cache
def compiled(device, tune):
    """Block's parts before and after attention, and the head, as fewer, longer kernels, the same for all layers. tune:
    matrix times vector, too, is a kernel made for it (with an adapter that takes half a minute: not worth it)."""
    warnings.filterwarnings("ignore", "TensorFloat32")  # torch's advice to round the adapter's fp32 products
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except RuntimeError as error:  # there is no C compiler
        why = str(error).removeprefix("backend='inductor' raised:\n").split("\n")[0]
        print(f"decoding is not compiled, and so 10 to 40 % slower: {why}", file=sys.stderr)
        return PARTS
    return [torch.compile(part, options={"coordinate_descent_tuning": tune}) for part in PARTS]

class Decoder:
    """`model.hidden` of one token for each of a cache's first rows. A CUDA card has done a block long before the host
    has started its 30 kernels one by one: there a step is a graph, one launch in all, of compiled blocks. A graph is
    fixed in shape, so there is one for every power of two of rows and 512 positions read. On a CPU a lone row of 16-bit
    numbers is compiled: oneDNN would read its weights at half of the memory's speed."""

    def __init__(self, model, cache):
        self.model, self.cache, self.graphs, self.pool = model, cache, {}, None
        self.lengths = torch.zeros_like(cache.lengths)
        self.ids = self.lengths[:, None].clone()
        lone = model.device.type == "cpu" and len(self.ids) == 1 and model.dtype != torch.float32
        self.parts = compiled(model.device, False) if lone else PARTS

    def __call__(self, ids, lengths):
        """ids (B, 1), lengths (B,): 1, or 0 for a row that waits -> (B, 1, C), valid until the next call."""
        cache, n = self.cache, len(ids)
        if not ids.is_cuda:
            return self.model.hidden(ids, cache, lengths, parts=self.parts)
        assert cache.bound <= cache.max_len, f"cache of {cache.max_len} positions, {cache.bound} held"
        self.ids[:n], self.lengths[:n], self.lengths[n:] = ids, lengths, 0  # rows that fill up a power of two wait
        rows, end = min(1 << (n - 1).bit_length(), len(self.ids)), min((cache.bound + 512) // 512 * 512, cache.max_len)
        cache.bound = end - 1  # with the token begin() reads up to `end`
        if (rows, end) not in self.graphs:  # first as it is: what compiles or sets itself up is no part of a graph
            self.graphs[rows, end] = None
            return self.step(rows)[:n]
        if self.graphs[rows, end] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool):
                self.graphs[rows, end] = graph, self.step(rows)
            self.pool = graph.pool()  # one for all: they never run at the same time
        graph, out = self.graphs[rows, end]
        graph.replay()
        cache.bound = end  # as begin() leaves it
        return out[:n]

    def step(self, rows):
        parts = compiled(self.model.device, rows == 1 and self.model.lora is None)
        return self.model.hidden(self.ids[:rows], self.cache, self.lengths[:rows], parts=parts)

    def head(self, h):
        return self.parts[2](self.model, h)

class SharedPrompt:
    """Stands in a cache's place where rows would repeat a prompt: row b holds the prompt once and then each of its
    completions, P + G R tokens for G completions of R, not G (P + R). parts: each row's lengths, the prompt's first.
    Values and gradients are those of separate rows. before (B, T): the token that predicts each."""

    def __init__(self, parts, device=None, dtype=None):
        part = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in parts]
        at = [torch.cat([torch.arange(n) + row[0] * (i > 0) for i, n in enumerate(row)]) for row in parts]
        part, at = (pad_sequence(x, True, -1).to(device) for x in (part, at))  # (B, T), -1: padding, sees padding alone
        prompt = torch.tensor([row[0] for row in parts], device=device)[:, None]
        self.predictor = torch.where((part > 0) & (at == prompt), prompt, torch.arange(at.shape[1], device=device)) - 1
        seen = (part[:, None] == part[:, :, None]) | (part[:, None] == 0)
        # (B, T), (B, 1, T, T); without branches it is plain causal attention, which a card does faster without a mask
        self.at, branches = at, max(map(len, parts)) > 2
        self.mask = as_bias(seen & (at[:, None] <= at[:, :, None]), dtype) if branches else None

    def begin(self, ids, lengths, rows):
        return self.at

    def extend(self, layer, k, v):
        return k, v

def as_bias(seen, dtype):
    """seen (B, T, S) bool -> (B, 1, T, S) to add to scores: once a forward; SDPA would do it in each layer."""
    return torch.zeros(seen.shape, device=seen.device, dtype=dtype).masked_fill(~seen, -torch.inf)[:, None]

def token_logprobs(model, ids, mask, temperature=1.0, constrain=None, chunk=None, layout=None):
    """log p(ids[b, t] | ids[b, :t]) where mask (B, T) is True -> (N,) fp32, row-major.
    constrain(logits (n, V), index (n,)) -> logits, after the temperature: the grammar's mask, the gate's bias; index
    counts within the N. layout: the SharedPrompt that laid ids out: before a token come its prompt and its own completion.
    Only `chunk` rows of logits exist at a time (by default 64 MB, at most 1,024), never (N, V)."""
    assert not mask[:, 0].any(), "nothing comes before the first token: mask[:, 0] must be False"
    row, t = mask.nonzero(as_tuple=True)
    before = t - 1 if layout is None else layout.predictor[row, t]
    # as an embedding's rows: several tokens may have one `before`, and indexing would add their gradients in any order
    h = F.embedding(row * ids.shape[1] + before, model.hidden(ids, layout).flatten(0, 1))  # (N, C)
    targets = ids[row, t]  # (N,)

    def piece(h, targets, index):
        logits = model.head(h).float() / temperature  # (n, V)
        return -F.cross_entropy(logits if constrain is None else constrain(logits, index), targets, reduction="none")

    # 64 MB each: glibc keeps freed blocks below 32 MB, and with chunks of that size 14 GB of them were seen
    chunk = chunk or min(1024, 2 ** 24 // model.head(h[:0]).shape[-1])
    chunks = zip(*(x.split(chunk) for x in (h, targets, torch.arange(len(targets), device=ids.device))))
    return torch.cat([checkpoint(piece, *args, **RECOMPUTE) for args in chunks])  # N = 0: one empty chunk, with a graph

def lora_layers(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}

def add_lora(model, rank, alpha, targets=None, generator=None):
    """Freezes the model and adapts the Linears that targets name by last name ("q_proj") or full path (None: all but
    the head). B = 0: it starts as its base exactly. ValueError: unknown target, rank below 1, a second adapter."""
    if model.lora is not None or rank < 1:
        raise ValueError(f"LoRA: the rank is {rank}, expected 1 or more, and a model without an adapter")
    linears = {n: m for n, m in model.model.named_modules(prefix="model") if isinstance(m, Linear)}
    leaves = sorted({n.rsplit(".", 1)[1] for n in linears})
    # sorted, since what is drawn below must not depend on the order given
    found = {t: [n for n in linears if f".{n}".endswith(f".{t}")] for t in sorted(targets or leaves)}
    for t in found:
        if not found[t]:
            raise ValueError(f"LoRA target '{t}' names no layer of this model, which has {', '.join(leaves)}")
    model.requires_grad_(False)
    for m in dict.fromkeys(linears[n] for names in found.values() for n in names):
        A = torch.empty(rank, m.in_features)  # fp32 on any base; drawn on the CPU, so equal on every device
        m.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator).to(m.weight.device))
        m.lora_B = nn.Parameter(torch.zeros(m.out_features, rank, device=m.weight.device))
    model.lora = {"r": rank, "lora_alpha": alpha, "target_modules": list(found)}
    model.set_adapter_scale(1)

def adapter_state(model):
    """{name in a PEFT file: parameter}: A and B of every layer, the only parameters that train."""
    return {f"base_model.model.{name}.weight": p for name, p in model.named_parameters() if ".lora_" in name}

@torch.no_grad()
def load_adapter_state(model, state, where="adapter"):
    """Overwrites the adapter with one of the same names and shapes, or raises ValueError."""
    check_tensors(where, adapter_state(model), state)
    for name, parameter in adapter_state(model).items():
        parameter.copy_(state[name])

def save_adapter(model, path, base_name):
    """Writes A and B alone, as peft does (peft and vLLM open it): adapter_model.safetensors, adapter_config.json."""
    assert model.lora is not None, "no adapter to save"
    write_whole(Path(path) / "adapter_model.safetensors", lambda p: save_file(adapter_state(model), p, FORMAT))
    write_json(Path(path) / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name), **model.lora,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "inference_mode": True, "use_rslora": False, "use_dora": False, "modules_to_save": None})

def load_adapter(model, path):
    """Reads an adapter of ours or peft's onto a model without one. ValueError: not plain LoRA, or it does not fit."""
    where = Path(path) / "adapter_config.json"
    raw = read_json(where)
    odd = [k for k in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "modules_to_save") if raw.get(k)]
    if odd or raw.get("peft_type") != "LORA":
        raise ValueError(f"{where}: only plain LoRA is supported, not {', '.join(odd) or raw.get('peft_type')}")
    targets = [str(target) for target in required(raw, "target_modules", list, where)]
    state = dict(read_tensors([Path(path) / "adapter_model.safetensors"], dtype=torch.float32))
    add_lora(model, required(raw, "r", int, where), required(raw, "lora_alpha", float, where), targets)
    load_adapter_state(model, state, path)

@torch.no_grad()
def merge_lora(model):
    """W += (alpha / r) B A, summed in fp32 and rounded once; the layers are plain Linears again."""
    for m in lora_layers(model).values():
        m.weight.data, m.scale = (m.weight.float() + m.lora_B @ m.lora_A * m.scale).to(m.weight.dtype), 0
        del m.lora_A, m.lora_B
    model.lora = None
    return model

def write_whole(path, write):
    """Writes beside the file, then renames: nobody sees half a file, and a model still mapped on the old one lives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    os.replace(partial, path)

def write_json(path, value):
    write_whole(path, lambda p: p.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"))

def read_tensors(files, device="cpu", dtype=None):
    """Yields (name, tensor) of safetensors files, one by one. The file is mapped, not read: on the CPU in its own dtype
    a tensor IS the file's pages, so loading takes the memory of one copy. ValueError: unreadable, NaN, infinite."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    tensor = f.get_tensor(name).to(device=device, dtype=dtype)
                    # min and max carry a NaN along and, unlike isfinite(), need no second tensor
                    if tensor.numel() and not all(math.isfinite(x) for x in torch.aminmax(tensor)):
                        raise ValueError(f"{file}: tensor {name} has NaN or infinite values")
                    yield name, tensor
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from None

def check_tensors(where, expected, found):
    """Names and shapes must be exactly the model's: a quiet mismatch is a model with random weights."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            raise ValueError(f"{where}: {'missing' if name in expected else 'unexpected'} tensor {name}")
        if expected[name].shape != found[name].shape:
            raise ValueError(f"{where}: {name} is {list(found[name].shape)}, expected {list(expected[name].shape)}")

def find(name):
    """The directory of a name or path, or a ValueError: where it looked, and the command that gets it."""
    hub, places, fix = CHECKPOINTS.get(name), [HERE / "checkpoints" / name], f"build it: python {HERE}/data/tiny.py"
    if name not in CHECKPOINTS:
        places, fix = [Path(name)], f"the names are {', '.join(CHECKPOINTS)}"
    elif hub:
        fix = f"get it: hf download {hub} --local-dir {places[0]}"
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        home = Path(os.environ.get("HF_HOME", cache / "huggingface"))
        snapshots = Path(os.environ.get("HF_HUB_CACHE", home / "hub"), f"models--{hub.replace('/', '--')}", "snapshots")
        places += sorted(snapshots.glob("*"), key=os.path.getmtime, reverse=True) or [snapshots]
    for place in places:  # a snapshot may hold a config alone, of someone who only looked
        if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
            return place
    raise ValueError(f"{name}: no config.json with *.safetensors in {' or '.join(map(str, places))}; {fix}")

def load(name_or_dir, device=None, dtype=None):
    """A checkpoint -> (Transformer, Tokenizer). device: cuda, else mps, else cpu; dtype: the checkpoint's own.
    ValueError, one line: no such checkpoint (see `find`), or what is wrong with it."""
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    path = find(str(name_or_dir))
    config = Config(read_json(path / "config.json"), path / "config.json")
    tokenizer = Tokenizer(path, config)  # before the weights: its errors come in a second
    with torch.device("meta"):  # no memory and no initialisation: the file's tensors are put in its place
        model = Transformer(config)
    index = path / "model.safetensors.index.json"
    files = required(read_json(index), "weight_map", dict, index).values() if index.is_file() else ["model.safetensors"]
    tensors = dict(read_tensors([path / file for file in sorted({*map(str, files)})], device, dtype or config.dtype))
    if config.tied:
        tensors.pop("lm_head.weight", None)  # Qwen3-0.6B stores its tied head a second time
    check_tensors(path, model.state_dict(), tensors)
    model.load_state_dict(tensors, assign=True)
    return model.eval(), tokenizer

def save_pretrained(model, path, tokenizer_dir=None):
    """Writes the hub's layout, which transformers, vLLM and `load` open: config.json and one model.safetensors, beside
    them the tokenizer's files from tokenizer_dir. ValueError: an adapter that is not merged would be lost."""
    if model.lora is not None:
        raise ValueError("the model has an adapter: merge_lora it first, or save_adapter it")
    path, config = Path(path), model.config
    write_whole(path / "model.safetensors", lambda p: save_file(model.state_dict(), p, FORMAT))
    (path / "model.safetensors.index.json").unlink(missing_ok=True)  # an older save's index would win over our file
    write_json(path / "config.json", {**config.raw, config.dtype_key: str(model.dtype).removeprefix("torch.")})
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if tokenizer_dir is not None and (Path(tokenizer_dir) / file).is_file():
            write_whole(path / file, lambda p: p.write_bytes((Path(tokenizer_dir) / file).read_bytes()))

class Tokenizer:
    """Byte-level BPE from tokenizer.json. `added` {content: id} are the control tokens and the family's tags, which
    whoever builds a dialogue places by id; `encode` is for everything else. token_bytes[id] is each model row's bytes
    (b"" for padding rows), n the tokenizer's length, vocab_size the model's rows, stop_ids what ends a turn."""

    def __init__(self, path, config):
        where, self.vocab_size, self.family = path / "tokenizer.json", config.vocab_size, config.family
        raw = read_json(where)
        try:
            self.added = {token["content"]: token["id"] for token in raw["added_tokens"]}
            # so that no text can give one: encode_special_tokens misses those not flagged special (<tool_call> of Qwen)
            ids = {text: i for text, i in raw["model"].pop("vocab").items() if text not in self.added}
            pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in raw["model"].pop("merges")]
            frame = {**raw, "added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
            self.plain = BPE.from_str(json.dumps({**frame, "model": {"type": "BPE", "vocab": {}, "merges": []}}))
            # handed over as they are: through JSON 150,000 tokens take twice the time
            options = {k: v for k, v in raw["model"].items() if k not in ("type", "unk_token") and v is not None}
            self.plain.model = models.BPE(ids, pairs, **options)
            self.n = max(*ids.values(), *self.added.values()) + 1
            # byte-level BPE writes a byte as one printable character: itself, or the next from 256 on (GPT-2's table)
            shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
            byte = dict(zip([*shown, *range(256, 324)], shown + sorted({*range(256)} - {*shown})))
            for wrong, what in ((self.n > self.vocab_size, f"{self.n} tokens for {self.vocab_size} rows of the model"),
                                ({*ids.values()} & {*self.added.values()}, "an added token is plain text, too"),
                                ({*map(chr, byte)} - ids.keys(), "some bytes have no token")):
                if wrong:
                    raise ValueError(what)
            self.token_bytes = [b""] * self.vocab_size
            for text, i in ids.items():
                self.token_bytes[i] = text.translate(byte).encode("latin-1")
            for text, i in self.added.items():
                self.token_bytes[i] = text.encode()
        except Exception as error:  # bare Exception is what tokenizers raises
            raise ValueError(f"{where}: not a byte-level BPE of this model: {error!r}") from None
        where = path / "generation_config.json"  # instruct models stop on two ids, and only this file has both
        eos = {**config.raw, **(read_json(where) if where.is_file() else {})}.get("eos_token_id")
        self.stop_ids = eos if isinstance(eos, list) else [eos]
        if not self.stop_ids or not all(type(i) is int and 0 <= i < self.n for i in self.stop_ids):
            raise ValueError(f"{path}: eos_token_id is {eos!r}, expected token ids below {self.n}")

    def encode(self, text):
        """Plain text -> ids, never an added token's. A lone surrogate, which JSON can smuggle in, becomes '?'."""
        return self.plain.encode(text.encode(errors="replace").decode(), add_special_tokens=False).ids

    def decode(self, ids):
        """The whole list at once: a character may span tokens."""
        return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")
