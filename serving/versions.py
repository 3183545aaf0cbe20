"""The model versions inside one replica: which it holds, which answers a request, and how it moves to another.

registry's state ─► adopt: load what is missing ─► switch ─► let go of what nobody uses any more

An adapter is loaded beside the others and requests in progress end with the one they began with. Whole weights are
there once: the replica waits until nothing is in progress, while new requests wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from alignment.errors import ServingError
from serving.registry import Registry, State

logger = logging.getLogger("ray.serve")

FOLLOW_S = 2.0
"""Seconds between looks at the registry, for a replica that missed the message."""


class Loader(Protocol):
    """How weights come into an engine and leave it."""

    beside: bool
    """True if several versions can be held at once."""

    async def load(self, number: int) -> None:
        """Makes a version ready to answer.

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


class Versions:
    """The versions of one replica. Used inside one event loop."""

    def __init__(self, registry: Registry, loader: Loader) -> None:
        self._registry = registry
        self._loader = loader
        self._state: State | None = None
        self._loaded: set[int] = set()
        self._in_use: Counter[int] = Counter()
        self._moving = asyncio.Lock()
        self._open = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.broken = False
        """True when only a restart of the replica helps."""

    @property
    def current(self) -> int:
        """Number of the version that answers."""
        assert self._state is not None, "adopt comes first"
        return self._state.current

    @property
    def loaded(self) -> tuple[int, ...]:
        """Numbers of the versions that can answer."""
        return tuple(sorted(self._loaded))

    def begin(self, state: State) -> None:
        """Takes a state over whose current version the engine was started with."""
        self._state, self._loaded = state, {state.current}
        self._open.set()

    async def adopt(self) -> int:
        """Moves to what the registry says now; returns the number of the current version.

        Raises:
            ServingError: a version could not be loaded; the replica answers as before.
            HalfLoaded: the same, and the replica has to be restarted.
        """
        async with self._moving:
            state = self._registry.state()
            if state != self._state:
                await self._load(state)
                self._state = state
            await self._let_go()
            return state.current

    async def prepare(self, number: int) -> None:
        """Makes a version ready that may become the current one, as far as requests do not notice.

        Raises:
            ServingError: it could not be loaded.
        """
        async with self._moving:
            if self._loader.beside and number not in self._loaded:
                await self._loader.load(number)
                self._loaded.add(number)

    async def follow(self) -> None:
        """Looks at the registry from time to time, for ever."""
        while True:
            await asyncio.sleep(FOLLOW_S)
            try:
                if self._registry.state() != self._state:
                    await self.adopt()
            except HalfLoaded:
                return
            except Exception:  # the replica still answers with what it has
                logger.exception("A replica could not follow the registry")

    @asynccontextmanager
    async def hold(self, wanted: int | None) -> AsyncIterator[int]:
        """The version that answers a request, kept in place until the request has ended.

        Args:
            wanted: a version by number; None takes the current one, or the canary for its share of requests.

        Raises:
            ServingError: the wanted version is not loaded.
        """
        while not self._open.is_set():
            await self._open.wait()
        if self.broken:
            raise HalfLoaded("This replica is being restarted.")
        number = self._choose(wanted)
        self._in_use[number] += 1
        self._idle.clear()
        try:
            yield number
        finally:
            self._in_use[number] -= 1
            if not self._in_use.total():
                self._idle.set()

    def _choose(self, wanted: int | None) -> int:
        assert self._state is not None, "adopt comes first"
        if wanted is not None:
            if wanted not in self._loaded:
                raise ServingError(f"Version {wanted} is not loaded; {sorted(self._loaded)} are.")
            return wanted
        canary = self._state.canary
        if canary in self._loaded and random.random() < self._state.share:
            return canary
        return self._state.current

    async def _load(self, state: State) -> None:
        if not self._loader.beside:
            if state.current not in self._loaded:
                await self._replace(state.current)
            return
        for number in (state.current, state.canary):
            if number is not None and number not in self._loaded:
                await self._loader.load(number)
                self._loaded.add(number)

    async def _replace(self, number: int) -> None:
        """Whole weights: nothing may be in progress while they change."""
        self._open.clear()
        try:
            await self._idle.wait()
            await self._loader.load(number)
            self._loaded = {number}
        except HalfLoaded:
            self.broken = True
            raise
        finally:
            self._open.set()

    async def _let_go(self) -> None:
        """Unloads what is neither current nor canary nor in use; the one before stays, for a rollback."""
        assert self._state is not None
        kept = {self._state.current, self._state.canary, self._state.previous}
        for number in self._loaded - kept:
            if not self._in_use[number]:
                self._loaded.discard(number)
                await self._loader.unload(number)
