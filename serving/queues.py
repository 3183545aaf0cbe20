"""Requests of an ingress that wait for a replica.

In a module of its own: Ray Serve pickles that of its routers by value, so that what it holds is another object there.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet


class Queue(Protocol):
    """What requests wait in."""

    @property
    def num_waiting(self) -> int:
        """How many do."""


QUEUES: WeakSet[Queue] = WeakSet()
"""Those of this process."""


def num_waiting() -> int:
    """Requests of this process that wait for a replica."""
    return sum(queue.num_waiting for queue in list(QUEUES))
