"""Changes the version of a running endpoint: the change is announced, every replica prepares, and then it is committed.

begin ─► verify ─► prepare ─► roll (whole weights) ─► commit ─► adopt
  └─── any failure, or a client that disconnects ─► abort ─► as before

The change in progress is written into the registry, so that only one of several ingresses changes versions at a time.
That ingress sends a heartbeat every few seconds; a change whose ingress has died therefore ends by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from alignment.errors import AlignmentError, CheckpointError, ServingError
from serving.registry.compatibility import check_compatible
from serving.registry.state import PendingChange, State
from serving.registry.versions import Registry

logger = logging.getLogger("ray.serve")

HEARTBEAT_S = 5.0
"""Seconds between the heartbeats of a change in progress."""


class Replicas(Protocol):
    """The replicas of an endpoint, as `serving.replica.backend.Backend` reaches them."""

    @property
    def is_whole(self) -> bool:
        """Whether versions are whole weights (not adapters), of which a replica holds one at a time."""
        ...

    async def prepare(self, number: int, *, canary: bool = False) -> None:
        """Prepares a version on every replica, as far as this does not affect requests."""
        ...

    async def roll(self, number: int) -> None:
        """Changes whole weights, replica by replica."""
        ...

    async def adopt(self) -> None:
        """Makes every replica follow the registry's state."""
        ...


class Promotions:
    """The changes of version at one ingress. Use it inside one event loop."""

    def __init__(self, registry: Registry, replicas: Replicas, *, check_lease: Callable[[], None]) -> None:
        """
        Args:
            check_lease: raises a ServingError if the registry belongs to another endpoint.
        """
        self._registry = registry
        self._replicas = replicas
        self._check_lease = check_lease
        self._runners: set[_StoppableTask] = set()

    async def promote(self, number: int, share: float | None = None, *, started_by: str = "") -> State:
        """Loads a version into every replica and lets it answer all requests, or a share of them as a canary.

        After an error, the same versions answer as before.

        Raises:
            ChangeUnderWay: another change is in progress.
            CheckpointError: a file of the version is damaged.
            ServingError: the change is not possible, a replica could not load the version, or the change lost its place
                in the registry because its heartbeats came too late.
        """
        return await self._carry_out(lambda: self._registry.begin_change(number, share, started_by=started_by))

    async def roll_back(self, *, started_by: str = "") -> State:
        """Undoes the newest change, as `Registry.rollback` describes.

        Raises:
            AlignmentError: as for `promote`.
        """
        state = await asyncio.to_thread(self._registry.state)
        if state.canary is not None:
            return await self.end_canary()
        return await self._carry_out(lambda: self._registry.begin_rollback(started_by=started_by))

    async def end_canary(self) -> State:
        """Ends the canary: the current version answers its share of the requests again.

        Raises:
            ChangeUnderWay: another change is in progress.
        """
        self._check_lease()
        state = await asyncio.to_thread(self._registry.end_canary)
        await self._notify_replicas()
        return state

    async def _carry_out(self, begin: Callable[[], PendingChange]) -> State:
        """Runs a change in a task of its own, so that it is aborted in order when the client disconnects."""
        self._check_lease()
        runner = _StoppableTask()
        task = asyncio.create_task(self._run(runner, begin))
        self._runners.add(runner)
        task.add_done_callback(lambda finished_task: self._finish(runner, finished_task))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            runner.stop("the client that asked for it went away")
            raise

    def _finish(self, runner: _StoppableTask, task: asyncio.Task[State]) -> None:
        self._runners.discard(runner)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("A change of version was not made: %s", task.exception())

    async def _run(self, runner: _StoppableTask, begin: Callable[[], PendingChange]) -> State:
        change = await asyncio.to_thread(begin)
        heartbeats = asyncio.create_task(self._send_heartbeats(change.token, runner))
        try:
            await runner.run(self._prepare(change))
            state = await asyncio.to_thread(self._registry.commit_change, change.token)
        except BaseException:
            await self._abort(change)
            raise
        finally:
            heartbeats.cancel()
        await self._notify_replicas()
        return state

    async def _prepare(self, change: PendingChange) -> None:
        await asyncio.to_thread(self._check, change.number)
        is_canary = change.share is not None
        await self._replicas.prepare(change.number, canary=is_canary)
        if self._replicas.is_whole and not is_canary:
            await self._replicas.roll(change.number)

    def _check(self, number: int) -> None:
        self._registry.verify(number)
        current = self._registry.folder_of(self._registry.state().current)
        check_compatible(self._registry.folder_of(number), current, capacity=self._registry.lora_capacity())

    async def _send_heartbeats(self, token: str, runner: _StoppableTask) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                await asyncio.to_thread(self._registry.renew_change, token)
            except ServingError as error:
                runner.stop(str(error))
                return
            except CheckpointError:  # the disk may be full for a moment; if it stays full, the change ends by itself
                logger.exception("The heartbeat of a change of version could not be written")

    async def _abort(self, change: PendingChange) -> None:
        """Brings registry and replicas back to the former version. A replica that fails here follows by itself soon."""
        try:
            state = await asyncio.to_thread(self._registry.abort_change, change.token)
            if state.change() is not None:
                return  # another process has taken over, since the heartbeats stopped, and changes versions itself
            if self._replicas.is_whole and change.share is None:
                await self._replicas.roll(state.current)
            else:
                await self._replicas.adopt()
        except AlignmentError:
            logger.exception("A replica did not go back to the version that answers")

    async def _notify_replicas(self) -> None:
        """Makes replicas follow the registry now; one that misses this reads the registry a little later."""
        try:
            await self._replicas.adopt()
        except AlignmentError:
            logger.exception("A replica has not followed the registry yet")


class _StoppableTask:
    """Runs a coroutine that another task may stop with a reason."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Runs the coroutine to its end, or until `stop`.

        Raises:
            ServingError: it was stopped; the message says why.
        """
        self._task = asyncio.create_task(coroutine)
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
        """Stops the coroutine. After its end this has no effect."""
        self._reason = self._reason or reason
        if self._task is not None:
            self._task.cancel()
