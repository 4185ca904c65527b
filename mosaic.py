"""The loop of MOSAIC: an agent plans, may check, and then acts, answers or refuses, turn after turn.

In order: templates, `Dialogue`, the parser of a turn, the grammar as tables over tokens, the loop. Next: preference.py.
Paper -> code: plan, optional check, exactly one action -> `SYSTEM`, `parse_turn`, `Grammar`; learned gate ->
`Grammar.constrain`, `gate_p`; what a check looks at -> `SYSTEM`; refusal with a reason -> `tools.refusal_tool`.

Deviations
1. [ours] The words of SYSTEM and the exact bytes of a turn: the paper names the tags, not their layout.
2. A later user message keeps earlier thinking. Qwen3's own template drops it, and with it every cached prefix.
3. Phi-4's template drops tools and their results. `render` does so too; `Dialogue` writes the schemas into the system
   turn and the results into a user turn, in Qwen's words.
4. [ours] tiny has its own short template: no SYSTEM, a tool is a line "name(parameters) effect", results need no turn.
5. [ours] Strict JSON: single spaces, nesting <= 3, no \\uD800-\\uDFFF. `parse_turn`: any layout, nesting <= 16, numbers
   of <= 4,300 digits. Strict text has no "<" or "</" followed by thi, too, saf or ans: so no tag, and no other word in
   brackets that starts alike. Strict turns are a subset of what `parse_turn` takes.

    python mosaic.py harm-domains-0-0000h     # the transcript, then [refusal after 4 turns, 129 tokens, ...]
"""
import argparse
import codecs
import copy
import functools
import json
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import data
from model import Cache, Decoder, SharedPrompt, load, load_adapter, token_logprobs
from tools import (FORCED, SAMPLED, TAGS, TEMPLATE, TOOL, USER, Episode, FormatError, Rollout, Tool, Turn, parse_turn,
                   play, refusal_tool)

# ---- Templates: messages and tools as text ----
_DATA = json.loads((Path(__file__).parent / "data" / "families.json").read_text("utf-8"))
SYSTEM_VERSION, SYSTEM = data.prompt("agent")  # teaches the form of a turn
TOOL_TEXT = {form: ["".join(lines) for lines in block] for form, block in _DATA["tools"].items()}  # around tools
FAMILIES = _DATA["families"]  # {family: its template}; "fields" in that file says what each field means
_dumps = functools.partial(json.dumps, ensure_ascii=False)


def _turns(messages, row):
    """What follows the system turn as (text, provenance)."""
    texts = [m["content"] if isinstance(m.get("content"), str) else "" for m in messages]
    roles = [m["role"] for m in messages]
    asked = max((i for i, text in enumerate(texts) if roles[i] == "user" and not (
        text.startswith("<tool_response>") and text.endswith("</tool_response>"))), default=len(messages))
    before, opening, closing, after = row["results"]
    for i, (message, role, text) in enumerate(zip(messages, roles, texts)):
        if role == "tool":  # results in a row share one turn
            yield before * (roles[i - 1:i] != ["tool"]) + opening, TEMPLATE
            yield text, TOOL
            yield closing + after * (roles[i + 1:i + 2] != ["tool"]), TEMPLATE
            continue
        head, named, rest = row["head"].partition("{}")
        yield from ((head, TEMPLATE), (role * bool(named), USER), (rest, TEMPLATE))  # a role may come from a file
        thinks, reasoning = row["thinking"] and role == "assistant", message.get("reasoning_content")
        if thinks and not isinstance(reasoning, str):
            *thought, rest = text.split("</think>")
            reasoning = thought[0].rstrip("\n").split("<think>")[-1].lstrip("\n") if thought else ""
            text = rest.lstrip("\n") if thought else text
        shown = thinks and i > asked and (reasoning or i == len(messages) - 1)  # only after the last real question
        if shown:
            yield from (("<think>\n", TEMPLATE), (reasoning.strip("\n"), USER), ("\n</think>\n\n", TEMPLATE))
        yield text.lstrip("\n") if shown else text, USER
        for j, call in enumerate(c.get("function") or c for c in message.get("tool_calls") or []):
            given = call["arguments"]
            given = given if isinstance(given, str) and row["raw"] else _dumps(given)
            yield "\n" * bool(text or j) + "<tool_call>\n", TEMPLATE
            yield f'{{"name": "{call["name"]}", "arguments": {given}}}', USER
            yield "\n</tool_call>", TEMPLATE
        yield row["tail"], TEMPLATE


