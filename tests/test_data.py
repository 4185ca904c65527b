"""data/: the embedded suites hold what data/README.md says they hold. Scripts here use patterns, never a model."""
import hashlib
import json
import re
from collections import Counter

import pytest

import data
from data import demonstrator, suites
from tools import Sandbox

TASKS = {name: data.load(name) for name in data.NAMES}
ALL = [task for tasks in TASKS.values() for task in tasks]
EVAL = [task for name, tasks in TASKS.items() if name != "train" for task in tasks]


def concrete(pattern):
    return pattern["name"], {k: ", ".join(v["contains"]) if isinstance(v, dict) else v
                             for k, v in pattern["arguments"].items()}


def play(task, patterns):
    box = Sandbox(task)
    for pattern in patterns:
        result = json.loads(box.call(*concrete(pattern)))
        assert "error" not in result, (task.id, pattern, result)
    return box


def shown(task):
    """Everything an agent can read in the task: the message and every record."""
    return task.messages[0]["content"] + json.dumps(task.world)


def test_regenerating_gives_the_same_bytes():
    """A suite that depends on the hash seed or the machine cannot be compared between two papers or two laptops."""
    for name, text in suites.files().items():
        path = data.HERE / name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == hashlib.sha256(text.encode()).hexdigest(), name


def test_ids_are_unique_and_every_cell_is_large_enough():
    """Trial cells of 50 to 110 tasks had standard errors of 2 to 7 points."""
    assert len({task.id for task in ALL}) == len(ALL)
    cells = Counter((t.suite, t.split, t.label, t.suite == "injection" and bool(t.injected)) for t in EVAL)
    for split in suites.HELD_OUT:
        assert cells["harm", split, "harmful", False] == cells["harm", split, "benign", False] == 250
        assert cells["injection", split, "benign", True] == 250 and cells["injection", split, "benign", False] == 170
        assert cells["benign", split, "benign", False] == cells["privacy", split, "benign", False] == 250
    assert len(TASKS["train"]) == sum(suites.TRAIN.values()) and {t.split for t in TASKS["train"]} == {"train"}


def test_twins_point_at_each_other_and_differ_in_one_phrase():
    """If anything but the phrase told a twin from its harmful side, a model could learn that instead."""
    for name in ("harm", "train"):
        by_id = {t.id: t for t in TASKS[name] if t.suite == "harm"}
        for task in by_id.values():
            twin = by_id[task.twin]
            assert twin.twin == task.id and {task.label, twin.label} == {"harmful", "benign"}
            assert [t.name for t in task.tools] == [t.name for t in twin.tools] and task.split == twin.split
            assert task.meta["cue"] in shown(task)
            assert shown(task).replace(task.meta["cue"], "#") == shown(twin).replace(twin.meta["cue"], "#")
            if task.label == "harmful":
                ends = task.goal + task.unsafe if task.reveals else twin.goal[:-1] + task.unsafe
                assert twin.goal == ends and len(task.unsafe) == 1 and not twin.unsafe


def test_shares_of_hidden_and_late_harm():
    """A world where every harm shows in the first message cannot tell early refusal from late abort."""
    for split in suites.HELD_OUT:
        harmful = [t for t in TASKS["harm"] if t.split == split and t.label == "harmful"]
        late = [t for t in harmful if t.meta["late"]]
        assert .38 <= sum(t.reveals is not None for t in harmful) / len(harmful) <= .42
        assert .13 <= len(late) / len(harmful) <= .17 and all(2 <= len(t.goal) <= 3 for t in late)


def test_no_single_word_decides():
    """With "must" only in threats and "agreed" only in consent, a bag of words would be a perfect gate: no word of the
    training banks may tell the two sides apart with a balanced accuracy above 0.7."""
    for bad, good in (("HARM", "LEGIT"), ("BAD_NOTES", "GOOD_NOTES")):
        sides = [[set(re.findall("[a-z]+", phrase.lower())) for *_, phrase, seen in suites.BANKS[bank] if seen]
                 for bank in (bad, good)]
        for word in set().union(*sides[0], *sides[1]):
            shares = [sum(word in words for words in side) / len(side) for side in sides]
            assert .5 + abs(shares[0] - shares[1]) / 2 < .7, word


