"""One group of trajectories as a teacher's slide: the method on one screen, at 80 columns.

`explain` takes lines of rollouts.jsonl (data/record.py), so a finished run can be explained as well
as a group that was sampled a moment ago:

    python train.py --explain 12:harm-train-0-0113h --out runs/tiny
    python mosaic.py harm-domains-0-0020h --explain
"""
import json
import math
import unicodedata
from itertools import groupby

WIDTH = 80
LEGEND = (
    "A turn: its gate's probability; ! risky step; C check opened; its action; tokens",
    "that it wrote and then read, by source, x what their gradient is multiplied by.",
)
AGENT = ("sampled", "forced")  # sources that the agent writes; the others it reads


def explain(group: list[dict], config: dict) -> str:
    """The lines of one group -> text. config: the run's "judge", "reward" and "objective"."""
    lines = heading(group, config)
    lines += pair_matrix(group)
    for number, member in enumerate(group):
        lines += [""] + trajectory(number, member, group, config)
    return "\n".join(cut(line, WIDTH) for line in lines)


def heading(group: list[dict], config: dict) -> list[str]:
    first = group[0]
    asked = [message for message in first["messages"] if message["role"] == "user"]
    said = asked[0]["content"] if asked else ""
    step = "" if first["step"] is None else f", step {first['step']}"
    lines = [f"{first['task']} ({first['label'] or 'no label'}){step}", f"user: {said}"]
    lines += LEGEND
    if config["objective"] == "dpo":
        lines.append("--objective dpo: +A is not used; each pair that one side won pulls instead.")
    return lines


def pair_matrix(group: list[dict]) -> list[str]:
    """Who beats whom, asked in both orders."""
    n = len(group)
    lines = ["", "Does the row beat the column? Shown first/second: 1 yes, .5 tie, 0 no, - none"]
    lines.append("      " + "".join(f"{f'#{j}':>9}" for j in range(n)) + "     wins")
    for i, member in enumerate(group):
        cells = [f"{pair_text(member, i, j):>9}" for j in range(n)]
        wins = [value for value in member["wins"] if value is not None]
        total = short(sum(wins)) if len(wins) == n - 1 else "-"
        lines.append(f"  #{i:<3}" + "".join(cells) + f"{total:>9}")
    return lines


def pair_text(member: dict, i: int, j: int) -> str:
    if i == j:
        return "."
    asked = member["verdicts"][j]
    if asked is None:  # --pairs sorted: it follows from the others
        return f"({short(member['wins'][j])})"
    return "/".join(short(verdict) for verdict in asked)


def short(value: float | None) -> str:
    """0.5 -> ".5", 1.0 -> "1"; None -> "-"."""
    if value is None:
        return "-"
    return f"{value:g}".replace("0.", ".", 1) if 0 < value < 1 else f"{value:g}"


# --------------------------------------------------------------------------------- one trajectory
def trajectory(number: int, member: dict, group: list[dict], config: dict) -> list[str]:
    """Its prompt, its turns, its reward and its advantage: ten lines at most."""
    A = f"{member['advantage']:+.2f}"
    prompt, turns = spans_by_turn(member["spans"])
    head = f"#{number}  {member['ended']}, {member['tokens']} tokens, advantage A {A}"
    lines = [head + harm(member), f"      prompt: {counts(prompt)} x 0"]
    for first, last in rows_of(len(turns)):
        if first == last:
            lines.append(turn_line(first, member, turns[first], A))
        else:
            lines.append(folded_line(first, last, turns, A))
    lines.append(reward_line(member, config))
    lines.append(advantage_line(member, group, config))
    return lines


def rows_of(n: int) -> list[tuple]:
    """(first, last) turn of each of at most six lines: of more turns the middle shares one."""
    if n <= 6:
        return [(i, i) for i in range(n)]
    return [(0, 0), (1, 1), (2, 2), (3, n - 3), (n - 2, n - 2), (n - 1, n - 1)]


def harm(member: dict) -> str:
    """What it executed that it should not have: this is what the rule sees."""
    found = []
    for _, name, _, faults in member["journal"]:
        if faults:
            found.append(f"{name} ({', '.join(faults)})")
    return f"; executed {', '.join(found)}" if found else ""


