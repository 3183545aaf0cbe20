"""Every worker reads the data itself; here they make sure, before anything is learned, that they have read the same."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alignment.data.stream import Data
from alignment.errors import DataError
from alignment.groups import Group
from alignment.models.parallel import World

ADVICE = (
    "Every worker reads the data by itself, and must read the same row by row: put the files where all machines see "
    "them, or bring the copies up to date"
)


@dataclass(frozen=True, kw_only=True)
class View:
    """What a worker has read, in figures that can be compared."""

    num_groups: int | None
    """To train on; None for a stream."""
    num_held_out: int
    steps: int
    train: str
    """Hash of the training data."""
    held_out: str

    def __str__(self) -> str:
        groups = "a stream" if self.num_groups is None else f"{self.num_groups} groups to train on"
        return f"{groups} ({self.train[:8]}), {self.num_held_out} held out ({self.held_out[:8]}), {self.steps} steps"


def check_data(data: Data, steps: int, world: World) -> None:
    """Refuses, on every worker, what the workers have not read alike.

    Raises:
        DataError: with the figures, and which worker has which.
    """
    if world.size == 1:
        return
    view = View(
        num_groups=data.num_train,
        num_held_out=len(data.eval),
        steps=steps,
        train=data.fingerprint,
        held_out=digest(data.eval),
    )
    views = world.gather(view)
    _check_alike(views, list(map(str, views)), "have not read the same data")


def check_step(groups: Sequence[Group], step: int, world: World) -> None:
    """Refuses, on every worker and before it is learned from, a step for which the workers hold other groups.

    So no stream can drift apart in silence, whatever its source does between two readings.

    Raises:
        DataError: as `check_data`.
    """
    if world.size > 1:
        digests, shown = world.gather(digest(groups)), f"{len(groups)} groups from {groups[0].id} to {groups[-1].id}"
        _check_alike(
            digests, world.gather(shown) if len(set(digests)) > 1 else [], f"hold other groups for step {step}"
        )


def digest(groups: Iterable[Group]) -> str:
    """Hash of the groups' tokens, of which of them are learned, and of their rewards."""
    total = hashlib.sha256()
    for group in groups:
        total.update(array("q", group.prompt_tokens).tobytes())
        for completion in group.completions:
            total.update(repr((len(completion.tokens), completion.reward)).encode())
            total.update(array("q", completion.tokens).tobytes())
            total.update(bytes(completion.learned))
    return total.hexdigest()


def _check_alike(items: Sequence[object], texts: Sequence[str], problem: str) -> None:
    """`items`: what each worker has, by rank; `texts`: the same for people."""
    ranks: dict[object, list[int]] = {}
    for rank, item in enumerate(items):
        ranks.setdefault(item, []).append(rank)
    if len(ranks) > 1:
        shown = "; ".join(f"{_named(members)}: {texts[members[0]]}" for members in ranks.values())
        raise DataError(f"the workers {problem}. {shown}. {ADVICE}")


def _named(members: list[int]) -> str:
    if len(members) == 1:
        return f"worker {members[0]}"
    shown = ", ".join(map(str, members[:8])) + (f" and {len(members) - 8} more" if len(members) > 8 else "")
    return f"workers {shown}"
