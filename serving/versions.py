"""The model versions inside one replica: which it holds, which answers a request, and how it moves to another.

registry's state ─► adopt: load what is missing ─► switch ─► let go of what nobody uses any more

An adapter is loaded beside the others and requests in progress end with the one they began with. Whole weights are
there once: the replica sends new requests elsewhere, ends those in progress, changes, and takes requests again. Where
nobody else can answer, new requests wait for it, but not for long.
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
from serving.registry import Registry, State

logger = logging.getLogger("ray.serve")

FOLLOW_S = 2.0
"""Seconds between looks at the registry, for a replica that missed the message."""
MAX_FOLLOW_S = 60.0
"""The same after failures, each of which doubles it."""
POLL_S = 0.1
"""Seconds between looks at what is still in progress, and at whose turn it is."""
TURN = ".turn.lock"
"""File in the registry's folder that the replica locks which changes its weights."""


class Loader(Protocol):
    """How weights come into an engine and leave it."""

    beside: bool
    """True if several versions can be held at once."""

    async def load(self, number: int) -> None:
        """Makes a version ready to answer, whose files have been verified.

        Raises:
            ServingError: it could not be loaded; what is loaded already answers as before.
            HalfLoaded: it could not be loaded, and the engine is good for nothing any more.
        """
        ...

    async def unload(self, number: int) -> None:
        """Gives a version's memory back."""
        ...


class HalfLoaded(ServingError):
    """An engine got stuck between two versions; only a restart helps."""


class NotHere(Exception):
    """A replica does not take a request, of which nothing has begun; another one may."""

    def __init__(self, *, moves_to: int | None = None, is_broken: bool = False) -> None:
        """
        Args:
            moves_to: number of the version that the replica changes to; None if it does not hold the wanted one.
            is_broken: whether it takes nothing any more.
        """
        super().__init__("another replica has to answer")
        self.moves_to = moves_to
        self.is_broken = is_broken


@dataclass(frozen=True, kw_only=True)
class MoveLimits:
    """How long a change of whole weights may take of other people's time (seconds)."""

    drain_s: float = 630.0
    """For answers in progress to end, while other replicas answer."""
    wait_s: float = 30.0
    """That a request waits for them which no other replica can answer; then the change is given up."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A version that could not be loaded."""

    number: int
    reason: str


def fleet_version(state: State, held: set[int]) -> int | None:
    """The version that a replica of the fleet has to hold: the current one, or what it changed to already in a
    promotion that is under way."""
    change = state.change()
    if change is not None and change.share is None and change.number in held:
        return change.number
    return state.current


def candidate_version(state: State, held: set[int] | None = None) -> int | None:
    """The version that the candidate replica has to hold: the canary, or what is to become one; None if nothing is."""
    change = state.change()
    return state.canary if change is None or change.share is None else change.number


