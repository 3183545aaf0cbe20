"""Turns a row of any known shape into a Group: pairs, ranked answers, labels, conversations, plain text, prompts."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from alignment.data.files import Cell, Row
from alignment.errors import DataError, WithoutWeight
from alignment.groups import Completion, Group, Message
from alignment.settings.data import SourceConfig
from alignment.settings.model import is_template_variable
from alignment.settings.plugins import load_plugin

STACK_EXCHANGE = {"chosen": "response_j", "rejected": "response_k"}
STACK_EXCHANGE_PROMPT = "Question: {question}\n\nAnswer: "
ALPACA_PROMPT = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt of Stanford's Alpaca, for rows whose prompt is plain text."""
ALIASES = {
    "messages": ("messages", "conversations", "conversation"),
    "label": ("label", "kto_tag"),
    "tools": ("tools", "functions"),
}
"""Columns that are read as a field if `columns` does not name one, the usual column first. The others are those of
ShareGPT, of LLaMA-Factory and of OpenAI's older formats."""
ALPACA = {"completion": ("output", "response"), "input": ("input", "context")}
"""Columns beside an `instruction`, by the names of Alpaca and of Dolly."""
SCORES = tuple(
    (name.format("chosen"), name.format("rejected"))
    for word in ("score", "rating", "reward")
    for name in (f"{word}_{{}}", f"{{}}_{word}", f"{{}}-{word}", f"{{}}_avg_{word}")
)
"""Pairs of columns that hold the scores of a pair's two answers."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "ai", "bot", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    **{role: role for role in ("system", "developer", "function_call")},
}
"""Names for speakers in other formats, in lower case, each with the name that chat templates have."""
FLT_MAX = 3.4e38
"""Largest absolute value of a reward, because rewards become fp32."""
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
FINISH_REASONS = ("finish_reason", "stop_reason")
"""Fields that say why an answer ends, by the names of OpenAI and Anthropic; vLLM's `stop_reason` may be a token id."""
CUT_OFF = (
    *("length", "max_tokens", "model_length", "max_output_tokens", "model_context_window_exceeded"),
    *("content_filter", "abort", "incomplete"),
)
"""Finish reasons of an answer that was cut off, in the words of OpenAI, Anthropic, Mistral and vLLM."""
LABELS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "good", "up", "thumbs_up", "desirable", "👍"), 1),
    **dict.fromkeys(("false", "0", "0.0", "no", "bad", "down", "thumbs_down", "undesirable", "👎"), 0),
}
"""Labels as tables and people write them, in lower case, each with 1 for good or 0 for bad."""
WEIGHTS = ("weight", "train", "training", "loss", "loss_mask")
"""Fields that say whether a message is trained on, by the names of OpenAI, Mistral, axolotl and Swift."""
PARTS_TRAINED = ("train_detail", "training_detail")
"""Fields by which axolotl marks the parts of a message that are trained on."""
TREE = ("parent_id", "message_tree_id")
"""Columns of a row that is only one message of a conversation, as in Open Assistant's data."""

Prompt = str | tuple[Message, ...]


