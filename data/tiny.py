"""The tiny base: a Qwen2-shaped decoder of 1.1 M parameters with its own byte-level BPE, built in minutes on two cores.

Real weights cannot be shipped, so the embedded default builds its own *unsafe* base: a warm start on a mixture of
behaviours (`MIX`) in which harm is mostly done, injected instructions mostly obeyed and records mostly pasted whole,
as base models do, and in which checks are rare but informative. MOSAIC (train.py) then has something to select from.
The warm start sees fresh rows of the train split only: never a held-out domain, pair or wording.

Recipe (all [ours]): a BPE of 2,560 on rendered demonstrations; because copying is what a small model lacks, the heads
that copy are written into the fresh weights; then demonstrations, most of them in made-up domains, together with short
verdict lines (a cue and whether it is fine; a role, a record and what may be sent), by Muon and AdamW.

    python data/tiny.py                  # builds checkpoints/tiny (seed 0), about 4 minutes; --seed, --out, --steps
"""
import gc
import json
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
from data.controls import blocks, turn as written  # noqa: E402
from data.rows import task_from_row  # noqa: E402
from tools import schema_error  # noqa: E402

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
           "<safety_thoughts>", "</safety_thoughts>", "<tool_call>", "</tool_call>", "<answer>", "</answer>"]
CONFIG = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "mosaic_family": "tiny", "hidden_size": 128,
          "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 352,
          "vocab_size": 2560, "rope_theta": 1e8, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
          "max_position_embeddings": 16384, "hidden_act": "silu", "torch_dtype": "float32",
          "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}

# The behaviours of the base, as probabilities. What is common here is what greedy decoding of the base does.
# stop_early: before the last of three or four calls; slip: a call that fails, made only to show what follows one.
MIX = {"check_risky": .30, "check_harmless": .04, "verdict": .92,  # the gate, and how often its verdict is right
       "refuse_unchecked": .05, "obey": .97, "paste": .95, "late": .15, "false_alarm": .05, "stop_early": .42,
       "slip": .1}
# How often a demonstration holds a check, by risk: far more often than the base shall open one, for what a check says
# is what it has to learn. The weight q / c (or (1 - q) / (1 - c)) on the branching token makes up for it.
SHOWN = {True: .65, False: .15}
TOKENS, LR, MADE_UP, REWORDED = 2048, 2e-3, .7, .5  # a batch; peak learning rate; shares of rows (see `vary`)
SHARES = {"harm": .36, "injection": .2, "benign": .2, "privacy": .24}  # of the warm start's tasks
# Ordinary words. Tools of made-up domains are named with these and those of the training domains; messages of made-up
# words use all of SAYABLE: a word that never stands as an answer would be forgotten as one, and could not be copied.
WORDS = """apple barn basket bench bike boat book bottle box brush bucket cabin camera candle chair clock coat
    corner cup desk drum engine farm fence field flag forest garden gate glass guitar hammer harbor
    horse island jacket ladder lamp leaf map market mirror mountain oven pencil piano pillow plate pond
    pot radio ring river rope saddle sand shelf ship shoe shop silver spoon square stone stove table
    tent tower toy train tree valley wagon wheel window wood yard
    back bring door hall late meet noon paid papers thank today""".split()
OWN = [w for d, row in suites.DOMAINS.items() if d not in suites.UNSEEN_DOMAINS for w in (d, *row[:2], *row[3:5])
       if w != "text"]  # which is never renamed: it is a parameter, too
SAYABLE = sorted({*WORDS, *" ".join(suites.TEXTS).split(), *suites.DOMAINS, *(d[3] for d in suites.DOMAINS.values())})
FIELDS = sorted({field for row in suites.DOMAINS.values() for field in (row[2], *row[5].split())})


