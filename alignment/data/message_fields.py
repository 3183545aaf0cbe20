"""What a message has beside its text: a reasoning, in a field or between marks in the text, and calls of functions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.data.control_tokens import REASONING_MARKS
from alignment.data.unique_keys import unique_keys
from alignment.errors import DataError
from alignment.groups import Message

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields that hold the reasoning before an answer, by the names of chat templates and servers."""
CALL_FIELDS = ("tool_calls", "function_call")
"""Fields that hold the function calls of a message."""


def open_reasoning_marks(prompt: str) -> tuple[str, str] | None:
    """The marks of the reasoning that the prompt opens at its end, and that the answer must close; None without."""
    text = prompt.rstrip()
    return next((pair for pair in REASONING_MARKS if text.endswith(pair[0].rstrip())), None)


def closes_reasoning(wrapper: str, close_mark: str) -> bool:
    """True if the text before an answer is a reasoning that is not empty and that ends with its mark."""
    reasoning_text, separator, _ = wrapper.partition(close_mark)
    return bool(separator) and bool(reasoning_text.strip())


def is_empty_reasoning(wrapper: str) -> bool:
    """True if a text holds nothing but the marks of a reasoning."""
    return any(wrapper.split() in ([start.strip(), end], [start.strip() + end]) for start, end in REASONING_MARKS)


def split_reasoning(turn: Message) -> tuple[str | None, str]:
    """The reasoning of an answer, from a field or from its text, and the text after it; None without a reasoning."""
    field_value = next((turn.fields[name] for name in REASONING_FIELDS if turn.fields.get(name)), None)
    if isinstance(field_value, str) and field_value.strip():
        return field_value, turn.content
    for open_mark, close_mark in REASONING_MARKS:
        reasoning_text, separator, content = turn.content.partition(close_mark)
        if separator:
            return reasoning_text.rpartition(open_mark.strip())[2], content
    return None, turn.content


def called_names(turn: Message) -> list[str]:
    """Names of the functions that a message calls."""
    calls = [*(turn.fields.get("tool_calls") or ()), *filter(None, [turn.fields.get("function_call")])]
    functions = [call.get("function", call) if isinstance(call, Mapping) else {} for call in calls]
    return [str(function.get("name", "")) for function in functions]


def convert_call(call: Any, *, as_text: bool) -> Any:
    """A call with its arguments as a mapping, or with `as_text` as JSON text; clients send either.

    Raises:
        DataError: the arguments are a text that is not JSON, or that has a key twice.
    """
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": convert_call(call["function"], as_text=as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        try:
            return {**call, "arguments": json.loads(arguments or "{}", object_pairs_hook=unique_keys)}
        except DataError as error:
            raise DataError(f"in the arguments of a tool call, {error}") from error
        except ValueError as error:
            raise DataError(f"the arguments of a tool call are a text that is not JSON: {arguments!r:.50}") from error
    return call


def drop_fields(turn: Message, names: Sequence[str]) -> Message:
    """The message without some of its fields."""
    return dataclasses.replace(turn, fields={k: v for k, v in turn.fields.items() if k not in names})


def lost_calls_error() -> DataError:
    """The error of a chat template that leaves out the calls of a message."""
    return DataError(
        "the chat template does not print tool_calls, so the model would learn not to call; take a "
        "model.chat_template that does, or leave such rows out"
    )
