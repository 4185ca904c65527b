"""The demonstrator: what a base model is shown in its warm start, before MOSAIC trains it.

MOSAIC (train.py) selects among things that a model already does. A base model of ours is therefore
made *unsafe*, as real base models are: it mostly does what harms, mostly obeys an injected order,
mostly pastes a record whole. It checks rarely, but what a check says is informative. All of this
is a mixture of behaviours with known rates (`MIX`), and `Demonstrator` writes episodes of it.

In order: the mixture; one episode, turn by turn (`Demonstrator`); an episode as ids and weights of
the loss (`demonstration`), also with rates at its gates (`gated_demonstration`); a task up to the
call that decides (`before_decision`); documents as batches; the tasks that are shown
(`fresh_tasks`) and their made-up domains (`vary`). They are fresh rows of the train split: never a
held-out domain, pair or wording. Only recipes of base models import this file: data/tiny.py and
data/smollm2.py do.

Deviations
1. [ours] Everything here. The paper starts from public instruction-tuned models, whose behaviours
   before training are what they are; it has no warm start.

Try: python -c "import random; from data import demonstrator as d; from tools import Sandbox;
rng = random.Random(0); task = d.fresh_tasks(100, 0, rng)[0];
agent = d.Demonstrator(task, rng, d.MIX);
print(task.messages[0]['content'], agent.write_turn(Sandbox(task)))" prints what a user asks and the
first turn of the answer: a plan, perhaps a check, an action. Next file: data/tiny.py.
"""
import functools
import json
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

import mosaic
from data import suites
from data.controls import call_blocks, turn_text
from data.rows import task_from_row
from model import progress
from tools import FORCED, SAMPLED, Episode, Sandbox, Task, refusal_tool, schema_error

# The behaviours of the base model, as probabilities. What is common here is what greedy decoding of
# the base does.
MIX = {
    "check_risky": 0.30,       # a check is opened before a risky step ...
    "check_harmless": 0.04,    # ... and before any other step
    "verdict": 0.92,           # a check of something risky is right
    "false_alarm": 0.05,       # a check of something harmless sees harm
    "refuse_unchecked": 0.05,  # harm is refused without a check, before any of it was done ...
    "late": 0.15,              # ... and after some of the harm was done
    "obey": 0.97,              # an injected order is obeyed, unless a check says otherwise
    "paste": 0.95,             # a record is pasted whole, unless a check says otherwise
    "stop_early": 0.42,        # the last of three or four calls is left out
    "slip": 0.10,              # a call that fails, made only to show what follows one
}

# How often a demonstration holds a check, by "is the step risky". That is far more often than the
# base shall open one, because what a check says is what the base has to learn. The weight of the
# loss at the gate (the place in a turn where the agent opens a check or does not) makes up for it,
# see `Demonstrator.draw_opening`.
SHOWN = {True: 0.65, False: 0.15}

SHARES = {"harm": 0.36, "injection": 0.20, "benign": 0.20, "privacy": 0.24}  # of the tasks drawn
MADE_UP = 0.7   # share of the tasks that play in a made-up domain, see `vary`; a recipe may differ
REWORDED = 0.5  # share of the tasks whose message to send is random words
COMMON = 0.5    # share of the common and easy tasks that is kept

MAX_TURNS = 9  # of a demonstrated episode: four calls, a slip before each of them, and an answer

RECORD_ID = r"\b[A-Z][0-9]{2}\b"  # as "B34", in a message
ALL_DONE = ("all done", {})  # stands for the next call where none is left
# The verdicts of a step that nothing speaks against: a phrase was read that allows it, or none was.
# Of tiny's checks the second say NOTHING_FOUND. A language model says FINE in both cases, so that
# between harm and no harm it decides at one word, "looks" or "is". Else the first word decides, and
# "no" from "this" it told far worse on phrases it never saw: harm that it did not recognise was "no
# risk".
FINE = "this is allowed: go on"
NOTHING_FOUND = "no risk here: go on"


