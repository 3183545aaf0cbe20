"""The ingress's side of the model: it asks the replicas of engine and scorer, and turns failures into error replies."""

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
from serving.config import ServeConfig
from serving.registry.state import State
from serving.registry.versions import Registry
from serving.replica.candidate import CandidateReplica, serve_reason
from serving.replica.engine import Status
from serving.replica.routing import canary_answers, conversation_key
from serving.replica.scoring import ScoreResult, ScoringRequest
from serving.schema import TOKEN_ROUTES, Redirect, Reply, RequestError, Route, error_reply

logger = logging.getLogger("ray.serve")

STATE_S = 1.0
"""Seconds between reads of the registry: for so long an ingress may not know of a canary that another one began."""
READY_TIMEOUT_S = 2.0
"""Seconds within which a ready replica says its status."""
READY_FOR_S = 1.0
"""Seconds for which the answer whether the service is ready stays true."""
SWAP_TIMEOUT_S = 600.0
"""Most seconds for reading weights into a replica."""
STATUS_TIMEOUT_S = 30.0
"""Most seconds for the replicas' status in a promotion, which must not leave out a replica that is only slow."""
PAUSE_S = 0.1
"""Seconds before a request is sent again, when the only replica that could take it is about to be restarted."""
RETRY_S = 1.0
"""After how many seconds a client is told to ask again when there was no room."""
SCORER_RETRY_S = 10.0
"""After how many seconds a client is told to ask again while a scorer starts."""


@dataclass(frozen=True, kw_only=True)
class _Destination:
    """Where a request goes."""

    version: int | None
    """The version that has to answer; None for whichever version a replica holds."""
    is_choice: bool
    """Whether the ingress chose the version, so that another version may answer in its place."""
    on_candidate: bool = False
    may_use_candidate: bool = True
    avoid: tuple[str, ...] = ()
    """Replicas that redirected the request. If there is no other replica, the last of them is asked again."""


