"""The groups of a run in the order of training, from any position; and those that are held out."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator
from functools import cached_property
from typing import Literal, Protocol

import torch
from tqdm import tqdm

from alignment.data.reader import GroupReader
from alignment.errors import DataError
from alignment.groups import Group
from alignment.settings.data import SourceConfig

MIN_ROWS_FOR_BUDGET = 100
"""Rows that a streamed source must have before its bad-row budget is checked; the fraction of fewer says little."""


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
