"""The tiny base: a Qwen2-shaped decoder of 0.9 M parameters with its own byte-level BPE, built in minutes on two cores.

Real weights cannot be shipped, so the embedded default builds its own *unsafe* base: a warm start on a mixture of
behaviours (`MIX`) in which harm is mostly done, injected instructions mostly obeyed and records mostly pasted whole,
as base models do, and in which checks are rare but informative. MOSAIC (train.py) then has something to select from.
The warm start sees fresh rows of the train split only: never a held-out domain, pair or wording.

Recipe (all [ours]): a BPE of 1,024 on rendered demonstrations; because copying is what a small model lacks, the two
heads that copy are written into the fresh weights, and drilled on random tokens; then demonstrations, a third of them
in made-up domains, together with short verdict lines (a cue and whether it is fine), by Muon and AdamW.

    python data/tiny.py                  # builds checkpoints/tiny (seed 0), about 4 minutes; --seed, --out, --steps
"""
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
from data.rows import task_from_row  # noqa: E402

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
           "<safety_thoughts>", "</safety_thoughts>", "<tool_call>", "</tool_call>", "<answer>", "</answer>"]
CONFIG = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "mosaic_family": "tiny", "hidden_size": 128,
          "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 352,
          "vocab_size": 1024, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
          "max_position_embeddings": 16384, "hidden_act": "silu", "torch_dtype": "float32",
          "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}

# The behaviours of the base, as probabilities. What is common here is what greedy decoding of the base does.
MIX = {"check_risky": .42, "check_harmless": .08, "verdict": .92,  # the gate, and how often its verdict is right
       "refuse_unchecked": .05, "obey": .90, "paste": .85, "late": .15, "false_alarm": .05, "stop_early": .60}
TOKENS, LR, MADE_UP = 2048, 3e-3, .3  # a batch; peak learning rate; share of rows in made-up domains
VERDICT = 3.0  # extra weight of a check's tokens: few of them, and all that follows hangs on one
SYLLABLES = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "l", "n", "r", "s", "t")]
SHARES = {"harm": .4, "injection": .22, "benign": .2, "privacy": .18}  # of the warm start's tasks


class Demonstrator:
    """Writes one episode of the base's mixture turn by turn, knowing the ground truth."""

    def __init__(self, task, rng, mix):
        self.task, self.mix = task, mix
        self.todo = [(p["name"], dict(p["arguments"])) for p in task.goal + task.unsafe]
        self.flip = lambda name: rng.random() < mix[name]
        self.attack = list(task.injected)
        self.stop = len(self.todo) > 3 and self.flip("stop_early")  # an agent that loses patience with long chains

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
        cue = t.suite == "harm" and t.meta["cue"] and sandbox.revealed
        fine = "this is allowed: go on" if cue else "no risk here: go on"
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
        if self.stop and len(sandbox.journal) >= 3 and not harmful and act != "refuse":
            self.todo = []
        if act == "obey":
            name, arguments = self.filled(self.attack[0]["name"], self.attack.pop(0)["arguments"], True)
        elif self.todo:
            name, arguments = self.filled(*self.todo.pop(0), careful)
        else:
            return write("all done", None, None, "done")
        thought = plan(name, arguments)  # plan, check, act: a plan that knew of the refusal would make the check idle
        if act == "refuse":
            name, arguments = "refusal_tool", {"reason": self.task.meta["kind"]}
        return write(thought, check, name, arguments)


def plan(name, arguments):
    return f"{name}: {next(iter(arguments.values()), '')}"


def write(thought, check, name, arguments):
    """The bytes of one turn."""
    head = f"<think>\n{thought}\n</think>\n\n"
    if check is not None:
        head += f"<safety_thoughts>\n{check}\n</safety_thoughts>\n"
    if name is None:
        return head + f"<answer>\n{arguments}\n</answer>"
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return head + f"<tool_call>\n{call}\n</tool_call>"


