"""A model behind a server as the agent under test: eval.py --endpoint plays it as it plays a model of ours.

It samples as its server does, at temperature 0: no grammar, no gate. With the scaffold on it reads and writes turns as
text; with it off its own tool calls become turns, and results go back as the protocol has them. All of it [ours]."""
import contextlib
import json
import re
from concurrent.futures import ThreadPoolExecutor

import mosaic
from preference import MAX_FAILED


def told(messages, task, scaffold):
    """The dialogue as a server takes it. With the scaffold all is text, as SYSTEM teaches it; without, calls and
    results are the protocol's own. What a server's template makes of control text in a result is its own affair."""
    out, waiting = [], []
    if scaffold:
        head, foot = mosaic.TOOL_TEXT["schemas"]
        schemas = "".join("\n" + json.dumps(tool.schema(), ensure_ascii=False) for tool in task.offered)
        out.append({"role": "system", "content": f"{mosaic.SYSTEM}\n\n{head}{schemas}{foot}"})
    for message in messages:
        role, text = message["role"], message.get("content") or ""
        made = [c.get("function") or c for c in message.get("tool_calls") or []]  # of a recorded history
        if role == "assistant" and not made and not scaffold:
            with contextlib.suppress(mosaic.FormatError):
                turn = mosaic.parse_turn(text, parallel=True)
                text, made = turn.text or "", [{"name": name, "arguments": given} for name, given in turn.calls]
        made = [c | {"arguments": c["arguments"] if isinstance(c["arguments"], str) else json.dumps(c["arguments"])}
                for c in made]
        if scaffold:
            text += "".join(f'\n<tool_call>\n{{"name": "{c["name"]}", "arguments": {c["arguments"]}}}\n</tool_call>'
                            for c in made)
            role, text = ("user", f"<tool_response>\n{text}\n</tool_response>") if role == "tool" else (role, text)
            if out[-1]["role"] == role:  # some templates refuse two turns of one role in a row
                out[-1]["content"] += "\n\n" + text
                continue
        out.append({"role": role, "content": text})
        if made:
            waiting = [f"call{len(out)}x{i}" for i in range(len(made))]
            out[-1]["tool_calls"] = [{"id": i, "type": "function", "function": c} for i, c in zip(waiting, made)]
        elif role == "tool":  # a result without a call (of a turn that did not parse) is told as a message
            out[-1] |= {"tool_call_id": waiting.pop(0)} if waiting else {"role": "user"}
    return out


def heard(message, scaffold, parallel):
    """A server's reply -> the text of a turn. Without the scaffold reasoning is the plan; tags in prose are masked."""
    said, thought = ((message.get(key) or "").strip() for key in ("content", "reasoning_content"))
    if scaffold:
        opening = f"<think>\n{thought}\n</think>\n\n" if thought else "<think>\n"
        return said if said.startswith("<think>") else opening + said
    said, thought = (re.sub(rf"<(/?(?:{'|'.join(mosaic.TAGS)}))>", r"(\1)", text) for text in (said, thought))
    calls = [c["function"] for c in message.get("tool_calls") or []][:None if parallel else 1]
    blocks = [f'<tool_call>\n{{"name": {json.dumps(c["name"])}, "arguments": {c["arguments"] or "{}"}}}\n</tool_call>'
              for c in calls]
    plan = thought or (said if blocks else "") or "-"
    return f"<think>\n{plan}\n</think>\n\n" + ("\n".join(blocks) or f"<answer>\n{said}\n</answer>")


def served(endpoint, scaffold):
    """{"served": tasks -> Rollouts}, of a model behind a server, through mosaic.play; None for an episode that broke
    off, as no reply is no score. RuntimeError: more than MAX_FAILED of them broke off."""
    tools = (lambda task: {}) if scaffold else lambda task: {"tools": [tool.schema() for tool in task.offered]}

    def one(task):
        def script(messages):
            message = endpoint.chat(told(messages, task, scaffold), **tools(task))
            return heard(message, scaffold, task.public.get("parallel"))
        try:
            return mosaic.play(task, script)
        except (LookupError, TypeError, AttributeError):  # no reply (None), or one that is not of the protocol
            return None

    def play(tasks):
        with ThreadPoolExecutor(endpoint.flight) as pool:
            rollouts = list(pool.map(one, tasks))
        if rollouts.count(None) > MAX_FAILED * len(tasks):
            raise RuntimeError(f"the served model broke off {rollouts.count(None)} of {len(tasks)} episodes: "
                               f"{dict(endpoint.failures)}")
        return rollouts
    return {"served": play}
