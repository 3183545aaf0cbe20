"""Pairs: `chosen` and `rejected`, with a prompt or with the conversation that both begin with."""

from __future__ import annotations

import re

from alignment.data.rows.answers import make_group
from alignment.data.rows.cells import read_text
from alignment.data.rows.fields import RowFields
from alignment.data.rows.messages import Prompt, join_prompt, read_messages
from alignment.data.rows.shape import RowShape
from alignment.errors import DataError
from alignment.groups import Group, Message

HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def _read_pair(fields: RowFields, origin: str) -> Group:
    prompt, answers = _read_preference(fields)
    if answers[0] == answers[1]:
        raise DataError("chosen and rejected are the same")
    return make_group(fields, origin, prompt, answers, [1.0, 0.0])


def _read_half_pair(fields: RowFields, origin: str) -> Group:
    raise DataError(f"field {'rejected' if fields.has_field('chosen') else 'chosen'!r} is missing")


def _read_preference(fields: RowFields) -> tuple[Prompt, list[Message]]:
    values = [fields.turns("chosen"), fields.turns("rejected")]
    if len({isinstance(value, str) for value in values}) > 1:
        kinds = " and ".join(type(value).__name__ for value in values)
        raise DataError(f"chosen and rejected must be both strings or both lists of messages, not {kinds}")
    has_prompt = fields.has_field("prompt") or fields.is_alpaca
    if isinstance(values[0], str):
        chosen_text, rejected_text = (
            read_text(value, field) for value, field in zip(values, ("chosen", "rejected"), strict=True)
        )
        if has_prompt or fields.has_field("messages"):
            return fields.prompt(), [Message(role="assistant", content=text) for text in (chosen_text, rejected_text)]
        return _split_shared_prompt(
            _parse_transcript(chosen_text, "chosen"), _parse_transcript(rejected_text, "rejected")
        )
    chosen_turns, rejected_turns = read_messages(values[0], "chosen"), read_messages(values[1], "rejected")
    if len(chosen_turns) == len(rejected_turns) == 1 or has_prompt:  # else `messages` may be the chosen one again
        chosen_turns, rejected_turns = (join_prompt(fields.prompt(), turns) for turns in (chosen_turns, rejected_turns))
    return _split_shared_prompt(chosen_turns, rejected_turns)


def _parse_transcript(text: str, field: str) -> tuple[Message, ...]:
    prefix, *segments = HH_TURN.split(text)
    if prefix.strip() or not segments:
        raise DataError(
            f"without a prompt, {field} must be a message list or a '\\n\\nHuman: … Assistant: …' transcript"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(role=roles[speaker], content=content.strip())
        for speaker, content in zip(segments[::2], segments[1::2], strict=True)
    )


def _split_shared_prompt(
    chosen_turns: tuple[Message, ...], rejected_turns: tuple[Message, ...]
) -> tuple[tuple[Message, ...], list[Message]]:
    for turns, field in ((chosen_turns, "chosen"), (rejected_turns, "rejected")):
        if not turns or turns[-1].role != "assistant":
            raise DataError(f"{field} does not end with an assistant's turn")
    if chosen_turns[:-1] != rejected_turns[:-1]:
        raise DataError("chosen and rejected do not share their prompt")
    if len(chosen_turns) == 1:
        raise DataError("chosen and rejected hold no turn before the answer")
    return chosen_turns[:-1], [chosen_turns[-1], rejected_turns[-1]]


SHAPES = {
    "pair": RowShape(lambda fields: fields.has_field("chosen") and fields.has_field("rejected"), _read_pair, rank=10),
    "half_pair": RowShape(
        lambda fields: fields.has_field("chosen") or fields.has_field("rejected"), _read_half_pair, rank=40
    ),
}
