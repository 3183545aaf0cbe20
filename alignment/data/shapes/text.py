"""Plain text, all of which is learned."""

from __future__ import annotations

from alignment.data.files import Row
from alignment.data.rows.answers import make_group
from alignment.data.rows.cells import read_text
from alignment.data.rows.fields import RowFields
from alignment.data.rows.messages import ROLES
from alignment.data.rows.shape import RowShape
from alignment.errors import DataError
from alignment.groups import Group, Message

TREE = ("parent_id", "message_tree_id")
"""Columns of a row that is only one message of a conversation, as in Open Assistant's data."""


def _read_text(fields: RowFields, origin: str) -> Group:
    if "text" not in fields.columns and (column := _tree_column(fields.row)) is not None:
        raise DataError(
            f"a text with a {column!r} is one message of a conversation, and rows here are whole ones; join them "
            "to messages, or say columns: {text: text} to learn every message as plain text"
        )
    text = Message(role="assistant", content=read_text(fields.value("text"), "text"))
    return make_group(fields, origin, "", [text], [None])


def _tree_column(row: Row) -> str | None:
    """The column that shows that a row's text is one message of a conversation; None if there is none."""
    is_message = str(row.get("role") or "").strip().lower() in ROLES
    return "role" if is_message else next((column for column in TREE if column in row), None)


SHAPES = {"text": RowShape(lambda fields: fields.has_field("text"), _read_text, rank=60)}