def _pieces(messages, tools, row, system=None):
    """The prompt as (text, provenance). Only TEMPLATE text may hold control tokens; all else came from outside."""
    given = [m["content"] for m in messages[:1] if m["role"] == "system"]
    system = system or (None if given else row["default"])
    blocks = [[(system, TEMPLATE)]] * bool(system) + [[(text, USER)] for text in given]
    if tools:
        head, foot = TOOL_TEXT[row["tools"]]
        texts = (f"{t.name}({', '.join(t.parameters['properties'])}) {t.effect}\n" if row["tools"] == "lines"
                 else "\n" + _dumps(t.schema() if isinstance(t, Tool) else t) for t in tools)
        blocks += [[(head, TEMPLATE), ("".join(texts), USER), (foot, TEMPLATE)]]
    if blocks:
        said = [piece for block in blocks for piece in [("\n\n", TEMPLATE), *block]][1:]
        yield from [(row["head"].format("system"), TEMPLATE), *said, (row["tail"], TEMPLATE)]
    yield from _turns(messages[len(given):], row)


def render(messages, tools, family, add_generation_prompt=True):
    """The family's own chat template as text, for tests and for people. messages: OpenAI form; tools: None, [Tool] or,
    but for tiny, [schema]. Phi-4 drops tools, calls and results."""
    row = FAMILIES[family]
    if not row["native"]:
        said = [m for m in messages if m["role"] != "tool"]
        tools, messages = None, [{"role": m["role"], "content": m.get("content")} for m in said]
    return "".join(text for text, _ in _pieces(messages, tools, row)) + row["prompt"] * add_generation_prompt


# ---- The dialogue: ids that only grow ----
@functools.lru_cache(maxsize=4096)
def _parts(tokenizer, text):
    pattern = "|".join(map(re.escape, sorted(tokenizer.added, key=len, reverse=True)))
    return [(part, tokenizer.added.get(part)) for part in re.split(f"({pattern})", text)]


def encode_trusted(tokenizer, text):
    """Ids of text that we wrote: the added token where there is one, the canonical tokenisation between them."""
    return [i for part, t in _parts(tokenizer, text) for i in (tokenizer.encode(part) if t is None else [t])]


class Dialogue:
    """Append-only ids of one conversation; .provenance (as long) says where each comes from. Besides the agent's own,
    control ids come from TEMPLATE text alone: users, files and tools go through `Tokenizer.encode`, which cannot give
    one. But for such text, and Phi-4's tools (deviation 3), a prompt is the real tokenizer's ids of `render` with
    SYSTEM (a judge: `system`, trusted too) put first. ValueError: a control token of the family is missing."""

    def __init__(self, tokenizer, messages, tools, system=None):
        self.tokenizer, self.row, self.ids, self.provenance = tokenizer, FAMILIES[tokenizer.family], [], []
        missing = [c for c in self.row["controls"] if c not in tokenizer.added]
        if missing:
            raise ValueError(f"tokenizer.json of family {tokenizer.family}: no token for {', '.join(missing)}")
        self.opened = self.row["prompt"].endswith("<think>\n")  # the prompt holds the first line of the agent's turn
        pieces = _pieces(messages, tools, self.row, system or (SYSTEM if self.row["system"] else None))
        self._append([*pieces, (self.row["prompt"], TEMPLATE)])

    def fork(self):
        """A copy that goes its own way: the prompt is built once for a group."""
        twin = copy.copy(self)
        twin.ids, twin.provenance = self.ids[:], self.provenance[:]
        return twin

    def extend(self, ids, codes):
        """Appends ids; codes: where each comes from."""
        assert len(ids) == len(codes), (len(ids), len(codes))
        self.ids += ids
        self.provenance += codes

    def observe(self, texts, role="tool"):
        """Ends the agent's turn, appends results (role "user": a message; earlier thinking stays), opens the next."""
        stopped = self.ids[-1] in self.tokenizer.stop_ids
        tail = self.row["tail"].removeprefix(self.row["stop"]) if stopped else self.row["tail"]
        messages = [{"role": role, "content": t} for t in ([texts] if isinstance(texts, str) else texts)]
        self._append([(tail, TEMPLATE), *_turns(messages, self.row), (self.row["prompt"], TEMPLATE)])

    def _append(self, pieces):
        parts = [(part, token, code) for text, code in pieces
                 for part, token in (_parts(self.tokenizer, text) if code == TEMPLATE else [(text, None)])]
        for control, run in groupby(parts, lambda part: part[1]):
            texts, _, codes = zip(*run)
            if control is not None:
                self.extend([control] * len(codes), codes)
                continue
            texts = [text.encode(errors="replace").decode() for text in texts]  # a lone surrogate has no bytes
            texts = [unicodedata.normalize("NFC", text) for text in texts] if self.row["nfc"] else texts
            owner = [code for text, code in zip(texts, codes) for _ in text.encode()]  # of each byte
            # what lies between two control tokens is encoded as one string, as the real tokenizer does
            text, space = "".join(texts), "".join(self.row["strip"])
            start = len(text.encode()) - len(text.lstrip(space).encode())
            for token in self.tokenizer.encode(text.strip(space)):
                end = start + len(self.tokenizer.token_bytes[token])
                self.extend([token], [max(owner[start:end], default=TOOL)])  # as untrusted as the worst of its bytes
                start = end


