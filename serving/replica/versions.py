"""The model versions inside one replica: which ones it holds, which one answers a request, and how it changes.

registry's state ─► adopt: load missing versions ─► switch ─► unload versions that no request uses

An adapter is loaded beside the others, and a request in progress ends with the adapter that it began with. Of whole
weights a replica holds one version: it sends new requests to other replicas, lets those in progress end, changes, and
accepts requests again. If no other replica can answer, new requests wait for the change, but not for long.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from alignment.errors import AlignmentError, ServingError
from serving.registry.state import State
from serving.registry.versions import Registry

logger = logging.getLogger("ray.serve")

FOLLOW_INTERVAL_S = 2.0
"""Seconds between two readings of the registry, for a replica that missed a call."""
MAX_FOLLOW_INTERVAL_S = 60.0
"""The longest such interval; every failure doubles the interval."""
POLL_S = 0.1
"""Seconds between two checks of the requests in progress, and of the lock."""
TURN_LOCK = ".turn.lock"
"""File in the registry's folder. A replica locks it while it changes its weights."""


class Loader(Protocol):
    """Loads weights into an engine and unloads them."""

    holds_many: bool
    """True if the engine can hold several versions at once."""

    async def load(self, number: int) -> None:
        """Loads a version whose files have been verified.

        Raises:
            ServingError: the version could not be loaded; the versions that are loaded answer as before.
            PartialLoadError: the version could not be loaded, and the engine can no longer be used.
        """
        ...

    async def unload(self, number: int) -> None:
        """Frees a version's memory."""
        ...


class PartialLoadError(ServingError):
    """A load failed half-way and left the engine between two versions; only a restart helps."""


class ReplicaUnavailable(Exception):
    """A replica does not accept a request, which has not begun; another replica may answer it."""

    def __init__(self, *, moves_to: int | None = None, is_broken: bool = False) -> None:
        """
        Args:
            moves_to: number of the version that the replica changes to; None if it does not hold the requested one.
            is_broken: whether the replica accepts no requests any more.
        """
        super().__init__("another replica has to answer")
        self.moves_to = moves_to
        self.is_broken = is_broken


@dataclass(frozen=True, kw_only=True)
class MoveLimits:
    """How long a change of whole weights may wait (seconds); after that it is given up."""

    drain_s: float = 630.0
    """Time for answers in progress to end, while other replicas answer."""
    wait_s: float = 30.0
    """Time that a request which no other replica can answer may wait for the change."""


@dataclass(frozen=True, kw_only=True)
class LoadFailure:
    """A version that could not be loaded."""

    number: int
    reason: str


def fleet_version(state: State, loaded_numbers: set[int]) -> int | None:
    """Number of the version that an ordinary replica must hold: the current one, or the one that a promotion in
    progress has already loaded into it."""
    change = state.change()
    if change is not None and change.share is None and change.number in loaded_numbers:
        return change.number
    return state.current


def candidate_version(state: State, loaded_numbers: set[int] | None = None) -> int | None:
    """Number of the version that the candidate replica must hold: the canary, or the version that becomes the canary;
    None if there is none."""
    change = state.change()
    return state.canary if change is None or change.share is None else change.number


