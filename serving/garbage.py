"""Python's garbage collector in processes that answer requests."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Takes what a process has loaded out of the collector's sight, where it need not look for garbage again.

    A full collection stops all requests of the process: for 0.1 s in an ingress and 0.4 s in a replica, which hold
    180,000 and 750,000 objects when they have started. It is called once, at the end of the start.
    """
    gc.collect()
    gc.freeze()