# ---- The same grammar as tables over tokens: from bytes to tokens, then tags and names ----
DEAD, PLAN, CHECK, ANSWER, JSON, START, CALL, FINAL = range(-1, 7)  # DEAD: out of the grammar; what the others expect:
_STACKS = ("first plan", "first check", "first answer", "_ { pairs? } } nl called", "start", "call", "final")
_NAME = '{"name": %s, "arguments":'
DEPTH = 4  # how deep objects and arrays nest, the call's own object included
# Strict JSON and UTF-8: nothing overlong, no surrogates, none as \uXXXX (code). One byte decides each step: LL(1).
# A character is itself, _ a space, XX-YY a range of bytes, | another case, symbol? may be left out
_RULES = r"""
wide = C2-DF 80-BF | E0-E0 A0-BF 80-BF | E1-EC 80-BF 80-BF | ED-ED 80-9F 80-BF | EE-EF 80-BF 80-BF
    | F0-F0 90-BF 80-BF 80-BF | F1-F3 80-BF 80-BF 80-BF | F4-F4 80-8F 80-BF 80-BF;
hex = 30-39 | 41-46 | 61-66;
int = 0 frac? exp? | 31-39 digits? frac? exp?;
other = 30-39 | 41-43 | 45-46 | 61-63 | 65-66;
code = other hex hex hex | d 30-37 hex hex | D 30-37 hex hex;
escape = " | \ | / | b | f | n | r | t | u code;
chars = " | \ escape chars | 20-21 chars | 23-5B chars | 5D-7F chars | wide chars;
digits? = 30-39 digits?;
frac? = . 30-39 digits?;
sign? = + | -;
exp? = e sign? 30-39 digits? | E sign? 30-39 digits?;
value = " chars | int | - int | t r u e | f a l s e | n u l l | { pairs? } | [ items? ];
items? = value item?;
item? = , _ value item?;
pairs? = " chars : _ value pair?;
pair? = , _ " chars : _ value pair?"""


def _rules():
    """{symbol: {byte: the symbols that take its place}}: `_RULES`, and those of a plan's, check's or answer's text."""
    rules = {chr(b): {b: ()} for b in range(33, 127)} | {"_": {32: ()}}
    for name in re.findall("[0-9A-F]{2}-[0-9A-F]{2}", _RULES):
        rules[name] = dict.fromkeys(range(int(name[:2], 16), int(name[3:], 16) + 1), ())
    for symbol, cases in (rule.split("=") for rule in _RULES.split(";")):
        rules[symbol.strip()] = {byte: (*then, *rest) for first, *rest in map(str.split, cases.split("|"))
                                 for byte, then in rules[first].items()}
    # "line?" has just read a line break: the text may end. "text<t" has just read "<t" or "</t": no text holds three
    # letters of a tag, so none holds a tag, by any spelling
    tags = {"<" + tag[:3] for tag in TAGS}
    for seen in (begun := {tag[:n] for tag in tags for n in range(4)}):
        rules["text" + seen] = {byte: (*then, "text") for byte, then in rules["wide"].items()}
        for c in (c for c in map(chr, range(128)) if seen + c not in tags):
            then = next(t for t in ((seen + c).replace("</", "<"), c, "") if t in begun)
            rules["text" + seen][ord(c)] = ("line?" if c == "\n" else "text" + then,)
    return rules | {"nl": {10: ()}, "line?": rules["text"], "first": rules["text"] | {10: ("text",)}}


def _moves(words):
    """The rules as an automaton over bytes, then over V words -> {stack: state}, next states (S, V) int16, -1 = dead.
    A state is the stack of symbols that still have to come."""
    rules, number, rows = _rules(), {tuple(stack.split()): i for i, stack in enumerate(_STACKS)}, []
    while len(rows) < len(number):
        stack, row = list(number)[len(rows)], [-1] * 256
        for i, symbol in enumerate(stack):
            for byte, then in rules.get(symbol, {}).items():  # no rule: a tag has to come, or nothing
                after = (*then, *stack[i + 1:])
                if after.count("}") + after.count("]") <= DEPTH:
                    row[byte] = number.setdefault(after, len(number))
            if not symbol.endswith("?"):
                break
        rows.append(row)
    moves = np.array([*rows, [-1] * 256], np.int16)  # (S + 1, 256), the last row is that of -1
    kinds, kind = np.unique(moves, axis=1, return_inverse=True)  # bytes that move alike in every state
    kinds, kind = kinds.T.copy(), bytes(kind.ravel().tolist())

    @functools.lru_cache(maxsize=None)
    def walk(word):  # (S + 1,): where each state goes; words that begin alike walk together
        return kinds[word[-1]][walk(word[:-1])] if word else np.arange(len(moves), dtype=np.int16)
    return number, np.stack([walk(word.translate(kind)) for word in words])[:, :-1].T