def spans_by_turn(spans: list) -> tuple[dict, list]:
    """Spans in order -> (those of the prompt, [(what the agent wrote, what it then read), ...]),
    each {source: tokens}."""
    parts = []  # [(is it the agent's?, {source: tokens})], in turns
    for is_agent, run in groupby(spans, key=lambda span: span[0] in AGENT):
        total = {}
        for source, n in run:
            total[source] = total.get(source, 0) + n
        parts.append((is_agent, total))
    prompt = parts.pop(0)[1] if parts and not parts[0][0] else {}
    turns = []
    for is_agent, total in parts:
        if is_agent:
            turns.append((total, {}))
        else:
            turns[-1] = (turns[-1][0], total)
    return prompt, turns


def counts(total: dict) -> str:
    return ", ".join(f"{source} {n}" for source, n in total.items())


def turn_line(number: int, member: dict, turn: tuple, A: str) -> str:
    p, opened, risky = member["gates"][number]
    shown = "-" if p is None else f"{p:.2f}"
    mark = "!" if risky else ""
    check = "C" if opened else ""
    action = actions_of(member)[number][:17]
    tokens = tokens_text(*turn, A)
    return f"  {number + 1:>2}  {shown:<4} {mark:<1}{check:<1} {action:<13} {tokens}"


def folded_line(first: int, last: int, turns: list, A: str) -> str:
    written = {}
    read = {}
    for turn in turns[first:last + 1]:
        for total, part in zip((written, read), turn):
            for source, n in part.items():
                total[source] = total.get(source, 0) + n
    return f"      {f'turns {first + 1} to {last + 1}':<21} {tokens_text(written, read, A)}"


def tokens_text(written: dict, read: dict, A: str) -> str:
    """Tokens that learn; then those that do not."""
    others = dict(read)
    if "forced" in written:  # in the strict grammar: training samples in the free one
        others = {"forced": written["forced"], **read}
    text = f"sampled {written.get('sampled', 0)} x {A}"
    return f"{text}; {counts(others)} x 0" if others else text


def actions_of(member: dict) -> list[str]:
    """What each turn of the episode did, in a word or two."""
    actions = []
    for message in member["messages"][member["given"]:]:
        if message["role"] != "assistant":
            continue
        calls = message.get("tool_calls") or []
        if calls:
            names = [call["function"]["name"] for call in calls]
            actions.append("+".join(names))
        elif message["content"].endswith("</answer>"):
            actions.append("answer")
        else:
            actions.append("malformed")
    return actions


def reward_line(member: dict, config: dict) -> str:
    names = {"align": "r_align", "format": "r_fmt", "length": "p_len"}
    if config["reward"] == "scalar":
        names["align"] = "outcome"
    terms = []
    for name, value in member["rewards"].items():
        sign = "-" if name == "length" else "+"
        size = value if value is None else abs(value)
        shown = "unscored" if size is None else f"{size:.2f}"
        terms.append(f"{sign} {names.get(name, name)} {shown}")
    total = "unscored" if member["reward"] is None else f"{member['reward']:.2f}"
    return f"      R {total} = {' '.join(terms).removeprefix('+ ')}"


def advantage_line(member: dict, group: list[dict], config: dict) -> str:
    """Where its advantage came from."""
    if config["objective"] == "dpo":
        chosen = member["wins"].count(1)
        rejected = member["wins"].count(0)
        return f"      chosen in {chosen} pairs, rejected in {rejected}: these pairs are the loss"
    rewards = [each["reward"] for each in group]
    if None in rewards:
        return "      A 0: a pair of the group has no verdict, so the group gives no gradient"
    aligned = {each["rewards"]["align"] for each in group}
    acting = "R"
    reward = member["reward"]
    if len(aligned) == 1:  # all trajectories tie: see preference.advantages
        acting = "r_fmt"
        rewards = [each["rewards"]["format"] for each in group]
        reward = member["rewards"]["format"]
        if len(set(rewards)) == 1:
            return "      A 0: all trajectories tie, so the group gives no gradient"
    mean = sum(rewards) / len(rewards)
    # Of a strict order of n, as in preference.advantages: the same for every group.
    deviation = math.sqrt((len(group) ** 2 - 1) / 12)
    return (f"      A {member['advantage']:+.2f} = ({acting} {reward:.2f} - the group's mean "
            f"{mean:.2f}) / {deviation:.3f}")


# ------------------------------------------------------------------------------- 80 columns, safely
def cut(line: str, width: int) -> str:
    """The line with what does not print spelled out (a terminal would obey it), at most so many
    columns wide; wide letters take two."""
    shown = ""
    used = 0
    for char in line.rstrip():
        text = char if char.isprintable() else json.dumps(char)[1:-1]
        columns = sum(letter_width(letter) for letter in text)
        if used + columns > width:
            return shown[:-3] + "..."
        shown += text
        used += columns
    return shown


def letter_width(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
