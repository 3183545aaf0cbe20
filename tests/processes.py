"""The processes that a test has started, as they are while they come and go."""

from __future__ import annotations

import contextlib

import psutil


def descendants(word: str = "", *, of: int | None = None) -> list[psutil.Process]:
    """Living children, and theirs, of a process (of this test session, unless told) whose command line holds `word`.

    The list is not taken at one instant: a process that ends meanwhile is left out.
    """
    found = []
    for each in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.status() != psutil.STATUS_ZOMBIE and word in " ".join(each.cmdline() or [each.name()]):
                found.append(each)
    return found
