"""Whether several machines see one folder: one of them leaves a mark in it, and the others look for that.

A path is the same everywhere, and what lies there need not be: each machine's own disk, or a mount that one lacks.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

WAIT_S = 10.0
"""How long a network file system may take to show a new file to another machine."""
PAUSE_S = 0.2


@contextlib.contextmanager
def marked(folder: Path) -> Iterator[str]:
    """Leaves a mark in a folder for as long as the block runs, and yields its name, unlike any other's.

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
    """Whether this machine sees a mark in a folder, within so many seconds."""
    deadline = time.monotonic() + wait_s
    while not (folder / mark).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE_S)
    return True
