"""Every shape that people keep preferences in becomes the same Group; every unusable row says why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from alignment.data import shapes
from alignment.data.files import Cell
from alignment.data.shapes import to_group
from alignment.errors import DataError, NoPreference, WithoutWeight
from alignment.groups import Completion, Group, Message
from alignment.settings.data import SourceConfig
from serving.http.fields import to_engine_messages
from tests.conftest import read_data

Row = dict[str, Any]

USER = {"role": "user", "content": "2 + 2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN = "\n\nHuman: 2 + 2?\n\nAssistant: {}"
ASKED = (Message(role="user", content="2 + 2?"),)
PAIR = (Completion(text="4", reward=1.0), Completion(text="5", reward=0.0))
FOUR = (Completion(text="4"),)


def group_of(row: Row, **settings: Any) -> Group:
    return to_group(row, "rows.jsonl:7", SourceConfig(path="rows.jsonl", **settings))


def messages(*turns: Row) -> tuple[Message, ...]:
    return tuple(Message(**turn) for turn in turns)


def read_dialogue(row: Row) -> Group:
    """A shape of one's own."""
    prompt, answer = row["dialogue"]
    return Group(id="", prompt=prompt, completions=(Completion(text=answer),), columns={"turns": len(row["dialogue"])})


def test_a_shape_of_ones_own_reads_rows() -> None:
    row = {"dialogue": ["2 + 2?", "4"], "answer": 4}
    group = group_of(row, shape="tests.alignment.test_shapes:read_dialogue", keep=("answer", "turns"))
    assert (group.id, group.prompt, group.completions, group.columns) == (
        "rows.jsonl:7",
        "2 + 2?",
        FOUR,
        {"answer": 4, "turns": 2},
    )
    with pytest.raises(DataError, match=r"read_dialogue raises KeyError\('dialogue'\)"):
        group_of({"text": "4"}, shape="tests.alignment.test_shapes:read_dialogue")
    with pytest.raises(DataError, match="returns a dict, not an"):
        group_of(row, shape="builtins:dict")


def test_an_entry_of_the_table_is_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    dialogue = shapes.RowShape(
        lambda fields: fields.has_field("dialogue"), lambda fields, origin: read_dialogue(fields.row)
    )
    monkeypatch.setitem(shapes.SHAPES, "dialogue", dialogue)
    assert group_of({"dialogue": ["2 + 2?", "4"]}).completions == FOUR


def test_the_shapes_of_all_files_are_tried_in_the_order_of_their_ranks() -> None:
    assert list(shapes.SHAPES) == ["pair", "completions", "completion", "half_pair", "messages", "text", "prompt"]


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


@pytest.mark.parametrize(
    "weight",
    [
        {"weight": 0},
        {"train": False},
        {"training": False},
        {"weight": 0.0},
        {"loss": False},
        {"loss_mask": 0},
        {"weight": "0"},
    ],
)
def test_an_answer_of_no_weight_is_context(weight: Row) -> None:
    group = group_of({"messages": [USER, BAD | weight, USER, GOOD | {"weight": 1}, USER, BAD | weight]})
    assert [turn.content for turn in group.prompt if isinstance(turn, Message)] == ["2 + 2?", "5", "2 + 2?"]
    assert group.completions == (Completion(text="4"),)
    later = group_of({"messages": [USER, GOOD, USER, BAD | weight, USER, GOOD]}).completions[0]
    assert [turn.trained for turn in later.following] == [True, False, True, True]


def test_parts_of_text_are_joined_as_the_endpoint_joins_them() -> None:
    for texts in (["2 + 2?"], ["a", "b"], ["a ", " b\n", "", "c"]):
        turn = {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}
        prompt = group_of({"prompt": [turn]}).prompt
        assert [{"role": m.role, "content": m.content} for m in prompt if isinstance(m, Message)] == to_engine_messages(
            [turn]
        )
        assert prompt == messages({"role": "user", "content": "\n".join(texts)})


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
        ({"prompt": "p", "completion": "x", "label": "neutral"}, {}, "label must be true or false, not 'neutral'"),
        ({"prompt": "p", "completion": "x", "label": 2}, {}, "label must be true or false, not 2"),
        ({"prompt": "p", "completion": "x", "label": []}, {}, "label must be true or false, not []"),
        ({"prompt": "p", "completion": [USER]}, {}, "completion must be a string or one assistant message"),
        ({"prompt": "p", "completion": [GOOD, BAD]}, {}, "completion must be a string or one assistant message"),
        ({"messages": "hello"}, {}, "messages must be a list of messages, not a string"),
        ({"messages": [USER]}, {}, "messages hold no assistant's turn that answers something"),
        ({"messages": [GOOD]}, {}, "messages hold no assistant's turn that answers something"),
        ({"messages": []}, {}, "messages hold no assistant's turn that answers something"),
        ({"messages": [{"from": "human", "text": "x"}]}, {}, f"messages {MESSAGE}"),
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