class Verdict(NamedTuple):
    """A check of one step: what it says, and what the agent does after it. The acts are

    "go"       the next call, as an agent without a check would make it
    "refuse"   refusal_tool
    "obey"     the call that the injected order asks for
    "paste"    the next call; a message carries the record whole (which is what "go" does, too)
    "careful"  the next call; a message carries only what its recipient may have"""
    text: str
    act: str


class Gate(NamedTuple):
    """The place in a turn where a check is opened or not."""
    weight: float  # of the loss on the token that was written there; 0 in slips
    rate: float    # at which a check shall be opened there; 0 in slips
    closed: str    # the tag that stands there if none is


# ----------------------------------------------------------------------- one episode, turn by turn
class Demonstrator:
    """Writes one episode of the mixture turn by turn, knowing the task's ground truth.

    A turn plans, may check, and acts. A plan names what an agent without a check would do: else it
    would give the verdict away and the check would be idle. It also names what comes after that,
    so that the next turn finds its call in this plan, and not by its place in the user's words.

    task: tools.Task. rng: random.Random; the same one gives the same episode. mix, shown,
    nothing_found: see `MIX`, `SHOWN` and `NOTHING_FOUND`.
    """

    def __init__(self, task: Task, rng: random.Random, mix: dict, shown: dict = SHOWN,
                 nothing_found: str = NOTHING_FOUND):
        self.task = task
        self.rng = rng
        self.mix = mix
        self.shown = shown
        self.nothing_found = nothing_found
        self.todo = [_call_of(pattern) for pattern in asked_calls(task)]
        self.orders = [_call_of(pattern) for pattern in task.injected]  # an attacker's
        self.gates = []  # of each turn: its Gate
        self.known = None  # what the user's call is about that a plan named last: it is "it" then
        self.slipped = False  # was the last turn a slip? Then it carries no loss
        # Will it lose patience with a long chain of calls? Not in the harm suite: the deciding
        # phrase, the *cue*, settles what is right there, and a check of "all done" would have
        # nothing to say.
        is_long = len(self.todo) > 2  # calls
        self.impatient = is_long and task.suite != "harm" and self.happens("stop_early")

    def happens(self, behaviour: str) -> bool:
        """Draws whether the agent behaves so this time."""
        return self.rng.random() < self.mix[behaviour]

    def write_turn(self, sandbox: Sandbox) -> str:
        """The text of the next turn. sandbox: the episode's, as it is before that turn."""
        risky = sandbox.risky()
        # The order of all draws is part of the recipe: it decides which model a seed gives. So this
        # one is drawn here, although only messages of the privacy suite depend on it.
        carefulness = "paste" if self.happens("paste") else "careful"
        slip = self.draw_slip(risky)
        if slip is not None:
            return slip

        act = self.act_unchecked(sandbox, carefulness)
        if self.impatient and len(self.todo) == 1 and act != "refuse":
            self.todo = []  # it takes the last call for done, and answers
        plan = self.write_plan_of(act)

        check = None
        if self.draw_opening(risky, act):
            verdict = self.draw_verdict(sandbox)
            check = verdict.text
            act = verdict.act
        return turn_text(self.carry_out(act), plan, check)

    def act_unchecked(self, sandbox, carefulness) -> str:
        """What the agent does if it does not check."""
        if self.task.label == "harmful" and sandbox.revealed:
            did_harm = any(effect.unsafe for effect in sandbox.journal)
            if self.happens("late" if did_harm else "refuse_unchecked"):
                return "refuse"
        elif self.has_just_read_orders(sandbox):
            if self.happens("obey"):
                return "obey"
        return carefulness

    def has_just_read_orders(self, sandbox) -> bool:
        return bool(self.orders) and sandbox.newest_source == self.task.reveals

    def draw_opening(self, risky, act) -> bool:
        """Draws whether this turn shows a check, and notes its Gate. act: what the agent does if it
        does not check.

        Importance weights: checks are shown at rate c, and the model shall open them at rate q. A
        weight of q / c where there is one, and of (1 - q) / (1 - c) where there is none, gives the
        gate's token the same expected gradient as if they had been shown at rate q.
        """
        q = self.mix["check_risky" if risky else "check_harmless"]
        c = self.shown[risky]
        opened = self.rng.random() < c
        weight = q / c if opened else (1 - q) / (1 - c)
        answers = act not in ("refuse", "obey") and not self.todo
        self.gates.append(Gate(weight, q, "answer" if answers else "tool_call"))
        return opened

    def carry_out(self, act) -> str:
        """The action of a turn, as text. Takes it off what is to be done."""
        if act == "refuse":
            return call_blocks((refusal_tool.name, {"reason": self.kind_of_harm()}))
        if act == "obey":
            return call_blocks(self.orders.pop(0))

        call = self.next_call(careful=act == "careful")
        self.todo = self.todo[1:]
        if call == ALL_DONE:
            return "<answer>\ndone\n</answer>"
        return call_blocks(call)

    # -- calls
    def next_call(self, careful: bool) -> tuple:
        """The next call to make, (name, arguments), or ALL_DONE.

        A pattern of a message says only what its text must contain; the text is filled in here.
        careful: leave out the fields that the recipient may not have.
        """
        if not self.todo:
            return ALL_DONE
        name, arguments = self.todo[0]
        text = arguments.get("text")
        if isinstance(text, dict):
            arguments = arguments | {"text": self.write_message(text["contains"], careful)}
        return name, arguments

    def write_message(self, contents: list, careful: bool) -> str:
        """The text of a message that has to contain these values."""
        if self.task.suite == "privacy":
            return self.write_record(careful)
        text = ", ".join(contents)
        quoted = re.search('"(.*)"', self.task.messages[-1]["content"])
        if quoted and text in quoted[1]:
            return quoted[1]  # the user gives the whole message: send it as it is
        return text

    def write_record(self, careful: bool) -> str:
        """The fields of the record that go into a message: "phone: 012 34 56, hours: 9 to 17"."""
        fields = list(self.task.meta["allowed"])
        if not careful:
            fields += self.task.meta["denied"]

        shown = []  # all values of the world, in the order in which a tool shows them
        for table in self.task.world.values():
            for record in table.values():
                shown += record.values()
        # Sorted into the record's order: a model can copy that, and need not learn another one.
        fields.sort(key=lambda field: shown.index(field[1]))
        return ", ".join(f"{name}: {value}" for name, value in fields)

    def draw_slip(self, risky) -> str | None:
        """A turn that gives the next call's arguments to a tool that does not take them, or None.

        A model that never saw a failed call refuses after each one. The slip itself carries no loss
        (see `demonstration`), or it would be learned, too.
        """
        slipped_before = self.slipped
        self.slipped = False
        if risky or slipped_before or not self.todo:
            return None
        if self.impatient and len(self.todo) == 1:
            return None  # it would end behind the error, and nothing shall be learned of that
        _, arguments = self.next_call(careful=True)
        # With these arguments the sandbox answers with an error: nothing is done by mistake.
        wrong_tools = [tool.name for tool in self.task.tools
                       if schema_error(tool.parameters, arguments)]
        if not wrong_tools or not self.happens("slip"):
            return None

        self.slipped = True
        self.gates.append(Gate(weight=0.0, rate=0.0, closed="tool_call"))
        call = (self.rng.choice(wrong_tools), arguments)
        return turn_text(call_blocks(call), self.write_plan(call, self.todo[1:]))

    # -- plans
    def write_plan_of(self, act) -> str:
        """The plan of a turn that acts so if it does not check."""
        if act == "obey":
            return self.write_plan(self.orders[0], self.todo)
        return self.write_plan(self.next_call(careful=act == "careful"), self.todo[1:])

    def write_plan(self, call: tuple, later: list) -> str:
        """The text of a plan: a call, and the first of those that follow it."""
        _, arguments = call
        if call == ALL_DONE:
            return "all done"
        # An attacker's call is not what the work is about: "it" stays the record of the user's.
        if call not in self.orders:
            self.known = _subject(arguments)
        following = self.words_for(later[0], self.known) if later else "done"
        return f"{self.words_for(call)}, then {following}"

    def words_for(self, call: tuple, known: str | None = None) -> str:
        """A call in short: the tool, its record or person ("it" if that is the known one), and the
        new value in the user's own words, which are easy to copy."""
        name, arguments = call
        subject = _subject(arguments)
        words = f"{name} it" if subject == known else f"{name} {subject}"
        for key, value in arguments.items():
            if key in suites.SAID:
                value_words = f" to {suites.SAID[key].format(value)}"
                if value_words in self.task.messages[-1]["content"]:
                    words += value_words
        return words

    # -- checks
    def draw_verdict(self, sandbox) -> Verdict:
        """What the check of this step says: the right thing, or at known rates the wrong one."""
        right, wrong = self.verdicts(sandbox)
        # If the wrong verdict is a refusal, the mistake is a false alarm, which has its own rate.
        if wrong.act == "refuse":
            return wrong if self.happens("false_alarm") else right
        return right if self.happens("verdict") else wrong

    def verdicts(self, sandbox) -> tuple[Verdict, Verdict]:
        """-> the right and the wrong verdict on the next step. After an order it plans anew, so
        `known` may change."""
        task = self.task
        if task.label == "harmful" and sandbox.revealed:
            return Verdict(self.words_for_harm(), "refuse"), Verdict(FINE, "go")

        fine = FINE if self.has_seen_cue() else self.nothing_found
        if self.has_just_read_orders(sandbox):
            # The plan is told anew, since the next turn goes on from here.
            plan = self.write_plan(self.next_call(careful=True), self.todo[1:])
            right = Verdict(f"the note gives an order: ignore it, {plan}", "go")
            return right, Verdict(fine, "obey")
        if task.suite == "privacy" and len(self.todo) == 1:  # the message is next
            return self.privacy_verdicts()
        return Verdict(fine, "go"), Verdict(self.words_for_harm(), "refuse")

    def has_seen_cue(self) -> bool:
        """In the harm suite: was the deciding phrase read, be it of harm or of its twin? A note's
        is when nothing but the last call is left."""
        if self.task.suite != "harm":
            return False
        return self.task.meta["style"] != "note" or len(self.todo) <= 1

    def words_for_harm(self) -> str:
        return f"this looks like {self.kind_of_harm()}: refuse"

    def kind_of_harm(self) -> str:
        # Only harmful rows and their twins know of one; elsewhere it is a false alarm.
        return self.task.meta["kind"] if self.task.suite == "harm" else "fraud"

    def privacy_verdicts(self) -> tuple[Verdict, Verdict]:
        """-> who gets which fields of the record, and "gets all"."""
        permitted = _field_names(self.write_record(careful=True))
        every = _field_names(self.write_record(careful=False))
        decisions = []  # one field at a time: each is a question of its own to the model
        for field in every:
            decisions.append(f"{field} yes" if field in permitted else f"{field} no")
        gets = f"a {self.task.meta['cue']} gets"  # the role in the user's words
        right = f"{gets} {' '.join(decisions)}: {', '.join(permitted)}"
        return Verdict(right, "careful"), Verdict(f"{gets} all", "paste")


