"""The requests of an ingress that wait for a replica.

This is a module of its own because Ray Serve pickles the module of its routers by value: a variable of that module
would be another object in the router.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet


class Queue(Protocol):
    """A queue of requests."""

    @property
    def num_waiting(self) -> int:
        """How many requests wait in it."""


QUEUES: WeakSet[Queue] = WeakSet()
"""The queues of this process."""


def num_waiting() -> int:
    """How many requests of this process wait for a replica."""
    return sum(queue.num_waiting for queue in list(QUEUES))
