"""The groups of a run in the order of training: read, checked and tokenised, with a cursor that can be put back."""

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
from alignment.data.shapes import ReadRow, has_equal_scores, to_group
from alignment.data.sources import read_rows
from alignment.errors import DataError, NoPreference, RewardError
from alignment.groups import Group
from alignment.settings.data import DataConfig, SourceConfig

if TYPE_CHECKING:
    from alignment.rewards import BuildableScorer

MAX_NAMES = 8
"""Columns that a report names."""
MIN_ROWS_FOR_BUDGET = 100
"""A streamed source may break the bad-row budget only after this many rows, when the fraction means something."""


class GroupReader:
    """Reads sources into tokenised groups that an algorithm can learn from, and keeps the account of bad rows."""

    def __init__(
        self,
        data: DataConfig,
        algorithm: Algorithm,
        tokenizer: GroupTokenizer,
        bad_rows: Path | None = None,
        *,
        rewards: Sequence[BuildableScorer] = (),
        judges: Sequence[BuildableScorer] = (),
    ) -> None:
        """Args:
        bad_rows: file that names every skipped row, one JSON object per line; None keeps no such file.
        rewards: scorers that will judge answers to these rows; a row whose columns one cannot read is a bad one.
        judges: those that will judge answers to held-out rows alone.
        """
        self.data = data
        self.algorithm = algorithm
        self.tokenizer = tokenizer
        self.bad_rows = bad_rows
        self.rewards = rewards
        self.judges = judges
        self.num_rows = self.num_bad = self.num_long = self.num_equal_scores = 0
        self.left_out: Counter[str] = Counter()
        self.unread_columns: Counter[str] = Counter()
        """Rows that had something in a column that nothing reads, by the column's name."""
        self.first_bad: list[str] = []
        self._named: set[str] = set()

    @property
    def num_undecided(self) -> int:
        """Rows that are in order and have nothing to learn from."""
        return self.left_out.total()

    def read(self, source: SourceConfig) -> Iterator[Group]:
        """Yields the usable groups of one source, in its order.

        Raises:
            DataError: the source cannot be opened, or a row is bad and `on_bad_row` is `fail`.
        """
        for origin, row in read_rows(source):
            self.num_rows += 1
            try:
                if isinstance(row, DataError):
                    raise row
                row = ReadRow(row)
                group = to_group(row, origin, source)
                self.unread_columns.update(row.unread)
                group = self._selected(group, row)
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
                self.left_out[error.reason] += 1
            except DataError as error:
                self._bad(origin, error)

    def note_on_weights(self) -> str:
        """What to say where a source gives its fraction by its old name, as the end of a line."""
        sources = (*self.data.sources, *([self.data.eval] if self.data.eval else []))
        renamed = any(self.data.fraction_of(source) != source.fraction for source in sources)
        return "; a weight without a streaming mixture is read as a fraction, which is its name now" if renamed else ""

    def _check_columns(self, group: Group, source: SourceConfig) -> None:
        """Raises DataError if a scorer could give no answer to this row a reward."""
        is_held_out = self.data.eval is None or source == self.data.eval
        for scorer in (*self.rewards, *(self.judges if is_held_out else ())):
            try:
                scorer.check_row(group.columns)
            except RewardError as error:
                raise DataError(f"{scorer.name}: {error}") from error
        if self.rewards and all(scorer.abstains(group.columns) for scorer in self.rewards):
            names = ", ".join(column for scorer in self.rewards for column in scorer.columns)
            raise DataError(f"no scorer has a reward for this row: it has none of their columns ({names})")

    def check_budget(self) -> None:
        """Raises DataError if more rows were bad than `bad_row_budget` allows."""
        if self.num_bad > self.data.bad_row_budget * self.num_rows:
            raise DataError(
                f"{self.num_bad} of {self.num_rows} rows are bad, more than data.bad_row_budget "
                f"({self.data.bad_row_budget:g}) allows. The first:\n  " + "\n  ".join(self.first_bad)
            )

    def summary(self) -> str:
        """One line about what was read and what was left out."""
        text = f"{self.num_rows} rows"
        if self.num_long:
            text += f", {self.num_long} longer than {self.data.max_characters} characters left out"
        for reason, count in self.left_out.items():
            text += f", {count} {reason} left out"
        if self.num_equal_scores:
            text += f", {self.num_equal_scores} whose chosen and rejected have equal scores"
        if self.num_bad:
            text += f", {self.num_bad} bad ones skipped (the first: {self.first_bad[0]}; all in {self.bad_rows})"
        if self.unread_columns:
            names = [name for name, _ in self.unread_columns.most_common(MAX_NAMES)]
            more = len(self.unread_columns) - len(names)
            text += f"; columns that are not read: {', '.join(sorted(names))}" + (f" and {more} more" if more else "")
        notes = self.tokenizer.summary()
        return f"{text}; {notes}" if notes else text

    def _selected(self, group: Group, row: ReadRow) -> Group:
        """What the algorithm learns of a group. Where answers are missing, the error tells what else the row has."""
        try:
            return self.algorithm.select(group)
        except NoPreference:
            raise
        except DataError as error:
            if group.completions or not row.unread:
                raise
            raise DataError(
                f"{error}, and these columns are not read: {', '.join(map(repr, row.unread))}. Say by data.columns "
                "what they are, as {completion: answer}, or {chosen: better, rejected: worse}"
            ) from error

    def _too_many_characters(self, group: Group) -> bool:
        limit = self.data.max_characters
        if limit is None or not group.completions:
            return False
        turns = group.prompt if not isinstance(group.prompt, str) else ()
        prompt = len(group.prompt) if isinstance(group.prompt, str) else sum(len(turn.content) for turn in turns)
        answers = (c.text + "".join(turn.content for turn in c.following) for c in group.completions)
        return prompt + max(map(len, answers)) > limit

    def _bad(self, origin: str, error: DataError) -> None:
        if self.data.on_bad_row == "fail":
            raise DataError(
                f"{origin}: {error}. Set data.on_bad_row=skip to leave such rows out (up to data.bad_row_budget)"
            ) from error
        self.num_bad += 1
        if len(self.first_bad) < 3:
            self.first_bad.append(f"{origin}: {error}")
        if self.bad_rows is not None and origin not in self._named:  # a stream meets it again in every epoch
            self._named.add(origin)
            with self.bad_rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"row": origin, "why": str(error)}, ensure_ascii=False) + "\n")


