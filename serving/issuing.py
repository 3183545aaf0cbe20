"""From what the engine said to what the store keeps: prompt, answers, and the ids by which people can judge them."""

from __future__ import annotations

import json
import time
from typing import Any, Literal

from alignment.rewards.remote import ChatMessage
from serving.store.records import Issued, IssuedAnswer

Kind = Literal["chat", "completion", "comparison"]
SAMPLING = {
    *("model", "messages", "prompt", "request_id"),
    *("max_tokens", "max_completion_tokens", "min_tokens", "n", "seed", "stop", "stop_token_ids"),
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("stream", "stream_options", "stream_interval"),
    *("logprobs", "top_logprobs", "return_token_ids", "return_tokens_as_token_ids"),
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
}
"""Fields that change which answer is drawn, and nothing of what the model reads or may write."""
DEFAULTS = {
    "add_generation_prompt": True,
    "add_special_tokens": None,
    "best_of": 1,
    "parallel_tool_calls": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "tool_choice": "none",
}
"""What other fields are if nobody sets them; null, false and what is empty is that for all."""
UNFINISHED = '"finish_reason":null'
"""In a chunk that holds nothing but text; in a text, the quotation marks would be escaped."""
ROLES = ("system", "user", "assistant")
BASE = 0
"""The version number of a base model, which has none."""


def number_of(label: str | None) -> int:
    """The number of a version as answers are labelled with it."""
    return int(label) if label is not None and label.isdigit() else BASE


class Transcript:
    """What an answer says, read as it comes: a long one would else hold up all others when it ends."""

    def __init__(self, asked: dict[str, Any], *, recorded: bool) -> None:
        """`recorded`: whether texts may be kept; they are, if a training row can hold the request."""
        self.reason = why_unrecorded(asked) if recorded else "feedback.record is off"
        """Why texts are not kept; None if they are."""
        self.id: str | None = None
        self.model = ""
        self.texts: dict[int, list[str]] = {}
        """By the place of the answer among those to one request."""
        self.ends: dict[int, str | None] = {}
        """The finish reasons."""
        self.usage: dict[str, Any] | None = None
        """Its numbers of tokens."""
        self.error: str | None = None
        """Code of the error that it broke off with."""
        self.problem: Exception | None = None
        """Why something of it could not be read."""

    def read(self, events: str) -> None:
        """Adds server-sent events; the end mark says nothing. Fails nobody's answer."""
        try:
            for line in events.split("\n"):
                if line.startswith("data: {") and (self.reason is None or self.id is None or UNFINISHED not in line):
                    self.add(json.loads(line.removeprefix("data: ")))
        except Exception as error:  # of any kind: what an engine says may change with the next one
            self.problem = error

    def add(self, part: dict[str, Any]) -> None:
        """Adds a whole answer, or a chunk of a stream."""
        if "error" in part:
            self.error = str(part["error"].get("code"))
        if "id" not in part:
            return
        self.usage = part.get("usage") or self.usage
        self.id, self.model = self.id or part["id"], part["model"]
        for choice in part.get("choices", ()):
            place = choice["index"]
            self.texts.setdefault(place, []).append(_text(choice) if self.reason is None else "")
            self.ends[place] = _finish_reason(choice) or self.ends.get(place)


def issued(kind: Kind, asked: dict[str, Any], said: Transcript, *, version: str | None, asked_by: str) -> Issued | None:
    """A completion that was given to a client; None if nothing was said.

    Raises:
        Exception: it could not be read.
    """
    if said.problem is not None:
        raise said.problem
    if said.id is None:
        return None
    return Issued(
        id=said.id,
        kind=kind,
        prompt="" if said.reason else prompt_of(asked),
        answers=tuple(
            IssuedAnswer(
                id=f"{said.id}-{place}",
                text="".join(said.texts[place]),
                version=number_of(version),
                model=said.model,
                finish_reason=said.ends[place],
            )
            for place in sorted(said.texts)
        ),
        asked_by=asked_by,
        created=time.time(),
        recorded=said.reason is None,
        reason=said.reason,
    )


def why_unrecorded(asked: dict[str, Any]) -> str | None:
    """Why no training row can hold what a request made the model read and allowed it to write; None if one can."""
    others = sorted(name for name, value in asked.items() if name not in SAMPLING and not _is_default(name, value))
    if others:
        return f"the request set {', '.join(others)}"[:200]
    if "messages" not in asked:
        prompt = asked["prompt"]
        is_text = isinstance(prompt, str) or (len(prompt) == 1 and isinstance(prompt[0], str))
        return None if is_text else "the request held several prompts, or token ids"
    for turn in asked["messages"]:
        if turn["role"] not in ROLES:
            return f"the chat holds a message of the role {turn['role']}"
        if _plain(turn.get("content")) is None or any(turn.get(name) for name in turn.keys() - {"role", "content"}):
            return "a message of the chat holds more than a text"
    return None


def _is_default(name: str, value: Any) -> bool:
    return value in (None, False, [], {}, "") or value == DEFAULTS.get(name)


def prompt_of(asked: dict[str, Any]) -> str | tuple[ChatMessage, ...]:
    """The prompt of a request that a training row can hold (`why_unrecorded`)."""
    if "messages" not in asked:
        prompt = asked["prompt"]
        return str(prompt if isinstance(prompt, str) else prompt[0])
    return tuple(ChatMessage(role=turn["role"], content=_plain(turn["content"]) or "") for turn in asked["messages"])


def _finish_reason(choice: dict[str, Any]) -> str | None:
    """As OpenAI calls it, but `length` for an answer that a text or token of the request's ended: the model would have
    gone on, so that no end token may be learned there."""
    ended_by_request = choice.get("finish_reason") == "stop" and choice.get("stop_reason") is not None
    return "length" if ended_by_request else choice.get("finish_reason")


def _text(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return choice["text"] or ""
    return (choice.get("message") or choice.get("delta") or {}).get("content") or ""


def _plain(content: Any) -> str | None:
    """A message's content as one text: OpenAI's clients may send it in parts."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)  # as `serving.fields` joins them
    return content if isinstance(content, str) else None
