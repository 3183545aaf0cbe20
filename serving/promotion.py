"""How a running endpoint changes its version: announced, made ready by every replica, and only then true.

begin ─► verify ─► prepare ─► roll (whole weights) ─► commit ─► adopt
  └───────── any failure, or a client that goes away ─► abort ─► back

What is under way stands in the registry, so that of several ingresses one changes versions at a time. While it does, it
says every few seconds that it is still there; a change whose ingress died is over without anybody's doing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from alignment.errors import AlignmentError, CheckpointError, ServingError
from serving.compatibility import check_compatible
from serving.registry import PendingChange, Registry, State

logger = logging.getLogger("ray.serve")

BEAT_S = 5.0
"""Seconds between the signs of life of a change that is under way."""


class Replicas(Protocol):
    """The replicas of an endpoint, as `serving.backend.Backend` reaches them."""

    @property
    def is_whole(self) -> bool:
        """Whether versions are whole weights, of which a replica holds one at a time."""
        ...

    async def prepare(self, number: int, *, canary: bool = False) -> None:
        """Makes a version ready, as far as requests do not notice."""
        ...

    async def roll(self, number: int) -> None:
        """Changes whole weights, replica by replica."""
        ...

    async def adopt(self) -> None:
        """Has every replica move to what the registry says."""
        ...


class Promotions:
    """Changes of version at one ingress. Used inside one event loop."""

    def __init__(self, registry: Registry, replicas: Replicas, *, may_change: Callable[[], None]) -> None:
        """
        Args:
            may_change: raises a ServingError where the registry belongs to another endpoint.
        """
        self._registry = registry
        self._replicas = replicas
        self._may_change = may_change
        self._courses: set[_Course] = set()

    async def promote(self, number: int, share: float | None = None, *, asker: str = "") -> State:
        """Brings a version to every replica and lets it answer: all requests, or a share of them as a canary.

        Raises:
            ChangeUnderWay: another change has not ended.
            CheckpointError: a file of it is damaged.
            ServingError: it cannot be, a replica could not load it, or the change took longer than its own signs of
                life; what answered before does.
        """
        return await self._carry_out(lambda: self._registry.begin_change(number, share, started_by=asker))

    async def roll_back(self, *, asker: str = "") -> State:
        """Takes the newest change back, as `Registry.rollback` says.

        Raises:
            AlignmentError: as `promote`.
        """
        state = await asyncio.to_thread(self._registry.state)
        if state.canary is not None:
            return await self.end_canary()
        return await self._carry_out(lambda: self._registry.begin_rollback(started_by=asker))

    async def end_canary(self) -> State:
        """Gives the canary's share back to the version that answers.

        Raises:
            ChangeUnderWay: another change has not ended.
        """
        self._may_change()
        state = await asyncio.to_thread(self._registry.end_canary)
        await self._tell_replicas()
        return state

    async def _carry_out(self, begin: Callable[[], PendingChange]) -> State:
        """Runs in a task of its own: a client that goes away stops it, and what it began is put in order."""
        self._may_change()
        course = _Course()
        task = asyncio.create_task(self._run(course, begin))
        self._courses.add(course)
        task.add_done_callback(lambda done: self._end(course, done))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            course.stop("the client that asked for it went away")
            raise

    def _end(self, course: _Course, task: asyncio.Task[State]) -> None:
        self._courses.discard(course)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("A change of version was not made: %s", task.exception())

    async def _run(self, course: _Course, begin: Callable[[], PendingChange]) -> State:
        change = await asyncio.to_thread(begin)
        beating = asyncio.create_task(self._beat(change.token, course))
        try:
            await course.run(self._make_ready(change))
            state = await asyncio.to_thread(self._registry.commit_change, change.token)
        except BaseException:
            await self._give_up(change)
            raise
        finally:
            beating.cancel()
        await self._tell_replicas()
        return state

    async def _make_ready(self, change: PendingChange) -> None:
        await asyncio.to_thread(self._check, change.number)
        is_canary = change.share is not None
        await self._replicas.prepare(change.number, canary=is_canary)
        if self._replicas.is_whole and not is_canary:
            await self._replicas.roll(change.number)

    def _check(self, number: int) -> None:
        self._registry.verify(number)
        current = self._registry.folder_of(self._registry.state().current)
        check_compatible(self._registry.folder_of(number), current, capacity=self._registry.lora_capacity())

    async def _beat(self, token: str, course: _Course) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await asyncio.to_thread(self._registry.renew_change, token)
            except ServingError as error:
                course.stop(str(error))
                return
            except CheckpointError:  # a disk that is full for a moment; if it stays so, the change is over by itself
                logger.exception("A change of version could not say that it is still there")

    async def _give_up(self, change: PendingChange) -> None:
        """Leaves registry and replicas as they were; what fails here, each replica does by itself a little later."""
        try:
            state = await asyncio.to_thread(self._registry.abort_change, change.token)
            if state.change() is not None:
                return  # another process has found this one silent, and changes versions itself
            if self._replicas.is_whole and change.share is None:
                await self._replicas.roll(state.current)
            else:
                await self._replicas.adopt()
        except AlignmentError:
            logger.exception("A replica did not go back to the version that answers")

    async def _tell_replicas(self) -> None:
        """The registry says already what is true; a replica that did not hear of it reads it there."""
        try:
            await self._replicas.adopt()
        except AlignmentError:
            logger.exception("A replica has not followed the registry yet")


class _Course:
    """The part of a change that can be stopped."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def run(self, moving: Coroutine[Any, Any, None]) -> None:
        """Does it, up to its end or to `stop`.

        Raises:
            ServingError: it was stopped.
        """
        self._task = asyncio.create_task(moving)
        if self._reason is not None:
            self._task.cancel()
        try:
            await self._task
        except asyncio.CancelledError:
            if self._reason is None:
                raise
        if self._reason is not None:
            raise ServingError(f"the change was given up: {self._reason}")

    def stop(self, reason: str) -> None:
        """Has no effect after its end."""
        self._reason = self._reason or reason
        if self._task is not None:
            self._task.cancel()
