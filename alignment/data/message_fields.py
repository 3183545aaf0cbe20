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


def mark_arguments(turn: Message, num_marks: int = 0) -> tuple[Message, dict[str, str]]:
    """The message with a mark in place of every value inside the arguments of its calls.

    Args:
        num_marks: number of marks in use already.

    Returns:
        The message, and for each mark the name of the argument.

    Raises:
        DataError: the arguments of a call are a text that is not JSON.
    """
    names_by_mark: dict[str, str] = {}

    def mark_values(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: mark_values(item, name or str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [mark_values(item, name) for item in value]
        if value is None or value == "":
            return value
        mark = f"argument{num_marks + len(names_by_mark)}mark"
        names_by_mark[mark] = name
        return mark

    def mark_call(call: Any) -> Any:
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
            return {**call, "function": mark_call(call["function"])}
        if isinstance(call, Mapping) and isinstance(call.get("arguments"), Mapping):
            return {**call, "arguments": mark_values(call["arguments"], "")}
        return call

    calls = [mark_call(convert_call(call, as_text=False)) for call in turn.fields.get("tool_calls") or ()]
    if not names_by_mark:
        return turn, {}
    return dataclasses.replace(turn, fields={**turn.fields, "tool_calls": calls}), names_by_mark


def mark_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
    """Tools with a mark in place of the name of every function and of its parameters; and the name of each mark."""
    names_by_mark: dict[str, str] = {}

    def mark_name(name: str) -> str:
        mark = f"tool{len(names_by_mark)}mark"
        names_by_mark[mark] = name
        return mark

    marked_tools: list[Mapping[str, Any]] = []
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            marked_tools.append(tool)
            continue
        marked_function = {**function, "name": mark_name(function["name"])}
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if isinstance(parameters, Mapping) and isinstance(properties, Mapping):
            marked_properties = {mark_name(str(name)): schema for name, schema in properties.items()}
            marked_function["parameters"] = {**parameters, "properties": marked_properties}
        marked_tools.append({**tool, "function": marked_function})
    return marked_tools, names_by_mark


def drop_fields(turn: Message, names: Sequence[str]) -> Message:
    """The message without some of its fields."""
    return dataclasses.replace(turn, fields={k: v for k, v in turn.fields.items() if k not in names})


def lost_calls_error() -> DataError:
    """The error of a chat template that leaves out the calls of a message."""
    return DataError(
        "the chat template does not print tool_calls, so the model would learn not to call; take a "
        "model.chat_template that does, or leave such rows out"
    )
