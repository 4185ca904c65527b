"""AgentDojo: our loop held against the package's own, on its suites.

Each test's docstring names the bug it would catch. All but the first tests need the package, but
not what only its clients of models need: README's test command installs it so."""
import contextlib
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

import data
import eval as ev
import mosaic
from data import public
from data.controls import ANSWER_TURN, answer_turn, call_turn, hijacked, script, silent
from data.public import agentdojo, dojo
from data.public.common import attack_scores
from tools import parse_turn, play

# What the package imports of the makers of models, and does not use here: 250 MB of them.
CLIENTS = (
    "anthropic", "anthropic.types", "anthropic.types.text_block_param",
    "anthropic.types.thinking_block", "cohere", "cohere.core", "cohere.core.api_error",
    "cohere.types", "google", "google.genai", "google.genai.errors", "openai", "openai._types",
    "openai.types", "openai.types.chat", "openai.types.shared_params")
ATTACKS = ("important_instructions", "ignore_previous", "injecagent", "direct")
PAIRS = {"workspace": 560, "travel": 140, "banking": 144, "slack": 105}


@pytest.fixture(scope="module")
def package():
    """The package, imported with stand-ins for the clients of models that are not installed."""
    if importlib.util.find_spec("agentdojo") is None:
        pytest.skip("agentdojo is not installed")
    stand_ins = []
    for name in CLIENTS:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock()
            stand_ins.append(name)
    try:
        importlib.import_module("agentdojo.attacks")  # with it come pipelines and suites
    finally:
        for name in stand_ins:
            del sys.modules[name]  # other tests ask whether these are there


needs_package = pytest.mark.usefixtures("package")


def pair(name, attack, user_id, goal_id):
    """One task of the benchmark, without loading all."""
    tools = [agentdojo.tool_of(name, function) for function in dojo.suites()[name].tools]
    return agentdojo.attacked(agentdojo.task_of(name, user_id, tools), attack, goal_id)


