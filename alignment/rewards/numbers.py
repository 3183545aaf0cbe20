"""The rule for answers that are a number, as those of GSM8K: read exactly, compared as fractions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from alignment.errors import RewardError
from alignment.rewards import Reward
from alignment.rewards.quantities import Reading, first_number, formula, has_words, last_number, only_number
from alignment.rewards.rules import Rule, kept_column
from alignment.settings.section import NonNegative

if TYPE_CHECKING:
    from alignment.groups import Completion, Group

BOX = re.compile(r"\\(?:boxed|fbox) ?(?=\{|\d)")


class ExactNumber(Rule):
    """1 for an answer whose number equals the row's, else 0.

    The answer's number stands after the last `####`, in the last `\\boxed{}`, or is the last of the text; the row's
    column is read in the same way, so that GSM8K's whole solutions serve. Commas, signs, currencies, units, decimals,
    fractions, powers of ten and percent signs are understood: 1,500.00 = 1500, 3/4 = 0.75, and 20 % equals both 20 and
    0.2. What is more than a number (4√2, 3x+2, a pair, a time of day) equals only the same text in the column; the rule
    `math` knows what such things are worth.
    """

    name: Literal["exact_number"] = "exact_number"
    """The right number, as in GSM8K."""
    column: str = "answer"
    """Column with the right answer: a number, or text that ends in one; `data.keep` must name it."""
    marked: bool = False
    """Count only numbers after `####` or in `\\boxed{}`."""
    tolerance: NonNegative = 0.0
    """Largest relative error that still counts as equal; 0 is exact."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def check_row(self, columns: Mapping[str, Any]) -> None:
        if (value := columns.get(self.column)) is not None:
            self._right(value)

    def reward(self, completion: Completion, group: Group) -> Reward:
        value = kept_column(group, self.column)
        if value is None:
            return None
        right = self._right(value)
        answer = reading(completion.text, marked=self.marked)
        is_right = equal(answer.values, right.values, tolerance=self.tolerance) or (
            answer.formula != "" and answer.formula == right.formula
        )
        return float(is_right)

    def _right(self, value: Any) -> Reading:
        if not isinstance(value, str | Real | Decimal) or isinstance(value, bool):
            raise RewardError(
                f"column {self.column!r} holds no number but a {type(value).__name__}: {value!r:.50}. A part of a "
                f"mapping is kept by its dotted name, as {self.column}.NAME"
            )
        right = right_reading(str(value))
        if not (right.values or right.formula):
            raise RewardError(f"column {self.column!r} holds no number: {value!r:.50}")
        return right


def number_in(text: str, *, marked: bool = False) -> frozenset[Fraction]:
    """The number that a text gives as its answer: one reading, two for a percentage, none if there is no number.

    Args:
        marked: read only what stands after `####` or in `\\boxed{}`.
    """
    return reading(text, marked=marked).values


def reading(text: str, *, marked: bool = False) -> Reading:
    """What a text gives as its answer.

    Args:
        marked: read only what stands after `####` or in `\\boxed{}`.
    """
    mark = _mark(text)
    if mark is not None:
        values = only_number(mark.text) or (frozenset() if mark.is_boxed else first_number(mark.text))
        return Reading(values=values) if values else Reading(formula=formula(mark.text))
    return Reading() if marked else last_number(text)


def right_reading(text: str) -> Reading:
    """What a column gives as the right answer: read as a marked answer is, or, if it has words, as a text is."""
    if _mark(text) is not None:
        return reading(text)
    values = only_number(text)
    if not values and has_words(text):
        return reading(text)
    return Reading(values=values) if values else Reading(formula=formula(text))


def equal(answer: frozenset[Fraction], right: frozenset[Fraction], *, tolerance: float = 0.0) -> bool:
    """True if any reading of the one is any reading of the other, but for a relative error of `tolerance`."""
    return any(abs(one - other) <= Fraction(tolerance) * abs(other) for one in answer for other in right)


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """What stands after the last `####`, or in the last `\\boxed{}`."""

    text: str
    is_boxed: bool


def marked_text(text: str) -> str | None:
    """What stands after the last `####`, or in the last `\\boxed{}`; None without either."""
    mark = _mark(text)
    return mark.text if mark else None


def _mark(text: str) -> _Mark | None:
    hashes = text.rfind("####")
    line = text[hashes + 4 :].strip().partition("\n")[0]
    boxed = max((match.end() for match in BOX.finditer(text)), default=-1)
    if hashes > boxed and re.search(r"\d", line):  # else it is a heading of Markdown
        return _Mark(text=line, is_boxed=False)
    if boxed < 0:
        return None
    inner = _balanced(text[boxed + 1 :]) if text[boxed] == "{" else text[boxed]
    return _Mark(text=inner, is_boxed=True)


def _balanced(text: str) -> str:
    """The text up to the brace that closes it."""
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    return text
