"""Every shape that people keep preferences in becomes the same Group; every unusable row says why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from alignment.config import SourceConfig
from alignment.data.shapes import to_group
from alignment.errors import DataError
from alignment.types import Completion, Group, Message
from tests.conftest import read_data

Row = dict[str, Any]

USER = {"role": "user", "content": "2 + 2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN = "\n\nHuman: 2 + 2?\n\nAssistant: {}"
ASKED = (Message(role="user", content="2 + 2?"),)
PAIR = (Completion(text="4", reward=1.0), Completion(text="5", reward=0.0))


def group_of(row: Row, **settings: Any) -> Group:
    return to_group(row, "rows.jsonl:7", SourceConfig(path="rows.jsonl", **settings))


def messages(*turns: Row) -> tuple[Message, ...]:
    return tuple(Message(**turn) for turn in turns)


@pytest.mark.parametrize(
    ("row", "settings", "prompt", "completions"),
    [
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, {}, "2 + 2?", PAIR),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, {"prompt_as": "user_message"}, ASKED, PAIR),
        ({"prompt": [SYSTEM, USER], "chosen": "4", "rejected": "5"}, {}, messages(SYSTEM, USER), PAIR),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, {}, ASKED, PAIR),
        ({"prompt": "2 + 2?", "chosen": [GOOD], "rejected": [BAD]}, {}, ASKED, PAIR),
        ({"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}, ASKED, PAIR),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}, ASKED, PAIR),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, {}, messages(SYSTEM, USER), PAIR),
        ({"chosen": HUMAN.format("4"), "rejected": HUMAN.format("5")}, {}, ASKED, PAIR),
        (
            {
                "chosen": HUMAN.format("4\n\nHuman: sure?\n\nAssistant: Yes"),
                "rejected": HUMAN.format("4\n\nHuman: sure?\n\nAssistant:No"),
            },
            {},
            messages(USER, GOOD, {"role": "user", "content": "sure?"}),
            (Completion(text="Yes", reward=1.0), Completion(text="No", reward=0.0)),
        ),
        (
            {"qid": 1, "question": "2 + 2?", "response_j": "4", "response_k": "5"},
            {},
            "Question: 2 + 2?\n\nAnswer: ",
            PAIR,
        ),
        (
            {"question": "2 + 2?", "response_j": "4", "response_k": "5"},
            {"prompt_template": "{question} =", "prompt_as": "user_message"},
            (Message(role="user", content="2 + 2? ="),),
            PAIR,
        ),
        (
            {"question": "2 + 2?", "response_j": "5", "response_k": "4"},
            {"columns": {"prompt": "question", "chosen": "response_k", "rejected": "response_j"}},
            "2 + 2?",
            PAIR,
        ),
        (
            {"a": "2", "b": "3", "best": "5", "worst": "6"},
            {"prompt_template": "{a} + {b} = {{", "columns": {"chosen": "best", "rejected": "worst"}},
            "2 + 3 = {",
            (Completion(text="5", reward=1.0), Completion(text="6", reward=0.0)),
        ),
        (
            {"prompt": "2 + 2?", "completions": ["4", "5", "four"], "rewards": [2, -1.5, 2]},
            {},
            "2 + 2?",
            (Completion(text="4", reward=2.0), Completion(text="5", reward=-1.5), Completion(text="four", reward=2.0)),
        ),
        (
            {"prompt": [USER], "completions": [[GOOD], "5"]},
            {},
            ASKED,
            (Completion(text="4"), Completion(text="5")),
        ),
        ({"prompt": "2 + 2?", "completion": "4", "label": True}, {}, "2 + 2?", PAIR[:1]),
        ({"prompt": "2 + 2?", "completion": "5", "label": False}, {}, "2 + 2?", PAIR[1:]),
        ({"prompt": "2 + 2?", "completion": "5", "label": 0}, {}, "2 + 2?", PAIR[1:]),
        ({"prompt": [USER], "completion": [GOOD], "label": None}, {}, ASKED, (Completion(text="4"),)),
        ({"prompt": "2 + 2?", "completion": "4"}, {}, "2 + 2?", (Completion(text="4"),)),
        ({"messages": [SYSTEM, USER, GOOD]}, {}, messages(SYSTEM, USER), (Completion(text="4"),)),
        (
            {"messages": [USER, GOOD, USER, BAD, USER]},
            {},
            ASKED,
            (Completion(text="4", following=messages(USER, BAD)),),
        ),
        (
            {"messages": [{"role": "assistant", "content": "Hello!"}, USER, GOOD]},
            {},
            messages({"role": "assistant", "content": "Hello!"}, USER),
            (Completion(text="4"),),
        ),
        ({"conversation": [USER, GOOD]}, {"columns": {"messages": "conversation"}}, ASKED, (Completion(text="4"),)),
        ({"text": "plain text"}, {}, "", (Completion(text="plain text"),)),
        ({"prompt": "2 + 2?"}, {}, "2 + 2?", ()),
        ({"prompt": [USER]}, {}, ASKED, ()),
        ({"question": "2 + 2?"}, {"prompt_template": "{question} "}, "2 + 2? ", ()),
        ({"prompt": "2 + 2?", "chosen": None, "rejected": None}, {}, "2 + 2?", ()),
    ],
)
def test_a_row_of_every_shape_becomes_a_group(
    row: Row, settings: Row, prompt: str | tuple[Message, ...], completions: tuple[Completion, ...]
) -> None:
    assert group_of(row, **settings) == Group(id="rows.jsonl:7", prompt=prompt, completions=completions)


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_a_message_keeps_every_field_for_the_template() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Look.", "name": None}
    told = {"role": "tool", "tool_call_id": "1", "content": "sunny", "name": "weather"}
    group = group_of({"messages": [USER, called, told, GOOD], "tools": [TOOL]})
    (answer,) = group.completions
    assert (answer.text, dict(answer.fields)) == ("", {"tool_calls": [CALL], "reasoning_content": "Look."})
    assert [turn.template_fields() for turn in answer.following] == [told, GOOD]
    assert group.tools == (TOOL,)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL | {"strict": None}]])
def test_tools_are_read_as_a_list_or_as_its_text_and_without_what_is_null(tools: Any) -> None:
    assert group_of({"prompt": [USER], "tools": tools}).tools == (TOOL,)


def test_messages_can_be_keys_whatever_they_hold() -> None:
    first, second = (group_of({"prompt": [{**USER, "tool_calls": [CALL]}]}).prompt for _ in range(2))
    assert first == second and len({first, second}) == 1
    assert first != group_of({"prompt": [USER]}).prompt


def test_the_answers_of_a_pair_keep_their_fields_and_differ_by_them() -> None:
    chosen, rejected = ({**GOOD, "tool_calls": [CALL]}, GOOD)
    group = group_of({"prompt": [USER], "chosen": [chosen], "rejected": [rejected]})
    assert [dict(answer.fields) for answer in group.completions] == [{"tool_calls": [CALL]}, {}]


@pytest.mark.parametrize("weight", [{"weight": 0}, {"train": False}, {"training": False}, {"weight": 0.0}])
def test_an_answer_of_no_weight_is_context(weight: Row) -> None:
    group = group_of({"messages": [USER, BAD | weight, USER, GOOD | {"weight": 1}, USER, BAD | weight]})
    assert [turn.content for turn in group.prompt if isinstance(turn, Message)] == ["2 + 2?", "5", "2 + 2?"]
    assert group.completions == (Completion(text="4"),)
    later = group_of({"messages": [USER, GOOD, USER, BAD | weight, USER, GOOD]}).completions[0]
    assert [turn.trained for turn in later.following] == [True, False, True, True]


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    assert group_of({"prompt": [{"role": "user", "content": parts}]}).prompt == ASKED


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_becomes_the_first_turn(column: str) -> None:
    row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", column: "Be brief."}
    assert group_of(row, prompt_as="user_message").prompt == messages(SYSTEM, USER)
    assert group_of(row | {"prompt": [SYSTEM, USER]}).prompt == messages(SYSTEM, USER)
    assert group_of({"messages": [USER, GOOD], column: "Be brief."}).prompt == messages(SYSTEM, USER)
    assert group_of({"messages": [USER, GOOD], column: ""}).prompt == ASKED
    written = group_of(row, prompt_template="{" + column + "} {prompt}")
    assert written.prompt == "Be brief. 2 + 2?"


@pytest.mark.parametrize(
    ("row", "cuts"),
    [
        ({"completion": "4", "finish_reason": "length"}, [True]),
        ({"completion": "4", "finish_reason": "stop"}, [False]),
        ({"completion": "4", "truncated": True}, [True]),
        ({"completion": [GOOD | {"finish_reason": "length"}]}, [True]),
        ({"completions": ["4", "5"], "rewards": [1, 0], "finish_reason": ["length", None]}, [True, False]),
        ({"chosen": "4", "rejected": "5", "truncated": [False, True]}, [False, True]),
        ({"chosen": "4", "rejected": "5", "finish_reason": "stop"}, [False, False]),
        ({"messages": [USER, GOOD], "finish_reason": "length"}, [True]),
    ],
)
def test_an_answer_that_was_cut_where_it_was_sampled_is_marked(row: Row, cuts: list[bool]) -> None:
    assert [answer.truncated for answer in group_of({"prompt": "2 + 2?"} | row).completions] == cuts


def test_of_a_conversation_the_last_answer_is_the_one_that_was_cut() -> None:
    (answer,) = group_of({"messages": [USER, GOOD, USER, BAD], "truncated": True}).completions
    assert [answer.truncated, *(turn.truncated for turn in answer.following)] == [False, False, True]


MESSAGE = "holds something that is not a message with role and content"


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({}, {}, "has none of the known fields; its columns are none"),
        ({"a": 1, "b": 2}, {}, "has none of the known fields; its columns are 'a', 'b'"),
        ({"prompt": "p", "chosen": "x"}, {}, "field 'rejected' is missing"),
        ({"prompt": "p", "rejected": "x"}, {}, "field 'chosen' is missing"),
        ({"prompt": "p", "chosen": "x", "rejected": None}, {}, "field 'rejected' is missing"),
        ({"completion": "x"}, {}, "field 'prompt' is missing"),
        ({"completions": ["x", "y"], "rewards": [1, 0]}, {}, "field 'prompt' is missing"),
        ({"chosen": [GOOD], "rejected": [BAD]}, {}, "field 'prompt' is missing"),
        ({"prompt": 5}, {}, "prompt must be a string or a list of messages, not int"),
        ({"prompt": []}, {}, "prompt is an empty list of messages"),
        ({"prompt": [{"role": "user"}]}, {}, f"prompt {MESSAGE}"),
        ({"prompt": ["hello"]}, {}, f"prompt {MESSAGE}"),
        ({"prompt": [{"role": "user", "content": None}]}, {}, "prompt content must be a string, not NoneType"),
        ({"prompt": [{"role": 1, "content": "x"}]}, {}, "prompt role must be a string, not int"),
        ({"prompt": "p", "chosen": 4, "rejected": 5}, {}, "chosen must be a string or a list of messages, not int"),
        (
            {"prompt": "p", "chosen": "4", "rejected": 5},
            {},
            "chosen and rejected must be both strings or both lists of messages, not str and int",
        ),
        (
            {"prompt": "p", "chosen": [GOOD], "rejected": "5"},
            {},
            "chosen and rejected must be both strings or both lists of messages, not list and str",
        ),
        ({"prompt": "p", "chosen": "x", "rejected": "x"}, {}, "chosen and rejected are the same"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, {}, "chosen and rejected are the same"),
        ({"prompt": "p", "chosen": "", "rejected": "x"}, {}, "an answer is empty"),
        ({"prompt": "p", "chosen": "x", "rejected": " \n"}, {}, "an answer is empty"),
        ({"chosen": HUMAN.format(""), "rejected": HUMAN.format("5")}, {}, "an answer is empty"),
        ({"prompt": "p", "completion": ""}, {}, "an answer is empty"),
        ({"prompt": "p", "completions": ["x", ""]}, {}, "an answer is empty"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, {}, "an answer is empty"),
        ({"text": " "}, {}, "an answer is empty"),
        ({"prompt": "p", "chosen": "x", "rejected": "a\ud800b"}, {}, "rejected holds a lone surrogate at character 1"),
        ({"prompt": "\udfff", "completion": "x"}, {}, "prompt holds a lone surrogate at character 0"),
        (
            {"messages": [USER, {"role": "assistant", "content": "\ud83d"}]},
            {},
            "messages content holds a lone surrogate at character 0",
        ),
        ({"question": "\ud800"}, {"prompt_template": "{question}"}, "question holds a lone surrogate at character 0"),
        (
            {"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
            {},
            "chosen and rejected do not share their prompt",
        ),
        (
            {"chosen": HUMAN.format("4"), "rejected": "\n\nHuman: 2 + 3?\n\nAssistant: 5"},
            {},
            "chosen and rejected do not share their prompt",
        ),
        (
            {"chosen": HUMAN.format("4") + "\n\nHuman: thanks", "rejected": HUMAN.format("5")},
            {},
            "chosen does not end with an assistant's turn",
        ),
        (
            {"chosen": HUMAN.format("4"), "rejected": "\n\nHuman: 2 + 2?"},
            {},
            "rejected does not end with an assistant's turn",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, {}, "rejected does not end with an assistant's turn"),
        ({"chosen": [], "rejected": []}, {}, "chosen does not end with an assistant's turn"),
        (
            {"chosen": "\n\nAssistant: 4", "rejected": "\n\nAssistant: 5"},
            {},
            "chosen and rejected hold no turn before the answer",
        ),
        ({"chosen": "just text", "rejected": HUMAN.format("5")}, {}, "without a prompt, chosen must be a message list"),
        (
            {"chosen": HUMAN.format("4"), "rejected": "intro" + HUMAN.format("5")},
            {},
            "without a prompt, rejected must be a message list",
        ),
        ({"prompt": "p", "completions": "x"}, {}, "completions must be a list, not str"),
        ({"prompt": "p", "completions": []}, {}, "completions is empty"),
        ({"prompt": "p", "completions": [1]}, {}, "completions must be a string or a list of messages, not int"),
        (
            {"prompt": "p", "completions": ["x", "y"], "rewards": [1]},
            {},
            "rewards must be a list of 2 numbers, one per completion",
        ),
        ({"prompt": "p", "completions": ["x"], "rewards": 1}, {}, "rewards must be a list of 1 numbers"),
        ({"prompt": "p", "completions": ["x"], "rewards": ["1"]}, {}, "reward '1' is not a finite number"),
        ({"prompt": "p", "completions": ["x"], "rewards": [True]}, {}, "reward True is not a finite number"),
        ({"prompt": "p", "completions": ["x"], "rewards": [None]}, {}, "reward None is not a finite number"),
        ({"prompt": "p", "completions": ["x"], "rewards": [float("nan")]}, {}, "reward nan is not a finite number"),
        ({"prompt": "p", "completions": ["x"], "rewards": [float("-inf")]}, {}, "reward -inf is not a finite number"),
        ({"prompt": "p", "completions": ["x"], "rewards": [10**400]}, {}, "reward 1000000000"),
        ({"prompt": "p", "completion": "x", "label": "yes"}, {}, "label must be true or false, not 'yes'"),
        ({"prompt": "p", "completion": "x", "label": 2}, {}, "label must be true or false, not 2"),
        ({"prompt": "p", "completion": "x", "label": []}, {}, "label must be true or false, not []"),
        ({"prompt": "p", "completion": [USER]}, {}, "completion must be a string or one assistant message"),
        ({"prompt": "p", "completion": [GOOD, BAD]}, {}, "completion must be a string or one assistant message"),
        ({"messages": "hello"}, {}, "messages must be a string or a list of messages, not str"),
        ({"messages": [USER]}, {}, "messages hold no assistant's turn that answers something"),
        ({"messages": [GOOD]}, {}, "messages hold no assistant's turn that answers something"),
        ({"messages": []}, {}, "messages hold no assistant's turn that answers something"),
        ({"messages": [{"from": "human", "value": "x"}]}, {}, f"messages {MESSAGE}"),
        ({"text": 5}, {}, "text must be a string, not int"),
        (
            {"prompt": "p", "chosen": "x", "rejected": "y"},
            {"columns": {"chosen": "better"}},
            "column 'better' (columns.chosen) is missing",
        ),
        ({"a": "x"}, {"prompt_template": "{a} {b}"}, "column 'b' of the prompt template is missing"),
        ({"a": 5}, {"prompt_template": "{a}"}, "a must be a string, not int"),
        ({"question": None, "response_j": "4", "response_k": "5"}, {}, "question must be a string, not NoneType"),
        ({"prompt": "p", "completion": "x", "tools": "get"}, {}, "tools is a text that is not JSON"),
        (
            {"prompt": "p", "completion": "x", "tools": {"a": 1}},
            {},
            "tools must be a list of JSON schemas, not {'a': 1}",
        ),
        ({"messages": [USER, GOOD | {"weight": 0.5}]}, {}, "a message's weight must be 0 or 1"),
        ({"messages": [USER, GOOD | {"weight": 0}]}, {}, "messages hold no assistant's turn that is to be trained on"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            {},
            "prompt content holds a part of type 'image'; only parts of type 'text' can be trained on",
        ),
        ({"prompt": [USER | {"name": "\ud800"}]}, {}, "prompt holds a lone surrogate at character 0"),
        ({"prompt": "p", "completion": "x", "system": "s"}, {}, "column 'system' holds a system text, and a prompt of"),
        ({"prompt": [SYSTEM, USER], "system": "s"}, {}, "column 'system' holds another system text than the messages"),
        (
            {"prompt": "p", "chosen": "x", "rejected": "y", "truncated": True},
            {},
            "truncated is True, which does not say of which of the 2 answers; give a list",
        ),
        ({"prompt": "p", "completion": "x", "truncated": [True, True]}, {}, "truncated must be a list of 1, one per"),
        ({"prompt": "p", "completion": "x", "finish_reason": 5}, {}, "finish_reason must be a string, not 5"),
    ],
)
def test_an_unusable_row_says_why(row: Row, settings: Row, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        group_of(row, **settings)
    assert str(caught.value).startswith(expected)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "unusable"),
    [
        ("stack_exchange_paired", {}),
        ("hh_harmless", {5: "an answer is empty", 11: "chosen and rejected do not share their prompt"}),
    ],
)
def test_real_preferences_are_usable_except_where_the_row_says_why(name: str, unusable: dict[int, str]) -> None:
    groups, refused = [], {}
    for number, row in enumerate(read_data(name)):
        try:
            groups.append(group_of(row))
        except DataError as error:
            refused[number] = str(error)
    assert refused == unusable
    assert len(groups) > 20 and all(group.pairs == [(0, 1)] for group in groups)
