"""A vLLM engine of this process, for a run without Ray."""

from __future__ import annotations

import os

from alignment.rollout.pool import EnginePool
from alignment.rollout.transfer import PREFIX, EngineLocations
from alignment.vllm.engine import RolloutEngine, RolloutEngineSettings

LOCAL = f"{PREFIX}local-"
"""Prefix of the transfer's name for an engine of the same process; the process id follows."""


class LocalEngineHandle(RolloutEngine):
    """A handle to an engine in this process: the engine itself."""

    async def begin(self) -> None:
        """Starts the engine."""
        await self.start()

    async def restart(self) -> None:
        """Ends the engine and starts a new one."""
        await self.stop()
        await self.start()


def local_generator(settings: RolloutEngineSettings) -> EnginePool:
    """Starts an engine from this process, for a run without Ray, and returns a `Generator` over it.

    Raises:
        RolloutError: the engine does not start.
    """
    transfer_class = settings.transfer_class
    transfer_class.sweep()
    transfer = transfer_class(f"{LOCAL}{os.getpid()}", EngineLocations(are_here=lambda: True))
    pool = EnginePool(
        [LocalEngineHandle(settings)],
        transfer,
        adapter=settings.model.lora is not None,
        timeout_s=settings.rollout.timeout_s,
    )
    try:
        pool.begin()
    except BaseException:
        pool.close()
        raise
    return pool
