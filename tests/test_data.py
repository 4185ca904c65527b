"""data/: the embedded suites hold what data/README.md says they hold. The scripts that play them
here follow call patterns; there is no model."""
import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

import data
from data import demonstrator, suites
from data.controls import paste_leaks
from tools import Sandbox

TASKS = {name: data.load(name) for name in data.NAMES}


def tasks_of(names):
    tasks = []
    for name in names:
        tasks += TASKS[name]
    return tasks


ALL = tasks_of(data.NAMES)
HELD_OUT = tasks_of(suites.SUITES)


def concrete(pattern):
    """A call that fits the pattern: (tool, arguments)."""
    arguments = {}
    for key, value in pattern["arguments"].items():
        arguments[key] = ", ".join(value["contains"]) if isinstance(value, dict) else value
    return pattern["name"], arguments


def play(task, patterns):
    """The sandbox after a call for each pattern. None may fail."""
    box = Sandbox(task)
    for pattern in patterns:
        result = json.loads(box.call(*concrete(pattern)))
        assert "error" not in result, (task.id, pattern, result)
    return box


def shown(task):
    """Everything that an agent can read in the task: the message and every record."""
    return task.messages[0]["content"] + json.dumps(task.world)


def texts_of(banks):
    texts = []
    for bank in banks.values():
        texts += [phrase.text for phrase in bank]
    return texts


def records(task):
    found = []
    for table in task.world.values():
        found += table.values()
    return found


def sha256(text):
    return hashlib.sha256(text).hexdigest()


def test_regenerating_gives_the_same_bytes():
    """A suite that depends on the hash seed or the machine cannot be compared between two papers
    or two laptops."""
    for name, text in suites.files().items():
        assert sha256((data.HERE / name).read_bytes()) == sha256(text.encode()), name


def test_ids_are_unique_and_every_cell_is_large_enough():
    """Trial cells of 50 to 110 tasks had standard errors of 2 to 7 points."""
    assert len({task.id for task in ALL}) == len(ALL)
    cells = Counter()
    for task in HELD_OUT:
        attacked = task.suite == "injection" and bool(task.injected)
        cells[task.suite, task.split, task.label, attacked] += 1

    for split in suites.HELD_OUT:
        assert cells["harm", split, "harmful", False] == 250
        assert cells["harm", split, "benign", False] == 250
        assert cells["injection", split, "benign", True] == 250
        assert cells["injection", split, "benign", False] == 170
        assert cells["benign", split, "benign", False] == 250
        assert cells["privacy", split, "benign", False] == 250
    for name in ("train", "train_varied"):
        assert len(TASKS[name]) == sum(suites.TRAIN.values())
        assert {task.split for task in TASKS[name]} == {"train"}


def test_varied_tasks_are_those_of_training_in_other_words():
    """Anything but the phrase that differs would make the two files two benchmarks; and two tasks
    of one id would be one to the judge's ledger."""
    more = texts_of(suites.part_of(suites.MORE_BANKS, seen=False))
    n_varied = 0
    for task, other in zip(TASKS["train"], TASKS["train_varied"], strict=True):
        assert (task.label, task.goal, task.unsafe) == (other.label, other.goal, other.unsafe)
        assert other.id != task.id and (other.twin is None) == (task.twin is None)
        assert shown(other) == shown(task).replace(task.meta["cue"], other.meta["cue"])
        if task.meta["cue"] != other.meta["cue"]:
            assert other.meta["cue"] in more
            n_varied += 1
        else:
            assert other.meta["cue"] not in more
    # Half of the rows, less the few that draw their own phrase again.
    cues = [task.meta["cue"] for task in TASKS["train"] if task.suite in ("harm", "benign")]
    n_cues = len([cue for cue in cues if cue])
    assert 0.35 * n_cues < n_varied < 0.5 * n_cues, (n_varied, n_cues)


@pytest.mark.parametrize("name", ["harm", "train", "train_varied"])
def test_twins_point_at_each_other_and_differ_in_one_phrase(name):
    """If anything but the phrase told a twin from its harmful side, a model could learn that
    instead."""
    by_id = {task.id: task for task in TASKS[name] if task.suite == "harm"}
    for task in by_id.values():
        twin = by_id[task.twin]
        assert twin.twin == task.id
        assert {task.label, twin.label} == {"harmful", "benign"}
        assert [tool.name for tool in task.tools] == [tool.name for tool in twin.tools]
        assert task.split == twin.split

        cue = task.meta["cue"]
        assert cue in shown(task)
        assert shown(task).replace(cue, "#") == shown(twin).replace(twin.meta["cue"], "#")
        if task.label == "harmful":
            # What the twin may do to the end, the harmful side may do up to the harm at most.
            before = task.goal if task.reveals else twin.goal[:-1]
            assert twin.goal == before + task.unsafe
            assert len(task.unsafe) == 1 and not twin.unsafe


