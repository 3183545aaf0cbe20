"""What clients send by many spellings, and what the engine has of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.fields import SMALLEST_TOP_P, taken
from serving.schema import Refused, invalid

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "Hi"}


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **more}


@pytest.mark.parametrize(
    "more",
    [
        {"best_of": 1, "suffix": "", "prompt_logprobs": None, "use_beam_search": False, "priority": 0},
        {"tools": [], "functions": [], "logit_bias": {}, "stop": [], "function_call": None, "audio": None},
        {"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x", "verbosity": "low"},
        {"chat_template": None, "request_id": None, "a_field_of_next_year": None, "modalities": ["text"]},
    ],
)
def test_what_asks_for_nothing_is_left_out(more: dict[str, Any]) -> None:
    assert taken("chat", CHAT | more) == CHAT
    assert taken("completions", TEXT | more) == TEXT


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("best_of", 2, "unsupported_parameter"),
        ("suffix", "x", "unsupported_parameter"),
        ("priority", True, "unsupported_parameter"),
        ("chat_template", "{{ x }}", "unsupported_parameter"),
        ("functions", [{}], "unsupported_parameter"),
        ("temprature", 0.5, "unknown_parameter"),
        ("session_id", "x", "unknown_parameter"),
        ("logits_processors", ["x"], "unknown_parameter"),
        ("repetition_detection", {}, "unknown_parameter"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(field: str, value: Any, code: str) -> None:
    for kind, body in (("chat", CHAT), ("completions", TEXT)):
        with pytest.raises(Refused) as refused:
            taken(kind, body | {field: value})
        error = json.loads(refused.value.reply.body)["error"]
        assert (refused.value.reply.status, error["code"], error["param"]) == (400, code, field)
        assert field in error["message"]


def test_the_likeliest_token_alone_is_asked_for_in_vllms_way() -> None:
    assert taken("chat", CHAT | {"top_p": 0})["top_p"] == SMALLEST_TOP_P
    assert taken("chat", CHAT | {"top_p": 1.0, "temperature": 0})["temperature"] == 0


@pytest.mark.parametrize(
    ("turn", "seen"),
    [
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "b"}],
            },
            {"role": "user", "content": "a\nb"},
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "refusal": "No.",
                "tool_calls": [],
                "annotations": [],
                "audio": None,
            },
            {"role": "assistant", "content": "No."},
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "assistant", "content": "No."},
        ),
        (
            {"role": "function", "name": "weather", "content": "sunny"},
            {"role": "tool", "name": "weather", "tool_call_id": "weather", "content": "sunny"},
        ),
        ({"role": "user", "content": "x", "name": "anna"}, {"role": "user", "content": "x", "name": "anna"}),
    ],
)
def test_messages_are_what_a_template_reads(turn: dict[str, Any], seen: dict[str, Any]) -> None:
    assert taken("chat", CHAT | {"messages": [turn]})["messages"] == [seen]


@pytest.mark.parametrize("turn", [{"weight": 1}, {"audio": {"id": "x"}}, {"function_call": {"name": "f"}}])
def test_a_message_with_more_than_texts_is_refused(turn: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        taken("chat", CHAT | {"messages": [{"role": "assistant", "content": "x", **turn}]})


def test_an_invalid_request_is_told_by_field_and_code_and_without_its_values() -> None:
    problems = [{"type": "missing", "loc": ("body", "messages", 0, "role"), "msg": "Field required", "input": "SECRET"}]
    error = json.loads(invalid(problems).body)["error"]
    assert (error["code"], error["param"]) == ("missing_required_parameter", "messages")
    assert error["message"] == "The request is not valid. messages.0.role: Field required"