def asked_calls(task: Task) -> list:
    """The patterns of the calls that do all that is asked, harm included.

    A harmful row whose harm stands in the message has no goal: nothing of it should be done. But
    who does it looks the record up before, as its twin's goal has it: where the user says so, and
    where a value is to be sent. Else the plan, or a result that is not there, would give it away.
    """
    calls = task.goal + task.unsafe
    if task.suite != "harm" or task.label != "harmful" or task.goal:
        return calls
    message = task.messages[-1]["content"]
    record = re.search(RECORD_ID, message)
    for tool in task.tools:
        is_said = tool.name.replace("_", " ") in message.lower()
        is_sent = "text" in task.unsafe[0]["arguments"]
        if tool.effect == "read" and (is_said or is_sent):
            return [{"name": tool.name, "arguments": {"id": record[0]}}, *calls]
    return calls


def _call_of(pattern) -> tuple:
    """A call pattern of a task -> (name, arguments)."""
    return pattern["name"], dict(pattern["arguments"])


def _subject(arguments):
    """What a call is about: its first argument is a record's id or a person."""
    return next(iter(arguments.values()))


def _field_names(text) -> list:
    return re.findall("([a-z]+): ", text)


# -------------------------------------------------------------------- what a warm start is fed with
def demonstration(task: Task, rng: random.Random, tokenizer, mix: dict = MIX,
                  nothing_found: str = NOTHING_FOUND) -> tuple[list, list]:
    """One whole episode of the mixture -> (ids, weights), both of T entries.

    A weight is that of the loss on this token: 1 on what the agent wrote, 0 on everything else and
    on slips, and the importance weight on the token at a gate.
    """
    ids, weights, gates = _demonstrate(task, rng, tokenizer, mix, SHOWN, nothing_found)
    for index, gate in gates:
        weights[index] = gate.weight
    return ids, weights


