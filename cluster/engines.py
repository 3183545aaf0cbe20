"""The machines' side of rollouts: vLLM engines as Ray actors, started by the driver and driven by the main worker.

The driver starts them before Ray Train's workers and owns them, so that they outlive workers that are restarted. Ray
restarts an actor that dies; the pool that drives it then brings it the weights again.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import AlignmentError, RolloutError
from alignment.models.parallel import World
from alignment.rollout import Prompt, Rollout, Sampling, Weights
from alignment.rollout.pool import EngineLost, EnginePool
from alignment.rollout.vllm import RolloutEngine, RolloutEngineSettings
from alignment.rollout.weights import PREFIX, FileWeightTransfer, WeightUpdate, local_directories, sweep
from alignment.settings.run import RunConfig

if TYPE_CHECKING:
    from ray.actor import ActorHandle

STOP_S = 15.0
"""Seconds that an engine gets to end by itself. One that is killed leaves its shared memory behind."""
RETRY_S = 0.5
"""Seconds between two attempts to reach an actor that is being restarted."""
REQUESTS = 100_000
"""Calls that an actor works on at once: more prompts than a step has, so that none is in the way of a health check."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """Where to find the engines; crosses process borders."""

    name: str
    """What every name begins with; no other run's does."""
    namespace: str
    count: int

    def actors(self) -> list[ActorHandle]:
        """The engines' actors.

        Raises:
            RolloutError: they are gone.
        """
        import ray

        try:
            return [ray.get_actor(f"{self.name}-{index}", namespace=self.namespace) for index in range(self.count)]
        except ValueError as error:
            raise RolloutError(f"the engines are gone: {error}") from error


@contextlib.contextmanager
def running_engines(settings: RolloutEngineSettings, *, count: int, cpus: float, gpus: float) -> Iterator[Engines]:
    """Engines for as long as the block runs. They start while it goes on; whoever attaches waits for them.

    Args:
        cpus: of each, as Ray counts them; how many threads it has, `settings` says.
        gpus: of each.

    Raises:
        RolloutError: the cluster has no place for them.
    """
    import ray

    name = f"{PREFIX}{secrets.token_hex(4)}"
    found = Engines(name=name, namespace=ray.get_runtime_context().namespace, count=count)
    how = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_concurrency": REQUESTS}
    actors = [
        ray.remote(EngineActor).options(name=f"{name}-{index}", namespace=found.namespace, **how).remote(settings)
        for index in range(count)
    ]
    _wait_for_places(actors, timeout_s=settings.rollout.timeout_s)
    try:
        for actor in actors:
            actor.begin.remote()
        yield found
    finally:
        _end(actors)
        FileWeightTransfer(name, local_directories()).clear()


def attach(found: Engines, config: RunConfig, world: World) -> EnginePool:
    """The `Generator` over the engines, for a training worker; called by each. Earlier workers' prompts are dropped.

    Raises:
        RolloutError: an engine does not start.
    """
    if world.is_main:
        sweep()
    handles = [RayEngineHandle(actor) for actor in found.actors()] if world.is_main else []
    transfer = NearestFileTransfer(found.name, handles, config.folder.resolve())
    adapter = config.model.lora is not None
    pool = EnginePool(handles, transfer, adapter=adapter, timeout_s=config.rollout.timeout_s, is_main=world.is_main)
    pool.begin()
    return pool


class NearestFileTransfer(FileWeightTransfer):
    """Leaves weights in shared memory while every engine is on this machine, else in the run's folder.

    Asked anew at each sync: an engine that was lost may come back on another machine.
    """

    def __init__(self, name: str, handles: list[RayEngineHandle], folder: Path) -> None:
        super().__init__(name, (*local_directories(), folder))
        self.handles = handles
        self.folder = folder

    def send(self, weights: Weights, *, adapter: bool) -> WeightUpdate:
        self.clear()  # also where the last update is
        here = _node()
        self.directories = (
            local_directories() if all(handle.node == here for handle in self.handles) else (self.folder,)
        )
        return super().send(weights, adapter=adapter)


@dataclass(frozen=True, kw_only=True)
class ActorInstance:
    """One life of an engine's actor."""

    name: str
    """Unlike any other life's."""
    node: str
    """Id of the node that it runs on."""


class EngineActor:
    """A Ray actor around an engine."""

    def __init__(self, settings: RolloutEngineSettings) -> None:
        self.engine = RolloutEngine(settings)
        self.instance = ActorInstance(name=secrets.token_hex(8), node=_node())
        self._starting = asyncio.Lock()
        self._started = False

    async def place(self) -> str:
        """The id of the node that it runs on."""
        return self.instance.node

    async def begin(self) -> ActorInstance:
        """Starts the engine, or makes one that has started idle and stale. Returns this actor's life."""
        async with self._starting:
            if self._started:
                await self.engine.reset()
            else:
                sweep()
                await self.engine.start()
                self._started = True
        return self.instance

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        return await self.engine.generate(prompt, sampling)

    async def load(self, update: WeightUpdate) -> None:
        await self.engine.load(update)

    async def check(self) -> None:
        await self.engine.check()

    async def stop(self) -> None:
        await self.engine.stop()


class RayEngineHandle:
    """The place of an engine in a Ray actor."""

    def __init__(self, actor: ActorHandle) -> None:
        self.actor = actor
        self.instance: ActorInstance | None = None

    @property
    def node(self) -> str | None:
        """Id of the node that its engine ran on last; None before it began."""
        return None if self.instance is None else self.instance.node

    async def begin(self) -> None:
        self.instance = await self._call("begin")

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        rollouts: list[Rollout] = await self._call("generate", prompt, sampling)
        return rollouts

    async def load(self, update: WeightUpdate) -> None:
        await self._call("load", update)

    async def check(self) -> None:
        await self._call("check")

    async def restart(self) -> None:
        """Ends the actor; Ray starts it again."""
        import ray

        with contextlib.suppress(RolloutError, TimeoutError):
            await asyncio.wait_for(self._call("stop"), STOP_S)
        ray.kill(self.actor, no_restart=False)
        before = self.instance
        while self.instance == before:  # a call may still reach the actor that is being killed
            try:
                self.instance = await self._call("begin")
            except EngineLost:
                await asyncio.sleep(RETRY_S)

    async def stop(self) -> None:
        """Nothing: the driver has started the engine, and ends it."""

    async def _call(self, method: str, *arguments: Any) -> Any:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        answer = getattr(self.actor, method).remote(*arguments)
        try:
            return await answer
        except asyncio.CancelledError:
            ray.cancel(answer)
            raise
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, AlignmentError):
                raise type(cause)(str(cause)) from error
            raise RolloutError(f"an engine failed: {cause}") from error
        except RayActorError as error:
            raise EngineLost(f"an engine's process has died: {error}") from error


def _wait_for_places(actors: list[ActorHandle], *, timeout_s: float) -> None:
    import ray
    from ray.exceptions import GetTimeoutError

    try:
        ray.get([actor.place.remote() for actor in actors], timeout=timeout_s)
    except GetTimeoutError as error:
        for actor in actors:
            ray.kill(actor)
        raise RolloutError(f"the cluster found no place for {len(actors)} engines within {timeout_s:g} s") from error


def _end(actors: list[ActorHandle]) -> None:
    import ray

    ray.wait([actor.stop.remote() for actor in actors], num_returns=len(actors), timeout=STOP_S)
    for actor in actors:
        ray.kill(actor)


def _node() -> str:
    """Id of the node that this process runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
