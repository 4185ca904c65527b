"""The loop of MOSAIC: an agent plans, may check, and then acts, answers or refuses, turn after
turn.

In order: the loop (`rollout`, the KV-cached `Sampler`); the log-probabilities of what it sampled;
the dialogue, which turns messages into ids. Behind the line: the chat templates, the strict grammar
as tables over tokens, and the command line.

Paper -> code
    plan, optional check, exactly one action [2+]       SYSTEM teaches it, tools.parse_turn reads it
    the learned gate: check or not [2+]                 `constrain`, `gate_probability`
    what a check looks at [2+]                          SYSTEM (data/prompts/agent.txt)
    refusal with a reason [2+]                          tools.refusal_tool
    one distribution for sampling and training          `constrain`

Deviations
1. [ours] The words of SYSTEM and the exact bytes of a turn: the paper names the tags, not their
   layout.
2. When a later user message arrives, earlier thinking stays in the dialogue. Qwen3's own template
   drops it, and with it every cached prefix.
3. Phi-4's template drops tools and their results. ChatML's (SmolLM2's) drops tools, too, and writes
   a result as a turn of a role "tool". `render` does as they do; `Dialogue` writes the schemas
   into the system turn and the results into a user turn, in Qwen's words.
4. [ours] tiny has its own short template: no SYSTEM, a tool is a line "name(parameters) effect",
   and results need no turn of their own. compact (SmolLM2, once data/smollm2.py has warmed it up)
   is ChatML with such lines in place of the schemas, and a shorter SYSTEM.
5. [ours] Strict JSON has single spaces, nests at most 3 deep, the arguments included, and holds no
   \\uD800-\\uDFFF. Strict text holds no "<thi", "<too", "<saf" or "<ans", nor these with "</": so
   no tag, and no <thing> or <answers> either. Strict turns are a subset of what `parse_turn`
   takes.

    python mosaic.py harm-domains-0-0000h     # the transcript, then [refusal after 4 turns, ...]

Next file: preference.py.
"""
import argparse
import codecs
import copy
import functools
import json
import math
import os
import re
import signal
import sys
import time
import unicodedata
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import data
from model import (
    CHECKPOINTS,
    Cache,
    Decoder,
    SharedPrompt,
    load,
    load_adapter,
    packed_weights,
    progress,
    token_logprobs,
    visible,
)
from tools import FORCED, SAMPLED, TAGS, TEMPLATE, TOOL, USER, Episode, Rollout, Task, Tool
from tools import FormatError, Turn, parse_turn, play  # noqa: F401: also found under mosaic's name
from tools import refusal_tool

# {name: (version, text)} of the texts that dialogues begin with: they teach the form of a turn. A
# family's field "system" names its own. "agent_compact" says in 65 words what "agent" says in 207.
SYSTEMS = {name: data.prompt(name) for name in ("agent", "agent_compact")}
SYSTEM_VERSION, SYSTEM = SYSTEMS["agent"]

_FAMILY_FILE = json.loads((data.HERE / "families.json").read_text("utf-8"))
FAMILIES = _FAMILY_FILE["families"]
# FAMILIES[family] is its chat template. What its fields mean:
#   head, tail  around a turn; {} in head is the role     stop      the token that ends a turn
#   prompt      opens the agent's turn                    default   system text when none is given
#   results     four texts: before the first tool result, around each (two), after the last
#   controls    added tokens that a dialogue needs        system    which of SYSTEMS they begin with
#   tools       "schemas" or "lines", see TOOL_TEXT       native    does it know tools at all?
#   thinking    shows reasoning as a <think> block
#   raw         are a recorded call's arguments, if they are text, kept as they are?
#   strip       white space that its control tokens swallow on both sides
#   drops       if not native: roles whose turns its own template drops

# {"schemas" | "lines": (what stands before the tools in the system turn, what stands behind them)}
TOOL_TEXT = {
    form: ("".join(before), "".join(after))
    for form, (before, after) in _FAMILY_FILE["tools"].items()
}

# All limits of an episode in one place [ours].
#   max_turns    turns of the agent, counted from the last user message
#   turn_tokens  sampled and forced tokens of one turn
#   room         tokens that an episode may add to its prompt; without room for a turn more it ends.
#                Like max_turns, a public benchmark may set it: results of its tools may be long
#   positions    size of the KV cache, rows times length: as many rows are sampled at once as fit (a
#                whole group at least). 131,072 are 7.5 GB for the 7B, 19.3 GB for Qwen3-4B and
#                26.8 GB for Phi-4
LIMITS = {
    "tiny": {"max_turns": 6, "turn_tokens": 96, "room": 560, "positions": 81_920},
    "compact": {"max_turns": 6, "turn_tokens": 192, "room": 1120, "positions": 81_920},
}
REAL_LIMITS = {"max_turns": 10, "turn_tokens": 768, "room": 7168, "positions": 131_072}

NOT_FINITE = ("the model's logits are NaN or infinite: its weights are broken, or its dtype is too "
              "narrow (where float16 overflows, bfloat16 as torch_dtype in config.json does not)")


# ------------------------------------------------------------------------ the loop: whole episodes
@torch.no_grad()
def rollout(model, tokenizer, tasks: list[Task], group_size: int | list[int] = 1,
            **options) -> list[Rollout]:
    """Samples group_size trajectories (one number for all tasks, or a list) of every task.

    Returns the Rollouts, task after task. options: see Sampler. Raises ValueError where a prompt
    fills the model's positions, or where the tokenizer has no token that ends a turn."""
    check_stop(tokenizer)
    sizes = group_size if isinstance(group_size, list) else [group_size] * len(tasks)
    return Sampler(model, tokenizer, tasks, sizes, **options).run()


@dataclass
class WaitingGroup:
    """A task that waits for free rows: all trajectories of its group begin together."""
    task: Task
    prompt: "Dialogue"
    names_root: int  # grammar state in which the name of one of its tools comes next
    size: int
    first_index: int  # index, among all trajectories, of the group's first


