"""A machine with an engine is lost: the run goes on with the other engine, and takes the lost one back in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from alignment.distributed.world import World
from alignment.rollout.pool import EnginePool
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from alignment.settings.run import RunConfig
from alignment.vllm.engine import RolloutEngineSettings
from cluster.engines import attach, running_engines
from tests.alignment.test_vllm import (
    MAX_LENGTH,
    PROMPTS,
    TINY,
    Trainer,
    assert_equal_within_rounding,
    sampling,
    write_model,
)
from tests.rollouts import submit

pytestmark = pytest.mark.slow


NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
"""Of a Ray node: room for one engine."""


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of one node, to which others can be added."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    ray.init(address=started.address, _node_ip_address="127.0.0.1")
    yield started
    ray.shutdown()
    started.shutdown()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def presence(pool: EnginePool) -> list[bool]:
    return [slot.restart_task is None for slot in pool.slots]


def test_the_loss_of_a_machine_ends_no_run_while_another_engine_lives(cluster: Any, tmp_path: Path) -> None:
    other = cluster.add_node(**NODE)
    model = ModelConfig(path=str(write_model(tmp_path / "model", tied=True)), dtype="fp32")
    config = RunConfig(
        name="run",
        output=str(tmp_path / "runs"),
        steps=1,
        algorithm={"name": "dpo"},
        model=model,
        data=DataConfig(path="-", max_length=MAX_LENGTH),
        rollout=TINY,
    )
    config.folder.mkdir(parents=True)
    settings = RolloutEngineSettings.for_run(model, TINY, max_length=MAX_LENGTH, device="cpu", threads=1)
    trainer = Trainer.of(model)
    with running_engines(settings, count=2, cpus=1, gpus=0) as engines:
        pool = attach(engines, config, World())

        def step() -> None:
            pool.load(trainer.change())
            drawn = submit(pool, PROMPTS, sampling())()
            assert {rollout.weight_version for each in drawn for rollout in each} == {trainer.version}
            assert_equal_within_rounding(trainer.mismatch(drawn))

        step()
        cluster.remove_node(other, allow_graceful=False)

        def is_noticed() -> bool:
            """Steps go on while the processes of the lost machine still end."""
            started = time.monotonic()
            step()
            assert time.monotonic() - started < 60
            return sorted(presence(pool)) == [False, True]

        wait_until(is_noticed, 120)
        step()
        cluster.add_node(**NODE)
        wait_until(lambda: all(presence(pool)), TINY.timeout_s)
        step()
        assert presence(pool) == [True, True]
        pool.close()
