"""Rollout, driven: prompts spread over engines, and engines that are lost replaced. Knows neither vLLM nor Ray.

An engine is ready or stale. It becomes stale when it starts and when a load begins, and ready when a load has ended: so
what is lost in the middle, or takes half of an update, draws nothing until it has all of one.
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

from alignment.errors import RolloutError
from alignment.rollout import Prompt, Rollout, Rollouts, Sampling, Weights
from alignment.rollout.weights import Outbox, Update

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
ATTEMPTS = 2
"""Engines that a prompt may be given to: a second one if the first is lost over it."""
HEARTBEAT_S = 10.0
"""Seconds between two questions whether an engine lives, and the most that it may take to answer one."""


class EngineLost(RolloutError):
    """The engine is gone; what it was working on can be given to another, or to its successor."""


class Seat(Protocol):
    """The place of an engine, which outlives the engine."""

    async def begin(self) -> None:
        """Waits until there is an engine, idle and stale."""

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        """Draws the completions of a prompt.

        Raises:
            EngineLost: it has died.
            RolloutError: it is stale.
        """

    async def load(self, update: Update) -> None:
        """Makes the engine stale, brings an update into it, and makes it ready.

        Raises:
            RolloutError: it could not be loaded, and stays stale.
        """

    async def check(self) -> None:
        """Returns if the engine lives.

        Raises:
            EngineLost: it has died.
        """

    async def restart(self) -> None:
        """Ends what is left of the engine and starts another, which is stale."""

    async def stop(self) -> None:
        """Ends the engine."""


@dataclass(kw_only=True)
class _Place:
    """A seat and what the pool knows about it."""

    seat: Seat
    outstanding: int = 0
    """Tokens that it may have to compute for the prompts that it was given."""
    lives: int = 0
    """Engines that have sat here before."""
    revival: asyncio.Task[None] | None = None
    """The restart that is going on, or that has failed; None if the engine is ready."""


class Pool:
    """A `Generator` over engines; works in a thread of its own."""

    def __init__(
        self,
        seats: Sequence[Seat],
        outbox: Outbox,
        *,
        adapter: bool,
        timeout_s: float,
        main: bool = True,
    ) -> None:
        """
        Args:
            outbox: through which the engines get weights.
            adapter: whether weights are an adapter or all of them.
            timeout_s: of a step's rollouts, of a weight sync, and of an engine's start.
            main: whether this is the main training worker. Only that one talks to engines; the others have a pool
                without seats, and take part in `load`.
        """
        self.places = [_Place(seat=seat) for seat in seats]
        self.outbox = outbox
        self.adapter = adapter
        self.timeout_s = timeout_s
        self.main = main
        self.update: Update | None = None
        self._drawing: list[Future[Rollouts]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Waits until every engine has started.

        Raises:
            RolloutError: one did not.
        """
        if self.main:
            self.outbox.clear()
            self._wait(self._start(_each(place.seat.begin() for place in self.places)), "the engines did not start")

    def submit(self, prompts: list[Prompt], sampling: Sampling) -> Callable[[], Rollouts]:
        if self.update is None:
            raise RolloutError("the engines have no weights: load() must have ended well before rollouts can begin")
        drawing = self._start(self._draw(prompts, sampling))
        self._drawing.append(drawing)
        return lambda: self._wait(drawing, f"{len(prompts)} prompts were not answered")

    def load(self, weights: Weights) -> None:
        if self.main:
            self._load(weights)
        else:
            weights.join()

    def close(self) -> None:
        if not self.main or not self._thread.is_alive():
            return
        with contextlib.suppress(RolloutError):
            self._wait(self._start(_each(place.seat.stop() for place in self.places)), "the engines did not stop")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=HEARTBEAT_S)
        self.outbox.clear()

    def _load(self, weights: Weights) -> None:
        self._finish_drawing()
        # Engines that are being restarted read the files that are about to be replaced.
        self._wait(self._start(self._settle()), "a restart did not end")
        self.update = None
        update = self.outbox.put(weights, adapter=self.adapter)
        loading = self._start(_each(self._bring(place, update) for place in self.places))
        # Twice, because an engine may be restarted in between.
        self._wait(loading, f"version {update.version} of the weights did not reach every engine", times=2)
        self.update = update

    def _finish_drawing(self) -> None:
        for drawing in self._drawing:
            with contextlib.suppress(RolloutError):  # who asked for it is told
                self._wait(drawing, "")
        self._drawing.clear()

    async def _settle(self) -> None:
        """Waits until no engine is being restarted."""
        if revivals := [place.revival for place in self.places if place.revival is not None]:
            await asyncio.wait(revivals)

    async def _bring(self, place: _Place, update: Update) -> None:
        """Loads an update into an engine, or else into its successor."""
        place.revival = None  # or it has failed, and is tried once more
        try:
            await asyncio.wait_for(place.seat.load(update), self.timeout_s)
        except (RolloutError, TimeoutError) as error:
            logger.warning("an engine did not take version %d and is restarted: %s", update.version, error)
            await self._revive(place, update)

    async def _revive(self, place: _Place, update: Update) -> None:
        try:
            async with asyncio.timeout(self.timeout_s):
                await place.seat.restart()
                place.lives += 1
                await place.seat.load(update)
        except TimeoutError as error:
            raise RolloutError(f"an engine was not back within {self.timeout_s:g} s (rollout.timeout_s)") from error

    async def _draw(self, prompts: list[Prompt], sampling: Sampling) -> Rollouts:
        watch = asyncio.ensure_future(self._watch())
        answers = [asyncio.ensure_future(self._answer(prompt, sampling)) for prompt in prompts]
        try:
            async with asyncio.timeout(self.timeout_s):
                return list(await asyncio.gather(*answers))
        finally:
            for task in (watch, *answers):
                task.cancel()

    async def _answer(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        cost = len(prompt.tokens) + sampling.completions * sampling.max_tokens
        for attempt in range(ATTEMPTS):
            place = await self._ready() if attempt == 0 else await self._alive()
            life = place.lives
            place.outstanding += cost
            try:
                return await place.seat.generate(prompt, sampling)
            except EngineLost as error:
                lost = error
                self._lose(place, life)
            finally:
                place.outstanding -= cost
        raise RolloutError(f"{ATTEMPTS} engines were lost over a prompt of {len(prompt.tokens)} tokens: {lost}")

    async def _alive(self) -> _Place:
        """A ready place whose engine says that it lives: where one was lost, others may be, and nobody knows yet."""
        while True:
            place = await self._ready()
            if await self._lives(place):
                return place

    async def _lives(self, place: _Place) -> bool:
        """Asks an engine, and starts to replace it if it does not answer."""
        life = place.lives
        try:
            await asyncio.wait_for(place.seat.check(), HEARTBEAT_S)
        except (EngineLost, TimeoutError):
            self._lose(place, life)
            return False
        return True

    async def _ready(self) -> _Place:
        """The ready place with the least to do; waits for a restart if there is none."""
        while not (ready := [place for place in self.places if place.revival is None]):
            revivals = [place.revival for place in self.places if place.revival is not None]
            if all(revival.done() for revival in revivals):
                raise RolloutError(f"no engine could be restarted: {revivals[0].exception()}")
            await asyncio.wait([each for each in revivals if not each.done()], return_when=asyncio.FIRST_COMPLETED)
        return min(ready, key=lambda place: place.outstanding)

    def _lose(self, place: _Place, life: int) -> None:
        """Starts to replace an engine, unless it is being replaced already."""
        if place.lives != life or place.revival is not None:
            return
        assert self.update is not None, "submit has refused to draw"
        logger.warning("an engine was lost; it is restarted with version %d of the weights", self.update.version)
        place.revival = asyncio.ensure_future(self._revive(place, self.update))
        place.revival.add_done_callback(lambda revival: _forget_if_alive(place, revival))

    async def _watch(self) -> None:
        """Finds engines that neither answer nor fail."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for place in [place for place in self.places if place.revival is None and place.outstanding]:
                await self._lives(place)

    def _start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, running: Future[Result], failure: str, *, times: int = 1) -> Result:
        limit = times * self.timeout_s
        try:
            return running.result(limit + HEARTBEAT_S)
        except TimeoutError as error:
            running.cancel()
            raise RolloutError(f"{failure} within {limit:g} s (rollout.timeout_s)") from error


def _forget_if_alive(place: _Place, revival: asyncio.Task[None]) -> None:
    if not revival.cancelled() and revival.exception() is None:
        place.revival = None


async def _each(work: Any) -> None:
    """Does several things at once; the first failure is raised when all have ended."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
