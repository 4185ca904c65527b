"""The tiny base: a Qwen2-shaped decoder of 1.1 M parameters with its own byte-level BPE, built in
minutes on two cores.

Real weights cannot be shipped with this repository, so the embedded default builds its own base
model. It is *unsafe* by construction: its warm start shows it harm that is mostly done, injected
instructions that are mostly obeyed and records that are mostly pasted whole, as base models do, and
checks that are rare but informative. MOSAIC (train.py) then has something to select from. What is
shown, and at which rates, is data/demonstrator.py; here is what is tiny's own.

The recipe, in the order of `warm_start`
1. A BPE of 2,560 tokens on rendered demonstrations              `build_tokenizer`
2. Copying is what a small model lacks: the heads that copy are
   written into its fresh weights                                `induction_circuit`
3. Documents: whole demonstrations, most of them in made-up
   domains, and short verdict lines (a cue and whether it is
   fine; a role, a record and what may be sent: `verdict_line`)  data/demonstrator.py
4. Muon and AdamW over them, about once                          `batches`, `fit`, `Muon`

Deviations
1. [ours] All of it. The paper trains public instruction-tuned models.

    python data/tiny.py        # builds checkpoints/tiny (seed 0); --seed, --out, --steps, --tasks

takes 4 to 15 minutes and prints ".../checkpoints/tiny: 1,067,136 parameters in 240 s" at its end.
train.py, eval.py and mosaic.py run this command by themselves where they need it
(data.ensure_base).
Next file: data/controls.py.
"""
import gc
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds the six files

import torch  # noqa: E402
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tokenizers import Tokenizer as BPE  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import model as model_  # noqa: E402
import mosaic  # noqa: E402
from data import suites  # noqa: E402
from data.demonstrator import (  # noqa: E402
    MAX_TURNS,
    MIX,
    SAYABLE,
    Demonstrator,
    batches,
    before_decision,
    demonstration,
    fresh_tasks,
    fresh_verdict_tasks,
    schedule,
    weighted_loss,
)
from tools import Episode, Task  # noqa: E402

# Control tokens, which take the ids 0 to 12.
CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "<safety_thoughts>",
    "</safety_thoughts>",
    "<tool_call>",
    "</tool_call>",
    "<answer>",
    "</answer>",
]

# As a config.json of the Hugging Face hub, so that model.load and transformers open it.
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "mosaic_family": "tiny",  # its chat template, see data/families.json
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
    "vocab_size": 2560,
    "rope_theta": 1e8,  # its slow dimensions must not turn within a dialogue: the copying heads
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 16384,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

DEFAULT_FOLDER = model_.HERE / "checkpoints" / "tiny"
STEPS = 2250            # of the warm start
N_TASKS = 18000         # tasks drawn for it
BATCH_TOKENS = 2048     # about as many in a batch, padding included
LEARNING_RATE = 2e-3    # AdamW's at its peak
MUON_FACTOR = 5         # Muon's learning rate is as many times AdamW's
WARM_UP = 20            # steps until the peak
GRAD_CLIP = 1.0         # norm of all gradients together


def warm_start(tasks: list, verdict_tasks: list, out: Path, steps: int, seed: int):
    """Tokenizer, config and weights of a base of these tasks into the folder `out` -> the model.

    tasks: shown whole. verdict_tasks: of these only the verdicts are shown.
    """
    rng = random.Random(seed)
    config = model_.Config(CONFIG)

    # 1. the tokenizer, from the text of every fourth task
    texts = []
    for task in model_.progress(tasks[::4], what="texts of the tokenizer", unit="task"):
        texts += task_texts(task, rng)
    build_tokenizer(word_texts() + texts, out)
    tokenizer = model_.Tokenizer(out, config)

    # 2. fresh weights, with the heads that copy written in
    generator = torch.Generator().manual_seed(seed)
    model = model_.Transformer(config).init_weights(generator=generator)
    induction_circuit(model, tokenizer)

    # 3. what it is shown
    documents = []
    for task in model_.progress(tasks, what="demonstrations", unit="task"):
        documents.append(demonstration(task, rng, tokenizer))
    for task in model_.progress(tasks + verdict_tasks, what="verdict lines", unit="task"):
        if task.suite in ("harm", "privacy"):  # their verdict fits in a line
            documents.append(verdict_line(task, tokenizer))

    # 4. the warm start itself
    fit(model, batches(documents, rng, BATCH_TOKENS), steps)
    model_.save_pretrained(model, out)
    return model


