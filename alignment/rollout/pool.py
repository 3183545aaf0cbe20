"""Rollout, driven: prompts spread over engines, and engines that are lost replaced. Knows neither vLLM nor Ray.

An engine is ready or stale. It becomes stale when it starts and when a load begins, and ready when a load has ended: so
what is lost in the middle, or takes half of an update, draws nothing until it has all of one.

Nobody waits for an engine that is lost while another is ready: it is restarted beside rollouts and syncs, for as long
as that takes, and joins when it has taken the newest update. Without any engine, both wait for the first that comes
back, until their time is up.
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
from alignment.rollout.weights import GatherOnce, Outbox, Update

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
ATTEMPTS = 2
"""Engines that a prompt, or a place, may be given: a second one if the first is lost over it."""
HEARTBEAT_S = 10.0
"""Seconds between two questions whether an engine lives, and the most that it may take to answer one."""
STOP_S = 30.0
"""Seconds that the engines get to end."""


def longest_wait_s(timeout_s: float) -> float:
    """Most seconds that the other training workers wait in one collective while the main one waits for engines.

    The process group's own time limit has to be longer, or it would end all workers before the main one can say what
    has failed. A sync is the longest: rollouts to be finished (1 × `timeout_s`), engines that still read the files
    before (½), the files to be written, and the engines' load with a restart (1); the rest is slack for the writing.

    Args:
        timeout_s: `rollout.timeout_s`.
    """
    return 4 * timeout_s + 6 * HEARTBEAT_S


class EngineLost(RolloutError):
    """The engine is gone; what it was working on can be given to another, or to its successor."""


class Seat(Protocol):
    """The place of an engine, which outlives the engine."""

    async def begin(self) -> None:
        """Waits until there is an engine, idle and stale.

        Raises:
            EngineLost: there is none any more; a restart may help.
            AlignmentError: it cannot start.
        """

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
        """Ends what is left of the engine and starts another, which is stale. Waits for as long as there is no room."""

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
    reading: asyncio.Task[None] | None = None
    """The load that is going on."""

    @property
    def failure(self) -> BaseException | None:
        """Why the last restart has failed; None while the engine is ready or being restarted."""
        if self.revival is None or not self.revival.done():
            return None
        return asyncio.CancelledError() if self.revival.cancelled() else self.revival.exception()


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
            timeout_s: of a step's rollouts, of a weight sync, and of an engine's start. An engine that takes more than
                half of it for one load is taken for stuck.
            main: whether this is the main training worker. Only that one talks to engines; the others have a pool
                without seats, and take part in `load`.
        """
        self.places = [_Place(seat=seat) for seat in seats]
        self.outbox = outbox
        self.adapter = adapter
        self.timeout_s = timeout_s
        self.main = main
        self.update: Update | None = None
        """What the ready engines draw from; None until the first sync has ended, and during each."""
        self._offer: Update | None = None
        """What a restarted engine has to load."""
        self._offered = asyncio.Event()
        """Set while the offer's files are there, whole."""
        self._drawing: list[Future[Rollouts]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Waits until engines have started: all but those that are lost while another has.

        Raises:
            AlignmentError: one cannot start, or none is there within the time allowed.
        """
        if self.main:
            self.outbox.clear()
            self._wait(self._start(self._begin()), "the engines did not start")

    def submit(self, prompts: list[Prompt], sampling: Sampling) -> Callable[[], Rollouts]:
        if self.update is None:
            raise RolloutError("the engines have no weights: load() must have ended well before rollouts can begin")
        drawing = self._start(self._draw(prompts, sampling))
        self._drawing.append(drawing)
        return lambda: self._wait(drawing, f"{len(prompts)} prompts were not answered")

    def load(self, weights: Weights) -> None:
        if not self.main:
            weights.participate()
            return
        gathering = GatherOnce(weights)
        try:
            self._load(gathering)
        finally:
            gathering.complete()

    def close(self) -> None:
        if not self.main or not self._thread.is_alive():
            return
        with contextlib.suppress(RolloutError):
            self._wait(self._start(self._stop()), "the engines did not stop", limit_s=STOP_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=HEARTBEAT_S)
        self.outbox.clear()

    def _load(self, weights: Weights) -> None:
        self._finish_drawing()
        self.update = None
        self._wait(self._start(self._withdraw()), "an engine did not finish an earlier load")
        update = self.outbox.put(weights, adapter=self.adapter)
        self._wait(self._start(self._bring(update)), f"version {update.version} of the weights reached no engine")
        self.update = update

    def _finish_drawing(self) -> None:
        for drawing in self._drawing:
            with contextlib.suppress(RolloutError):  # who asked for it is told
                self._wait(drawing, "")
        self._drawing.clear()

    async def _begin(self) -> None:
        begun = await asyncio.gather(
            *(asyncio.wait_for(place.seat.begin(), self.timeout_s) for place in self.places), return_exceptions=True
        )
        if all(isinstance(error, TimeoutError) for error in begun):
            raise TimeoutError
        for place, error in zip(self.places, begun, strict=True):
            if isinstance(error, EngineLost | TimeoutError):
                self._lose(place, error)  # if that was the last one, the first sync waits for its restart
            elif error is not None:
                raise error

    async def _stop(self) -> None:
        revivals = [place.revival for place in self.places if place.revival is not None]
        for revival in revivals:
            revival.cancel()
        await asyncio.gather(*revivals, return_exceptions=True)
        await _each(place.seat.stop() for place in self.places)

    async def _withdraw(self) -> None:
        """Takes the offer back, whose files are about to be replaced, and waits for engines that are reading them."""
        self._offered.clear()
        # Not for the restarts around those loads: one that fails may be followed by another, which may find no room.
        if reading := [place.reading for place in self.places if place.reading is not None]:
            await asyncio.wait(reading)

    async def _bring(self, update: Update) -> None:
        """Offers an update to every engine; returns when no engine has yet to answer and at least one is ready."""
        self._offer = update
        self._offered.set()
        async with asyncio.timeout(self.timeout_s):
            for place in self.places:
                if place.failure is not None:  # of a restart; by now there may be room again
                    self._lose(place, place.failure)
            ready = [place for place in self.places if place.revival is None]
            for place, error in zip(
                ready, await asyncio.gather(*map(self._take, ready), return_exceptions=True), strict=True
            ):
                if isinstance(error, RolloutError | TimeoutError):
                    self._lose(place, error)
                elif error is not None:
                    raise error
            await self._ready()

    async def _take(self, place: _Place) -> None:
        """Loads the offer into an engine."""
        assert self._offer is not None, "an offer has been made"
        place.reading = asyncio.ensure_future(self._read(place.seat, self._offer))
        try:
            await place.reading
        finally:
            place.reading = None

    async def _read(self, seat: Seat, update: Update) -> None:
        limit = self.timeout_s / 2
        try:
            await asyncio.wait_for(seat.load(update), limit)
        except TimeoutError as error:
            raise RolloutError(
                f"version {update.version} of the weights was not loaded within {limit:g} s (half of rollout.timeout_s)"
            ) from error

    async def _revive(self, place: _Place) -> None:
        """Restarts an engine and brings it the newest update."""
        for attempt in range(ATTEMPTS):
            await place.seat.restart()
            place.lives += 1
            while not self._offered.is_set():
                await self._offered.wait()
            try:
                return await self._take(place)
            except EngineLost:
                if attempt + 1 == ATTEMPTS:
                    raise

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
                if place.lives == life:
                    self._lose(place, error)
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
        except (EngineLost, TimeoutError) as error:
            if place.lives == life:
                self._lose(place, error)
            return False
        return True

    async def _ready(self) -> _Place:
        """The ready place with the least to do; waits for a restart if there is none."""
        while not (ready := [place for place in self.places if place.revival is None]):
            revivals = [place.revival for place in self.places if place.revival is not None]
            if all(revival.done() for revival in revivals):
                raise RolloutError(f"no engine could be restarted: {self.places[0].failure}")
            await asyncio.wait([each for each in revivals if not each.done()], return_when=asyncio.FIRST_COMPLETED)
        return min(ready, key=lambda place: place.outstanding)

    def _lose(self, place: _Place, cause: BaseException) -> None:
        """Starts to replace an engine, unless it is being replaced already."""
        if place.revival is not None and not place.revival.done():
            return
        place.revival = asyncio.ensure_future(self._revive(place))
        place.revival.add_done_callback(lambda _: self._revived(place))
        reason = str(cause) or "it does not answer"
        logger.warning("an engine is lost and is restarted; %s: %s", self._presence(), reason)

    def _revived(self, place: _Place) -> None:
        """Says how a restart has ended."""
        if place.revival is not None and place.revival.cancelled():
            return
        if place.failure is None:
            place.revival = None
            logger.warning("an engine is back; %s", self._presence())
        else:
            logger.warning(
                "an engine could not be restarted, the next sync tries again; %s: %s", self._presence(), place.failure
            )

    def _presence(self) -> str:
        ready = sum(place.revival is None for place in self.places)
        return f"{ready} of {len(self.places)} are there"

    async def _watch(self) -> None:
        """Finds engines that neither answer nor fail."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for place in [place for place in self.places if place.revival is None and place.outstanding]:
                await self._lives(place)

    def _start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, running: Future[Result], failure: str, *, limit_s: float | None = None) -> Result:
        try:
            return running.result((limit_s or self.timeout_s) + HEARTBEAT_S)
        except TimeoutError as error:
            running.cancel()
            limit = f"{limit_s:g} s" if limit_s else f"{self.timeout_s:g} s (rollout.timeout_s)"
            raise RolloutError(f"{failure} within {limit}; of the engines, {self._presence()}") from error


async def _each(work: Any) -> None:
    """Does several things at once; the first failure is raised when all have ended."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
