"""A turn and its parser, and an episode in the sandbox. No test here needs a model."""
import json
import sys
from dataclasses import replace

import pytest
from hypothesis import example, given, settings, strategies as st

import data
from tools import TAGS, FormatError, call_text, parse_turn, play

# --------------------------------------------------------------------------------- four whole turns
CHECKED_CALL = (
    "<think>\nWeather.\n</think>\n\n"
    "<safety_thoughts>\nFine: <b>a</b> < b </div> <table>.\n</safety_thoughts>\n"
    "<tool_call>\n"
    '{"name": "get", "arguments": '
    '{"a": [1, -2.5e3, true, null, {"b": "x</b>\\n\\u00e9 你好"}], "c": {}}}\n'
    "</tool_call>"
)
ODDLY_NAMED_CALL = (
    "<think>\na\nb\n\n</think>\n\n"
    '<tool_call>\n{"name": "odd\\"\\\\name é", "arguments": {}}\n</tool_call>'
)
PLAIN_ANSWER = (
    "<think>\nDone.\n</think>\n\n"
    "<answer>\nIt is sunny — 你好.\n</answer>"
)
CHECKED_ANSWER = (
    "<think>\nDone.\n</think>\n\n"
    "<safety_thoughts>\nok\n</safety_thoughts>\n"
    "<answer>\nA line may begin like a tag:\n</b>\n</s>\n</the\n</ and <th>.\n</answer>"
)
TURNS = [CHECKED_CALL, ODDLY_NAMED_CALL, PLAIN_ANSWER, CHECKED_ANSWER]


# --------------------------------------------------------------------------------------- the parser
def test_parse_turn_reads_what_was_written():
    """Catches: fields that gain or lose a byte, `opened` and `parallel` ignored."""
    turn = parse_turn(CHECKED_CALL)
    assert turn.plan == "Weather."
    assert turn.check == "Fine: <b>a</b> < b </div> <table>."
    assert turn.kind == "call"
    assert turn.name == "get"
    assert turn.arguments["a"][4] == {"b": "x</b>\né 你好"}
    assert turn.calls == [("get", turn.arguments)]
    assert turn.text is None

    assert parse_turn(PLAIN_ANSWER).text == "It is sunny — 你好."
    assert parse_turn(ODDLY_NAMED_CALL.encode()).plan == "a\nb\n"
    assert parse_turn(CHECKED_CALL.removeprefix("<think>\n"), opened=True) == turn

    call = ODDLY_NAMED_CALL[ODDLY_NAMED_CALL.index("<tool_call>"):]
    three_calls = ODDLY_NAMED_CALL + call + "\n" + call
    assert len(parse_turn(three_calls, parallel=True).calls) == 3


def test_the_json_of_a_call_may_look_as_it_likes():
    """Catches: a tag in a JSON string taken for the call's end, other spacing turned down,
    numbers that become Infinity or lose digits."""
    tagged = parse_turn(CHECKED_CALL.replace("x</b>", "\\n</tool_call>"))
    assert tagged.arguments["a"][4]["b"].startswith("\n</tool_call>")

    loose = '{"name":"get",\n "arguments":{"a" :1e999, "b": %s}}' % ("9" * 4000)
    turn = parse_turn(f"<think>\nx\n</think>\n\n<tool_call>\n{loose}\n</tool_call>")
    assert turn.arguments == {"a": sys.float_info.max, "b": 10 ** 4000 - 1}


