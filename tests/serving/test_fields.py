"""What clients send by many spellings, and what the engine has of it."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from serving.http.fields import IGNORED, SMALLEST_TOP_P, SUPPORTED, UNSUPPORTED, to_engine_request
from serving.http.routes.feedback import ComparisonBody, FeedbackBody
from serving.http.routes.openai import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from serving.http.routes.rewards import RewardsBody
from serving.schema import RequestError, parse_json, validation_error_reply

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
    assert to_engine_request("chat", CHAT | more) == CHAT
    assert to_engine_request("completions", TEXT | more) == TEXT


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("best_of", 2, "unsupported_parameter"),
        ("suffix", "x", "unsupported_parameter"),
        ("priority", True, "unsupported_parameter"),
        ("chat_template", "{{ x }}", "unsupported_parameter"),
        ("functions", [{}], "unsupported_parameter"),
        ("temprature", 0.5, "unknown_parameter"),
        ("logits_processors", ["x"], "unknown_parameter"),
        ("repetition_detection", {}, "unsupported_parameter"),
        ("thinking_token_budget", 8, "unsupported_parameter"),
        ("logprob_token_ids", [1], "unsupported_parameter"),
        ("return_token_offsets", True, "unsupported_parameter"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(field: str, value: Any, code: str) -> None:
    for kind, body in (("chat", CHAT), ("completions", TEXT)):
        with pytest.raises(RequestError) as refused:
            to_engine_request(kind, body | {field: value})
        error = json.loads(refused.value.reply.body)["error"]
        assert (refused.value.reply.status, error["code"], error["param"]) == (400, code, field)
        assert field in error["message"]


def test_the_likeliest_token_alone_is_asked_for_in_vllms_way() -> None:
    assert to_engine_request("chat", CHAT | {"top_p": 0})["top_p"] == SMALLEST_TOP_P
    assert to_engine_request("chat", CHAT | {"top_p": 1.0, "temperature": 0})["temperature"] == 0


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
    assert to_engine_request("chat", CHAT | {"messages": [turn]})["messages"] == [seen]


@pytest.mark.parametrize("turn", [{"weight": 1}, {"audio": {"id": "x"}}, {"function_call": {"name": "f"}}])
def test_a_message_with_more_than_texts_is_refused(turn: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        to_engine_request("chat", CHAT | {"messages": [{"role": "assistant", "content": "x", **turn}]})


BODIES: dict[str, tuple[str, ...]] = {
    "chat": ("entrypoints/openai/chat_completion/protocol.py", "ChatCompletionRequest"),
    "completions": ("entrypoints/openai/completion/protocol.py", "CompletionRequest"),
    "tokenize": ("entrypoints/serve/tokenize/protocol.py", "TokenizeCompletionRequest", "TokenizeChatRequest"),
    "detokenize": ("entrypoints/serve/tokenize/protocol.py", "DetokenizeRequest"),
}
"""By kind of request: the file of the installed vLLM, and its classes there."""


def fields_of(kind: str) -> set[str]:
    """What vLLM's requests of a kind may hold, read and not imported, which takes 10 s."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    file, *names = BODIES[kind]
    classes = [node for node in ast.parse((Path(spec.origin).parent / file).read_text()).body]
    return {
        line.target.id
        for node in classes
        if isinstance(node, ast.ClassDef) and node.name in names
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and not line.target.id.startswith("_")
    }


@pytest.mark.parametrize("kind", BODIES)
def test_what_becomes_of_every_field_of_vllms_is_decided(kind: str) -> None:
    fields = fields_of(kind)
    assert "model" in fields and len(fields) > 1
    undecided = {name for name in fields if (name in SUPPORTED[kind]) + (name in IGNORED) + (name in UNSUPPORTED) == 0}
    assert undecided == set()
    # What one kind takes, another may have to refuse; nothing is both taken and ignored.
    everywhere = set.intersection(*(set(each) for each in (SUPPORTED["chat"], SUPPORTED["completions"])))
    assert not (IGNORED & (SUPPORTED[kind] | UNSUPPORTED.keys())) and not (everywhere & UNSUPPORTED.keys())