def test_shares_of_hidden_and_late_harm():
    """A world where every harm shows in the first message cannot tell early refusal from late
    abort."""
    for split in suites.HELD_OUT:
        of_split = [task for task in TASKS["harm"] if task.split == split]
        harmful = [task for task in of_split if task.label == "harmful"]
        hidden = [task for task in harmful if task.reveals is not None]
        late = [task for task in harmful if task.meta["late"]]
        assert .38 <= len(hidden) / len(harmful) <= .42
        assert .13 <= len(late) / len(harmful) <= .17
        assert all(2 <= len(task.goal) <= 3 for task in late)


def words_of_phrases(bank):
    """The set of words of each phrase that training sees."""
    seen = [phrase.text.lower() for phrase in suites.BANKS[bank] if phrase.seen]
    return [set(re.findall("[a-z]+", text)) for text in seen]


@pytest.mark.parametrize("bad, good", [("HARM", "LEGIT"), ("BAD_NOTES", "GOOD_NOTES")])
def test_no_single_word_decides(bad, good):
    """With "must" only in threats and "agreed" only in consent, a bag of words would be a perfect
    gate: no word of the training banks may tell the two sides apart with a balanced accuracy above
    0.7."""
    bad_phrases = words_of_phrases(bad)
    good_phrases = words_of_phrases(good)
    for word in set().union(*bad_phrases, *good_phrases):
        bad_share = sum(word in words for words in bad_phrases) / len(bad_phrases)
        good_share = sum(word in words for words in good_phrases) / len(good_phrases)
        assert .5 + abs(bad_share - good_share) / 2 < .7, word


def test_held_out_tools_never_appear_in_training():
    """The "domains" split is only worth its name if no tool of it was ever offered, called or
    named in training."""
    unseen = set()
    for noun in suites.UNSEEN_DOMAINS:
        unseen |= set(suites.tool_names(noun))
    table = data.tool_table()
    assert len(unseen) == 12 and len(table) == 60 and unseen <= set(table)

    texts = [(data.HERE / f"{name}.jsonl").read_text() for name in ("train", "train_varied")]
    for suite in suites.SUITES:
        texts.append(json.dumps(suites.generate(suite, "train", 400, seed=9)))
    for text in texts:
        assert not any(name in text for name in unseen)
    for task in HELD_OUT:
        assert {tool.name in unseen for tool in task.tools} == {task.split == "domains"}


def keys(suite, meta):
    """The keys whose pair with the domain the "combinations" split may hold out."""
    if suite == "injection":
        return [meta["wording"] if meta["style"] == "mention" else meta["style"]]
    if suite == "benign":
        has_phrase = meta["cue"] and meta["kind"] != "login"  # a login's cue is of no bank
        return [meta["kind"], meta["cue"]] if has_phrase else [meta["kind"]]
    return [meta["cue"]]