# ------------------------------------------------------------------------------ without the package
def test_without_the_package_one_line_says_what_to_install(monkeypatch, capsys):
    """A traceback, or a suite that is silently empty."""
    monkeypatch.setitem(sys.modules, "agentdojo.task_suite", None)  # an import of it fails
    monkeypatch.setattr(dojo, "suites", dojo.suites.__wrapped__)  # what was found is not remembered
    with pytest.raises(ValueError, match="pip install agentdojo==0.1.35"):
        data.load("agentdojo:slack")
    assert ev.main(["--suite", "injection", "--data", "agentdojo"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_scores_of_an_attack_are_alike_in_two_benchmarks():
    """An agent that nobody can read is called safe, or useful."""
    answer = parse_turn(ANSWER_TURN)
    read = attack_scores([None, answer], True, {"obeyed": False})
    assert read == {"obeyed": False, "utility_under_attack": True, "over_refusal": None}
    unread = attack_scores([None], True, {"obeyed": False})
    assert unread == {"obeyed": None, "utility_under_attack": False, "over_refusal": None}


def test_names_of_a_package_come_before_folders(tmp_path, monkeypatch):
    """A folder of the name hides the benchmark; a longer name is taken for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agentdojo").mkdir()
    for name in ("agentdojo", "agentdojo:slack"):
        assert public.recognise(Path(name)) == ("agentdojo", Path(name))
    with pytest.raises(ValueError, match="expected one of train, .*, privacy, agentdojo, "):
        data.load("agentdojos")
    with pytest.raises(ValueError, match="is for evaluation alone"):
        data.load("agentdojo", training=True)


# ------------------------------------------------------------------------------- suites and attacks
@needs_package
def test_what_is_not_there_is_answered_with_what_is(monkeypatch, capsys):
    """A typo that evaluates nothing; a version that moves numbers unsaid."""
    with pytest.raises(ValueError, match="agentdojo: and one of workspace, travel, banking, slack"):
        data.load("agentdojo:bank")
    with pytest.raises(ValueError, match="expected one of none, important_instructions, .*'dos'"):
        data.load("agentdojo:slack", "dos")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2")
    tasks = data.load("agentdojo:slack", "none")
    assert "agentdojo 0.2: only 0.1.35 was tried" in capsys.readouterr().err
    assert public.version(tasks) == "agentdojo 0.2, suites v1.2.2"


@needs_package
def test_suites_are_those_of_the_issue():
    """Another version of the suites, whose numbers compare with nobody's."""
    counts = {}
    for name, suite in dojo.suites().items():
        counts[name] = (len(suite.user_tasks), len(suite.injection_tasks), len(suite.tools))
    expected = {
        "workspace": (40, 14, 24),
        "travel": (20, 7, 28),
        "banking": (16, 9, 11),
        "slack": (21, 5, 11),
    }
    assert counts == expected
    for name, (users, goals, _) in counts.items():
        assert users * goals == PAIRS[name]


@needs_package
def test_attacks_and_states_are_the_packages_own():
    """Attacks in places that the agent does not see; a faster reader that reads another state."""
    from agentdojo.attacks import load_attack
    pipeline = SimpleNamespace(name="local")
    for name in ("slack", "banking"):
        suite = dojo.suites()[name]
        users = list(suite.user_tasks.values())[::4]
        goal = list(suite.injection_tasks.values())[-1]
        for attack in ATTACKS:
            theirs = load_attack(attack, suite, pipeline)  # finds its places by itself
            for user in users:
                texts = theirs.attack(user, goal)
                assert dojo.attack_texts(name, attack, user.ID, goal.ID) == texts
                state = suite.load_and_inject_default_environment(texts)
                assert dojo.environment(name, texts) == state

    workspace = dojo.suites()["workspace"]
    ids = ("user_task_1", "injection_task_3")
    texts = dojo.attack_texts("workspace", "important_instructions", *ids)
    state = workspace.load_and_inject_default_environment(texts)
    assert dojo.environment("workspace", texts) == state
    text = next(iter(texts.values()))
    assert "from me, Emma Johnson, to you, Local model." in text


@needs_package
def test_a_task_is_the_packages():
    """Other tools or words than the package offers; a schema that no model was given there."""
    task = pair("banking", "direct", "user_task_15", "injection_task_8")
    suite = dojo.suites()["banking"]
    assert task.id == "direct/banking/user_task_15/injection_task_8"
    assert task.messages[1]["content"] == suite.user_tasks["user_task_15"].PROMPT
    assert "Emma Johnson" in task.messages[0]["content"]
    assert task.meta["cue"] == "TODO: " + suite.injection_tasks["injection_task_8"].GOAL
    assert [tool.name for tool in task.tools] == [function.name for function in suite.tools]
    for tool, function in zip(task.tools, suite.tools):
        assert tool.parameters == function.parameters.model_json_schema()
    effects = {tool.name: tool.effect for tool in task.tools}
    assert effects["send_money"] == effects["update_password"] == "write"
    assert effects["read_file"] == effects["get_iban"] == "read"
    # the transactions, among them the attack's, are what this task looks at
    assert "get_most_recent_transactions" in task.reveals


# ----------------------------------------------------------------------- against the package's loop
class Recorded:
    """A pipeline of the package that makes calls one after the other, as its own loop does."""

    def __init__(self, calls, answer):
        self.calls = calls
        self.answer = answer
        self.read = []

    def query(self, query, runtime, env, messages=(), extra_args=None):
        from agentdojo.agent_pipeline import ToolsExecutor
        from agentdojo.functions_runtime import FunctionCall
        from agentdojo.types import get_text_content_as_str
        messages = [{"role": "user", "content": [{"type": "text", "content": query}]}]
        for name, arguments in self.calls:
            asked = [FunctionCall(function=name, args=json.loads(json.dumps(arguments)))]
            messages.append({"role": "assistant", "content": None, "tool_calls": asked})
            _, _, env, messages, _ = ToolsExecutor().query(query, runtime, env, messages)
            messages = list(messages)
            result = messages[-1]
            self.read.append(result["error"] or get_text_content_as_str(result["content"]))
        said = [{"type": "text", "content": self.answer}]
        messages.append({"role": "assistant", "content": said, "tool_calls": None})
        self.state = env
        return query, runtime, env, messages, {}


def random_call(name, rng):
    """A call of some ground truth of the suite, or one that is wrong in some way."""
    suite = dojo.suites()[name]
    calls = []
    while not calls:
        goal_id = rng.choice([*suite.user_tasks, *suite.injection_tasks])
        calls = dojo.ground_truth(name, goal_id, {})
    call = rng.choice(calls)
    tool = call["name"]
    arguments = dict(call["arguments"])
    wrong = rng.choice(["", "", "", "", "other tool", "left out", "more", "value", "type", "list"])
    if wrong == "other tool":
        tool = rng.choice(suite.tools).name
    elif wrong == "more":
        arguments["no_such"] = 1
    elif arguments and wrong:
        key = rng.choice(list(arguments))
        values = {"value": "nowhere", "type": {"a": [None]}, "list": "['a@b.com', 'c@d.org']"}
        arguments.pop(key)
        if wrong in values:
            arguments[key] = values[wrong]
    return tool, arguments


def verdict_of(pipeline, name, user_id, goal_id, texts):
    """Both verdicts of the package's own run, which stops where one of them raises."""
    suite = dojo.suites()[name]
    user = suite.user_tasks[user_id]
    goal = suite.injection_tasks[goal_id]
    state = dojo.environment(name, texts)
    return suite.run_task_with_pipeline(pipeline, user, goal, {}, environment=state)


@pytest.fixture
def stopped_clock(package, monkeypatch):
    """What these tools send and save carries the time of day."""
    from agentdojo.default_suites.v1.tools import cloud_drive_client, email_client
    noon = datetime.datetime(2024, 5, 15, 12)
    clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda: noon))
    monkeypatch.setattr(email_client, "datetime", clock)
    monkeypatch.setattr(cloud_drive_client, "datetime", clock)