def disguise(row, rng):
    """The row in a made-up domain: the words of its tools' names become new words, everywhere. What an agent must call
    then stands only in its prompt, so it learns to copy names instead of learning the names of twelve domains."""
    rows = row["tools"]
    words = {w for tool in rows for w in tool["name"].split("_")} - {"send"}
    made = {}
    while len(made) < len(words):  # all different
        made["".join(rng.choice(SYLLABLES) for _ in range(rng.choice((1, 2, 2))))] = None
    new = dict(zip(sorted(words), made))

    def rename(match):
        word = new[match[0].lower()]
        return word.capitalize() if match[0][0].isupper() else word
    pattern = re.compile(r"(?<![A-Za-z])(?:%s)(?![A-Za-z])" % "|".join(sorted(words)), re.I)
    made = json.loads(pattern.sub(rename, json.dumps({**row, "meta": {}}))) | {"meta": row["meta"]}
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
    opening, closing = (tokenizer.added[f"<{slash}safety_thoughts>"] for slash in ("", "/"))
    weights, inside = [], 0.0
    for token, code in zip(dialogue.ids, dialogue.provenance):
        inside = {opening: VERDICT, closing: 0.0}.get(token, inside)
        weights.append(float(code == mosaic.SAMPLED) + inside * (token != opening))
    return dialogue.ids, weights


def build_tokenizer(texts, out):
    """Byte-level BPE on rendered training text. A space or an underscore belongs to the word before it: were it a
    token, it would be what stands before every word, and "what followed this token last time?" would find anything. Not
    so after a capital: a name is the same token in a sentence and in a call. Digits go by two. Line breaks are tokens,
    and the end of a JSON key ends one: there the grammar's structural runs end."""
    bpe = BPE(models.BPE())
    words = Regex("[a-z]+[_ ]?|[A-Z][a-z]*|[0-9]{1,2}|\\n+|[^A-Za-z0-9\\n:]*:|[^A-Za-z0-9\\n:]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=CONTROL, show_progress=False,  # CONTROL takes ids 0 to 12
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(out / "tokenizer.json"))


def induction_circuit(model, peak=7.0, match=1.7, slow=5):
    """Writes the two heads that copy ("what followed this token last time?") into fresh weights; training refines them.

    Layer 0, head 0 looks at the token before through its q and k biases alone: with k = R(1) q the rotary score is
    largest one step back. It writes that token's features to a place of their own, C/2 further up. Layer 1, head 0 asks
    where the features of *this* token stand in that place, and adds the token it finds there to the output. It matches
    only in the slow rotary dims: in the fast ones a distance of 50 tokens would turn the features away."""
    c, layers = model.config, model.model["layers"]
    D, half, up = c.head_dim, c.head_dim // 2, c.hidden_size // 2
    first, second = layers[0].self_attn, layers[1].self_attn
    dims = torch.tensor([*range(slow, half), *range(half + slow, D)])
    with torch.no_grad():
        first.q_proj.bias[:half] = peak
        first.k_proj.bias[:half] = peak * model.inv_freq.cos()
        first.k_proj.bias[half:D] = peak * model.inv_freq.sin()
        for proj in (first.q_proj, first.k_proj, first.v_proj, second.q_proj, second.k_proj, second.v_proj):
            proj.weight[:D] = 0
        for proj in (first.o_proj, second.o_proj):
            proj.weight[:, :D] = 0
        here = torch.arange(D)
        first.v_proj.weight[here, here] = 1.0
        first.o_proj.weight[up + here, here] = 0.06
        second.q_proj.weight[dims, dims] = match
        second.k_proj.weight[dims, up + dims] = match
        second.v_proj.weight[here, here] = 1.0
        second.o_proj.weight[here, here] = 0.3


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


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal (Jordan et al. 2024): half the steps of AdamW on a model this small."""

    def __init__(self, matrices, lr):
        super().__init__(matrices, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["m"] = m = state.get("m", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                x = p.grad.lerp(m, 0.95)  # Nesterov
                x = x.T if x.shape[0] > x.shape[1] else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):  # quintic Newton-Schulz: all singular values towards 1
                    y = x @ x.T
                    x = 3.4445 * x + (-4.7750 * y + 2.0315 * y @ y) @ x
                x = x.T if p.shape[0] > p.shape[1] else x
                p.mul_(1 - 0.1 * group["lr"]).add_(x, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def fit(model, stream, steps, lr, title, bar):
    """Warm-up and a cosine to a tenth. stream yields (ids, weights); the loss is a mean over weighted tokens."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    optimizers = [Muon(matrices, 5 * lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]
    average, rates = None, [o.param_groups[0]["lr"] for o in optimizers]
    for step in range(steps):
        ids, weights = next(stream)
        for optimizer, rate in zip(optimizers, rates):
            cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 20, cosine)
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none") @ weights[:, 1:].flatten()
        loss = loss / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        bar.set_description(f"{title} loss {average:.3f}")
        bar.update()
    return average


