"""What the service keeps of an answer: under an id of its own, what the model read and wrote, or why not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.feedback.transcript import Transcript, generation_record, unrecordable_reason
from tests.serving.conftest import ALIGNED, Running
from tests.serving.test_feedback_routes import exported, judge

TURNS = [{"role": "user", "content": "Name a colour."}]
CHAT: dict[str, Any] = {"model": "m", "messages": TURNS}
TEXT: dict[str, Any] = {"model": "m", "prompt": "A colour:"}


@pytest.mark.parametrize(
    "asked",
    [
        CHAT,
        CHAT | {"temperature": 0.3, "seed": 1, "n": 2, "stop": ["!"], "stream": True, "logprobs": True, "user": "u"},
        CHAT | {"tools": [], "tool_choice": "none", "response_format": None, "logit_bias": {}, "best_of": 1},
        CHAT | {"add_generation_prompt": True, "skip_special_tokens": True, "parallel_tool_calls": True},
        CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None}]},
        TEXT | {"prompt": ["A colour:"], "echo": False},
    ],
)
def test_what_a_row_can_hold_is_kept(asked: dict[str, Any]) -> None:
    assert unrecordable_reason(asked) is None


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (TEXT | {"echo": True}, "the request set echo"),
        (CHAT | {"truncate_prompt_tokens": 1}, "the request set truncate_prompt_tokens"),
        (CHAT | {"response_format": {"type": "json_object"}}, "the request set response_format"),
        (CHAT | {"allowed_token_ids": [1], "logit_bias": {"1": 5}}, "the request set allowed_token_ids, logit_bias"),
        (CHAT | {"a_field_that_comes_next_year": 1}, "the request set a_field_that_comes_next_year"),
        (CHAT | {"continue_final_message": True, "add_generation_prompt": False}, "set continue_final_message"),
        (TEXT | {"prompt": ["a", "b"]}, "several prompts"),
        (TEXT | {"prompt": [1, 2]}, "token ids"),
        (CHAT | {"messages": [{"role": "developer", "content": "x"}, *TURNS]}, "a message of the role developer"),
        (CHAT | {"messages": [*TURNS, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "more than a text"),
    ],
)
def test_what_no_row_can_hold_is_not_kept_and_the_reason_is(asked: dict[str, Any], reason: str) -> None:
    said = Transcript(asked, keeps_texts=True)
    said.add_chunk(
        {"id": "chatcmpl-1", "model": "m", "choices": [{"index": 0, "text": "secret", "finish_reason": "stop"}]}
    )
    record = generation_record("chat", asked, said, version="1", asked_by="anna")
    assert record is not None
    assert not record.recorded and reason in str(record.reason) and record.prompt == ""


def test_an_answer_that_a_stop_text_ended_is_a_cut_one() -> None:
    choice = {"index": 0, "text": "red", "finish_reason": "stop", "stop_reason": "\n"}
    for stop_reason, finish_reason in (("\n", "length"), (7, "length"), (None, "stop")):
        said = Transcript(TEXT, keeps_texts=True)
        said.add_chunk({"id": "cmpl-1", "model": "m", "choices": [{**choice, "stop_reason": stop_reason}]})
        record = generation_record("completion", TEXT, said, version="1", asked_by="anna")
        assert record is not None and record.answers[0].finish_reason == finish_reason


def event(text: str, place: int = 0, finish_reason: str | None = None) -> str:
    choice = {"index": place, "delta": {"content": text}, "finish_reason": finish_reason}
    return f"data: {json.dumps({'id': 'chatcmpl-1', 'model': 'm', 'choices': [choice]}, separators=(',', ':'))}\n\n"


@pytest.mark.parametrize(("recorded", "texts"), [(True, ["one", 'two "finish_reason":null']), (False, ["", ""])])
def test_a_stream_is_read_as_it_comes_and_texts_only_where_they_are_kept(recorded: bool, texts: list[str]) -> None:
    said = Transcript(CHAT, keeps_texts=recorded)
    said.add_events(event("o") + event("two", 1) + event("n"))
    said.add_events(event("e", finish_reason="length"))
    said.add_events(event(' "finish_reason":null', 1, "stop") + 'data: {"error":{"code":500}}\n\ndata: [DONE]\n\n')
    record = generation_record("chat", CHAT, said, version="1", asked_by="anna")
    assert record is not None and record.recorded == recorded and record.id == "chatcmpl-1"
    assert [answer.text for answer in record.answers] == texts
    assert [answer.finish_reason for answer in record.answers] == ["length", "stop"]


def test_what_cannot_be_read_fails_where_the_answer_is_kept_and_not_before() -> None:
    said = Transcript(CHAT, keeps_texts=True)
    said.add_events('data: {"id":"chatcmpl-1",\n\n')
    with pytest.raises(ValueError, match="Expecting"):
        generation_record("chat", CHAT, said, version="1", asked_by="anna")
    assert generation_record("chat", CHAT, Transcript(CHAT, keeps_texts=True), version="1", asked_by="anna") is None


def asked(endpoint: Running, path: str = "/v1/chat/completions", headers: Any = None, **more: Any) -> Any:
    body = {"model": ALIGNED, "max_tokens": 4, "temperature": 0, **more}
    answer = endpoint.ask("POST", path, body, **(headers or {}))
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("header", ["abc", "abc-0", "x" * 300, "with a blank", "../../etc"])
def test_no_header_becomes_an_id(endpoint: Running, header: str) -> None:
    context = {
        "x_request_id": header,
        "serve_multiplexed_model_id": header,
        "x_session_id": header,
        "x_request_timeout_seconds": "0",
    }
    first, second = (asked(endpoint, headers=context, messages=TURNS).json()["id"] for _ in range(2))
    assert first != second and header not in first + second
    text = f"Corrected after {header}."
    receipt = judge(endpoint, kind="correction", id=second, text=text)
    (row,) = [row for row in exported(endpoint) if row["id"] == receipt["id"]]
    assert row["completions"][-1] == text and receipt["note"] is None


def test_feedback_on_what_was_not_kept_says_why(endpoint: Running) -> None:
    id = asked(endpoint, "/v1/completions", prompt="The sky is", echo=True).json()["id"]
    receipt = judge(endpoint, kind="thumb", id=id, up=True)
    assert "the request set echo" in receipt["note"]
    refused = judge(endpoint, status=400, kind="correction", id=id, text="blue")
    assert "the request set echo" in refused["error"]["message"]
    assert not [row for row in exported(endpoint) if row["id"] == receipt["id"]]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_event_of_a_stream_names_the_version_once(endpoint: Running, path: str) -> None:
    prompt = {"prompt": "data: [DONE] said the"} if path == "/v1/completions" else {"messages": TURNS}
    text = asked(endpoint, path, stream=True, stream_options={"include_usage": True}, **prompt).text
    events = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: {")]
    assert len(events) >= 3
    for event in events:
        assert event.count('"system_fingerprint"') == 1 and json.loads(event)["system_fingerprint"].isdigit()
