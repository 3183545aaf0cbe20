"""Every shape that people keep preferences in, turned into a Group."""

from __future__ import annotations

import dataclasses
import re
import string
from typing import Any

from alignment.config import SourceConfig
from alignment.data.sources import Row
from alignment.errors import DataError
from alignment.types import Completion, Group, Message

STACK_EXCHANGE = {"chosen": "response_j", "rejected": "response_k"}
STACK_EXCHANGE_PROMPT = "Question: {question}\n\nAnswer: "
FLT_MAX = 3.4e38
"""Rewards become fp32."""
HH_TURN = re.compile(r"\n\n(Human|Assistant):")

Prompt = str | tuple[Message, ...]


def to_group(row: Row, origin: str, source: SourceConfig) -> Group:
    """Reads one row in whichever shape it has, with the columns that `keep` names beside it.

    Shapes, by the fields present (after `columns`): `chosen` + `rejected` with a prompt, as strings or message lists;
    the same without a prompt, as message lists or "\\n\\nHuman: … \\n\\nAssistant: …" transcripts that share their
    beginning; `question` + `response_j` + `response_k`; `completions` + `rewards`; `completion` with or without a
    `label`; `messages`; `text`; a prompt alone.

    Raises:
        DataError: the row is unusable; the text says why, without the origin.
    """
    for column in source.keep:
        if column not in row:
            raise DataError(f"column {column!r} (keep) is missing")
    group = _shaped(row, origin, source)
    return dataclasses.replace(group, columns={column: row[column] for column in source.keep})


def _shaped(row: Row, origin: str, source: SourceConfig) -> Group:
    shape = _Shape(row, source)
    if shape.has("chosen") and shape.has("rejected"):
        prompt, texts = _preference(shape)
        rewards: list[float | None] = [1.0, 0.0]
        if texts[0] == texts[1]:
            raise DataError("chosen and rejected are the same")
    elif shape.has("completions"):
        prompt, texts = shape.prompt(), _strings(shape.value("completions"), "completions")
        if not texts:
            raise DataError("completions is empty")
        rewards = _rewards(shape, len(texts))
    elif shape.has("completion"):
        prompt, texts, rewards = shape.prompt(), [_answer(shape.value("completion"), "completion")], [_label(shape)]
    elif shape.has("messages"):
        return _conversation(_messages(shape.value("messages"), "messages"), origin)
    elif shape.has("text"):
        prompt, texts, rewards = "", [_string(shape.value("text"), "text")], [None]
    elif shape.has("chosen") or shape.has("rejected"):
        raise DataError(f"field {'rejected' if shape.has('chosen') else 'chosen'!r} is missing")
    elif shape.has("prompt"):
        prompt, texts, rewards = shape.prompt(), [], []
    else:
        raise DataError(f"has none of the known fields; its columns are {', '.join(map(repr, row)) or 'none'}")
    for text in texts:
        if not text.strip():
            raise DataError("an answer is empty")
    completions = tuple(Completion(text=text, reward=reward) for text, reward in zip(texts, rewards, strict=True))
    return Group(id=origin, prompt=prompt, completions=completions)


class _Shape:
    """A row seen through `columns` and `prompt_template`."""

    def __init__(self, row: Row, source: SourceConfig) -> None:
        stack_exchange = {"question", *STACK_EXCHANGE.values()} <= row.keys() and not source.columns
        self.row = row
        self.columns = STACK_EXCHANGE if stack_exchange else source.columns
        self.template = source.prompt_template or (STACK_EXCHANGE_PROMPT if stack_exchange else None)
        self.as_message = source.prompt_as == "user_message"
        for field, column in source.columns.items():
            if column not in row:
                raise DataError(f"column {column!r} (columns.{field}) is missing")

    def has(self, field: str) -> bool:
        if field == "prompt" and self.template is not None:
            return True
        return self.row.get(self.columns.get(field, field)) is not None

    def value(self, field: str) -> Any:
        return self.row[self.columns.get(field, field)]

    def prompt(self) -> Prompt:
        if self.template is not None:
            return self._as_configured(_fill(self.template, self.row))
        if not self.has("prompt"):
            raise DataError("field 'prompt' is missing")
        value = self.value("prompt")
        if isinstance(value, str):
            return self._as_configured(_string(value, "prompt"))
        turns = _messages(value, "prompt")
        if not turns:
            raise DataError("prompt is an empty list of messages")
        return turns

    def _as_configured(self, text: str) -> Prompt:
        return (Message(role="user", content=text),) if self.as_message else text