class Grammar:
    """Strict turns as tables: masks live beside the logits, states on the host, where a sampled token has to go anyway.
    S states, V rows of the model's vocabulary; cold 1.5 s at V = 152,064.

    next_state (S + 1, V) int16, -1 = not live; to_end (S + 1,): fewest tokens to the end, stop token included, by way
    of refusal_tool if it has to be a call; last rows: DEAD. States from S on are nodes of a pool of name tries,
    one for each set of offered tools, whose root is passed along with the states. .start, .final: before and after a
    turn with its stop token. In .gate_state p(check) is that of .safety_token. .free_mask (V,): free mode may sample
    all but padding rows and control ids other than a turn's tags and stops."""

    def __init__(self, tokenizer, device="cpu", parallel=False):
        self.tokenizer, self.device, self.V, self.final = tokenizer, device, tokenizer.vocab_size, FINAL
        self.start = PLAN if FAMILIES[tokenizer.family]["prompt"].endswith("<think>\n") else START
        table = self._compile(parallel)
        self.S = len(table) - 1
        counts = np.stack([np.bincount(row + 1, minlength=self.S + 1) for row in table])  # tokens from state to state
        to_end = np.where(np.arange(self.S + 1) == FINAL, 0, 10_000)
        for _ in range(self.S):
            to_end = np.minimum(to_end, 1 + np.where(counts[:, 1:] > 0, to_end[:-1], 9_999).min(1))
            to_end[CALL] = to_end[JSON] + len(tokenizer.encode(_NAME % _dumps(refusal_tool.name)))
        assert (to_end[:-1] < 10_000).all(), "a state without a way to the end"
        alone = np.where(counts[:, 0] == self.V - 1, table.argmax(1), -1)
        barred = {i for c, i in tokenizer.added.items() if c.strip("</>") not in TAGS[:4]} - set(tokenizer.stop_ids)
        free = [bool(word) and i not in barred for i, word in enumerate(tokenizer.token_bytes)]
        self.next_state, self.to_end, self.free_mask = (torch.tensor(x, device=device) for x in (table, to_end, free))
        self._table, self._alone = table, alone.tolist()
        self._roots, self._nodes, self._pool = {}, [], None

    def _compile(self, parallel):
        """-> (S + 1, V) int16. Tags are runs of fixed ids laid over the byte automaton: the canonical tokenisation of
        all bytes from the start of a closing tag to the end of the next opening one. Nothing else can spell a tag:
        texts cannot hold one, and inside of a call's JSON string it is text."""
        added, row = set(self.tokenizer.added.values()), FAMILIES[self.tokenizer.family]
        number, moves = _moves(self.tokenizer.token_bytes)
        planned, checked, answered = (number["line?", end] for end in ("plan", "check", "answer"))
        called, n, nodes, paths = number["called",], len(moves), {}, []
        table = np.pad(moves, ((0, 64), (0, 0)), constant_values=-1)
        table[:, [i in added or not word for i, word in enumerate(self.tokenizer.token_bytes)]] = -1
        for state, text, target in (
                (planned, "</think>\n\n<safety_thoughts>\n", CHECK), (planned, "</think>\n\n<tool_call>\n", CALL),
                (planned, "</think>\n\n<answer>\n", ANSWER), (checked, "</safety_thoughts>\n<tool_call>\n", CALL),
                (checked, "</safety_thoughts>\n<answer>\n", ANSWER), (START, "<think>\n", PLAN),
                (answered, "</answer>" + row["stop"], FINAL), (called, "</tool_call>" + row["stop"], FINAL),
                *[(called, "</tool_call>\n<tool_call>\n", CALL)] * parallel):
            *ids, last = encode_trusted(self.tokenizer, text)
            paths.append([])
            for token in ids:
                paths[-1].append((state, token))
                node = nodes.setdefault((state, token), n + len(nodes))
                if table[state, token] >= 0:  # "</" may still be the text "</b>": go on as either
                    table[node] = table[table[state, token]]
                table[state, token] = node
                state = node
            assert table[state, last] < 0, f"{text!r} can be read in two ways"
            table[state, last] = target
            paths[-1].append((state, last))
        forks = {next(pair for pair in paths[0] if pair not in path) for path in paths[1:3]}
        [(self.gate_state, self.safety_token)] = forks  # the check leaves both other branches at one place
        return table[:n + len(nodes) + 1]  # the last row is that of DEAD

    def names(self, tool_names):
        """Root of the trie of '{"name": NAME, "arguments":' over these names and refusal_tool, made once for a set."""
        key = tuple(sorted({*tool_names, refusal_tool.name}))
        if key not in self._roots:
            self._pool = None
            self._roots[key], _ = self._grow([self.tokenizer.encode(_NAME % _dumps(name)) for name in key])
        return self._roots[key]

    def _grow(self, spellings):
        """A node of the pool: [(token, next state, fewest tokens to the end from there)] -> its state and its own."""
        state, node = self.S + len(self._nodes), []
        self._nodes.append(node)
        for token in sorted({ids[0] for ids in spellings}):
            rest = [ids[1:] for ids in spellings if ids[0] == token]
            node.append((token, *(self._grow(rest) if rest[0] else (JSON, self.to_end[JSON].item()))))
        return state, 1 + min(cost for _, _, cost in node)

    def mask(self, states, remaining):
        """Live tokens (B, V) bool. states, remaining: (B,) int64; remaining counts the token being chosen, and a
        token is live if the end can be reached with those that then remain. Rows DEAD or .final have none."""
        if self._pool is None:  # (N, W, 2), made again after a new trie; a node of fewer children repeats its first
            width = max(map(len, self._nodes))
            pool = [[(token, cost) for token, _, cost in n + n[:1] * (width - len(n))] for n in self._nodes]
            self._pool = torch.tensor(pool, device=self.device)
        named = states >= self.S
        live = self.to_end[self.next_state[states.masked_fill(named, DEAD)].int()] < remaining[:, None]  # (B, V)
        ids, cost = self._pool[(states - self.S).clamp(min=0)].unbind(-1)  # (B, W)
        return live.scatter(1, ids, torch.where(named[:, None], cost < remaining[:, None], live.gather(1, ids)))

    def step(self, state, root, token):
        """-> the next state (all int, on the host). A token that is not live gives DEAD, and so does any after that."""
        if state >= self.S:
            return next((after for child, after, _ in self._nodes[state - self.S] if child == token), DEAD)
        after = int(self._table[state, token])
        return root if after == CALL else after

    def forced(self, state):
        """The one live token of a state that has just one, whatever the budget; -1 elsewhere."""
        if state < self.S:
            return self._alone[state]
        children = self._nodes[state - self.S]
        return children[0][0] if len(children) == 1 else -1

    def constrain(self, logits, states, remaining, gate_mode="learned", strict=True):
        """Logits (B, V) fp32 -> those that are sampled from and that training recomputes: -inf where not live. gate:
        "learned", "always" (if the budget allows a check), "never", or a bias added to .safety_token; it acts in
        .gate_state alone. strict=False: free mode, where states, DEAD or not, serve the gate alone."""
        live = self.mask(states, remaining) if strict else self.free_mask
        bias = {"learned": 0.0, "always": 1e4, "never": -1e4}.get(gate_mode, gate_mode)  # at 1e4 the other side has p = 0
        logits = logits.masked_fill(~live, -torch.inf)
        logits[:, self.safety_token] += bias * (states == self.gate_state)
        return logits

    def gate_p(self, logprobs, states):
        """Probability of a check (B,) under logprobs of constrained logits; nan in any other state than the gate."""
        return logprobs[:, self.safety_token].exp().masked_fill(states != self.gate_state, torch.nan)


