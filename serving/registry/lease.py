"""The lease of a registry: one endpoint holds it and changes versions; other endpoints wait until that one has ended.

REGISTRY/lease.json   the endpoint, and its running processes: the launcher and every ingress

Each process renews its own entry every few seconds, so the lease lives as long as one of them does. Whether a process
of this machine is alive can be looked up. Processes of other machines only show heartbeats, and the clock that wrote
them may be wrong; so a lease that looks old is watched for a while before it counts as dead.
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
from alignment.files import write_durably
from serving.registry.state import HEARTBEAT_TIMEOUT_S, format_time, read_file
from serving.registry.versions import Registry

logger = logging.getLogger("ray.serve")

FILE, LOCK = "lease.json", ".lease.lock"
HEARTBEAT_S = 5.0
"""Seconds between two heartbeats of a process."""
WATCH_TIME_S = 2.5 * HEARTBEAT_S
"""Seconds for which a lease is watched whose last heartbeat looks too old."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of the endpoint that holds the lease."""

    host: str
    machine: str
    """A name that no other machine and no other container has."""
    pid: int
    started: str
    """Its start time, in clock ticks since its machine booted: a later process may have the same pid."""
    heartbeat: float
    """Its last heartbeat (seconds since 1970, UTC, by its own clock)."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The endpoint that a registry belongs to."""

    owner: str
    """Identifies the endpoint; all of its processes share it."""
    url: str
    """The endpoint's URL, as seen from its own machine."""
    began: float
    """When the endpoint acquired the lease (seconds since 1970, UTC)."""
    processes: tuple[Process, ...]

    def __str__(self) -> str:
        machines = ", ".join(sorted({f"{process.host} (process {process.pid})" for process in self.processes}))
        return f"the endpoint {self.url} on {machines}, since {format_time(self.began)}"


LEASES = TypeAdapter(Lease)


class LeaseTaken(ServingError):
    """Another endpoint holds the registry's lease."""

    @classmethod
    def at_start(cls, lease: Lease, registry: Registry) -> LeaseTaken:
        """The error of an endpoint that cannot start beside the holder of the lease."""
        return cls(
            f"the registry {registry.folder} belongs to {lease}, and two endpoints on one registry would change each "
            "other's versions. Promote at that one (`raylign promote`), end it, start this one under another name "
            "(name=...), or let it wait until that one has ended (on_lease=wait)"
        )


def lease_of(registry: Registry) -> Lease | None:
    """The lease of a registry; None if there is none, or if its endpoint does not look alive.

    Raises:
        CheckpointError: the file is damaged.
    """
    lease = read_file(registry.folder / FILE, LEASES)
    return lease if lease is not None and _looks_alive(lease) else None


