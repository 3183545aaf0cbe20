"""Checks of the columns that do not belong to a row's shape, and yet would change what the row means."""

from __future__ import annotations

import math
from typing import Any

from alignment.data.files import Row
from alignment.data.rows.cells import read_number
from alignment.data.rows.fields import RowFields
from alignment.data.rows.messages import as_boolean
from alignment.errors import DataError, WithoutWeight

SCORES = tuple(
    (name.format("chosen"), name.format("rejected"))
    for word in ("score", "rating", "reward")
    for name in (f"{word}_{{}}", f"{{}}_{word}", f"{{}}-{word}", f"{{}}_avg_{word}")
)
"""Pairs of columns that hold the scores of a pair's two answers."""
EXPORT = ("completions", "labeller", "kind", "versions")
"""Columns of every row that an endpoint exports; since it keeps finish reasons, `finish_reasons` is one too."""
ENDS = ("truncated", "finish_reason", "finish_reasons", "stop_reason")
"""Columns that say whether an answer was cut off when it was sampled."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def check_columns(fields: RowFields) -> None:
    """Checks the columns that do not belong to the row's shape.

    Raises:
        WithoutWeight: the row's weight is 0, or its `train` is false.
        DataError: a column would change the meaning of the row, and cannot be used.
    """
    row = {
        column: value for column, value in fields.row.items() if column not in {*fields.used, *fields.columns.values()}
    }
    for column in MEDIA:
        if row.get(column) not in (None, "", [], ()):
            raise DataError(f"column {column!r} holds what is no text, and models are trained on text alone")
    label = next((name for name in ("labels", "label") if row.get(name) is not None), None)
    if label is not None and fields.has_field("completions"):
        raise DataError(
            f"{label} beside completions (of steps of an answer?) is not read; give rewards, one per answer"
        )
    weight = fields.row.get("weight") if "weight" in row else None
    if weight not in (None, "", [], {}):
        number = read_number(weight) if isinstance(weight, str) else None
        is_trained = as_boolean(weight if number is None else number)
        if is_trained is None:
            raise DataError(
                f"its weight is {weight!r:.50}, and rows count alike here: 1, or 0 for one to leave out. If the column "
                "means something else, give it another name"
            )
        if not is_trained:
            raise WithoutWeight("its weight is 0")
    if as_boolean(row.get("train")) is False:
        fields.row.get("train")  # it counts as read
        raise WithoutWeight("its train is false")
    if fields.has_field("chosen") and fields.has_field("rejected"):
        for chosen_score, rejected_score in _score_pairs(fields.row):
            if chosen_score < rejected_score:
                raise DataError(
                    f"its scores contradict its order: chosen has {chosen_score:g} and rejected "
                    f"{rejected_score:g}, which is better"
                )


def has_equal_scores(row: Row) -> bool:
    """True if the scores of chosen and rejected are equal, so that nothing but their order says which is better."""
    return any(len(set(pair)) == 1 for pair in _score_pairs(row))


def has_unreadable_scores(row: Row) -> bool:
    """True if chosen and rejected have scores that are no finite numbers, so that they cannot be compared."""
    return any(None in pair for pair in _all_score_pairs(row))


def has_unknown_ends(row: Row) -> bool:
    """True for a row of an endpoint's export from before it said how the answers ended."""
    return all(column in row for column in EXPORT) and not any(row.get(column) is not None for column in ENDS)


def _score_pairs(row: Row) -> list[tuple[float, float]]:
    return [
        (chosen_score, rejected_score)
        for chosen_score, rejected_score in _all_score_pairs(row)
        if chosen_score is not None and rejected_score is not None
    ]


def _all_score_pairs(row: Row) -> list[tuple[float | None, float | None]]:
    """The scores of each pair of columns that both have a value; None for one that is no finite number."""
    values = ((row.get(chosen_column), row.get(rejected_column)) for chosen_column, rejected_column in SCORES)
    return [
        (_score(chosen_value), _score(rejected_value))
        for chosen_value, rejected_value in values
        if chosen_value not in (None, "") and rejected_value not in (None, "")
    ]


def _score(value: Any) -> float | None:
    number = float(value) if isinstance(value, bool) else read_number(value)
    return number if number is not None and math.isfinite(number) else None