ACTION = "\n\n<answer>\nx\n</answer>"
NO_ARGUMENTS = "{}}"  # how ODDLY_NAMED_CALL's object ends
WRONG_ARGUMENTS = [   # what stands in its place; all are reported at the object's start
    "[]}",
    "null}",
    "{}",
    "{}, 1}",
    '{"a": "\\ud800"}}',
    '{"a": ' + "[" * 16 + "]" * 16 + "}}",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}}",
    "{} , }",
    '{"a":01}}',
    '{"a":%s}}' % ("9" * 5000),
]
BROKEN = [  # (turn, place)
    # the plan
    ("", 0),
    ("think", 0),
    ("\ud800", 0),
    (b"<think>\n\xff", 8),
    ("<think>x\n</think>" + ACTION, 0),
    ("<think>\n\n</think>" + ACTION, 8),
    ("<think>\nx</think>" + ACTION, 8),
    ("<think>\n<think>\n</think>" + ACTION, 8),
    ("<think>\nx </answer>\n</think>" + ACTION, 8),
    ("<think>\nx\n</think>" + ACTION[1:], 18),
    # the check
    (CHECKED_CALL.replace("Fine", "<answer>"), 45),
    # the action: none, or more than one
    ("<think>\nx\n</think>\n\n", 20),
    (PLAIN_ANSWER + "\n", 60),
    (PLAIN_ANSWER + PLAIN_ANSWER, 60),
    (ODDLY_NAMED_CALL + ODDLY_NAMED_CALL, 90),
    # the call's object
    (CHECKED_CALL.replace("true", "NaN"), 111),
    (CHECKED_CALL.replace('"get"', "1"), 111),
    (ODDLY_NAMED_CALL.replace('{"name"', ' {"name"'), 23),
    (ODDLY_NAMED_CALL.replace('"arguments"', '"args"'), 35),
    (ODDLY_NAMED_CALL.replace("}}\n", "}} \n"), 77),
]
for wrong in WRONG_ARGUMENTS:
    BROKEN.append((ODDLY_NAMED_CALL.replace(NO_ARGUMENTS, wrong), 35))


def test_broken_turns_name_their_place():
    """Catches: a malformed turn that parses, or one that is reported without its place."""
    for text, place in BROKEN:
        with pytest.raises(FormatError) as caught:
            parse_turn(text)
        reported = str(caught.value).split(":")[0]
        assert reported in (f"character {place}", f"byte {place}"), (text[:99], caught.value)


FRAGMENTS = ["\n", "\n\n", "x", '{"name": "a", "arguments": {', "}", '"', "[", "\ud800"]
for tag in TAGS:
    FRAGMENTS += [f"<{tag}>", f"</{tag}>"]
ANY_TEXT = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60),
    st.lists(st.sampled_from(FRAGMENTS)).map("".join),  # nearly turns
)
BOTTOMLESS = "<think>\nx\n</think>\n\n<tool_call>\n" + "[" * 10 ** 5


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT, opened=st.booleans(), parallel=st.booleans())
@example(text=BOTTOMLESS, opened=False, parallel=False)
def test_parse_turn_is_total(text, opened, parallel):
    """Catches: any exception but FormatError (RecursionError, UnicodeDecodeError, IndexError) on
    some string."""
    try:
        turn = parse_turn(text, opened, parallel)
    except FormatError:
        return
    assert turn.plan
    assert (turn.kind == "call") == bool(turn.calls)


# -------------------------------------------------------------------------------------- the episode
REFUSAL = {"name": "refusal_tool", "arguments": {"reason": "x"}}


def calling(*calls):
    """The text of a turn that makes these calls, without a check."""
    blocks = [call_text(call["name"], call["arguments"]) for call in calls]
    return "<think>\nx\n</think>\n\n" + "\n".join(blocks)


ANSWER = "<think>\nyes\n</think>\n\n<answer>\ndone\n</answer>"
REFUSE = calling(REFUSAL)


def play_always(task, text, **limits):
    """An episode of an agent that says the same in every turn."""
    return play(task, lambda messages: text, **limits)


def test_refusal_and_answer_end_the_episode():
    """TRL #5389: no way to mark a tool as terminal; the model had to speak again, so training
    differed from use."""
    task = data.load("harm")[0]
    for text, ended, turns in (
        (REFUSE, "refusal", 1),
        (ANSWER, "answer", 1),
        ("gibberish", "malformed", 10),
    ):
        rollout = play_always(task, text)
        assert rollout.ended == ended
        assert len(rollout.turns) == turns


def test_replan_lets_the_agent_go_on_once():
    """Catches: an agent that may refuse for ever, or that cannot finish after it refused a part."""
    task = data.load("harm")[0]
    turns = iter([REFUSE, ANSWER])
    assert play(task, lambda messages: next(turns), refusal="replan").ended == "answer"

    stubborn = play_always(task, REFUSE, refusal="replan")
    assert stubborn.ended == "refusal"
    assert len(stubborn.turns) == 2


def test_no_call_after_a_refusal_is_executed():
    """Catches: a turn of several calls whose harm is still done after the refusal among them."""
    task = replace(data.load("harm")[0], public={"parallel": True})
    look, harm = task.goal[0], task.unsafe[0]
    for calls, executed in (
        ([look, REFUSAL, harm], [look["name"]]),
        ([REFUSAL, harm], []),
    ):
        rollout = play_always(task, calling(*calls))
        assert rollout.ended == "refusal"
        assert [effect.name for effect in rollout.journal] == executed