class Versions:
    """The versions of one replica. Used inside one event loop."""

    def __init__(
        self,
        registry: Registry,
        loader: Loader,
        *,
        limits: MoveLimits | None = None,
        target: Callable[[State, set[int]], int | None] = fleet_version,
        turn: Path | None = None,
    ) -> None:
        """
        Args:
            target: the version of whole weights to hold, from the registry's state and what is held; None for any.
            turn: file that the replicas lock which change whole weights, so that one does at a time; None for no turns.
        """
        self._registry = registry
        self._loader = loader
        self._limits = limits or MoveLimits()
        self._target = target
        self._turn = Turn(turn)
        self._state: State | None = None
        self._loaded: set[int] = set()
        self._verified: set[int] = set()
        self._in_use: Counter[int] = Counter()
        self._moving = asyncio.Lock()
        self._open = asyncio.Event()
        self._moves_to: int | None = None
        self._waiting_since: float | None = None
        self.broken = False
        """True when only a restart of the replica helps."""
        self.failure: Failure | None = None
        """The last version that could not be loaded; None after one could."""

    @property
    def current(self) -> int:
        """Number of the version that answers."""
        assert self._state is not None, "begin comes first"
        return self._state.current if self._loader.beside else next(iter(self._loaded))

    @property
    def loaded(self) -> tuple[int, ...]:
        """Numbers of the versions that can answer."""
        return tuple(sorted(self._loaded))

    def begin(self, state: State, number: int) -> None:
        """Takes over a version that the engine was started with, and the state that said so."""
        self._state, self._loaded = state, {number}
        self._open.set()

    async def adopt(self) -> int:
        """Moves to what the registry says now; returns the number of the current version.

        Raises:
            AlignmentError: a version could not be loaded; the replica answers as before.
            HalfLoaded: the same, and the replica has to be restarted.
        """
        async with self._moving:
            state = self._registry.state()
            if self._loader.beside:
                for number in (state.current, state.canary):
                    if number is not None:
                        await self._add(number)
                self._state = state
                await self._let_go(state)
            else:
                if self._is_elsewhere(state):
                    async with self._turn.taken():
                        await self._follow_target()
                self._state = state
            return self.current

    async def move(self, number: int) -> None:
        """Whole weights: changes to a version, whatever the registry says of it so far.

        Raises:
            AlignmentError: it could not be loaded, or the answers in progress took too long; nothing has changed.
            HalfLoaded: it could not be loaded, and the replica has to be restarted.
        """
        async with self._moving, self._turn.taken():
            if number not in self._loaded:
                await self._replace(number)

    async def prepare(self, number: int) -> None:
        """Makes a version ready that may become the current one, as far as requests do not notice: an adapter is
        loaded, of whole weights the files are verified.

        Raises:
            AlignmentError: it could not be loaded, or a file is not what it was.
        """
        async with self._moving:
            if self._loader.beside:
                await self._add(number)
            else:
                await self._verify(number)

    async def follow(self) -> None:
        """Looks at the registry from time to time, for ever."""
        pause_s = FOLLOW_S
        while True:
            await asyncio.sleep(pause_s)
            try:
                state = self._registry.state()
                if state != self._state or self._is_elsewhere(state):
                    await self.adopt()
                pause_s = FOLLOW_S
            except HalfLoaded:
                return
            except Exception:  # the replica still answers with what it has
                logger.exception("A replica could not follow the registry")
                pause_s = min(2 * pause_s, MAX_FOLLOW_S)

    @asynccontextmanager
    async def hold(self, wanted: int | None, *, may_leave: bool = True) -> AsyncIterator[int]:
        """The version that answers a request, kept in place until the request has ended.

        Args:
            wanted: a version by number; None takes the current one.
            may_leave: whether another replica may be asked instead. If not, the request waits for this one's change.

        Raises:
            NotHere: another replica has to be asked.
            ServingError: the wanted version is not loaded, and the request may not leave.
        """
        if may_leave and not self._open.is_set():
            raise NotHere(moves_to=self._moves_to)
        while not self._open.is_set():
            if self._waiting_since is None:
                self._waiting_since = time.monotonic()
            await self._open.wait()
        if self.broken:
            raise NotHere(is_broken=True)
        number = self.current if wanted is None else wanted
        if number not in self._loaded:
            if may_leave:
                raise NotHere
            raise ServingError(f"Version {number} is not loaded; {sorted(self._loaded)} are.")
        self._in_use[number] += 1
        try:
            yield number
        finally:
            self._in_use[number] -= 1

    def _is_elsewhere(self, state: State) -> bool:
        """Whether whole weights have to be changed."""
        if self._loader.beside:
            return False
        return self._target(state, self._loaded) not in {None, *self._loaded}

    async def _follow_target(self) -> None:
        number = self._target(self._registry.state(), self._loaded)  # it may have changed while others had their turn
        if number is not None and number not in self._loaded:
            await self._replace(number)

    async def _verify(self, number: int) -> None:
        if number not in self._verified:
            await asyncio.to_thread(self._registry.verify, number)
            self._verified.add(number)

    async def _add(self, number: int) -> None:
        """Adapters: loads one beside the others."""
        if number not in self._loaded:
            with self._noted(number):
                await self._verify(number)
                await self._loader.load(number)
            self._loaded.add(number)

    async def _replace(self, number: int) -> None:
        """Whole weights: nothing may be in progress while they change. What takes long and can be done before, is."""
        with self._noted(number):
            await self._verify(number)
            self._moves_to = number
            self._open.clear()
            try:
                await self._drain()
                await self._loader.load(number)
                self._loaded = {number}
            except HalfLoaded:
                self.broken = True
                raise
            finally:
                self._verified.discard(number)  # the next change may be long after
                self._moves_to = self._waiting_since = None
                self._open.set()

    async def _drain(self) -> None:
        """Waits until nothing is in progress.

        Raises:
            ServingError: it took too long, or others waited for it too long.
        """
        end = time.monotonic() + self._limits.drain_s
        while in_progress := self._in_use.total():
            waiting = self._waiting_since
            waited_long = waiting is not None and time.monotonic() - waiting > self._limits.wait_s
            if waited_long or time.monotonic() > end:
                limit = self._limits.wait_s if waited_long else self._limits.drain_s
                raise ServingError(
                    f"{in_progress} answers in progress did not end within {limit:g} s"
                    + (", while others waited that no other replica could take" if waited_long else "")
                    + "; nothing has changed. Try again when there is less to do, raise promotion_wait_s, or "
                    "have two replicas, of which one answers meanwhile"
                )
            await asyncio.sleep(POLL_S)

    async def _let_go(self, state: State) -> None:
        """Unloads what is neither current nor canary nor in use; the one before stays, for a rollback."""
        change = state.change()
        kept = {state.current, state.canary, state.previous, None if change is None else change.number}
        for number in self._loaded - kept:
            if not self._in_use[number]:
                self._loaded.discard(number)
                self._verified.discard(number)
                await self._loader.unload(number)

    @contextmanager
    def _noted(self, number: int) -> Iterator[None]:
        """Remembers whether a version could be loaded."""
        try:
            yield
        except AlignmentError as error:
            self.failure = Failure(number=number, reason=str(error))
            raise
        self.failure = None


class Turn:
    """Leave to change whole weights, which one replica of an endpoint has at a time, so that the others answer.

    The system takes it from a process that dies.
    """

    def __init__(self, file: Path | None) -> None:
        self._lock = None if file is None else FileLock(file, thread_local=False)

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Waits for it, and gives it back."""
        while not self._has_it():
            await asyncio.sleep(POLL_S)
        try:
            yield
        finally:
            if self._lock is not None:
                self._lock.release()

    def _has_it(self) -> bool:
        if self._lock is None:
            return True
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        except OSError:  # a folder that replicas can only read: whoever promotes has them change in turn anyway
            return True
        return True
