"""The processes that a test has started, as they are while they come and go."""

from __future__ import annotations

import contextlib

import psutil


def descendants(*words: str, of: int | None = None) -> list[psutil.Process]:
    """Living children, and theirs, of a process (of this test session, unless told) by a word of their command lines.

    The list is not taken at one instant: a process that ends meanwhile is left out.

    Args:
        words: any of which has to be there; none takes all processes.
    """
    found = []
    for each in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = " ".join(each.cmdline() or [each.name()])
            if each.status() != psutil.STATUS_ZOMBIE and (not words or any(word in line for word in words)):
                found.append(each)
    return found


def engine_processes(*, of: int | None = None) -> list[psutil.Process]:
    """vLLM's own processes among them.

    They call themselves VLLM::EngineCore, except that now and then they cannot: a process may find no room for a title,
    and goes on with the command line that it was spawned with.
    """
    return descendants("EngineCore", "multiprocessing.spawn", of=of)
