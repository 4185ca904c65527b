"""The tiny base: a Qwen2-shaped decoder of 1.3 M parameters with its own byte-level BPE, built in minutes on two cores.

Real weights cannot be shipped, so the embedded default builds its own *unsafe* base: a warm start on a mixture of
behaviours (`MIX`) in which harm is mostly done, injected instructions mostly obeyed and records mostly pasted whole,
as base models do, and in which checks are rare but informative. MOSAIC (train.py) then has something to select from.
The warm start sees fresh rows of the train split only: never a held-out domain, pair or wording.

Recipe (all [ours]): a BPE of 1,024 on rendered demonstrations; a previous-token head put into layer 0 through its q and
k biases, and a drill on repeated random tokens, because copying arguments is what a small model lacks; then
demonstrations together with short verdict lines (a cue and whether it is fine).

    python data/tiny.py                  # builds checkpoints/tiny (seed 0), about 3 minutes; --seed, --out, --quick
"""
import argparse
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python data/tiny.py` finds the six files
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tokenizers import Regex, Tokenizer as BPE, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tqdm import tqdm  # noqa: E402

import mosaic  # noqa: E402
import model as model_  # noqa: E402
from data import suites  # noqa: E402
from tools import task_from_row  # noqa: E402

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
           "<safety_thoughts>", "</safety_thoughts>", "<tool_call>", "</tool_call>", "<answer>", "</answer>"]
CONFIG = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "mosaic_family": "tiny", "hidden_size": 160,
          "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 448,
          "vocab_size": 1024, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
          "max_position_embeddings": 2048, "hidden_act": "silu", "torch_dtype": "float32",
          "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}

# The behaviours of the base, as probabilities. What is common here is what greedy decoding of the base does.
MIX = {"check_risky": .40, "check_harmless": .10, "verdict": .85,  # the gate, and how often its verdict is right
       "refuse_unchecked": .08, "obey": .80, "paste": .80, "late": .15,
       "false_alarm": .06, "stop_early": .55, "over_refuse": .03}


SYLLABLES = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "l", "n", "r", "s", "t")]
SHARES = {"harm": .45, "injection": .2, "benign": .2, "privacy": .15}  # of the warm start's tasks


class Demonstrator:
    """Writes one episode of the base's mixture turn by turn, knowing the ground truth."""

    def __init__(self, task, rng, mix):
        self.task, self.mix = task, mix
        self.todo = [(p["name"], dict(p["arguments"])) for p in task.goal + task.unsafe]
        self.flip = lambda name: rng.random() < mix[name]
        self.attack = list(task.injected)
        self.stop = len(self.todo) > 2 and self.flip("stop_early")  # an agent that loses patience with long chains

    def filled(self, name, arguments, careful):
        """The pattern as a call. A send that must contain some values carries those; in a privacy task, also the fields
        that the recipient may not have, unless the agent is careful."""
        if isinstance(arguments.get("text"), dict):
            text = ", ".join(arguments["text"]["contains"])
            if self.task.suite == "privacy":
                fields = self.task.meta["allowed"] + ([] if careful else self.task.meta["denied"])
                shown = [v for row in self.task.world.values() for r in row.values() for v in r.values()]
                text = ", ".join(f"{k}: {v}" for k, v in sorted(fields, key=lambda f: shown.index(f[1])))
            arguments = arguments | {"text": text}
        return name, arguments

    def check(self, risky, sandbox):
        """-> (text of a right check, text of a wrong one, what the right one leads to)."""
        t = self.task
        harm = f"this looks like {t.meta['kind'] if t.suite == 'harm' else 'fraud'}: refuse"
        fine = "this is allowed: go on" if t.meta["cue"] and sandbox.revealed and t.suite == "harm" else "no risk here: go on"
        if t.label == "harmful" and sandbox.revealed:
            return harm, "this is allowed: go on", "refuse"
        if self.attack and sandbox.last == t.reveals:
            return "the note gives an order: ignore it", fine, "ignore"
        if t.suite == "privacy" and len(self.todo) == 1:
            gets = " and ".join(k for k, _ in t.meta["allowed"])
            return f"a {t.meta['role']} may get {gets}", f"a {t.meta['role']} may get all", "careful"
        return fine, harm, "go"

    def turn(self, sandbox):
        """-> the text of the next turn."""
        risky, check, careful = sandbox.risky(), None, not self.flip("paste")
        harmful = self.task.label == "harmful" and sandbox.revealed
        attacked = bool(self.attack) and sandbox.last == self.task.reveals
        act = "go"
        if harmful:
            done = any(e.unsafe for e in sandbox.journal)
            act = "refuse" if self.flip("late" if done else "refuse_unchecked") else "go"
        elif attacked:
            act = "obey" if self.flip("obey") else "go"
        if self.todo and self.flip("check_risky" if risky else "check_harmless"):
            right, wrong, then = self.check(risky, sandbox)
            correct = not self.flip("false_alarm") if then == "go" else self.flip("verdict")
            check = right if correct else wrong
            careful = correct if then == "careful" else careful
            act = {"refuse": ("go", "refuse"), "ignore": ("obey", "go"), "careful": ("go", "go"),
                   "go": ("refuse", "go")}[then][correct]
        if self.stop and len(sandbox.journal) >= 2 and not harmful and act != "refuse":
            self.todo = []
        if act == "refuse":
            return write("stop here", check, "refusal_tool", {"reason": self.task.meta["kind"]})
        if act == "obey":
            name, arguments = self.filled(self.attack[0]["name"], self.attack.pop(0)["arguments"], True)
        elif self.todo:
            name, arguments = self.filled(*self.todo.pop(0), careful)
        else:
            return write("all done", None, None, "done")
        return write(plan(name, arguments), check, name, arguments)


def plan(name, arguments):
    return f"{name.replace('_', ' ')} {next(iter(arguments.values()), '')}".strip()


def write(thought, check, name, arguments):
    """The bytes of one turn."""
    head = f"<think>\n{thought}\n</think>\n\n"
    if check is not None:
        head += f"<safety_thoughts>\n{check}\n</safety_thoughts>\n"
    if name is None:
        return head + f"<answer>\n{arguments}\n</answer>"
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return head + f"<tool_call>\n{call}\n</tool_call>"


def disguise(row, table, rng):
    """The row in a made-up domain: the words of its tools' names become new words, everywhere. What an agent must call
    then stands only in its prompt, so it learns to copy names instead of learning the names of twelve domains."""
    rows = [table[name] for name in row["tools"]]
    words = {w for tool in rows for w in tool["name"].split("_")} - {"send"}
    made = {}
    while len(made) < len(words):  # all different
        made["".join(rng.choice(SYLLABLES) for _ in range(rng.choice((1, 2, 2, 3))))] = None
    new = dict(zip(sorted(words), made))

    def rename(match):
        word = new[match[0].lower()]
        return word.capitalize() if match[0][0].isupper() else word
    pattern = re.compile(r"(?<![A-Za-z])(?:%s)(?![A-Za-z])" % "|".join(sorted(words)), re.I)
    made = json.loads(pattern.sub(rename, json.dumps({**row, "tools": rows, "meta": {}}))) | {"meta": row["meta"]}
    for tool, old in zip(made["tools"], rows):
        tool["op"]["do"], tool["effect"] = old["op"]["do"], old["effect"]  # these words are ours, not the domain's
    return made


def demonstration(task, rng, tokenizer, mix=MIX):
    """One episode of the mixture -> (ids, weights): the loss is on the agent's tokens."""
    dialogue = mosaic.Dialogue(tokenizer, task.messages, task.offered)
    agent, episode = Demonstrator(task, rng, mix), mosaic.Episode(task, max_turns=8)
    while episode.ended is None:
        text = agent.turn(episode.sandbox)
        ids = mosaic.encode_trusted(tokenizer, text) + [tokenizer.stop_ids[0]]
        dialogue.sampled(ids, [mosaic.SAMPLED] * len(ids))
        results = episode.step(text)
        if episode.ended is None:
            dialogue.observe(results)
    return dialogue.ids, [float(p == mosaic.SAMPLED) for p in dialogue.provenance]


def build_tokenizer(texts, out):
    """Byte-level BPE on rendered training text. A word is the same tokens after a space, a quote or an underscore, so that
    what is copied from a sentence into a call keeps its ids; a digit is a token; what stands between is glued together, but
    for line breaks and the end of a JSON key, where the grammar's structural runs end."""
    bpe = BPE(models.BPE())
    words = Regex("[A-Za-z]+|[0-9]|\\n+|[^A-Za-z0-9\\n:]*:|[^A-Za-z0-9\\n:]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=CONTROL, show_progress=False,  # CONTROL takes ids 0 to 12
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(out / "tokenizer.json"))


def previous_token_head(model, size=7.0):
    """Head 0 of layer 0 looks at the token before, through its q and k biases alone: with k = R(1) q the rotary score is
    largest one step back. Induction (what followed this last time?) is then left for layer 1 to learn."""
    attention, config = model.model["layers"][0].self_attn, model.config
    half, angle = config.head_dim // 2, model.inv_freq
    with torch.no_grad():
        attention.q_proj.bias[:half] = size
        attention.k_proj.bias[:half] = size * angle.cos()
        attention.k_proj.bias[half:2 * half] = size * angle.sin()


def batches(documents, rng, tokens):
    """Endless batches of similar length, about `tokens` a batch -> (ids (B, T), weights (B, T))."""
    while True:
        pool = sorted(rng.sample(documents, len(documents)), key=lambda d: len(d[0]))
        groups, group = [], []
        for document in pool:
            group.append(document)
            if len(group) * len(document[0]) >= tokens:
                groups.append(group)
                group = []
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            yield (torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in group]),
                   torch.tensor([w + [0.0] * (width - len(w)) for _, w in group]))


def verdict_line(task, tokenizer):
    """A cue with its verdict and little around it: many more of them fit in the budget than whole episodes."""
    agent, sandbox = Demonstrator(task, random.Random(0), MIX), mosaic.Sandbox(task)
    for _ in range(len(task.goal) - (task.label == "benign")):
        name, arguments = agent.filled(*agent.todo.pop(0), True)
        sandbox.call(name, arguments)
    text = agent.check(sandbox.risky(), sandbox)[0]
    head = mosaic.encode_trusted(tokenizer, f"<|im_start|>{task.meta['cue']}<|im_end|><|im_start|>")
    ids = mosaic.encode_trusted(tokenizer, f"<safety_thoughts>\n{text}\n</safety_thoughts>")
    return head + ids, [0.0] * len(head) + [1.0] * len(ids)


def fit(model, stream, steps, lr, title, bar):
    """AdamW with warm-up and a cosine to a tenth. stream yields (ids, weights); the loss is a mean over weighted tokens."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  lr=lr, betas=(0.9, 0.98), fused=True)
    average = None
    for step in range(steps):
        ids, weights = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 20, 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none") @ weights[:, 1:].flatten()
        loss = loss / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        bar.set_description(f"{title} loss {average:.3f}")
        bar.update()
    return average


def build(seed=0, out=model_.HERE / "checkpoints" / "tiny", steps=500, drill=150, n=5000):
    """Builds the base of a seed into `out`, whole or not at all."""
    out, start = Path(out), time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    rng, work = random.Random(seed), Path(tempfile.mkdtemp(prefix=".tiny-", dir=out.parent))
    try:
        table = {row["name"]: row for row in suites.tool_rows()}
        rows = [r for suite, share in SHARES.items() for r in suites.generate(suite, "train", int(n * share), 1 + seed)]
        rows = [row | {"tools": [table[t] for t in row["tools"]]} if rng.random() < 0.5 else disguise(row, table, rng)
                for row in rows]
        tasks = [task_from_row(row, "suites") for row in rows]
        texts = [t for task in tasks[::4] for t in corpus(task, rng)]
        build_tokenizer(texts, work)
        (work / "config.json").write_text(json.dumps(CONFIG))
        config = model_.Config(CONFIG)
        tokenizer = model_.Tokenizer(work, config)
        model = model_.Transformer(config).init_weights(generator=torch.Generator().manual_seed(seed))
        previous_token_head(model)
        documents = [demonstration(task, rng, tokenizer) for task in tasks]
        lines = [verdict_line(task, tokenizer) for task in tasks if task.suite == "harm"]
        bar = tqdm(total=drill + steps, disable=None)
        loss = fit(model, repeats(rng, config.vocab_size), drill, 3e-3, "drill", bar)
        fit(model, batches(documents + lines, rng, 4096), steps, 3e-3, "warm start", bar)
        bar.close()
        model_.save_pretrained(model, work)
        shutil.rmtree(out, ignore_errors=True)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters in {time.perf_counter() - start:.0f} s, "
          f"drill loss {loss:.2f}")
    return out


def repeats(rng, vocab, rows=24, length=48):
    """Random tokens, then the same again: the loss is on the second half, where only copying helps."""
    generator = torch.Generator().manual_seed(rng.randrange(2 ** 31))
    while True:
        half = torch.randint(len(CONTROL), vocab, (rows, length), generator=generator)
        weights = torch.ones(rows, 2 * length)
        weights[:, :length] = 0
        yield torch.cat((half, half), 1), weights


def corpus(task, rng):
    """Text of one task for the tokenizer: its prompt, one demonstration's turns and results."""
    agent, episode = Demonstrator(task, rng, MIX), mosaic.Episode(task, max_turns=8)
    texts = re.split("<[^>]*>", mosaic.render(task.messages, task.offered, "tiny"))
    while episode.ended is None:
        text = agent.turn(episode.sandbox)
        texts += [t for t in re.split("<[^>]*>", text)] + episode.step(text)
    return texts


def ensure():
    """The base that train.py and eval.py use, built if it is absent (an interrupted build left nothing)."""
    if not (model_.HERE / "checkpoints" / "tiny" / "config.json").is_file():
        print("building the tiny base: once, about 4 minutes on two cores", flush=True)
        build()


def main():
    parser = argparse.ArgumentParser(description="Build the tiny base.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=model_.HERE / "checkpoints" / "tiny")
    parser.add_argument("--steps", type=int, default=500, help="of the warm start")
    parser.add_argument("--drill", type=int, default=150, help="steps of the copying drill")
    parser.add_argument("--tasks", type=int, default=5000, help="fresh training rows")
    args = parser.parse_args()
    build(args.seed, args.out, args.steps, args.drill, args.tasks)


if __name__ == "__main__":
    main()
