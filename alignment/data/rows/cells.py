"""The cells of a row: columns by dotted names, and the texts, numbers and JSON that they hold."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from alignment.data.files import Cell, Row
from alignment.errors import DataError


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


def find_cell(row: Row, column: str, description: str) -> Any:
    """The value of a column, or of a nested one by a dotted name, as `reward_model.ground_truth`.

    Raises:
        DataError: there is no such column; the text begins with `description`.
    """
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = parse_json_text(value)
        if isinstance(value, list | tuple) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            raise DataError(f"{description} is missing")
    return value


def parse_cell(value: Any) -> Any:
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


def parse_json_text(value: Any) -> Any:
    """The list or mapping in a JSON text, as tables keep them; any other value is returned as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        parsed_value = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed_value if isinstance(parsed_value, list | dict) else value


def read_number(value: Any) -> float | None:
    """A number, or the number in a text, as tables have it; None for any other value."""
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None


def read_text(value: Any, field: str) -> str:
    """The value of a field that must be a text.

    Raises:
        DataError: it is no text, or it holds a lone surrogate, which no tokenizer can read.
    """
    if not isinstance(value, str):
        raise DataError(f"{field} must be a string, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{field} holds a lone surrogate at character {error.start}, which no tokenizer can read"
        ) from error
    return value


def drop_nulls(value: Any, field: str) -> Any:
    """A value without the nulls inside it, because tables give every mapping the keys of all rows.

    Raises:
        DataError: a text inside it holds a lone surrogate, which no tokenizer can read.
    """
    if isinstance(value, dict):
        return {key: drop_nulls(item, field) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [drop_nulls(item, field) for item in value]
    return read_text(value, field) if isinstance(value, str) else value


def kept_columns(row: Row, names: Iterable[str]) -> dict[str, Any]:
    """The columns of a row that scorers get."""
    return {name: parse_cell(find_cell(row, name, f"column {name!r} (keep)")) for name in names}