class Sampler:
    """Batched, KV-cached decoding of whole episodes over one set of weights.

    grammar: "strict" (a malformed turn cannot be sampled) or "free" (it can, and is observed as an
    error). temperature: 0 is greedy. gate_mode: see `constrain`. refusal: see tools.Episode.
    max_rows: rows at once; None is what LIMITS allow, but a whole group at least. watch(ids) gets
    what follows a prompt, piece by piece as it comes: what the agent writes and what it then sees.
    Pieces of several rows come mixed.

    A row is one running episode (`Row`): `pending` are its ids that the cache has not seen, `left`
    the tokens that its turn may still have, `state` where the grammar stands. A task's prompt is
    prefilled once and forked to its group. A row keeps its cache through its tool calls: a result
    is appended as one chunk. Finished rows leave, and waiting tasks take their place.
    """

    def __init__(self, model, tokenizer, tasks, sizes, *, grammar="strict", temperature=1.0,
                 gate_mode="learned", refusal="terminal", max_rows=None, generator=None,
                 watch=lambda ids: None):
        self.model = model
        self.device = model.device
        self.tokenizer = tokenizer
        self.strict = grammar == "strict"
        self.temperature = temperature
        self.gate_mode = gate_mode
        self.refusal = refusal
        self.generator = generator
        self.watch = watch
        self.limits = LIMITS.get(tokenizer.family, REAL_LIMITS)

        # Several calls in a turn only if all tasks ask for it: else a strict turn could be
        # malformed for one of them.
        parallel = all(task.public.get("parallel") for task in tasks)
        self.grammar = get_grammar(tokenizer, model.device, parallel)

        self.waiting = self._line_up(tasks, sizes)
        context = self._context_length()
        rows = max_rows or self.limits["positions"] // context
        # No more than there are trajectories, no fewer than the largest group needs.
        self.max_rows = max(1, min(rows, sum(sizes)), *sizes)
        self.cache = Cache(model.config, self.max_rows, context, model.device, model.dtype)
        # model.hidden and model.head for one token a row, made faster; chunks go through
        # model.hidden.
        self.decode = Decoder(model, self.cache)
        # The last hidden state of each row, which its next token is sampled from. (rows, C)
        self.last = torch.zeros(self.max_rows, model.config.hidden_size, device=model.device,
                                dtype=model.dtype)
        self.rows = []  # [Row] of the batch; rows[i] sits in slot i of the cache: no gaps
        self.finished = {}  # {index: Rollout}

    def _line_up(self, tasks, sizes) -> deque:
        """All groups, with their prompts built and their tools' names known to the grammar."""
        waiting = deque()
        first_index = 0
        for task, size in zip(tasks, sizes, strict=True):  # a size too few would lose a task
            prompt = Dialogue(self.tokenizer, task.messages, task.offered)
            names_root = self.grammar.names([tool.name for tool in task.offered])
            waiting.append(WaitingGroup(task, prompt, names_root, size, first_index))
            first_index += size
        return waiting

    def _context_length(self) -> int:
        """Positions that a row of the cache needs. ValueError, before anything is sampled: no
        room."""
        longest = max((len(group.prompt.ids) for group in self.waiting), default=0)
        most = self.model.config.max_position_embeddings
        if longest + self.limits["turn_tokens"] > most:
            raise ValueError(f"a prompt of {longest} tokens leaves no room for a turn in the "
                             f"model's {most} positions")
        return max((self._limit(group) for group in self.waiting), default=self.limits["room"])

    def _limit(self, group) -> int:
        """Positions that an episode of the group may fill: its prompt, and room."""
        room = group.task.public.get("room", self.limits["room"])
        return min(len(group.prompt.ids) + room, self.model.config.max_position_embeddings)

    def run(self) -> list[Rollout]:
        """Plays all episodes -> their Rollouts, task after task."""
        # Of a single episode there is nothing to count, and `watch` may be printing it.
        total = sum(group.size for group in self.waiting)
        bar = progress(total=total, what="rollouts", unit="episode", hidden=total < 2)
        with bar, packed_weights(self.model, self.max_rows):
            while self.waiting or self.rows:
                self.admit()
                ready = [row for row in self.rows if not row.pending]  # all is in the cache
                if ready:
                    self.sample(ready)
                    self.finish_turns(ready)
                self.forward()
                bar.update(len(self.finished) - bar.n)
        return [self.finished[index] for index in range(len(self.finished))]

    def admit(self):
        """Prefills as many waiting prompts as there are free rows, and forks each to its group."""
        groups = []
        free = self.max_rows - len(self.rows)
        while self.waiting and self.waiting[0].size <= free:
            groups.append(self.waiting.popleft())
            free -= groups[-1].size
        if not groups:
            return

        prompts = [torch.tensor(group.prompt.ids) for group in groups]
        # Padding stands to the right, and no real token looks to its right: it changes nothing.
        ids = pad_sequence(prompts, batch_first=True).to(self.device)  # (groups, T)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        prefilled = Cache(self.model.config, *ids.shape, self.device, self.model.dtype)
        hidden = self.model.hidden(ids, prefilled, lengths)  # (groups, T, C)

        for j, group in enumerate(groups):
            slots = list(range(len(self.rows), len(self.rows) + group.size))
            self.cache.copy(j, slots, prefilled)  # one prompt, computed once, for all its rows
            self.last[slots] = hidden[j, len(group.prompt.ids) - 1]  # behind it is padding
            for offset, slot in enumerate(slots):
                self.rows.append(self._new_row(group, group.first_index + offset, slot))

    def _new_row(self, group, index, slot) -> "Row":
        prompt = group.prompt
        # A sandbox and a dialogue of its own: what one trajectory does no other may see.
        episode = Episode(group.task, self.refusal, prompt.think_given, self.limits["max_turns"])
        row = Row(index, slot, episode, prompt.fork(), group.names_root, self._limit(group))
        row.begin_turn(self.grammar.start, self.limits["turn_tokens"])
        return row

    def sample(self, ready: list["Row"]):
        """One token for every ready row, and every token that the strict grammar then forces."""
        numbers = self.put([(row.slot, row.state, row.left) for row in ready])  # (B, 3)
        slots, states, left = numbers.T  # (B,) each
        logits = self.decode.head(self.last[slots])  # (B, V)

        # A few rows at a time: what is computed of them stays in a CPU's cache.
        n = rows_at_once(logits)
        parts = zip(logits.split(n), states.split(n), left.split(n))
        chosen = [self.choose(*part) for part in parts]
        tokens, drawn, gate_ps = [torch.cat(column) for column in zip(*chosen)]  # (B,) each

        # tolist() waits for the device: once a step, and nowhere else.
        values = zip(ready, tokens.tolist(), drawn.tolist(), gate_ps.tolist())
        for row, token, logprob, gate_p in values:
            # A NaN among the logits makes all logprobs NaN, and argmax takes NaN for the largest.
            if not math.isfinite(logprob):
                raise FloatingPointError(NOT_FINITE)
            if not math.isnan(gate_p):
                row.gate_p = gate_p
            row.add_sampled(token, logprob, self.grammar)
            if self.strict:
                row.add_forced(self.grammar)

    def choose(self, logits, states, left) -> tuple:
        """Logits (B, V) -> a token for each row, its logprob, and the model's own probability of a
        check (NaN off the gate): (B,) each."""
        logits = logits.float()
        if self.temperature not in (0, 1):  # greedy decoding does not care
            logits = logits / self.temperature

        # The model's own probability of a check is logged, whatever --gate makes of it.
        own = constrain(self.grammar, logits, states, left, "learned", self.strict)
        own_logprobs = torch.log_softmax(own, -1)  # (B, V)
        gate_ps = gate_probability(self.grammar, own_logprobs, states)
        if self.gate_mode == "learned":
            logprobs = own_logprobs
        else:
            steered = constrain(self.grammar, logits, states, left, self.gate_mode, self.strict)
            logprobs = torch.log_softmax(steered, -1)

        tokens = self.draw(logprobs)
        drawn = logprobs.gather(1, tokens[:, None])[:, 0]
        return tokens, drawn, gate_ps

    def draw(self, logprobs):
        """(B, V) -> a token for each row (B,)."""
        if not self.temperature:
            return logprobs.argmax(-1)
        # argmax(p / e) with e ~ Exp(1) is a draw from p, and -log(u) is such an e. It needs no sum
        # over the vocabulary, and is 5 times faster than exponential_().
        u = torch.rand(logprobs.shape, generator=self.generator, device=self.device)
        # In place, and p / log(u) is least where p / -log(u) is greatest: fewer passes over (B, V).
        return logprobs.exp().div_(u.log_()).argmin(-1)

    def finish_turns(self, ready: list["Row"]):
        """Rows whose turn has ended meet the sandbox; those whose episode has ended leave."""
        leaving = []
        for row in ready:
            self.watch(row.pending)
            stopped = row.dialogue.ids[-1] in self.tokenizer.stop_ids  # Qwen has two such ids
            if not stopped and row.left > 0:
                continue
            # A refusal, a last answer or a spent budget ends the episode; else the agent sees what
            # its call returned.
            going_on = row.end_turn(self.tokenizer, self.strict)
            if going_on:
                going_on = self._observe(row)
            if going_on:
                row.begin_turn(self.grammar.start, self.limits["turn_tokens"])
            else:
                leaving.append(row)

        # From the last slot down, so that the row that moves in is never one that leaves as well.
        for row in sorted(leaving, key=lambda row: row.slot, reverse=True):
            self.finished[row.index] = row.rollout(self.tokenizer)
            self._vacate(row)

    def _observe(self, row) -> bool:
        """Appends the observations to the row's dialogue. False: no turn would fit behind them;
        then they are not appended, for no turn will read them."""
        ids, codes = row.observation()
        self.watch(ids)
        if len(row.dialogue.ids) + len(ids) + self.limits["turn_tokens"] > row.limit:
            row.episode.ended = "budget"
            return False
        row.dialogue.extend(ids, codes)
        row.pending += ids
        return True

    def _vacate(self, row):
        """The last row moves into this one's slot: decoding reads a prefix of the cache, no
        gaps."""
        mover = self.rows.pop()
        if mover is row:
            return
        self.cache.copy(mover.slot, [row.slot])  # its keys and values move with it
        self.last[row.slot] = self.last[mover.slot]
        mover.slot = row.slot
        self.rows[row.slot] = mover

    def forward(self):
        """Feeds pending ids to the cache: single tokens, or chunks (a result that was just
        appended, or a token with those that the grammar forced behind it).

        A chunk holds up the whole batch, so chunks wait until a quarter of the rows has one, or
        until nobody decodes.
        """
        chunks = [row for row in self.rows if len(row.pending) > 1]
        singles = [row for row in self.rows if len(row.pending) == 1]
        enough = 4 * len(chunks) >= len(self.rows)
        if chunks and (enough or not singles):
            self.feed_chunks(chunks)
        if singles:
            self.feed_single_tokens()

    def feed_chunks(self, rows):
        """Several pending ids a row, for the rows named."""
        self._tell_cache_its_length()
        chunks = [torch.tensor(row.pending) for row in rows]
        ids = pad_sequence(chunks, batch_first=True).to(self.device)  # (B, T)
        lengths = self.put([len(chunk) for chunk in chunks])  # (B,)
        slots = self.put([row.slot for row in rows])  # (B,)
        hidden = self.model.hidden(ids, self.cache, lengths, slots)  # (B, T, C)
        each = torch.arange(len(rows), device=self.device)
        self.last[slots] = hidden[each, lengths - 1]  # the last real one of each
        for row in rows:
            row.pending = []

    def feed_single_tokens(self):
        """One pending id a row, for all rows in place: a slice of the cache needs no copy. A row
        that waits with a chunk, or was just fed one, feeds a dummy of length 0."""
        self._tell_cache_its_length()
        feeding = [len(row.pending) == 1 for row in self.rows]
        tokens = [row.pending if feeds else [0] for row, feeds in zip(self.rows, feeding)]  # 0: any
        ids = self.put(tokens)  # (B, 1)
        lengths = self.put([int(feeds) for feeds in feeding])  # (B,)
        hidden = self.decode(ids, lengths)[:, 0]  # (B, C)
        n = len(self.rows)
        # Rows that wait keep the state that they had.
        self.last[:n] = torch.where(lengths[:, None] > 0, hidden, self.last[:n])  # (B, C)
        for row, feeds in zip(self.rows, feeding):
            if feeds:
                row.pending = []

    def _tell_cache_its_length(self):
        # bound: no row holds more than this, so attention reads no further. The host knows it;
        # asking the device would be a wait.
        held = [len(row.dialogue.ids) - len(row.pending) for row in self.rows]
        self.cache.bound = max(held)

    def put(self, values):
        """A list as a tensor on the device. To a CUDA card a copy from pinned memory is queued, and
        nobody waits."""
        if self.device.type == "cuda":
            return torch.tensor(values).pin_memory().to(self.device, non_blocking=True)
        return torch.tensor(values, device=self.device)