TURNS = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
LIST = json.dumps([SYSTEM, USER, GOOD])


@pytest.mark.parametrize(
    ("row", "settings", "prompt", "completions"),
    [
        ({"conversations": TURNS}, {}, messages(SYSTEM, USER), (Completion(text="4"),)),
        ({"conversations": TURNS}, {"columns": {"messages": "conversations"}}, messages(SYSTEM, USER), FOUR),
        ({"conversations": json.dumps(TURNS), "system": ""}, {}, messages(SYSTEM, USER), FOUR),
        ({"conversations": TURNS[1:], "system": "Be brief."}, {}, messages(SYSTEM, USER), FOUR),
        ({"conversation": [{"from": "Human", "value": "2 + 2?"}, {"from": "GPT", "value": "4"}]}, {}, ASKED, FOUR),
        ({"conversations": TURNS[1:2], "chosen": TURNS[2], "rejected": {"from": "gpt", "value": "5"}}, {}, ASKED, PAIR),
        ({"conversations": TURNS[1:2], "chosen": "4", "rejected": "5"}, {}, ASKED, PAIR),
        ({"conversations": TURNS[1:], "label": True}, {}, ASKED, PAIR[:1]),
        ({"messages": [USER, BAD], "kto_tag": "False"}, {}, ASKED, PAIR[1:]),
        ({"messages": [{"role": "User", "content": "2 + 2?"}, {"role": "ASSISTANT", "content": "4"}]}, {}, ASKED, FOUR),
        ({"messages": LIST}, {}, messages(SYSTEM, USER), FOUR),
        ({"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])}, {}, ASKED, PAIR),
        ({"prompt": [USER], "chosen": GOOD, "rejected": BAD}, {}, ASKED, PAIR),
        ({"prompt": json.dumps([USER]), "completions": '["4", "5"]', "rewards": "[1, 0.0]"}, {}, ASKED, PAIR),
        ({"prompt": "[1, 2] + [3]?", "completion": "[1, 2, 3]"}, {}, "[1, 2] + [3]?", (Completion(text="[1, 2, 3]"),)),
        ({"prompt": "2 + 2?", "completion": "4", "label": "True"}, {}, "2 + 2?", PAIR[:1]),
        ({"prompt": "2 + 2?", "completion": "5", "label": "0"}, {}, "2 + 2?", PAIR[1:]),
        ({"prompt": "2 + 2?", "completion": "5", "rewards": 0}, {}, "2 + 2?", PAIR[1:]),
        ({"prompt": "2 + 2?", "completion": "5", "rewards": "0.0"}, {}, "2 + 2?", PAIR[1:]),
        ({"prompt": "2 + 2?", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, {},
         messages(SYSTEM, USER), PAIR),
        ({"prompt": "2 + 2?", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
         {"prompt_as": "user_message"}, messages(SYSTEM, USER), PAIR),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}, messages(SYSTEM, USER), PAIR),
        ({"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [GOOD, USER, BAD]}, {},
         messages(USER, GOOD, USER), PAIR),
        ({"prompt": "2 + 2?", "messages": [USER, GOOD]}, {}, ASKED, FOUR),
        ({"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}, ASKED, PAIR),
        ({"q": {"text": "2 + 2?"}, "a": {"all": ["4", "5"]}},
         {"columns": {"prompt": "q.text", "chosen": "a.all.0", "rejected": "a.all.1"}}, "2 + 2?", PAIR),
        ({"prompt": [USER], "completion": "4", "meta": {"system": "Be brief."}}, {"columns": {"system": "meta.system"}},
         messages(SYSTEM, USER), FOUR),
        ({"q": '{"text": "2 + 2"}'}, {"prompt_template": "{q.text} = "}, "2 + 2 = ", ()),
        ({"a.b": "2 + 2?", "a": {"b": "no"}}, {"columns": {"prompt": "a.b"}}, "2 + 2?", ()),
        ({"prompt": "2 + 2?", "completion": "4", "weight": "1.0", "images": []}, {}, "2 + 2?", FOUR),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "score_chosen": 8, "score_rejected": 8}, {}, "2 + 2?",
         PAIR),
        ({"instruction": "2 + 2?", "input": "", "output": "4", "text": "x"}, {"prompt_as": "user_message"}, ASKED,
         FOUR),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, {"prompt_as": "user_message"},
         messages({"role": "user", "content": "Add.\n2, 2"}), FOUR),
        ({"instruction": "2 + 2?", "chosen": "4", "rejected": "5", "system": "Be brief."},
         {"prompt_as": "user_message"}, messages(SYSTEM, USER), PAIR),
        ({"instruction": "2 + 2?", "output": "4", "history": [["2 + 3?", "5"]]}, {"prompt_as": "user_message"},
         messages({"role": "user", "content": "2 + 3?"}, BAD, USER), FOUR),
        ({"instruction": "2 + 2?", "context": None, "response": "4"}, {"prompt_as": "user_message"}, ASKED, FOUR),
        ({"instruction": "2 + 2?"}, {"prompt_as": "user_message"}, ASKED, ()),
    ],
)  # fmt: skip
def test_rows_of_other_programs_are_read(
    row: Row, settings: Row, prompt: str | tuple[Message, ...], completions: tuple[Completion, ...]
) -> None:
    assert group_of(row, **settings) == Group(id="rows.jsonl:7", prompt=prompt, completions=completions)


def test_an_instruction_that_is_continued_as_text_is_written_as_alpaca_writes_it() -> None:
    row = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    assert group_of(row).prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n"
        "### Response:\n"
    )
    assert group_of({**row, "input": None}).prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )


