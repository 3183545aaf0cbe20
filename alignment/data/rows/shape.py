"""What a shape of rows is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from alignment.data.rows.fields import RowFields
from alignment.groups import Group


@dataclasses.dataclass(frozen=True)
class RowShape:
    """A shape of rows."""

    matches: Callable[[RowFields], bool]
    """Whether a row has this shape."""
    read: Callable[[RowFields, str], Group]
    """Reads a row of this shape, which comes from an origin.

    Raises:
        DataError: the row cannot be used.
    """
    rank: int = 0
    """Shapes of a lower rank are tried first. Those of raylign have 10 and more, as many a row would match several."""
