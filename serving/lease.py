"""Which endpoint a registry belongs to: one changes versions, and others wait until it has ended.

REGISTRY/lease.json   the endpoint, and the processes of it that are there: its launcher, and every ingress

Each of them renews its own entry every few seconds, so that the lease lives as long as one of them does. Of a process
on this machine it is known whether it lives. Of others only signs of life are: the times that they write may be of a
clock that is wrong, so what looks old is watched before it counts as dead.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock
from pydantic import TypeAdapter

from alignment.errors import CheckpointError, ServingError
from serving.registry import HEARTBEAT_TIMEOUT_S, Registry, clock, read_file, write_file

logger = logging.getLogger("ray.serve")

FILE, LOCK = "lease.json", ".lease.lock"
BEAT_S = 5.0
"""Seconds between a process's signs of life."""
WATCH_S = 2.5 * BEAT_S
"""Seconds for which a lease is watched that looks dead by the clock."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of the endpoint that has the lease."""

    host: str
    machine: str
    """What no other machine, and no other container, calls itself."""
    pid: int
    started: str
    """When it began, in its machine's own count; a later process may have the same pid."""
    heartbeat: float
    """Its last sign of life (seconds since 1970, UTC, by its own clock)."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What is known about the endpoint that a registry belongs to."""

    owner: str
    """The same for all processes of an endpoint, and for no other endpoint."""
    url: str
    """Where it listens, as its own machine sees it."""
    began: float
    """When it took the registry (seconds since 1970, UTC)."""
    processes: tuple[Process, ...]

    def __str__(self) -> str:
        where = ", ".join(sorted({f"{process.host} (process {process.pid})" for process in self.processes}))
        return f"the endpoint {self.url} on {where}, since {clock(self.began)}"


LEASES = TypeAdapter(Lease)


class LeaseTaken(ServingError):
    """Another endpoint has the registry."""

    @classmethod
    def by(cls, lease: Lease, registry: Registry) -> LeaseTaken:
        """Of an endpoint that is not to start beside it."""
        return cls(
            f"the registry {registry.folder} belongs to {lease}, and two endpoints on one registry would change each "
            "other's versions. Promote at that one (`raylign promote`), end it, start this one under another name "
            "(name=...), or let it wait until that one has ended (on_lease=wait)"
        )


def lease_of(registry: Registry) -> Lease | None:
    """The lease of the endpoint that a registry belongs to; None if there is none that looks alive.

    Raises:
        CheckpointError: the file is damaged.
    """
    lease = read_file(registry.folder / FILE, LEASES)
    return lease if lease is not None and _looks_alive(lease) else None