def test_a_call_of_a_function_in_sharegpts_form_is_a_tool_call() -> None:
    call = {"name": "add", "arguments": {"a": 2, "b": 2}}
    turns = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "It is 4."},
    ]
    group = group_of({"conversations": turns, "tools": json.dumps([{"name": "add"}])})
    assert group.tools == ({"type": "function", "function": {"name": "add"}},)
    (completion,) = group.completions
    assert completion.fields == {"tool_calls": [{"type": "function", "function": call}]}
    assert completion.following == messages(
        {"role": "tool", "content": "4"}, {"role": "assistant", "content": "It is 4."}
    )
    with pytest.raises(DataError, match="a function_call must be the JSON of a name and arguments, not 'add it'"):
        group_of({"conversations": [turns[0], {"from": "function_call", "value": "add it"}]})


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"messages": "[{'role': 'user'}]"}, {}, "messages is a text that is not JSON"),
        ({"prompt": "p", "chosen": "[{'role': 'assistant', 'content': 'x'}]", "rejected": "y"}, {},
         "holds a list as Python prints it"),
        ({"prompt": "Another?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, {},
         "prompt is not what the list of messages begins with"),
        ({"prompt": [SYSTEM, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}, "prompt is not what the"),
        ({"prompt": "Another?", "messages": [USER, GOOD]}, {}, "prompt is not what the list of messages begins with"),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "score_chosen": 2.0, "score_rejected": 8.0}, {},
         "its scores contradict its order: chosen has 2 and rejected 8, which is better"),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "chosen-rating": "1", "rejected-rating": "4"}, {},
         "its scores contradict its order: chosen has 1 and rejected 4"),
        ({"prompt": "p", "completion": "x", "weight": 0.5}, {}, "its weight is 0.5, and rows count alike here"),
        ({"prompt": "p", "completion": "x", "images": ["a.png"]}, {}, "column 'images' holds what is no text"),
        ({"prompt": "p", "completions": ["x", "y"], "labels": [True, False]}, {}, "labels beside completions"),
        ({"prompt": "p", "completions": ["x", "y"], "label": True}, {}, "label beside completions"),
        ({"prompt": "p", "completion": "x", "rewards": "good"}, {}, "reward None is not a finite number"),
        ({"prompt": "p", "completion": "x", "tools": [{"name": "f"}]}, {}, "tools are given, and plain text has no"),
        ({"conversations": TURNS[:2], "label": True}, {}, "a label is about the assistant's turn at the end"),
        ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, {}, "history holds earlier turns"),
        ({"instruction": "x", "output": "y", "history": ["a"]}, {"prompt_as": "user_message"}, "history must be a"),
        ({"a": {"b": 1}}, {"columns": {"prompt": "a.c"}}, "column 'a.c' (columns.prompt) is missing"),
        ({"a": {"b": 1}, "prompt": "p"}, {"keep": ("a.c",)}, "column 'a.c' (keep) is missing"),
        ({"a": {"b": "x"}}, {"prompt_template": "{a.c}"}, "column 'a.c' of the prompt template is missing"),
    ],
)  # fmt: skip
def test_a_row_of_another_program_that_cannot_be_read_says_why(row: Row, settings: Row, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        group_of(row, **settings)
    assert str(caught.value).startswith(expected)
    assert not isinstance(caught.value, NoPreference)


def test_a_row_of_weight_nothing_is_left_out_unless_the_column_is_read_as_something_else() -> None:
    row = {"prompt": "p", "completion": "x", "weight": 0}
    with pytest.raises(WithoutWeight, match="its weight is 0"):
        group_of(row)
    assert group_of(row, keep=("weight",)).columns == {"weight": 0}


@pytest.mark.parametrize("weight", [False, "no", "false", "False", "0", "0.0", "0.00", 0.0, Cell("false"), " 0 "])
def test_a_row_whose_weight_says_no_in_any_form_is_left_out(weight: object) -> None:
    with pytest.raises(WithoutWeight, match="its weight is 0"):
        group_of({"prompt": "p", "completion": "x", "weight": weight})


@pytest.mark.parametrize("weight", [" ", [0], {"a": 0}, "some", "nan", float("nan"), -1, "0.5", 10**400])
def test_a_weight_that_cannot_be_read_is_refused_with_its_value(weight: object) -> None:
    with pytest.raises(DataError) as caught:
        group_of({"prompt": "p", "completion": "x", "weight": weight})
    assert str(caught.value).startswith(f"its weight is {weight!r:.50}, and rows count alike here")
    assert not isinstance(caught.value, NoPreference)


@pytest.mark.parametrize("weight", [True, "yes", "true", 1, "1.0", "1.00", None, "", []])
def test_a_weight_of_one_or_none_changes_nothing(weight: object) -> None:
    assert group_of({"prompt": "p", "completion": "4", "weight": weight}).completions == FOUR


def test_a_row_that_says_train_false_is_left_out_and_another_column_of_that_name_is_not() -> None:
    with pytest.raises(WithoutWeight, match="its train is false"):
        group_of({"prompt": "p", "completion": "4", "train": False})
    for value in (True, "train", ["a"], None):
        assert group_of({"prompt": "p", "completion": "4", "train": value}).completions == FOUR


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"loss_mask": "0"}])
def test_an_answer_of_no_weight_is_left_out_of_every_shape(off: Row) -> None:
    for row in (
        {"prompt": [USER], "completion": [GOOD | off]},
        {"prompt": [USER], "completions": [[GOOD | off], [BAD | off]], "rewards": [1, 0]},
        {"messages": [USER, GOOD | off], "label": True},
    ):
        with pytest.raises(WithoutWeight, match="the weight of its answer is 0"):
            group_of(row)
    ranked = group_of({"prompt": [USER], "completions": [[GOOD | off], [BAD]], "rewards": [1, 0.5]})
    assert [(answer.text, answer.reward) for answer in ranked.completions] == [("5", 0.5)]
    for chosen, rejected, rest in ((GOOD | off, BAD, PAIR[1:]), (GOOD, BAD | off, PAIR[:1])):
        group = group_of({"chosen": [USER, chosen], "rejected": [USER, rejected]})
        assert group.completions == rest and not group.pairs