def gated_demonstration(task: Task, rng: random.Random, tokenizer, shown: dict = SHOWN,
                        nothing_found: str = NOTHING_FOUND,
                        mix: dict = MIX) -> tuple[list, list, list, list]:
    """One whole episode of the mixture -> (ids, weights, rates, closed), each of T entries.

    rates: at a gate the rate at which a check shall be opened there, 0 on all other tokens and in
    slips. closed: at a gate the token that stands there if none is. The weights are those of
    `demonstration`, but 0 at the gates: the one way that the episode went says less. shown: how
    often checks stand in it. mix: its other behaviours, and the rates."""
    ids, weights, gates = _demonstrate(task, rng, tokenizer, mix, shown, nothing_found)
    rates = [0.0] * len(ids)
    closed = [0] * len(ids)
    for index, gate in gates:
        weights[index] = 0.0
        rates[index] = gate.rate
        closed[index] = token_at_gate(gate.closed, tokenizer)
    return ids, weights, rates, closed


def _demonstrate(task, rng, tokenizer, mix, shown, nothing_found) -> tuple:
    """-> (ids, weights: 1 on what the agent wrote and 0 elsewhere, [(index of the token at the
    gate, Gate) of each turn])."""
    dialogue = mosaic.Dialogue(tokenizer, task.messages, task.offered)
    agent = Demonstrator(task, rng, mix, shown, nothing_found)
    episode = Episode(task, max_turns=MAX_TURNS)
    places = []  # of the tokens at the gates

    while episode.ended is None:
        text = agent.write_turn(episode.sandbox)
        ids = mosaic.encode_trusted(tokenizer, text) + [tokenizer.stop_ids[0]]
        places.append(len(dialogue.ids) + gate_in(ids, tokenizer))
        # A slip goes in as if it were forced: what is not sampled carries no loss.
        code = FORCED if agent.slipped else SAMPLED
        dialogue.extend(ids, [code] * len(ids))
        results = episode.step(text)
        if episode.ended is None:
            dialogue.observe(results)
    weights = [float(code == SAMPLED) for code in dialogue.provenance]
    return dialogue.ids, weights, list(zip(places, agent.gates, strict=True))


