"""The rule for answers that are a number, as those of GSM8K: read exactly, compared as fractions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from alignment.errors import RewardError
from alignment.rewards import BuildableScorer, Reward
from alignment.rewards.quantities import ParsedAnswer, first_number, formula, has_words, last_number, only_number
from alignment.rewards.rules import Rule, answer_text, kept_column
from alignment.settings.section import NonNegative

if TYPE_CHECKING:
    from alignment.groups import Completion, Group

BOX = re.compile(r"\\(?:boxed|fbox) ?(?=\{|\d)")


class ExactNumber(Rule):
    """Gives 1 to an answer whose number equals that of the row, else 0.

    The number of an answer is the one after the last `####`, the one in the last `\\boxed{}`, or the last of the text.
    The column is read in the same way, so that it may hold GSM8K's whole solutions. Commas, signs, currencies, units,
    decimals, fractions, powers of ten and percent signs are understood: 1,500.00 = 1500, 3/4 = 0.75, and 20 % equals
    both 20 and 0.2. An answer that is more than a number (4√2, 3x+2, a pair, a time of day) equals only the same text
    in the column; the rule `math` compares such answers by their values.
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
        """The column that the rule compares with."""
        return (self.column,)

    def check_row(self, columns: Mapping[str, Any]) -> None:
        """Checks that the column holds a number.

        Raises:
            RewardError: it holds none.
        """
        if (value := columns.get(self.column)) is not None:
            self._right_answer(value)

    def reward(self, completion: Completion, group: Group) -> Reward:
        """Returns 1.0 if the answer is right, 0.0 if it is wrong, and None if the row has no such column.

        Raises:
            RewardError: the column holds no number.
        """
        value = kept_column(group, self.column)
        if value is None:
            return None
        right = self._right_answer(value)
        answer = read_answer(completion.text, needs_mark=self.marked)
        is_right = equal(answer.values, right.values, tolerance=self.tolerance) or (
            answer.formula != "" and answer.formula == right.formula
        )
        return float(is_right)

    def _right_answer(self, value: Any) -> ParsedAnswer:
        right = read_right_answer(answer_text(value, self.column, kind="number"))
        if not (right.values or right.formula):
            raise RewardError(f"column {self.column!r} holds no number: {value!r:.50}")
        return right


def number_in(text: str, *, needs_mark: bool = False) -> frozenset[Fraction]:
    """The values of the number that a text gives as its answer: one, two for a percentage, none without a number.

    Args:
        needs_mark: read only what stands after `####` or in `\\boxed{}`.
    """
    return read_answer(text, needs_mark=needs_mark).values


def read_answer(text: str, *, needs_mark: bool = False) -> ParsedAnswer:
    """Reads the answer that a text gives.

    Args:
        needs_mark: read only what stands after `####` or in `\\boxed{}`.
    """
    mark = _mark(text)
    if mark is not None:
        values = only_number(mark.text) or (frozenset() if mark.is_boxed else first_number(mark.text))
        return ParsedAnswer(values=values) if values else ParsedAnswer(formula=formula(mark.text))
    return ParsedAnswer() if needs_mark else last_number(text)


def read_right_answer(text: str) -> ParsedAnswer:
    """Reads the right answer in a column, as a marked answer, or as a text if it has words."""
    if _mark(text) is not None:
        return read_answer(text)
    values = only_number(text)
    if not values and has_words(text):
        return read_answer(text)
    return ParsedAnswer(values=values) if values else ParsedAnswer(formula=formula(text))


def equal(answer_values: frozenset[Fraction], right_values: frozenset[Fraction], *, tolerance: float = 0.0) -> bool:
    """True if a value of the answer equals a value of the right answer, up to a relative error of `tolerance`."""
    return any(
        abs(answer_value - right_value) <= Fraction(tolerance) * abs(right_value)
        for answer_value in answer_values
        for right_value in right_values
    )


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """The text after the last `####`, or in the last `\\boxed{}`."""

    text: str
    is_boxed: bool


def marked_text(text: str) -> str | None:
    """The text after the last `####`, or in the last `\\boxed{}`; None without either."""
    mark = _mark(text)
    return mark.text if mark else None


def _mark(text: str) -> _Mark | None:
    hashes_start = text.rfind("####")
    line = text[hashes_start + 4 :].strip().partition("\n")[0]
    box_end = max((match.end() for match in BOX.finditer(text)), default=-1)
    if hashes_start > box_end and re.search(r"\d", line):  # without a digit it is a heading of Markdown
        return _Mark(text=line, is_boxed=False)
    if box_end < 0:
        return None
    inner = _braced_text(text[box_end + 1 :]) if text[box_end] == "{" else text[box_end]
    return _Mark(text=inner, is_boxed=True)


def _braced_text(text: str) -> str:
    """The text up to its closing brace."""
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    return text


SCORERS: dict[str, type[BuildableScorer]] = {"exact_number": ExactNumber}
"""The scorers of this module, by the names that configurations have for them."""