class GroupStream(Protocol):
    """An endless, repeatable sequence of groups."""

    position: int
    """Groups taken since the beginning of the run. Setting it moves the cursor, which is all that resuming needs."""

    def take(self, count: int) -> list[Group]:
        """The next `count` groups."""


class ListStream:
    """Groups held in memory, in a new random order every epoch that depends on seed and epoch alone."""

    def __init__(self, groups: list[Group], *, seed: int, shuffle: bool) -> None:
        self.groups = groups
        self.seed = seed
        self.shuffle = shuffle
        self.position = 0

    def take(self, count: int) -> list[Group]:
        picked = [self.groups[index] for index in self.indices(self.position, count)]
        self.position += count
        return picked

    def indices(self, start: int, count: int) -> list[int]:
        """Which groups are taken from position `start` on."""
        taken: list[int] = []
        while len(taken) < count:
            epoch, offset = divmod(start + len(taken), len(self.groups))
            taken += self._order(epoch)[offset : offset + count - len(taken)]
        return taken

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.groups)))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.groups), generator=generator).tolist()


class LiveStream:
    """Groups read while training, each source shuffled through a buffer of its own.

    Of several sources each group is drawn from one, by weight. A source goes on from its own place, and begins again in
    another order when it ends. All of it depends on the seed and the position alone: moving the cursor back reads again
    from the beginning, and a resumed run is exact.
    """

    def __init__(self, reader: GroupReader, sources: tuple[SourceConfig, ...], *, seed: int, buffer: int) -> None:
        """`buffer`: groups of each source held to shuffle from; 1 keeps their order."""
        self.reader = reader
        self.sources = sources
        self.seed = seed
        self.buffer = buffer
        self.position = 0
        self._read = 0
        self._groups = self._drawn()

    def take(self, count: int) -> list[Group]:
        if self.position < self._read:
            self._read, self._groups = 0, self._drawn()
        while self._read < self.position:
            self._next()
        groups = [self._next() for _ in range(count)]
        self.position = self._read
        return groups

    @property
    def kind(self) -> str:
        """What its order depends on, but for the rows: a resumed run must have the same."""
        weights = [source.weight for source in self.sources]
        fractions = [self.reader.data.fraction_of(source) for source in self.sources]
        return repr((weights, fractions, [(source.skip, source.take) for source in self.sources], self.buffer))

    def summary(self) -> str:
        """One line about what was read so far, in every epoch, and what was left out."""
        return self.reader.summary()

    def _next(self) -> Group:
        group = next(self._groups)
        self._read += 1
        if self.reader.num_rows >= MIN_ROWS_FOR_BUDGET:
            self.reader.check_budget()
        return group

    def _drawn(self) -> Iterator[Group]:
        """The groups of all sources, mixed."""
        streams = [self._endless(number, source) for number, source in enumerate(self.sources)]
        weights = [source.weight for source in self.sources]
        chance = random.Random(f"{self.seed}-mixture")
        while True:
            (stream,) = chance.choices(streams, weights) if len(streams) > 1 else streams
            yield next(stream)

    def _endless(self, number: int, source: SourceConfig) -> Iterator[Group]:
        """The groups of one source, over and over."""
        fraction = self.reader.data.fraction_of(source)
        epoch = 0
        while True:
            chance = random.Random(f"{self.seed}-{epoch}" + (f"-{number}" if number else ""))
            lot = random.Random(f"{self.seed}-{number}")  # the same groups in every epoch
            held: list[Group] = []
            empty = True
            for group in self.reader.read(source):
                if lot.random() >= fraction:
                    continue
                empty = False
                held.append(group)
                if len(held) >= self.buffer:
                    yield held.pop(chance.randrange(len(held)))
            chance.shuffle(held)
            yield from held
            if empty:
                raise DataError(f"the streamed data {source.path} holds no usable group: {self.reader.summary()}")
            epoch += 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run learns from and what it is measured on."""

    train: GroupStream
    num_train: int | None
    """Groups in one epoch; None for a stream."""
    eval: list[Group]
    report: str
    """What was read and left out, for people."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all training tokens and rewards, in the file's order; for a stream, of what its order depends on."""
        digest = hashlib.sha256(self.train.kind.encode() if isinstance(self.train, LiveStream) else b"")
        for group in self.train.groups if isinstance(self.train, ListStream) else []:
            answers = [(c.tokens, c.learned, c.reward) for c in group.completions]
            digest.update(repr((group.prompt_tokens, answers)).encode())
        return digest.hexdigest()


