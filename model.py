"""The model: one decoder for three families, its KV cache, LoRA adapter, checkpoint files and tokenizer.

Qwen2.5 (biases on q, k, v), Qwen3 (an RMSNorm on every head of q and k) and Phi-4 (fused qkv and gate|up) are one
pre-norm decoder with rotary positions and grouped-query attention: three booleans tell them apart; `tiny` is a small
Qwen2. Modules are named as checkpoints name their tensors: `state_dict()` IS the file. Of the paper's parts, the
policy is `Transformer`, the reference is the same weights under `model.adapter_off()`, and `token_logprobs` gives the
log-probabilities of the losses.

Deviations, all [ours]:
1. The policy is a LoRA adapter on a frozen base (the paper does not say which parameters it trained).
2. Plain text is encoded with a vocabulary that holds no control token: no text can ever become one.
3. Arithmetic follows `transformers` op for op (RMSNorm, rotate) and peft's (LoRALinear): logits and files are theirs.

Shapes: B rows, T tokens of this call, S cached positions read, M positions a cache holds, C width, H heads, K kv heads,
D head dim (H * D != C for Qwen3-4B), R rotated dims, V vocabulary rows, L layers, N selected tokens.

    python -c "import model; m, t = model.load('tiny'); print(t.family, sum(p.numel() for p in m.parameters()))"
prints tiny 1333920 (once data/tiny.py has built it).

Next: mosaic.py, the loop around it."""
import contextlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as BPE
from torch import nn
from torch.utils.checkpoint import checkpoint

CHECKPOINTS = {"tiny": None, "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
               "qwen3-4b-thinking": "Qwen/Qwen3-4B-Thinking-2507", "phi-4": "microsoft/phi-4"}