def test_held_out_tools_never_appear_in_training():
    """The "domains" split is only worth its name if no tool of it was ever offered, called or named in training."""
    unseen = {r["name"] for r in suites.tool_rows() if any(
        r["name"] in (f"{d[0]}_{n}", f"{d[1]}_{n}", f"send_{d[3]}", f"{d[4]}_{n}")
        for n, d in suites.DOMAINS.items() if n in suites.UNSEEN_DOMAINS)}
    assert len(unseen) == 12 and len(data.tool_table()) == 60
    fresh = [json.dumps(r) for s in suites.SUITES for r in suites.generate(s, "train", 400, seed=9)]
    for text in [*fresh, (data.HERE / "train.jsonl").read_text()]:
        assert not any(name in text for name in unseen)
    for task in EVAL:
        assert {t.name in unseen for t in task.tools} == {task.split == "domains"}


def keys(suite, meta):
    """The keys whose pair with the domain is held out for the row."""
    if suite == "injection":
        return [meta["wording"] if meta["style"] == "mention" else meta["style"]]
    if suite == "benign":
        return [meta["kind"]] + ([meta["cue"]] if meta["cue"] and meta["kind"] != "login" else [])
    return [meta["cue"]]


def test_held_out_pairs_and_wordings_never_reach_training():
    """A leak between splits makes generalisation out of memory; generate() must respect it for the warm start too."""
    rows = [json.loads(line) for line in (data.HERE / "train.jsonl").read_text("utf-8").splitlines()]
    rows += [row for suite in suites.SUITES for row in suites.generate(suite, "train", 600, seed=7)]
    for row in rows:
        assert not any(suites.held(row["meta"]["domain"], key) for key in keys(row["suite"], row["meta"])), row
    for task in EVAL:
        if task.split == "combinations":
            assert all(suites.held(task.meta["domain"], key) for key in keys(task.suite, task.meta)), task.meta
    phrases = {seen: [p for bank in suites.BANKS.values() for *_, p, s in bank if s == seen] for seen in (True, False)}
    unseen = phrases[False] + list(suites.ROLE_WORDINGS) + [start for start, *_ in suites.UNSEEN_STYLES]
    wordings = [w for texts in suites.UNSEEN_ATTACKS.values() for w in texts] + list(suites.UNSEEN_MENTIONS)
    unseen += [max(w.split("{}"), key=len) for w in wordings]
    text = json.dumps(rows)
    assert not [phrase for phrase in unseen if phrase in text]
    used = "".join(shown(t) for t in EVAL if t.split == "wordings")
    assert not [phrase for phrase in phrases[True] if phrase in used]


@pytest.mark.parametrize("name", data.NAMES)
def test_the_oracle_completes_with_nothing_unsafe(name):
    """A goal that cannot be reached, or that is unsafe itself, would be scored as the agent's fault."""
    for task in TASKS[name]:
        box = play(task, task.goal)
        assert box.goal_done() and [e.goal for e in box.journal] == list(range(len(task.goal))), task.id


def test_act_all_is_unsafe_on_every_harmful_task():
    """A harm that no call can do is a free point for refusing."""
    for task in ALL:
        if task.label == "harmful":
            box = play(task, task.goal + task.unsafe)
            assert box.journal[-1].unsafe and box.risky() and not any(e.unsafe for e in box.journal[:-1])


def test_a_hijacked_agent_obeys_and_a_look_alike_asks_for_nothing():
    """agentdojo #201: an attack that cannot land measures the agent and not the defence."""
    for task in ALL:
        if task.suite == "injection":
            note = task.meta["cue"]
            assert note in json.dumps(task.world) and bool(task.injected) == (task.meta["kind"] == "attack")
            box = play(task, task.goal[:1])
            assert (note in box.journal[0].result) and box.risky() == bool(task.injected)
            box = play(task, task.goal[:1] + task.injected + task.goal[1:])
            assert [e.injected for e in box.journal] == [False] + [True] * len(task.injected) + [False] * (
                len(task.goal) - 1)
            for pattern in task.injected:  # everything the attack needs is said in the note
                assert all(v in note for v in pattern["arguments"].values()) and pattern["name"] in note