# -------------------------------------------------------------------------------- 1. the tokenizer
# Where text is cut before BPE merges within the pieces; the first that fits is taken. A space, an
# underscore or the end of a JSON key belongs to the word before it: were it a token of its own, it
# would stand before every word, and "what followed this token last time?" (what the copying heads
# of part 2 ask) would find anything.
PIECES = (
    r'\{"name": "',              # the beginning of a call
    '", "arguments":',           # ends a token, for there the grammar's structural run ends
    '", "',                      # between two arguments
    r'[a-z]+(?:[_ ]|": "|: )?',  # a word with what belongs to it: "find ", "find_", 'find": "'
    # a name, without what follows it: the same token in a sentence and in a call
    "[A-Z][a-z]*",
    "[0-9]{1,2}",                # digits go by two
    r"\n+",                      # line breaks are tokens
    r"[^A-Za-z0-9\n:]*:",
    r"[^A-Za-z0-9\n:]+",
)


def build_tokenizer(texts: list, out: Path):
    """Trains a byte-level BPE on these texts and writes tokenizer.json into the folder `out`."""
    pieces = pre_tokenizers.Split(Regex("|".join(PIECES)), "isolated")
    bytes_as_text = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_as_text])
    bpe.decoder = decoders.ByteLevel()

    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=CONTROL,
        show_progress=False,
        # All 256 bytes, seen or not: any text must have an encoding.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(out / "tokenizer.json"))


def word_texts() -> list:
    """Every word with all that may belong to it, often enough that each becomes one token."""
    often = 20
    fields = set()  # keys of the records
    for domain in suites.DOMAINS.values():
        fields.update([domain.param, *domain.fields.split()])
    words = spellings(SAYABLE, ("", " ", "_")) * often
    return words + spellings(sorted(fields), ("", " ", ": ", '": "')) * often


def spellings(words, endings) -> list:
    return [word + ending for word in words for ending in endings]


def task_texts(task: Task, rng: random.Random) -> list:
    """Text of one task for the tokenizer: its prompt, and one demonstration's turns and results."""
    tag = "<[^>]*>"  # tags are control tokens: BPE must not learn their spelling
    agent = Demonstrator(task, rng, MIX)
    episode = Episode(task, max_turns=MAX_TURNS)
    texts = re.split(tag, mosaic.render(task.messages, task.offered, "tiny"))
    while episode.ended is None:
        turn = agent.write_turn(episode.sandbox)
        texts += re.split(tag, turn)
        texts += episode.step(turn)
    return texts


# ---------------------------------------------------------------------- 2. the heads that copy
# The numbers of the circuit, all [ours]. With them, random tokens that come back have loss 0.02
# before any training, and 7.9 without the circuit.
#
# A code is a vector of D random signs times a size. An RMS norm makes it NORMED / CODE times as
# large: half of the 128 features hold codes of +-0.1, the others noise of 0.02, so the root mean
# square is about 0.07, and 0.1 / 0.07 = 1.4.
CODE = 0.1        # size of a code in the embeddings: five times that of the other features
NORMED = 1.4      # its size behind a norm
PEAK = 7.0        # of the biases that look back: 98 % of the attention falls on the token meant
WRITE = 0.2       # how large the codes that they find are written, times NORMED
SLOW = 5          # first rotary pair that may match: the faster ones turn within 50 tokens
MATCH = 2.2       # how sharply equal codes attract: scores grow with its square
OUT = 0.6         # how large the code of a token that is found is added to the output
LOUD_OWN = 1.5    # the final norm's gain on a token's own code ...
LOUD_WORD = 4.0   # ... and on its word's, which counts more: see induction_circuit


@torch.no_grad()
def induction_circuit(model, tokenizer):
    """Writes the heads that copy into fresh weights; training then refines them.

    They answer "what followed these two words last time?" (an induction head, Elhage et al. 2021
    and Olsson et al. 2022, here of two words). Of the C features of the residual stream, D a head:

        0 to D      the code of the token's word, the same for all its spellings
        D to 2D     the code of the token itself
        2D to 3D    written by layer 0, head 0: the word code of the token before
        3D to 4D    written by layer 0, head 1: the word code of the token two before

    Layer 1, heads 0 and 2, ask where the codes of *this* word and of the one before it stand in
    2D to 4D: there, the token itself is the one that followed. They add its code to the output,
    which the final norm makes loud. Head 0 adds the token's own code, softly; head 2 adds its
    word's, loudly. So the word is known in any spelling, and training has only to choose it.
    """
    D = model.config.head_dim
    first = model.model.layers[0].self_attn
    second = model.model.layers[1].self_attn
    frequencies = model.inv_freq  # (D / 2,)

    write_codes(model.model.embed_tokens.weight, tokenizer.token_bytes, D)
    write_look_back_heads(first, frequencies, D)
    # They ask alike but copy different values, so they must not share a key-value head: heads 0
    # and 1 have kv head 0, heads 2 and 3 have kv head 1.
    write_matching_head(second, head=0, kv_head=0, copied=D, D=D)
    write_matching_head(second, head=2, kv_head=1, copied=0, D=D)
    model.model.norm.weight[D:2 * D] = LOUD_OWN
    model.model.norm.weight[:D] = LOUD_WORD