def rows_at_once(logits) -> int:
    """How many rows of (B, V) the sampler takes at a time: on a CPU 2^18 numbers, or one row. 40
    rows of 49,152 take 39 ms at once, since fresh memory is fetched for each pass; 26 in parts."""
    B, V = logits.shape
    if logits.is_cuda:
        return B
    return max(1, 2 ** 18 // V)


class Row:
    """A row of the batch: one episode and its dialogue.

    pending: ids of the dialogue that the cache has not seen yet. state, left: the grammar's state
    inside of the turn, and the tokens that the turn may still have.
    """

    def __init__(self, index, slot, episode, dialogue, names_root, limit):
        self.index = index  # which trajectory of all
        self.slot = slot  # its place in the cache
        self.episode = episode
        self.dialogue = dialogue
        self.names_root = names_root  # of this task's tools: one grammar serves all tasks
        self.limit = limit  # of the dialogue's ids
        self.pending = []  # empty: the row is ready to sample
        self.logprobs = []  # one a sampled token
        self.states = []  # one a sampled token: (state, left) when it was drawn
        self.spans = []  # one a turn: (start, end) in the dialogue's ids

    def begin_turn(self, state, left):
        self.turn_start = len(self.dialogue.ids)
        self.gate_p = None  # until the turn comes to its gate
        self.state = state  # in free mode DEAD (no state at all), once the turn has left the form
        self.left = left

    def add_sampled(self, token, logprob, grammar):
        self.logprobs.append(logprob)
        self.states.append((self.state, self.left))  # before the token: what its mask was made of
        self._add(token, SAMPLED, grammar)

    def add_forced(self, grammar):
        """Adds tokens for as long as the grammar leaves no choice: they need no forward of their
        own."""
        token = grammar.forced(self.state)
        while token is not None:
            self._add(token, FORCED, grammar)
            token = grammar.forced(self.state)

    def _add(self, token, code, grammar):
        self.dialogue.extend([token], [code])
        self.pending.append(token)
        self.state = grammar.step(self.state, self.names_root, token)
        self.left -= 1

    def end_turn(self, tokenizer, strict) -> bool:
        """Lets the sandbox answer the turn; True while the episode goes on."""
        end = len(self.dialogue.ids)
        ids = self.dialogue.ids[self.turn_start:end]
        words = [token for token in ids if token not in tokenizer.stop_ids]  # no part of the text
        self.results = self.episode.step(tokenizer.decode(words), self.gate_p)
        self.spans.append((self.turn_start, end))

        # A turn that was cut off is carried out like any other (its calls may be whole), but the
        # agent did not end its episode: the budget did.
        cut_off = ids[-1] not in tokenizer.stop_ids
        # A stop token at the very last place was the strict mask's: it left no other.
        made_to_stop = strict and self.left == 0
        if cut_off or (made_to_stop and self.episode.ended):
            self.episode.ended = "budget"
        return self.episode.ended is None

    def observation(self):
        """What the agent sees after its turn: results, or the user's next message -> (ids,
        codes)."""
        if self.episode.user_message is not None:
            return self.dialogue.encode_observation([self.episode.user_message], "user")
        return self.dialogue.encode_observation(self.results, "tool")

    def rollout(self, tokenizer) -> Rollout:
        episode = self.episode
        ids = self.dialogue.ids
        provenance = self.dialogue.provenance
        # Training pairs each logprob with a SAMPLED token by its order alone.
        assert len(self.logprobs) == len(self.states) == provenance.count(SAMPLED)
        return Rollout(
            task=episode.task,
            turns=episode.turns,
            sandbox=episode.sandbox,
            ended=episode.ended,
            gates=episode.gates,
            ids=ids,
            provenance=provenance,
            logprobs=self.logprobs,
            states=self.states,
            spans=self.spans,
            safety_tokens=safety_tokens(tokenizer, ids, self.spans),
            messages=episode.messages,
        )


# --------------------------------------------- one distribution: what is sampled is what is trained
def constrain(grammar: "Grammar", logits, states, remaining, gate_mode="learned", strict=True):
    """Logits (B, V) fp32 -> the logits that are sampled from, and that training recomputes.

    Strict: a token gets -inf if after it the turn could no longer be completed within its budget
    (the others are *live*). Free (strict=False): padding rows get it, and control tokens that are
    no part of a turn; the states only say where the gate is. states and remaining, (B,) each: the
    grammar's state and the tokens left in the turn. gate_mode acts at the gate only, on the token
    that opens a check: "learned" leaves the model its choice, "always" opens (if the budget allows
    a check), "never" does not, and a number is added to the logit.

    The gate is one place, whatever the tokenizer: gate_state comes right before the token at which
    the spelling of <safety_thoughts> parts from those of the other actions, and that token is
    safety_token. In free mode another split of the same text is not counted as the gate.
    """
    live = grammar.mask(states, remaining) if strict else grammar.free_mask
    # A copy: the sampler constrains the same logits twice.
    logits = logits.masked_fill(~live, -torch.inf)  # (B, V)
    # A bias of 1e4 leaves the other side a probability of exactly 0. A number stands for itself.
    bias = {"learned": 0.0, "always": 1e4, "never": -1e4}.get(gate_mode, gate_mode)
    logits[:, grammar.safety_token] += bias * (states == grammar.gate_state)
    return logits


def gate_probability(grammar: "Grammar", logprobs, states):
    """Logprobs (B, V) of constrained logits -> the probability of opening a check (B,); NaN in any
    other state than the gate."""
    p = logprobs[:, grammar.safety_token].exp()
    return p.masked_fill(states != grammar.gate_state, torch.nan)


def sampled_logprobs(model, tokenizer, rollouts: list[Rollout], temperature: float = 1.0,
                     gate_mode="learned", strict: bool = False) -> torch.Tensor:
    """Logprobs of the sampled tokens under the distribution that drew them -> (N,) fp32, rollout
    after rollout.

    The mask is rebuilt from the recorded states; temperature, gate_mode and strict must be those of
    the sampling. Template, tool and forced tokens are not among the N: their loss is 0 and their
    gradient exactly 0.
    """
    # A model that is sure of itself writes one trajectory again and again, and each pair of the
    # direct loss brings both of its sides along: what is the same is computed once.
    keys = [(tuple(r.ids), tuple(r.provenance)) for r in rollouts]
    different = dict(zip(keys, rollouts))
    if len(different) == len(rollouts):
        return logprobs_of_each(model, tokenizer, rollouts, temperature, gate_mode, strict)
    once = list(different.values())
    logprobs = logprobs_of_each(model, tokenizer, once, temperature, gate_mode, strict)
    parts = dict(zip(different, logprobs.split([len(r.states) for r in once])))
    return torch.cat([parts[key] for key in keys])


def logprobs_of_each(model, tokenizer, rollouts, temperature, gate_mode, strict) -> torch.Tensor:
    """`sampled_logprobs` of rollouts that may be copies of one another: each is computed."""
    # Not `parallel`: tasks of several calls a turn are played in evaluation only.
    grammar = get_grammar(tokenizer, model.device)
    # A group shares its prompt, which is computed once: layout says which tokens see which.
    # (Padding each rollout to a row of its own, with layout=None, gives the same numbers.)
    ids, provenance, layout = share_prompts(model, rollouts)  # (B, T), (B, T)

    states = []
    for r in rollouts:
        states += r.states
    states = torch.tensor(states, device=model.device)  # (N, 2)

    def constrain_these(logits, index):  # logits (n, V) of the tokens `index` (n,) among the N
        state, remaining = states[index].unbind(1)  # (n,) each
        return constrain(grammar, logits, state, remaining, gate_mode, strict)

    # The stop token is SAMPLED like any other: an agent has to learn when to end its turn.
    return token_logprobs(model, ids, provenance == SAMPLED, temperature,
                          constrain=constrain_these, layout=layout)


# ----------------------------------------------------------------- the dialogue: ids that only grow
class Dialogue:
    """Append-only ids of one conversation. `provenance`, as long, says where each comes from.

    Control ids come from TEMPLATE text or from the agent only: users, files and tools go through
    `Tokenizer.encode`, which cannot give one. The prompt's ids are those that the family's own
    tokenizer gives for `render`'s text, once our system text stands at the head of the system turn.
    Two exceptions: a control token spelled in other people's text stays text, and a family that is
    not native is shown tools and results all the same (deviations 3 and 4). system: a judge's own
    text in place of ours, trusted like it. ValueError: a control token of the family is missing.
    """

    def __init__(self, tokenizer, messages: list, tools: list | None, system: str | None = None):
        self.tokenizer = tokenizer
        self.template = FAMILIES[tokenizer.family]
        self.ids = []
        self.provenance = []
        missing = [token for token in self.template["controls"] if token not in tokenizer.added]
        if missing:
            raise ValueError(f"tokenizer.json of family {tokenizer.family}: no token for "
                             f"{', '.join(missing)}, so its turns are written in another way")
        # Qwen3-Thinking's prompt already holds the first line of the agent's turn.
        self.think_given = opens_plan(self.template)
        if system is None and self.template["system"]:
            _, system = SYSTEMS[self.template["system"]]
        pieces = [*prompt_pieces(messages, tools, self.template, system)]
        pieces.append((self.template["prompt"], TEMPLATE))
        self.extend(*self._encode(pieces))

    def fork(self) -> "Dialogue":
        """A copy that goes its own way: the prompt is built once for a group."""
        other = copy.copy(self)
        other.ids = self.ids[:]  # only the lists grow: all else can be shared
        other.provenance = self.provenance[:]
        return other

    def extend(self, ids: list[int], codes: list[int]):
        """Appends ids; codes say where each comes from."""
        assert len(ids) == len(codes), (len(ids), len(codes))
        self.ids += ids
        self.provenance += codes

    def observe(self, texts, role: str = "tool"):
        """Ends the agent's turn, appends results (role "user": a message) and opens the next
        turn. For callers without a Sampler, such as data/demonstrator.py."""
        texts = [texts] if isinstance(texts, str) else texts
        self.extend(*self.encode_observation(texts, role))

    def encode_observation(self, texts: list[str], role: str) -> tuple[list, list]:
        """The ids and codes that `observe` appends. Earlier thinking stays (deviation 2)."""
        closing = self.template["tail"]
        if self.ids[-1] in self.tokenizer.stop_ids:  # the agent wrote it already
            closing = closing.removeprefix(self.template["stop"])
        messages = [{"role": role, "content": text} for text in texts]
        pieces = [(closing, TEMPLATE), *message_pieces(messages, self.template)]
        pieces.append((self.template["prompt"], TEMPLATE))
        return self._encode(pieces)

    def _encode(self, pieces) -> tuple[list, list]:
        """Pieces (text, provenance) -> (ids, codes)."""
        parts = []  # (text, control id or None, code)
        for text, code in pieces:
            # Only our own text is searched for control tokens: the same spelling from a user is
            # text.
            split = split_controls(self.tokenizer, text) if code == TEMPLATE else [(text, None)]
            parts += [(part, control, code) for part, control in split]

        ids = []
        codes = []
        for control, run in groupby(parts, key=lambda part: part[1]):
            run = list(run)
            if control is not None:
                ids += [control] * len(run)
                codes += [code for _, _, code in run]
            else:
                text_ids, text_codes = self._encode_text(run)
                ids += text_ids
                codes += text_codes
        return ids, codes

    def _encode_text(self, parts) -> tuple[list, list]:
        """What lies between two control tokens is encoded as one string, as the real tokenizer
        does; so a token may cover text of two sources."""
        texts = []
        source_of_byte = []
        for text, _, code in parts:
            if self.tokenizer.nfc:
                text = unicodedata.normalize("NFC", text)
            # What has no token becomes "?" first: else the bytes counted here and those of the
            # tokens would differ.
            text = self.tokenizer.writable(text)
            texts.append(text)
            source_of_byte += [code] * len(text.encode())

        # Some families' control tokens eat the white space on both of their sides.
        text = "".join(texts)
        space = "".join(self.template["strip"])
        start = len(text.encode()) - len(text.lstrip(space).encode())

        ids = self.tokenizer.encode(text.strip(space))
        codes = []
        for token in ids:
            end = start + len(self.tokenizer.token_bytes[token])
            # Provenance is ordered by trust: a token is as untrusted as the worst of its bytes.
            codes.append(max(source_of_byte[start:end], default=TOOL))  # no byte: distrust it
            start = end
        return ids, codes


# ---------------------------- the method ends here; what follows is plumbing ----------------------
# Four things follow: the chat templates, as pieces of text with their provenance; the layout that
# lets a group share its prompt in training; the strict grammar, compiled into tables over tokens
# (training needs only two facts of it: where the gate is, and which ids may be sampled at all); and
# the command line.
# ------------------------------------------------------------------- chat templates: text as pieces
@functools.lru_cache(maxsize=4096)
def split_controls(tokenizer, text: str) -> list:
    """Text -> [(part, id of the added token that it is, or None)]."""
    longest_first = sorted(tokenizer.added, key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in longest_first)
    return [(part, tokenizer.added.get(part)) for part in re.split(f"({pattern})", text)]


def encode_trusted(tokenizer, text: str) -> list[int]:
    """Ids of text that we wrote: the added token where there is one, the canonical tokenisation
    between them."""
    ids = []
    for part, control in split_controls(tokenizer, text):
        ids += tokenizer.encode(part) if control is None else [control]
    return ids


def opens_plan(template) -> bool:
    """Does the prompt itself hold the first line of the agent's turn?"""
    return template["prompt"].endswith("<think>\n")


def render(messages: list, tools: list | None, family: str,
           add_generation_prompt: bool = True) -> str:
    """The family's own chat template as text, for tests and for people.

    messages: OpenAI's form. tools: None, [Tool], or [schema] (not for tiny). Phi-4 drops tools,
    calls and results; ChatML drops tools and calls."""
    template = FAMILIES[family]
    if not template["native"]:
        tools = None
        messages = [{"role": message["role"], "content": message.get("content")}
                    for message in messages if message["role"] not in template["drops"]]
        template = {**template, "results": None}  # a result that is left is a turn like any other
    text = "".join(piece for piece, _ in prompt_pieces(messages, tools, template))
    return text + template["prompt"] if add_generation_prompt else text


def prompt_pieces(messages, tools, template, system=None):
    """The prompt as pieces (text, provenance). Only TEMPLATE text may hold control tokens: all else
    came from outside."""
    own_system = None  # the conversation's own system message, from a file
    if messages and messages[0]["role"] == "system":
        own_system = messages[0]["content"]
        messages = messages[1:]
    if system is None and own_system is None:
        system = template["default"]

    blocks = []  # of the system turn, a blank line apart
    if system:
        blocks.append([(system, TEMPLATE)])
    if own_system is not None:
        blocks.append([(own_system, USER)])
    if tools:
        before, after = TOOL_TEXT[template["tools"]]
        texts = [tool_text(tool, template["tools"]) for tool in tools]
        blocks.append([(before, TEMPLATE), ("".join(texts), USER), (after, TEMPLATE)])

    if blocks:
        yield template["head"].format("system"), TEMPLATE
        for i, block in enumerate(blocks):
            if i > 0:
                yield "\n\n", TEMPLATE
            yield from block
        yield template["tail"], TEMPLATE
    yield from message_pieces(messages, template)


def tool_text(tool, form: str) -> str:
    """How the system turn shows a tool: a schema, or a short line where every token costs."""
    if form == "lines":
        return f"{tool.name}({', '.join(tool.parameters.get('properties', {}))}) {tool.effect}\n"
    schema = tool.schema() if isinstance(tool, Tool) else tool
    return "\n" + json.dumps(schema, ensure_ascii=False)


def message_pieces(messages, template):
    """What follows the system turn, as pieces (text, provenance)."""
    roles = [message["role"] for message in messages]
    last_question = last_question_index(messages)
    for i, message in enumerate(messages):
        text = text_of(message)
        if roles[i] == "tool" and template["results"]:  # results in a row share one turn
            before_first, opening, closing, after_last = template["results"]
            first_of_run = i == 0 or roles[i - 1] != "tool"
            last_of_run = i + 1 == len(roles) or roles[i + 1] != "tool"
            yield (before_first if first_of_run else "") + opening, TEMPLATE
            yield text, TOOL
            yield closing + (after_last if last_of_run else ""), TEMPLATE
            continue

        before_role, names_role, after_role = template["head"].partition("{}")
        yield before_role, TEMPLATE
        if names_role:
            yield roles[i], USER  # a role may come from a file: it must not open a turn
        yield after_role, TEMPLATE

        shown = text
        if template["thinking"] and roles[i] == "assistant":
            reasoning, text = split_reasoning(message, text)
            shown = text
            # The template shows thinking only after the last real question.
            if i > last_question and (reasoning or i == len(messages) - 1):
                yield "<think>\n", TEMPLATE
                yield reasoning.strip("\n"), USER
                yield "\n</think>\n\n", TEMPLATE
                shown = text.lstrip("\n")
        yield shown, USER
        # A text of line breaks alone counts as text here, though it is not shown: as in the
        # template.
        yield from call_pieces(message.get("tool_calls") or [], bool(text), template)
        yield template["tail"], TEMPLATE


def text_of(message) -> str:
    return message["content"] if isinstance(message.get("content"), str) else ""


def last_question_index(messages) -> int:
    """Index of the last user message that is no tool's result in a user's turn; len(messages) if
    there is none."""
    found = len(messages)
    for i, message in enumerate(messages):
        text = text_of(message)
        is_result = text.startswith("<tool_response>") and text.endswith("</tool_response>")
        if message["role"] == "user" and not is_result:
            found = i
    return found


def split_reasoning(message, text) -> tuple[str, str]:
    """(reasoning, the rest) of an assistant's message, as Qwen3's template takes them apart."""
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str):
        return reasoning, text
    if "</think>" not in text:
        return "", text
    first = text.split("</think>")[0]
    rest = text.split("</think>")[-1]
    return first.rstrip("\n").split("<think>")[-1].lstrip("\n"), rest.lstrip("\n")