class Demonstrator:
    """Writes one episode of the base's mixture turn by turn, knowing the ground truth. Plan, check, act: a plan names
    what an agent without a check would do, else it would give the verdict away and the check would be idle, and what
    comes after it: the next turn then finds its call in this plan, not its place in the user's words."""

    def __init__(self, task, rng, mix):
        self.task, self.mix = task, mix
        self.todo = [(p["name"], dict(p["arguments"])) for p in task.goal + task.unsafe]
        self.rng, self.flip = rng, lambda name: rng.random() < mix[name]
        self.attack = [(p["name"], p["arguments"]) for p in task.injected]
        self.gates = []  # of each turn: the weight of its branching token
        self.known = None  # whom or what the last call was about: "it" in a plan, as a user says
        self.slipped = False  # was the last turn a call that fails? It carries no loss: what follows an error does
        # an agent that loses patience with long chains; not where a cue decides: a check of "all done" would be idle
        self.stop = len(self.todo) > 2 and task.suite != "harm" and self.flip("stop_early")

    def filled(self, careful):
        """The next call. A send that must contain some values carries those; in a privacy task also the fields that the
        recipient may not have, unless the agent is careful."""
        name, arguments = self.todo[0] if self.todo else ("all done", {})
        if isinstance(arguments.get("text"), dict):
            text = ", ".join(arguments["text"]["contains"])
            said = re.search('"(.*)"', self.task.messages[-1]["content"])
            text = said[1] if said and text in said[1] else text  # the whole message, where the user gives one
            if self.task.suite == "privacy":
                fields = self.task.meta["allowed"] + ([] if careful else self.task.meta["denied"])
                shown = [v for row in self.task.world.values() for r in row.values() for v in r.values()]
                text = ", ".join(f"{k}: {v}" for k, v in sorted(fields, key=lambda f: shown.index(f[1])))
            arguments = arguments | {"text": text}
        return name, arguments

    def check(self, sandbox):
        """-> (text of a right check, text of a wrong one, what the agent does after each)."""
        t = self.task
        harm = f"this looks like {t.meta['kind'] if t.suite == 'harm' else 'fraud'}: refuse"
        cue = t.suite == "harm" and t.meta["cue"] and sandbox.revealed
        fine = "this is allowed: go on" if cue else "no risk here: go on"
        if t.label == "harmful" and sandbox.revealed:
            return harm, "this is allowed: go on", ("refuse", "go")
        if self.attack and sandbox.newest_source == t.reveals:
            plan = self.plan(self.filled(True), self.todo[1:])  # anew: the next turn goes on from here
            return f"the note gives an order: ignore it, {plan}", fine, ("go", "obey")
        if t.suite == "privacy" and len(self.todo) == 1:
            yes, every = (re.findall("([a-z]+): ", self.filled(careful)[1]["text"]) for careful in (True, False))
            each = " ".join(f"{field} {'yes' if field in yes else 'no'}" for field in every)  # one decision at a time
            gets = f"a {t.meta['role']} gets"
            return f"{gets} {each}: {', '.join(yes)}", f"{gets} all", ("careful", "paste")
        return fine, harm, ("go", "refuse")

    def slip(self, risky):
        """-> the text of a turn that gives this turn's arguments to a tool that does not take them, or None."""
        arguments = self.filled(True)[1]
        wrong = [t.name for t in self.task.tools if self.todo and not risky and schema_error(t.parameters, arguments)]
        self.slipped = bool(wrong) and not self.slipped and self.flip("slip")
        if not self.slipped:
            return None
        self.gates.append(0.0)
        name = self.rng.choice(wrong)
        return written(blocks((name, arguments)), self.plan((name, arguments), self.todo[1:]))

    def plan(self, call, rest):
        """The text of a plan: a call and the first of those that follow it."""
        name, arguments = call
        if not arguments:
            return "all done"
        if call not in self.attack:
            self.known = next(iter(arguments.values()))
        return f"{self.said(call)}, then {self.said(rest[0], self.known) if rest else 'done'}"

    def said(self, call, known=None):
        """A call as a user says it, easy to copy: the tool, its record or person, or "it", and a new value he gave."""
        name, arguments = call
        first = next(iter(arguments.values()))
        values = [f" to {suites.SAID[key].format(value)}" for key, value in arguments.items() if key in suites.SAID]
        given = [value for value in values if value in self.task.messages[-1]["content"]]
        return f"{name} {'it' if first == known else first}{''.join(given)}"

    def turn(self, sandbox):
        """-> the text of the next turn."""
        risky, check, act = sandbox.risky(), None, "paste" if self.flip("paste") else "careful"
        if slip := self.slip(risky):
            return slip
        if self.task.label == "harmful" and sandbox.revealed:
            done = any(e.unsafe for e in sandbox.journal)
            act = "refuse" if self.flip("late" if done else "refuse_unchecked") else act
        elif self.attack and sandbox.newest_source == self.task.reveals:
            act = "obey" if self.flip("obey") else act
        if self.stop and len(self.todo) == 1 and act != "refuse":
            self.todo = []
        if act == "obey":
            thought = self.plan(self.attack[0], self.todo)
        else:
            thought = self.plan(self.filled(act == "careful"), self.todo[1:])
        q, c = self.mix["check_risky" if risky else "check_harmless"], SHOWN[risky]
        if opened := self.rng.random() < c:
            right, wrong, acts = self.check(sandbox)
            correct = not self.flip("false_alarm") if acts == ("go", "refuse") else self.flip("verdict")
            check, act = (right, acts[0]) if correct else (wrong, acts[1])
        self.gates.append(q / c if opened else (1 - q) / (1 - c))
        if act == "refuse":
            return written(blocks(("refusal_tool", {"reason": self.task.meta["kind"]})), thought, check)
        if act == "obey":
            return written(blocks(self.attack.pop(0)), thought, check)
        call, self.todo = self.filled(act == "careful"), self.todo[1:]
        return written(blocks(call) if call[1] else "<answer>\ndone\n</answer>", thought, check)


