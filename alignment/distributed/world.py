"""One worker or many: the World that a loop runs in, its collectives, and work that ends on all workers alike."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from alignment.errors import AlignmentError

Item = TypeVar("Item")


ROUND_S = 30.0
"""Longest time that workers wait in one collective while only the main worker is working."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A worker's position among all workers. For a single worker, every collective is the identity."""

    rank: int = 0
    """This worker's number, from 0."""
    size: int = 1
    """Number of workers."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The device that this worker computes on."""

    @property
    def is_main(self) -> bool:
        """True on the one worker that writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, item: Item) -> Item:
        """Sends the main worker's item to every worker, and returns it."""
        if self.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, item: Item) -> list[Item]:
        """Collects one item from each worker; returns all of them, by rank, on every worker."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Waits until every worker has called this."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Closes this worker's connections after an error, so that the others' collectives fail instead of waiting.

        This is for gloo only. NCCL would wait for the collectives in progress. With NCCL the launcher, such as Ray
        Train or torchrun, ends all processes when one has failed.
        """
        if self.size > 1 and dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


def run_on_main(work: Callable[[], Item] | None, world: World) -> Item:
    """Runs `work` on the main worker, and returns its result on every worker.

    An AlignmentError that it raises is raised on every worker, so that no worker waits for another. `work` runs in a
    thread and must not use collectives. However long it takes, no collective waits longer than `ROUND_S`.

    Args:
        work: None on the other workers.
    """
    if world.size == 1:
        assert work is not None
        return work()
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(work) if work is not None else None
        while not world.from_main(future is not None and bool(wait([future], ROUND_S).done)):
            pass
    result: Item | None = None
    error: AlignmentError | None = None
    if future is not None:
        try:
            result = future.result()
        except AlignmentError as failure:
            error = failure
    result, error = world.from_main((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def run_on_all(work: Callable[[], Item], world: World) -> Item:
    """Runs `work` on every worker, and returns each worker's own result.

    An AlignmentError that one worker raises is raised on every worker, so that no worker waits for another.
    """
    result: Item | None = None
    error: AlignmentError | None = None
    try:
        result = work()
    except AlignmentError as failure:
        error = failure
    for problem in world.gather(error):
        if problem is not None:
            raise problem
    return result  # type: ignore[return-value]