def call_pieces(calls, after_text: bool, template):
    """A recorded message's calls, as the family's template writes them."""
    for i, call in enumerate(calls):
        call = call.get("function") or call
        arguments = call["arguments"]
        if not (isinstance(arguments, str) and template["raw"]):
            arguments = json.dumps(arguments, ensure_ascii=False)
        separator = "\n" if after_text or i > 0 else ""
        yield separator + "<tool_call>\n", TEMPLATE
        yield f'{{"name": "{call["name"]}", "arguments": {arguments}}}', USER
        yield "\n</tool_call>", TEMPLATE


# -------------------------------------------------------------- what is counted, and what is shared
def check_stop(tokenizer):
    """ValueError where nothing would end a turn: a base model's generation_config.json may name
    another token than the one that its chat template ends a turn with."""
    stop = FAMILIES[tokenizer.family]["stop"]
    # added: {control token: id}; stop_ids: the ids that end a turn (model.Tokenizer).
    stop_id = tokenizer.added.get(stop)
    if stop_id is not None and stop_id not in tokenizer.stop_ids:  # None: Dialogue will say so
        raise ValueError(f"eos_token_id has no {stop}, which ends a turn: add its id to "
                         "generation_config.json")


def safety_tokens(tokenizer, ids: list[int], spans: list[tuple]) -> int:
    """How many of the agent's tokens touch <safety_thoughts> ... </safety_thoughts>, tags included.

    Found by bytes, so that it holds whether a tag is one token or several.
    """
    total = 0
    for start, end in spans:
        pieces = [tokenizer.token_bytes[token] for token in ids[start:end]]
        # A JSON string may quote the tags, but it holds no line break: this one is a real check.
        pattern = rb"</think>\n\n(<safety_thoughts>.*?</safety_thoughts>)"
        check = re.search(pattern, b"".join(pieces), re.DOTALL)
        if check is None:
            continue
        ends = list(accumulate(len(piece) for piece in pieces))
        starts = [0, *ends]
        for piece_start, piece_end in zip(starts, ends):
            total += piece_start < check.end(1) and piece_end > check.start(1)
    return total


