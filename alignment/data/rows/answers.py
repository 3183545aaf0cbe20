"""The group of a prompt and its answers, with what the row says of each: reward, label, whether it was cut off."""

from __future__ import annotations

from collections.abc import Sequence

from alignment.data.rows.cells import parse_json_text, read_number
from alignment.data.rows.checks import ENDS, has_unknown_ends
from alignment.data.rows.fields import RowFields
from alignment.data.rows.messages import Prompt, as_boolean, is_cut_off
from alignment.errors import DataError, WithoutWeight
from alignment.groups import Completion, Group, Message
from alignment.settings.section import MAX_REWARD


def make_group(
    fields: RowFields, origin: str, prompt: Prompt, answers: list[Message], rewards: Sequence[float | None]
) -> Group:
    """The group of a prompt, its answers and their rewards. Answers whose messages have a weight of 0 are left out.

    Raises:
        WithoutWeight: every answer has a weight of 0.
        DataError: an answer is empty, or the row does not say of each answer whether it was cut off.
    """
    if any(is_empty(answer) for answer in answers):
        raise DataError("an answer is empty")
    completions = tuple(
        Completion(text=answer.content, fields=answer.fields, reward=reward, truncated=is_truncated or answer.truncated)
        for answer, reward, is_truncated in zip(answers, rewards, read_truncations(fields, len(answers)), strict=True)
        if answer.trained
    )
    if answers and not completions:
        raise WithoutWeight("the weight of its answer is 0")
    return Group(id=origin, prompt=prompt, completions=completions)


def is_empty(answer: Message) -> bool:
    """True if an answer has neither text nor calls."""
    return not answer.content.strip() and not answer.fields.get("tool_calls")


def read_rewards(fields: RowFields, count: int) -> list[float | None]:
    """The rewards of `count` answers; None for each if the row has none.

    Raises:
        DataError: there are not as many finite numbers as answers.
    """
    if not fields.has_field("rewards"):
        return [None] * count
    rewards = fields.list_value("rewards")
    if fields.has_field("completion") and not isinstance(rewards, list | tuple):  # of one answer, one number
        rewards = [read_number(rewards) if isinstance(rewards, str) else rewards]
    if not isinstance(rewards, list | tuple) or len(rewards) != count:
        raise DataError(f"rewards must be a list of {count} numbers, one per completion")
    for reward in rewards:
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) <= MAX_REWARD:
            raise DataError(f"reward {reward!r:.50} is not a finite number")
    return [float(reward) for reward in rewards]


def read_label(fields: RowFields) -> float | None:
    """The label of an answer: 1 for good, 0 for bad, None if the row has none.

    Raises:
        DataError: the label is something else.
    """
    if not fields.has_field("label"):
        return None
    label = fields.value("label")
    is_good = as_boolean(label)
    if is_good is None:
        raise DataError(
            f"label must be true or false, not {label!r}; ratings in another unit go into a column `rewards`"
        )
    return float(is_good)


def read_truncations(fields: RowFields, count: int) -> list[bool]:
    """For each answer, whether it was cut off when it was sampled, by `truncated` or `finish_reason`.

    A row of an endpoint's export without them counts as cut off: what has no end token teaches no wrong end.
    """
    for field in ENDS:
        if not fields.has_field(field):
            continue
        value = parse_json_text(fields.value(field))
        values = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(values) != count:
            raise DataError(f"{field} must be a list of {count}, one per answer, not of {len(values)}")
        flags = [is_cut_off(value, field) for value in values]
        if count > 1 and any(flags) and not isinstance(value, list | tuple):
            raise DataError(f"{field} is {value!r}, which does not say of which of the {count} answers; give a list")
        return flags
    return [has_unknown_ends(fields.row)] * count