get_grammar = functools.lru_cache(maxsize=4)(Grammar)  # states and roots mean nothing to another Grammar


# ---- episodes: an agent's turns, sampled or scripted, meet the sandbox ----
# All limits in one place [ours]. room: what an episode may add to its prompt; without room for one more turn it ends as
# "budget". positions: of the KV cache, over all rows (or one group's rows if that is more): as many rows as fit are
# sampled at once. 131,072 are 7.5 GB for the 7B, 19.3 GB for Qwen3-4B, 26.8 GB for Phi-4
LIMITS = {"tiny": dict(max_turns=6, turn_tokens=96, room=560, positions=81_920)}
REAL_LIMITS = dict(max_turns=10, turn_tokens=768, room=7168, positions=131_072)


# ---- the sampler: rows of one KV cache, each an episode of its own ----
class Row:
    """A row of the batch: an episode, its dialogue, and `pending`, the tokens that the cache has not seen yet; state
    and left: the grammar's state in the turn, and the tokens that it may still have."""

    def __init__(self, key, slot, episode, dialogue, root, limit):
        self.key, self.slot, self.episode, self.dialogue, self.root = key, slot, episode, dialogue, root
        self.limit = limit  # of its ids
        self.logprobs, self.states, self.spans, self.pending = [], [], [], []

    def begin_turn(self, state, left):
        self.start, self.gate, self.state, self.left = len(self.dialogue.ids), None, state, left

    def add(self, token, code, state):
        self.dialogue.extend([token], [code])
        self.pending.append(token)
        self.state, self.left = state, self.left - 1

    def end_turn(self, tokenizer):
        """Closes the turn and lets the sandbox answer; True while the episode goes on."""
        ids = self.dialogue.ids[self.start:]
        results = self.episode.step(tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids]), self.gate)
        self.spans.append((self.start, len(self.dialogue.ids)))
        if ids[-1] not in tokenizer.stop_ids or (self.left == 0 and self.episode.ended):
            self.episode.ended = "budget"  # closed by the budget, as far as one can tell from its last token
        if self.episode.ended is None:
            before, said = len(self.dialogue.ids), self.episode.user_message
            self.dialogue.observe(*((results,) if said is None else (said, "user")))
            self.pending += self.dialogue.ids[before:]
        return self.episode.ended is None

    def rollout(self, tokenizer):
        d, e = self.dialogue, self.episode
        assert len(self.logprobs) == len(self.states) == d.provenance.count(SAMPLED)
        return Rollout(e.task, e.turns, e.sandbox, e.ended, e.gates, d.ids, d.provenance, self.logprobs, self.states,
                       self.spans, safety_tokens(tokenizer, d.ids, self.spans), e.messages)


