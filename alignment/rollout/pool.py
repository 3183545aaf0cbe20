"""The pool of rollout engines: it spreads prompts over engines, and it restarts engines that are lost.

This module knows neither vLLM nor Ray; it reaches an engine through an `EngineHandle`.

    prompts ─► EnginePool ─► EngineSlot ─► EngineHandle ─► engine
    weights ─► transfer ─► offer ────────────────▲

An engine is either ready or stale. It becomes stale when it starts and when a load begins, and ready when a load has
ended. A stale engine generates nothing. So an engine that is lost in the middle of a load, or that loads only half of
an update, generates nothing until it has loaded a complete one.

While another engine is ready, nothing waits for a lost engine. It is restarted beside rollouts and syncs, however long
that takes, and is used again when it has loaded the newest update. If no engine is ready, rollouts and syncs wait for
the first one that comes back, until their time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from alignment.errors import EngineLost, RolloutError
from alignment.rollout import Policy, Prompt, Rollout, Sampling, Weights
from alignment.rollout.gather import GatherOnce
from alignment.rollout.transfer import WeightTransfer, WeightUpdate

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
ATTEMPTS = 2
"""Times that a prompt is sent to an engine, and that a restarted engine is tried, if the engine is lost each time."""
HEARTBEAT_S = 10.0
"""Seconds between two health checks of an engine, and the time limit of one check."""
STOP_S = 30.0
"""Time limit for the engines to stop."""


def longest_wait_s(timeout_s: float) -> float:
    """The longest time that other training workers wait in one collective while the main worker waits for engines.

    The time limit of the process group has to be longer. Otherwise it would end all workers before the main worker can
    report what has failed. The longest wait is a sync. It waits for unfinished rollouts (1 × `timeout_s`), for engines
    that still read the previous weights (½), for the new ones to be sent, and for the engines' load with a restart (1).
    The rest is slack for the sending.

    Args:
        timeout_s: `rollout.timeout_s`.
    """
    return 4 * timeout_s + 6 * HEARTBEAT_S


class EngineHandle(Protocol):
    """The port to one engine. A handle stays the same when its engine is replaced by a new one."""

    async def begin(self) -> None:
        """Waits until the engine runs, without work and stale.

        Raises:
            EngineLost: it has died; a restart may help.
            AlignmentError: it cannot start.
        """

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        """Generates the completions of a prompt.

        Raises:
            EngineLost: the engine has died.
            RolloutError: the engine is stale.
        """

    async def load(self, update: WeightUpdate) -> None:
        """Makes the engine stale, loads an update into it, and makes it ready.

        Raises:
            RolloutError: the update could not be loaded, and the engine stays stale.
        """

    async def check(self) -> None:
        """Checks that the engine is alive.

        Raises:
            EngineLost: it has died.
        """

    async def restart(self) -> None:
        """Ends the engine and starts a new one, which is stale. Waits as long as the machines have no room for it."""

    async def stop(self) -> None:
        """Ends the engine."""


@dataclass(kw_only=True)
class EngineSlot:
    """A handle, and what the pool knows about its engine."""

    handle: EngineHandle
    """The port to the engine."""
    num_pending_tokens: int = 0
    """Most tokens that the engine still has to compute for the prompts that it works on."""
    generation: int = 0
    """Number of engines that this slot had before."""
    restart_task: asyncio.Task[None] | None = None
    """The restart in progress, or the one that has failed; None if the engine is ready."""
    load_task: asyncio.Task[None] | None = None
    """The load in progress; None if there is none."""

    @property
    def failure(self) -> BaseException | None:
        """The error of the last restart; None if the engine is ready or being restarted."""
        if self.restart_task is None or not self.restart_task.done():
            return None
        return asyncio.CancelledError() if self.restart_task.cancelled() else self.restart_task.exception()


class EnginePool:
    """A `Generator` over several engines. It runs its own event loop in a thread."""

    def __init__(
        self,
        handles: Sequence[EngineHandle],
        transfer: WeightTransfer,
        *,
        adapter: bool,
        timeout_s: float,
        is_main: bool = True,
    ) -> None:
        """Makes a pool; `begin` waits for its engines.

        Args:
            handles: one for each engine.
            transfer: sends weights to the engines.
            adapter: whether the weights are an adapter rather than all weights.
            timeout_s: time limit of a step's rollouts, of a weight sync, and of an engine's start. An engine that takes
                more than half of it for one load counts as lost.
            is_main: whether this is the main training worker. Only the main worker reaches engines. The others have a
                pool without handles, and take part in `load`.
        """
        self.slots = [EngineSlot(handle=handle) for handle in handles]
        self.transfer = transfer
        self.adapter = adapter
        self.timeout_s = timeout_s
        self.is_main = is_main
        self.update: WeightUpdate | None = None
        """The update that ready engines generate with; None before the end of the first sync, and during each sync."""
        self._offer: WeightUpdate | None = None
        """The update that a restarted engine has to load."""
        self._offer_available = asyncio.Event()
        """Is set while the weights of the offer can be received."""
        self._pending_work: list[Future[Any]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Waits until the engines have started. Engines that are lost meanwhile are restarted if another has started.

        Raises:
            AlignmentError: an engine cannot start, or none has started within the time limit.
        """
        if self.is_main:
            self.transfer.clear()
            self._wait(self._schedule(self._begin()), "the engines did not start")

    def start(self, work: Callable[[Policy], Coroutine[Any, Any, Result]]) -> Callable[[], Result]:
        """Starts work that asks this pool for completions; the returned function waits for its result.

        Raises:
            RolloutError: no weights have been loaded; or, from the returned function, the work was not finished.
        """
        if self.update is None:
            raise RolloutError("the engines have no weights: load() must have ended well before rollouts can begin")
        future = self._schedule(self._supervise(work(self)))
        self._pending_work.append(future)
        return lambda: self._wait(future, "the rollouts were not finished")

    def load(self, weights: Weights) -> None:
        """Sends weights to all engines, after unfinished rollouts; every training worker must call this.

        Raises:
            RolloutError: the weights could not be sent, or no engine has loaded them within the time limit.
        """
        if not self.is_main:
            weights.participate()
            return
        gather_once = GatherOnce(weights)
        try:
            self._load(gather_once)
        finally:
            gather_once.complete()

    def close(self) -> None:
        """Stops the engines and the pool's thread, and withdraws the last update."""
        if not self.is_main or not self._thread.is_alive():
            return
        with contextlib.suppress(RolloutError):
            self._wait(self._schedule(self._stop()), "the engines did not stop", limit_s=STOP_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=HEARTBEAT_S)
        self.transfer.clear()

    def _load(self, weights: Weights) -> None:
        """Does the main worker's part of `load`."""
        self._finish_rollouts()
        self.update = None
        self._wait(self._schedule(self._withdraw_offer()), "an engine did not finish an earlier load")
        update = self.transfer.send(weights, adapter=self.adapter)
        loads = self._schedule(self._distribute(update))
        self._wait(loads, f"version {update.version} of the weights reached no engine")
        self.update = update

    def _finish_rollouts(self) -> None:
        """Waits for all rollouts in progress."""
        for future in self._pending_work:
            with contextlib.suppress(RolloutError):  # it is raised where the rollouts are waited for
                self._wait(future, "")
        self._pending_work.clear()

    async def _begin(self) -> None:
        """Waits until every engine has started or is lost."""
        results = await asyncio.gather(
            *(asyncio.wait_for(slot.handle.begin(), self.timeout_s) for slot in self.slots), return_exceptions=True
        )
        if all(isinstance(error, TimeoutError) for error in results):
            raise TimeoutError
        for slot, error in zip(self.slots, results, strict=True):
            if isinstance(error, EngineLost | TimeoutError):
                self._mark_lost(slot, error)  # if no engine is left, the first sync waits for a restart
            elif error is not None:
                raise error

    async def _stop(self) -> None:
        """Cancels restarts in progress and stops all engines."""
        restart_tasks = [slot.restart_task for slot in self.slots if slot.restart_task is not None]
        for task in restart_tasks:
            task.cancel()
        await asyncio.gather(*restart_tasks, return_exceptions=True)
        await _gather(slot.handle.stop() for slot in self.slots)

    async def _withdraw_offer(self) -> None:
        """Withdraws the offer, because its weights will be replaced, and waits for engines that still receive them."""
        self._offer_available.clear()
        # It does not wait for the restarts that these loads belong to. If a load fails, another restart may follow,
        # which may have to wait for room.
        if load_tasks := [slot.load_task for slot in self.slots if slot.load_task is not None]:
            await asyncio.wait(load_tasks)

    async def _distribute(self, update: WeightUpdate) -> None:
        """Offers an update to all engines. Returns when each has loaded it or is lost, and at least one is ready."""
        self._offer = update
        self._offer_available.set()
        async with asyncio.timeout(self.timeout_s):
            for slot in self.slots:
                if slot.failure is not None:  # the last restart failed, but there may be room now
                    self._mark_lost(slot, slot.failure)
            ready_slots = [slot for slot in self.slots if slot.restart_task is None]
            results = await asyncio.gather(*map(self._load_into, ready_slots), return_exceptions=True)
            for slot, error in zip(ready_slots, results, strict=True):
                if isinstance(error, RolloutError | TimeoutError):
                    self._mark_lost(slot, error)
                elif error is not None:
                    raise error
            await self._ready_slot()

    async def _load_into(self, slot: EngineSlot) -> None:
        """Loads the offer into the engine of a slot."""
        assert self._offer is not None, "an offer has been made"
        slot.load_task = asyncio.ensure_future(self._load_in_time(slot.handle, self._offer))
        try:
            await slot.load_task
        finally:
            slot.load_task = None

    async def _load_in_time(self, handle: EngineHandle, update: WeightUpdate) -> None:
        """Loads an update into an engine within half of the time limit.

        Raises:
            RolloutError: the time is up, or the engine could not load it.
        """
        limit = self.timeout_s / 2
        try:
            await asyncio.wait_for(handle.load(update), limit)
        except TimeoutError as error:
            raise RolloutError(
                f"version {update.version} of the weights was not loaded within {limit:g} s (half of rollout.timeout_s)"
            ) from error

    async def _restart(self, slot: EngineSlot) -> None:
        """Restarts an engine and loads the newest update into it."""
        for attempt in range(ATTEMPTS):
            await slot.handle.restart()
            slot.generation += 1
            while not self._offer_available.is_set():
                await self._offer_available.wait()
            try:
                return await self._load_into(slot)
            except EngineLost:
                if attempt + 1 == ATTEMPTS:
                    raise

    async def _supervise(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Does work within the time limit, and checks the engines meanwhile."""
        health_task = asyncio.ensure_future(self._watch_health())
        try:
            async with asyncio.timeout(self.timeout_s):
                return await work
        finally:
            health_task.cancel()

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        """Generates the completions of a prompt; tries another engine if one is lost."""
        num_tokens = len(prompt.tokens) + sampling.num_completions * sampling.max_tokens
        for attempt in range(ATTEMPTS):
            slot = await self._ready_slot() if attempt == 0 else await self._responsive_slot()
            generation = slot.generation
            slot.num_pending_tokens += num_tokens
            try:
                return await slot.handle.generate(prompt, sampling)
            except EngineLost as error:
                last_error = error
                if slot.generation == generation:
                    self._mark_lost(slot, error)
            finally:
                slot.num_pending_tokens -= num_tokens
        raise RolloutError(f"{ATTEMPTS} engines were lost over a prompt of {len(prompt.tokens)} tokens: {last_error}")

    async def _responsive_slot(self) -> EngineSlot:
        """A ready slot whose engine has just answered a health check, for use after another engine was lost."""
        while True:
            slot = await self._ready_slot()
            if await self._responds(slot):
                return slot

    async def _responds(self, slot: EngineSlot) -> bool:
        """Checks an engine's health. If it does not answer, its restart begins."""
        generation = slot.generation
        try:
            await asyncio.wait_for(slot.handle.check(), HEARTBEAT_S)
        except (EngineLost, TimeoutError) as error:
            if slot.generation == generation:
                self._mark_lost(slot, error)
            return False
        return True

    async def _ready_slot(self) -> EngineSlot:
        """The ready slot with the least work. If there is none, waits for a restart.

        Raises:
            RolloutError: all restarts have failed.
        """
        while not (ready_slots := [slot for slot in self.slots if slot.restart_task is None]):
            restart_tasks = [slot.restart_task for slot in self.slots if slot.restart_task is not None]
            if all(task.done() for task in restart_tasks):
                raise RolloutError(f"no engine could be restarted: {self.slots[0].failure}")
            pending_tasks = [task for task in restart_tasks if not task.done()]
            await asyncio.wait(pending_tasks, return_when=asyncio.FIRST_COMPLETED)
        return min(ready_slots, key=lambda slot: slot.num_pending_tokens)

    def _mark_lost(self, slot: EngineSlot, cause: BaseException) -> None:
        """Starts the restart of a lost engine, unless it is in progress already."""
        if slot.restart_task is not None and not slot.restart_task.done():
            return
        slot.restart_task = asyncio.ensure_future(self._restart(slot))
        slot.restart_task.add_done_callback(lambda _: self._report_restart(slot))
        reason = str(cause) or "it does not answer"
        logger.warning("an engine is lost and is restarted; %s: %s", self._readiness(), reason)

    def _report_restart(self, slot: EngineSlot) -> None:
        """Logs the end of a restart, and marks the engine ready if it succeeded."""
        if slot.restart_task is not None and slot.restart_task.cancelled():
            return
        if slot.failure is None:
            slot.restart_task = None
            logger.warning("an engine is back; %s", self._readiness())
        else:
            logger.warning(
                "an engine could not be restarted, the next sync tries again; %s: %s", self._readiness(), slot.failure
            )

    def _readiness(self) -> str:
        """The number of ready engines, in words for messages."""
        num_ready = sum(slot.restart_task is None for slot in self.slots)
        return f"{num_ready} of {len(self.slots)} are there"

    async def _watch_health(self) -> None:
        """Checks all working engines regularly, to find those that neither answer nor fail."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for slot in [slot for slot in self.slots if slot.restart_task is None and slot.num_pending_tokens]:
                await self._responds(slot)

    def _schedule(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Starts a coroutine in the pool's event loop, from another thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait(self, future: Future[Result], failure: str, *, limit_s: float | None = None) -> Result:
        """Waits for a result within a time limit.

        Args:
            failure: what has not happened if the time is up, for the error.
            limit_s: seconds; None is `timeout_s`.

        Raises:
            RolloutError: the time is up.
        """
        try:
            return future.result((limit_s or self.timeout_s) + HEARTBEAT_S)
        except TimeoutError as error:
            future.cancel()
            limit = f"{limit_s:g} s" if limit_s else f"{self.timeout_s:g} s (rollout.timeout_s)"
            raise RolloutError(f"{failure} within {limit}; of the engines, {self._readiness()}") from error


async def _gather(coroutines: Any) -> None:
    """Runs several coroutines at once, and raises the first error after all have ended."""
    for result in await asyncio.gather(*coroutines, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
