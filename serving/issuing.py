"""From what the engine said to what the store keeps: prompt, answers, and the ids by which people can judge them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any, Literal

from alignment.rewards.remote import ChatMessage
from serving.store.records import Issued, IssuedAnswer

Kind = Literal["chat", "completion", "comparison"]
BESIDE_MESSAGES = ("tools", "documents", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
"""Fields of a chat that change what its template makes of the messages."""
BASE = 0
"""The version number of a base model, which has none."""


def number_of(label: str | None) -> int:
    """The number of a version as answers are labelled with it."""
    return int(label) if label is not None and label.isdigit() else BASE


def issued(
    kind: Kind, asked: dict[str, Any], said: list[dict[str, Any]], *, version: str | None, asked_by: str, recorded: bool
) -> Issued:
    """A completion that was given to a client.

    Args:
        said: the whole answer, or the chunks of a stream, as JSON objects.
    """
    texts: dict[int, list[str]] = {}
    ends: dict[int, str | None] = {}
    for part in said:
        for choice in part.get("choices", ()):
            place = choice["index"]
            texts.setdefault(place, []).append(_text(choice))
            ends[place] = choice.get("finish_reason") or ends.get(place)
    prompt = prompt_of(asked)
    return Issued(
        id=said[0]["id"],
        kind=kind,
        prompt="" if prompt is None else prompt,
        answers=tuple(
            IssuedAnswer(
                id=f"{said[0]['id']}-{place}",
                text="".join(texts[place]),
                version=number_of(version),
                model=said[0]["model"],
                finish_reason=ends[place],
            )
            for place in sorted(texts)
        ),
        asked_by=asked_by,
        created=time.time(),
        recorded=recorded and prompt is not None,
    )


def prompt_of(asked: dict[str, Any]) -> str | tuple[ChatMessage, ...] | None:
    """The prompt of a request, if a training row can hold what the model saw; else None.

    A row cannot hold prompts that were given as tokens, several prompts, messages with more than texts, and chats whose
    template was given something besides the messages.
    """
    if "messages" not in asked:
        prompt = asked["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        return prompt if isinstance(prompt, str) else None
    if any(asked.get(name) not in (None, [], {}) for name in BESIDE_MESSAGES):
        return None
    turns = [(turn["role"], _plain(turn.get("content"))) for turn in asked["messages"]]
    if any(content is None or role not in ("system", "user", "assistant") for role, content in turns):
        return None
    return tuple(ChatMessage(role=role, content=content) for role, content in turns)


def chunks(events: Iterable[str]) -> list[dict[str, Any]]:
    """The JSON objects of server-sent events, without errors and the end mark."""
    lines = (line for text in events for line in text.split("\n") if line.startswith("data: {"))
    found = [json.loads(line.removeprefix("data: ")) for line in lines]
    return [chunk for chunk in found if "id" in chunk]


def _text(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return choice["text"] or ""
    return (choice.get("message") or choice.get("delta") or {}).get("content") or ""


def _plain(content: Any) -> str | None:
    """A message's content as one text: OpenAI's clients may send it in parts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else None