def write_codes(embeddings, token_bytes, D):
    """Codes of random signs into the first 2D features: a word's, and a token's own.

    embeddings: (V, C). The signs are those of the random weights that were there.
    """
    embeddings[:, :2 * D] = embeddings[:, :2 * D].sign() * CODE
    words = {}  # {word: ids of its spellings}; "Find", "find ", "find_" and 'find": "' are one word
    for token, spelling in enumerate(token_bytes):
        word = spelling.strip(b' _":').lower()
        words.setdefault(word, []).append(token)
    for word, tokens in words.items():
        if word:  # padding rows and bare punctuation are no word
            embeddings[tokens, :D] = embeddings[tokens[0], :D].clone()


def write_look_back_heads(attention, frequencies, D):
    """Heads 0 and 1 of layer 0 look one and two tokens back, by their biases only.

    The rotary embedding turns the query at position i by R(i) and the key at j by R(j). With a
    query bias R(a) u and a key bias R(b) u, the score is largest where i + a = j + b. With b = 1, a
    query of a = 0 looks at j = i - 1, and one of a = -1 at j = i - 2. Both heads share kv head 0.
    """
    attention.q_proj.weight[:2 * D] = 0  # what a token is must not move the look
    attention.k_proj.weight[:D] = 0
    write_turned_bias(attention.q_proj.bias[:D], 0, frequencies)
    write_turned_bias(attention.q_proj.bias[D:2 * D], -1, frequencies)
    write_turned_bias(attention.k_proj.bias[:D], 1, frequencies)

    feature = torch.arange(D)
    attention.v_proj.weight[:D] = 0
    attention.v_proj.weight[feature, feature] = 1.0  # the value is the word's code ...
    attention.o_proj.weight[:, :2 * D] = 0
    attention.o_proj.weight[2 * D + feature, feature] = WRITE      # ... of the token before
    attention.o_proj.weight[3 * D + feature, D + feature] = WRITE  # ... of the one two before


def write_turned_bias(bias, steps, frequencies):
    """PEAK times R(steps) u, where u has 1 in the first and 0 in the second half of each rotary
    pair. bias: (D,), the two halves of pair i are i and i + D / 2."""
    half = len(frequencies)
    bias[:half] = PEAK * (steps * frequencies).cos()
    bias[half:] = PEAK * (steps * frequencies).sin()


def write_matching_head(attention, head, kv_head, copied, D):
    """A head of layer 1 that finds where the last two words stood, and copies what followed.

    copied: the first feature of the code that it copies, 0 (the word's) or D (the token's own).
    """
    query_rows = slice(head * D, (head + 1) * D)
    kv_rows = slice(kv_head * D, (kv_head + 1) * D)
    q = attention.q_proj.weight[query_rows]     # (D, C), a view: written in place
    k = attention.k_proj.weight[kv_rows]        # (D, C)
    v = attention.v_proj.weight[kv_rows]        # (D, C)
    o = attention.o_proj.weight[:, query_rows]  # (C, D)
    for weight in (q, k, v, o):
        weight.zero_()

    # Codes are matched only in the slow dims: in the fast ones, a distance of 50 tokens would turn
    # a code away. The word before is matched in shifted dims: it must not look like this word.
    half = D // 2
    dims = torch.tensor([*range(SLOW, half), *range(half + SLOW, D)])
    shifted = dims.roll(1)
    q[dims, dims] = MATCH                                        # this word: 0 to D, of size CODE
    q[dims, 2 * D + shifted] = MATCH * CODE / WRITE / NORMED     # the one before, made as large
    k[dims, 2 * D + dims] = MATCH                                # stands before the token there
    k[dims, 3 * D + shifted] = MATCH                             # and this one two before it

    feature = torch.arange(D)
    v[feature, copied + feature] = 1.0
    o[copied + feature, feature] = OUT


# --------------------------------------------------------------------------- 3. what it is shown
def verdict_line(task: Task, tokenizer) -> tuple[list, list]:
    """A cue, or a record (with a note, or for a role), with its right verdict and little around it
    -> (ids, weights). Many more of them fit in the budget than whole episodes.

    task: of the harm or the privacy suite.
    """
    agent, sandbox, result = before_decision(task)
    shown = ""
    if task.meta["style"] != "note":  # the cue stands in the user's message
        shown += f"{task.meta['cue']}<|im_end|>"
    if task.meta["style"] == "note" or task.suite == "privacy":
        shown += f"<tool_response>{result}</tool_response>"
    right, _ = agent.verdicts(sandbox)
    head = mosaic.encode_trusted(tokenizer, f"<|im_start|>{shown}<|im_start|>")
    check = f"<safety_thoughts>\n{right.text}\n</safety_thoughts>"
    ids = mosaic.encode_trusted(tokenizer, check)
    return head + ids, [0.0] * len(head) + [1.0] * len(ids)


