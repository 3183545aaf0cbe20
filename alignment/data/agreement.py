"""Every worker reads the data by itself. Before training, the workers check here that all have read the same data."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alignment.data.stream import Data
from alignment.distributed.world import World
from alignment.errors import DataError
from alignment.groups import Group

ADVICE = (
    "Every worker reads the data by itself, and must read the same row by row: put the files where all machines see "
    "them, or bring the copies up to date"
)


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Figures about the data that one worker has read; those of two workers can be compared."""

    num_groups: int | None
    """Number of groups to train on; None for a stream."""
    num_held_out: int
    """Number of held-out groups."""
    steps: int
    """Number of optimizer steps of the run."""
    train: str
    """Hash of the training data."""
    held_out: str
    """Hash of the held-out groups."""

    def __str__(self) -> str:
        groups = "a stream" if self.num_groups is None else f"{self.num_groups} groups to train on"
        return f"{groups} ({self.train[:8]}), {self.num_held_out} held out ({self.held_out[:8]}), {self.steps} steps"


def check_data(data: Data, steps: int, world: World) -> None:
    """Checks that all workers have read the same data. Every worker must call this, and every worker gets the error.

    Raises:
        DataError: the workers have read different data; the text gives the figures of each worker.
    """
    if world.size == 1:
        return
    summary = DataSummary(
        num_groups=data.num_train,
        num_held_out=len(data.eval),
        steps=steps,
        train=data.fingerprint,
        held_out=digest(data.eval),
    )
    summaries = world.gather(summary)
    _check_alike(summaries, list(map(str, summaries)), "have not read the same data")


def check_step(groups: Sequence[Group], step: int, world: World) -> None:
    """Checks that all workers hold the same groups for a step, before the step is trained on.

    A streamed source may give other rows at its next reading; this check finds it at the first step that differs.

    Raises:
        DataError: as `check_data`.
    """
    if world.size > 1:
        digests = world.gather(digest(groups))
        description = f"{len(groups)} groups from {groups[0].id} to {groups[-1].id}"
        _check_alike(
            digests, world.gather(description) if len(set(digests)) > 1 else [], f"hold other groups for step {step}"
        )


def digest(groups: Iterable[Group]) -> str:
    """Returns a hash (hex digits) of the groups' tokens, loss masks and rewards."""
    total = hashlib.sha256()
    for group in groups:
        total.update(array("q", group.prompt_tokens).tobytes())
        for completion in group.completions:
            total.update(repr((len(completion.tokens), completion.reward)).encode())
            total.update(array("q", completion.tokens).tobytes())
            total.update(bytes(completion.loss_mask))
    return total.hexdigest()


def _check_alike(values: Sequence[object], descriptions: Sequence[str], problem: str) -> None:
    """`values`: the value that each worker has, by rank; `descriptions`: the same as text for people."""
    ranks: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    if len(ranks) > 1:
        details = "; ".join(
            f"{_format_ranks(equal_ranks)}: {descriptions[equal_ranks[0]]}" for equal_ranks in ranks.values()
        )
        raise DataError(f"the workers {problem}. {details}. {ADVICE}")


def _format_ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"worker {ranks[0]}"
    numbers = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"workers {numbers}"
