"""Built-in rules: rewards from the text itself, or from a comparison with a kept column."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Self

import regex
from pydantic import field_validator, model_validator

from alignment.errors import RewardError
from alignment.rewards import BuildableScorer, Reward, Unreadable, UnreadableTexts
from alignment.settings.section import Count, Positive, PositiveCount

if TYPE_CHECKING:
    import torch

    from alignment.groups import Completion, Group

Unit = Literal["tokens", "words", "characters"]
Shape = Literal["linear", "quadratic", "step"]
TEXT_ERRORS = (ValueError, ArithmeticError, IndexError, RecursionError)
"""Exceptions that code raises for an unexpected text; other exceptions are faults of the code."""


class Rule(BuildableScorer):
    """A rule: a pure function of one completion and its group."""

    @abstractmethod
    def reward(self, completion: Completion, group: Group) -> Reward:
        """Returns the reward of the completion; None to abstain, because the rule does not rate rows of this kind.

        Raises:
            Unreadable: the rule cannot read the completion's text; ValueError, ArithmeticError, IndexError and
                RecursionError mean the same.
            RewardError: the group lacks something that the rule needs; the text says what, without naming the group.
        """

    def build(self, device: torch.device) -> RuleScorer:
        """Builds the scorer; the device is not used."""
        return RuleScorer(self)


class RuleScorer:
    """Applies a rule to every completion."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.unreadable = UnreadableTexts(rule)

    def score(self, groups: list[Group]) -> list[list[Reward]]:
        """Scores as `Scorer.score` says.

        Raises:
            RewardError: a group lacks something that the rule needs, or a text is unreadable and the configuration
                asks for an error then.
        """
        return [self._score_group(group) for group in groups]

    def close(self) -> None:
        """Does nothing: a rule holds no resources."""

    def _score_group(self, group: Group) -> list[Reward]:
        try:
            return [self._score_completion(completion, group) for completion in group.completions]
        except RewardError as error:
            raise RewardError(f"group {group.id}: {error}") from error

    def _score_completion(self, completion: Completion, group: Group) -> Reward:
        try:
            return self.rule.reward(completion, group)
        except Unreadable as error:
            return self.unreadable.reward(str(error))
        except TEXT_ERRORS as error:
            return self.unreadable.reward(f"a text of {len(completion.text)} characters raised {error!r:.100}")


class Regex(Rule):
    """1 for a text that matches a pattern (or does not, with `forbid`), else 0."""

    name: Literal["regex"] = "regex"
    """A pattern that the answer must, or must not, match."""
    pattern: str
    """Regular expression, as Python's `re` reads it; `(?i)` in front ignores case, `(?s)` lets a dot match newlines."""
    timeout_s: Positive = 1.0
    """Seconds after which a text counts as unreadable: some patterns, as `(a+)+b`, take for ever on some texts."""
    match: Literal["search", "full"] = "search"
    """`search`: anywhere in the text. `full`: the whole text."""
    forbid: bool = False
    """Reward texts that do not match."""

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
            regex.compile(pattern)
        except (re.error, regex.error) as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        return pattern

    def reward(self, completion: Completion, group: Group) -> float:
        """Returns 1.0 for a text that matches (or does not, with `forbid`), else 0.0.

        Raises:
            Unreadable: the search took longer than `timeout_s`.
        """
        find = regex.search if self.match == "search" else regex.fullmatch
        try:  # the package regex, because `re` cannot be stopped
            match = find(self.pattern, completion.text, timeout=self.timeout_s)
        except TimeoutError:
            raise Unreadable(
                f"the pattern was not done with a text of {len(completion.text)} characters after {self.timeout_s:g} s"
            ) from None
        return float((match is None) == self.forbid)


class Length(Rule):
    """Closeness to a target length, a penalty near a maximum length, or the sum of both."""

    name: Literal["length"] = "length"
    """How long the answer is."""
    unit: Unit = "words"
    """`tokens` of the actor, with the end token; `words` between white space; or `characters`."""
    target: PositiveCount | None = None
    """Length that gives 1; None asks for none."""
    tolerance: Count = 0
    """Difference from the target that costs nothing."""
    shape: Shape = "linear"
    """How the reward falls with d = distance beyond the tolerance / target: `linear` is 1 - d and `quadratic` 1 - d²,
    neither below 0; `step` is 0 at once."""
    max_length: PositiveCount | None = None
    """Length above which the penalty is -1 (arXiv 2503.14476, equation 13); None is no penalty."""
    buffer: Count = 0
    """Length before `max_length` over which the penalty grows from 0 to -1; with 0 it begins at once."""

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if self.target is None and self.max_length is None:
            raise ValueError("length needs target, max_length or both")
        if self.max_length is not None and self.buffer > self.max_length:
            raise ValueError(f"buffer ({self.buffer}) must not exceed max_length ({self.max_length})")
        return self

    def reward(self, completion: Completion, group: Group) -> float:
        """Returns the closeness to the target length plus the penalty (≤ 0) of an overlong text.

        Raises:
            RewardError: the unit is tokens and the completion has none.
        """
        length = length_of(completion, self.unit)
        reward = 0.0
        if self.target is not None:
            reward += closeness(length, target=self.target, tolerance=self.tolerance, shape=self.shape)
        if self.max_length is not None:
            reward += overlong_penalty(length, max_length=self.max_length, buffer=self.buffer)
        return reward


