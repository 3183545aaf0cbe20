"""Turns a row of any known shape into a Group: pairs, ranked answers, labels, conversations, plain text, prompts.

A new shape is one file in this folder with an entry in its `SHAPES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from alignment.data.files import Row
from alignment.data.rows.cells import TrackedRow, kept_columns
from alignment.data.rows.checks import check_columns, has_equal_scores, has_unknown_ends, has_unreadable_scores
from alignment.data.rows.fields import RowFields
from alignment.data.rows.shape import RowShape
from alignment.data.rows.template_inputs import add_system_turn, read_template_kwargs, read_tools
from alignment.errors import DataError
from alignment.groups import Group
from alignment.settings.data import SourceConfig
from alignment.settings.plugins import load_attribute, load_function, names_in_folder

__all__ = [
    "SHAPES",
    "RowShape",
    "TrackedRow",
    "has_equal_scores",
    "has_unknown_ends",
    "has_unreadable_scores",
    "to_group",
]


def to_group(row: Row, origin: str, source: SourceConfig, *, message_columns: Collection[str] | None = None) -> Group:
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
        message_columns: columns whose texts may be messages as JSON text, as `find_message_columns` finds them in the
            rows; None if each may.

    Raises:
        WithoutWeight: the row is valid, and its weight of 0 says that it is not trained on.
        DataError: the row cannot be used; the text says why, without the origin.
    """
    if source.shape is not None:
        group = _read_by_function(source.shape, row, origin)
        row_columns = [column for column in source.keep if column not in group.columns]
        return dataclasses.replace(group, columns={**group.columns, **kept_columns(row, row_columns)})
    columns = kept_columns(row, source.keep)
    fields = RowFields(row, source, message_columns)
    check_columns(fields)
    group, tools = _build_group(fields, origin), read_tools(fields)
    if tools and isinstance(group.prompt, str) and fields.columns.get("tools", "tools") not in fields.used:
        raise DataError("tools are given, and plain text has no place for them; set prompt_as to user_message")
    return dataclasses.replace(
        group,
        prompt=add_system_turn(group.prompt, fields),
        tools=tools,
        chat_template_kwargs=read_template_kwargs(fields),
        columns=columns,
    )


def _build_group(fields: RowFields, origin: str) -> Group:
    for row_shape in SHAPES.values():
        if row_shape.matches(fields):
            return row_shape.read(fields, origin)
    raise DataError(
        f"has none of the known fields; its columns are {', '.join(map(repr, fields.row)) or 'none'}. Say by "
        "data.columns what they are, as {prompt: question, completion: answer}"
    )


def _read_by_function(name: str, row: Row, origin: str) -> Group:
    """Reads a row by the function that a configuration names.

    Raises:
        ConfigError: there is no such function.
        DataError: the function raises an error, or it returns no Group.
    """
    function = load_function(name, "shape")
    try:
        group = function(row)
    except DataError:
        raise
    except Exception as error:  # anything may come from a function of one's own
        raise DataError(f"{name} raises {error!r:.200}") from error
    if not isinstance(group, Group):
        raise DataError(f"{name} returns a {type(group).__name__}, not an alignment.groups.Group")
    return dataclasses.replace(group, id=origin)


def _builtin_shapes() -> dict[str, RowShape]:
    """The entries of `SHAPES` in the modules of this folder, in the order of their ranks."""
    shapes: dict[str, RowShape] = {}
    for name in names_in_folder("data/shapes", "SHAPES").values():
        shapes |= load_attribute(name, "shape")
    return dict(sorted(shapes.items(), key=lambda entry: entry[1].rank))


SHAPES = _builtin_shapes()
"""The shapes that come with raylign, by name. A row is read in the first one that it matches."""