# ------------------------------------------------------------------------------ 4. the warm start
def fit(model, stream: Iterator, steps: int):
    """Trains on `steps` batches of the stream. The loss is a weighted mean over tokens."""
    optimizers = _optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    average = None  # of the loss, for the progress bar
    bar = tqdm(range(steps), disable=None)
    for step in bar:
        ids, weights = next(stream)  # (B, T)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * schedule(step, steps, WARM_UP)

        loss = weighted_loss(model, ids, weights)
        loss.backward()
        codes = 2 * model.config.head_dim
        model.model.embed_tokens.weight.grad[:, :codes] = 0  # the codes stay as they were written
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        bar.set_description(f"warm start, loss {average:.3f}")


def _optimizers(model) -> list:
    """Muon for the matrices between features; AdamW for the embeddings, norms and biases."""
    matrices = []
    others = []
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            matrices.append(parameter)
        else:
            others.append(parameter)
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, MUON_FACTOR * LEARNING_RATE), adamw]


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal (Jordan et al. 2024): half the steps of AdamW on a
    model this small."""
    MOMENTUM = 0.95
    WEIGHT_DECAY = 0.1

    def __init__(self, matrices: list, lr: float):
        super().__init__(matrices, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        by_shape = {}
        for parameter in group["params"]:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        # Matrices of one shape go through the iteration together: a few large products.
        for parameters in by_shape.values():
            self._step_together(parameters, group["lr"])

    def _step_together(self, parameters, lr):
        rows, columns = parameters[0].shape
        is_tall = rows > columns
        directions = []
        for parameter in parameters:
            gradient = parameter.grad
            state = self.state[parameter]
            momentum = state.setdefault("m", torch.zeros_like(parameter))
            momentum.lerp_(gradient, 1 - self.MOMENTUM)
            gradient.lerp_(momentum, self.MOMENTUM)  # Nesterov: a look ahead
            directions.append(gradient.T if is_tall else gradient)  # wide: the smaller products

        updates = orthogonalize(torch.stack(directions))
        updates = updates.mT if is_tall else updates
        size = max(1, rows / columns) ** 0.5  # so that outputs change as much, whatever the shape
        for parameter, update in zip(parameters, updates):
            parameter.mul_(1 - self.WEIGHT_DECAY * lr)
            parameter.add_(update, alpha=-lr * size)


def orthogonalize(x):
    """Turns all singular values of x (N, rows, columns) towards 1, by five rounds of a quintic
    Newton-Schulz iteration with Jordan's coefficients."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # it converges from singular values <= 1
    for _ in range(5):
        y = x @ x.mT
        x = 3.4445 * x + (-4.7750 * y + 2.0315 * y @ y) @ x
    return x


# --------------------- the method ends here; what follows is plumbing -----------------------------
def build(seed: int = 0, out: str | Path = DEFAULT_FOLDER, steps: int = STEPS,
          n: int = N_TASKS) -> Path:
    """Builds the base of a seed into the folder `out`, whole or not at all -> out.

    n: tasks to draw. ValueError: `out` is there already and is no tiny base; one that is, a new one
    replaces.
    """
    out = Path(out)
    start = time.perf_counter()
    # Drawing tasks makes millions of small objects and no garbage: to look for some takes half of
    # its time.
    gc.disable()
    try:
        with data.built_whole(out, "tiny") as folder:
            rng = random.Random(seed)
            tasks = fresh_tasks(n, seed, rng)
            counts = {"harm": n * 2 // 3, "privacy": n // 3}  # n more, of which only verdicts
            verdict_tasks = fresh_verdict_tasks(counts, seed, rng)
            model = warm_start(tasks, verdict_tasks, folder, steps, seed)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; nothing was written") from None
    finally:
        gc.enable()

    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {size:,} parameters in {time.perf_counter() - start:.0f} s")
    return out


def main():
    parser = mosaic.Parser(description="Build the tiny base.", allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=DEFAULT_FOLDER)
    parser.add_argument("--steps", type=mosaic.count_option, default=STEPS,
                        help="of the warm start")
    parser.add_argument("--tasks", type=mosaic.count_option, default=N_TASKS,
                        help="fresh training rows")
    args = parser.parse_args()
    build(args.seed, args.out, args.steps, args.tasks)


if __name__ == "__main__":
    mosaic.run_command("tiny.py", main)