class Backend:
    """The replicas of one model, behind the ingress."""

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
            model: model name under which versions answer; models of other names have no versions.
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
        self._obstacle_lock = asyncio.Lock()
        self._obstacle: str | None = None
        self._ready_until = 0.0
        self._has_answered = False
        self._max_model_len: int | None = None

    @property
    def state(self) -> State:
        """Which versions answer, as far as this ingress knows."""
        return self._state

    @property
    def is_whole(self) -> bool:
        """Whether versions are whole weights, of which a replica holds one at a time."""
        return self._candidate is not None

    @property
    def candidate(self) -> Status | None:
        """The status of the replica that holds a canary of whole weights; None while there is no such replica."""
        return None if self._candidate is None else self._candidate.status

    async def begin(self) -> None:
        """Begins to follow the registry. It is called once, in the event loop that answers requests."""
        await self._read_registry()
        self._follow_task = asyncio.create_task(self._follow_registry())

    async def _follow_registry(self) -> None:
        while True:
            await asyncio.sleep(STATE_S)
            try:
                await self._read_registry()
            except AlignmentError:  # it continues with the state that it knows
                logger.exception("An ingress could not read the registry")

    async def _read_registry(self) -> None:
        self._state = await asyncio.to_thread(self._registry.state)
        if self._candidate is not None:
            self._candidate.follow(self._state)

    async def ask(
        self, route: Route, body: dict[str, Any], requested_version: int | None = None
    ) -> AsyncGenerator[Reply | str]:
        """Yields what the engine answers. A failure or the deadline becomes the last chunk.

        The first chunk is a `Reply`: the answer, an error, or the beginning of a stream (its body is empty). The
        further events of a stream follow as text.

        Args:
            requested_version: number of the model version that has to answer; None leaves it to the registry.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async for chunk in self._ask_replicas(route, body, requested_version, deadline):
                yield chunk
        except TimeoutError:
            yield error_reply(504, f"The answer was not complete after {self._timeout_s:g} seconds.")
        except BackPressureError:
            yield error_reply(503, "Too many requests are waiting. Try again later.", retry_after_s=RETRY_S)
        except RayServeException:
            yield error_reply(503, "The model is not available. Try again later.", retry_after_s=RETRY_S)
        except RayError:
            # No other replica gets the request, since it may be the reason why that one died. Requests that a replica
            # had not begun when it died were sent to another one by Ray Serve's router.
            message = "The replica that worked on this request is gone. Others may answer: try again."
            yield error_reply(503, message, retry_after_s=RETRY_S)

    async def _ask_replicas(
        self, route: Route, body: dict[str, Any], requested_version: int | None, deadline: float
    ) -> AsyncGenerator[Reply | str]:
        """Asks one replica after the other, as they redirect the request, until one takes it."""
        next_destination: _Destination | None = self._destination(route, body, requested_version)
        while next_destination is not None:
            destination, next_destination = next_destination, None
            async with aclosing(self._send(destination, route, body, deadline)) as chunks:
                async for chunk in chunks:
                    if isinstance(chunk, Redirect):
                        next_destination = self._next_destination(destination, chunk)
                        break
                    yield chunk
            if next_destination == destination:  # the only replica left is about to be restarted
                async with asyncio.timeout_at(deadline):
                    await asyncio.sleep(PAUSE_S)

    async def _send(
        self, destination: _Destination, route: Route, body: dict[str, Any], deadline: float
    ) -> AsyncGenerator[Reply | str | Redirect]:
        """Yields what one replica answers."""
        handle = self._streaming
        if destination.on_candidate and self._candidate is not None:
            handle = self._candidate.streaming
        chunks = handle.answer.remote(route, body, destination.version, avoid=destination.avoid)
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                yield chunk
        finally:
            chunks.cancel()  # the engine stops working for a client that went away

    def _destination(self, route: Route, body: dict[str, Any], requested_version: int | None) -> _Destination:
        """Returns where a request goes first: to the version that it asks for, or that its conversation stays with."""
        version = self._canary_of(route, body) if requested_version is None else requested_version
        on_candidate = self._candidate is not None and self._candidate.holds(version)
        if requested_version is None and self.is_whole and not on_candidate:
            version = None
        return _Destination(version=version, is_choice=requested_version is None, on_candidate=on_candidate)

    def _canary_of(self, route: Route, body: dict[str, Any]) -> int | None:
        """Returns the canary, if a request's conversation is one of those that it answers."""
        canary, share = self._state.canary, self._state.share
        if canary is None or not share or route in TOKEN_ROUTES or body.get("model") != self._model:
            return None
        conversation_start = conversation_key((route, body))
        return canary if conversation_start is not None and canary_answers(conversation_start, canary, share) else None

    def _next_destination(self, destination: _Destination, redirect: Redirect) -> _Destination:
        """Returns where a request goes next that a replica did not take."""
        if destination.on_candidate:
            version = None if destination.is_choice else destination.version
            return replace(destination, version=version, on_candidate=False, may_use_candidate=False)
        takes_over = self._candidate is not None and self._candidate.holds(redirect.moves_to)
        if takes_over and destination.version is None and destination.may_use_candidate:
            # The candidate holds the version that is about to answer.
            return replace(destination, version=redirect.moves_to, on_candidate=True)
        lacks_version = redirect.moves_to is None and not redirect.is_broken
        if lacks_version and destination.is_choice and destination.version is not None:
            return replace(destination, version=None)  # the canary has ended, or is not loaded yet
        replica = redirect.replica
        earlier = tuple(name for name in destination.avoid if name != replica)
        return replace(destination, avoid=(replica, *earlier) if redirect.is_broken else (*earlier, replica))

    async def score(self, scoring_request: ScoringRequest) -> ScoreResult:
        """Returns the scorer's result.

        Raises:
            RequestError: the completions cannot be rated, or the scorer is not available.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await self._score_when_started(scoring_request)
        except TimeoutError as error:
            raise RequestError(504, f"The rewards were not complete after {self._timeout_s:g} seconds.") from error
        except (RayError, RayServeException) as error:
            message = "The scorer is not available, or too many requests are waiting. Try again later."
            raise RequestError(503, message, retry_after_s=RETRY_S) from error
        if isinstance(result, Reply):
            raise RequestError.from_reply(result)
        return result

    async def _score_when_started(self, scoring_request: ScoringRequest) -> ScoreResult | Reply:
        """Waits for a replica of the scorer no longer than one may take to start, and then for its answer.

        The call itself starts a replica, which continues to start when the request is given up.
        """
        call = self._scoring.score.remote(scoring_request)
        answer = asyncio.create_task(_await_response(call))
        try:
            await asyncio.wait([answer], timeout=self._rewards.start_timeout_s)
            if answer.done() or await self._has_scorer():
                return await answer
        finally:
            if not answer.done():
                call.cancel()
                answer.cancel()
        logger.warning(
            "No scorer has started. %s", await asyncio.to_thread(serve_reason, self._scoring.deployment_name)
        )
        return error_reply(
            503,
            f"No scorer has started within {self._rewards.start_timeout_s:g} s. Beside an engine on GPUs it wants "
            f"{self._rewards.num_gpus:g} GPU of its own (rewards.num_gpus). Try again later.",
            retry_after_s=SCORER_RETRY_S,
        )

    async def _has_scorer(self) -> bool:
        """Returns whether a replica of the scorer runs, however busy it is."""
        try:
            response = self._scoring.broadcast("is_running")
            return bool(await response.results_async(timeout_s=READY_TIMEOUT_S, return_exceptions=True))
        except (RayError, RayServeException, TimeoutError):
            return False

    async def statuses(self) -> list[Status]:
        """Returns the status of every replica that can answer; empty while none can.

        The question goes past the queues of the replicas, so that a busy service stays a ready one.
        """
        return await self._statuses(READY_TIMEOUT_S)

    async def _statuses(self, timeout_s: float) -> list[Status]:
        try:
            answers = await self._call_replicas("status", timeout_s=timeout_s)
        except ServingError:
            return []
        return [answer for answer in answers if isinstance(answer, Status)]

    async def is_ready(self) -> bool:
        """Returns whether a replica answers, and has answered a request."""
        return await self.obstacle() is None

    async def obstacle(self) -> str | None:
        """Returns why the service is not ready; None if it is. It checks once a second at most: anybody may ask."""
        async with self._obstacle_lock:
            if asyncio.get_running_loop().time() >= self._ready_until:
                self._obstacle = await self._find_obstacle()
                self._ready_until = asyncio.get_running_loop().time() + READY_FOR_S
        return self._obstacle

    async def _find_obstacle(self) -> str | None:
        if not await self.statuses():
            return "No replica answers yet."
        if not self._has_answered:  # one request that goes the way of all requests
            body = {"model": self._model, "prompt": "Hello", "max_tokens": 1, "request_id": uuid.uuid4().hex}
            async with aclosing(self.ask("completions", body)) as chunks:
                reply = await anext(chunks)
            if not isinstance(reply, Reply) or reply.status != 200:
                return f"The first request was not answered: {reply.body if isinstance(reply, Reply) else reply}"
            self._has_answered = True
        return None

    async def max_model_len(self) -> int | None:
        """Returns the most tokens of prompt and answer together; None while no replica has said it."""
        if self._max_model_len is None:
            lengths = [status.max_model_len for status in await self.statuses()]
            self._max_model_len = max(lengths, default=0) or None
        return self._max_model_len

    async def prepare(self, number: int, *, canary: bool = False) -> None:
        """Makes a version ready, as far as this is possible without any request noticing it.

        Every replica loads an adapter, and verifies the files of whole weights. A canary of whole weights gets a
        replica of its own, for which the registry has to have the canary or the change that makes it.

        Raises:
            ServingError: a replica could not do it, or there is no room for another replica.
        """
        if canary and self._candidate is not None:
            await self._read_registry()
            await self._candidate.wait_for(number)
        else:
            await self._command_replicas("prepare", number)

    async def roll(self, number: int) -> None:
        """Has the replicas change to a version of whole weights, one after the other, while the others answer.

        Raises:
            ServingError: a replica could not change, which the text names; the replicas before it have changed.
        """
        while True:
            answers = await self._call_replicas("status", timeout_s=STATUS_TIMEOUT_S)
            statuses = [answer for answer in answers if isinstance(answer, Status)]
            if answers and not statuses:
                raise ServingError(f"no replica answers, so none can change to version {number}")
            stale_replicas = [status for status in statuses if status.version != number]
            if not stale_replicas:
                return
            await self._move(stale_replicas[0].replica, number)

    async def _move(self, replica: str, number: int) -> None:
        timeout_s = self._timeout_s + SWAP_TIMEOUT_S
        answers = await self._call_replicas("move", number, replica, timeout_s=timeout_s)
        replica_statuses = [answer for answer in answers if isinstance(answer, Status) and answer.replica == replica]
        if not replica_statuses:
            raise ServingError(f"replica {replica} was lost while it changed to version {number}")
        if replica_statuses[0].error is not None or replica_statuses[0].version != number:
            raise ServingError(f"replica {replica} did not change to version {number}: {replica_statuses[0].error}")
        logger.info("Replica %s has changed to version %d", replica, number)

    async def adopt(self) -> None:
        """Has every replica change to what the registry says.

        Raises:
            ServingError: a replica could not change.
        """
        await self._read_registry()
        await self._command_replicas("adopt")

    async def _command_replicas(self, method: str, *arguments: Any) -> None:
        """Calls a method of every replica; raises ServingError if one could not carry it out."""
        # A replica that died meanwhile starts again with what the registry says.
        answers = await self._call_replicas(method, *arguments, timeout_s=SWAP_TIMEOUT_S)
        problems = {answer.error for answer in answers if isinstance(answer, Status) and answer.error}
        if problems:
            raise ServingError("; ".join(sorted(problems)))

    async def _call_replicas(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        """Calls a method of every replica, past its queue.

        Returns:
            A Status or an exception for each replica; nothing where the service has no replica, and may have none while
            nobody asks it.

        Raises:
            ServingError: no replica is there, or one did not answer in time.
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


async def _await_response(call: DeploymentResponse[ScoreResult | Reply]) -> ScoreResult | Reply:
    """Returns the answer to a call; a task needs a coroutine, and the call is only awaitable."""
    answer: ScoreResult | Reply = await call
    return answer
