"""What programs that speak OpenAI's API send, in their own words, up to where the engine would have it.

The bodies were written down from openai 3.57.0, langchain-openai 1.7.4, litellm 1.110.2 and lm-eval, and shortened.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from serving.http.fields import to_engine_request
from serving.http.routes.openai import ChatBody, CompletionBody
from serving.schema import RequestError, validation_error_reply

ASKED: dict[str, Any] = {"role": "user", "content": "Weather in Bonn?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
STRICT: dict[str, Any] = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
LANGCHAIN_TEXT = {"frequency_penalty": 0, "logprobs": None, "n": 1, "presence_penalty": 0, "seed": None, "top_p": 1}
"""What langchain-openai's `OpenAI` sends with every prompt."""


def engine_fields(kind: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the engine has of a body, but for the model's name."""
    body = {"model": "m", **body}
    (ChatBody if kind == "chat" else CompletionBody).model_validate(body)
    return {name: value for name, value in to_engine_request(kind, body).items() if name != "model"}


def error_of(kind: str, body: dict[str, Any]) -> dict[str, Any]:
    """The error that is answered instead."""
    try:
        fields = engine_fields(kind, body)
    except ValidationError as error:
        reply = validation_error_reply(error.errors(), body)
    except RequestError as refused:
        reply = refused.reply
    else:
        raise AssertionError(f"this was taken as {fields}")
    assert reply.status == 400
    return dict(json.loads(reply.body)["error"])


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        pytest.param({"stream": False, "tools": [WEATHER]}, {"stream": False, "tools": [WEATHER]}, id="bind_tools"),
        pytest.param(
            {"tools": [WEATHER], "tool_choice": NAMED, "parallel_tool_calls": False},
            {"tools": [STRICT], "tool_choice": NAMED, "parallel_tool_calls": False},
            id="function_calling",
        ),
        pytest.param({"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {}, id="no tools"),
        pytest.param({"tools": None, "tool_choice": "none"}, {}, id="null for tools"),
        pytest.param({"tool_choice": "auto"}, {}, id="a choice of nothing"),
        pytest.param({"stream_options": {"include_usage": False}}, {}, id="options of no stream"),
        pytest.param(
            {"stream": True, "stream_options": {"include_usage": True}},
            {"stream": True, "stream_options": {"include_usage": True}},
            id="stream",
        ),
        pytest.param({"stop": "", "echo": False}, {}, id="empty stop"),
        pytest.param({"n": 2, "best_of": 2}, {"n": 2}, id="the best of as many"),
    ],
)
def test_what_a_client_sends_with_a_chat_comes_to_the_engine_without_what_says_nothing(
    more: dict[str, Any], seen: dict[str, Any]
) -> None:
    assert engine_fields("chat", {"messages": [ASKED], **more}) == {"messages": [ASKED], **seen}


def test_a_call_and_what_came_of_it_are_taken_as_clients_send_them_back() -> None:
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    for call in (
        {"role": "assistant", "content": None, "tool_calls": [CALL]},  # langchain-openai
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]},  # openai
        {"role": "assistant", "tool_calls": [CALL]},  # litellm
    ):
        turns = engine_fields("chat", {"messages": [ASKED, call, result]})["messages"]
        assert turns[1]["tool_calls"] == [CALL] and turns[1].get("content") is None
        assert turns[2] == result


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_that_has_to_be_made_has_an_object_for_arguments(choice: Any) -> None:
    """Where a tool is not strict, vLLM has it called with any JSON."""
    nothing = {"type": "object", "properties": {}}
    for given, seen in (({}, nothing), ({"parameters": {}}, nothing), ({"parameters": CITY, "strict": False}, CITY)):
        tool = {"type": "function", "function": {"name": "weather", **given}}
        body = {"messages": [ASKED], "tools": [tool], "tool_choice": choice}
        (function,) = (tool["function"] for tool in engine_fields("chat", body)["tools"])
        assert (function["parameters"], function["strict"]) == (seen, True)
    for wrong in ({"type": "array"}, "x", [1], True):
        tool = {"type": "function", "function": {"name": "weather", "parameters": wrong}}
        error = error_of("chat", {"messages": [ASKED], "tools": [tool], "tool_choice": choice})
        assert (error["code"], error["param"]) == ("invalid_function_parameters", "tools[0].function.parameters")


def test_a_message_that_says_that_it_is_text_is_one() -> None:
    """As those of earlier versions of lm-eval do."""
    assert engine_fields("chat", {"messages": [{**ASKED, "type": "text"}]})["messages"] == [ASKED]
    assert error_of("chat", {"messages": [{**ASKED, "type": "image"}]})["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (
            {"prompt": ["One", "Two"], "max_tokens": 8, "temperature": 0.7, **LANGCHAIN_TEXT},
            {"prompt": ["One", "Two"], "max_tokens": 8, "temperature": 0.7, **LANGCHAIN_TEXT},
        ),
        ({"prompt": ["One"], "n": 2, "best_of": 2}, {"prompt": ["One"], "n": 2}),
        (
            {"prompt": [[1, 2]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True},
            {"prompt": [[1, 2]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True},
        ),
    ],
    ids=["langchain-openai", "langchain-openai, best_of", "lm-eval"],
)
def test_what_a_client_sends_with_a_prompt_comes_to_the_engine(body: dict[str, Any], seen: dict[str, Any]) -> None:
    assert engine_fields("completions", body) == {name: value for name, value in seen.items() if value is not None}


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("tools", {"tools": 5, "tool_choice": NAMED}),
        ("tools", {"tools": [5], "tool_choice": NAMED}),
        ("tools", {"tools": [{"type": "custom", "custom": {"name": "c"}}], "tool_choice": NAMED}),
        ("tools", {"tools": [{"type": "function", "function": {}}], "tool_choice": NAMED}),
        ("messages", {"messages": [ASKED, {"role": "assistant", "tool_calls": 5}]}),
        ("messages", {"messages": [ASKED, {"role": "assistant", "tool_calls": [5]}]}),
        ("messages", {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"id": "a"}]}]}),
        ("messages", {"messages": [{**ASKED, "name": 5}]}),
        ("messages", {"messages": [{"role": "tool", "tool_call_id": 5, "content": "x"}]}),
    ],
)
def test_tools_and_calls_of_the_wrong_shape_are_refused_before_the_engine_trips_over_them(
    param: str, body: dict[str, Any]
) -> None:
    """vLLM's checks look into them before it knows what they are."""
    assert error_of("chat", {"messages": [ASKED], **body})["param"] == param


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        ({"prompt": "Hi", "messages": None, "add_special_tokens": None}, {"prompt": "Hi"}),
        ({"messages": [ASKED], "prompt": None, "add_generation_prompt": None}, {"messages": [ASKED]}),
        ({"prompt": "Hi", "add_special_tokens": False}, {"prompt": "Hi", "add_special_tokens": False}),
    ],
)
def test_null_says_nothing_about_tokens_either(body: dict[str, Any], seen: dict[str, Any]) -> None:
    assert to_engine_request("tokenize", body) == seen


def test_more_choices_than_answers_are_not_made() -> None:
    for n in ({}, {"n": 1}, {"n": 3}):
        assert error_of("completions", {"prompt": "One", "best_of": 2, **n})["param"] == "best_of"