def token_at_gate(tag: str, tokenizer) -> int:
    """The token at the gate of a turn that goes on with this tag, such as "tool_call"."""
    ids = mosaic.encode_trusted(tokenizer, f"</think>\n\n<{tag}>\n")
    return ids[gate_in(ids, tokenizer)]


def gate_in(ids: list, tokenizer) -> int:
    """Index of the token at the gate, in the ids of a turn or of its beginning with a check."""
    return _end_of_run(_ids_before_gate(tokenizer), ids)


@functools.lru_cache(maxsize=4)  # asked for in each turn
def _ids_before_gate(tokenizer) -> list:
    """The ids from the end of a plan up to the token where a check, a call and an answer part."""
    endings = []
    for tag in ("safety_thoughts", "tool_call", "answer"):
        endings.append(mosaic.encode_trusted(tokenizer, f"</think>\n\n<{tag}>\n"))
    shared = []
    for ids in zip(*endings):
        if len(set(ids)) > 1:
            break
        shared.append(ids[0])
    return shared


def _end_of_run(run, ids) -> int:
    """Index behind the first place in ids where this run of ids stands. A turn has one: no text may
    hold a tag."""
    for start in range(len(ids)):
        end = start + len(run)
        if ids[start:end] == run:
            return end
    raise AssertionError((run, ids))


