"""The ingress's side of the model: asks the replicas of engine and scorer, and turns what goes wrong into words."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from alignment.errors import AlignmentError, ServingError
from serving.candidate import CandidateReplica, serve_reason
from serving.config import ServeConfig
from serving.engine import Status
from serving.registry import Registry, State
from serving.routing import canary_answers, conversation_key
from serving.schema import TOKEN_ROUTES, Elsewhere, Refused, Reply, Route, refusal
from serving.scoring import SCORING_NAME, Job, Rated

logger = logging.getLogger("ray.serve")

STATE_S = 1.0
"""Seconds between looks at the registry: for so long an ingress may not know of a canary that another one began."""
READY_TIMEOUT_S = 2.0
READY_FOR_S = 1.0
"""How long an answer to whether it is ready is taken for true."""
SWAP_TIMEOUT_S = 600.0
"""For weights to be read into a replica."""
STATUS_TIMEOUT_S = 30.0
"""For replicas to say what they hold, in a promotion, which would leave out one that is only slow."""
PAUSE_S = 0.1
"""Before a request is sent again that only a replica could take which is about to be restarted."""
RETRY_S = 1.0
"""What a client is told to wait that found no room."""
SCORER_RETRY_S = 10.0
"""What a client is told to wait while a scorer starts."""


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Where a request goes."""

    version: int | None
    """That has to answer; None for what a replica holds."""
    is_choice: bool
    """Whether the ingress chose the version, so that another may answer in its place."""
    on_candidate: bool = False
    may_use_candidate: bool = True
    avoid: tuple[str, ...] = ()
    """Replicas that sent it elsewhere; of several, the last one is asked again if there is no other."""


