"""The ingress's side of the model: asks the replicas of engine and scorer, and turns what goes wrong into words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from alignment.errors import ServingError
from serving.config import ServeConfig
from serving.engine import Status
from serving.schema import Refused, Reply, Route, refusal
from serving.scoring import Job, Rated

READY_TIMEOUT_S = 2.0
READY_FOR_S = 1.0
"""How long an answer to whether it is ready is taken for true."""
SWAP_TIMEOUT_S = 600.0
RETRY_S = 1.0
"""What a client is told to wait that found no room."""


class Backend:
    """The replicas behind the ingress."""

    def __init__(self, engine: DeploymentHandle, scoring: DeploymentHandle, config: ServeConfig) -> None:
        self._engine = engine
        self._streaming = engine.options(stream=True)
        self._scoring = scoring
        self._timeout_s = config.request_timeout_s
        self._asking = asyncio.Lock()
        self._ready, self._ready_until = False, 0.0

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
        parts = self._streaming.answer.remote(route, body, wanted)
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    part = await anext(parts, None)
                if part is None:
                    return
                yield part
        finally:
            parts.cancel()  # a client that went away frees its place in the engine

    async def rate(self, job: Job) -> Rated:
        """What the scorer says.

        Raises:
            Refused: it cannot be rated, or the scorer is not available.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                rated: Rated | Reply = await self._scoring.rate.remote(job)
        except TimeoutError as error:
            raise Refused(504, f"The rewards were not complete after {self._timeout_s:g} seconds.") from error
        except (RayError, RayServeException) as error:
            message = "The scorer is not available, or too many requests are waiting. Try again later."
            raise Refused(503, message, retry_after_s=RETRY_S) from error
        if isinstance(rated, Reply):
            raise Refused.by(rated)
        return rated

    async def statuses(self) -> list[Status]:
        """What every replica that can answer says of itself; empty while none can.

        Sent past the queue to every replica, so that a busy service stays a ready one.
        """
        response = self._engine.broadcast("status")
        try:
            answers = await response.results_async(timeout_s=READY_TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            return []
        return [answer for answer in answers if isinstance(answer, Status)]

    async def is_ready(self) -> bool:
        """Whether a replica answers; asked at most once a second, since anybody may ask this."""
        async with self._asking:
            now = asyncio.get_running_loop().time()
            if now >= self._ready_until:
                self._ready = bool(await self.statuses())
                self._ready_until = asyncio.get_running_loop().time() + READY_FOR_S
        return self._ready

    async def prepare(self, number: int) -> None:
        """Has every replica make a version ready, as far as requests do not notice.

        Raises:
            ServingError: a replica could not.
        """
        await self._everywhere("prepare", number)

    async def adopt(self) -> None:
        """Has every replica move to what the registry says.

        Raises:
            ServingError: a replica could not.
        """
        await self._everywhere("adopt")

    async def _everywhere(self, method: str, *arguments: Any) -> None:
        response = self._engine.broadcast(method, *arguments)
        try:
            answers = await response.results_async(timeout_s=SWAP_TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ServingError("no replica answered") from error
        # A replica that died meanwhile starts again with what the registry says.
        problems = {answer.error for answer in answers if isinstance(answer, Status) and answer.error}
        if problems:
            raise ServingError("; ".join(sorted(problems)))