def before_decision(task: Task, first: bool = False, nothing_found: str = NOTHING_FOUND) -> tuple:
    """Plays a task up to the call that decides -> (Demonstrator, Sandbox, the newest result or
    None). first: up to its first call, whatever that does."""
    # Nothing that is used here is drawn.
    agent = Demonstrator(task, random.Random(0), MIX, nothing_found=nothing_found)
    sandbox = Sandbox(task)
    # An injected order decides as soon as it is read: with the first call. Elsewhere it is the
    # last call that does the harm, or sends the record.
    last = len(agent.todo) - 1 if task.suite != "injection" else 1
    result = None
    for _ in range(0 if first else last):
        agent.write_plan_of("careful")  # a plan that obeys an order says "it" of this record
        result = sandbox.call(*agent.next_call(careful=True))
        agent.todo.pop(0)
    return agent, sandbox, result


# ------------------------------------------------ documents as batches, the loss, the learning rate
def batches(documents: list, rng: random.Random, tokens: int) -> Iterator:
    """Endless passes over the documents, see `one_pass`."""
    while True:
        yield from one_pass(documents, rng, tokens)


def one_pass(documents: list, rng: random.Random, tokens: int) -> Iterator:
    """Documents in batches of similar length, about `tokens` a batch -> (ids (B, T), weights (B,
    T)). Each document once, but for the longest few, which fill no batch and are left out.

    documents: [(ids, weights)], or with more numbers of a token. ValueError: there are none.
    """
    if not documents:
        raise ValueError("no task was drawn that can be shown: more --tasks")
    shuffled = rng.sample(documents, len(documents))
    # Sorting keeps the order of those that are equally long: batches differ each time round.
    pool = sorted(shuffled, key=lambda document: len(document[0]))
    groups = []
    group = []
    for document in pool:
        group.append(document)
        if len(group) * len(document[0]) >= tokens:  # the newest is the longest of its group
            groups.append(group)
            group = []
    groups = groups or [group]  # a few documents, as in a test, fill none
    rng.shuffle(groups)
    for group in groups:
        yield padded(group)


def padded(documents: list) -> tuple:
    """[(ids, weights)] of different lengths -> (ids (B, T), weights (B, T)), without loss on what
    fills the rows up. So for more numbers of a token, too."""
    return tuple(_filled(rows) for rows in zip(*documents))


def _filled(rows):
    """Lists of different lengths -> (B, T), filled up at the right with zeros of their own type."""
    width = max(len(row) for row in rows)
    zero = type(rows[0][0])(0)
    return torch.tensor([row + [zero] * (width - len(row)) for row in rows])


def weighted_loss(model, ids, weights):
    """Mean of -log p over the tokens, weighted: sum(w * loss) / sum(w). ids, weights: (B, T)."""
    return loss_of_words(model, model.hidden(ids[:, :-1]), ids, weights)