@pytest.mark.parametrize(
    ("reason", "is_cut"),
    [
        *((reason, True) for reason in ("LENGTH ", "max_new_tokens", "token_limit", "MAX_TOKENS", "Content-Filter")),
        *((reason, True) for reason in ("FinishReason.LENGTH", "FINISH_REASON_MAX_TOKENS", "error", "repetition")),
        *((reason, False) for reason in ("STOP", "eos", "End_Turn", "tool_calls", "FinishReason.STOP", "", None)),
    ],
)
def test_finish_reasons_are_read_as_programs_write_them(reason: str | None, is_cut: bool) -> None:
    for row in (
        {"completion": "4", "finish_reason": reason},
        {"completions": ["4"], "finish_reasons": [reason]},
        {"completion": [GOOD | {"finish_reason": reason}]},
    ):
        assert [answer.truncated for answer in group_of({"prompt": "2 + 2?"} | row).completions] == [is_cut]


def test_a_finish_reason_that_is_not_known_is_refused_with_its_value() -> None:
    for row in ({"completion": "4", "finish_reason": "banana"}, {"completion": [GOOD | {"finish_reason": "banana"}]}):
        with pytest.raises(DataError, match="finish_reason 'banana' is not known, so nothing says whether the answer"):
            group_of({"prompt": "2 + 2?"} | row)
    row = {"prompt": "2 + 2?", "completion": "4", "finish_reason": "banana", "truncated": True}
    assert group_of(row).completions[0].truncated
    stopped = group_of({"prompt": "2 + 2?", "completion": "4", "stop_reason": "###"})
    assert not stopped.completions[0].truncated, "vLLM names the text at which it stopped"