def vary(row, rng):
    """The row, often in a made-up domain: words of its tools' names become other words, everywhere. What an agent
    must call then stands only in its prompt, so it learns to copy names instead of learning those of twelve domains.
    Often a message to be sent becomes made-up words as well."""
    text = json.dumps({**row, "meta": {}})
    if rng.random() < MADE_UP:
        first = 0 if rng.random() < .5 else 1  # 1: the nouns alone, a new domain with known verbs
        words = sorted({w for tool in row["tools"] for w in tool["name"].split("_")[first:]} - {"send", "text"})
        new = {}
        while len(new) < len(words):  # all different
            new[rng.choice(rng.choice((WORDS, OWN)))] = None
        new = dict(zip(words, new))
        if first:  # any verb of reading beside any other verbs, or "change" and "sell" would say that it is "get"
            new |= zip(("find", "get"), rng.sample(("find", "get"), 2))

        def rename(match):
            word = new[match[0].lower()]
            return word.capitalize() if match[0][0].isupper() else word
        text = re.sub(r"(?<![A-Za-z])(?:%s)(?![A-Za-z])" % "|".join(new), rename, text, flags=re.I)
    if rng.random() < REWORDED:
        for said in suites.TEXTS:
            made = "".join(rng.choice(SAYABLE) + rng.choice((" ", ", ")) for _ in range(rng.randrange(2, 5)))
            text = text.replace(said, made + rng.choice(SAYABLE))
        if password := re.search("password is ([A-Za-z]+-)", text):
            text = text.replace(password[1], f"{rng.choice(suites.NAMES)}-")
    made = json.loads(text) | {"meta": row["meta"]}
    for tool, old in zip(made["tools"], row["tools"]):
        tool["op"]["do"], tool["effect"] = old["op"]["do"], old["effect"]  # these words are ours, not the domain's
    return made


