"""Reads, checks and tokenises the groups of a run, and gives them in the order of training from any position."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from tqdm import tqdm

from alignment.algorithms import Algorithm
from alignment.data.chat import GroupTokenizer
from alignment.data.shapes import TrackedRow, has_equal_scores, to_group
from alignment.data.sources import read_rows
from alignment.errors import DataError, NoPreference, RewardError
from alignment.groups import Group
from alignment.settings.data import DataConfig, SourceConfig

if TYPE_CHECKING:
    from alignment.rewards import BuildableScorer

MAX_NAMES = 8
"""Number of columns that a report names at most."""
MIN_ROWS_FOR_BUDGET = 100
"""Rows that a streamed source must have before its bad-row budget is checked; the fraction of fewer says little."""


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
        self.num_rows = self.num_bad = self.num_long = self.num_equal_scores = 0
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
        for origin, row in read_rows(source):
            self.num_rows += 1
            try:
                if isinstance(row, DataError):
                    raise row
                row = TrackedRow(row)
                group = to_group(row, origin, source)
                self.unread_columns.update(row.unread_columns)
                group = self._select_completions(group, row)
                self._check_columns(group, source)
                self.num_equal_scores += bool(group.pairs) and has_equal_scores(row)
                if self._too_many_characters(group):
                    self.num_long += 1
                    continue
                examples = self.tokenizer.examples(group)
                if group.pairs and not any(example.pairs for example in examples):
                    raise NoPreference("the answers are the same as far as data.max_length shows them")
                yield from examples
            except NoPreference as error:
                self.skipped_counts[error.reason] += 1
            except DataError as error:
                self._handle_bad_row(origin, error)

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
        if self.num_bad:
            text += f", {self.num_bad} bad ones skipped (the first: {self.first_bad[0]}; all in {self.bad_rows})"
        if self.unread_columns:
            names = [name for name, _ in self.unread_columns.most_common(MAX_NAMES)]
            num_unnamed = len(self.unread_columns) - len(names)
            text += f"; columns that are not read: {', '.join(sorted(names))}" + (
                f" and {num_unnamed} more" if num_unnamed else ""
            )
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


class GroupStream(Protocol):
    """An endless, repeatable sequence of groups."""

    position: int
    """Number of groups taken since the beginning of the run. To resume, set it."""

    def take(self, count: int) -> list[Group]:
        """Returns the next `count` groups and moves the position."""


class ListStream:
    """Groups in memory, in a new random order in every epoch, which depends only on the seed and the epoch."""

    def __init__(self, groups: list[Group], *, seed: int, shuffle: bool) -> None:
        self.groups = groups
        self.seed = seed
        self.shuffle = shuffle
        self.position = 0

    def take(self, count: int) -> list[Group]:
        """Returns the next `count` groups and moves the position."""
        groups = [self.groups[index] for index in self.indices(self.position, count)]
        self.position += count
        return groups

    def indices(self, start: int, count: int) -> list[int]:
        """Indices of the `count` groups from position `start` on."""
        indices: list[int] = []
        while len(indices) < count:
            epoch, offset = divmod(start + len(indices), len(self.groups))
            indices += self._order(epoch)[offset : offset + count - len(indices)]
        return indices

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.groups)))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.groups), generator=generator).tolist()


class LiveStream:
    """Groups that are read while the run trains; each source is shuffled through a buffer of its own.

    With several sources, the source of each group is drawn at random by weight. Each source keeps its own position; at
    its end it begins again, in another order. The order depends only on the seed and the position, so that a resumed
    run is exact. Moving the position back reads the sources again from the beginning.
    """

    def __init__(self, reader: GroupReader, sources: tuple[SourceConfig, ...], *, seed: int, buffer: int) -> None:
        """`buffer`: number of groups of each source to shuffle from; 1 keeps the order of the source."""
        self.reader = reader
        self.sources = sources
        self.seed = seed
        self.buffer = buffer
        self.position = 0
        self._num_read = 0
        self._groups = self._mix_sources()

    def take(self, count: int) -> list[Group]:
        """Returns the next `count` groups and moves the position.

        Raises:
            DataError: a source cannot be read, has no usable group, or has too many bad rows.
        """
        if self.position < self._num_read:
            self._num_read, self._groups = 0, self._mix_sources()
        while self._num_read < self.position:
            self._next_group()
        groups = [self._next_group() for _ in range(count)]
        self.position = self._num_read
        return groups

    @property
    def kind(self) -> str:
        """All that the order depends on besides the rows, as text; a resumed run must have the same."""
        weights = [source.weight for source in self.sources]
        fractions = [self.reader.data.fraction_of(source) for source in self.sources]
        return repr((weights, fractions, [(source.skip, source.take) for source in self.sources], self.buffer))

    def summary(self) -> str:
        """One line for people about the rows that were read so far, over all epochs, and those that were left out."""
        return self.reader.summary()

    def _next_group(self) -> Group:
        group = next(self._groups)
        self._num_read += 1
        if self.reader.num_rows >= MIN_ROWS_FOR_BUDGET:
            self.reader.check_budget()
        return group

    def _mix_sources(self) -> Iterator[Group]:
        """Yields the groups of all sources without end, each from a source that is drawn by weight."""
        streams = [self._repeat_source(number, source) for number, source in enumerate(self.sources)]
        weights = [source.weight for source in self.sources]
        rng = random.Random(f"{self.seed}-mixture")
        while True:
            (stream,) = rng.choices(streams, weights) if len(streams) > 1 else streams
            yield next(stream)

    def _repeat_source(self, number: int, source: SourceConfig) -> Iterator[Group]:
        """Yields the groups of one source without end, in another order in every epoch."""
        fraction = self.reader.data.fraction_of(source)
        epoch = 0
        while True:
            shuffle_rng = random.Random(f"{self.seed}-{epoch}" + (f"-{number}" if number else ""))
            sampling_rng = random.Random(f"{self.seed}-{number}")  # the same groups in every epoch
            buffered_groups: list[Group] = []
            is_empty = True
            for group in self.reader.read(source):
                if sampling_rng.random() >= fraction:
                    continue
                is_empty = False
                buffered_groups.append(group)
                if len(buffered_groups) >= self.buffer:
                    yield buffered_groups.pop(shuffle_rng.randrange(len(buffered_groups)))
            shuffle_rng.shuffle(buffered_groups)
            yield from buffered_groups
            if is_empty:
                raise DataError(f"the streamed data {source.path} holds no usable group: {self.reader.summary()}")
            epoch += 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The groups that a run trains on, and the held-out groups that it is evaluated on."""

    train: GroupStream
    """The groups to train on, in order."""
    num_train: int | None
    """Number of groups in one epoch; None for a stream."""
    eval: list[Group]
    """The held-out groups."""
    report: str
    """One line for people: what was read and what was left out."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all training tokens and rewards in the order of the sources; for a stream, of `LiveStream.kind`."""
        digest = hashlib.sha256(self.train.kind.encode() if isinstance(self.train, LiveStream) else b"")
        for group in self.train.groups if isinstance(self.train, ListStream) else []:
            answers = [(c.tokens, c.loss_mask, c.reward) for c in group.completions]
            digest.update(repr((group.prompt_tokens, answers)).encode())
        return digest.hexdigest()


