"""Every shape that people keep preferences in becomes the same Group; every unusable row says why."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from typing import Any

import pytest

from alignment.config import SourceConfig
from alignment.data.shapes import to_group
from alignment.errors import DataError
from alignment.types import Completion, Group, Message
from tests.conftest import SHARED_DATA

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
    ],
)
def test_an_unusable_row_says_why(row: Row, settings: Row, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        group_of(row, **settings)
    assert str(caught.value).startswith(expected)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("file", "usable"),
    [("stack_exchange_paired/data/rl/train.jsonl.gz", 1.0), ("hh_rlhf/harmless.train.jsonl.gz", 0.98)],
)
def test_real_preferences_are_nearly_all_usable(file: str, usable: float) -> None:
    path = SHARED_DATA / file
    if not path.exists():
        pytest.skip(f"{path} is absent")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 500)]
    groups = []
    for row in rows:
        try:
            groups.append(group_of(row))
        except DataError as error:
            assert str(error) in ("chosen and rejected do not share their prompt", "an answer is empty")
    assert len(groups) >= usable * len(rows)
    assert all(group.pairs == [(0, 1)] for group in groups)
