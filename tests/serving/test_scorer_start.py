"""Rewards while no scorer runs: a request waits as long as a start takes, and no longer for a GPU that is not there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray import serve
from ray.serve._private.build_app import build_app

from serving.app import _scoring_options, application
from serving.config import ServeConfig
from serving.registry.models import EndpointModel, ServedModels
from serving.registry.served_model import ServedModel
from serving.registry.versions import Registry
from serving.replica.backend import Backend
from serving.replica.scoring import SCORING_NAME, ScoreResult, ScoringItem, ScoringRequest
from serving.schema import RequestError
from tests.serving.fleet import LightScoring

JOB = ScoringRequest(items=(ScoringItem(prompt="a", completions=("b",)),), version=None)
WAIT_S = 3.0
START_S = 4.0


def config_of(**rewards: float) -> ServeConfig:
    given = {"start_timeout_s": WAIT_S, **rewards}
    return ServeConfig(checkpoint="model", drain_timeout_s=1, rewards=given)  # type: ignore[arg-type]


@contextmanager
def backend(tmp_path: Path, config: ServeConfig, *, start_s: float = 0.0, work_s: float = 0.0) -> Iterator[Backend]:
    """One ingress's side of an endpoint on GPUs, of which this machine has none."""
    options = _scoring_options(config, "cuda")
    scoring = serve.deployment(LightScoring, name=SCORING_NAME, **options).bind(start_s, work_s)
    handle = serve.run(scoring, name="light", route_prefix=None)
    try:
        yield Backend(handle, handle, config, Registry(tmp_path), model="assistant", candidate=None)
    finally:
        serve.delete("light")


def test_a_scorer_without_a_gpu_is_refused_in_seconds_and_not_in_ten_minutes(light_ray: int, tmp_path: Path) -> None:
    with backend(tmp_path, config_of()) as asked:
        started = time.monotonic()
        with pytest.raises(RequestError) as raised:
            asyncio.run(asked.score(JOB))
        assert time.monotonic() - started < 60
    reply = raised.value.reply
    assert reply.status == 503 and reply.retry_after_s
    assert "No scorer has started within 3 s" in reply.body and "rewards.num_gpus" in reply.body


def test_a_start_goes_on_after_a_request_that_did_not_wait_for_it(light_ray: int, tmp_path: Path) -> None:
    with backend(tmp_path, config_of(num_gpus=0), start_s=START_S) as asked:

        async def again() -> ScoreResult:
            for _ in range(60):
                try:
                    return await asked.score(JOB)
                except RequestError as error:
                    assert error.reply.status == 503
            raise AssertionError("it never started")

        assert asyncio.run(again()).rewards == ((0.5,),)


def test_a_scorer_that_runs_has_all_the_time_of_a_request(light_ray: int, tmp_path: Path) -> None:
    with backend(tmp_path, config_of(num_gpus=0, min_replicas=1), work_s=WAIT_S + 1) as asked:
        assert asyncio.run(asked.score(JOB)).rewards == ((0.5,),)


@pytest.mark.parametrize(("num_gpus", "device"), [(1.0, "cuda"), (0.0, "cpu")])
def test_a_scorer_without_gpus_rates_on_the_cpu(num_gpus: float, device: str, tmp_path: Path) -> None:
    config = ServeConfig(checkpoint="model", device="cuda", rewards={"num_gpus": num_gpus})  # type: ignore[arg-type]
    served = ServedModel(name="assistant", source="/model", base_name=None, adapter=None, lora_capacity=None)
    model = EndpointModel(config=config, served_model=served, registry=Registry(tmp_path))
    app = build_app(application(config, ServedModels([model]), owner=""), name="app")
    (scoring,) = [deployment for deployment in app.deployments if deployment.name == SCORING_NAME]
    assert scoring.init_args[1] == device
    assert scoring.ray_actor_options["num_gpus"] == num_gpus