class Keywords(Rule):
    """Whether the text has the words that a row names, as whole words, in upper or lower case."""

    name: Literal["keywords"] = "keywords"
    """Words that the row's own column names."""
    column: str = "keywords"
    """Column with a list of words or phrases, or one; `data.keep` must name it."""
    need: Literal["any", "all", "share"] = "any"
    """Reward 1 if the text has `any` or `all` of them; or the `share` of them in the text as the reward."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The column that the rule compares with."""
        return (self.column,)

    def check_row(self, columns: Mapping[str, Any]) -> None:
        """Checks that the column holds words.

        Raises:
            RewardError: it does not.
        """
        if (value := columns.get(self.column)) is not None:
            self._keywords(value)

    def reward(self, completion: Completion, group: Group) -> Reward:
        """Returns 1.0 or 0.0, or the share of the words that are in the text; None if the row has no such column.

        Raises:
            RewardError: the column does not hold words.
        """
        value = kept_column(group, self.column)
        if value is None:
            return None
        matches = [contains_keyword(completion.text, [keyword]) for keyword in self._keywords(value)]
        if self.need == "share":
            return sum(matches) / len(matches)
        return float(any(matches) if self.need == "any" else all(matches))

    def _keywords(self, value: Any) -> list[str]:
        keywords = [value] if isinstance(value, str) else value
        if (
            not isinstance(keywords, list | tuple)
            or not keywords
            or not all(isinstance(keyword, str) and keyword.strip() for keyword in keywords)
        ):
            raise RewardError(f"column {self.column!r} holds {value!r:.50} instead of a list of words")
        return list(keywords)


class Repetition(Rule):
    """Minus the share of n-grams that occur earlier in the text: 0 for a text without repetitions, down to -1."""

    name: Literal["repetition"] = "repetition"
    """A penalty for repeated n-grams."""
    n: PositiveCount = 3
    """Length of the n-grams."""
    unit: Literal["words", "tokens"] = "words"
    """Unit of the n-grams: lower-case words, or the actor's tokens (for languages without spaces)."""

    def reward(self, completion: Completion, group: Group) -> float:
        """Returns minus the share of repeated n-grams, between -1 and 0.

        Raises:
            RewardError: the unit is tokens and the completion has none.
        """
        items: Sequence[Any] = _tokens(completion) if self.unit == "tokens" else completion.text.lower().split()
        return -repeated_share(items, n=self.n)


def contains_keyword(text: str, keywords: list[str]) -> bool:
    """True if any keyword stands in the text as whole words, in any case."""
    return any(re.search(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE) for keyword in keywords)


def kept_column(group: Group, column: str) -> Any:
    """The value of a column of the group's row, by its name in `data.keep`; None if the row has no such column."""
    return group.columns.get(column)


def answer_text(value: Any, column: str, *, kind: str) -> str:
    """The right answer in a column as a text.

    Args:
        kind: what the column should hold, as `number`; for the error.

    Raises:
        RewardError: the column holds neither a text nor a finite number.
    """
    if not isinstance(value, str | Real | Decimal) or isinstance(value, bool):
        raise RewardError(
            f"column {column!r} holds no {kind} but a {type(value).__name__}: {value!r:.50}. A part of a mapping is "
            f"kept by its dotted name, as {column}.NAME"
        )
    try:
        text = str(value)
    except ValueError as error:  # of an integer of more than 4300 digits
        raise RewardError(f"column {column!r} holds no {kind} but an integer of too many digits") from error
    if not isinstance(value, str) and text.lower().lstrip("+-") in ("nan", "snan", "inf", "infinity"):
        raise RewardError(f"column {column!r} holds no {kind} but {text}")
    return text


def length_of(completion: Completion, unit: Unit) -> int:
    """Returns the length of a completion in tokens, words or characters.

    Raises:
        RewardError: the unit is tokens and the completion has none.
    """
    if unit == "tokens":
        return len(_tokens(completion))
    return len(completion.text.split() if unit == "words" else completion.text)


def closeness(length: int, *, target: int, tolerance: int, shape: Shape) -> float:
    """Returns 1 for a length within `tolerance` of `target`, and less for others, down to 0; see `Length.shape`."""
    distance = max(0, abs(length - target) - tolerance) / target
    if shape == "step":
        return float(distance == 0)
    return max(0.0, 1 - (distance if shape == "linear" else distance**2))


def overlong_penalty(length: int, *, max_length: int, buffer: int) -> float:
    """Returns 0 up to max_length - buffer, then falls linearly to -1 at max_length (arXiv 2503.14476, equation 13)."""
    excess = length - (max_length - buffer)
    if excess <= 0:
        return 0.0
    return -1.0 if length > max_length else -excess / buffer


def repeated_share(items: Sequence[Any], *, n: int) -> float:
    """Returns the share of n-grams that occur earlier already, 0 to 1; 0 without n-grams."""
    ngrams = [tuple(items[start : start + n]) for start in range(len(items) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _tokens(completion: Completion) -> tuple[int, ...]:
    if completion.text and not completion.tokens:
        raise RewardError("a length in tokens needs completions with tokens; these have text alone")
    return completion.tokens


SCORERS: dict[str, type[BuildableScorer]] = {
    "regex": Regex,
    "length": Length,
    "keywords": Keywords,
    "repetition": Repetition,
}
"""The scorers of this module, by the names that configurations have for them."""
