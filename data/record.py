"""What is written down of a trajectory: a line of rollouts.jsonl, an item of eval.py --json.

The page (data/page.py) and --explain (data/explain.py) read nothing else, so whatever they show can
be shown again from the files of a finished run. data/README.md lists the fields one by one.

Messages are in OpenAI's form, so that any viewer can read them. Plan and check, which that form
does not know, stay in `content` between their tags; calls are `tool_calls`, and a result names its
call. A turn that did not parse has no calls; its error is a message of a user named "sandbox".

    python -c "from data.record import source_spans; print(source_spans([0, 0, 3, 3, 3, 2]))"
"""
import json
import math
import platform
import subprocess
import time
from importlib import metadata
from itertools import groupby
from pathlib import Path

from data.public import canary
from tools import Rollout, Turn

SOURCES = ("template", "user", "tool", "sampled", "forced")  # tools.TEMPLATE to tools.FORCED


def record(rollout: Rollout) -> dict:
    """A trajectory as JSON: its task, what the agent wrote and saw, and what was executed."""
    task = rollout.task
    line = {
        "task": task.id,
        "suite": task.suite,
        "split": task.split,
        "label": task.label,
        "twin": task.twin,
        "benchmark": task.public.get("benchmark"),
        "order": task.meta.get("cue") if task.injected else None,
        "secrets": [secret["value"] for secret in task.secrets],
        "ended": rollout.ended,
        "tokens": rollout.n_written,
        "gates": [[rounded(gate.p), gate.opened, gate.risky] for gate in rollout.gates],
        "journal": [effect_record(effect) for effect in rollout.journal],
        "given": len(task.messages),
        "spans": source_spans(rollout.provenance),
        "messages": openai_messages(rollout),
    }
    return line | canary(task)


def group_records(step: int, group: list[Rollout], names: list[str], P: list, asked: list[dict],
                  terms: dict[str, list], advs: list[float]) -> list[dict]:
    """The lines of rollouts.jsonl of one group: each trajectory, and how it came to its advantage.

    names: of the trajectories in verdicts.jsonl. P (n, n): who beats whom, NaN where unknown.
    asked: what preference.compare recorded. terms {name: (n,)}: of the reward, with their signs."""
    verdicts = verdicts_in_both_orders(len(group), asked)
    lines = []
    for i, rollout in enumerate(group):
        rewards = {name: known(values[i]) for name, values in terms.items()}
        wins = [known(value) for value in P[i]]
        wins[i] = None  # nobody is compared with itself
        line = {"step": step, "index": i, "trajectory": names[i]}
        line |= {"advantage": round(advs[i], 4), "rewards": rewards}
        line["reward"] = None if None in rewards.values() else round(sum(rewards.values()), 4)
        line |= {"wins": wins, "verdicts": verdicts[i]}
        lines.append(line | record(rollout))
    return lines


def verdicts_in_both_orders(n: int, asked: list[dict]) -> list:
    """n lists of n: [i][j] is [shown first, shown second], does i beat j? 1, 0.5, 0, or None: no
    verdict. None in the place of both: that pair was not asked."""
    table = [[None] * n for _ in range(n)]
    for pair in asked:
        i = pair["i"]
        j = pair["j"]
        table[i][j] = [pair["ij"], turned(pair["ji"])]
        table[j][i] = [pair["ji"], turned(pair["ij"])]
    return table


def turned(verdict: float | None) -> float | None:
    """A verdict, seen from the other side."""
    return None if verdict is None else 1 - verdict


def known(value: float) -> float | None:
    """NaN, which is no JSON, as None."""
    return None if math.isnan(value) else round(value, 4) + 0.0  # -0.0 + 0.0 is 0.0


def rounded(p: float | None) -> float | None:
    return None if p is None else round(p, 3)


def effect_record(effect) -> list:
    """[step, tool, arguments, what was wrong with it: any of "unsafe", "injected", "leaking"]."""
    faults = [name for name in ("unsafe", "injected", "leaking") if getattr(effect, name)]
    return [effect.step, effect.name, effect.arguments, faults]


def source_spans(provenance: list[int]) -> list:
    """A code a token -> runs of one source, in order: [["template", 12], ["user", 30], ...]."""
    spans = []
    for code, run in groupby(provenance):
        spans.append([SOURCES[code], len(list(run))])
    return spans


def openai_messages(rollout: Rollout) -> list[dict]:
    """The task's messages as they are, then the episode's."""
    n_given = len(rollout.task.messages)
    messages = list(rollout.task.messages)
    turns = iter(rollout.turns)
    n_calls = 0  # so far: calls are numbered through the episode
    unanswered = []  # ids of calls whose results are still to come
    for message in rollout.messages[n_given:]:
        if message["role"] == "assistant":
            message = openai_message(next(turns), message["content"], n_calls)
            unanswered = [call["id"] for call in message.get("tool_calls", [])]
            n_calls += len(unanswered)
        elif message["role"] == "tool" and unanswered:
            call_id = unanswered.pop(0)
            message = {"role": "tool", "tool_call_id": call_id, "content": message["content"]}
        elif message["role"] == "tool":  # the error that a turn which did not parse is shown
            message = {"role": "user", "name": "sandbox", "content": message["content"]}
        messages.append(message)
    return messages


def openai_message(turn: Turn | None, text: str, n_calls: int) -> dict:
    """One turn as a message. text: as the agent wrote it; a turn that did not parse is that text.
    n_calls: how many calls were made before it."""
    if turn is None:
        return {"role": "assistant", "content": text}
    # Written anew, not cut from the text: a prompt may have given the first tag of a turn.
    content = f"<think>\n{turn.plan}\n</think>"
    if turn.check is not None:
        content += f"\n\n<safety_thoughts>\n{turn.check}\n</safety_thoughts>"
    if turn.kind == "answer":
        content += f"\n\n<answer>\n{turn.text}\n</answer>"
        return {"role": "assistant", "content": content}
    calls = []
    for number, (name, arguments) in enumerate(turn.calls, n_calls + 1):
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{number}", "type": "function", "function": function})
    return {"role": "assistant", "content": content, "tool_calls": calls}


def versions() -> dict:
    """Of the code and of what it runs on, and today's date."""
    return {
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }


def git_commit() -> str | None:
    """Of this tree. None: no git, or no repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                               capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None