def _fill(template: str, row: Row) -> str:
    names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    missing = sorted(names - row.keys())
    if missing:
        raise DataError(f"column {missing[0]!r} of the prompt template is missing")
    return template.format(**{name: _string(row[name], name) for name in names})


def _preference(shape: _Shape) -> tuple[Prompt, list[str]]:
    values = [shape.value("chosen"), shape.value("rejected")]
    if len({isinstance(value, str) for value in values}) > 1:
        kinds = " and ".join(type(value).__name__ for value in values)
        raise DataError(f"chosen and rejected must be both strings or both lists of messages, not {kinds}")
    if isinstance(values[0], str):
        chosen, rejected = (_string(value, field) for value, field in zip(values, ("chosen", "rejected"), strict=True))
        if shape.has("prompt"):
            return shape.prompt(), [chosen, rejected]
        return _shared_beginning(_transcript(chosen, "chosen"), _transcript(rejected, "rejected"))
    chosen_turns, rejected_turns = _messages(values[0], "chosen"), _messages(values[1], "rejected")
    if len(chosen_turns) == len(rejected_turns) == 1:
        prompt = shape.prompt()
        if isinstance(prompt, str):
            prompt = (Message(role="user", content=prompt),)
        chosen_turns, rejected_turns = (*prompt, *chosen_turns), (*prompt, *rejected_turns)
    return _shared_beginning(chosen_turns, rejected_turns)


def _transcript(text: str, field: str) -> tuple[Message, ...]:
    before, *parts = HH_TURN.split(text)
    if before.strip() or not parts:
        raise DataError(
            f"without a prompt, {field} must be a message list or a '\\n\\nHuman: … Assistant: …' transcript"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(role=roles[speaker], content=content.strip())
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    )


def _shared_beginning(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], list[str]]:
    for turns, field in ((chosen, "chosen"), (rejected, "rejected")):
        if not turns or turns[-1].role != "assistant":
            raise DataError(f"{field} does not end with an assistant's turn")
    if chosen[:-1] != rejected[:-1]:
        raise DataError("chosen and rejected do not share their prompt")
    if len(chosen) == 1:
        raise DataError("chosen and rejected hold no turn before the answer")
    return chosen[:-1], [chosen[-1].content, rejected[-1].content]


def _conversation(turns: tuple[Message, ...], origin: str) -> Group:
    # A conversation that the assistant opens is learned from its first reply on.
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant" and index > 0]
    if not answers:
        raise DataError("messages hold no assistant's turn that answers something")
    first, last = answers[0], answers[-1]
    if any(not turns[index].content.strip() for index in answers):
        raise DataError("an answer is empty")
    answer = Completion(text=turns[first].content, following=turns[first + 1 : last + 1])
    return Group(id=origin, prompt=turns[:first], completions=(answer,))


def _rewards(shape: _Shape, count: int) -> list[float | None]:
    if not shape.has("rewards"):
        return [None] * count
    rewards = shape.value("rewards")
    if not isinstance(rewards, list | tuple) or len(rewards) != count:
        raise DataError(f"rewards must be a list of {count} numbers, one per completion")
    for reward in rewards:
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) <= FLT_MAX:
            raise DataError(f"reward {reward!r:.50} is not a finite number")
    return [float(reward) for reward in rewards]


def _label(shape: _Shape) -> float | None:
    if not shape.has("label"):
        return None
    label = shape.value("label")
    if label not in (0, 1):  # True and False are 1 and 0
        raise DataError(f"label must be true or false, not {label!r}")
    return float(label)


def _answer(value: Any, field: str) -> str:
    """A completion given as a string or as a list with one assistant message."""
    if isinstance(value, str):
        return _string(value, field)
    turns = _messages(value, field)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise DataError(f"{field} must be a string or one assistant message")
    return turns[0].content


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        raise DataError(f"{field} must be a string or a list of messages, not {type(value).__name__}")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise DataError(f"{field} holds something that is not a message with role and content")
        turns.append(
            Message(role=_string(turn["role"], f"{field} role"), content=_string(turn["content"], f"{field} content"))
        )
    return tuple(turns)


def _strings(value: Any, field: str) -> list[str]:
    if not isinstance(value, list | tuple):
        raise DataError(f"{field} must be a list, not {type(value).__name__}")
    return [_answer(item, field) for item in value]


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{field} must be a string, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{field} holds a lone surrogate at character {error.start}, which no tokenizer can read"
        ) from error
    return value
