"""A prompt alone, for algorithms that learn from the model's own answers."""

from __future__ import annotations

from alignment.data.rows.answers import make_group
from alignment.data.rows.fields import RowFields
from alignment.data.rows.shape import RowShape
from alignment.groups import Group


def _read_prompt(fields: RowFields, origin: str) -> Group:
    return make_group(fields, origin, fields.prompt(), [], [])


SHAPES = {"prompt": RowShape(lambda fields: fields.has_field("prompt") or fields.is_alpaca, _read_prompt, rank=70)}