def load_data(reader: GroupReader, *, seed: int, progress: bool) -> Data:
    """Reads all sources that do not stream, checks the bad-row budget, and separates the held-out groups.

    Args:
        seed: decides which groups are held out and the order of training.
        progress: whether to show a progress bar.

    Raises:
        DataError: a source cannot be read, has no usable group, or has too many bad rows.
    """
    data = reader.data
    held_out = _read_all(reader, (data.eval,), seed=seed, progress=progress) if data.eval else []
    if data.eval and data.eval_groups:
        held_out = held_out[: data.eval_groups]
    if any(source.streaming for source in data.sources):
        buffer = data.shuffle_buffer if data.shuffle else 1
        live = LiveStream(reader, data.sources, seed=seed, buffer=buffer)
        if data.eval_groups and not data.eval:
            raise DataError("data.eval_groups cannot be cut from a stream; give data.eval, or set it to 0")
        return Data(train=live, num_train=None, eval=held_out, report=f"streaming{reader.note_on_weights()}")
    groups = _read_all(reader, data.sources, seed=seed, progress=progress)
    if data.eval is None and data.eval_groups:
        groups, held_out = hold_out(groups, data.eval_groups, seed=seed, group_by=data.hold_out_by)
    if not groups:
        raise DataError(f"no usable group is left to train on: {reader.summary()}")
    train = ListStream(groups, seed=seed, shuffle=data.shuffle)
    training_prompts = {group.prompt_tokens for group in groups} if data.eval else set()
    num_shared = sum(group.prompt_tokens in training_prompts for group in held_out)
    overlap = f" ({num_shared} of them with prompts that are trained on)" if num_shared else ""
    report = f"{len(groups)} groups to train on, {len(held_out)} held out{overlap}, from {reader.summary()}"
    report += reader.note_on_weights()
    return Data(train=train, num_train=len(groups), eval=held_out, report=report)


def hold_out(
    groups: list[Group], count: int, *, seed: int, group_by: Literal["prompt", "first_turn"] = "prompt"
) -> tuple[list[Group], list[Group]]:
    """Separates whole prompts, so that no held-out prompt is trained on, until `count` groups are held out.

    Args:
        by: which groups have the same prompt: those with equal prompts, or those with an equal first user message.

    Returns:
        The groups to train on and the held-out groups, each in the given order.

    Raises:
        DataError: no group would be left to train on.
    """
    indices_by_prompt: dict[object, list[int]] = {}
    prompt_by_id: dict[str, object] = {}  # keeps the examples of one conversation, which share an id, together
    for index, group in enumerate(groups):
        prompt = prompt_by_id.setdefault(group.id, group.prompt if group_by == "prompt" else _first_turn(group))
        indices_by_prompt.setdefault(prompt, []).append(index)
    prompts = list(indices_by_prompt)
    random.Random(seed).shuffle(prompts)
    held_out: set[int] = set()
    while prompts and len(held_out) < count:
        held_out.update(indices_by_prompt[prompts.pop()])
    if not prompts:
        raise DataError(f"data.eval_groups ({count}) leaves nothing to train on: there are {len(groups)} groups")
    return (
        [group for index, group in enumerate(groups) if index not in held_out],
        [group for index, group in enumerate(groups) if index in held_out],
    )


def _first_turn(group: Group) -> object:
    if isinstance(group.prompt, str):
        return group.prompt
    return next((turn.content for turn in group.prompt if turn.role == "user"), group.prompt)


def _read_all(reader: GroupReader, sources: tuple[SourceConfig, ...], *, seed: int, progress: bool) -> list[Group]:
    groups: list[Group] = []
    for source in sources:
        bar = tqdm(
            reader.read(source),
            desc=f"reading {source.path}",
            unit=" groups",
            disable=None if progress else True,
            leave=False,
        )
        source_groups = list(bar)
        fraction = reader.data.fraction_of(source)
        if fraction < 1:
            if reader.data.shuffle:
                random.Random(seed).shuffle(source_groups)
            source_groups = source_groups[: round(len(source_groups) * fraction)]
        groups += source_groups
    reader.check_budget()
    return groups