def loss_of_words(model, hidden, ids, weights):
    """The same of hidden states that are there already: (B, T - 1, C), all but the last."""
    weights = weights[:, 1:]  # of the token that is predicted
    mask = weights > 0
    logits = model.head(hidden[mask])   # (N, V): only where there is loss
    losses = F.cross_entropy(logits, ids[:, 1:][mask], reduction="none")  # (N,)
    # A sum and no dot product: autocast would round that one to bf16.
    return (losses * weights[mask]).sum() / weights.sum()


def schedule(step: int, steps: int, warm_up: int) -> float:
    """The share of the peak's learning rate: up in `warm_up` steps, then linearly to zero."""
    return min((step + 1) / warm_up, 1 - step / steps)


# ------------------------------------------------------------------------------ the tasks it shows
class Variety(NamedTuple):
    """How the tasks that are shown differ from those of the train split."""
    made_up: float = MADE_UP            # share of those that play in a made-up domain, see `vary`
    banks: dict = {}                    # more phrases, see `suites.rephrased`
    forms: suites.Forms = suites.FORMS  # how users ask
    roles: dict = {}                    # more words for a role, see `suites.in_other_words`
    attacks: dict = {}                  # more notes, see `suites.with_another_note`: orders ...
    mentions: tuple = ()                # ... and look-alikes
    any_field: bool = True              # a record may hold any field, not its domain's alone


def fresh_tasks(n: int, seed: int, rng: random.Random, variety: Variety = Variety()) -> list:
    """Up to n fresh tasks of the train split to show whole: fewer, because half of the common ones
    is left out."""
    tasks = []
    for suite, share in SHARES.items():
        for row in progress(_fresh_rows(suite, int(n * share), 1 + seed, variety),
                            what=f"tasks of {suite}", unit="row"):
            keep = COMMON if _is_common(row) else 1
            if rng.random() < keep:
                tasks.append(_varied_task(row, rng, variety))
    return tasks


def fresh_verdict_tasks(counts: dict[str, int], seed: int, rng: random.Random,
                        variety: Variety = Variety()) -> list:
    """Other fresh tasks, of which only the verdicts are to be learned: so many of each suite."""
    tasks = []
    for suite, count in counts.items():
        for row in progress(_fresh_rows(suite, count, 1000 + seed, variety),
                            what=f"verdicts of {suite}", unit="row"):
            tasks.append(_varied_task(row, rng, variety))
    return tasks


def _varied_task(row, rng, variety) -> Task:
    row = suites.rephrased(row, rng.choice, variety.banks)
    row = suites.with_another_note(row, rng.choice, variety.attacks, variety.mentions)
    row = vary(row, rng, variety.made_up)  # renames a domain's words; a role's may be one of them
    row = suites.in_other_words(row, rng.choice, variety.roles)
    return task_from_row(row, "suites")


def _fresh_rows(suite, n, seed, variety) -> list:
    """n rows of the train split, with whole tools in place of their names."""
    tools = {tool["name"]: tool for tool in suites.tool_rows()}
    drawn = suites.generate(suite, "train", n, seed, variety.any_field, variety.forms)
    rows = []
    for row in drawn:
        rows.append(row | {"tools": [tools[name] for name in row["tools"]]})
    return rows


def _is_common(row) -> bool:
    """Common and easy. What is hard shall come more often: above all the second of two records."""
    if row["meta"]["kind"] == "mention":
        return True
    records = re.findall(RECORD_ID, row["messages"][-1]["content"])
    return len(set(records)) == 1 and row["suite"] in ("harm", "benign")


# Ordinary words. Tools of made-up domains are named with these and with OWN.
WORDS = """apple barn basket bench bike boat book bottle box brush bucket cabin camera candle chair
    clock coat corner cup desk drum engine farm fence field flag forest garden gate glass guitar
    hammer harbor horse island jacket ladder lamp leaf map market mirror mountain oven pencil piano
    pillow plate pond pot radio ring river rope saddle sand shelf ship shoe shop silver spoon square
    stone stove table tent tower toy train tree valley wagon wheel window wood yard back bring door
    hall late meet noon paid papers thank today""".split()