class Versions:
    """The versions of one replica. Use it inside one event loop."""

    def __init__(
        self,
        registry: Registry,
        loader: Loader,
        *,
        limits: MoveLimits | None = None,
        target: Callable[[State, set[int]], int | None] = fleet_version,
        lock_file: Path | None = None,
    ) -> None:
        """
        Args:
            target: function of the registry's state and the loaded numbers; it returns the version of whole weights
                that the replica must hold, or None if any will do.
            lock_file: file that a replica locks while it changes whole weights, so that one does at a time; None for no
                lock.
        """
        self._registry = registry
        self._loader = loader
        self._limits = limits or MoveLimits()
        self._target = target
        self._turn_lock = TurnLock(lock_file)
        self._state: State | None = None
        self._loaded_numbers: set[int] = set()
        self._verified_numbers: set[int] = set()
        self._num_requests: Counter[int] = Counter()
        self._move_lock = asyncio.Lock()
        self._accepts_requests = asyncio.Event()
        self._moves_to: int | None = None
        self._waiting_since: float | None = None
        self.is_broken = False
        """Whether the replica can no longer answer and must be restarted."""
        self.failure: LoadFailure | None = None
        """The last failed load; None after a successful one."""

    @property
    def current(self) -> int:
        """Number of the version that answers."""
        assert self._state is not None, "begin comes first"
        return self._state.current if self._loader.holds_many else next(iter(self._loaded_numbers))

    @property
    def loaded_numbers(self) -> tuple[int, ...]:
        """Numbers of the versions that can answer."""
        return tuple(sorted(self._loaded_numbers))

    def begin(self, state: State, number: int) -> None:
        """Records the version that the engine was started with, and the registry's state at that moment."""
        self._state, self._loaded_numbers = state, {number}
        self._accepts_requests.set()

    async def adopt(self) -> int:
        """Follows the registry's state; returns the number of the current version.

        Raises:
            AlignmentError: a version could not be loaded; the replica answers as before.
            PartialLoadError: a version could not be loaded, and the replica must be restarted.
        """
        async with self._move_lock:
            state = self._registry.state()
            if self._loader.holds_many:
                for number in (state.current, state.canary):
                    if number is not None:
                        await self._add(number)
                self._state = state
                await self._unload_unused(state)
            else:
                if self._must_move(state):
                    async with self._turn_lock.acquire():
                        await self._follow_target()
                self._state = state
            return self.current

    async def move(self, number: int) -> None:
        """For whole weights: changes to a version, whether or not it is the registry's current one yet.

        Raises:
            AlignmentError: the version could not be loaded, or the answers in progress took too long; the replica
                answers as before.
            PartialLoadError: the version could not be loaded, and the replica must be restarted.
        """
        async with self._move_lock, self._turn_lock.acquire():
            if number not in self._loaded_numbers:
                await self._replace(number)

    async def prepare(self, number: int) -> None:
        """Prepares a version that may become the current one, as far as this does not affect requests: it loads an
        adapter, or verifies the files of whole weights.

        Raises:
            AlignmentError: the version could not be loaded, or a file has changed.
        """
        async with self._move_lock:
            if self._loader.holds_many:
                await self._add(number)
            else:
                await self._verify(number)

    async def follow(self) -> None:
        """Reads the registry at intervals, for ever, and follows its state."""
        pause_s = FOLLOW_INTERVAL_S
        while True:
            await asyncio.sleep(pause_s)
            try:
                state = self._registry.state()
                if state != self._state or self._must_move(state):
                    await self.adopt()
                pause_s = FOLLOW_INTERVAL_S
            except PartialLoadError:
                return
            except Exception:  # the replica still answers with what it has
                logger.exception("A replica could not follow the registry")
                pause_s = min(2 * pause_s, MAX_FOLLOW_INTERVAL_S)

    @asynccontextmanager
    async def hold(self, model_version: int | None, *, may_leave: bool = True) -> AsyncIterator[int]:
        """Holds the version that answers a request until the request has ended; yields the version's number.

        Args:
            model_version: number of the requested version; None takes the current one.
            may_leave: whether another replica may answer instead. If not, the request waits for a change of this one.

        Raises:
            ReplicaUnavailable: another replica must answer.
            ServingError: the requested version is not loaded, and the request may not leave.
        """
        if may_leave and not self._accepts_requests.is_set():
            raise ReplicaUnavailable(moves_to=self._moves_to)
        while not self._accepts_requests.is_set():
            if self._waiting_since is None:
                self._waiting_since = time.monotonic()
            await self._accepts_requests.wait()
        if self.is_broken:
            raise ReplicaUnavailable(is_broken=True)
        number = self.current if model_version is None else model_version
        if number not in self._loaded_numbers:
            if may_leave:
                raise ReplicaUnavailable
            raise ServingError(f"Version {number} is not loaded; {sorted(self._loaded_numbers)} are.")
        self._num_requests[number] += 1
        try:
            yield number
        finally:
            self._num_requests[number] -= 1

    def _must_move(self, state: State) -> bool:
        """Whether the replica must change its whole weights."""
        if self._loader.holds_many:
            return False
        return self._target(state, self._loaded_numbers) not in {None, *self._loaded_numbers}

    async def _follow_target(self) -> None:
        # The state is read again: it may have changed while this replica waited for the lock.
        number = self._target(self._registry.state(), self._loaded_numbers)
        if number is not None and number not in self._loaded_numbers:
            await self._replace(number)

    async def _verify(self, number: int) -> None:
        if number not in self._verified_numbers:
            await asyncio.to_thread(self._registry.verify, number)
            self._verified_numbers.add(number)

    async def _add(self, number: int) -> None:
        """For adapters: loads one beside the others."""
        if number not in self._loaded_numbers:
            with self._record_failure(number):
                await self._verify(number)
                await self._loader.load(number)
            self._loaded_numbers.add(number)

    async def _replace(self, number: int) -> None:
        """For whole weights: changes to a version when no request is in progress. The slow part that can be done
        before, reading the files, is done before."""
        with self._record_failure(number):
            await self._verify(number)
            self._moves_to = number
            self._accepts_requests.clear()
            try:
                await self._drain()
                await self._loader.load(number)
                self._loaded_numbers = {number}
            except PartialLoadError:
                self.is_broken = True
                raise
            finally:
                self._verified_numbers.discard(number)  # the files may change until the next load
                self._moves_to = self._waiting_since = None
                self._accepts_requests.set()

    async def _drain(self) -> None:
        """Waits until no request is in progress.

        Raises:
            ServingError: this took too long, or new requests waited for it too long.
        """
        end = time.monotonic() + self._limits.drain_s
        while in_progress := self._num_requests.total():
            waiting_since = self._waiting_since
            waited_long = waiting_since is not None and time.monotonic() - waiting_since > self._limits.wait_s
            if waited_long or time.monotonic() > end:
                limit = self._limits.wait_s if waited_long else self._limits.drain_s
                raise ServingError(
                    f"{in_progress} answers in progress did not end within {limit:g} s"
                    + (", while others waited that no other replica could take" if waited_long else "")
                    + "; nothing has changed. Try again when there is less to do, raise promotion_wait_s, or "
                    "have two replicas, of which one answers meanwhile"
                )
            await asyncio.sleep(POLL_S)

    async def _unload_unused(self, state: State) -> None:
        """Unloads versions that no request uses, except the current one, the canary, the previous one, to which a
        rollback returns, and the one of a change in progress."""
        change = state.change()
        needed_numbers = {state.current, state.canary, state.previous, None if change is None else change.number}
        for number in self._loaded_numbers - needed_numbers:
            if not self._num_requests[number]:
                self._loaded_numbers.discard(number)
                self._verified_numbers.discard(number)
                await self._loader.unload(number)

    @contextmanager
    def _record_failure(self, number: int) -> Iterator[None]:
        """Records whether a load fails inside the `with` block."""
        try:
            yield
        except AlignmentError as error:
            self.failure = LoadFailure(number=number, reason=str(error))
            raise
        self.failure = None


class TurnLock:
    """The lock that lets one replica of an endpoint change whole weights at a time, so that the others answer.

    The operating system releases it when its process dies.
    """

    def __init__(self, file: Path | None) -> None:
        self._lock = None if file is None else FileLock(file, thread_local=False)

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[None]:
        """Waits for the lock, and releases it after the `with` block."""
        while not self._try_acquire():
            await asyncio.sleep(POLL_S)
        try:
            yield
        finally:
            if self._lock is not None:
                self._lock.release()

    def _try_acquire(self) -> bool:
        if self._lock is None:
            return True
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        except OSError:  # replicas may only read the folder; then a promotion still changes them one after the other
            return True
        return True