class Sampler:
    """Batched KV-cached decoding of whole episodes over one weight set. grammar: strict | free; temperature 0: greedy;
    gate: see Grammar.constrain; refusal: see Episode; max_rows: rows at once (None: what LIMITS allows, but a whole
    group at least); watch(ids) is told every piece as it happens.

    A task's prompt is prefilled once and forked to its group. Each row keeps its cache through its tool calls: a result
    is appended as one chunk. Finished rows leave, and waiting tasks take their slots. Rows whose pending part is one
    token decode together; rows with a chunk wait until a quarter of the batch waits with them, or nobody decodes."""

    def __init__(self, model, tokenizer, tasks, sizes, *, grammar="strict", temperature=1.0, gate_mode="learned",
                 refusal="terminal", max_rows=None, generator=None, watch=lambda ids: None):
        self.model, self.tokenizer, self.gate_mode, self.refusal, self.watch = model, tokenizer, gate_mode, refusal, watch
        self.strict, self.temperature, self.generator = grammar == "strict", temperature, generator
        self.limits, device = LIMITS.get(tokenizer.family, REAL_LIMITS), model.device
        parallel = all(task.public.get("parallel") for task in tasks)  # else a strict turn could be malformed for one
        # training rebuilds masks from the one Grammar of (tokenizer, device), so not from a parallel one's states
        self.grammar = get_grammar(tokenizer, str(device), True) if parallel else get_grammar(tokenizer, str(device))
        prompts = [Dialogue(tokenizer, task.messages, task.offered) for task in tasks]
        roots = [self.grammar.names([tool.name for tool in task.offered]) for task in tasks]  # all now: one pool
        # (task, prompt, root, size, number of its first rollout), reversed as pop() takes the end
        self.queue = [*zip(tasks, prompts, roots, sizes, accumulate(sizes, initial=0))][::-1]
        longest, most = max((len(p.ids) for p in prompts), default=0), model.config.max_position_embeddings
        if longest + self.limits["turn_tokens"] > most:  # said before anything is sampled
            raise ValueError(f"a prompt of {longest} tokens leaves no room for a turn in the model's {most} positions")
        context = min(longest + self.limits["room"], most)
        rows = max_rows or self.limits["positions"] // context
        self.max_rows = max(1, min(rows, sum(sizes)), *sizes)
        self.cache = Cache(model.config, self.max_rows, context, device, model.dtype)
        self.decode = Decoder(model, self.cache)
        self.rows, self.done, self.device = [], {}, device
        self.first = self.grammar.start, self.limits["turn_tokens"]  # what a turn begins with
        # (B, C), to sample from
        self.last = torch.zeros(self.max_rows, model.config.hidden_size, device=device, dtype=model.dtype)

    def run(self):
        """-> list of Rollouts, task-major."""
        while self.queue or self.rows:
            self.admit()
            if ready := [r for r in self.rows if not r.pending]:
                self.sample(ready)
                self.finish_turns(ready)
            self.forward()
        return [self.done[i] for i in range(len(self.done))]

    def admit(self):
        """Prefills as many waiting prompts as there are free slots for their groups, and forks each to its group."""
        new, free = [], self.max_rows - len(self.rows)
        while self.queue and self.queue[-1][3] <= free:
            new.append(self.queue.pop())
            free -= new[-1][3]
        if not new:
            return
        lengths = [len(prompt.ids) for _, prompt, *_ in new]
        ids = pad_sequence([torch.tensor(prompt.ids) for _, prompt, *_ in new], batch_first=True).to(self.device)
        prefill = Cache(self.model.config, *ids.shape, self.device, self.model.dtype)
        hidden = self.model.hidden(ids, prefill, torch.tensor(lengths, device=self.device))  # (tasks, P, C)
        for j, (task, prompt, root, n, key) in enumerate(new):
            slots = list(range(len(self.rows), len(self.rows) + n))
            self.cache.copy(j, slots, prefill)
            self.last[slots] = hidden[j, lengths[j] - 1]
            for g, slot in enumerate(slots):
                episode = Episode(task, self.refusal, prompt.opened, self.limits["max_turns"])
                limit = min(lengths[j] + self.limits["room"], self.model.config.max_position_embeddings)
                self.rows.append(Row(key + g, slot, episode, prompt.fork(), root, limit))
                self.rows[-1].begin_turn(*self.first)

    def sample(self, ready):
        """One token for every ready row, and every token that the grammar then forces."""
        slots, states, left = self.put([(r.slot, r.state, r.left) for r in ready]).T  # (B,)
        logits = self.decode.head(self.last[slots]).float() / (self.temperature or 1.0)  # (B, V)
        learned = torch.log_softmax(self.grammar.constrain(logits, states, left, strict=self.strict), -1)
        gate_p = self.grammar.gate_p(learned, states)  # (B,), the model's own p; NaN away from the gate
        logprobs = learned if self.gate_mode == "learned" else torch.log_softmax(
            self.grammar.constrain(logits, states, left, self.gate_mode, self.strict), -1)
        if self.temperature:  # argmax(p / Exp(1)) is a draw from p; -log(u) is 5 times faster than exponential_()
            u = torch.rand(logprobs.shape, generator=self.generator, device=self.device)
            tokens = (logprobs.exp() / -u.log_()).argmax(-1)
        else:
            tokens = logprobs.argmax(-1)
        drawn = logprobs.gather(1, tokens[:, None])[:, 0]
        for row, token, logprob, p in zip(ready, tokens.tolist(), drawn.tolist(), gate_p.tolist()):  # the one wait
            row.logprobs.append(logprob)
            row.states.append((row.state, row.left))
            row.gate = p if p == p else row.gate
            row.add(token, SAMPLED, self.grammar.step(row.state, row.root, token))
            while self.strict and (token := self.grammar.forced(row.state)) >= 0:
                row.add(token, FORCED, self.grammar.step(row.state, row.root, token))

    def finish_turns(self, ready):
        leaving = []
        for row in ready:
            self.watch(row.pending)
            if row.dialogue.ids[-1] in self.tokenizer.stop_ids or row.left == 0:
                before, going = len(row.dialogue.ids), row.end_turn(self.tokenizer)
                if going and len(row.dialogue.ids) + self.limits["turn_tokens"] > row.limit:
                    row.episode.ended, going = "budget", False
                self.watch(row.dialogue.ids[before:])
                if not going:  # a result that no turn follows is not the trajectory's
                    del row.dialogue.ids[before:], row.dialogue.provenance[before:]
                row.begin_turn(*self.first) if going else leaving.append(row)
        for row in sorted(leaving, key=lambda r: -r.slot):  # the last row moves in: rows stay a prefix of the slab
            self.done[row.key], mover = row.rollout(self.tokenizer), self.rows.pop()
            if mover is not row:
                self.cache.copy(mover.slot, [row.slot])
                self.last[row.slot] = self.last[mover.slot]
                mover.slot, self.rows[row.slot] = row.slot, mover

    def forward(self):
        """Feeds pending tokens to the cache: the waiting chunks, then single tokens of all rows at once."""
        chunks = [r for r in self.rows if len(r.pending) > 1]
        single = any(len(r.pending) == 1 for r in self.rows)
        if chunks and (not single or 4 * len(chunks) >= len(self.rows)):
            self.feed(chunks, self.put([r.slot for r in chunks]))
        if single:  # one slice of the slab, no copy; a row that waits with a chunk feeds a dummy token of length 0
            self.feed(self.rows, None)

    def feed(self, rows, slots):
        taken = [r.pending if slots is not None or len(r.pending) == 1 else [] for r in rows]
        width = max(map(len, taken))
        ids, lengths = self.put([p + [0] * (width - len(p)) for p in taken]), self.put([len(p) for p in taken])
        self.cache.bound = max(len(r.dialogue.ids) - len(r.pending) for r in self.rows)
        if slots is None:
            now = self.decode(ids, lengths)[:, 0]  # (B, C)
            self.last[:len(rows)] = torch.where(lengths[:, None] > 0, now, self.last[:len(rows)])
        else:
            hidden = self.model.hidden(ids, self.cache, lengths, slots)  # (B, T, C)
            self.last[slots] = hidden[torch.arange(len(rows), device=self.device), lengths - 1]
        for row, fed in zip(rows, taken):
            row.pending = row.pending[len(fed):]

    def put(self, values):
        """A list as a tensor on the device. To a CUDA card a copy from pinned memory is queued, and nobody waits."""
        if self.device.type == "cuda":
            return torch.tensor(values).pin_memory().to(self.device, non_blocking=True)
        return torch.tensor(values, device=self.device)


