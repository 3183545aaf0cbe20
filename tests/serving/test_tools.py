"""Tools through the real OpenAI client: the template teaches a form of calls, and the model writes what it has to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.serving.conftest import BASE, Running, with_tools
from tests.serving.test_endpoint import MESSAGES
from tests.serving.test_feedback_routes import exported, judge

CITY = {"type": "string", "enum": ["Bonn", "Paris"]}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": CITY}, "required": ["city"]},
    },
}
NOW: Any = {"type": "function", "function": {"name": "now", "description": "The time."}}
TOOLS: list[Any] = [WEATHER, NOW]
ENDS = {"parallel_tool_calls": False}
"""With one call, whatever the model would like to write after it."""


def named(tool: Any) -> Any:
    return {"type": "function", "function": {"name": tool["function"]["name"]}}


def calls_of(endpoint: Running, *, stream: bool, **more: Any) -> tuple[list[tuple[str, str]], str | None]:
    """Names and arguments of the calls, and how the answer ended."""
    asked: dict[str, Any] = {"model": BASE, "messages": MESSAGES, "max_tokens": 120, "temperature": 0, **more}
    if not stream:
        (choice,) = endpoint.client.chat.completions.create(**asked).choices
        calls: list[Any] = choice.message.tool_calls or []
        assert all(call.id and call.type == "function" for call in calls)
        return [(call.function.name, call.function.arguments) for call in calls], choice.finish_reason
    found: dict[int, list[str]] = {}
    reason = None
    for chunk in endpoint.client.chat.completions.create(**asked, stream=True):
        for streamed in chunk.choices:
            reason = streamed.finish_reason or reason
            for call in streamed.delta.tool_calls or []:
                name, arguments = found.setdefault(call.index, ["", ""])
                assert call.function is not None
                found[call.index] = [name + (call.function.name or ""), arguments + (call.function.arguments or "")]
    return [(name, arguments) for name, arguments in found.values()], reason


@pytest.mark.parametrize(("tool", "stream"), [(WEATHER, False), (WEATHER, True), (NOW, False)])
def test_a_tool_that_is_named_is_called_with_an_object(endpoint: Running, tool: Any, stream: bool) -> None:
    ((name, arguments),), reason = calls_of(endpoint, stream=stream, tools=TOOLS, tool_choice=named(tool))
    assert name == tool["function"]["name"] and reason in ("stop", "tool_calls")
    values = json.loads(arguments)
    assert values == {} if tool is NOW else values["city"] in CITY["enum"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_where_a_call_is_required_every_call_has_an_object(endpoint: Running, stream: bool) -> None:
    calls, reason = calls_of(endpoint, stream=stream, tools=[WEATHER], tool_choice="required", **ENDS)
    assert [name for name, _ in calls] == ["weather"] and reason == "tool_calls"
    assert json.loads(calls[0][1])["city"] in CITY["enum"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_call_that_the_model_makes_by_itself_is_read(endpoint: Running, stream: bool) -> None:
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
    more = {"extra_body": {"structured_outputs": {"choice": [written]}}}
    calls, reason = calls_of(endpoint, stream=stream, tools=TOOLS, **more)
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("weather", {"city": "Bonn"})]
    assert reason == "tool_calls"
    text = endpoint.client.chat.completions.create(
        model=BASE, messages=MESSAGES, tools=TOOLS, extra_body={"structured_outputs": {"choice": ["No call."]}}
    )
    assert text.choices[0].message.content == "No call." and not text.choices[0].message.tool_calls


def test_what_came_of_a_call_is_read_as_its_template_writes_it(endpoint: Running, writer: Path) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    turns: list[Any] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(writer)
    template = with_tools(tokenizer.chat_template)
    object_of = {**call["function"], "arguments": {"city": "Bonn"}}  # type: ignore[dict-item]  # as templates want it
    read: list[Any] = [turns[0], {**turns[1], "content": "", "tool_calls": [{**call, "function": object_of}]}, turns[2]]
    expected = tokenizer.apply_chat_template(
        read, tools=TOOLS[:1], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    asked = {"model": BASE, "messages": turns, "tools": TOOLS[:1]}
    tokens = endpoint.ask("POST", "/tokenize", asked).json()["tokens"]
    text = endpoint.ask("POST", "/detokenize", {"model": BASE, "tokens": tokens}).json()["prompt"]
    unknown = endpoint.ask("POST", "/detokenize", {"model": BASE, "tokens": [*tokens, 1_000_000]})
    assert unknown.status_code == 400 and "out of the vocabulary" in unknown.text
    assert text == expected
    answer = endpoint.ask("POST", "/v1/chat/completions", {**asked, "max_tokens": 1})
    assert answer.json()["usage"]["prompt_tokens"] == len(tokens)


def test_an_answer_with_tools_is_judged_and_the_reason_why_nothing_is_learned_is_told(endpoint: Running) -> None:
    before = len(exported(endpoint))
    answer = endpoint.client.chat.completions.create(
        model=BASE, messages=MESSAGES, tools=TOOLS, tool_choice="none", max_tokens=2
    )
    assert judge(endpoint, kind="thumb", id=answer.id, up=True)["note"] == (
        "Nothing is learned from this: the texts were not kept, since the request set tools."
    )
    assert len(exported(endpoint)) == before