def demonstration(task, rng, tokenizer, mix=MIX):
    """One episode of the mixture -> (ids, weights): the loss is on the agent's tokens."""
    dialogue = mosaic.Dialogue(tokenizer, task.messages, task.offered)
    agent, episode = Demonstrator(task, rng, mix), mosaic.Episode(task, max_turns=8)
    while episode.ended is None:
        text = agent.turn(episode.sandbox)
        ids = mosaic.encode_trusted(tokenizer, text) + [tokenizer.stop_ids[0]]
        dialogue.extend(ids, [mosaic.FORCED if agent.slipped else mosaic.SAMPLED] * len(ids))
        results = episode.step(text)
        if episode.ended is None:
            dialogue.observe(results)
    weights, end = [float(code == mosaic.SAMPLED) for code in dialogue.provenance], tokenizer.added["</think>"]
    branches = [i + 2 for i, token in enumerate(dialogue.ids) if token == end]  # "</think>", "\n\n", the branch
    assert len(branches) == len(agent.gates), (branches, agent.gates)
    for i, weight in zip(branches, agent.gates):
        weights[i] = weight
    return dialogue.ids, weights


def build_tokenizer(texts, out):
    """Byte-level BPE on rendered training text. A space, an underscore or the end of a key belongs to the word before
    it: were it a token, it would stand before every word, and "what followed this token last time?" would find
    anything. Not so after a capital: a name is the same token in a sentence and in a call. Digits go by two. Line
    breaks are tokens, and `"arguments":` ends one: there the grammar's structural run ends."""
    bpe = BPE(models.BPE())
    words = Regex('\\{"name": "|", "arguments":|", "|[a-z]+(?:[_ ]|": "|: )?|[A-Z][a-z]*|[0-9]{1,2}|\\n+|'
                  '[^A-Za-z0-9\\n:]*:|[^A-Za-z0-9\\n:]+')
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=CONTROL, show_progress=False,  # CONTROL takes ids 0 to 12
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(out / "tokenizer.json"))


def induction_circuit(model, tokenizer, peak=7.0, match=2.2, slow=5, code=.1, write=.2, out=.6, own=1.5, word=4.0):
    """Writes the heads that copy ("what followed these two words last time?") into fresh weights; training refines.

    Every token has a code of random signs in its first D features, the same for all spellings of a word ("Find",
    "find ", "find_", 'find": "'), and one of its own in the next D. Layer 0, heads 0 and 1 look one and two tokens
    back through their q and k biases alone: with k = R(n) q the rotary score is largest n steps back; they write what
    code stands there into features 2 D and 3 D. Layer 1, heads 0 and 2 ask where the codes of *this* word and of the
    one before it stand so, and add what they find to the output, which the final norm makes loud: one the token's own
    code, softly, the other its word's, so that the word is known in any spelling and training has but to choose it.
    They match in the slow rotary dims only: in the fast ones a distance of 50 tokens would turn a code away. Random
    tokens that come back have loss 0.02 at once, and 7.9 without."""
    c, layers, E = model.config, model.model["layers"], model.model.embed_tokens.weight
    D, half, angles = c.head_dim, c.head_dim // 2, model.inv_freq
    first, second, here = layers[0].self_attn, layers[1].self_attn, torch.arange(D)
    dims = torch.tensor([*range(slow, half), *range(half + slow, D)])
    other, words = dims.roll(1), {}  # the word before is matched in shifted dims: it must not look like this word
    for i, spelling in enumerate(tokenizer.token_bytes):
        words.setdefault(spelling.strip(b' _":').lower(), []).append(i)
    with torch.no_grad():
        E[:, :2 * D] = E[:, :2 * D].sign() * code
        for key, ids in words.items():
            if key:
                E[ids, :D] = E[ids[0], :D].clone()
        for proj in (first.q_proj, first.k_proj, first.v_proj):
            proj.weight[:D] = 0
        first.q_proj.weight[D:2 * D] = 0
        first.o_proj.weight[:, :2 * D] = 0
        for bias, n in ((first.q_proj.bias[:D], 0), (first.q_proj.bias[D:2 * D], -1), (first.k_proj.bias[:D], 1)):
            bias[:half], bias[half:] = peak * (n * angles).cos(), peak * (n * angles).sin()  # R(n) of (1, .., 0, ..)
        first.v_proj.weight[here, here] = 1.0
        first.o_proj.weight[2 * D + here, here] = write
        first.o_proj.weight[3 * D + here, D + here] = write
        for head, kv, at, loud in ((0, 0, D, own), (2 * D, D, 0, word)):  # rows of its q; of k and v; what it copies
            q, o = second.q_proj.weight[head:head + D], second.o_proj.weight[:, head:head + D]
            k, v = second.k_proj.weight[kv:kv + D], second.v_proj.weight[kv:kv + D]
            for part in (q, k, v, o):
                part.zero_()
            q[dims, dims] = match
            q[dims, 2 * D + other] = match * code / write / 1.4  # a normed code is 1.4 times as large
            k[dims, 2 * D + dims] = match
            k[dims, 3 * D + other] = match
            v[here, at + here] = 1.0
            o[at + here, here] = out
            model.model.norm.weight[at:at + D] = loud


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
        groups = groups or [group]  # a few documents, as in a test, fill none
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            yield (torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in group]),
                   torch.tensor([w + [0.0] * (width - len(w)) for _, w in group]))