@torch.no_grad()
def rollout(model, tokenizer, tasks, group_size=1, **options):
    """Samples group_size (one for all, or a list) trajectories of every task -> list of Rollouts, task-major; options:
    see Sampler. ValueError: a prompt that fills the model's positions."""
    stop, sizes = FAMILIES[tokenizer.family]["stop"], group_size
    if tokenizer.added.get(stop) not in tokenizer.stop_ids:  # a base model's: no turn would ever end
        raise ValueError(f"eos_token_id has no {stop}, which ends a turn: add its id to generation_config.json")
    sizes = sizes if isinstance(sizes, list) else [sizes] * len(tasks)
    return Sampler(model, tokenizer, tasks, sizes, **options).run()


def safety_tokens(tokenizer, ids, spans):
    """How many of the agent's tokens touch <safety_thoughts> ... </safety_thoughts>, tags included; found by bytes, so
    that it holds whether a tag is one token or several."""
    total = 0
    for start, end in spans:
        pieces = [tokenizer.token_bytes[i] for i in ids[start:end]]
        # a JSON string may quote the tags, but holds no line break
        if found := re.search(rb"</think>\n\n(<safety_thoughts>.*?</safety_thoughts>)", b"".join(pieces), re.S):
            ends = [*accumulate(map(len, pieces))]
            total += sum(a < found.end(1) and b > found.start(1) for a, b in zip([0, *ends], ends))
    return total


