"""An ingress's handle on the candidate: the replica that holds a canary of whole weights while there is one.

The candidate's deployment has no replica until it gets a call. While the registry has a canary, or prepares one, every
ingress calls it again and again to keep its replica. When the canary has ended the calls stop, and Ray Serve stops the
replica.
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
from serving.registry.state import State
from serving.replica.engine import Status
from serving.replica.versions import candidate_version

logger = logging.getLogger("ray.serve")

CANDIDATE_NAME = "candidate"
"""Name of the candidate's deployment; that of a further model has the model's name behind it."""
POLL_S = 0.2
"""Seconds between two checks whether the candidate is ready."""
PAUSE_S = 1.0
"""Seconds before the next call after the candidate could not be reached."""


class CandidateReplica:
    """One ingress's handle on the candidate."""

    def __init__(self, handle: DeploymentHandle, *, start_s: float) -> None:
        """
        Args:
            handle: the candidate's deployment.
            start_s: seconds in which the candidate must have started.
        """
        self.streaming = handle.options(stream=True)
        self._deployment = handle.deployment_name
        self._start_s = start_s
        self._status: Status | None = None
        self._keep_task: asyncio.Task[None] | None = None

    @property
    def status(self) -> Status | None:
        """The candidate's last status; None if it is not kept, or has not reported yet."""
        return self._status

    def holds(self, number: int | None) -> bool:
        """Whether the candidate answers with a version, according to its last status."""
        return number is not None and self._status is not None and self._status.version == number

    def follow(self, state: State) -> None:
        """Keeps the replica while the state has a version for it to hold, and releases it otherwise."""
        if candidate_version(state) is None:
            if self._keep_task is not None:
                self._keep_task.cancel()
            self._keep_task = self._status = None
        elif self._keep_task is None:
            self._keep_task = asyncio.create_task(self._keep_alive())

    async def wait_for(self, number: int) -> None:
        """Returns when the candidate answers with a version.

        Raises:
            ServingError: the candidate could not load it, or has not started in time, for example because no machine
                has free memory for it.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._start_s):
                while not self.holds(number):
                    if self._status is not None and self._status.failed == number:
                        raise ServingError(f"version {number} cannot be loaded beside the others: {self._status.error}")
                    await asyncio.sleep(POLL_S)
                return
        reason = await asyncio.to_thread(serve_reason, self._deployment)
        raise ServingError(
            f"no further replica has started within {self._start_s:g} s to hold version {number} beside the others, "
            f"which needs as much memory, and as many GPUs, as one of them (candidate_start_s). {reason}".strip()
        )

    async def _keep_alive(self) -> None:
        while True:
            call = self.streaming.keep_alive.remote()
            try:
                async for status in call:
                    self._status = status
            except (RayError, RayServeException):  # the replica died, and Ray Serve starts another one
                self._status = None
                await asyncio.sleep(PAUSE_S)
            finally:
                call.cancel()


def serve_reason(deployment: str) -> str:
    """Ray Serve's message about a deployment."""
    applications = serve.status().applications.values()
    messages = [
        application.deployments[deployment].message
        for application in applications
        if deployment in application.deployments
    ]
    return " ".join(message for message in messages if message)