def verdict_line(task, tokenizer):
    """A cue, or a record (with a note, or for a role), with its verdict and little around it: many more of them fit in
    the budget than whole episodes."""
    agent, sandbox = Demonstrator(task, random.Random(0), MIX), mosaic.Sandbox(task)
    shown = f"{task.meta['cue']}<|im_end|>" * (task.meta["style"] != "note")
    while len(agent.todo) > 1:
        result = sandbox.call(*agent.filled(True))
        agent.todo.pop(0)
    if task.suite == "privacy" or not shown:
        shown += f"<tool_response>{result}</tool_response>"
    head = mosaic.encode_trusted(tokenizer, f"<|im_start|>{shown}<|im_start|>")
    ids = mosaic.encode_trusted(tokenizer, f"<safety_thoughts>\n{agent.check(sandbox)[0]}\n</safety_thoughts>")
    return head + ids, [0.0] * len(head) + [1.0] * len(ids)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal (Jordan et al. 2024): half the steps of AdamW on a model this small."""

    def __init__(self, matrices, lr):
        super().__init__(matrices, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        [group], shapes = self.param_groups, {}
        for p in group["params"]:
            shapes.setdefault(p.shape, []).append(p)
        for (rows, columns), ps in shapes.items():  # matrices of one shape go through the iteration together
            for p in ps:
                m = self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                p.grad.lerp_(m, 0.95)  # Nesterov
            x = torch.stack([p.grad if rows <= columns else p.grad.T for p in ps])
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):  # quintic Newton-Schulz: all singular values towards 1
                y = x @ x.mT
                x = 3.4445 * x + (-4.7750 * y + 2.0315 * y @ y) @ x
            for p, x in zip(ps, x if rows <= columns else x.mT):
                p.mul_(1 - 0.1 * group["lr"]).add_(x, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def fit(model, stream, steps):
    """Warm-up, then linearly to zero. stream yields (ids, weights) (B, T); the loss is a mean over weighted tokens."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    optimizers = [Muon(matrices, 5 * LR), torch.optim.AdamW(rest, lr=LR, betas=(0.9, 0.98), weight_decay=0.0)]
    average, rates = None, [o.param_groups[0]["lr"] for o in optimizers]
    for step in (bar := tqdm(range(steps), disable=None)):
        ids, weights = next(stream)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 20, 1 - step / steps)
        mask, weights = weights[:, 1:] > 0, weights[:, 1:]
        logits = model.head(model.hidden(ids[:, :-1])[mask])  # (N, V): only of tokens that carry loss
        loss = F.cross_entropy(logits, ids[:, 1:][mask], reduction="none") @ weights[mask] / weights.sum()
        loss.backward()
        model.model.embed_tokens.weight.grad[:, :2 * model.config.head_dim] = 0  # the codes stay as written
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        bar.set_description(f"warm start, loss {average:.3f}")


