"""Every shape that people keep preferences in, turned into a Group."""

from __future__ import annotations

import dataclasses
import json
import re
import string
from collections.abc import Mapping
from typing import Any

from alignment.config import SourceConfig
from alignment.data.files import Row
from alignment.errors import DataError
from alignment.types import Completion, Group, Message

STACK_EXCHANGE = {"chosen": "response_j", "rejected": "response_k"}
STACK_EXCHANGE_PROMPT = "Question: {question}\n\nAnswer: "
FLT_MAX = 3.4e38
"""Rewards become fp32."""
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
CUT_OFF = ("length", "max_tokens")
"""Finish reasons of an answer that was stopped, in the words of OpenAI and of Anthropic."""
WEIGHTS = ("weight", "train", "training")
"""Fields by which a message says whether it is trained on, in OpenAI's and Mistral's words and in axolotl's."""

Prompt = str | tuple[Message, ...]


def to_group(row: Row, origin: str, source: SourceConfig) -> Group:
    """Reads one row in whichever shape it has, with the columns that `keep` names beside it.

    Shapes, by the fields present (after `columns`): `chosen` + `rejected` with a prompt, as strings or message lists;
    the same without a prompt, as message lists or "\\n\\nHuman: … \\n\\nAssistant: …" transcripts that share their
    beginning; `question` + `response_j` + `response_k`; `completions` + `rewards`; `completion` with or without a
    `label`; `messages`; `text`; a prompt alone. Beside any of them: `system`, a text that becomes the first turn;
    `tools`; `finish_reason` or `truncated`, which say what was cut off where it was sampled.

    Raises:
        DataError: the row is unusable; the text says why, without the origin.
    """
    for column in source.keep:
        if column not in row:
            raise DataError(f"column {column!r} (keep) is missing")
    shape = _Shape(row, source)
    group = _shaped(shape, origin)
    return dataclasses.replace(
        group,
        prompt=_with_system(group.prompt, shape),
        tools=_tools(shape),
        columns={column: row[column] for column in source.keep},
    )


def _shaped(shape: _Shape, origin: str) -> Group:
    if shape.has("chosen") and shape.has("rejected"):
        prompt, answers = _preference(shape)
        rewards: list[float | None] = [1.0, 0.0]
        if answers[0] == answers[1]:
            raise DataError("chosen and rejected are the same")
    elif shape.has("completions"):
        prompt, answers = shape.prompt(), _answers(shape.value("completions"), "completions")
        if not answers:
            raise DataError("completions is empty")
        rewards = _rewards(shape, len(answers))
    elif shape.has("completion"):
        prompt, answers, rewards = shape.prompt(), [_answer(shape.value("completion"), "completion")], [_label(shape)]
    elif shape.has("messages"):
        return _conversation(_messages(shape.value("messages"), "messages"), origin, _truncations(shape, 1)[0])
    elif shape.has("text"):
        text = Message(role="assistant", content=_string(shape.value("text"), "text"))
        prompt, answers, rewards = "", [text], [None]
    elif shape.has("chosen") or shape.has("rejected"):
        raise DataError(f"field {'rejected' if shape.has('chosen') else 'chosen'!r} is missing")
    elif shape.has("prompt"):
        prompt, answers, rewards = shape.prompt(), [], []
    else:
        raise DataError(f"has none of the known fields; its columns are {', '.join(map(repr, shape.row)) or 'none'}")
    if any(_is_empty(answer) for answer in answers):
        raise DataError("an answer is empty")
    completions = tuple(
        Completion(text=answer.content, fields=answer.fields, reward=reward, truncated=truncated or answer.truncated)
        for answer, reward, truncated in zip(answers, rewards, _truncations(shape, len(answers)), strict=True)
    )
    return Group(id=origin, prompt=prompt, completions=completions)


def _with_system(prompt: Prompt, shape: _Shape) -> Prompt:
    """The prompt with the row's system text, if it has one, as its first turn.

    Raises:
        DataError: plain text has no such turn, or the messages begin with another one.
    """
    column = shape.system_column()
    system = _string(shape.row[column], column) if column is not None else ""
    if not system.strip() or not prompt:
        return prompt
    if isinstance(prompt, str):
        raise DataError(
            f"column {column!r} holds a system text, and a prompt of plain text has no turn for it; set prompt_as to "
            f"user_message, or write it into prompt_template as {{{column}}}"
        )
    if prompt[0].role not in ("system", "developer"):
        return (Message(role="system", content=system), *prompt)
    if prompt[0].content != system:
        raise DataError(f"column {column!r} holds another system text than the messages begin with")
    return prompt


def _tools(shape: _Shape) -> tuple[Mapping[str, Any], ...]:
    """The functions that the assistant may call: a list of JSON schemas, or the text of one."""
    tools = shape.value("tools") if shape.has("tools") else ()
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except ValueError as error:
            raise DataError(f"tools is a text that is not JSON: {error}") from error
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools must be a list of JSON schemas, not {tools!r:.50}")
    return tuple(_present(tool, "tools") for tool in tools)


def _truncations(shape: _Shape, count: int) -> list[bool]:
    """Whether each answer was cut off where it was sampled, by `finish_reason` or `truncated`, of one or of each."""
    for field in ("truncated", "finish_reason"):
        if not shape.has(field):
            continue
        value = shape.value(field)
        values = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(values) != count:
            raise DataError(f"{field} must be a list of {count}, one per answer, not of {len(values)}")
        cuts = [_is_cut_off(value, field) for value in values]
        if count > 1 and any(cuts) and not isinstance(value, list | tuple):
            raise DataError(f"{field} is {value!r}, which does not say of which of the {count} answers; give a list")
        return cuts
    return [False] * count


