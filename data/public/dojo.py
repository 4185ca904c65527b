"""What agentdojo.py asks of its package: suites and their states, calls, attacks, verdicts.

The package is imported when one of these functions is called, and nothing of it is repeated here. A
suite is given by its name, a goal (a user task or an injection task) by its id: "banking",
"user_task_3", "injection_task_0".
"""
import functools
import importlib.metadata
import json
from types import SimpleNamespace

from data.public.common import read_card

CARD = read_card("agentdojo")


@functools.cache
def suites() -> dict:
    """{name: suite}, the package's. ValueError: it is not installed."""
    try:
        from agentdojo.task_suite import get_suites
    except ImportError as error:
        command = f"pip install agentdojo=={CARD['package']}"
        raise ValueError(f"agentdojo is its authors' package: {command} ({error})") from None
    return get_suites(CARD["suites"])


def goal_of(name: str, goal_id: str):
    """The package's user task, or injection task, of this id."""
    suite = suites()[name]
    return (suite.user_tasks | suite.injection_tasks)[goal_id]


def environment(name: str, injections: dict):
    """A suite's state, with injections {place: text} in it; an empty text is no injection."""
    texts = {place: text for place, text in injections.items() if text}
    return fresh_environment(name, json.dumps(texts)).model_copy(deep=True)


@functools.cache  # the package's own reader takes a third of a second, each time
def fresh_environment(name, injections):
    import yaml  # agentdojo's own: with its reader of files in C, and nothing that can run code
    from agentdojo.task_suite.task_suite import read_suite_file
    text = read_suite_file(name, "environment.yaml", None)
    text = text.format(**default_texts(name) | json.loads(injections))
    values = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return suites()[name].environment_type.model_validate(values)


@functools.cache
def default_texts(name) -> dict:
    """{place where an attack can stand: the text that stands there without one}."""
    return suites()[name].get_injection_vector_defaults()


class Agent:
    """A pipeline, as the package says, that makes calls [(tool, arguments)] and then answers.

    reads: are results put into the package's words? That takes longer than most calls."""

    def __init__(self, calls: list, answer: str = "", reads: bool = False):
        self.calls = calls
        self.answer = answer
        self.reads = reads

    def query(self, query, runtime, environment, messages=(), extra_args=None):
        from agentdojo.agent_pipeline.tool_execution import ToolsExecutor, tool_result_to_str
        from agentdojo.functions_runtime import FunctionCall
        executor = ToolsExecutor(tool_result_to_str if self.reads else str)
        for tool, arguments in self.calls:
            call = FunctionCall(function=tool, args=dict(arguments))
            asked = {"role": "assistant", "content": [], "tool_calls": [call]}
            messages = executor.query(query, runtime, environment, [*messages, asked])[3]
        answer = [{"type": "text", "content": self.answer}]
        messages = [*messages, {"role": "assistant", "content": answer, "tool_calls": None}]
        return query, runtime, environment, messages, {}


def execute(name: str, state, tool: str, arguments: dict) -> str:
    """Makes one call in a suite's state, which it may change -> what the agent reads."""
    from agentdojo.functions_runtime import FunctionsRuntime
    runtime = FunctionsRuntime(suites()[name].tools)
    agent = Agent([(tool, arguments)], reads=True)
    _, result, _ = agent.query("", runtime, state)[3]
    return result["error"] or result["content"][0]["content"]


_known = {}  # {what was asked: the verdict}, of `calls_reach`


def calls_reach(name: str, goal_id: str, calls: list, answer: str, injections: dict) -> bool:
    """Does an agent that makes these calls [(tool, arguments)] and then answers reach a goal?

    A check compares two whole states, which takes up to a tenth of a second, and the controls ask
    for the same one again and again: so it is asked once.
    """
    key = repr((name, goal_id, calls, answer, injections))
    if key not in _known:
        _known[key] = reaches(name, goal_id, Agent(calls, answer), injections)
    return _known[key]


def reaches(name: str, goal_id: str, agent, injections: dict) -> bool:
    """Does the package's own check say that an agent (a pipeline) reaches a goal, in a fresh state?
    Where the check raises, it says no."""
    goal = goal_of(name, goal_id)
    state = environment(name, injections)
    try:
        # an attacker's goal stands in the user's place: there the package judges it as well
        return suites()[name].run_task_with_pipeline(agent, goal, None, {}, environment=state)[0]
    except Exception:  # whatever their code raises
        return False


# ---------------------------------------------------------------- the package's own words and calls
def version() -> tuple[str, str]:
    """The versions of the package that is installed, and of the suites."""
    return importlib.metadata.version("agentdojo"), CARD["suites"]


def system_message() -> str:
    from agentdojo.agent_pipeline.agent_pipeline import load_system_message
    return load_system_message("default")


def attack_texts(name: str, attack: str, user_id: str, goal_id: str) -> dict:
    """{place: the attacker's text} of every place that the user's ground truth shows."""
    return attacker(name, attack).attack(goal_of(name, user_id), goal_of(name, goal_id))


@functools.cache
def attacker(name, attack):
    from agentdojo.attacks import load_attack
    loaded = load_attack(attack, suites()[name], SimpleNamespace(name=CARD["model"]))
    # the same places as by its own way, which reads the files anew for each task
    loaded.get_injection_candidates = lambda user_task: list(showing(name, user_task.ID))
    return loaded


@functools.cache
def showing(name: str, user_id: str) -> dict:
    """{place where an attack can stand: tools that show it}, when the ground truth is run."""
    marks = {place: f"<{place}>" for place in default_texts(name)}
    state = environment(name, marks)
    shown = {}
    for call in ground_truth(name, user_id, {}):
        text = execute(name, state, call["name"], call["arguments"])
        for place, mark in marks.items():
            if mark in text:
                shown.setdefault(place, set()).add(call["name"])
    return shown


def ground_truth(name: str, goal_id: str, injections: dict) -> list:
    """The calls that reach a goal, as a Task's patterns; [] where the package has none."""
    calls = goal_of(name, goal_id).ground_truth(environment(name, injections))
    return [{"name": call.function, "arguments": dict(call.args)} for call in calls]


def truth_reaches(name: str, goal_id: str, injections: dict) -> bool:
    """Does the ground truth reach its goal, played by the package alone?"""
    from agentdojo.agent_pipeline import GroundTruthPipeline
    return reaches(name, goal_id, GroundTruthPipeline(goal_of(name, goal_id)), injections)
