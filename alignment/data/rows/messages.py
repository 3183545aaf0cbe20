"""Messages from what rows hold: lists of OpenAI's or ShareGPT's form, JSON text, or one message."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from alignment.data.files import Row
from alignment.data.rows.cells import drop_nulls, parse_json_text, read_text
from alignment.data.unique_keys import check_keys
from alignment.errors import DataError
from alignment.groups import Message

ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "ai", "bot", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    **{role: role for role in ("system", "developer", "function_call")},
}
"""Names for speakers in other formats, in lower case, each with the name that chat templates have."""
FINISH_REASONS = ("finish_reason", "stop_reason")
"""Fields that say why an answer ends, by the names of OpenAI and Anthropic; vLLM's `stop_reason` may be a token id."""
CUT_OFF = (
    *("length", "max_length", "max_tokens", "max_new_tokens", "max_output_tokens", "max_completion_tokens"),
    *("max_tokens_reached", "token_limit", "token_limit_reached", "model_length", "context_length"),
    *("context_length_exceeded", "context_window_exceeded", "model_context_window_exceeded"),
    *("content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content", "spii"),
    *("guardrail_intervened", "abort", "aborted", "cancelled", "canceled", "user_cancel", "timeout", "repetition"),
    *("incomplete", "truncated", "error", "error_toxic", "error_limit", "insufficient_system_resource"),
)
"""Finish reasons of an answer that was cut off, in the words of OpenAI, Anthropic, Mistral, Google and others."""
FINISHED = (
    *("stop", "stopped", "stop_sequence", "stop_token", "stop_word", "eos", "eos_token", "eos_found", "end"),
    *("end_turn", "end_of_turn", "end_of_text", "end_of_sequence", "complete", "completed", "finish", "finished"),
    *("done", "success", "tool_calls", "tool_call", "tool_use", "function_call", "refusal", "pause_turn"),
)
"""Finish reasons of an answer that its model ended."""
LABELS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "good", "up", "thumbs_up", "desirable", "👍"), 1),
    **dict.fromkeys(("false", "0", "0.0", "no", "bad", "down", "thumbs_down", "undesirable", "👎"), 0),
}
"""Labels as tables and people write them, in lower case, each with 1 for good or 0 for bad."""
WEIGHTS = ("weight", "train", "training", "loss", "loss_mask")
"""Fields that say whether a message is trained on, by the names of OpenAI, Mistral, axolotl and Swift."""
PARTS_TRAINED = ("train_detail", "training_detail")
"""Fields by which axolotl marks the parts of a message that are trained on."""
Prompt = str | tuple[Message, ...]


def as_turns(value: Any) -> Any:
    """Messages as a list, from a list, a single message or a JSON text of either; any other text is returned as it is.

    Raises:
        DataError: the text is a list as Python prints it, which is not JSON, or one of its messages has a key twice.
    """
    turns = parse_json_text(value)
    if isinstance(turns, dict):
        turns = [turns]
    if isinstance(value, str) and not (isinstance(turns, list) and turns and all(map(_is_message, turns))):
        if re.match(r"\s*\[\{'(role|content|from|value)':", value):
            raise DataError(
                f"holds a list as Python prints it, {value!r:.50}, which is no JSON; write it by json.dumps"
            )
        return value
    check_keys(value, "messages")
    return turns


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())


def find_message_columns(rows: Iterable[Row | DataError]) -> frozenset[str]:
    """Names of the columns whose texts are all messages as JSON text; in others, such a text is a text."""
    is_message_column: dict[str, bool] = {}
    for row in rows:
        for column, value in row.items() if isinstance(row, dict) else ():
            if isinstance(value, str) and value.strip() and is_message_column.get(column, True):
                is_message_column[column] = _is_message_text(value)
    return frozenset(column for column, is_message in is_message_column.items() if is_message)


def _is_message_text(value: str) -> bool:
    try:
        return not isinstance(as_turns(value), str)
    except DataError:  # it is meant to be messages
        return True


def read_messages(value: Any, field: str) -> tuple[Message, ...]:
    """The messages of a list.

    Raises:
        DataError: the value is no list, or one of its items cannot be read as a message.
    """
    if not isinstance(value, list | tuple):
        expectation = "a list of messages" if field == "messages" else "a string or a list of messages"
        kind = "a string" if isinstance(value, str) else type(value).__name__
        raise DataError(f"{field} must be {expectation}, not {kind}")
    return tuple(_message(turn, field) for turn in value)


def _message(turn: Any, field: str) -> Message:
    """One message with all its fields. A null field counts as absent, because tables give every row every field.

    Raises:
        DataError: the value is not a message, or a field cannot be read.
    """
    turn = _from_sharegpt(turn) if isinstance(turn, dict) and {"from", "value"} <= turn.keys() else turn
    calls = turn.get("tool_calls") or turn.get("function_call") if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or "role" not in turn or not ("content" in turn or calls):
        raise DataError(f"{field} holds something that is not a message with role and content")
    fields = {name: value for name, value in turn.items() if value is not None and name not in ("role", "content")}
    weights = [_weight(fields.pop(name), name) for name in WEIGHTS if name in fields]
    if any(fields.get(name) for name in PARTS_TRAINED):
        raise DataError("a message says which parts of it are trained on, and here it is trained on or not: use weight")
    truncation_flags = [is_cut_off(fields.pop(name), name) for name in ("truncated", *FINISH_REASONS) if name in fields]
    content = turn.get("content")
    return Message(
        role=_role(turn["role"], f"{field} role"),
        content="" if content is None and calls else _content(content, f"{field} content"),
        fields=drop_nulls(fields, field),
        trained=all(weights),
        truncated=any(truncation_flags),
    )


