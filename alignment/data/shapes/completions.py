"""A prompt with one answer and perhaps a label, or with several answers and perhaps their rewards."""

from __future__ import annotations

from alignment.data.rows.answers import make_group, read_label, read_rewards
from alignment.data.rows.fields import RowFields
from alignment.data.rows.messages import read_answer, read_answers
from alignment.data.rows.shape import RowShape
from alignment.errors import DataError
from alignment.groups import Group


def _read_completions(fields: RowFields, origin: str) -> Group:
    prompt = fields.prompt()
    answers = read_answers(
        fields.list_value("completions"), "completions", lambda value: fields.is_text(value, "completions")
    )
    if not answers:
        raise DataError("completions is empty")
    return make_group(fields, origin, prompt, answers, read_rewards(fields, len(answers)))


def _read_completion(fields: RowFields, origin: str) -> Group:
    prompt, answers = fields.prompt(), [read_answer(fields.turns("completion"), "completion")]
    is_labelled = fields.has_field("label") or not fields.has_field("rewards")
    return make_group(fields, origin, prompt, answers, [read_label(fields)] if is_labelled else read_rewards(fields, 1))


SHAPES = {
    "completions": RowShape(lambda fields: fields.has_field("completions"), _read_completions, rank=20),
    "completion": RowShape(lambda fields: fields.has_field("completion"), _read_completion, rank=30),
}