def sampled_logprobs(model, tokenizer, rollouts, temperature=1.0, gate_mode="learned", strict=False):
    """Logprobs of the sampled tokens under the distribution that drew them -> (N,) fp32, rollout after rollout.

    The mask is rebuilt from the recorded states; temperature, gate and strict must be those of the sampling. Template,
    tool and forced tokens are not among the N: their loss is 0 and their gradient exactly 0. Neighbours that begin with
    the same prompt share it (model.SharedPrompt)."""
    grammar = get_grammar(tokenizer, str(model.device))
    shared = [(P, list(rows)) for (P, _), rows in groupby(rollouts, lambda r: (r.spans[0][0], r.ids[:r.spans[0][0]]))]
    tree = SharedPrompt([[P, *(len(r.ids) - P for r in rows)] for P, rows in shared], model.device, model.dtype)
    ids, codes = (pad_sequence([torch.tensor(of(rows[0])[:P] + [x for r in rows for x in of(r)[P:]])
                                for P, rows in shared], batch_first=True).to(model.device)  # (B, T)
                  for of in (lambda r: r.ids, lambda r: r.provenance))
    states = torch.tensor([s for r in rollouts for s in r.states], device=model.device)  # (N, 2)
    return token_logprobs(model, ids, codes == SAMPLED, temperature, layout=tree, constrain=lambda logits, index: (
        grammar.constrain(logits, *states[index].unbind(1), gate_mode, strict)))


# ------------------------------------------------------------------------------ the command line
class Parser(argparse.ArgumentParser):
    """The argument parser of all commands: an error is one line and exit 2, without the usage."""

    def error(self, message):
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def gate_option(text: str) -> str | float:
    """The value of --gate: learned, always, never, or a bias on the logit of opening a check."""
    if text in ("learned", "always", "never"):
        return text
    bias = float(text)
    if not abs(bias) <= 1e4:  # 1e4 is "always"; beyond fp32 it would make NaN of every other logit
        raise ValueError(text)
    return bias


def count_option(text: str) -> int:
    """The value of an option that counts something: a whole number from 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def run_folder(model_name: str) -> Path:
    """Where train.py writes and where eval.py and mosaic.py look, unless they are told otherwise."""
    return Path("runs") / Path(model_name).name


def run_command(name: str, main) -> None:
    """Runs a command and exits as all of them do: 0 done, 1 a failure at run time, 2 arguments or files,
    130 Ctrl-C. Whatever goes wrong is one line on standard error."""
    try:
        main()
        status = 0
    except KeyboardInterrupt as stop:
        print(f"\n{name}: {str(stop) or 'interrupted'}", file=sys.stderr)
        status = 130
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 2
    except (RuntimeError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)


def main():
    parser = Parser(description="One task, the transcript as it happens.", allow_abbrev=False)
    parser.add_argument("task", help="what a user asks, or the id of an embedded task")
    parser.add_argument("--model", default="tiny", help="tiny | qwen2.5-7b | qwen3-4b-thinking | phi-4 | DIR")
    parser.add_argument("--adapter", metavar="DIR", help="default: runs/<model>/adapter if it is there")
    parser.add_argument("--tools", metavar="FILE.json", help='{"tools": [], "world": {}}; default: files and mail')
    parser.add_argument("--gate", type=gate_option, default="learned", help="learned | always | never | a bias on its logit")
    parser.add_argument("--refusal", choices=("terminal", "replan"), default="terminal")
    args = parser.parse_args()
    task = data.demo_task(args.task, args.tools)
    data.ensure_base(args.model)
    model, tokenizer = load(args.model)
    adapter = args.adapter or run_folder(args.model) / "adapter"
    if args.adapter or (Path(adapter) / "adapter_config.json").is_file():
        load_adapter(model, adapter)
        print(f"[adapter {adapter}]")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character

    def watch(ids):
        print(decoder.decode(b"".join(tokenizer.token_bytes[i] for i in ids)), end="", flush=True)
    watch(Dialogue(tokenizer, task.messages, task.offered).ids)
    options = dict(temperature=0.0, gate_mode=args.gate, refusal=args.refusal, max_rows=1, watch=watch)
    [r] = rollout(model, tokenizer, [task], **options)
    gates = ", ".join("-" if p is None else f"{p:.2f}" for p, _, _ in r.gates)
    print(f"\n[{r.ended} after {len(r.turns)} turns, {r.n_sampled} tokens, {r.safety_tokens} in checks; gate {gates}; "
          f"executed: {', '.join(e.name for e in r.journal) or 'nothing'}]")


if __name__ == "__main__":
    run_command("mosaic.py", main)