def share_prompts(model, rollouts: list[Rollout]) -> tuple:
    """Lays rollouts out so that neighbours which begin with the same prompt share it.

    Returns (ids (B, T), provenance (B, T), layout): a row holds a prompt once and then each of its
    completions. Up to 2.2 times faster than rows of their own; values and gradients are the same.
    """
    rows_of_ids = []
    rows_of_codes = []
    lengths = []  # of each row: the prompt's, then its completions'
    for (n_prompt, _), group in groupby(rollouts, key=prompt_key):
        group = list(group)
        ids = group[0].ids[:n_prompt]
        codes = group[0].provenance[:n_prompt]
        parts = [n_prompt]
        for r in group:
            ids = ids + r.ids[n_prompt:]
            codes = codes + r.provenance[n_prompt:]
            parts.append(len(r.ids) - n_prompt)
        rows_of_ids.append(torch.tensor(ids))
        rows_of_codes.append(torch.tensor(codes))
        lengths.append(parts)
    layout = SharedPrompt(lengths, model.device, model.dtype)
    ids = pad_sequence(rows_of_ids, batch_first=True).to(model.device)
    provenance = pad_sequence(rows_of_codes, batch_first=True).to(model.device)
    return ids, provenance, layout


def prompt_key(r: Rollout) -> tuple:
    return r.prompt_length, r.ids[:r.prompt_length]