class Tenant:
    """This process as a member of an endpoint that holds, or waits for, a lease. Threads may share it."""

    def __init__(self, registry: Registry, *, owner: str, url: str) -> None:
        self._registry = registry
        self._folder = registry.folder
        self._file = registry.folder / FILE
        self._owner, self._url = owner, url
        self._observation: tuple[Lease, float] | None = None
        """Another endpoint's lease, and the time since which it has not changed (monotonic seconds)."""
        self._lock = threading.Lock()
        self._stop_event = threading.Event()
        self._thread: threading.Thread | None = None
        self._other_lease: Lease | None = None
        self._is_held = False

    @property
    def is_held(self) -> bool:
        """Whether this process's endpoint holds the lease."""
        return self._is_held

    def check(self) -> None:
        """Checks that this endpoint may change versions.

        Raises:
            LeaseTaken: another endpoint holds the lease, or the holder is not known.
        """
        if not self._is_held:
            holder = self._other_lease or "nobody: its file cannot be written"
            raise LeaseTaken(
                f"this endpoint changes no versions yet, since its registry {self._folder} belongs to {holder}; it "
                f"follows what is changed there, and takes over within {HEARTBEAT_TIMEOUT_S:g} s after that one has "
                "ended"
            )

    def try_acquire(self) -> Lease | None:
        """Acquires the lease if it is free, or renews it; returns the lease of another endpoint that holds it.

        Raises:
            CheckpointError: the file is damaged, or cannot be written.
        """
        with self._lock:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self._folder / LOCK):
                    self._other_lease = self._renew(read_file(self._file, LEASES))
            except OSError as error:
                self._is_held = False
                raise CheckpointError(f"{self._file} cannot be written: {error}") from error
            self._is_held = self._other_lease is None
            return self._other_lease

    def acquire(self, *, wait: bool = False, notify: Callable[[str], object] = logger.warning) -> bool:
        """Acquires the lease at the start of an endpoint and renews it until `close`.

        Returns False if another endpoint holds it.

        Args:
            wait: whether to go on without the lease, and to acquire it as soon as the other endpoint has ended.
            notify: function that shows a line to people.

        Raises:
            LeaseTaken: another endpoint holds the lease, and `wait` is false.
            CheckpointError: as for `try_acquire`.
        """
        other_lease = self.try_acquire()
        if other_lease is not None and not _looks_alive(other_lease):
            notify(
                f"The registry {self._folder} belongs to {other_lease}, which was silent lately; looking whether it "
                "lives …"
            )
            self._watch()
            other_lease = self._other_lease
        if other_lease is not None and not wait:
            raise LeaseTaken.at_start(other_lease, self._registry)
        self.start_renewing()
        return other_lease is None

    def start_renewing(self) -> None:
        """Starts a thread that renews the lease, or tries to acquire it while another endpoint holds it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew_until_closed, name="lease", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Removes this process from the lease; the last process of an endpoint releases the lease."""
        self._stop_event.set()
        with self._lock:
            self._is_held = False
            try:
                with FileLock(self._folder / LOCK, timeout=HEARTBEAT_S):
                    lease = read_file(self._file, LEASES)
                    if lease is not None and lease.owner == self._owner:
                        self._write(lease, [process for process in lease.processes if not _is_current_process(process)])
            except (OSError, CheckpointError):  # the other processes notice without it that this one has ended
                logger.warning("%s could not be given back", self._file)

    def _renew_until_closed(self) -> None:
        while not self._stop_event.wait(HEARTBEAT_S):
            was_held = self._is_held
            try:
                other_lease = self.try_acquire()
            except CheckpointError:
                logger.exception("The lease of a registry could not be renewed")
                continue
            if self._is_held != was_held:
                logger.warning("The registry %s belongs to %s now", self._folder, other_lease or "this endpoint")

    def _watch(self) -> None:
        """Watches for a while whether another endpoint renews its lease, and takes the lease over if it does not."""
        assert self._other_lease is not None
        lease, end = self._other_lease, time.monotonic() + WATCH_TIME_S
        while time.monotonic() < end:
            time.sleep(HEARTBEAT_S / 10)
            if self.try_acquire() is None or self._other_lease != lease:
                return
        with self._lock, FileLock(self._folder / LOCK):
            if read_file(self._file, LEASES) == lease:
                self._write(None, [])
                self._other_lease, self._is_held = None, True

    def _renew(self, lease: Lease | None) -> Lease | None:
        """Renews or acquires the lease, or returns it if another endpoint holds it."""
        if lease is None or lease.owner == self._owner:
            self._write(lease, [process for process in lease.processes if _may_be_alive(process)] if lease else [])
            return None
        if not self._is_dead(lease):
            return lease
        self._write(None, [])
        return None

    def _is_dead(self, lease: Lease) -> bool:
        """Whether no process of an endpoint is alive. Processes of this machine are looked up; those of other machines
        count as dead when the lease has not changed for `HEARTBEAT_TIMEOUT_S`."""
        if all(_is_on_this_machine(process) for process in lease.processes):
            return not any(_is_alive(process) for process in lease.processes)
        time_s = time.monotonic()
        if self._observation is None or self._observation[0] != lease:
            self._observation = (lease, time_s)
        return time_s - self._observation[1] > HEARTBEAT_TIMEOUT_S

    def _write(self, lease: Lease | None, processes: list[Process]) -> None:
        """Writes the lease with these processes and this one; deletes the file if there is none."""
        own_processes = [] if self._stop_event.is_set() else [_current_process()]
        other_processes = [process for process in processes if not _is_current_process(process)]
        if not (other_processes or own_processes):
            self._file.unlink(missing_ok=True)
            return
        fresh = Lease(owner=self._owner, url=self._url, began=time.time(), processes=())
        new_lease = replace(lease or fresh, processes=(*other_processes, *own_processes))
        write_durably(self._file, LEASES.dump_json(new_lease, indent=1))


def _machine_name() -> str:
    """A name of this machine and container, within which a pid is meaningful."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _start_time(pid: int) -> str | None:
    """Start time of a process of this machine, in clock ticks since boot; None if it does not exist or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _current_process() -> Process:
    pid = os.getpid()
    return Process(
        host=socket.gethostname(),
        machine=_machine_name(),
        pid=pid,
        started=_start_time(pid) or "",
        heartbeat=time.time(),
    )


def _is_current_process(process: Process) -> bool:
    return (process.machine, process.pid) == (_machine_name(), os.getpid())


def _is_on_this_machine(process: Process) -> bool:
    return process.machine == _machine_name() and Path("/proc").is_dir()


def _is_alive(process: Process) -> bool:
    return _start_time(process.pid) == process.started


def _may_be_alive(process: Process) -> bool:
    return (
        _is_alive(process)
        if _is_on_this_machine(process)
        else abs(time.time() - process.heartbeat) < 2 * HEARTBEAT_TIMEOUT_S
    )


def _looks_alive(lease: Lease) -> bool:
    time_s = time.time()
    return any(
        _is_alive(process) if _is_on_this_machine(process) else abs(time_s - process.heartbeat) < HEARTBEAT_TIMEOUT_S
        for process in lease.processes
    )
