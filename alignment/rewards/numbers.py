"""The rule for answers that are a number, as those of GSM8K: read exactly, compared as fractions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from alignment.config import NonNegative
from alignment.errors import RewardError
from alignment.rewards import Reward
from alignment.rewards.rules import Rule, kept_column

if TYPE_CHECKING:
    from alignment.types import Completion, Group

MAX_DIGITS = 50
"""Longer ones are no answer; a completion could otherwise name a number that takes hours to write out."""
DIGITS = rf"(?:\d{{1,3}}(?:,\d{{3}})+(?![\d,]*\d)|\d{{1,{MAX_DIGITS}}}(?!\d))"
NUMBER = re.compile(
    rf"""(?<![\w.])                          # not inside a word or a longer number
    (?:(?<![)\]}}%])(?P<sign>[-+−]))?  # a sign: neither a minus between two terms nor a bullet
    (?:(?P<whole>{DIGITS})[ ]+(?=\d+/\d))?   # the 1 of 1 1/2
    (?P<number>(?:{DIGITS})?\.\d{{1,{MAX_DIGITS}}}|{DIGITS})
    (?:[eE](?P<exponent>[-+]?\d{{1,2}})(?!\w))?
    (?:[ ]?/[ ]?(?P<divisor>{DIGITS})(?![\d.]))?
    (?P<percent>[ ]?%)?""",
    re.VERBOSE,
)
FRACTION = re.compile(r"(?P<whole>\d?)\\[dt]?frac\s*\{\s*(?P<sign>-?)\s*(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}")


class ExactNumber(Rule):
    """1 for an answer whose number equals the row's, else 0.

    The answer's number stands after the last `####`, in the last `\\boxed{}`, or is the last of the text; the row's
    column is read in the same way, so that GSM8K's whole solutions serve. Commas, signs, currencies, decimals,
    fractions and percent signs are understood: 1,500.00 = 1500, 3/4 = 0.75, and 20 % equals both 20 and 0.2.
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
        return float(equal(number_in(completion.text, marked=self.marked), right, tolerance=self.tolerance))

    def _right(self, value: Any) -> frozenset[Fraction]:
        if not isinstance(value, str | Real | Decimal) or isinstance(value, bool):
            raise RewardError(
                f"column {self.column!r} holds no number but a {type(value).__name__}: {value!r:.50}. A part of a "
                f"mapping is kept by its dotted name, as {self.column}.NAME"
            )
        right = number_in(str(value))
        if not right:
            raise RewardError(f"column {self.column!r} holds no number: {value!r:.50}")
        return right


def number_in(text: str, *, marked: bool = False) -> frozenset[Fraction]:
    """The number that a text gives as its answer: one reading, two for a percentage, none if there is no number.

    Args:
        marked: read only what stands after `####` or in `\\boxed{}`.
    """
    text = _plain(text)
    answer = _marked(text)
    if answer is not None:
        readings = all_numbers(answer.rpartition("=")[2]) or all_numbers(answer)
        return readings[0] if readings else frozenset()
    readings = [] if marked else all_numbers(text)
    return readings[-1] if readings else frozenset()


def all_numbers(text: str) -> list[frozenset[Fraction]]:
    """Every number in a text, in order, each as its readings."""
    return [readings for match in NUMBER.finditer(text) if (readings := _readings(match))]


def equal(answer: frozenset[Fraction], right: frozenset[Fraction], *, tolerance: float = 0.0) -> bool:
    """True if any reading of the one is any reading of the other, but for a relative error of `tolerance`."""
    return any(abs(one - other) <= Fraction(tolerance) * abs(other) for one in answer for other in right)


def _plain(text: str) -> str:
    """The text without currency signs, and with LaTeX's fractions and thin spaces as people type them."""
    text = FRACTION.sub(_slashed, text)
    text = re.sub(r"(?<=\d)(?:\\[,!]|\{,\})(?=\d{3})", ",", text)
    return re.sub(r"\\?[$€£¥]|\\(?=%)|\*\*|__", "", text)


def _slashed(fraction: re.Match[str]) -> str:
    before = f"{fraction['whole']} " if fraction["whole"] else fraction["sign"]
    return f"{before}{fraction['top']}/{fraction['bottom']}"


def _marked(text: str) -> str | None:
    """What stands after the last `####`, or in the last `\\boxed{}`; None without either."""
    boxed, hashes = text.rfind("\\boxed{"), text.rfind("####")
    line = text[hashes + 4 :].strip().partition("\n")[0]
    if hashes > boxed and re.search(r"\d", line):  # else it is a heading of Markdown
        return line
    return _balanced(text[boxed + len("\\boxed{") :]) if boxed >= 0 else None


def _balanced(text: str) -> str:
    """The text up to the brace that closes it."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:index]
    return text


def _readings(match: re.Match[str]) -> frozenset[Fraction]:
    value = Fraction(match["number"].replace(",", ""))
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"])
    if match["divisor"]:
        divisor = int(match["divisor"].replace(",", ""))
        if divisor == 0:
            return frozenset()
        value /= divisor
    if match["whole"]:
        value += int(match["whole"].replace(",", ""))
    if match["sign"] in ("-", "−"):
        value = -value
    return frozenset({value, value / 100} if match["percent"] else {value})