class Tenant:
    """This process's part in an endpoint's lease. Safe to use from several threads."""

    def __init__(self, registry: Registry, *, owner: str, url: str) -> None:
        self._registry = registry
        self._folder = registry.folder
        self._file = registry.folder / FILE
        self._owner, self._url = owner, url
        self._seen: tuple[Lease, float] | None = None
        """Another endpoint's lease, and since when it has not changed (monotonic seconds)."""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._other: Lease | None = None
        self._is_held = False

    @property
    def is_held(self) -> bool:
        """Whether the registry belongs to this process's endpoint."""
        return self._is_held

    def check(self) -> None:
        """Checks that versions may be changed by this endpoint.

        Raises:
            LeaseTaken: another endpoint has the registry, or nobody knows.
        """
        if not self._is_held:
            holder = self._other or "nobody: its file cannot be written"
            raise LeaseTaken(
                f"this endpoint changes no versions yet, since its registry {self._folder} belongs to {holder}; it "
                f"follows what is changed there, and takes over within {HEARTBEAT_TIMEOUT_S:g} s after that one has "
                "ended"
            )

    def take(self) -> Lease | None:
        """Takes the lease if it is free, or renews it; returns another endpoint's that is in the way.

        Raises:
            CheckpointError: the file is damaged, or cannot be written.
        """
        with self._lock:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self._folder / LOCK):
                    self._other = self._renewed(read_file(self._file, LEASES))
            except OSError as error:
                self._is_held = False
                raise CheckpointError(f"{self._file} cannot be written: {error}") from error
            self._is_held = self._other is None
            return self._other

    def acquire(self, *, wait: bool = False, tell: Callable[[str], object] = logger.warning) -> bool:
        """Takes the lease at the start of an endpoint, and keeps it until `close`; False if another one has it.

        Args:
            wait: whether to go on without it, and to take it as soon as the other one has ended.
            tell: what to call with a line for people.

        Raises:
            LeaseTaken: another endpoint has it, and `wait` is false.
            CheckpointError: as `take`.
        """
        other = self.take()
        if other is not None and not _looks_alive(other):
            tell(f"The registry {self._folder} belongs to {other}, which was silent lately; looking whether it lives …")
            self._watch()
            other = self._other
        if other is not None and not wait:
            raise LeaseTaken.by(other, self._registry)
        self.keep()
        return other is None

    def keep(self) -> None:
        """Renews the lease from now on, in a thread; or tries to take it, while another endpoint has it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """This process is no part of the endpoint any more; the last one gives the registry back."""
        self._ended.set()
        with self._lock:
            self._is_held = False
            try:
                with FileLock(self._folder / LOCK, timeout=BEAT_S):
                    lease = read_file(self._file, LEASES)
                    if lease is not None and lease.owner == self._owner:
                        self._write(lease, [process for process in lease.processes if not _is_this(process)])
            except (OSError, CheckpointError):  # the others see by themselves that this process has ended
                logger.warning("%s could not be given back", self._file)

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_S):
            before = self._is_held
            try:
                other = self.take()
            except CheckpointError:
                logger.exception("The lease of a registry could not be renewed")
                continue
            if self._is_held != before:
                logger.warning("The registry %s belongs to %s now", self._folder, other or "this endpoint")

    def _watch(self) -> None:
        """Looks for a while whether another endpoint's lease is renewed, and takes it if it is not."""
        assert self._other is not None
        before, end = self._other, time.monotonic() + WATCH_S
        while time.monotonic() < end:
            time.sleep(BEAT_S / 10)
            if self.take() is None or self._other != before:
                return
        with self._lock, FileLock(self._folder / LOCK):
            if read_file(self._file, LEASES) == before:
                self._write(None, [])
                self._other, self._is_held = None, True

    def _renewed(self, lease: Lease | None) -> Lease | None:
        if lease is None or lease.owner == self._owner:
            self._write(lease, [process for process in lease.processes if _may_live(process)] if lease else [])
            return None
        if not self._is_dead(lease):
            return lease
        self._write(None, [])
        return None

    def _is_dead(self, lease: Lease) -> bool:
        """Whether nothing of an endpoint lives: known of this machine's processes, told of others by their silence."""
        if all(_is_here(process) for process in lease.processes):
            return not any(_lives(process) for process in lease.processes)
        now = time.monotonic()
        if self._seen is None or self._seen[0] != lease:
            self._seen = (lease, now)
        return now - self._seen[1] > HEARTBEAT_TIMEOUT_S

    def _write(self, lease: Lease | None, others: list[Process]) -> None:
        ours = [] if self._ended.is_set() else [_this()]
        kept = [process for process in others if not _is_this(process)]
        if not (kept or ours):
            self._file.unlink(missing_ok=True)
            return
        fresh = Lease(owner=self._owner, url=self._url, began=time.time(), processes=())
        now = replace(lease or fresh, processes=(*kept, *ours))
        write_file(self._file, LEASES.dump_json(now, indent=1))


def _machine() -> str:
    """Of this machine and container; a pid means nothing in another one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process of this machine began, in its own count; None if there is none, or nothing but its exit status."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _this() -> Process:
    pid = os.getpid()
    return Process(
        host=socket.gethostname(), machine=_machine(), pid=pid, started=_started(pid) or "", heartbeat=time.time()
    )


def _is_this(process: Process) -> bool:
    return (process.machine, process.pid) == (_machine(), os.getpid())


def _is_here(process: Process) -> bool:
    return process.machine == _machine() and Path("/proc").is_dir()


def _lives(process: Process) -> bool:
    return _started(process.pid) == process.started


def _may_live(process: Process) -> bool:
    return _lives(process) if _is_here(process) else abs(time.time() - process.heartbeat) < 2 * HEARTBEAT_TIMEOUT_S


def _looks_alive(lease: Lease) -> bool:
    now = time.time()
    return any(
        _lives(process) if _is_here(process) else abs(now - process.heartbeat) < HEARTBEAT_TIMEOUT_S
        for process in lease.processes
    )