@pytest.mark.parametrize("value", [True, 1, "true", Cell("True"), "yes"])
def test_truncated_is_read_in_a_row_a_table_and_a_message(value: object) -> None:
    for row in ({"completion": "4", "truncated": value}, {"completion": [GOOD | {"truncated": value}]}):
        assert group_of({"prompt": "2 + 2?"} | row).completions[0].truncated


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": '[{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]'},
         "messages"),
        ({"prompt": [USER], "chosen": '[{"role": "assistant", "content": "a", "content": "b"}]', "rejected": "[]"},
         "messages"),
        ({"messages": [USER, {"from": "function_call", "value": '{"name": "f", "name": "g", "arguments": {}}'}]},
         "function_call"),
        ({"messages": [USER, GOOD], "tools": '[{"name": "f", "name": "g"}]'}, "tools"),
        ({"messages": [USER, GOOD], "chat_template_kwargs": '{"a": 1, "a": 2}'}, "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_a_json_text_that_has_a_key_twice_is_refused(row: Row, field: str) -> None:
    with pytest.raises(DataError, match=f"^{field}: an object has the key '[a-z]+' twice"):
        group_of(row)


def test_a_plain_text_that_happens_to_be_json_may_have_a_key_twice() -> None:
    assert group_of({"prompt": '{"a": 1, "a": 2}', "completion": '{"b": 1, "b": 2}'}).prompt == '{"a": 1, "a": 2}'


JSON_ANSWER = '{"from": "gpt", "value": "x"}'


@pytest.mark.parametrize("prompt_as", ["text", "user_message"])
def test_an_answer_to_a_text_that_is_the_json_of_a_message_stays_a_text(prompt_as: str) -> None:
    other = '{"role": "assistant", "content": "y"}'
    one = group_of({"prompt": "Give JSON", "completion": JSON_ANSWER}, prompt_as=prompt_as)
    several = group_of({"prompt": "Give JSON", "completions": [JSON_ANSWER, other]}, prompt_as=prompt_as)
    pair = group_of({"prompt": "Give JSON", "chosen": JSON_ANSWER, "rejected": other}, prompt_as=prompt_as)
    alpaca = group_of({"instruction": "Give JSON", "output": JSON_ANSWER}, prompt_as=prompt_as)
    assert [c.text for group in (one, several, pair, alpaca) for c in group.completions] == [
        *(JSON_ANSWER,), *(JSON_ANSWER, other), *(JSON_ANSWER, other), *(JSON_ANSWER,),
    ]  # fmt: skip
    turns = group_of({"prompt": [USER], "completion": json.dumps(GOOD)})
    assert turns.completions == FOUR, "beside messages it is a message"


def test_a_json_list_of_messages_is_a_text_where_other_rows_have_another_text(reader: Any, write_rows: Any) -> None:
    answer = json.dumps([GOOD])
    rows = [{"prompt": "p ", "completion": answer}, {"prompt": json.dumps([USER]), "completion": "plain"}]
    mixed_rows = reader("sft", path=str(write_rows(rows)))
    groups = list(mixed_rows.read(*mixed_rows.data.sources))
    assert [(group.prompt, group.completions[0].text) for group in groups] == [("p ", answer), (ASKED, "plain")]
    whole = [{"prompt": json.dumps([USER]), "completion": answer}] * 2
    json_rows = reader("sft", path=str(write_rows(whole)))
    groups = list(json_rows.read(*json_rows.data.sources))
    assert [(group.prompt, group.completions[0].text) for group in groups] == [(ASKED, "4")] * 2


def test_kept_columns_are_found_inside_others_and_keep_the_name_that_was_given() -> None:
    row = {"prompt": "p", "reward_model": {"style": "rule", "ground_truth": "72"}, "extra": '{"answers": [1, 2]}'}
    kept = group_of(row, keep=("reward_model.ground_truth", "extra.answers.1", "extra")).columns
    assert kept == {"reward_model.ground_truth": "72", "extra.answers.1": 2, "extra": row["extra"]}


def test_what_was_cut_off_is_said_for_each_of_several_answers() -> None:
    row = {"prompt": "p", "completions": ["x", "y", "z"], "finish_reasons": ["length", "stop", None]}
    assert [completion.truncated for completion in group_of(row).completions] == [True, False, False]


def test_an_export_that_does_not_say_how_answers_ended_teaches_no_end() -> None:
    row = {"prompt": "p", "completions": ["x", "y"], "rewards": [1.0, 0.0]}
    export = row | {"labeller": "anna", "kind": "choice", "versions": [1, 1]}
    assert [completion.truncated for completion in group_of(export).completions] == [True, True]
    ends = export | {"finish_reasons": ["stop", None]}
    assert [completion.truncated for completion in group_of(ends).completions] == [False, False]
    assert [completion.truncated for completion in group_of(row).completions] == [False, False]


def test_kept_columns_of_a_table_are_what_their_text_stands_for() -> None:
    cells = {
        "a": "72", "b": "1.5", "c": "True", "d": "false", "e": '["x", 2]', "f": "007", "g": "1e5", "h": "1,000",
        "i": "x", "j": "NaN", "k": '"quoted"', "l": "-3",
    }  # fmt: skip
    row = {"prompt": Cell("42"), **{name: Cell(text) for name, text in cells.items()}, "m": None}
    group = group_of(row, keep=(*cells, "m"))
    assert group.prompt == "42"
    assert list(group.columns.values()) == [
        72, 1.5, True, False, ["x", 2], "007", "1e5", "1,000", "x", "NaN", '"quoted"', -3, None,
    ]  # fmt: skip
    assert group_of({"prompt": "p", "a": "72"}, keep=("a",)).columns == {"a": "72"}, "JSON says what is a text"


@pytest.mark.parametrize("label", ["yes", "Good", "thumbs-up", "Thumbs up", "desirable", "👍"])
@pytest.mark.parametrize("good", [True, False])
def test_labels_are_read_as_people_write_them(label: str, good: bool) -> None:
    bad = {"yes": "no", "Good": "BAD", "thumbs-up": "thumbs-down", "desirable": "undesirable", "👍": "👎"}
    (answer,) = group_of(
        {"prompt": "p", "completion": "x", "label": label if good else bad.get(label, "down")}
    ).completions
    assert answer.reward == float(good)


def test_a_message_of_which_parts_are_trained_on_is_refused() -> None:
    parts = {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}
    with pytest.raises(DataError, match="which parts of it are trained on"):
        group_of({"messages": [USER, GOOD | parts]})


@pytest.mark.parametrize(
    "scores",
    [
        {"chosen_reward": 0.1, "rejected_reward": 0.9},
        {"reward_chosen": "0.1", "reward_rejected": "0.9"},
        {"chosen_avg_rating": 1, "rejected_avg_rating": 4},
    ],
)
def test_scores_that_contradict_a_pair_are_seen_by_all_their_usual_names(scores: Row) -> None:
    with pytest.raises(DataError, match="its scores contradict its order"):
        group_of({"prompt": "p", "chosen": "x", "rejected": "y"} | scores)


@pytest.mark.parametrize("beside", [{"role": "prompter"}, {"role": "assistant", "parent_id": "1"}, {"parent_id": None}])
def test_one_message_of_a_tree_is_no_text_to_learn(beside: Row) -> None:
    with pytest.raises(DataError, match="is one message of a conversation"):
        group_of({"text": "Hello?"} | beside)
    assert group_of({"text": "Hello?"} | beside, columns={"text": "text"}).completions[0].text == "Hello?"
    assert group_of({"text": "Hello?", "role": "engineer"}).completions[0].text == "Hello?"


@pytest.mark.parametrize("reason", ["max_tokens", "length", "model_length", "content_filter", "abort"])
def test_what_ends_an_answer_is_read_by_its_other_name_too(reason: str) -> None:
    assert group_of({"prompt": "p", "completion": "x", "stop_reason": reason}).completions[0].truncated
    assert group_of({"messages": [USER, GOOD | {"stop_reason": reason}]}).completions[0].truncated
    assert not group_of({"prompt": "p", "completion": "x", "stop_reason": 151645}).completions[0].truncated


def test_openais_old_functions_are_tools() -> None:
    bare = {"name": "weather", "parameters": {"type": "object"}}
    assert group_of({"messages": [USER, GOOD], "functions": [bare]}).tools == ({"type": "function", "function": bare},)
