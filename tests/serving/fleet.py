"""Replicas that hold no model, in a real Ray Serve: versions are the service's own business, answers are made up.

Only what touches vLLM is replaced: loading takes a moment and can be made to fail, and an answer is its version's
number, written as slowly as it is asked for.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from alignment.errors import ServingError
from serving.config import ServeConfig
from serving.registry.models import EndpointModel, ServedModels
from serving.registry.served_model import served_version
from serving.registry.state import State
from serving.registry.versions import Registry
from serving.replica.backend import Backend
from serving.replica.candidate import CANDIDATE_NAME
from serving.replica.engine import CandidateEngine, Engine
from serving.replica.engine_arguments import EngineSettings
from serving.replica.routing import ConversationRouter
from serving.replica.scoring import ScoreResult, Scoring, ScoringRequest
from serving.replica.trial import Trials
from serving.replica.versions import TURN_LOCK, MoveLimits, PartialLoadError, Versions, candidate_version, fleet_version
from serving.schema import Reply, Route, error_reply, event

MODEL = "assistant"
LOAD_S = 0.3
WAIT_S = 1.0


class Health:
    """In place of Ray Serve LLM's server, and of the engine in it, which lives."""

    engine = SimpleNamespace(
        _engine_client=SimpleNamespace(errored=False, model_config=SimpleNamespace(max_model_len=512))
    )

    async def check_health(self) -> None:
        return None


class Shelf:
    """A loader that notes what it loads, and fails when a file of the registry says so."""

    holds_many = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def load(self, number: int) -> None:
        await asyncio.sleep(LOAD_S)
        with (self._folder / f"loads-{number}").open("a") as file:
            file.write("x")
        order = self._folder / f"fails-{number}.json"
        if order.is_file():
            kth, half = json.loads(order.read_text())
            if (self._folder / f"loads-{number}").stat().st_size == kth:
                raise (PartialLoadError if half else ServingError)(f"version {number} is not to be loaded here")

    async def unload(self, number: int) -> None:
        return None


class WithoutModel:
    """What replaces the parts of an engine that touch vLLM."""

    async def _start(self, settings: EngineSettings, state: State, number: int, *, is_candidate: bool = False) -> None:
        registry = Registry(Path(settings.registry))
        if is_candidate and (registry.folder / "no-candidate").exists():
            raise RuntimeError("there is no memory for it")
        await asyncio.to_thread(registry.verify, number)
        self._served_model = served_version(settings.config, registry, number)
        self._server = Health()
        self._control_tokens = None
        self._trials = Trials(lambda: "", settings.config.limits)
        self._versions = Versions(
            registry,
            Shelf(registry.folder),
            limits=MoveLimits(drain_s=60.0, wait_s=WAIT_S),
            target=candidate_version if is_candidate else fleet_version,
            lock_file=None if is_candidate else registry.folder / TURN_LOCK,
        )
        self._versions.begin(state, number)

    def _request(self, route: Route, body: dict[str, Any]) -> Any:
        return body

    async def _replies(self, route: Route, request: Any, names: Any) -> AsyncIterator[str | Reply]:
        yield Reply(status=200, body="", events="begun", version=names.label)
        for _ in range(int(request["seconds"] / 0.05)):
            await asyncio.sleep(0.05)
            yield str(self._versions.current)  # type: ignore[attr-defined]


class LightEngine(WithoutModel, Engine):
    """One replica of the fleet."""

    async def die(self, replica: str) -> None:
        """Ends its process, if this is the one that is meant."""
        if replica == self._replica:
            os._exit(1)


class Parrot(LightEngine):
    """Answers every request to `/v1/completions` with one word."""

    async def _replies(self, route: Route, request: Any, names: Any) -> AsyncIterator[str | Reply]:
        id = f"cmpl-{request['request_id']}"
        choices = [{"index": 0, "text": "blue", "finish_reason": "stop"}]
        body = {"id": id, "object": "text_completion", "model": names.client_name, "choices": choices}
        yield Reply(status=200, body=json.dumps(body), version=names.label)


class LightScoring(Scoring):
    """Rates without a model, after a start of some seconds or none, as slowly as it is asked to."""

    def __init__(self, start_s: float, work_s: float) -> None:
        time.sleep(start_s)
        self._work_s = work_s

    def _score(self, request: ScoringRequest) -> ScoreResult:
        time.sleep(self._work_s)
        return ScoreResult(version=1, rewards=((0.5,),))


class NamedEngine(WithoutModel, Engine):
    """Says its model and its version, at once or after a while. It does not start where its registry has a file
    `no-engine`."""

    async def _start(self, settings: EngineSettings, state: State, number: int, *, is_candidate: bool = False) -> None:
        if (Path(settings.registry) / "no-engine").exists():
            raise ServingError("vLLM does not start with this model: there is no room")
        await super()._start(settings, state, number, is_candidate=is_candidate)

    async def _replies(self, route: Route, request: Any, names: Any) -> AsyncIterator[str | Reply]:
        if request["prompt"] == "wait":
            await asyncio.sleep(3)
        if request["prompt"] == "die":
            os._exit(1)
        choices = [{"index": 0, "text": f"{names.client_name} {names.version}", "finish_reason": "stop"}]
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        body = {"id": f"cmpl-{request['request_id']}", "object": "text_completion", "model": names.client_name}
        yield Reply(status=200, body=json.dumps({**body, "choices": choices, "usage": usage}), version=names.label)