class Backend:
    """The replicas behind the ingress."""

    def __init__(
        self,
        engine: DeploymentHandle,
        scoring: DeploymentHandle,
        config: ServeConfig,
        registry: Registry,
        *,
        model: str,
        candidate: DeploymentHandle | None,
    ) -> None:
        """
        Args:
            model: name under which versions answer; others are of models without any.
            candidate: the deployment that holds a canary of whole weights; None if versions are adapters.
        """
        self._engine = engine
        self._streaming = engine.options(stream=True)
        self._scoring = scoring
        self._timeout_s = config.request_timeout_s
        self._rewards = config.rewards
        self._may_sleep = config.min_replicas == 0
        self._registry = registry
        self._model = model
        self._candidate = None if candidate is None else CandidateReplica(candidate, start_s=config.candidate_start_s)
        self._state = State()
        self._asking = asyncio.Lock()
        self._obstacle: str | None = None
        self._ready_until = 0.0
        self._has_answered = False
        self._max_model_len: int | None = None

    @property
    def state(self) -> State:
        """Which versions answer, as this ingress knows it."""
        return self._state

    @property
    def is_whole(self) -> bool:
        """Whether versions are whole weights, of which a replica holds one at a time."""
        return self._candidate is not None

    @property
    def candidate(self) -> Status | None:
        """What the replica says of itself that holds a canary of whole weights; None while there is none."""
        return None if self._candidate is None else self._candidate.status

    async def begin(self) -> None:
        """Begins to follow the registry; called once, in the event loop that requests are answered in."""
        await self._look()
        self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(STATE_S)
            try:
                await self._look()
            except AlignmentError:  # it goes on with what it knows
                logger.exception("An ingress could not read the registry")

    async def _look(self) -> None:
        self._state = await asyncio.to_thread(self._registry.state)
        if self._candidate is not None:
            self._candidate.follow(self._state)

    async def ask(self, route: Route, body: dict[str, Any], wanted: int | None = None) -> AsyncGenerator[Reply | str]:
        """What the engine says, up to a failure or the deadline, which become the last part.

        First comes a `Reply`: the answer, a refusal, or the beginning of a stream (its body is empty), whose further
        events follow as text.

        Args:
            wanted: number of the model version to answer; None leaves it to the registry.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async for part in self._once(route, body, wanted, deadline):
                yield part
        except TimeoutError:
            yield refusal(504, f"The answer was not complete after {self._timeout_s:g} seconds.")
        except BackPressureError:
            yield refusal(503, "Too many requests are waiting. Try again later.", retry_after_s=RETRY_S)
        except RayServeException:
            yield refusal(503, "The model is not available. Try again later.", retry_after_s=RETRY_S)
        except RayError:
            # Given to no other replica: this request may be what that one died of. What a replica had not begun when it
            # died, Ray Serve's router has sent to another one already.
            message = "The replica that worked on this request is gone. Others may answer: try again."
            yield refusal(503, message, retry_after_s=RETRY_S)

    async def _once(
        self, route: Route, body: dict[str, Any], wanted: int | None, deadline: float
    ) -> AsyncGenerator[Reply | str]:
        target: _Target | None = self._target(route, body, wanted)
        while target is not None:
            now, target = target, None
            async with aclosing(self._sent(now, route, body, deadline)) as parts:
                async for part in parts:
                    if isinstance(part, Elsewhere):
                        target = self._other(now, part)
                        break
                    yield part
            if target == now:  # nobody is left but what is about to be restarted
                async with asyncio.timeout_at(deadline):
                    await asyncio.sleep(PAUSE_S)

    async def _sent(
        self, target: _Target, route: Route, body: dict[str, Any], deadline: float
    ) -> AsyncGenerator[Reply | str | Elsewhere]:
        handle = self._streaming
        if target.on_candidate and self._candidate is not None:
            handle = self._candidate.streaming
        parts = handle.answer.remote(route, body, target.version, avoid=target.avoid)
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    part = await anext(parts, None)
                if part is None:
                    return
                yield part
        finally:
            parts.cancel()  # a client that went away frees its place in the engine

    def _target(self, route: Route, body: dict[str, Any], wanted: int | None) -> _Target:
        """The version that answers a request: what the client wants, or what its conversation stays with."""
        version = self._canary_of(route, body) if wanted is None else wanted
        on_candidate = self._candidate is not None and self._candidate.holds(version)
        if wanted is None and self.is_whole and not on_candidate:
            version = None
        return _Target(version=version, is_choice=wanted is None, on_candidate=on_candidate)

    def _canary_of(self, route: Route, body: dict[str, Any]) -> int | None:
        canary, share = self._state.canary, self._state.share
        if canary is None or not share or route in TOKEN_ROUTES or body.get("model") != self._model:
            return None
        begun = conversation_key((route, body))
        return canary if begun is not None and canary_answers(begun, canary, share) else None

    def _other(self, target: _Target, told: Elsewhere) -> _Target:
        """Where a request goes that a replica did not take."""
        if target.on_candidate:
            version = None if target.is_choice else target.version
            return replace(target, version=version, on_candidate=False, may_use_candidate=False)
        takes_over = self._candidate is not None and self._candidate.holds(told.moves_to)
        if takes_over and target.version is None and target.may_use_candidate:
            return replace(target, version=told.moves_to, on_candidate=True)  # it holds what is about to answer
        lacks_version = told.moves_to is None and not told.is_broken
        if lacks_version and target.is_choice and target.version is not None:
            return replace(target, version=None)  # the canary has ended, or has not come so far
        others = tuple(replica for replica in target.avoid if replica != told.replica)
        return replace(target, avoid=(told.replica, *others) if told.is_broken else (*others, told.replica))

    async def rate(self, job: Job) -> Rated:
        """What the scorer says.

        Raises:
            Refused: it cannot be rated, or the scorer is not available.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                rated = await self._rate_once_started(job)
        except TimeoutError as error:
            raise Refused(504, f"The rewards were not complete after {self._timeout_s:g} seconds.") from error
        except (RayError, RayServeException) as error:
            message = "The scorer is not available, or too many requests are waiting. Try again later."
            raise Refused(503, message, retry_after_s=RETRY_S) from error
        if isinstance(rated, Reply):
            raise Refused.by(rated)
        return rated

    async def _rate_once_started(self, job: Job) -> Rated | Reply:
        """Waits for a replica of the scorer no longer than one may take to start, and for its answer after that.

        Being asked is what starts one; that goes on when the request is given up.
        """
        call = self._scoring.rate.remote(job)
        answer = asyncio.create_task(_awaited(call))
        try:
            await asyncio.wait([answer], timeout=self._rewards.start_timeout_s)
            if answer.done() or await self._has_scorer():
                return await answer
        finally:
            if not answer.done():
                call.cancel()
                answer.cancel()
        logger.warning("No scorer has started. %s", await asyncio.to_thread(serve_reason, SCORING_NAME))
        return refusal(
            503,
            f"No scorer has started within {self._rewards.start_timeout_s:g} s. Beside an engine on GPUs it wants "
            f"{self._rewards.num_gpus:g} GPU of its own (rewards.num_gpus). Try again later.",
            retry_after_s=SCORER_RETRY_S,
        )

    async def _has_scorer(self) -> bool:
        """Whether a replica of the scorer runs, however busy it is."""
        try:
            response = self._scoring.broadcast("is_running")
            return bool(await response.results_async(timeout_s=READY_TIMEOUT_S, return_exceptions=True))
        except (RayError, RayServeException, TimeoutError):
            return False

    async def statuses(self) -> list[Status]:
        """What every replica that can answer says of itself; empty while none can.

        Sent past the queue to every replica, so that a busy service stays a ready one.
        """
        return await self._statuses(READY_TIMEOUT_S)

    async def _statuses(self, timeout_s: float) -> list[Status]:
        try:
            answers = await self._answers("status", timeout_s=timeout_s)
        except ServingError:
            return []
        return [answer for answer in answers if isinstance(answer, Status)]

    async def is_ready(self) -> bool:
        """Whether a replica answers, and has answered a request."""
        return await self.obstacle() is None

    async def obstacle(self) -> str | None:
        """Why it is not ready; None if it is. Looked into at most once a second, since anybody may ask."""
        async with self._asking:
            if asyncio.get_running_loop().time() >= self._ready_until:
                self._obstacle = await self._found_obstacle()
                self._ready_until = asyncio.get_running_loop().time() + READY_FOR_S
        return self._obstacle

    async def _found_obstacle(self) -> str | None:
        if not await self.statuses():
            return "No replica answers yet."
        if not self._has_answered:  # once, on the way that requests take
            body = {"model": self._model, "prompt": "Hello", "max_tokens": 1, "request_id": uuid.uuid4().hex}
            async with aclosing(self.ask("completions", body)) as parts:
                reply = await anext(parts)
            if not isinstance(reply, Reply) or reply.status != 200:
                return f"The first request was not answered: {reply.body if isinstance(reply, Reply) else reply}"
            self._has_answered = True
        return None

    async def max_model_len(self) -> int | None:
        """Most tokens of prompt and answer together; None while no replica has said so."""
        if self._max_model_len is None:
            lengths = [status.max_model_len for status in await self.statuses()]
            self._max_model_len = max(lengths, default=0) or None
        return self._max_model_len

    async def prepare(self, number: int, *, canary: bool = False) -> None:
        """Makes a version ready, as far as requests do not notice.

        An adapter is loaded by every replica. Of whole weights every replica verifies the files; a canary of them gets
        a replica of its own, for which the registry has to have the canary or the change that makes it.

        Raises:
            ServingError: a replica could not, or there is no room for another one.
        """
        if canary and self._candidate is not None:
            await self._look()
            await self._candidate.wait_for(number)
        else:
            await self._everywhere("prepare", number)

    async def roll(self, number: int) -> None:
        """Has the replicas change to a version of whole weights, one after the other, while the others answer.

        Raises:
            ServingError: a replica could not, which the text names; those before it have changed.
        """
        while True:
            answers = await self._answers("status", timeout_s=STATUS_TIMEOUT_S)
            statuses = [answer for answer in answers if isinstance(answer, Status)]
            if answers and not statuses:
                raise ServingError(f"no replica answers, so none can change to version {number}")
            behind = [status for status in statuses if status.version != number]
            if not behind:
                return
            await self._move(behind[0].replica, number)

    async def _move(self, replica: str, number: int) -> None:
        timeout_s = self._timeout_s + SWAP_TIMEOUT_S
        answers = await self._answers("move", number, replica, timeout_s=timeout_s)
        moved = [answer for answer in answers if isinstance(answer, Status) and answer.replica == replica]
        if not moved:
            raise ServingError(f"replica {replica} was lost while it changed to version {number}")
        if moved[0].error is not None or moved[0].version != number:
            raise ServingError(f"replica {replica} did not change to version {number}: {moved[0].error}")
        logger.info("Replica %s has changed to version %d", replica, number)

    async def adopt(self) -> None:
        """Has every replica move to what the registry says.

        Raises:
            ServingError: a replica could not.
        """
        await self._look()
        await self._everywhere("adopt")

    async def _everywhere(self, method: str, *arguments: Any) -> None:
        # A replica that died meanwhile starts again with what the registry says.
        answers = await self._answers(method, *arguments, timeout_s=SWAP_TIMEOUT_S)
        problems = {answer.error for answer in answers if isinstance(answer, Status) and answer.error}
        if problems:
            raise ServingError("; ".join(sorted(problems)))

    async def _answers(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        """What every replica answers to a call, past its queue: a Status or an exception; nothing from a service that
        may have no replica while nobody asks it, and has none.

        Raises:
            ServingError: none is there, or one did not answer in time.
        """
        try:
            response = self._engine.broadcast(method, *arguments)
            answers: list[Any] = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
        except DeploymentUnavailableError as error:
            if self._may_sleep:
                return []
            raise ServingError("no replica answered") from error
        except (RayError, RayServeException, TimeoutError) as error:
            raise ServingError("no replica answered") from error
        return answers


async def _awaited(call: DeploymentResponse[Rated | Reply]) -> Rated | Reply:
    """The answer to a call, which is awaitable and no coroutine."""
    answer: Rated | Reply = await call
    return answer