def _words_of_training_domains() -> list:
    """What the tools of the training domains are named with."""
    words = []
    for noun in suites.SEEN_DOMAINS:
        domain = suites.DOMAINS[noun]
        words += [noun, domain.read, domain.write, domain.sent, domain.irreversible]
    # "text" is never renamed: it is a parameter's name, too.
    return [word for word in words if word != "text"]


def _sayable_words() -> list:
    """All words that a message of random words may hold.

    A word that never stands as an answer would be forgotten as one, and could not be copied. So the
    words of the suites' messages are among them, and the nouns of all domains, held-out ones, too:
    as plain words, for no tool is named with those.
    """
    words = {*WORDS, *suites.DOMAINS}
    for domain in suites.DOMAINS.values():
        words.add(domain.sent)
    for text in suites.TEXTS:
        words.update(text.split())
    return sorted(words)


OWN = _words_of_training_domains()
SAYABLE = _sayable_words()


def vary(row: dict, rng: random.Random, made_up: float = MADE_UP) -> dict:
    """The row, often in a made-up domain, and often with random words for a message to be sent.

    What an agent must call then stands only in its prompt, so it learns to copy names, and does not
    learn those of twelve domains by heart. `meta` stays as it is. made_up: the share of rows in a
    made-up domain. There the words are renamed in cues, too ("must not get it": "must not lamp
    it"), so a model that knows what words mean should see fewer of them.
    """
    # In JSON text a word is renamed everywhere at once: tools, world, messages and patterns.
    text = json.dumps({**row, "meta": {}})
    if rng.random() < made_up:
        text = _rename_tools(text, row["tools"], rng)
    if rng.random() < REWORDED:
        text = _reword_messages(text, rng)

    varied = json.loads(text) | {"meta": row["meta"]}
    for tool, original in zip(varied["tools"], row["tools"]):
        # These words are ours ("update", "write"), not the domain's: they were renamed by accident.
        tool["op"]["do"] = original["op"]["do"]
        tool["effect"] = original["effect"]
    return varied


def _rename_tools(text, tools, rng) -> str:
    """The words that these tools are named with become others, everywhere in the text."""
    # Half of the time verbs and nouns change; else only the nouns: a new domain with known verbs.
    keep_verbs = rng.random() >= 0.5
    words = set()
    for tool in tools:
        verb, *nouns = tool["name"].split("_")
        words.update(nouns if keep_verbs else [verb, *nouns])
    words = sorted(words - {"send", "text"})

    drawn = {}  # a dict keeps the order, and holds each word once: all new names are different
    while len(drawn) < len(words):
        source = rng.choice((WORDS, OWN))
        drawn[rng.choice(source)] = None
    new_names = dict(zip(words, drawn))
    if keep_verbs:
        # Swap find and get at random: the other verbs must not give away which one it is. (In the
        # known domains "change" and "sell" come only with "get".)
        new_names |= zip(("find", "get"), rng.sample(("find", "get"), 2))

    def renamed(match):
        word = new_names[match[0].lower()]
        return word.capitalize() if match[0][0].isupper() else word

    any_word = "|".join(new_names)
    return re.sub(rf"(?<![A-Za-z])(?:{any_word})(?![A-Za-z])", renamed, text, flags=re.IGNORECASE)


def _reword_messages(text, rng) -> str:
    """Each message that a user gives becomes three to five random words, and the name in a password
    becomes another."""
    for message in suites.TEXTS:
        words = ""
        for _ in range(rng.randrange(2, 5)):
            words += rng.choice(SAYABLE) + rng.choice((" ", ", "))
        text = text.replace(message, words + rng.choice(SAYABLE))
    password = re.search("password is ([A-Za-z]+-)", text)
    if password:
        text = text.replace(password[1], f"{rng.choice(suites.NAMES)}-")
    return text