def _from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn in ShareGPT's form, `{from, value}`, as a message; a function call is the JSON text of the call."""
    other_fields = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if str(turn["from"]).lower() != "function_call":
        return {"role": turn["from"], "content": turn["value"], **other_fields}
    check_keys(turn["value"], "function_call")
    calls = parse_json_text(turn["value"])
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise DataError(f"a function_call must be the JSON of a name and arguments, not {turn['value']!r:.50}")
    functions = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": functions, **other_fields}


def _role(value: Any, field: str) -> str:
    """The role of a message by the names of chat templates; an unknown role is kept, and the template may refuse it."""
    role = read_text(value, field)
    return ROLES.get(role.strip().lower(), role)


def as_boolean(value: Any) -> bool | None:
    """True for 1, true, or a text that stands for it (see `LABELS`); False likewise; None for any other value."""
    number = LABELS.get(_as_word(value), value) if isinstance(value, str) else value
    return bool(number) if number in (0, 1) else None  # True and False are 1 and 0


def _as_word(text: str) -> str:
    return re.sub(r"[\s-]+", "_", text.strip().lower())


def _weight(value: Any, name: str) -> bool:
    is_trained = as_boolean(value)
    if is_trained is None:
        raise DataError(f"a message's {name} must be 0 or 1 (not trained on, or trained on), not {value!r:.50}")
    return is_trained


def _content(value: Any, field: str) -> str:
    """The text of a message, from a string or from a list of text parts, which are joined as at the endpoint."""
    if not isinstance(value, list | tuple) or not value:
        return read_text(value, field)
    for content_part in value:
        if not isinstance(content_part, dict) or content_part.get("type") != "text":
            kind = content_part.get("type") if isinstance(content_part, dict) else type(content_part).__name__
            raise DataError(f"{field} holds a part of type {kind!r:.50}; only parts of type 'text' can be trained on")
    return "\n".join(read_text(content_part.get("text"), field) for content_part in value)


def is_cut_off(value: Any, field: str) -> bool:
    """True if the value of `truncated` or of a finish reason says that an answer was cut off.

    Raises:
        DataError: the value says neither.
    """
    is_truncated = as_boolean(value) if field == "truncated" else None
    if value in (None, "") or is_truncated is not None:
        return bool(is_truncated)
    if field == "truncated" or not isinstance(value, str):
        if field == "stop_reason" and isinstance(value, int):
            return False
        raise DataError(f"{field} must be {'true or false' if field == 'truncated' else 'a string'}, not {value!r:.50}")
    reason = _as_word(value).rpartition(".")[2].removeprefix("finish_reason_")  # also as the names of enumerations
    # A stop_reason of vLLM may be the text at which it stopped.
    if reason not in (*CUT_OFF, *FINISHED) and field != "stop_reason":
        raise DataError(
            f"{field} {value!r:.50} is not known, so nothing says whether the answer was cut off; give `truncated`, "
            "true or false, in place of it"
        )
    return reason in CUT_OFF


def read_answer(value: Any, field: str) -> Message:
    """An answer as a message, from a string or from a list with one message of the assistant."""
    if isinstance(value, str):
        return Message(role="assistant", content=read_text(value, field))
    turns = read_messages(value, field)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise DataError(f"{field} must be a string or one assistant message")
    return turns[0]


def read_answers(value: Any, field: str, is_text: Callable[[Any], bool]) -> list[Message]:
    """The answers of a list, each a string or a message of the assistant.

    Args:
        is_text: whether a string is the answer itself, even if it is the JSON text of a message.

    Raises:
        DataError: the value is no list, or one of its items is no answer.
    """
    if not isinstance(value, list | tuple):
        raise DataError(f"{field} must be a list, not {type(value).__name__}")
    return [read_answer(item if is_text(item) else as_turns(item), field) for item in value]


def join_prompt(prompt: Prompt, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The whole conversation: the prompt and the turns, which may begin with the prompt already.

    Raises:
        DataError: the turns begin with a user's turn that is not the prompt.
    """
    prompt_turns = (Message(role="user", content=prompt),) if isinstance(prompt, str) else prompt
    if not turns or turns[0].role == "assistant":
        return (*prompt_turns, *turns)
    if turns[: len(prompt_turns)] == prompt_turns:
        return turns
    if prompt_turns[0].role == "system" and turns[: len(prompt_turns) - 1] == prompt_turns[1:]:
        return (prompt_turns[0], *turns)
    if [turn.role for turn in prompt_turns] == ["user"]:  # a text, which sets of several turns take from any of them
        user_texts = ["", *(turn.content.strip() for turn in turns if turn.role == "user")]
        if prompt_turns[0].content.strip() in user_texts:
            return turns
    raise DataError("prompt is not what the list of messages begins with; take the wrong one of them out of the row")
