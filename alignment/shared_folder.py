"""Checks whether several machines see the same folder: one machine leaves a mark in it, and the others look for it.

The same path may be another folder on another machine: on a disk of its own, or on a mount that one machine lacks.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

WAIT_S = 10.0
"""Seconds in which a network file system must show a new file to another machine."""
PAUSE_S = 0.2
"""Seconds between two looks for the mark."""


@contextlib.contextmanager
def leave_mark(folder: Path) -> Iterator[str]:
    """Leaves a mark, a file with a unique name, in a folder while the block runs; yields the name of the mark.

    Raises:
        OSError: the folder cannot be written.
    """
    mark = folder / f".seen-{secrets.token_hex(8)}"
    mark.touch()
    try:
        yield mark.name
    finally:
        mark.unlink(missing_ok=True)


def sees(folder: Path, mark: str, *, wait_s: float = WAIT_S) -> bool:
    """True if this machine sees a mark in a folder within `wait_s` seconds."""
    deadline = time.monotonic() + wait_s
    while not (folder / mark).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE_S)
    return True