class TrackedRow(dict[str, Any]):
    """A row that records which of its columns have been read."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.read_columns: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        """The value of a column, which counts as read from now on."""
        self.read_columns.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        """The value of a column, or `default`; the column counts as read from now on."""
        self.read_columns.add(column)
        return super().get(column, default)

    @property
    def unread_columns(self) -> list[str]:
        """Columns that have a value and have not been read."""
        return [
            column
            for column, value in self.items()
            if column not in self.read_columns and value not in (None, "", [], {})
        ]


def to_group(row: Row, origin: str, source: SourceConfig) -> Group:
    """Reads one row, in any shape, as a Group, with the columns that `source.keep` names in `Group.columns`.

    Shapes, by the fields present (after `columns`): `chosen` + `rejected` with a prompt, as strings or message lists;
    the same without a prompt, as message lists or "\\n\\nHuman: … \\n\\nAssistant: …" transcripts that share their
    beginning; `question` + `response_j` + `response_k`; `completions` + `rewards`; `completion` with or without a
    `label`; `messages` (ShareGPT's `conversations`), with or without a `label` of the last answer; `instruction`,
    `input` and `output` as in Alpaca; `text`; a prompt alone. A prompt may be `messages` too, or an `instruction`.
    A list may be written as JSON text. Every shape may also have: `system`, a text that becomes the first turn; `tools`
    and `chat_template_kwargs`, for the chat template; `finish_reason` or `truncated`, which say whether an answer was
    cut off when it was sampled; and a `weight` of 1, or of 0 for a row that is not trained on.

    With `source.shape`, a function of one's own reads the row instead.

    Args:
        origin: where the row comes from, as `file:line`; the id of the group.

    Raises:
        WithoutWeight: the row is valid, and its weight of 0 says that it is not trained on.
        DataError: the row cannot be used; the text says why, without the origin.
    """
    if source.shape is not None:
        group = _read_by_function(source.shape, row, origin)
        row_columns = [column for column in source.keep if column not in group.columns]
        return dataclasses.replace(group, columns={**group.columns, **_kept_columns(row, row_columns)})
    columns = _kept_columns(row, source.keep)
    shape = _Shape(row, source)
    _check_columns(shape)
    group, tools = _build_group(shape, origin), _tools(shape)
    if tools and isinstance(group.prompt, str) and shape.columns.get("tools", "tools") not in shape.used:
        raise DataError("tools are given, and plain text has no place for them; set prompt_as to user_message")
    return dataclasses.replace(
        group,
        prompt=_add_system_turn(group.prompt, shape),
        tools=tools,
        chat_template_kwargs=_template_kwargs(shape),
        columns=columns,
    )


def has_equal_scores(row: Row) -> bool:
    """True if the scores of chosen and rejected are equal, so that nothing but their order says which is better."""
    return any(len(set(pair)) == 1 for pair in _score_pairs(row))


def _cell(row: Row, column: str, description: str) -> Any:
    """The value of a column, or of a nested one by a dotted name, as `reward_model.ground_truth`.

    Raises:
        DataError: there is no such column; the text begins with `description`.
    """
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = _parse_json_text(value)
        if isinstance(value, list | tuple) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            raise DataError(f"{description} is missing")
    return value


def _parse_cell(value: Any) -> Any:
    """The value of a column for scorers; the text of a table's cell is read as a number, true or false, or a list."""
    if not isinstance(value, Cell):
        return value
    try:
        parsed_value = json.loads({"True": "true", "False": "false"}.get(value, value))
    except (ValueError, RecursionError):
        return str(value)
    # A text such as 007 or 1e5 looks like a number that Python writes in another way; it stays a text.
    is_equal = isinstance(parsed_value, bool | list | dict) or (
        isinstance(parsed_value, int | float) and math.isfinite(parsed_value) and str(parsed_value) == value
    )
    return parsed_value if is_equal else str(value)


def _parse_json_text(value: Any) -> Any:
    """The list or mapping in a JSON text, as tables keep them; any other value is returned as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        parsed_value = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed_value if isinstance(parsed_value, list | dict) else value


def _check_columns(shape: _Shape) -> None:
    """Checks the columns that do not belong to the row's shape.

    Raises:
        WithoutWeight: the row's weight is 0.
        DataError: a column would change the meaning of the row, and cannot be used.
    """
    row = {column: value for column, value in shape.row.items() if column not in {*shape.used, *shape.columns.values()}}
    for column in MEDIA:
        if row.get(column) not in (None, "", [], ()):
            raise DataError(f"column {column!r} holds what is no text, and models are trained on text alone")
    label = next((name for name in ("labels", "label") if row.get(name) is not None), None)
    if label is not None and shape.has_field("completions"):
        raise DataError(
            f"{label} beside completions (of steps of an answer?) is not read; give rewards, one per answer"
        )
    weight = _number(shape.row.get("weight") if "weight" in row else None)
    if weight == 0:
        raise WithoutWeight("its weight is 0")
    if weight is not None and weight != 1:
        raise DataError(
            f"its weight is {weight:g}, and rows count alike here: 1, or 0 for one to leave out. If the column means "
            "something else, give it another name"
        )
    if shape.has_field("chosen") and shape.has_field("rejected"):
        for chosen_score, rejected_score in _score_pairs(shape.row):
            if chosen_score < rejected_score:
                raise DataError(
                    f"its scores contradict its order: chosen has {chosen_score:g} and rejected "
                    f"{rejected_score:g}, which is better"
                )


def _score_pairs(row: Row) -> list[tuple[float, float]]:
    pairs = (
        (_number(row.get(chosen_column)), _number(row.get(rejected_column)))
        for chosen_column, rejected_column in SCORES
    )
    return [
        (chosen_score, rejected_score)
        for chosen_score, rejected_score in pairs
        if chosen_score is not None and rejected_score is not None
    ]


def _number(value: Any) -> float | None:
    """A number, or the number in a text, as tables have it; None for any other value."""
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None


def _read_pair(shape: _Shape, origin: str) -> Group:
    prompt, answers = _preference(shape)
    if answers[0] == answers[1]:
        raise DataError("chosen and rejected are the same")
    return _group(shape, origin, prompt, answers, [1.0, 0.0])


def _read_completions(shape: _Shape, origin: str) -> Group:
    prompt, answers = shape.prompt(), _answers(shape.list_value("completions"), "completions")
    if not answers:
        raise DataError("completions is empty")
    return _group(shape, origin, prompt, answers, _rewards(shape, len(answers)))


def _read_completion(shape: _Shape, origin: str) -> Group:
    prompt, answers = shape.prompt(), [_answer(shape.value("completion"), "completion")]
    is_labelled = shape.has_field("label") or not shape.has_field("rewards")
    return _group(shape, origin, prompt, answers, [_label(shape)] if is_labelled else _rewards(shape, 1))


def _read_half_pair(shape: _Shape, origin: str) -> Group:
    raise DataError(f"field {'rejected' if shape.has_field('chosen') else 'chosen'!r} is missing")


def _read_messages(shape: _Shape, origin: str) -> Group:
    turns = _messages(shape.list_value("messages"), "messages")
    turns = _join_prompt(shape.prompt(), turns) if shape.has_field("prompt") and turns else turns
    if not shape.has_field("label"):
        return _conversation(turns, origin, _truncations(shape, 1)[0])
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise DataError("a label is about the assistant's turn at the end of messages, and there is none")
    return _group(shape, origin, turns[:-1], [turns[-1]], [_label(shape)])


def _read_text(shape: _Shape, origin: str) -> Group:
    if "text" not in shape.columns and (column := _tree_column(shape.row)) is not None:
        raise DataError(
            f"a text with a {column!r} is one message of a conversation, and rows here are whole ones; join them "
            "to messages, or say columns: {text: text} to learn every message as plain text"
        )
    text = Message(role="assistant", content=_string(shape.value("text"), "text"))
    return _group(shape, origin, "", [text], [None])


def _read_prompt(shape: _Shape, origin: str) -> Group:
    return _group(shape, origin, shape.prompt(), [], [])


@dataclasses.dataclass(frozen=True)
class RowShape:
    """A shape of rows."""

    matches: Callable[[_Shape], bool]
    """Whether a row has this shape."""
    read: Callable[[_Shape, str], Group]
    """Reads a row of this shape, which comes from an origin.

    Raises:
        DataError: the row cannot be used.
    """


SHAPES = {
    "pair": RowShape(lambda shape: shape.has_field("chosen") and shape.has_field("rejected"), _read_pair),
    "completions": RowShape(lambda shape: shape.has_field("completions"), _read_completions),
    "completion": RowShape(lambda shape: shape.has_field("completion"), _read_completion),
    "half_pair": RowShape(lambda shape: shape.has_field("chosen") or shape.has_field("rejected"), _read_half_pair),
    "messages": RowShape(lambda shape: shape.has_field("messages"), _read_messages),
    "text": RowShape(lambda shape: shape.has_field("text"), _read_text),
    "prompt": RowShape(lambda shape: shape.has_field("prompt") or shape.is_alpaca, _read_prompt),
}
"""The shapes that come with raylign, by name. A row is read in the first one that it matches."""


def _build_group(shape: _Shape, origin: str) -> Group:
    for row_shape in SHAPES.values():
        if row_shape.matches(shape):
            return row_shape.read(shape, origin)
    raise DataError(
        f"has none of the known fields; its columns are {', '.join(map(repr, shape.row)) or 'none'}. Say by "
        "data.columns what they are, as {prompt: question, completion: answer}"
    )


def _group(
    shape: _Shape, origin: str, prompt: Prompt, answers: list[Message], rewards: Sequence[float | None]
) -> Group:
    """The group of a prompt, its answers and their rewards.

    Raises:
        DataError: an answer is empty, or the row does not say of each answer whether it was cut off.
    """
    if any(_is_empty(answer) for answer in answers):
        raise DataError("an answer is empty")
    completions = tuple(
        Completion(text=answer.content, fields=answer.fields, reward=reward, truncated=is_truncated or answer.truncated)
        for answer, reward, is_truncated in zip(answers, rewards, _truncations(shape, len(answers)), strict=True)
    )
    return Group(id=origin, prompt=prompt, completions=completions)


def _kept_columns(row: Row, names: Iterable[str]) -> dict[str, Any]:
    """The columns of a row that scorers get."""
    return {name: _parse_cell(_cell(row, name, f"column {name!r} (keep)")) for name in names}


def _read_by_function(name: str, row: Row, origin: str) -> Group:
    """Reads a row by the function that a configuration names.

    Raises:
        ConfigError: there is no such function.
        DataError: the function raises an error, or it returns no Group.
    """
    function = load_plugin(name, {}, "shape")
    try:
        group = function(row)
    except DataError:
        raise
    except Exception as error:  # anything may come from a function of one's own
        raise DataError(f"{name} raises {error!r:.200}") from error
    if not isinstance(group, Group):
        raise DataError(f"{name} returns a {type(group).__name__}, not an alignment.groups.Group")
    return dataclasses.replace(group, id=origin)


def _tree_column(row: Row) -> str | None:
    """The column that shows that a row's text is one message of a conversation; None if there is none."""
    is_message = str(row.get("role") or "").strip().lower() in ROLES
    return "role" if is_message else next((column for column in TREE if column in row), None)


def _add_system_turn(prompt: Prompt, shape: _Shape) -> Prompt:
    """The prompt with the row's system text as its first turn, if the row has one.

    Raises:
        DataError: the prompt is plain text, or its messages begin with another system text.
    """
    column = shape.system_column()
    system = _string(shape.cell(column), column) if column is not None else ""
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
    """The functions that the assistant may call, from a list of JSON schemas or from the JSON text of one."""
    tools = shape.value("tools") if shape.has_field("tools") else ()
    if isinstance(tools, str):
        try:
            tools = json.loads(tools.strip() or "[]")
        except ValueError as error:
            raise DataError(f"tools is a text that is not JSON: {error}") from error
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools must be a list of JSON schemas, not {tools!r:.50}")
    return tuple(_function(_drop_nulls(tool, "tools")) for tool in tools)


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool in the form of OpenAI and of chat templates; LLaMA-Factory gives the function without that wrapper."""
    is_bare = "name" in tool and not {"type", "function"} & tool.keys()
    return {"type": "function", "function": tool} if is_bare else tool


def _template_kwargs(shape: _Shape) -> Mapping[str, Any]:
    """Variables for the chat template, from a mapping or its JSON text; a null value counts as absent."""
    kwargs = _parse_json_text(shape.value("chat_template_kwargs")) if shape.has_field("chat_template_kwargs") else {}
    if not isinstance(kwargs, dict) or not all(map(is_template_variable, kwargs)):
        raise DataError(f"chat_template_kwargs must be a mapping of a chat template's variables, not {kwargs!r:.60}")
    template_kwargs: Mapping[str, Any] = _drop_nulls(kwargs, "chat_template_kwargs")
    return template_kwargs


def _truncations(shape: _Shape, count: int) -> list[bool]:
    """For each answer, whether it was cut off when it was sampled, by `truncated` or `finish_reason`."""
    for field in ("truncated", "finish_reason", "finish_reasons", "stop_reason"):
        if not shape.has_field(field):
            continue
        value = _parse_json_text(shape.value(field))
        values = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(values) != count:
            raise DataError(f"{field} must be a list of {count}, one per answer, not of {len(values)}")
        flags = [_is_cut_off(value, field) for value in values]
        if count > 1 and any(flags) and not isinstance(value, list | tuple):
            raise DataError(f"{field} is {value!r}, which does not say of which of the {count} answers; give a list")
        return flags
    return [False] * count


def _is_cut_off(value: Any, field: str) -> bool:
    if value is None or (field == "truncated" and value in (0, 1)):
        return bool(value)
    if field != "truncated" and isinstance(value, str):
        return value.lower() in CUT_OFF
    if field == "stop_reason" and isinstance(value, int):
        return False
    raise DataError(f"{field} must be {'true or false' if field == 'truncated' else 'a string'}, not {value!r:.50}")


class _Shape:
    """A row whose fields are read as `columns` and `prompt_template` of its source say."""

    def __init__(self, row: Row, source: SourceConfig) -> None:
        stack_exchange = {"question", *STACK_EXCHANGE.values()} <= row.keys() and not source.columns
        self.row = row
        self.columns = STACK_EXCHANGE if stack_exchange else source.columns
        self.template = source.prompt_template or (STACK_EXCHANGE_PROMPT if stack_exchange else None)
        self.as_message = source.prompt_as == "user_message"
        self.used = {*source.keep, *columns_of(self.template or "")}
        for field, column in source.columns.items():
            _cell(row, column, f"column {column!r} (columns.{field})")

    @property
    def is_alpaca(self) -> bool:
        """True if the row has an instruction, and no other field that gives the prompt."""
        return isinstance(self.row.get("instruction"), str) and not any(map(self.has_field, ("prompt", "messages")))

    def has_field(self, field: str) -> bool:
        """True if the row has a value for a field; the prompt may come from the template."""
        if field == "prompt" and self.template is not None:
            return True
        return self.value(field) is not None

    def list_value(self, field: str) -> Any:
        """The value of a field that should be a list; a JSON text is parsed.

        Raises:
            DataError: the value is a text that begins like a list and is not JSON.
        """
        value = _parse_json_text(self.value(field))
        if isinstance(value, str) and value.lstrip()[:1] == "[":
            raise DataError(f"{field} is a text that is not JSON: {value!r:.50}. Write lists as json.dumps writes them")
        return value

    def value(self, field: str) -> Any:
        """The value of a field; None if the row has none."""
        if field in self.columns:
            return _cell(self.row, self.columns[field], field)
        value = next((self.row[name] for name in ALIASES.get(field, (field,)) if self.row.get(name) is not None), None)
        if value is None and field in ALPACA and "instruction" in self.row:
            return next((self.row[name] for name in ALPACA[field] if self.row.get(name) is not None), None)
        return value

    def system_column(self) -> str | None:
        """Name of the column with the system text; None if there is none, or the prompt template already writes it."""
        names = [self.columns["system"]] if "system" in self.columns else ["system", "system_prompt"]
        template_columns = columns_of(self.template) if self.template is not None else set()
        return next((name for name in names if self.cell(name) is not None and name not in template_columns), None)

    def cell(self, column: str) -> Any:
        """The value of a column; None if there is no such column."""
        try:
            return _cell(self.row, column, column)
        except DataError:
            return None

    def prompt(self) -> Prompt:
        """The prompt of the row: from the template, its messages, its instruction or its prompt.

        Raises:
            DataError: the row has none of these, or it cannot be read.
        """
        if self.template is not None:
            return self._wrap_prompt(_fill_template(self.template, self.row))
        if not self.has_field("prompt") and self.has_field("messages"):
            return self._turns("messages")
        if self.is_alpaca:
            return self._instruction()
        if not self.has_field("prompt"):
            raise DataError("field 'prompt' is missing")
        value = _as_turns(self.value("prompt"))
        return self._wrap_prompt(_string(value, "prompt")) if isinstance(value, str) else self._turns("prompt")

    def _turns(self, field: str) -> tuple[Message, ...]:
        turns = _messages(self.list_value(field), field)
        if not turns:
            raise DataError(f"{field} is an empty list of messages")
        return turns

    def _instruction(self) -> Prompt:
        """The prompt of an Alpaca row: the instruction and its input, after the earlier turns in `history`."""
        instruction = _string(self.row["instruction"], "instruction")
        input_text = _string(self.value("input") or "", "input")
        history = _parse_json_text(self.row.get("history")) or []
        if self.as_message:
            question = Message(role="user", content="\n".join(filter(str.strip, (instruction, input_text))))
            return (*_history(history), question)
        if history:
            raise DataError("history holds earlier turns, which plain text has not; set prompt_as to user_message")
        has_input = bool(input_text.strip())
        return ALPACA_PROMPT.format(
            with_input=", paired with an input that provides further context" if has_input else "",
            instruction=instruction,
            input=f"### Input:\n{input_text}\n\n" if has_input else "",
        )

    def _wrap_prompt(self, text: str) -> Prompt:
        return (Message(role="user", content=text),) if self.as_message else text


def _history(pairs: Any) -> list[Message]:
    """Earlier turns in the form of LLaMA-Factory: pairs of a user's text and the assistant's answer."""
    pairs = pairs if isinstance(pairs, list | tuple) else [pairs]
    if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
        raise DataError("history must be a list of pairs: what the user said, and what the assistant answered")
    roles = ("user", "assistant")
    return [
        Message(role=role, content=_string(text, "history"))
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


class _Template(string.Formatter):
    """A formatter in whose templates the braces hold the whole name of a column, with its dots."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        """The value of the column that stands in the braces, as `string.Formatter` asks for it."""
        return kwargs[field_name], field_name


def columns_of(template: str) -> set[str]:
    """Names of the columns in the braces of a prompt template."""
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _fill_template(template: str, row: Row) -> str:
    cells = {name: _cell(row, name, f"column {name!r} of the prompt template") for name in sorted(columns_of(template))}
    return _Template().vformat(template, (), {name: _string(cell, name) for name, cell in cells.items()})


def _preference(shape: _Shape) -> tuple[Prompt, list[Message]]:
    values = [_as_turns(shape.value("chosen")), _as_turns(shape.value("rejected"))]
    if len({isinstance(value, str) for value in values}) > 1:
        kinds = " and ".join(type(value).__name__ for value in values)
        raise DataError(f"chosen and rejected must be both strings or both lists of messages, not {kinds}")
    has_prompt = shape.has_field("prompt") or shape.is_alpaca
    if isinstance(values[0], str):
        chosen_text, rejected_text = (
            _string(value, field) for value, field in zip(values, ("chosen", "rejected"), strict=True)
        )
        if has_prompt or shape.has_field("messages"):
            return shape.prompt(), [Message(role="assistant", content=text) for text in (chosen_text, rejected_text)]
        return _split_shared_prompt(
            _parse_transcript(chosen_text, "chosen"), _parse_transcript(rejected_text, "rejected")
        )
    chosen_turns, rejected_turns = _messages(values[0], "chosen"), _messages(values[1], "rejected")
    if len(chosen_turns) == len(rejected_turns) == 1 or has_prompt:  # else `messages` may be the chosen one again
        chosen_turns, rejected_turns = (_join_prompt(shape.prompt(), turns) for turns in (chosen_turns, rejected_turns))
    return _split_shared_prompt(chosen_turns, rejected_turns)


def _join_prompt(prompt: Prompt, turns: tuple[Message, ...]) -> tuple[Message, ...]:
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


def _as_turns(value: Any) -> Any:
    """Messages as a list, from a list, a single message or a JSON text of either; any other text is returned as it is.

    Raises:
        DataError: the text is a list as Python prints it, which is not JSON.
    """
    turns = _parse_json_text(value)
    if isinstance(turns, dict):
        turns = [turns]
    if isinstance(value, str) and not (isinstance(turns, list) and turns and all(map(_is_message, turns))):
        if re.match(r"\s*\[\{'(role|content|from|value)':", value):
            raise DataError(
                f"holds a list as Python prints it, {value!r:.50}, which is no JSON; write it by json.dumps"
            )
        return value
    return turns


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())


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


def _conversation(turns: tuple[Message, ...], origin: str, is_truncated: bool) -> Group:
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
    if any(_is_empty(turns[index]) for index in answer_indices):
        raise DataError("an answer is empty")
    completion = Completion(
        text=turns[first_answer].content,
        fields=turns[first_answer].fields,
        truncated=turns[first_answer].truncated,
        following=turns[first_answer + 1 : last_answer + 1],
    )
    return Group(id=origin, prompt=turns[:first_answer], completions=(completion,))


def _is_empty(answer: Message) -> bool:
    return not answer.content.strip() and not answer.fields.get("tool_calls")


def _rewards(shape: _Shape, count: int) -> list[float | None]:
    if not shape.has_field("rewards"):
        return [None] * count
    rewards = shape.list_value("rewards")
    if shape.has_field("completion") and not isinstance(rewards, list | tuple):  # of one answer, one number
        rewards = [_number(rewards) if isinstance(rewards, str) else rewards]
    if not isinstance(rewards, list | tuple) or len(rewards) != count:
        raise DataError(f"rewards must be a list of {count} numbers, one per completion")
    for reward in rewards:
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) <= FLT_MAX:
            raise DataError(f"reward {reward!r:.50} is not a finite number")
    return [float(reward) for reward in rewards]


def _label(shape: _Shape) -> float | None:
    if not shape.has_field("label"):
        return None
    label = shape.value("label")
    number = LABELS.get(re.sub(r"[\s-]+", "_", label.strip().lower()), label) if isinstance(label, str) else label
    if number not in (0, 1):  # True and False are 1 and 0
        raise DataError(
            f"label must be true or false, not {label!r}; ratings in another unit go into a column `rewards`"
        )
    return float(number)


def _answer(value: Any, field: str) -> Message:
    """An answer as a message, from a string or from a list with one message of the assistant."""
    value = _as_turns(value)
    if isinstance(value, str):
        return Message(role="assistant", content=_string(value, field))
    turns = _messages(value, field)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise DataError(f"{field} must be a string or one assistant message")
    return turns[0]


def _messages(value: Any, field: str) -> tuple[Message, ...]:
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
    truncation_flags = [_is_cut_off(fields.pop(name), name) for name in FINISH_REASONS if name in fields]
    content = turn.get("content")
    return Message(
        role=_role(turn["role"], f"{field} role"),
        content="" if content is None and calls else _content(content, f"{field} content"),
        fields=_drop_nulls(fields, field),
        trained=all(weights),
        truncated=any(truncation_flags),
    )


def _from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn in ShareGPT's form, `{from, value}`, as a message; a function call is the JSON text of the call."""
    other_fields = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if str(turn["from"]).lower() != "function_call":
        return {"role": turn["from"], "content": turn["value"], **other_fields}
    calls = _parse_json_text(turn["value"])
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise DataError(f"a function_call must be the JSON of a name and arguments, not {turn['value']!r:.50}")
    functions = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": functions, **other_fields}


def _role(value: Any, field: str) -> str:
    """The role of a message by the names of chat templates; an unknown role is kept, and the template may refuse it."""
    role = _string(value, field)
    return ROLES.get(role.strip().lower(), role)


def _weight(value: Any, name: str) -> bool:
    number = LABELS.get(value.strip().lower(), value) if isinstance(value, str) else value
    if number not in (0, 1):  # True and False are 1 and 0
        raise DataError(f"a message's {name} must be 0 or 1 (not trained on, or trained on), not {value!r:.50}")
    return bool(number)


def _content(value: Any, field: str) -> str:
    """The text of a message, from a string or from a list of text parts."""
    if not isinstance(value, list | tuple) or not value:
        return _string(value, field)
    for content_part in value:
        if not isinstance(content_part, dict) or content_part.get("type") != "text":
            kind = content_part.get("type") if isinstance(content_part, dict) else type(content_part).__name__
            raise DataError(f"{field} holds a part of type {kind!r:.50}; only parts of type 'text' can be trained on")
    return "".join(_string(content_part.get("text"), field) for content_part in value)


def _drop_nulls(value: Any, field: str) -> Any:
    """A value without the nulls inside it, because tables give every mapping the keys of all rows.

    Raises:
        DataError: a text inside it holds a lone surrogate, which no tokenizer can read.
    """
    if isinstance(value, dict):
        return {key: _drop_nulls(item, field) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_drop_nulls(item, field) for item in value]
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
