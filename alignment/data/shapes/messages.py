"""Conversations: `messages`, whose answers are all trained on, or whose last one has a label."""

from __future__ import annotations

import dataclasses

from alignment.data.rows.answers import is_empty, make_group, read_label, read_truncations
from alignment.data.rows.fields import RowFields
from alignment.data.rows.messages import join_prompt, read_messages
from alignment.data.rows.shape import RowShape
from alignment.errors import DataError
from alignment.groups import Completion, Group, Message


def _read_messages(fields: RowFields, origin: str) -> Group:
    turns = read_messages(fields.list_value("messages"), "messages")
    turns = join_prompt(fields.prompt(), turns) if fields.has_field("prompt") and turns else turns
    if not fields.has_field("label"):
        return _read_conversation(turns, origin, read_truncations(fields, 1)[0])
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise DataError("a label is about the assistant's turn at the end of messages, and there is none")
    return make_group(fields, origin, turns[:-1], [turns[-1]], [read_label(fields)])


def _read_conversation(turns: tuple[Message, ...], origin: str, is_truncated: bool) -> Group:
    """The group of one conversation: the prompt is everything before the first answer that is trained on.

    Args:
        is_truncated: whether the last answer was cut off when it was sampled.

    Raises:
        DataError: no turn of the assistant is trained on, or one of these is empty.
    """
    # If the assistant opens the conversation, that turn answers nothing and is not trained on.
    answer_indices = [index for index, turn in enumerate(turns) if turn.role == "assistant" and index > 0]
    if not answer_indices:
        raise DataError("messages hold no assistant's turn that answers something")
    if is_truncated:
        turns = (*turns[: answer_indices[-1]], dataclasses.replace(turns[answer_indices[-1]], truncated=True))
    answer_indices = [index for index in answer_indices if turns[index].trained]
    if not answer_indices:
        raise DataError("messages hold no assistant's turn that is to be trained on: each has a weight of 0")
    first_answer, last_answer = answer_indices[0], answer_indices[-1]
    if any(is_empty(turns[index]) for index in answer_indices):
        raise DataError("an answer is empty")
    completion = Completion(
        text=turns[first_answer].content,
        fields=turns[first_answer].fields,
        truncated=turns[first_answer].truncated,
        following=turns[first_answer + 1 : last_answer + 1],
    )
    return Group(id=origin, prompt=turns[:first_answer], completions=(completion,))


SHAPES = {"messages": RowShape(lambda fields: fields.has_field("messages"), _read_messages, rank=50)}
