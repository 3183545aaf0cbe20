"""The fields of a row, under whatever columns they stand, and the prompt that they give."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from alignment.data.files import Row
from alignment.data.rows.cells import find_cell, parse_json_text, read_text
from alignment.data.rows.messages import Prompt, as_turns, read_messages
from alignment.data.unique_keys import check_keys
from alignment.errors import DataError
from alignment.groups import Message
from alignment.settings.data import SourceConfig

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


class RowFields:
    """A row whose fields are read as `columns` and `prompt_template` of its source say."""

    def __init__(self, row: Row, source: SourceConfig, message_columns: Collection[str] | None = None) -> None:
        """`message_columns`: columns whose texts may be messages as JSON text; None if each may."""
        stack_exchange = {"question", *STACK_EXCHANGE.values()} <= row.keys() and not source.columns
        self.row = row
        self.message_columns = message_columns
        self.columns = STACK_EXCHANGE if stack_exchange else source.columns
        self.template = source.prompt_template or (STACK_EXCHANGE_PROMPT if stack_exchange else None)
        self.as_message = source.prompt_as == "user_message"
        self.used = {*source.keep, *columns_of(self.template or "")}
        for field, column in source.columns.items():
            find_cell(row, column, f"column {column!r} (columns.{field})")

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
            DataError: the value is a text that begins like a list and is not JSON, or that has a key twice.
        """
        check_keys(self.value(field), field)
        value = parse_json_text(self.value(field))
        if isinstance(value, str) and value.lstrip()[:1] == "[":
            raise DataError(f"{field} is a text that is not JSON: {value!r:.50}. Write lists as json.dumps writes them")
        return value

    def value(self, field: str) -> Any:
        """The value of a field; None if the row has none."""
        if field in self.columns:
            return find_cell(self.row, self.columns[field], field)
        column = self._column(field)
        return None if column is None else self.row[column]

    def _column(self, field: str) -> str | None:
        """Name of the column that holds a field; None if the row has none."""
        if field in self.columns:
            return self.columns[field]
        names = ALIASES.get(field, (field,))
        if field in ALPACA and "instruction" in self.row:
            names = (*names, *ALPACA[field])
        return next((name for name in names if self.row.get(name) is not None), None)

    def turns(self, field: str) -> Any:
        """The value of a field that is a text or messages; messages as JSON text are parsed (see `is_text`)."""
        value = self.value(field)
        return value if self.is_text(value, field) else as_turns(value)

    def is_text(self, value: Any, field: str) -> bool:
        """True if a value of a field is a text, even if the text is the JSON of messages.

        An answer is if other rows have another text in that column, or if it is one object and the prompt is a plain
        text.
        """
        if not isinstance(value, str) or field == "prompt":
            return False
        if value.lstrip()[:1] == "{" and self._has_text_prompt:
            return True
        column = self._column(field)
        is_whole_cell = field != "completions" and column in self.row
        return self.message_columns is not None and is_whole_cell and column not in self.message_columns

    @property
    def _has_text_prompt(self) -> bool:
        if self.template is not None or self.is_alpaca:
            return True
        return self.has_field("prompt") and isinstance(self.turns("prompt"), str)

    def system_column(self) -> str | None:
        """Name of the column with the system text; None if there is none, or the prompt template already writes it."""
        names = [self.columns["system"]] if "system" in self.columns else ["system", "system_prompt"]
        template_columns = columns_of(self.template) if self.template is not None else set()
        return next((name for name in names if self.cell(name) is not None and name not in template_columns), None)

    def cell(self, column: str) -> Any:
        """The value of a column; None if there is no such column."""
        try:
            return find_cell(self.row, column, column)
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
        value = self.turns("prompt")
        return self._wrap_prompt(read_text(value, "prompt")) if isinstance(value, str) else self._turns("prompt")

    def _turns(self, field: str) -> tuple[Message, ...]:
        turns = read_messages(self.list_value(field), field)
        if not turns:
            raise DataError(f"{field} is an empty list of messages")
        return turns

    def _instruction(self) -> Prompt:
        """The prompt of an Alpaca row: the instruction and its input, after the earlier turns in `history`."""
        instruction = read_text(self.row["instruction"], "instruction")
        input_text = read_text(self.value("input") or "", "input")
        history = parse_json_text(self.row.get("history")) or []
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
        Message(role=role, content=read_text(text, "history"))
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
    cells = {
        name: find_cell(row, name, f"column {name!r} of the prompt template") for name in sorted(columns_of(template))
    }
    return _Template().vformat(template, (), {name: read_text(cell, name) for name, cell in cells.items()})
