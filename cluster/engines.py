"""vLLM engines as Ray actors: the driver starts them, and the main training worker uses them.

The driver starts and owns the actors before Ray Train starts the workers. So they survive a restart of the workers. Ray
restarts an actor that dies, and the engine pool then loads the weights into it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignment.distributed.world import World
from alignment.errors import AlignmentError, EngineLost, RolloutError
from alignment.rollout import Prompt, Rollout, Sampling
from alignment.rollout.pool import EnginePool
from alignment.rollout.transfer import PREFIX, EngineLocations, WeightUpdate
from alignment.settings.plugins import load_weight_transfer
from alignment.settings.run import RunConfig
from alignment.vllm.engine import RolloutEngine, RolloutEngineSettings

if TYPE_CHECKING:
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

STOP_S = 15.0
"""Time for an engine to end by itself (s). An engine that is killed leaves its shared memory behind."""
RETRY_S = 0.5
"""Seconds between two attempts to reach an actor that is being restarted."""
REQUESTS = 100_000
"""Calls that an actor works on at once. It exceeds the prompts of a step, so that health checks never wait."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The names of a run's engines, by which other processes find them."""

    name: str
    """Prefix of all names, which no other run has."""
    namespace: str
    """Ray's namespace of the actors."""
    count: int
    """Number of engines."""

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
    """Starts engines, and ends them after the context. It does not wait for their start; `attach` does.

    Args:
        cpus: CPUs that Ray reserves for each engine; `settings` has the number of its threads.
        gpus: GPUs of each engine.

    Raises:
        RolloutError: the cluster has no room for them.
    """
    import ray

    name = f"{PREFIX}{secrets.token_hex(4)}"
    engines = Engines(name=name, namespace=ray.get_runtime_context().namespace, count=count)
    actor_options = {
        "namespace": engines.namespace,
        "num_cpus": cpus,
        "num_gpus": gpus,
        "max_restarts": -1,
        "max_concurrency": REQUESTS,
    }
    actors = [
        ray.remote(EngineActor).options(name=f"{name}-{index}", **actor_options).remote(settings)
        for index in range(count)
    ]
    _wait_for_placement(actors, timeout_s=settings.rollout.timeout_s)
    try:
        for actor in actors:
            actor.begin.remote()
        yield engines
    finally:
        _end(actors)
        try:
            settings.transfer_class(name, EngineLocations(are_here=lambda: True)).clear()
        except Exception as error:  # it may be anybody's own, and must not hide what ended the run
            logger.warning("the weights of the engines could not be cleared: %s: %s", type(error).__name__, error)


def attach(engines: Engines, config: RunConfig, world: World) -> EnginePool:
    """Makes the `Generator` of a training worker over the engines; prompts of earlier workers are dropped.

    Every worker must call this.

    Raises:
        RolloutError: an engine does not start.
    """
    transfer_class = load_weight_transfer(config.rollout.weight_transfer)
    if world.is_main:
        transfer_class.sweep()
    handles = [RayEngineHandle(actor) for actor in engines.actors()] if world.is_main else []
    locations = EngineLocations(are_here=lambda: _are_here(handles), shared_folder=config.folder.resolve())
    transfer = transfer_class(engines.name, locations)
    adapter = config.model.lora is not None
    pool = EnginePool(handles, transfer, adapter=adapter, timeout_s=config.rollout.timeout_s, is_main=world.is_main)
    pool.begin()
    return pool


@dataclass(frozen=True, kw_only=True)
class ActorInstance:
    """Identifies one process of an engine's actor; a restarted actor is another instance."""

    name: str
    """A random name, which no other instance has."""
    node: str
    """Id of the node that the actor runs on."""


class EngineActor(RolloutEngine):
    """An engine as a Ray actor."""

    def __init__(self, settings: RolloutEngineSettings) -> None:
        super().__init__(settings)
        self.instance = ActorInstance(name=secrets.token_hex(8), node=_node())
        self._start_lock = asyncio.Lock()
        self._is_started = False

    async def node_id(self) -> str:
        """The id of the node that this actor runs on."""
        return self.instance.node

    async def begin(self) -> ActorInstance:
        """Starts the engine, or resets one that runs already; returns this actor's instance."""
        async with self._start_lock:
            if self._is_started:
                await self.reset()
            else:
                self.settings.transfer_class.sweep()
                await self.start()
                self._is_started = True
        return self.instance


class RayEngineHandle:
    """A handle to an engine in a Ray actor."""

    def __init__(self, actor: ActorHandle) -> None:
        self.actor = actor
        self.instance: ActorInstance | None = None

    @property
    def node(self) -> str | None:
        """The id of the node that the engine was last seen on; None before its start."""
        return None if self.instance is None else self.instance.node

    async def begin(self) -> None:
        """Waits until the actor's engine runs, without work and stale."""
        self.instance = await self._call("begin")

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        """Generates the completions of a prompt."""
        rollouts: list[Rollout] = await self._call("generate", prompt, sampling)
        return rollouts

    async def load(self, update: WeightUpdate) -> None:
        """Loads an update into the engine."""
        await self._call("load", update)

    async def check(self) -> None:
        """Checks that the actor and its engine are alive."""
        await self._call("check")

    async def restart(self) -> None:
        """Ends the actor, which Ray then starts again."""
        import ray

        with contextlib.suppress(RolloutError, TimeoutError):
            await asyncio.wait_for(self._call("stop"), STOP_S)
        ray.kill(self.actor, no_restart=False)
        previous_instance = self.instance
        while self.instance == previous_instance:  # a call may still reach the actor that was killed
            try:
                self.instance = await self._call("begin")
            except EngineLost:
                await asyncio.sleep(RETRY_S)

    async def stop(self) -> None:
        """Does nothing, as the driver has started the engine and ends it."""

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the actor.

        Raises:
            AlignmentError: the method raised it.
            EngineLost: the actor's process has died.
            RolloutError: any other error.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        reference = getattr(self.actor, method).remote(*arguments)
        try:
            return await reference
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, AlignmentError):
                raise type(cause)(str(cause)) from error
            raise RolloutError(f"an engine failed: {cause}") from error
        except RayActorError as error:
            raise EngineLost(f"an engine's process has died: {error}") from error


def _wait_for_placement(actors: list[ActorHandle], *, timeout_s: float) -> None:
    """Waits until Ray has placed all actors.

    Raises:
        RolloutError: it has not within the time limit.
    """
    import ray
    from ray.exceptions import GetTimeoutError

    try:
        ray.get([actor.node_id.remote() for actor in actors], timeout=timeout_s)
    except GetTimeoutError as error:
        for actor in actors:
            ray.kill(actor)
        raise RolloutError(f"the cluster found no place for {len(actors)} engines within {timeout_s:g} s") from error


def _end(actors: list[ActorHandle]) -> None:
    """Stops the engines, and then their actors."""
    import ray

    ray.wait([actor.stop.remote() for actor in actors], num_returns=len(actors), timeout=STOP_S)
    for actor in actors:
        ray.kill(actor)


def _are_here(handles: list[RayEngineHandle]) -> bool:
    """Whether all engines are on the node that this process runs on."""
    node = _node()
    return all(handle.node == node for handle in handles)


def _node() -> str:
    """The id of the node that this process runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