def load_data(reader: GroupReader, *, seed: int, progress: bool) -> Data:
    """Reads everything that does not stream, checks the bad-row budget, and separates what is held out.

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
        groups, held_out = hold_out(groups, data.eval_groups, seed=seed, by=data.hold_out_by)
    if not groups:
        raise DataError(f"no usable group is left to train on: {reader.summary()}")
    train = ListStream(groups, seed=seed, shuffle=data.shuffle)
    trained = {group.prompt_tokens for group in groups} if data.eval else set()
    shared = sum(group.prompt_tokens in trained for group in held_out)
    overlap = f" ({shared} of them with prompts that are trained on)" if shared else ""
    report = f"{len(groups)} groups to train on, {len(held_out)} held out{overlap}, from {reader.summary()}"
    report += reader.note_on_weights()
    return Data(train=train, num_train=len(groups), eval=held_out, report=report)


def hold_out(
    groups: list[Group], count: int, *, seed: int, by: Literal["prompt", "first_turn"] = "prompt"
) -> tuple[list[Group], list[Group]]:
    """Separates whole prompts, so that no held-out prompt is trained on, until `count` groups are held out.

    Args:
        by: what counts as the same prompt; `first_turn` is the first message of a user.

    Returns:
        The rest and the held-out groups, each in the given order.

    Raises:
        DataError: nothing would be left to train on.
    """
    by_prompt: dict[object, list[int]] = {}
    begins: dict[str, object] = {}  # a conversation of several examples, of one id, is not torn apart
    for index, group in enumerate(groups):
        prompt = begins.setdefault(group.id, group.prompt if by == "prompt" else _first_turn(group))
        by_prompt.setdefault(prompt, []).append(index)
    prompts = list(by_prompt)
    random.Random(seed).shuffle(prompts)
    chosen: set[int] = set()
    while prompts and len(chosen) < count:
        chosen.update(by_prompt[prompts.pop()])
    if not prompts:
        raise DataError(f"data.eval_groups ({count}) leaves nothing to train on: there are {len(groups)} groups")
    return (
        [group for index, group in enumerate(groups) if index not in chosen],
        [group for index, group in enumerate(groups) if index in chosen],
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
        read = list(bar)
        fraction = reader.data.fraction_of(source)
        if fraction < 1:
            if reader.data.shuffle:
                random.Random(seed).shuffle(read)
            read = read[: round(len(read) * fraction)]
        groups += read
    reader.check_budget()
    return groups