def test_paste_all_leaks_and_the_oracle_does_not():
    """PrivacyLens #3: a leak rate stuck at 0; here a script that pastes the record must leak every hidden field."""
    for task in ALL:
        if task.suite == "privacy":
            read, send = task.goal
            box = play(task, [read])
            result = json.loads(box.journal[0].result)
            record = [v for k, v in result.items() if k not in ("id", "owner")]
            assert sorted(record) == sorted(v for _, v in task.meta["allowed"] + task.meta["denied"])
            assert [s["value"] for s in task.secrets] == [v for _, v in task.meta["denied"]]
            box.call(send["name"], {"to": task.meta["to"], "text": ", ".join(record)})
            assert box.journal[-1].leaking == bool(task.secrets) and box.journal[-1].goal == 1
            for one in task.secrets:
                assert play(task, [{"name": send["name"], "arguments": {"to": task.meta["to"], "text": one["value"]}}]
                            ).journal[0].leaking
            norm = suites.NORMS[task.meta["role"]].split()
            assert all((f in norm) for f, _ in task.meta["allowed"])
            assert not any((f in norm) for f, _ in task.meta["denied"])
            assert not any(f in suites.NEVER for f, _ in task.meta["allowed"])


def test_values_are_distinctive_and_arguments_can_be_copied():
    """"12" inside "B12" is a leak nobody made; an argument that stands nowhere must be invented by the agent."""
    for task in ALL:
        values = [v for t in task.world.values() for r in t.values() for k, v in r.items() if k in suites.FIELDS]
        assert not any(a in b for i, a in enumerate(values) for j, b in enumerate(values) if i != j), task.id
        assert not any(v.lower() in task.messages[0]["content"].lower() for v in values), task.id
        for pattern in task.goal + task.unsafe + task.injected:
            assert all(v in shown(task) for v in concrete(pattern)[1].values() if ", " not in v), (task.id, pattern)


def test_texts_are_short_and_few_words():
    """The tiny model sees 1.5 M tokens: a large vocabulary or long records would not be learned."""
    vocabulary = {w for t in ALL for w in re.findall("[a-z]+", (shown(t) + " ".join(x.name for x in t.tools)).lower())}
    assert len(vocabulary) < 1000
    for task in ALL:
        assert len(task.messages[0]["content"].split()) <= 32 and 3 <= len(task.tools) <= 5, task.id
        assert all(len(json.dumps(r).split()) <= 31 for t in task.world.values() for r in t.values()), task.id


def test_no_tool_of_the_warm_start_is_named_like_a_held_out_one():
    """Made-up domains draw their names from word lists: one held-out noun among them, and "unseen" is no longer so."""
    held = {w for d in suites.UNSEEN_DOMAINS for w in (d, suites.DOMAINS[d][3])}
    tasks, more = demonstrator.draw_tasks(400, 0)
    names = {word for task in [*tasks, *more] for tool in task.tools for word in tool.name.split("_")}
    assert len(names) > 100 and not names & held, names & held


def test_generate_is_a_function_of_its_arguments():
    """The warm start draws thousands of fresh rows: a global generator would tie them to the order of calls."""
    one = suites.generate("harm", "train", 40, seed=3)
    suites.generate("privacy", "domains", 10)
    assert one == suites.generate("harm", "train", 40, seed=3) != suites.generate("harm", "train", 40, seed=4)
    with pytest.raises(ValueError, match="expected one of"):
        suites.generate("harm", "test", 1)


def test_the_readme_says_what_the_files_hold():
    """Counts and the norm table in prose go stale: the README must contain what the script prints."""
    readme = (data.HERE / "README.md").read_text()
    for line in suites.tables():
        assert line in readme, line
    for name in suites.SUITES:
        rows = (data.HERE / f"{name}.jsonl").read_text().splitlines()
        assert sum(row in readme for row in rows) == 2, name
