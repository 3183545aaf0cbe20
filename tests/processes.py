"""The processes that a test has started, as they are while they come and go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

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
    and goes on with the command line that it was spawned with, as other processes do that have not loaded vLLM.
    """
    named = descendants("EngineCore", of=of)
    return named + [each for each in descendants("multiprocessing.spawn", of=of) if has_loaded(each, "/vllm/")]


def has_loaded(process: psutil.Process, library: str) -> bool:
    """Whether a process has mapped a file with this in its path."""
    try:
        return library in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:  # it has ended
        return False


def without_wait_policy() -> dict[str, str]:
    """The environment of a user who has not said how OpenMP's threads wait."""
    return {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}


def computes(process: psutil.Process) -> bool:
    """Whether a process has loaded OpenMP, as torch does."""
    return has_loaded(process, "libgomp")


def assert_idle_threads_sleep(processes: Iterable[psutil.Process], *, may_end: bool = False) -> None:
    """Asserts that some of the processes compute, and that those were started with the setting that OpenMP reads.

    With `may_end`, those that end meanwhile are passed over.
    """
    computing = [process for process in processes if computes(process)]
    assert computing or may_end
    for process in computing:
        try:  # as bytes: a process that has given itself a title has overwritten the beginning of its environment
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            assert may_end, f"process {process.pid} has ended"
            continue
        assert b"OMP_WAIT_POLICY=passive" in environment, process.as_dict(["pid", "name", "cmdline"])


def listening(processes: Iterable[psutil.Process]) -> dict[int, str]:
    """The TCP ports that processes listen on, with the address."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            sockets = [each for each in process.net_connections(kind="tcp") if each.status == psutil.CONN_LISTEN]
            found |= {each.laddr.port: each.laddr.ip for each in sockets}
    return found


def is_of_this_machine(address: str) -> bool:
    """Whether only this machine's own processes can connect to an address."""
    return address.removeprefix("::ffff:").startswith("127.") or address == "::1"
