"""Reads the engine's answers, and makes the records that the store keeps: prompts, answers, and the answers' ids."""

from __future__ import annotations

import json
import time
from typing import Any, Literal

from alignment.rewards.remote import ChatMessage
from serving.feedback.store.records import GenerationRecord, RecordedAnswer

GenerationKind = Literal["chat", "completion", "comparison"]
SAMPLING = {
    *("model", "messages", "prompt", "request_id"),
    *("max_tokens", "max_completion_tokens", "min_tokens", "n", "seed", "stop", "stop_token_ids"),
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("stream", "stream_options", "stream_interval"),
    *("logprobs", "top_logprobs", "return_token_ids", "return_tokens_as_token_ids"),
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
}
"""Fields that change how an answer is sampled, and nothing of what the model reads or may write."""
DEFAULTS = {
    "add_generation_prompt": True,
    "add_special_tokens": None,
    "best_of": 1,
    "parallel_tool_calls": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "tool_choice": "none",
}
"""Values of other fields that ask for nothing; for all fields, null, false and empty values ask for nothing."""
UNFINISHED = '"finish_reason":null'
"""What stands only in a chunk that holds nothing but text: in the text itself, quotation marks are escaped."""
ROLES = ("system", "user", "assistant")
BASE = 0
"""The version number of a base model, which has no number of its own."""


def version_number(label: str | None) -> int:
    """Returns the number of a version from an answer's label; `BASE` for a base model."""
    return int(label) if label is not None and label.isdigit() else BASE


class Transcript:
    """Collects what an answer says while it comes: reading a long answer at its end would delay all others."""

    def __init__(self, engine_request: dict[str, Any], *, keeps_texts: bool) -> None:
        """
        Args:
            engine_request: the request that is answered.
            keeps_texts: whether the configuration lets texts be kept. They are kept if a training row can hold the
                request.
        """
        self.reason = unrecordable_reason(engine_request) if keeps_texts else "feedback.record is off"
        """Why texts are not kept; None if they are kept."""
        self.id: str | None = None
        self.model = ""
        self.texts: dict[int, list[str]] = {}
        """The pieces of each answer's text, by the index of the answer."""
        self.finish_reasons: dict[int, str | None] = {}
        """Why each answer ended, by the index of the answer; None while it has not."""
        self.usage: dict[str, Any] | None = None
        """Numbers of tokens, in OpenAI's form."""
        self.error: str | None = None
        """Code of the error with which the stream broke off."""
        self.problem: Exception | None = None
        """Why something could not be read."""

    def add_events(self, events: str) -> None:
        """Adds server-sent events. It raises nothing, since an answer must not fail because it cannot be recorded."""
        try:
            for line in events.split("\n"):
                if line.startswith("data: {") and (self.reason is None or self.id is None or UNFINISHED not in line):
                    self.add_chunk(json.loads(line.removeprefix("data: ")))
        except Exception as error:  # of any kind: the form of answers may change with the next engine
            self.problem = error

    def add_chunk(self, chunk: dict[str, Any]) -> None:
        """Adds a whole answer, or a chunk of a stream."""
        if "error" in chunk:
            self.error = str(chunk["error"].get("code"))
        if "id" not in chunk:
            return
        self.usage = chunk.get("usage") or self.usage
        self.id, self.model = self.id or chunk["id"], chunk["model"]
        for choice in chunk.get("choices", ()):
            index = choice["index"]
            self.texts.setdefault(index, []).append(_text(choice) if self.reason is None else "")
            self.finish_reasons[index] = _finish_reason(choice) or self.finish_reasons.get(index)


def generation_record(
    kind: GenerationKind, engine_request: dict[str, Any], transcript: Transcript, *, version: str | None, asked_by: str
) -> GenerationRecord | None:
    """Returns the record of a completion that was given to a client; None if the engine gave no answer.

    Raises:
        Exception: the answer could not be read.
    """
    if transcript.problem is not None:
        raise transcript.problem
    if transcript.id is None:
        return None
    return GenerationRecord(
        id=transcript.id,
        kind=kind,
        prompt="" if transcript.reason else prompt_of(engine_request),
        answers=tuple(
            RecordedAnswer(
                id=f"{transcript.id}-{index}",
                text="".join(transcript.texts[index]),
                version=version_number(version),
                model=transcript.model,
                finish_reason=transcript.finish_reasons[index],
            )
            for index in sorted(transcript.texts)
        ),
        asked_by=asked_by,
        created=time.time(),
        recorded=transcript.reason is None,
        reason=transcript.reason,
    )


def unrecordable_reason(engine_request: dict[str, Any]) -> str | None:
    """Returns why no training row can hold a request: what the model read, and what it could write.

    Returns:
        The reason as a clause for people; None if a training row can hold the request.
    """
    other_fields = sorted(
        name for name, value in engine_request.items() if name not in SAMPLING and not _is_default(name, value)
    )
    if other_fields:
        return f"the request set {', '.join(other_fields)}"[:200]
    if "messages" not in engine_request:
        prompt = engine_request["prompt"]
        is_text = isinstance(prompt, str) or (len(prompt) == 1 and isinstance(prompt[0], str))
        return None if is_text else "the request held several prompts, or token ids"
    for message in engine_request["messages"]:
        if message["role"] not in ROLES:
            return f"the chat holds a message of the role {message['role']}"
        if _plain_text(message.get("content")) is None or any(
            message.get(name) for name in message.keys() - {"role", "content"}
        ):
            return "a message of the chat holds more than a text"
    return None


def _is_default(name: str, value: Any) -> bool:
    return value in (None, False, [], {}, "") or value == DEFAULTS.get(name)


def prompt_of(engine_request: dict[str, Any]) -> str | tuple[ChatMessage, ...]:
    """Returns the prompt of a request that a training row can hold (see `unrecordable_reason`)."""
    if "messages" not in engine_request:
        prompt = engine_request["prompt"]
        return str(prompt if isinstance(prompt, str) else prompt[0])
    return tuple(
        ChatMessage(role=message["role"], content=_plain_text(message["content"]) or "")
        for message in engine_request["messages"]
    )


def _finish_reason(choice: dict[str, Any]) -> str | None:
    """Returns OpenAI's reason, but `length` for an answer that ended at a stop text or stop token of the request.

    The model would have continued there, so that no end token may be learned.
    """
    ended_by_request = choice.get("finish_reason") == "stop" and choice.get("stop_reason") is not None
    return "length" if ended_by_request else choice.get("finish_reason")


def _text(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return choice["text"] or ""
    return (choice.get("message") or choice.get("delta") or {}).get("content") or ""


def _plain_text(content: Any) -> str | None:
    """Returns a message's content as one text, since OpenAI's clients may send it in parts; None if it is no text."""
    if isinstance(content, list):
        return "\n".join(content_part["text"] for content_part in content)  # as `serving.http.fields` joins them
    return content if isinstance(content, str) else None