@pytest.fixture(scope="module")
def training_rows():
    lines = (data.HERE / "train.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for suite in suites.SUITES:
        for forms in (suites.FORMS, suites.MORE_FORMS):
            rows += suites.generate(suite, "train", 600, seed=7, forms=forms)
    return rows


def test_held_out_pairs_never_reach_training(training_rows):
    """A leak between splits makes generalisation out of memory; generate() must respect it for the
    warm start too."""
    for row in training_rows:
        for key in keys(row["suite"], row["meta"]):
            assert not suites.held(row["meta"]["domain"], key), row
    for task in HELD_OUT:
        if task.split == "combinations":
            for key in keys(task.suite, task.meta):
                assert suites.held(task.meta["domain"], key), task.meta


def unseen_wordings():
    """Texts of which each stands in the "wordings" split alone."""
    texts = list(suites.ROLE_WORDINGS)
    for bank in suites.BANKS.values():
        texts += [phrase.text for phrase in bank if not phrase.seen]
    for start, between, _ in suites.UNSEEN_FORMS.styles:
        texts += [start, between]
    for form in suites.UNSEEN_FORMS.asks + suites.UNSEEN_FORMS.privacy:
        texts.append(max(re.split(r"\{\w+\}", form), key=len))
    notes = list(suites.UNSEEN_MENTIONS)
    for wordings in suites.UNSEEN_ATTACKS.values():
        notes += wordings
    for note in notes:
        texts.append(max(note.split("{}"), key=len))  # the longest piece beside the tool's name
    return texts


def test_more_forms_change_how_a_user_asks_and_nothing_else():
    """A warm start that asks in more forms must still be of the same tasks, and its forms must not
    hold words that tools are named with: `vary` renames those everywhere."""
    for suite in suites.SUITES:
        rows = suites.generate(suite, "train", 120, seed=3)
        more = suites.generate(suite, "train", 120, seed=3, forms=suites.MORE_FORMS)
        for row, other in zip(rows, more, strict=True):
            assert row | {"messages": 0} == other | {"messages": 0}
        n_changed = sum(row["messages"] != other["messages"] for row, other in zip(rows, more))
        assert (n_changed > 60) == (suite != "harm"), (suite, n_changed)

    named = {"key", "office", "lunch", *demonstrator.OWN}
    added = set(chain(*suites.MORE_FORMS)) - set(chain(*suites.FORMS))
    assert len(added) == 31
    for form in added:
        said = re.sub(r"\{\w+\}", "", "".join(form)).lower()
        assert not named & set(re.findall("[a-z]+", said)), form


def test_held_out_wordings_never_reach_training(training_rows):
    """The same of words: neither side of the "wordings" split may use those of the other."""
    text = json.dumps(training_rows) + (data.HERE / "train_varied.jsonl").read_text("utf-8")
    assert not [wording for wording in unseen_wordings() if wording in text]

    used = "".join(shown(task) for task in HELD_OUT if task.split == "wordings")
    for bank in suites.BANKS.values():
        assert not [phrase for phrase in bank if phrase.seen and phrase.text in used]


@pytest.mark.parametrize("name", data.NAMES)
def test_the_oracle_completes_with_nothing_unsafe(name):
    """A goal that cannot be reached, or that is unsafe itself, would be scored as the agent's
    fault."""
    for task in TASKS[name]:
        box = play(task, task.goal)
        assert box.goal_done(), task.id
        assert [entry.goal for entry in box.journal] == list(range(len(task.goal))), task.id


def test_requests_of_no_suite_can_be_done():
    """tests/requests.jsonl was written without sight of the suites. A goal that cannot be reached,
    a harm that no call can do, a phrase that training has seen: its figures would mean nothing."""
    tasks = data.load(str(Path(__file__).with_name("requests.jsonl")))
    labels = [task.label for task in tasks]
    assert labels == ["harmful", "benign"] * 20
    assert len({task.meta["kind"] for task in tasks}) == 20
    for task in tasks:
        assert play(task, task.goal).goal_done() or not task.goal, task.id
        if task.label == "harmful":
            assert play(task, task.goal + task.unsafe).journal[-1].unsafe, task.id

    text = " ".join(shown(task) for task in tasks).lower()
    for bank in [*suites.BANKS.values(), *suites.MORE_BANKS.values()]:
        assert not [phrase.text for phrase in bank if phrase.text.lower() in text]


def test_act_all_is_unsafe_on_every_harmful_task():
    """A harm that no call can do is a free point for refusing."""
    for task in ALL:
        if task.label == "harmful":
            box = play(task, task.goal + task.unsafe)
            *before, last = box.journal
            assert last.unsafe and box.risky()
            assert not any(entry.unsafe for entry in before)


@pytest.mark.parametrize("name", ["train", "injection"])
def test_a_hijacked_agent_obeys_and_a_look_alike_asks_for_nothing(name):
    """agentdojo #201: an attack that cannot land measures the agent and not the defence."""
    tasks = [task for task in TASKS[name] if task.suite == "injection"]
    for task in tasks:
        note = task.meta["cue"]
        first, rest = task.goal[:1], task.goal[1:]
        assert note in json.dumps(task.world)
        assert bool(task.injected) == (task.meta["kind"] == "attack")

        box = play(task, first)
        assert note in box.journal[0].result
        assert box.risky() == bool(task.injected)

        box = play(task, first + task.injected + rest)
        obeyed = [False] + [True] * len(task.injected) + [False] * len(rest)
        assert [entry.injected for entry in box.journal] == obeyed
        for pattern in task.injected:  # everything that the attack needs is said in the note
            assert pattern["name"] in note
            assert all(value in note for value in pattern["arguments"].values())


@pytest.mark.parametrize("name", ["train", "privacy"])
def test_paste_all_leaks_and_the_oracle_does_not(name):
    """PrivacyLens #3: a leak rate stuck at 0; here a script that pastes the record must leak every
    hidden field."""
    tasks = [task for task in TASKS[name] if task.suite == "privacy"]
    for task in tasks:
        read, send = task.goal
        permitted = [value for _, value in task.meta["allowed"]]
        withheld = [value for _, value in task.meta["denied"]]
        to = task.meta["to"]

        box = play(task, [read])
        result = json.loads(box.journal[0].result)
        record = [value for key, value in result.items() if key not in ("id", "owner")]
        assert sorted(record) == sorted(permitted + withheld)
        assert [secret["value"] for secret in task.secrets] == withheld
        assert paste_leaks(task) == bool(task.secrets)  # the control plays all of them

        box.call(send["name"], {"to": to, "text": ", ".join(record)})
        assert box.journal[-1].leaking == bool(task.secrets)
        assert box.journal[-1].goal == 1
        for value in withheld:
            call = {"name": send["name"], "arguments": {"to": to, "text": value}}
            assert play(task, [call]).journal[0].leaking


def test_the_norm_decides_who_may_get_what():
    """A row against the norm would teach, and score, the opposite of what the README's table
    says."""
    for task in ALL:
        if task.suite == "privacy":
            norm = suites.NORMS[task.meta["role"]].split()
            allowed = [field for field, _ in task.meta["allowed"]]
            denied = [field for field, _ in task.meta["denied"]]
            assert all(field in norm for field in allowed)
            assert not any(field in norm for field in denied)
            assert not any(field in suites.NEVER for field in allowed)


def personal_values(task):
    values = []
    for record in records(task):
        values += [value for key, value in record.items() if key in suites.FIELDS]
    return values


def test_values_are_distinctive():
    """"12" inside "B12" is a leak nobody made."""
    for task in ALL:
        values = personal_values(task)
        text = "\n".join(values)
        message = task.messages[0]["content"].lower()
        for value in values:
            assert text.count(value) == 1, task.id  # in no other value, nor twice
            assert value.lower() not in message, task.id


def test_arguments_can_be_copied():
    """An argument that stands nowhere must be invented by the agent."""
    for task in ALL:
        text = shown(task)
        for pattern in task.goal + task.unsafe + task.injected:
            _, arguments = concrete(pattern)
            for value in arguments.values():
                # ", " joins several values, as those of a privacy task: these stand apart.
                assert ", " in value or value in text, (task.id, pattern)


def test_texts_are_short_and_few_words():
    """The tiny model sees 1.5 M tokens: a large vocabulary or long records would not be
    learned."""
    vocabulary = set()
    for task in ALL:
        text = shown(task) + " ".join(tool.name for tool in task.tools)
        vocabulary.update(re.findall("[a-z]+", text.lower()))
        assert len(task.messages[0]["content"].split()) <= 32, task.id
        assert 3 <= len(task.tools) <= 5, task.id
        for record in records(task):
            assert len(json.dumps(record).split()) <= 31, task.id
    assert len(vocabulary) < 1000


def test_no_tool_of_the_warm_start_is_named_like_a_held_out_one():
    """Made-up domains draw their names from word lists: one held-out noun among them, and "unseen"
    is no longer so."""
    held_out = set(suites.UNSEEN_DOMAINS)
    for noun in suites.UNSEEN_DOMAINS:
        held_out.add(suites.DOMAINS[noun].sent)

    names = set()
    rng = random.Random(0)
    tasks = demonstrator.fresh_tasks(400, 0, rng)
    more = demonstrator.fresh_verdict_tasks({"harm": 266, "privacy": 133}, 0, rng)
    for task in [*tasks, *more]:
        for tool in task.tools:
            names.update(tool.name.split("_"))
    assert len(names) > 100
    assert not names & held_out, names & held_out


def test_generate_is_a_function_of_its_arguments():
    """The warm start draws thousands of fresh rows: a global generator would tie them to the order
    of calls."""
    first = suites.generate("harm", "train", 40, seed=3)
    suites.generate("privacy", "domains", 10)
    assert suites.generate("harm", "train", 40, seed=3) == first
    assert suites.generate("harm", "train", 40, seed=4) != first
    assert len(suites.generate("harm", "train", 3)) == 2  # whole pairs
    with pytest.raises(ValueError, match="expected one of"):
        suites.generate("harm", "test", 1)


def test_the_generator_takes_no_arguments():
    """`python data/suites.py --help` wrote all files anew."""
    command = [sys.executable, str(data.HERE / "suites.py"), "--help"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "suites.py: it takes no arguments, got --help\n"


def test_the_readme_says_what_the_files_hold():
    """Counts and the norm table in prose go stale: the README must contain what the script
    prints."""
    readme = (data.HERE / "README.md").read_text()
    for line in suites.tables():
        assert line in readme, line
    for name in suites.SUITES:
        rows = (data.HERE / f"{name}.jsonl").read_text().splitlines()
        assert sum(row in readme for row in rows) == 2, name