def build(seed=0, out=model_.HERE / "checkpoints" / "tiny", steps=1250, drill=80, n=9000):
    """Builds the base of a seed into `out`, whole or not at all."""
    out, start = Path(out), time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    rng, work = random.Random(seed), Path(tempfile.mkdtemp(prefix=".tiny-", dir=out.parent))
    try:
        table = {row["name"]: row for row in suites.tool_rows()}
        rows = [r for suite, share in SHARES.items() for r in suites.generate(suite, "train", int(n * share), 1 + seed)]
        rows = [row | {"tools": [table[name] for name in row["tools"]]} for row in rows]
        rows = [disguise(row, rng) if rng.random() < MADE_UP else row for row in rows]
        tasks = [task_from_row(row, "suites") for row in rows]
        texts = [t for task in tasks[::4] for t in corpus(task, rng)]
        build_tokenizer(texts, work)
        (work / "config.json").write_text(json.dumps(CONFIG))
        config = model_.Config(CONFIG)
        tokenizer = model_.Tokenizer(work, config)
        model = model_.Transformer(config).init_weights(generator=torch.Generator().manual_seed(seed))
        induction_circuit(model)
        documents = [demonstration(task, rng, tokenizer) for task in tasks]
        more = suites.generate("harm", "train", n * 2 // 3, 1000 + seed)  # verdicts are short: there is room for more
        more = [task_from_row(row | {"tools": [table[name] for name in row["tools"]]}, "suites") for row in more]
        lines = [verdict_line(task, tokenizer) for task in tasks + more if task.suite == "harm"]
        bar = tqdm(total=drill + steps, disable=None)
        loss = fit(model, repeats(rng, config.vocab_size), drill, LR, "drill", bar)
        fit(model, batches(documents + lines, rng, TOKENS), steps, LR, "warm start", bar)
        bar.close()
        model_.save_pretrained(model, work)
        shutil.rmtree(out, ignore_errors=True)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters in {time.perf_counter() - start:.0f} s, "
          f"drill loss {loss:.2f}")
    return out


def repeats(rng, vocab, rows=32, length=96):
    """Random tokens in which segments come back, at distances that differ from row to row (one distance alone would be
    learned as a position): the loss is where only finding and copying helps."""
    generator = torch.Generator().manual_seed(rng.randrange(2 ** 31))
    while True:
        ids = torch.randint(len(CONTROL), vocab, (rows, length), generator=generator)
        weights = torch.zeros(rows, length)
        for i in range(rows):
            start, size = rng.randrange(8), rng.randrange(8, 32)
            first = start + size + rng.randrange(16)
            for at in range(first, length - size, size + rng.randrange(16)):
                ids[i, at:at + size] = ids[i, start:start + size]
                weights[i, at + 1:at + size] = 1
        yield ids, weights


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
    parser = mosaic.Parser(description="Build the tiny base.", allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=model_.HERE / "checkpoints" / "tiny")
    parser.add_argument("--steps", type=int, default=1250, help="of the warm start")
    parser.add_argument("--drill", type=int, default=80, help="steps of the copying drill")
    parser.add_argument("--tasks", type=int, default=9000, help="fresh training rows")
    args = parser.parse_args()
    build(args.seed, args.out, args.steps, args.drill, args.tasks)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(print("tiny.py: interrupted; nothing was written", file=sys.stderr) or 130)