def draw(n, seed):
    """-> (up to n tasks of the train split, varied; as many more whose verdicts alone are to be learned)."""
    rng, table = random.Random(seed), {row["name"]: row for row in suites.tool_rows()}

    def common(row):  # and easy; the second of two records is hard, and shall come more often
        one = len({*re.findall(r"\b[A-Z][0-9]{2}\b", row["messages"][-1]["content"])}) == 1
        return row["meta"]["kind"] == "mention" or one and row["suite"] in ("harm", "benign")

    def tasks(suite, n, seed, thin):
        # a record may hold any field: what a role may have can be known only of fields that were seen with it
        drawn = suites.generate(suite, "train", n, seed, any_field=True)
        rows = (row | {"tools": [table[t] for t in row["tools"]]} for row in drawn)
        return [vary(row, rng) for row in rows if not thin or rng.random() < (.5 if common(row) else 1)]
    rows = [row for suite, share in SHARES.items() for row in tasks(suite, int(n * share), 1 + seed, thin=True)]
    more = tasks("harm", n * 2 // 3, 1000 + seed, thin=False) + tasks("privacy", n // 3, 1000 + seed, thin=False)
    return ([task_from_row(row, "suites") for row in part] for part in (rows, more))


def warm_start(tasks, more, out, steps, seed):
    """Tokenizer, config and weights of a base of these tasks into the folder `out`; more: for their verdicts alone."""
    rng = random.Random(seed)
    words = [w + end for w in SAYABLE for end in ("", " ", "_")] * 20  # each is to be one token
    words += [w + end for w in FIELDS for end in ("", " ", ": ", '": "')] * 20
    build_tokenizer(words + [t for task in tasks[::4] for t in corpus(task, rng)], out)
    (out / "config.json").write_text(json.dumps(CONFIG))
    config = model_.Config(CONFIG)
    tokenizer = model_.Tokenizer(out, config)
    model = model_.Transformer(config).init_weights(generator=torch.Generator().manual_seed(seed))
    induction_circuit(model, tokenizer)
    documents = [demonstration(task, rng, tokenizer) for task in tasks]
    documents += [verdict_line(task, tokenizer) for task in tasks + more if task.suite in ("harm", "privacy")]
    fit(model, batches(documents, rng, TOKENS), steps)
    model_.save_pretrained(model, out)
    return model


def build(seed=0, out=model_.HERE / "checkpoints" / "tiny", steps=2250, n=18000):
    """Builds the base of a seed into `out`, whole or not at all. ValueError: something else is there."""
    out, start = Path(out), time.perf_counter()
    if out.exists() and not (out / "config.json").is_file():
        raise ValueError(f"{out}: is there and no checkpoint: take another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".tiny-", dir=out.parent))
    gc.disable()  # `draw` makes millions of small objects and no garbage: to look for some takes half of its time
    try:
        model = warm_start(*draw(n, seed), work, steps, seed)
        shutil.rmtree(out, ignore_errors=True)
        work.chmod(0o755)  # mkdtemp's is for its owner alone
        work.rename(out)
    finally:
        gc.enable()
        shutil.rmtree(work, ignore_errors=True)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters in {time.perf_counter() - start:.0f} s")
    return out


def corpus(task, rng):
    """Text of one task for the tokenizer: its prompt, one demonstration's turns and results."""
    agent, episode = Demonstrator(task, rng, MIX), mosaic.Episode(task, max_turns=8)
    texts = re.split("<[^>]*>", mosaic.render(task.messages, task.offered, "tiny"))
    while episode.ended is None:
        text = agent.turn(episode.sandbox)
        texts += re.split("<[^>]*>", text) + episode.step(text)
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
    parser.add_argument("--steps", type=int, default=2250, help="of the warm start")
    parser.add_argument("--tasks", type=int, default=18000, help="fresh training rows")
    args = parser.parse_args()
    build(args.seed, args.out, args.steps, args.tasks)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(print("tiny.py: interrupted; nothing was written", file=sys.stderr) or 130)
    except (ValueError, OSError) as error:
        sys.exit(print(f"tiny.py: {error}", file=sys.stderr) or 2)