def test_an_invalid_request_is_told_by_field_and_code_and_without_its_values() -> None:
    problems = [{"type": "missing", "loc": ("body", "messages", 0, "role"), "msg": "Field required", "input": "SECRET"}]
    error = json.loads(validation_error_reply(problems, {"messages": [{}]}).body)["error"]
    assert (error["code"], error["param"]) == ("missing_required_parameter", "messages")
    assert error["message"] == "The request is not valid. messages.0.role: Field required"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "SECRET"}}]}]},
            "messages.0.content.0: There are only texts here: a part has the type text or refusal",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "txt": "SECRET"}]}]},
            "messages.0.content.0: A part has a text under the name that is its type",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content: Input should be a valid string or a valid list",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "stop": 5},
            "stop: Input should be a valid string or a valid list",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": {"b": 1}}},
            "chat_template_kwargs.a: Input should be a valid boolean or a valid integer or a valid number or a valid "
            "string",
        ),
        ({"messages": [{"content": "x"}]}, "messages.0.role: Field required"),
    ],
)
def test_what_may_be_of_several_kinds_is_told_in_one_sentence(more: dict[str, Any], message: str) -> None:
    body = {"model": "m", **more}
    with pytest.raises(ValidationError) as error:
        ChatBody.model_validate(body)
    told = json.loads(validation_error_reply(error.value.errors(), body).body)["error"]["message"]
    assert told == f"The request is not valid. {message}"


MANY: list[tuple[type[BaseModel], dict[str, Any]]] = [
    *((CompletionBody, {**TEXT, "prompt": [wrong] * 1000}) for wrong in (None, {}, -1, [None], [[]], [-1])),
    (CompletionBody, {**TEXT, "prompt": [[-1] * 1000]}),
    (CompletionBody, {**TEXT, "stop": [1] * 1000}),
    (ChatBody, {**CHAT, "messages": [{}] * 1000}),
    *(
        (ChatBody, {**CHAT, "messages": [{"role": "user", "content": [wrong] * 1000}]})
        for wrong in (1, {}, text("x", a=1))
    ),
    (ChatBody, {**CHAT, "messages": [{"role": "assistant", "tool_calls": [{}] * 1000}]}),
    (ChatBody, {**CHAT, "tools": [{}] * 1000}),
    (TokenizeBody, {**CHAT, "messages": [{}] * 1000}),
    (TokenizeBody, {**TEXT, "tools": [{}] * 1000}),
    (DetokenizeBody, {"model": "m", "tokens": ["x"] * 1000}),
    (RewardsBody, {"items": [{}] * 1000}),
    (RewardsBody, {"items": [{"messages": [{}] * 1000, "completions": [1] * 1000}]}),
    (ComparisonBody, {"messages": [{}] * 1000, "versions": ["x"] * 1000}),
    (FeedbackBody, {"kind": "ranking", "id": "x", "order": [1] * 1000}),
]


@pytest.mark.parametrize(("kind", "body"), MANY)
def test_a_list_of_wrong_members_is_wrong_once(kind: type[BaseModel], body: dict[str, Any]) -> None:
    """Each problem costs microseconds of the event loop, and a body has room for 100,000."""
    with pytest.raises(ValidationError) as error:
        kind.model_validate(body)
    assert error.value.error_count() < 10


def test_an_object_of_too_many_members_is_refused_before_each_is_a_problem() -> None:
    members = dict.fromkeys(map(str, range(10_001)), 1)
    for body in (members, {"messages": [{"content": [members]}]}):
        with pytest.raises(RequestError, match="more than 10000 members"):
            parse_json(json.dumps(body).encode())
    assert len(parse_json(json.dumps({"logit_bias": dict.fromkeys(map(str, range(10_000)), 1)}).encode())) == 1


def test_a_header_that_is_not_valid_is_told_by_its_name() -> None:
    problems = [{"type": "string_too_long", "loc": ("header", "idempotency-key"), "msg": "It is too long"}]
    assert "header.idempotency-key: It is too long" in validation_error_reply(problems, {"kind": "thumb"}).body