class NamedCandidate(NamedEngine, CandidateEngine):
    """The candidate's."""


class VersionScoring(LightScoring):
    """Gives every completion the number of the model's current version."""

    def __init__(self, config: ServeConfig, device: str, registry: str) -> None:
        super().__init__(0.0, 0.0)
        self._registry = Registry(Path(registry))

    def _score(self, request: ScoringRequest) -> ScoreResult:
        number = self._registry.state().current
        rewards = tuple(tuple(float(number) for _ in item.completions) for item in request.items)
        return ScoreResult(version=number, rewards=rewards)


class SpokenEngine(WithoutModel, Engine):
    """One replica that says what its prompt asks for, in OpenAI's form."""

    async def _replies(self, route: Route, request: Any, names: Any) -> AsyncIterator[str | Reply]:
        prompt, usage = request["prompt"], {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        chunk = {"id": request["request_id"], "object": "text_completion", "model": MODEL}
        choice = {"index": 0, "text": "yes", "finish_reason": "stop"}
        if prompt == "wait" and not request.get("stream"):
            await asyncio.sleep(60)
        if not request.get("stream"):
            body = json.dumps({**chunk, "choices": [choice], "usage": usage})
            yield Reply(status=200, body=body, version=names.label)
            return
        yield Reply(status=200, body="", events=as_event({**chunk, "choices": [choice]}), version=names.label)
        if prompt == "wait":
            await asyncio.sleep(60)
        if prompt == "die":
            await asyncio.sleep(0.2)  # until the stream has begun at its client
            os._exit(1)
        if prompt == "fail":
            yield event(error_reply(500, "The engine failed on this request.")) + "data: [DONE]\n\n"
            return
        if request["stream_options"]["include_usage"]:
            yield as_event({**chunk, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def as_event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"


class LightCandidate(WithoutModel, CandidateEngine):
    """The candidate's."""


class Front:
    """In place of the ingress, which a test's own process plays."""

    def __init__(self, engine: DeploymentHandle, candidate: DeploymentHandle) -> None:
        pass


def light_config(replicas: int, *, candidate_start_s: float = 60.0) -> ServeConfig:
    return ServeConfig(
        checkpoint="model",
        name=MODEL,
        min_replicas=replicas,
        max_replicas=max(replicas, 1),
        candidate_start_s=candidate_start_s,
    )


@contextmanager
def fleet(registry: Registry, *, replicas: int, candidate_cpus: float = 0.0) -> Iterator[ServeConfig]:
    """An application of that many replicas, until the block ends. The candidate asks Ray for that many CPUs."""
    config = light_config(replicas)
    settings = EngineSettings(config=config, registry=str(registry.folder), device="cpu")
    common: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0},
        "request_router_config": RequestRouterConfig(request_router_class=ConversationRouter),
        "max_ongoing_requests": 64,
        "health_check_period_s": 0.5,
        "graceful_shutdown_timeout_s": 1.0,
    }
    none = {
        "min_replicas": 0,
        "max_replicas": 1,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 1.0,
        "look_back_period_s": 1.0,
        "metrics_interval_s": 0.5,
    }
    count: dict[str, Any] = {"num_replicas": replicas} if replicas else {"autoscaling_config": none}
    engine = serve.deployment(LightEngine, name="engine", **count, **common).bind(settings)
    asks = {**common, "ray_actor_options": {"num_cpus": candidate_cpus}}
    candidate = serve.deployment(LightCandidate, name=CANDIDATE_NAME, autoscaling_config=none, **asks).bind(settings)
    front = serve.deployment(Front, name="front", ray_actor_options={"num_cpus": 0})
    serve.run(front.bind(engine, candidate), name="light", route_prefix=None)
    try:
        yield config
    finally:
        serve.delete("light")


def only_model(config: ServeConfig, registry: Registry) -> ServedModels[EndpointModel]:
    """The models of an endpoint that has one, whose version 1 answers."""
    served = served_version(config, registry, 1)
    return ServedModels([EndpointModel(config=config, served_model=served, registry=registry)])


def backend_of(registry: Registry, config: ServeConfig) -> Backend:
    """One ingress's side of the running fleet; `begin` it in an event loop."""
    engine = serve.get_deployment_handle("engine", "light")
    candidate = serve.get_deployment_handle(CANDIDATE_NAME, "light")
    return Backend(engine, engine, config, registry, model=MODEL, candidate=candidate)


async def ask(
    backend: Backend, text: str, seconds: float = 0.0, requested_version: int | None = None
) -> tuple[str, set[str], float]:
    """The version that an answer was labelled with, those that wrote it, and the seconds that it took."""
    started = time.monotonic()
    body = {"model": MODEL, "prompt": text, "stream": True, "seconds": seconds}
    parts = [part async for part in backend.ask("completions", body, requested_version)]
    first = parts[0]
    assert isinstance(first, Reply) and first.status == 200, parts
    assert all(isinstance(part, str) for part in parts[1:]), parts
    return str(first.version), set(map(str, parts[1:])), time.monotonic() - started


def start_light_ray(port: int | None = None) -> None:
    """A Ray for replicas that hold no model; with a port, Ray Serve listens there on 127.0.0.1."""
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20,
        _node_ip_address="127.0.0.1",
    )  # fmt: skip
    if port is None:
        serve.start(proxy_location="Disabled")
    else:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