# ---------------------------------------------------------- the strict grammar, first over bytes
# A state of the byte automaton is a stack of symbols that still have to come, the next one first.
# These states have names; all others are found from them.
DEAD = -1   # out of the grammar: nothing may come
PLAN = 0    # the text of a plan begins
CHECK = 1   # the text of a check begins
ANSWER = 2  # the text of an answer begins
JSON = 3    # the name of a call has been read: a space and its arguments come
START = 4   # a turn begins
CALL = 5    # the name of a call comes; here the trie of the offered names takes over
FINAL = 6   # the turn is over
# The symbols are those of RULES below. plan, check, answer, call, called, start and final have no
# rule: there a tag, or a name, follows (`tag_runs`). JSON has two "}": the arguments', the call's.
NAMED_STATES = {
    PLAN: ("first", "plan"),
    CHECK: ("first", "check"),
    ANSWER: ("first", "answer"),
    JSON: ("_", "{", "pairs?", "}", "}", "nl", "called"),
    START: ("start",),
    CALL: ("call",),
    FINAL: ("final",),
}
CALL_PREFIX = '{"name": %s, "arguments":'
DEPTH = 4  # how deep objects and arrays nest: the call, its arguments, and two levels in those

# Strict JSON and UTF-8: nothing overlong, no surrogates, none as \uD800-\uDFFF (`code`). The next
# byte alone decides each step, so that a table can hold it. A rule is "symbol = case | case"; a
# case is what comes one after the other:
#   x        the character itself              _         a space
#   30-39    one byte of this range (hex)      symbol    what that rule says
#   symbol?  may be left out: then what stands behind it comes
# So "int = 0 frac? exp? | 31-39 digits? frac? exp?;" reads: a number is 0, or a digit from 1 to 9
# (the bytes 31 to 39) and perhaps more digits; then perhaps a fraction, then perhaps an exponent.
RULES = r"""
wide = C2-DF 80-BF | E0-E0 A0-BF 80-BF | E1-EC 80-BF 80-BF | ED-ED 80-9F 80-BF | EE-EF 80-BF 80-BF
    | F0-F0 90-BF 80-BF 80-BF | F1-F3 80-BF 80-BF 80-BF | F4-F4 80-8F 80-BF 80-BF;
hex = 30-39 | 41-46 | 61-66;
int = 0 frac? exp? | 31-39 digits? frac? exp?;
not_d = 30-39 | 41-43 | 45-46 | 61-63 | 65-66;
code = not_d hex hex hex | d 30-37 hex hex | D 30-37 hex hex;
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


def byte_rules() -> dict:
    """{symbol: {byte: the symbols that take the symbol's place once this byte was read}}."""
    rules = {chr(code): {code: ()} for code in range(33, 127)}
    rules["_"] = {ord(" "): ()}  # not the underscore: no rule needs one
    rules["nl"] = {ord("\n"): ()}
    for name in re.findall("[0-9A-F]{2}-[0-9A-F]{2}", RULES):
        first = int(name[:2], 16)
        last = int(name[3:], 16)
        rules[name] = {byte: () for byte in range(first, last + 1)}

    for rule in RULES.split(";"):  # in an order in which a rule's first symbols are known already
        symbol, cases = rule.split("=")
        by_byte = {}
        for case in cases.split("|"):
            first, *rest = case.split()
            for byte, replacement in rules[first].items():
                by_byte[byte] = (*replacement, *rest)
        rules[symbol.strip()] = by_byte

    add_text_rules(rules)
    return rules


def add_text_rules(rules):
    """Adds the rules for the text of a plan, a check or an answer: any UTF-8 that holds no tag.

    The symbol "text<t" has just read "<t" or "</t". No text holds "<" and the first three letters
    of a tag, so none holds a tag, by any spelling. "line?" has just read a line break: here the
    text may end.
    """
    forbidden = {"<" + tag[:3] for tag in TAGS}
    beginnings = {start[:n] for start in forbidden for n in range(4)}  # "", "<", "<t", "<th", ...
    for seen in beginnings:
        by_byte = {byte: (*rest, "text") for byte, rest in rules["wide"].items()}
        for code in range(128):
            letter = chr(code)
            if seen + letter in forbidden:
                continue
            if letter == "\n":
                by_byte[code] = ("line?",)
            else:
                by_byte[code] = ("text" + longest_beginning(seen, letter, beginnings),)
        rules["text" + seen] = by_byte
    rules["line?"] = rules["text"]
    # No text is empty: a line break that comes first is its own, not the one before the tag.
    rules["first"] = {**rules["text"], ord("\n"): ("text",)}


def longest_beginning(seen, letter, beginnings) -> str:
    """What of a tag has been read, once `letter` follows `seen`."""
    longer = (seen + letter).replace("</", "<")  # a closing tag counts as an opening one
    if longer in beginnings:
        return longer
    if letter in beginnings:
        return letter
    return ""


def expansions(rules, stack):
    """Which bytes may come next, and what then still has to come: yields (byte, stack)."""
    for i, symbol in enumerate(stack):
        # A name without a rule ("plan", "call") stands for a tag, which is no matter of bytes.
        for byte, replacement in rules.get(symbol, {}).items():
            yield byte, (*replacement, *stack[i + 1:])
        if not symbol.endswith("?"):  # what stands behind has to wait
            return


def byte_automaton() -> tuple[dict, np.ndarray]:
    """All states that can be reached -> ({stack: state}, moves (S + 1, 256) int16: the next state,
    or DEAD; the last row is that of DEAD itself)."""
    rules = byte_rules()
    states = {stack: state for state, stack in NAMED_STATES.items()}
    work = list(states)
    moves = []
    for stack in work:  # grows while it is read
        row = [DEAD] * 256
        for byte, rest in expansions(rules, stack):
            if rest.count("}") + rest.count("]") > DEPTH:
                continue
            if rest not in states:
                states[rest] = len(states)
                work.append(rest)
            row[byte] = states[rest]
        moves.append(row)
    moves.append([DEAD] * 256)
    return states, np.array(moves, np.int16)


def token_automaton(token_bytes: list[bytes]) -> tuple[dict, np.ndarray]:
    """The byte automaton over whole tokens -> ({stack: state}, next states (S, V) int16)."""
    states, moves = byte_automaton()
    # Bytes that move alike in every state are one kind: 256 columns become some 60.
    columns, kind_of_byte = np.unique(moves, axis=1, return_inverse=True)
    columns = columns.T.copy()  # (kinds, S + 1)
    kind_of_byte = bytes(kind_of_byte.ravel().tolist())

    @functools.lru_cache(maxsize=None)
    def walk(kinds):
        # walk(word)[s] is the state after reading the word in state s: (S + 1,). Words that begin
        # alike share the way.
        if not kinds:
            return np.arange(len(moves), dtype=np.int16)
        return columns[kinds[-1]][walk(kinds[:-1])]

    after = [walk(word.translate(kind_of_byte)) for word in token_bytes]
    return states, np.stack(after)[:, :-1].T


# --------------------------------------------------- then over tokens, with tags and offered names
NEVER = 2 ** 40  # "no way to the end", in tokens: no budget comes near it


class Grammar:
    """Strict turns as tables: masks live beside the logits; states live on the host, where a
    sampled token has to go anyway. S states, V rows of the model's vocabulary. Made in 1.5 s at V =
    152,064.

    next_state (S + 1, V) int16: -1 is not live. to_end (S + 1,): fewest tokens to the end, stop
    token included, by way of refusal_tool if it has to be a call. The last row of both is that of
    DEAD. States from S on are nodes of tries, one trie for each set of offered tools, whose root is
    passed along with the states. start: before a turn; FINAL comes after its stop token. In
    gate_state the probability of safety_token is that of opening a check. free_mask (V,): free mode
    may sample all but padding rows and control ids other than a turn's own tags and stops."""

    def __init__(self, tokenizer, device="cpu", parallel=False):
        self.tokenizer = tokenizer
        self.device = device
        self.V = tokenizer.vocab_size
        self.start = PLAN if opens_plan(FAMILIES[tokenizer.family]) else START

        table, gate = compile_table(tokenizer, parallel)
        self.gate_state, self.safety_token = gate
        self.S = len(table) - 1
        refusal_name = CALL_PREFIX % json.dumps(refusal_tool.name)
        to_end = fewest_tokens_to_end(table, len(tokenizer.encode(refusal_name)))
        self.next_state = torch.tensor(table, device=device)
        self.to_end = torch.tensor(to_end, device=device)
        self.free_mask = torch.tensor(free_tokens(tokenizer), device=device)

        self._table = table  # the same on the host
        n_live = (table >= 0).sum(1)
        self._only_token = np.where(n_live == 1, table.argmax(1), -1).tolist()
        self._roots = {}  # {sorted names: state}
        self._nodes = []  # of all tries: [(token, next state, fewest tokens to the end from there)]
        self._node_table = None  # the nodes as a tensor, made when it is needed

    def names(self, tool_names: list[str]) -> int:
        """Root of the trie of '{"name": NAME, "arguments":' over these names and refusal_tool. A
        set of names has one trie."""
        key = tuple(sorted({*tool_names, refusal_tool.name}))
        if key not in self._roots:
            spellings = []
            for name in key:
                quoted = json.dumps(name, ensure_ascii=False)
                spellings.append(self.tokenizer.encode(CALL_PREFIX % quoted))
            self._roots[key], _ = self._add_node(spellings)
            self._node_table = None
        return self._roots[key]

    def _add_node(self, spellings) -> tuple[int, int]:
        """A node from which these lists of ids go on -> (its state, fewest tokens from it to the
        end)."""
        state = self.S + len(self._nodes)
        children = []
        self._nodes.append(children)
        for token in sorted({ids[0] for ids in spellings}):
            rest = [ids[1:] for ids in spellings if ids[0] == token]
            if rest[0]:
                child, cost = self._add_node(rest)
            else:  # the name is complete
                child, cost = JSON, self.to_end[JSON].item()
            children.append((token, child, cost))
        return state, 1 + min(cost for _, _, cost in children)

    def mask(self, states, remaining):
        """Live tokens (B, V) bool. states, remaining: (B,) int64.

        remaining counts the token that is being chosen; a token is live if the end can be reached
        with those that then remain. Rows in DEAD or FINAL have none."""
        if self._node_table is None:
            self._node_table = self._tabulate_nodes()
        in_names = states >= self.S
        table_states = states.masked_fill(in_names, DEAD)
        next_states = self.next_state[table_states].int()  # (B, V)
        live = self.to_end[next_states] < remaining[:, None]  # (B, V)

        nodes = (states - self.S).clamp(min=0)
        ids, cost = self._node_table[nodes].unbind(-1)  # (B, W) each
        affordable = cost < remaining[:, None]
        # Rows that are not in a trie put back what they have.
        kept = live.gather(1, ids)  # (B, W)
        changed = torch.where(in_names[:, None], affordable, kept)
        return live.scatter(1, ids, changed)

    def _tabulate_nodes(self):
        """(nodes, W, 2): token and cost of each child; a node of fewer than W repeats its first."""
        width = max(len(children) for children in self._nodes)
        rows = []
        for children in self._nodes:
            padded = children + children[:1] * (width - len(children))
            rows.append([(token, cost) for token, _, cost in padded])
        return torch.tensor(rows, device=self.device)

    def step(self, state: int, names_root: int, token: int) -> int:
        """The next state, on the host. A token that is not live gives DEAD, and so does any after
        it."""
        if state >= self.S:
            for child_token, child, _ in self._nodes[state - self.S]:
                if child_token == token:
                    return child
            return DEAD
        after = int(self._table[state, token])
        return names_root if after == CALL else after

    def forced(self, state: int) -> int | None:
        """The token of a state in which only one is live, whatever the budget; None in others."""
        if state < self.S:
            token = self._only_token[state]
            return token if token >= 0 else None
        children = self._nodes[state - self.S]
        return children[0][0] if len(children) == 1 else None


def get_grammar(tokenizer, device, parallel: bool = False) -> Grammar:
    """The one Grammar of a tokenizer, a device and `parallel`. States and roots mean nothing to
    another one, and training rebuilds its masks from recorded states."""
    return compiled_grammar(tokenizer, str(device), parallel)


@functools.lru_cache(maxsize=4)
def compiled_grammar(tokenizer, device, parallel) -> Grammar:
    return Grammar(tokenizer, device, parallel)


def compile_table(tokenizer, parallel: bool) -> tuple[np.ndarray, tuple]:
    """-> (next states (S + 1, V) int16, (gate_state, safety_token)).

    Tags are runs of fixed ids, laid over the token automaton: the canonical tokenisation of all
    bytes from the start of a closing tag to the end of the next opening one. Nothing else can spell
    a tag: texts cannot hold one, and inside of a call's JSON string it is text."""
    states, moves = token_automaton(tokenizer.token_bytes)
    runs = tag_runs(states, FAMILIES[tokenizer.family]["stop"], parallel)
    runs = [(state, encode_trusted(tokenizer, text), target) for state, text, target in runs]
    n_inner = sum(len(ids) - 1 for _, ids, _ in runs)  # states inside of the runs, at most
    table = np.pad(moves, ((0, n_inner + 1), (0, 0)), constant_values=DEAD)

    # No text and no JSON holds an added token, or a padding row.
    added = set(tokenizer.added.values())
    not_text = [i in added or not word for i, word in enumerate(tokenizer.token_bytes)]
    table[:, not_text] = DEAD

    inner = {}  # {(state, token): the state inside of a run that it leads to}
    paths = []  # of each run: [(state, token), ...]
    for state, ids, target in runs:
        path = []
        for token in ids[:-1]:
            path.append((state, token))
            if (state, token) not in inner:
                inner[state, token] = len(moves) + len(inner)
            node = inner[state, token]
            before = table[state, token]
            if before >= 0:  # "</" may still be the text "</b>": go on as either
                table[node] = table[before]
            table[state, token] = node
            state = node
        assert table[state, ids[-1]] < 0, f"a run of {len(ids)} ids can be read in two ways"
        table[state, ids[-1]] = target
        path.append((state, ids[-1]))
        paths.append(path)
    table = table[:len(moves) + len(inner) + 1]  # the last row is that of DEAD
    return table, find_gate(*paths[:3])


def tag_runs(states, stop, parallel) -> list:
    """[(state, text, the state after it)]: all that is fixed between two fields of a turn. The
    first three are what may follow a plan, the check before the others."""
    plan_end = states["line?", "plan"]
    check_end = states["line?", "check"]
    answer_end = states["line?", "answer"]
    call_end = states["called",]
    runs = [
        (plan_end, "</think>\n\n<safety_thoughts>\n", CHECK),
        (plan_end, "</think>\n\n<tool_call>\n", CALL),
        (plan_end, "</think>\n\n<answer>\n", ANSWER),
        (check_end, "</safety_thoughts>\n<tool_call>\n", CALL),
        (check_end, "</safety_thoughts>\n<answer>\n", ANSWER),
        (START, "<think>\n", PLAN),
        (answer_end, "</answer>" + stop, FINAL),
        (call_end, "</tool_call>" + stop, FINAL),
    ]
    if parallel:
        runs.append((call_end, "</tool_call>\n<tool_call>\n", CALL))
    return runs


def find_gate(to_check, to_call, to_answer) -> tuple:
    """Where the run that opens a check leaves both others -> (state, token). It is one place."""
    forks = set()
    for other in (to_call, to_answer):
        first_own_step = [step for step in to_check if step not in other][0]
        forks.add(first_own_step)
    [gate] = forks
    return gate


def fewest_tokens_to_end(table, n_refusal_name: int) -> np.ndarray:
    """table (S + 1, V) -> (S + 1,): fewest tokens from each state to FINAL. A call can always be a
    refusal, whose name takes n_refusal_name tokens."""
    n_states = len(table) - 1
    # One row a state: does any token lead to this other state? (S + 1, S). + 1 makes DEAD bin 0,
    # which [1:] drops.
    leads = np.stack([np.bincount(row + 1, minlength=n_states + 1)[1:] > 0 for row in table])
    to_end = np.full(n_states + 1, NEVER)
    to_end[FINAL] = 0
    for _ in range(n_states):  # each round finds ways that are one token longer (Bellman-Ford)
        # 1 + (NEVER - 1) is NEVER again.
        through_next = 1 + np.where(leads, to_end[:-1], NEVER - 1).min(1)
        to_end = np.minimum(to_end, through_next)
        to_end[CALL] = to_end[JSON] + n_refusal_name
    # Half of it, since a never may have been added to.
    assert (to_end[:-1] < NEVER // 2).all(), "a state without a way to the end"
    return to_end


def free_tokens(tokenizer) -> list[bool]:
    """What free mode may sample (V,): no padding row, and no control id but a turn's tags and
    stops."""
    agent_tags = {tag for tag in TAGS if tag != "tool_response"}
    barred = set()
    for text, token in tokenizer.added.items():
        if text.strip("</>") not in agent_tags and token not in tokenizer.stop_ids:
            barred.add(token)
    return [bool(word) and token not in barred for token, word in enumerate(tokenizer.token_bytes)]


# --------------------------------------------------------------------------------- the command line
class Parser(argparse.ArgumentParser):
    """The argument parser of all commands: an error is one line and exit 2, without the usage.

    After `parse_args` the set `given` holds the options that stood on the command line, by their
    names in the result, even where their value is the default."""

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        # Read again over a result that has all names already, so that argparse sets no default.
        blank = argparse.Namespace(**dict.fromkeys(vars(args)))
        found = vars(super().parse_args(argv, blank))
        self.given = {name for name, value in found.items() if value is not None}
        for name in sorted(self.given):
            if found[name] == "":  # such as "$URL" of a shell that knows no URL
                self.error(f"an empty {name.replace('_', '-')}: give it a value, or leave it out")
        return args

    def refuse_idle(self, why: str, *names: str):
        """An error if one of these options was given. One that does nothing must not look as if it
        did: a run that was to ask a judge would train by the rule, and end well."""
        for name in names:
            if name in self.given:
                self.error(f"--{name.replace('_', '-')} does nothing {why}")

    def error(self, message):
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def gate_option(text: str) -> str | float:
    """The value of --gate: learned, always, never, or a bias on the logit of opening a check."""
    if text in ("learned", "always", "never"):
        return text
    try:
        bias = float(text)
    except ValueError:
        bias = math.nan
    if not abs(bias) <= 1e4:  # 1e4 is "always"; beyond fp32 it would make NaN of every other logit
        raise argparse.ArgumentTypeError("expected learned, always, never, or a number up to "
                                         f"10,000, got {text!r}")
    return bias


def count_option(text: str) -> int:
    """The value of an option that counts something: a whole number from 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def run_folder(model_name: str) -> Path:
    """Where train.py writes and where eval.py and mosaic.py look, unless they are told otherwise:
    runs/<the last part of the name>, beside these files as checkpoints/ is, whatever folder a
    command is given in."""
    last_part = Path(os.path.abspath(model_name)).name  # of the folders "." and "..", too
    return data.HERE.parent / "runs" / last_part


def find_adapter(model_name: str, adapter: str | None) -> Path | None:
    """The folder of --adapter; without one the model's own, if it is there. ValueError: --adapter
    holds none."""
    folder = Path(adapter) if adapter else run_folder(model_name) / "adapter"
    if (folder / "adapter_config.json").is_file():
        return folder
    if adapter:
        raise ValueError(f"{folder}: no adapter_config.json there; "
                         f"make one: python train.py --model {model_name}")
    return None


def adapter_text(model_name: str, adapter: Path | None) -> str:
    """Which adapter is on. Said always: without one it is the base that plays, unsafe as it is."""
    if adapter:
        return f"adapter {adapter}"
    if find_adapter(model_name, None):
        return "no adapter, as asked: the base as it is"
    return f"no adapter, the base as it is: none in {run_folder(model_name) / 'adapter'}"


def run_command(name: str, main) -> None:
    """Runs a command and exits as all of them do: 0 done, 1 a failure at run time, 2 arguments or
    files, 130 Ctrl-C. Whatever goes wrong is one line on standard error."""
    try:
        with as_command():
            main()
        status = 0
    except KeyboardInterrupt as stop:
        print(f"\n{name}: {str(stop) or 'interrupted'}", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        print(f"{name}: {nobody_reads()}", file=sys.stderr)
        status = 1
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 2
    except (RuntimeError, OSError, FloatingPointError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)


@contextmanager
def as_command():
    """What every command has around its work: SIGTERM, which schedulers send, stops it as Ctrl-C
    does, and its output fits every terminal and comes whole."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Where the encoding has no such letter (PYTHONIOENCODING=ascii): its number.
            # By lines, also into a file: who watches a long run there sees each as it comes.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    stop = StopOnce()
    before_int = signal.signal(signal.SIGINT, stop)
    before_term = signal.signal(signal.SIGTERM, stop)
    try:
        yield
        sys.stdout.flush()  # here a broken pipe is still an error with a name
    finally:
        signal.signal(signal.SIGINT, before_int)
        signal.signal(signal.SIGTERM, before_term)


class StopOnce:
    """Handles SIGINT and SIGTERM: KeyboardInterrupt, once in five seconds. A terminal and torchrun
    may both send one, and the second must not cut off what is saved after the first."""

    def __init__(self):
        self.last = -math.inf  # when it stopped the command, in seconds

    def __call__(self, number, frame):
        now = time.monotonic()
        if now - self.last > 5:
            self.last = now
            raise KeyboardInterrupt


def nobody_reads() -> str:
    """After a BrokenPipeError (`| head -1`): what to say of it. What is still in the buffer goes
    nowhere, or Python would complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return "stopped, for nobody reads its output any more"


def main():
    parser = Parser(description="One task, the transcript as it happens.", allow_abbrev=False)
    parser.add_argument("task", help="what a user asks, or the id of an embedded task")
    parser.add_argument("--model", default="tiny",
                        help=f"{' | '.join(CHECKPOINTS)} | DIR")
    parser.add_argument("--adapter", metavar="DIR",
                        help="default: runs/<model>/adapter beside this file, if it is there")
    parser.add_argument("--no-adapter", action="store_true",
                        help="the base alone, whatever adapter is there")
    parser.add_argument("--tools", metavar="FILE.json",
                        help='{"tools": [], "world": {}}; default: files and mail')
    parser.add_argument("--gate", type=gate_option, default="learned",
                        help="learned | always | never | a bias on its logit")
    parser.add_argument("--refusal", choices=("terminal", "replan"), default="terminal")
    parser.add_argument("--explain", action="store_true",
                        help="samples a group as training does: how it is judged and rewarded")
    args = parser.parse_args()
    if args.no_adapter:
        parser.refuse_idle("with --no-adapter", "adapter")
    if args.explain:
        parser.refuse_idle("with --explain: as in training a refusal ends the episode", "refusal")

    task = data.demo_task(args.task, args.tools)
    adapter = None if args.no_adapter else find_adapter(args.model, args.adapter)
    data.ensure_base(args.model)
    model, tokenizer = load(args.model)
    if adapter:
        load_adapter(model, adapter)
    print(f"[{adapter_text(args.model, adapter)}]")

    if args.explain:
        import train  # here, for it imports this file
        print(train.explain_task(model, tokenizer, task, args.gate))
        return
    watch = printer(tokenizer)
    watch(Dialogue(tokenizer, task.messages, task.offered).ids)
    [finished] = rollout(model, tokenizer, [task], temperature=0.0, gate_mode=args.gate,
                         refusal=args.refusal, max_rows=1, watch=watch)
    print(f"\n[{summary(finished)}]")


def printer(tokenizer):
    """A function that prints ids as they come. A token may end inside of a character; and what a
    tool has returned must not drive the terminal."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def watch(ids):
        text = decoder.decode(b"".join(tokenizer.token_bytes[token] for token in ids))
        print(visible(text), end="", flush=True)
    return watch


def summary(finished: Rollout) -> str:
    gates = ["-" if gate.p is None else f"{gate.p:.2f}" for gate in finished.gates]
    executed = ", ".join(effect.name for effect in finished.journal) or "nothing"
    return (f"{finished.ended} after {len(finished.turns)} turns, {finished.n_written} tokens, "
            f"{finished.safety_tokens} in checks; gate {', '.join(gates)}; executed: {executed}")


if __name__ == "__main__":
    run_command("mosaic.py", main)