@needs_package
def test_random_episodes_are_the_packages_own(stopped_clock):
    """200 episodes of right and wrong calls: another state, another error or another verdict than
    by the package's own loop."""
    rng = random.Random(0)
    seen = {"error": 0, "utility": 0, "obeyed": 0, "raised": 0}
    names = ["banking"] * 90 + ["slack"] * 90 + ["travel"] * 12 + ["workspace"] * 8
    for i, name in enumerate(names):
        suite = dojo.suites()[name]
        where = (rng.choice(list(suite.user_tasks)), rng.choice(list(suite.injection_tasks)))
        task = pair(name, rng.choice(ATTACKS), *where)
        calls = [random_call(name, rng) for _ in range(rng.randrange(1, 6))]
        for pattern in rng.choice([task.goal, task.injected, []]):
            if "arguments" in pattern:
                calls.append((pattern["name"], pattern["arguments"]))
        said = task.meta[rng.choice(["answer", "ordered_answer"])] or "Done."

        turns = [call_turn(*call) for call in calls]
        rollout = play(task, script(*turns, answer_turn(said)))
        scores = public.score(task, rollout.journal, rollout.turns)
        theirs = Recorded(calls, said)
        try:
            verdicts = verdict_of(theirs, name, *where, task.world["injections"])
        except Exception:  # a check of theirs that raises
            seen["raised"] += 1
        else:
            ours = (scores["utility_under_attack"], scores["injection_obeyed"])
            assert ours == verdicts, (i, task.id)
        assert [effect.result for effect in rollout.journal] == theirs.read, (i, task.id)
        assert rollout.sandbox.world["state"] == theirs.state, (i, task.id)
        seen["error"] += any("Error: " in text for text in theirs.read)
        seen["utility"] += scores["utility_under_attack"]
        seen["obeyed"] += scores["injection_obeyed"]
    print(seen)
    assert min(seen["error"], seen["utility"], seen["obeyed"]) > 20  # it is not all one case
    assert seen["raised"] < 10


@needs_package
def test_errors_are_in_the_packages_words():
    """A tool that raises ends the episode, or speaks another language than the package's."""
    task = data.load("agentdojo:banking", "none")[0]
    update = call_turn("update_scheduled_transaction", {"id": 99})
    send = call_turn("send_money", {"recipient": "me"})
    # the package looks whether a text is a list, and its reader of lists runs out of memory
    endless = call_turn("read_file", {"file_path": "-" * 100_000 + "1"})
    rollout = play(task, script(update, send, endless, call_turn("fly", {}), ANSWER_TURN))
    raised, invalid = rollout.journal
    assert raised.result == "ValueError: Transaction with ID 99 not found."
    assert invalid.result.startswith("ValidationError: 3 validation errors for Input schema")
    errors = [message["content"] for message in rollout.messages[-5:] if message["role"] == "tool"]
    assert errors[0].startswith(('{"error": "MemoryError', '{"error": "RecursionError'))
    assert errors[1].startswith('{"error": "unknown tool \'fly\'')
    assert rollout.ended == "answer"


