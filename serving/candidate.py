"""The replica that holds a canary of whole weights, as an ingress sees it: kept while there is one, and no longer.

Its deployment has no replica until it is asked for something. Every ingress asks it to stay, again and again, while the
registry says that there is a canary or that one is being made; nobody asks any more when it has ended, and Ray Serve
ends the replica.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from alignment.errors import ServingError
from serving.engine import Status
from serving.registry import State
from serving.versions import candidate_version

logger = logging.getLogger("ray.serve")

CANDIDATE_NAME = "candidate"
"""The deployment's name."""
POLL_S = 0.2
"""Seconds between looks at whether it is ready."""
PAUSE_S = 1.0
"""Seconds before it is asked again after it could not be reached."""


class CandidateReplica:
    """One ingress's side of the candidate."""

    def __init__(self, handle: DeploymentHandle, *, start_s: float) -> None:
        """`start_s`: seconds in which it has to have started."""
        self.streaming = handle.options(stream=True)
        self._start_s = start_s
        self._status: Status | None = None
        self._staying: asyncio.Task[None] | None = None

    @property
    def status(self) -> Status | None:
        """What it said of itself last; None if nothing keeps it, or it has not said anything."""
        return self._status

    def holds(self, number: int | None) -> bool:
        """Whether it answers with a version, as far as is known here."""
        return number is not None and self._status is not None and self._status.version == number

    def follow(self, state: State) -> None:
        """Keeps the replica if there is something for it to hold, and else no longer."""
        if candidate_version(state) is None:
            if self._staying is not None:
                self._staying.cancel()
            self._staying = self._status = None
        elif self._staying is None:
            self._staying = asyncio.create_task(self._keep())

    async def wait_for(self, number: int) -> None:
        """Returns when it answers with a version.

        Raises:
            ServingError: it could not load it, or has not started in time, as when there is no room for it.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._start_s):
                while not self.holds(number):
                    if self._status is not None and self._status.failed == number:
                        raise ServingError(f"version {number} cannot be loaded beside the others: {self._status.error}")
                    await asyncio.sleep(POLL_S)
                return
        reason = await asyncio.to_thread(serve_reason, CANDIDATE_NAME)
        raise ServingError(
            f"no further replica has started within {self._start_s:g} s to hold version {number} beside the others, "
            f"which needs as much memory, and as many GPUs, as one of them (candidate_start_s). {reason}".strip()
        )

    async def _keep(self) -> None:
        while True:
            call = self.streaming.stay.remote()
            try:
                async for status in call:
                    self._status = status
            except (RayError, RayServeException):  # it died, and Ray Serve starts another
                self._status = None
                await asyncio.sleep(PAUSE_S)
            finally:
                call.cancel()


def serve_reason(deployment: str) -> str:
    """What Ray Serve says of a deployment."""
    applications = serve.status().applications.values()
    messages = [each.deployments[deployment].message for each in applications if deployment in each.deployments]
    return " ".join(message for message in messages if message)