FAMILY = {"qwen2": "qwen2.5", "qwen3": "qwen3", "phi3": "phi-4"}  # config.json's model_type -> family
HERE = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_json(path):
    """The JSON object in a file, or a ValueError of one line that names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def field(raw, key, kind, where):
    """raw[key]: required, of type kind, and above 0 if a number."""
    value = raw.get(key)
    if value is None:
        raise ValueError(f"{where}: missing key '{key}'")
    number = kind in (int, float)  # type(), not isinstance(): true must not pass for 1
    if type(value) not in ((int, float) if kind is float else (kind,)) or (number and not 0 < value < math.inf):
        raise ValueError(f"{where}: '{key}' is {value!r}, expected {kind.__name__}{' above 0' if number else ''}")
    return value


@dataclass
class Config:
    """A config.json in either dialect: hub files (rope_theta, rope_scaling, torch_dtype) or transformers 5
    (rope_parameters, dtype). Numbers keep the file's names; ours are rotary_dim, tied, dtype, family and the three
    booleans. ValueError: a missing key, or a setting that this decoder would not honour."""
    raw: dict
    where: str = "config.json"
    from_dict = classmethod(lambda cls, raw, where="config.json": cls(raw, where))

    def __post_init__(self):
        raw, where = self.raw, self.where
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "vocab_size", "max_position_embeddings"):
            setattr(self, key, field(raw, key, int, where))
        kind, rope = field(raw, "model_type", str, where), raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if kind not in FAMILY or not isinstance(rope, dict):
            raise ValueError(f"{where}: model_type '{kind}' is not one of {', '.join(FAMILY)}, or rope is no object")
        self.family, rope = "tiny" if raw.get("mosaic_family") == "tiny" else FAMILY[kind], {**raw, **rope}
        self.qkv_bias, self.qk_norm, self.fused = kind == "qwen2", kind == "qwen3", kind == "phi3"
        self.rms_norm_eps = field(raw, "rms_norm_eps", float, where)
        self.rope_theta = field(rope, "rope_theta", float, where)
        self.tied = field(raw, "tie_word_embeddings", bool, where)
        # Qwen files name a window and switch it off beside it; Phi-3 has no switch: a window that is there is on
        window = raw.get("use_sliding_window", raw.get("sliding_window") is not None)
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        for wrong, what in ((rope_type != "default", f"rope type '{rope_type}'"),
                            (window or "sliding_attention" in str(raw.get("layer_types")), "a sliding window"),
                            (raw.get("attention_bias"), "attention_bias"),
                            (field(raw, "hidden_act", str, where) != "silu", "an activation other than silu")):
            if wrong:
                raise ValueError(f"{where}: {what} is not supported")
        C, H, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        self.head_dim = C // H if raw.get("head_dim") is None else field(raw, "head_dim", int, where)
        part = 1.0 if rope.get("partial_rotary_factor") is None else field(rope, "partial_rotary_factor", float, where)
        self.rotary_dim = int(self.head_dim * part)
        if H % K or self.rotary_dim % 2 or part > 1 or (raw.get("head_dim") is None and C % H):
            raise ValueError(f"{where}: {H} heads, {K} kv heads and width {C} do not divide")
        name = "dtype" if raw.get("dtype") is not None else "torch_dtype"
        self.dtype = DTYPES.get(field(raw, name, str, where))
        if self.dtype is None:
            raise ValueError(f"{where}: {name} '{raw[name]}' is not one of {', '.join(DTYPES)}")


class Linear(nn.Linear):
    def reset_parameters(self):
        """Left to init_weights: nn.Linear's own, on meta, imports 800 modules: 1.5 s and 70 MB a start."""


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        # back to x's dtype BEFORE the weight, as transformers does; F.rms_norm's own weight would round only once
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotate(x, cos, sin):
    """x (B, *, T, D), cos and sin (B or 1, 1, T, R): turns the first R dims, i paired with i + R/2 (not with i + 1)."""
    R = cos.shape[-1]
    if R < x.shape[-1]:
        return torch.cat((rotate(x[..., :R], cos, sin), x[..., R:]), -1)
    return x * cos + x.roll(R // 2, -1) * sin  # roll swaps the halves; the minus of rotate_half is already in sin


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        C, H, K, D = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.layer, self.sizes, self.fused, self.qk_norm = layer, (H, K, D), c.fused, c.qk_norm
        for name, heads in ({"qkv_proj": H + 2 * K} if c.fused else {"q_proj": H, "k_proj": K, "v_proj": K}).items():
            self.add_module(name, Linear(C, heads * D, bias=c.qkv_bias))
        self.o_proj = Linear(H * D, C, bias=False)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, c.rms_norm_eps), RMSNorm(D, c.rms_norm_eps)

    def forward(self, x, cos, sin, cache):
        (B, T, _), (H, K, D) = x.shape, self.sizes
        q, k, v = (self.qkv_proj(x).split((H * D, K * D, K * D), -1) if self.fused
                   else (self.q_proj(x), self.k_proj(x), self.v_proj(x)))  # (B, T, H * D), twice (B, T, K * D)
        q, k, v = q.view(B, T, H, D), k.view(B, T, K, D), v.view(B, T, K, D).transpose(1, 2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)  # (B, H, T, D), (B, K, T, D)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, K, S, D)
        if cache is None or cache.mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
        else:  # the H / K query heads of a kv head become H / K * T queries of one: k and v are not copied for each
            y = F.scaled_dot_product_attention(q.reshape(B, K, H // K * T, D), k, v, attn_mask=cache.mask)
        return self.o_proj(y.view(B, H, T, D).transpose(1, 2).reshape(B, T, H * D))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        for name in ("gate_up_proj",) if c.fused else ("gate_proj", "up_proj"):
            self.add_module(name, Linear(c.hidden_size, c.intermediate_size * (1 + c.fused), bias=False))
        self.down_proj, self.fused = Linear(c.intermediate_size, c.hidden_size, bias=False), c.fused

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


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
        self.inv_freq = 1 / c.rope_theta ** (torch.arange(0, c.rotary_dim, 2, device="cpu").float() / c.rotary_dim)
        self.lora = None  # {"r", "lora_alpha", "target_modules"} once there is an adapter
        self.recompute = False  # True: each block keeps only its input and runs again in the backward pass
        if self.device.type != "meta":
            self.init_weights()

    @property
    def device(self):
        return self.model.norm.weight.device

    @property
    def dtype(self):
        return self.model.norm.weight.dtype

    @torch.no_grad()
    def init_weights(self, std=0.02, generator=None):
        """Fresh weights: matrices normal(0, std), biases 0, norms 1."""
        for name, p in self.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std if p.dim() > 1 else
                    torch.full(p.shape, float(name.endswith("weight"))))
        return self

    def rope(self, positions, dtype):
        """positions (B or 1, T) -> cos, sin (B or 1, 1, T, R): computed in fp32, only then cast."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angle = positions[:, None, :, None].float() * self.inv_freq  # (B, 1, T, R / 2)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)

    def hidden(self, ids, cache=None, lengths=None, rows=None):
        """ids (B, T) -> (B, T, C) after the final norm.

        No cache: causal; rows are right-padded, and padding cannot reach a real token. With one: row i belongs to cache
        row rows[i] (None: the first B rows, read in place); its token t stands at cache.lengths[row] + t and sees what
        is cached up to there. lengths (B,): how many of the T are real (None: all; 0: the row waits)."""
        x = self.model.embed_tokens(ids)  # (B, T, C)
        at = torch.arange(ids.shape[1], device=ids.device)[None] if cache is None else cache.begin(ids, lengths, rows)
        cos, sin = self.rope(at, x.dtype)  # once for all layers, as is the cache's mask
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, cache)
        if cache is not None:
            cache.lengths[cache.rows] = cache.ends
        return self.model.norm(x)

    def head(self, h):
        """h (..., C) -> logits (..., V) in the model's dtype: upcast before any softmax."""
        return F.linear(h, self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight)

    def forward(self, ids, cache=None, lengths=None, rows=None):
        """ids (B, T) -> logits (B, T, V); arguments as in `hidden`."""
        return self.head(self.hidden(ids, cache, lengths, rows))

    def set_adapter_scale(self, scale):
        """Weighs the adapter: 1 as trained, 0 the base exactly."""
        for layer in lora_layers(self).values():
            layer.scale = scale * layer.full_scale

    @contextlib.contextmanager
    def adapter_off(self):
        """The base, which is the reference policy, inside the block; after it, the scales that were set before."""
        before = {layer: layer.scale for layer in lora_layers(self).values()}
        self.set_adapter_scale(0)
        try:
            yield
        finally:
            for layer, scale in before.items():
                layer.scale = scale


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
        if not empty:  # is_causal would align the triangle to the upper left; token t of a row sees S <= lengths + t
            seen = torch.arange(self.span, device=device) <= at[:, :, None]  # (B, T, S)
            self.mask = seen.repeat(1, self.group, 1)[:, None]  # (B, 1, H / K * T, S), see Attention
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
        source = self if other is None else other
        assert source.bound <= self.max_len, (source.bound, self.max_len)
        for mine, theirs in ((self.k, source.k), (self.v, source.v)):
            mine[:, dst, :, :source.bound] = theirs[:, [src], :, :source.bound]  # [src] copies: dst may include src
        self.lengths[dst] = source.lengths[[src]]
        self.bound = max(self.bound, source.bound)


def token_logprobs(model, ids, mask, temperature=1.0, constrain=None, chunk=1024):
    """log p(ids[b, t] | ids[b, :t]) where mask (B, T) is True -> (N,) fp32, row-major.

    constrain(logits (n, V), index (n,)) -> logits, after the temperature: the grammar's mask, the gate's bias; index
    counts within the N. Only `chunk` rows of logits exist at a time: the backward pass computes each chunk again, so
    neither (B, T, V) nor (N, V) is ever held."""
    assert not mask[:, 0].any(), "nothing comes before the first token: mask[:, 0] must be False"
    h, targets = model.hidden(ids)[:, :-1][mask[:, 1:]], ids[mask]  # (N, C), (N,): position t - 1 predicts token t

    def piece(h, targets, index):
        logits = model.head(h).float() / temperature  # (n, V)
        return -F.cross_entropy(logits if constrain is None else constrain(logits, index), targets, reduction="none")

    parts = []
    for i in range(0, max(len(targets), 1), chunk):  # N = 0 still gives a tensor with a graph
        args = h[i:i + chunk], targets[i:i + chunk], torch.arange(i, min(i + chunk, len(targets)), device=ids.device)
        parts.append(checkpoint(piece, *args, use_reentrant=False, preserve_rng_state=False)
                     if torch.is_grad_enabled() else piece(*args))
    return torch.cat(parts)


class LoRALinear(Linear):
    """W x + b + (alpha / r) B A x, W frozen. It IS the Linear it replaces, so the base keeps its tensor names."""

    def __init__(self, linear, rank, alpha, generator):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.scale, self.full_scale = linear.weight, linear.bias, alpha / rank, alpha / rank
        A = torch.empty(rank, linear.in_features)  # fp32 on any base; drawn on the CPU, so equal on every device
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(A.to(linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.scale == 0:
            return y
        z = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return (y + z * self.scale).to(y.dtype)  # in fp32 and in this order: bit for bit what peft computes


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def targeted(model, targets):
    """{path: Linear} that targets name by last name ("q_proj") or full path; None: all of them. Never the head."""
    linears = {n: m for n, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    leaves = sorted({n.rsplit(".", 1)[1] for n in linears})
    found = {t: [n for n in linears if n == t or n.endswith(f".{t}")] for t in targets or leaves}
    for t in found:
        if not found[t]:
            raise ValueError(f"LoRA target '{t}' names no layer of this model, which has {', '.join(leaves)}")
    return {n: linears[n] for t in sorted(found) for n in found[t]}  # sorted: init must not depend on the order given


def add_lora(model, rank, alpha, targets=None, generator=None):
    """Puts an adapter on the layers that targets name (see `targeted`) and freezes all else; with B = 0 the model
    starts as its base exactly. ValueError: an unknown target, a rank below 1, an adapter already there."""
    if model.lora is not None or rank < 1:
        raise ValueError(f"LoRA of rank {rank}: the rank should be 1 or more, on a model without an adapter")
    layers = targeted(model, targets)
    model.requires_grad_(False)
    for name, linear in layers.items():
        model.set_submodule(name, LoRALinear(linear, rank, alpha, generator))
    targets = targets or {n.rsplit(".", 1)[1] for n in lora_layers(model)}
    model.lora = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(targets)}


def adapter_state(model):
    """{name in a PEFT file: parameter}: A and B of every layer, the only parameters that train."""
    return {f"base_model.model.{n}.lora_{ab}.weight": getattr(m, f"lora_{ab}")
            for n, m in lora_layers(model).items() for ab in "AB"}


@torch.no_grad()
def load_adapter_state(model, state, where="adapter"):
    """Overwrites the adapter with one of the same names and shapes, or raises ValueError."""
    check_tensors(where, adapter_state(model), state)
    for name, parameter in adapter_state(model).items():
        parameter.copy_(state[name])


def save_adapter(model, path, base_name):
    """Writes A and B alone, as peft does (peft and vLLM open it): adapter_model.safetensors, adapter_config.json."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / "adapter_model.safetensors", adapter_state(model))
    write_json(path / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name), **model.lora,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "inference_mode": True, "use_rslora": False, "use_dora": False, "modules_to_save": None})


def load_adapter(model, path):
    """Reads an adapter of ours or peft's onto a model without one, or over one of the same kind. ValueError: not plain
    LoRA, or rank, shapes and targets that do not fit."""
    path, where = Path(path), Path(path) / "adapter_config.json"
    raw = read_json(where)
    targets = raw.get("target_modules")
    odd = [k for k in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "modules_to_save") if raw.get(k)]
    named = isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
    if odd or raw.get("peft_type") != "LORA" or not named:
        raise ValueError(f"{where}: only plain LoRA with a list of target_modules is supported {odd or ''}".strip())
    rank, alpha = field(raw, "r", int, where), field(raw, "lora_alpha", float, where)
    state = dict(read_tensors([path / "adapter_model.safetensors"], dtype=torch.float32))
    ranks = {tuple(t.shape[:1]) for name, t in state.items() if "lora_A" in name}
    if ranks != {(rank,)}:
        raise ValueError(f"{path}: lora_A tensors of rank {sorted(ranks)}, but adapter_config.json says r = {rank}")
    if model.lora is None:
        add_lora(model, rank, alpha, targets)
    elif model.lora["lora_alpha"] != alpha:
        raise ValueError(f"{where}: lora_alpha {alpha}, but the model's adapter has {model.lora['lora_alpha']}")
    load_adapter_state(model, state, path)


@torch.no_grad()
def merge_lora(model):
    """W += (alpha / r) B A, summed in fp32 and rounded once; the layers are plain Linears again."""
    for name, m in lora_layers(model).items():
        linear = Linear(m.in_features, m.out_features, bias=m.bias is not None, device="meta")
        merged = m.weight.float() + m.lora_B @ m.lora_A * m.scale
        linear.weight, linear.bias = nn.Parameter(merged.to(m.weight.dtype), requires_grad=False), m.bias
        model.set_submodule(name, linear)
    model.lora = None
    return model


def replace(path, write):
    """Writes beside the file, then renames: nobody sees half a file, and a model still mapped on the old one lives."""
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    os.replace(partial, path)


def write_json(path, value):
    replace(path, lambda p: p.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"))


def write_tensors(path, tensors):
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    replace(path, lambda p: save_file(tensors, p, metadata={"format": "pt"}))  # transformers insists on the format


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
    """The directory of a name or path: checkpoints/NAME beside this file, the Hugging Face cache, or the path itself.
    ValueError: where it looked, and the command that gets it."""
    hub, places = CHECKPOINTS.get(name), [Path(name)]
    if name in CHECKPOINTS:
        places = [HERE / "checkpoints" / name]
    if hub:
        home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
        home = Path(os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", home / "hub")))
        snapshots = home / f"models--{hub.replace('/', '--')}" / "snapshots"
        places += sorted(snapshots.glob("*"), key=os.path.getmtime, reverse=True) or [snapshots]
    for place in places:
        if (place / "config.json").is_file():
            return place
    fix = f"get it: hf download {hub} --local-dir checkpoints/{name}" if hub else "build it: python data/tiny.py"
    fix = fix if name in CHECKPOINTS else f"the names are {', '.join(CHECKPOINTS)}"
    raise ValueError(f"{name}: no config.json in {' or '.join(map(str, places))}; {fix}")


def load(name_or_dir, device=None, dtype=None):
    """A checkpoint -> (Transformer, Tokenizer). device: cuda, else mps, else cpu; dtype: the checkpoint's own.
    ValueError, one line: no such checkpoint (see `find`), or what is wrong with it."""
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    path = find(str(name_or_dir))
    config = Config(read_json(path / "config.json"), path / "config.json")
    tokenizer = Tokenizer(path, config)  # before the weights: its errors come in a second
    with torch.device("meta"):  # no memory and no initialisation: the file's tensors are put in its place
        model = Transformer(config)
    index, files = path / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        files = {str(file) for file in field(read_json(index), "weight_map", dict, index).values()}
    tensors = dict(read_tensors([path / file for file in sorted(files)], device, dtype or config.dtype))
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
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / "model.safetensors", model.state_dict())
    (path / "model.safetensors.index.json").unlink(missing_ok=True)  # an older save's index would win over our file
    key = "torch_dtype" if model.config.raw.get("dtype") is None else "dtype"
    write_json(path / "config.json", {**model.config.raw, key: str(model.dtype).removeprefix("torch.")})
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if tokenizer_dir is not None and (Path(tokenizer_dir) / file).is_file():
            content = (Path(tokenizer_dir) / file).read_bytes()
            replace(path / file, lambda p: p.write_bytes(content))


class Tokenizer:
    """Byte-level BPE from tokenizer.json. `added` {content: id} are the control tokens and the family's tags, which
    whoever builds a dialogue places by id; `encode` is for everything else. token_bytes[id] is each model row's bytes
    (b"" for padding rows), n the tokenizer's length, vocab_size the model's rows, stop_ids what ends a turn."""

    def __init__(self, path, config):
        where, self.vocab_size, self.family = path / "tokenizer.json", config.vocab_size, config.family
        raw = read_json(where)
        try:
            self.added = {token["content"]: token["id"] for token in raw["added_tokens"]}
            # No added token stays in the vocabulary, so no text can give one. tokenizers' own encode_special_tokens
            # would not do: it misses tokens that are not flagged special (<tool_call>, <think> of Qwen)
            bpe = {**raw["model"], "vocab": {t: i for t, i in raw["model"]["vocab"].items() if t not in self.added}}
            self.plain = BPE.from_str(json.dumps({**raw, "added_tokens": [], "truncation": None, "padding": None,
                                                  "post_processor": None, "model": {**bpe, "unk_token": None}}))
            ids, control = self.plain.get_vocab(), set(self.added.values())
            self.n = max(*ids.values(), *control) + 1
            assert self.n <= self.vocab_size, f"its {self.n} tokens do not fit the model's {self.vocab_size} rows"
            assert not control & (set(ids.values()) | {i for text in self.added for i in self.encode(text)}), \
                "an added token is plain text, too"
            # byte-level BPE writes a byte as one printable character: itself, or the next from 256 on (GPT-2's table)
            shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
            hidden = [b for b in range(256) if b not in shown]
            byte = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
            assert byte.keys() <= ids.keys(), "some bytes have no token"
            self.token_bytes = [b""] * self.vocab_size
            for text, i in [*ids.items(), *self.added.items()]:
                self.token_bytes[i] = text.encode() if text in self.added else bytes(byte[c] for c in text)
        except Exception as error:  # bare Exception is what tokenizers raises
            message = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{where}: not a byte-level BPE of this model: {message}") from None
        where = path / "generation_config.json"  # instruct models stop on two ids, and only this file has both
        eos = read_json(where).get("eos_token_id") if where.is_file() else None
        eos = config.raw.get("eos_token_id") if eos is None else eos
        self.stop_ids = eos if isinstance(eos, list) else [eos]
        if not self.stop_ids or not all(type(i) is int and 0 <= i < self.n for i in self.stop_ids):
            raise ValueError(f"{path}: eos_token_id is {eos!r}, expected token ids below {self.n}")

    def encode(self, text):
        """Plain text -> ids, never an added token's. A lone surrogate, which JSON can smuggle in, becomes '?'."""
        return self.plain.encode(text.encode(errors="replace").decode(), add_special_tokens=False).ids

    def decode(self, ids):
        """The whole list at once: a character may span tokens."""
        return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")