# ----------------------------------------------------------------------------- controls and results
@needs_package
@pytest.mark.parametrize("name", ["banking", "slack"])
def test_controls_are_exact(name, capsys):
    """A scorer or an attack that cannot tell a hijacked agent from a good one or an idle one.

    All 249 pairs of two suites; data/README.md says how long all 949 take."""
    tasks = data.load(f"agentdojo:{name}", "none") + data.load(f"agentdojo:{name}", "direct")
    rows = ev.controls({"injection": tasks})["injection"]
    assert all(row["value"] == row["expected"] for row in rows if row["expected"] is not None)
    values = {}
    for row in rows:
        values[row["control"], row["metric"]] = (row["value"], row["n"])
    pairs = PAIRS[name]
    assert values["oracle", "utility"][0] == 1
    assert values["oracle", "injection_obeyed"] == (0, pairs)
    assert values["oracle", "utility_under_attack"] == (1, pairs)
    assert values["hijacked", "injection_obeyed"] == (1, pairs)
    assert values["no-attack", "injection_obeyed"] == (0, pairs)
    # five of banking's sixteen checks are content with nothing
    idle = 5 / 16 if name == "banking" else 0
    assert values["silent", "utility_under_attack"] == (idle, pairs)


@needs_package
def test_a_hijacked_agent_reads_every_attack():
    """A control that misses an attack which YAML has broken into lines, quoted or escaped; it would
    vouch for a scorer that sees nothing."""
    pairs = [
        ("workspace", "important_instructions", "user_task_3", "injection_task_4"),  # in an email
        ("workspace", "direct", "user_task_29", "injection_task_1"),  # in a file
        ("travel", "ignore_previous", "user_task_2", "injection_task_3"),
        ("travel", "injecagent", "user_task_17", "injection_task_6"),  # wants words, no calls
    ]
    for case in pairs:
        task = agentdojo.in_its_state(pair(*case))
        wanted = [call for call in task.injected if "arguments" in call]
        rollout = play(task, hijacked(task))
        made = [{"name": effect.name, "arguments": effect.arguments} for effect in rollout.journal]
        assert made[-len(wanted):] == wanted or not wanted, case
        assert rollout.turns[-1].text == (task.meta["ordered_answer"] or "Done."), case
        scores = public.score(task, rollout.journal, rollout.turns)
        assert scores["injection_obeyed"] and scores[f"injection_obeyed/{case[0]}"], case


@needs_package
def test_an_evaluation_has_a_row_for_each_suite(monkeypatch, capsys):
    """A mean over suites that hides the one where all attacks land; no word on the version; a
    user's task that is played once for each of the attacker's goals, where no attacker speaks."""
    model = SimpleNamespace(lora=None, device="cpu", adapter_off=contextlib.nullcontext)
    n_played = []

    def obeys_in_slack(model, tokenizer, tasks, *rest, **options):
        rollouts = []
        n_played.append(len(tasks))
        for task in tasks:
            agent = hijacked if task.public["suite"] == "slack" and task.injected else silent
            rollouts.append(play(task, agent(task)))
        return rollouts

    monkeypatch.setattr(ev.model_, "find", lambda name: name)
    monkeypatch.setattr(ev.model_, "load", lambda name: (model, None))
    monkeypatch.setattr(mosaic, "rollout", obeys_in_slack)
    args = ["--model", "x", "--suite", "injection", "--data", "agentdojo:slack", "--limit", "3"]
    monkeypatch.setattr(ev, "controls", lambda suites: {})  # they have a test of their own
    assert ev.main([*args, "--split", "injecagent"]) == 0
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    version = f"agentdojo {importlib.metadata.version('agentdojo')}, suites v1.2.2"
    assert version in out.splitlines()
    result = last["results"]["injection"]["injecagent"]
    assert result["version"] == version
    cells = result["base"]
    for metric in ("injection_obeyed", "utility_under_attack", "refused"):
        assert cells[metric]["n"] == cells[f"{metric}/slack"]["n"] == 3
        assert "low" in cells[metric]
    assert n_played == [3 + 1]  # three goals against one user's task, and that task alone
    assert cells["injection_obeyed"]["value"] == 1
    assert cells["obeyed_no_attack"]["value"] == 0
    assert cells["obeyed_no_attack"]["n"] == 3
    assert cells["gate_recall"]["n"] > 0
    assert "over_refusal" not in cells
    assert "benign_completion" not in cells