def _is_cut_off(value: Any, field: str) -> bool:
    if value is None or (field == "truncated" and value in (0, 1)):
        return bool(value)
    if field == "finish_reason" and isinstance(value, str):
        return value.lower() in CUT_OFF
    raise DataError(f"{field} must be {'true or false' if field == 'truncated' else 'a string'}, not {value!r:.50}")


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

    def system_column(self) -> str | None:
        """Column of the system text, unless there is none or the prompt's template writes it already."""
        names = [self.columns["system"]] if "system" in self.columns else ["system", "system_prompt"]
        written = _columns_of(self.template) if self.template is not None else set()
        return next((name for name in names if self.row.get(name) is not None and name not in written), None)

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


def _columns_of(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _fill(template: str, row: Row) -> str:
    names = _columns_of(template)
    missing = sorted(names - row.keys())
    if missing:
        raise DataError(f"column {missing[0]!r} of the prompt template is missing")
    return template.format(**{name: _string(row[name], name) for name in names})


def _preference(shape: _Shape) -> tuple[Prompt, list[Message]]:
    values = [shape.value("chosen"), shape.value("rejected")]
    if len({isinstance(value, str) for value in values}) > 1:
        kinds = " and ".join(type(value).__name__ for value in values)
        raise DataError(f"chosen and rejected must be both strings or both lists of messages, not {kinds}")
    if isinstance(values[0], str):
        chosen, rejected = (_string(value, field) for value, field in zip(values, ("chosen", "rejected"), strict=True))
        if shape.has("prompt"):
            return shape.prompt(), [Message(role="assistant", content=text) for text in (chosen, rejected)]
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
) -> tuple[tuple[Message, ...], list[Message]]:
    for turns, field in ((chosen, "chosen"), (rejected, "rejected")):
        if not turns or turns[-1].role != "assistant":
            raise DataError(f"{field} does not end with an assistant's turn")
    if chosen[:-1] != rejected[:-1]:
        raise DataError("chosen and rejected do not share their prompt")
    if len(chosen) == 1:
        raise DataError("chosen and rejected hold no turn before the answer")
    return chosen[:-1], [chosen[-1], rejected[-1]]


def _conversation(turns: tuple[Message, ...], origin: str, truncated: bool) -> Group:
    """The prompt is everything before the first answer that is trained on. `truncated`: the last one was cut off."""
    # A conversation that the assistant opens is learned from its first reply on.
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant" and index > 0]
    if not answers:
        raise DataError("messages hold no assistant's turn that answers something")
    if truncated:
        turns = (*turns[: answers[-1]], dataclasses.replace(turns[answers[-1]], truncated=True))
    answers = [index for index in answers if turns[index].trained]
    if not answers:
        raise DataError("messages hold no assistant's turn that is to be trained on: each has a weight of 0")
    first, last = answers[0], answers[-1]
    if any(_is_empty(turns[index]) for index in answers):
        raise DataError("an answer is empty")
    answer = Completion(
        text=turns[first].content,
        fields=turns[first].fields,
        truncated=turns[first].truncated,
        following=turns[first + 1 : last + 1],
    )
    return Group(id=origin, prompt=turns[:first], completions=(answer,))


def _is_empty(answer: Message) -> bool:
    return not answer.content.strip() and not answer.fields.get("tool_calls")


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


def _answer(value: Any, field: str) -> Message:
    """A completion given as a string or as a list with one assistant message."""
    if isinstance(value, str):
        return Message(role="assistant", content=_string(value, field))
    turns = _messages(value, field)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise DataError(f"{field} must be a string or one assistant message")
    return turns[0]


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        raise DataError(f"{field} must be a string or a list of messages, not {type(value).__name__}")
    return tuple(_message(turn, field) for turn in value)


def _message(turn: Any, field: str) -> Message:
    """One message with all its fields; a field that is null counts as absent, as tables fill in what a row lacks.

    Raises:
        DataError: it is none, or a field cannot be read.
    """
    calls = turn.get("tool_calls") or turn.get("function_call") if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or "role" not in turn or not ("content" in turn or calls):
        raise DataError(f"{field} holds something that is not a message with role and content")
    fields = {name: value for name, value in turn.items() if value is not None and name not in ("role", "content")}
    weights = [_weight(fields.pop(name), name) for name in WEIGHTS if name in fields]
    finish_reason = fields.pop("finish_reason", None)
    content = turn.get("content")
    return Message(
        role=_string(turn["role"], f"{field} role"),
        content="" if content is None and calls else _content(content, f"{field} content"),
        fields=_present(fields, field),
        trained=all(weights),
        truncated=finish_reason is not None and _is_cut_off(finish_reason, "finish_reason"),
    )


def _weight(value: Any, name: str) -> bool:
    if value not in (0, 1):  # True and False are 1 and 0
        raise DataError(f"a message's {name} must be 0 or 1 (not trained on, or trained on), not {value!r:.50}")
    return bool(value)


def _content(value: Any, field: str) -> str:
    """A text, or the text of a list of parts."""
    if not isinstance(value, list | tuple) or not value:
        return _string(value, field)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"{field} holds a part of type {kind!r:.50}; only parts of type 'text' can be trained on")
    return "".join(_string(part.get("text"), field) for part in value)


def _present(value: Any, field: str) -> Any:
    """A field as it stands, without what is null in it: tables give every mapping the keys of all rows.

    Raises:
        DataError: a text in it cannot be read by any tokenizer.
    """
    if isinstance(value, dict):
        return {key: _present(item, field) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_present(item, field) for item in value]
    return _string(value, field) if isinstance(value, str) else value


def _answers(value: Any, field: str) -> list[Message]:
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
