"""Reads sources into tokenised groups that an algorithm can train on, and says what was left out and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.algorithms import Algorithm
from alignment.data.chat import GroupTokenizer
from alignment.data.rows.messages import find_message_columns
from alignment.data.shapes import TrackedRow, has_equal_scores, has_unknown_ends, has_unreadable_scores, to_group
from alignment.data.sources import read_rows
from alignment.errors import DataError, NoPreference, RewardError
from alignment.groups import Group
from alignment.settings.data import DataConfig, SourceConfig

if TYPE_CHECKING:
    from alignment.rewards import BuildableScorer

NUM_FIRST_ROWS = 100
"""Number of rows of a source that say which columns hold messages as JSON text."""
MAX_NAMES = 8
"""Number of columns that a report names at most."""


class GroupReader:
    """Reads sources into tokenised groups that an algorithm can train on, and counts the bad rows."""

    def __init__(
        self,
        data: DataConfig,
        algorithm: Algorithm,
        tokenizer: GroupTokenizer,
        bad_rows: Path | None = None,
        *,
        rewards: Sequence[BuildableScorer] = (),
        eval_rewards: Sequence[BuildableScorer] = (),
    ) -> None:
        """Args:
        bad_rows: file to which every skipped row is appended, as one JSON object per line; None writes no such file.
        rewards: scorers that will rate answers to these rows; a row with columns that one of them cannot read is bad.
        eval_rewards: scorers that will rate answers to held-out rows only.
        """
        self.data = data
        self.algorithm = algorithm
        self.tokenizer = tokenizer
        self.bad_rows = bad_rows
        self.rewards = rewards
        self.eval_rewards = eval_rewards
        self.num_rows = self.num_bad = self.num_long = self.num_equal_scores = self.num_unreadable_scores = 0
        self.num_unknown_ends = 0
        self.empty_sources: list[str] = []
        """Paths of the sources that were read to their end and gave no usable group."""
        self.skipped_counts: Counter[str] = Counter()
        """Number of rows that are valid and have nothing to train on, by the reason."""
        self.unread_columns: Counter[str] = Counter()
        """Number of rows that have a value in a column that nothing reads, by the name of the column."""
        self.first_bad: list[str] = []
        self._reported_origins: set[str] = set()

    @property
    def num_undecided(self) -> int:
        """Number of rows that are valid and have nothing to train on."""
        return self.skipped_counts.total()

    def read(self, source: SourceConfig) -> Iterator[Group]:
        """Yields the usable groups of one source, in the order of the source.

        Raises:
            DataError: the source cannot be opened, or a row is bad and `on_bad_row` is `fail`.
        """
        is_empty = True
        rows = read_rows(source)
        first_rows = list(islice(rows, NUM_FIRST_ROWS))
        message_columns = find_message_columns(row for _, row in first_rows)
        for origin, row in chain(first_rows, rows):
            self.num_rows += 1
            try:
                if isinstance(row, DataError):
                    raise row
                row = TrackedRow(row)
                group = to_group(row, origin, source, message_columns=message_columns)
                self.unread_columns.update(row.unread_columns)
                group = self._select_completions(group, row)
                self._check_columns(group, source)
                self.num_equal_scores += bool(group.pairs) and has_equal_scores(row)
                self.num_unreadable_scores += bool(group.pairs) and has_unreadable_scores(row)
                self.num_unknown_ends += has_unknown_ends(row)
                if self._too_many_characters(group):
                    self.num_long += 1
                    continue
                examples = self.tokenizer.examples(group)
                if group.pairs and not any(example.pairs for example in examples):
                    raise NoPreference("the answers are the same as far as data.max_length shows them")
                is_empty = False
                yield from examples
            except NoPreference as error:
                self.skipped_counts[error.reason] += 1
            except DataError as error:
                self._handle_bad_row(origin, error)
        if is_empty:
            self.empty_sources.append(str(source.path))

    def note_on_weights(self) -> str:
        """The end of a line that says that a source names its fraction by the old key; empty if none does."""
        sources = (*self.data.sources, *([self.data.eval] if self.data.eval else []))
        has_old_names = any(self.data.fraction_of(source) != source.fraction for source in sources)
        return (
            "; a weight without a streaming mixture is read as a fraction, which is its name now"
            if has_old_names
            else ""
        )

    def _check_columns(self, group: Group, source: SourceConfig) -> None:
        """Checks that every scorer can read its columns, and that some scorer rates answers to this row.

        Raises:
            DataError: a scorer cannot read its columns, or every scorer would abstain.
        """
        is_held_out = self.data.eval is None or source == self.data.eval
        for scorer in (*self.rewards, *(self.eval_rewards if is_held_out else ())):
            try:
                scorer.check_row(group.columns)
            except RewardError as error:
                raise DataError(f"{scorer.name}: {error}") from error
        if self.rewards and all(scorer.abstains(group.columns) for scorer in self.rewards):
            names = ", ".join(column for scorer in self.rewards for column in scorer.columns)
            raise DataError(f"no scorer has a reward for this row: it has none of their columns ({names})")

    def check_budget(self) -> None:
        """Checks the number of bad rows so far.

        Raises:
            DataError: more rows are bad than `bad_row_budget` allows; the text has the first of them.
        """
        if self.num_bad > self.data.bad_row_budget * self.num_rows:
            raise DataError(
                f"{self.num_bad} of {self.num_rows} rows are bad, more than data.bad_row_budget "
                f"({self.data.bad_row_budget:g}) allows. The first:\n  " + "\n  ".join(self.first_bad)
            )

    def summary(self) -> str:
        """One line for people: how many rows were read, and how many were left out for which reason."""
        text = f"{self.num_rows} rows"
        if self.num_long:
            text += f", {self.num_long} longer than {self.data.max_characters} characters left out"
        for reason, count in self.skipped_counts.items():
            text += f", {count} {reason} left out"
        if self.num_equal_scores:
            text += f", {self.num_equal_scores} whose chosen and rejected have equal scores"
        if self.num_unreadable_scores:
            text += f", {self.num_unreadable_scores} whose scores of chosen and rejected are no numbers"
        if self.num_unknown_ends:
            text += f", {self.num_unknown_ends} of an export without finish_reasons, learned without an end token"
        if self.num_bad:
            text += f", {self.num_bad} bad ones skipped (the first: {self.first_bad[0]}; all in {self.bad_rows})"
        if self.unread_columns:
            names = [name for name, _ in self.unread_columns.most_common(MAX_NAMES)]
            num_unnamed = len(self.unread_columns) - len(names)
            text += f"; columns that are not read: {', '.join(sorted(names))}" + (
                f" and {num_unnamed} more" if num_unnamed else ""
            )
        if self.empty_sources and len(self.data.sources) > 1:
            text += f"; no usable group in {', '.join(self.empty_sources)}"
        notes = self.tokenizer.summary()
        return f"{text}; {notes}" if notes else text

    def _select_completions(self, group: Group, row: TrackedRow) -> Group:
        """The group with the completions that the algorithm trains on.

        Raises:
            DataError: the algorithm cannot use the group; if answers are missing, the text names the unread columns.
        """
        try:
            return self.algorithm.select(group)
        except NoPreference:
            raise
        except DataError as error:
            if group.completions or not row.unread_columns:
                raise
            raise DataError(
                f"{error}, and these columns are not read: {', '.join(map(repr, row.unread_columns))}. Say by "
                "data.columns what they are, as {completion: answer}, or {chosen: better, rejected: worse}"
            ) from error

    def _too_many_characters(self, group: Group) -> bool:
        limit = self.data.max_characters
        if limit is None or not group.completions:
            return False
        turns = group.prompt if not isinstance(group.prompt, str) else ()
        prompt = len(group.prompt) if isinstance(group.prompt, str) else sum(len(turn.content) for turn in turns)
        answers = (c.text + "".join(turn.content for turn in c.following) for c in group.completions)
        return prompt + max(map(len, answers)) > limit

    def _handle_bad_row(self, origin: str, error: DataError) -> None:
        if self.data.on_bad_row == "fail":
            raise DataError(
                f"{origin}: {error}. Set data.on_bad_row=skip to leave such rows out (up to data.bad_row_budget)"
            ) from error
        self.num_bad += 1
        if len(self.first_bad) < 3:
            self.first_bad.append(f"{origin}: {error}")
        # A stream reads the same row again in every epoch.
        if self.bad_rows is not None and origin not in self._reported_origins:
            self._reported_origins.add(origin)
            with self.bad_rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"row": origin, "why": str(error)}, ensure_ascii=False) + "\n")
