"""Engines in Ray actors: whatever dies, every prompt is answered once, and only from whole weights of one version."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

import alignment.rollout.transfer.files as file_transfer
from alignment.distributed.world import World
from alignment.errors import RolloutError
from alignment.rollout import Rollout
from alignment.rollout.pool import EnginePool
from alignment.rollout.transfer.files import FileWeightTransfer
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from alignment.settings.run import RunConfig
from alignment.vllm.engine import RolloutEngineSettings
from cluster.engines import Engines, attach, running_engines
from tests.alignment.test_vllm import (
    MAX_LENGTH,
    PROMPTS,
    TINY,
    Damaging,
    Failing,
    Failure,
    Trainer,
    assert_equal_within_rounding,
    sampling,
    tokens_of,
    write_model,
)
from tests.processes import descendants, engine_processes
from tests.rollouts import submit


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on a small model, whose engines get all weights."""
    model = write_model(tmp_path_factory.mktemp("model"), tied=True)
    return RunConfig(
        name="run",
        output=str(tmp_path_factory.mktemp("runs")),
        steps=1,
        algorithm={"name": "dpo"},
        model=ModelConfig(path=str(model), dtype="fp32"),
        data=DataConfig(path="-", max_length=MAX_LENGTH),
        rollout=TINY,
    )


@dataclass(frozen=True)
class FirstStart:
    """Two actors, and what became of the first start of their engines, for which the model's folder lacked a file."""

    engines: Engines
    error: Exception


@pytest.fixture(scope="module")
def first_start(ray_here: None, config: RunConfig) -> Iterator[FirstStart]:
    settings = RolloutEngineSettings.for_run(
        config.model, config.rollout, max_length=MAX_LENGTH, device="cpu", threads=1
    )
    file = Path(config.model.path) / "config.json"
    hidden = file.rename(file.with_suffix(".hidden"))
    with running_engines(settings, count=2, cpus=0.1, gpus=0) as found:
        with pytest.raises(Exception) as raised:
            attach(found, config, World())
        hidden.rename(file)
        yield FirstStart(found, raised.value)
    assert_engine_processes(0)
    assert not list(Path("/dev/shm").glob(f"{found.name}-*"))


@pytest.fixture(scope="module")
def engines(first_start: FirstStart) -> Engines:
    """Two engines; they start when a pool is attached to them, as that is possible now."""
    return first_start.engines


@pytest.fixture(scope="module")
def trainer(config: RunConfig) -> Trainer:
    return Trainer.of(config.model)


@pytest.fixture
def pool(engines: Engines, config: RunConfig, trainer: Trainer) -> Iterator[EnginePool]:
    """What a training worker has; like a restarted one, it attaches to engines that others have used before."""
    found = attach(engines, config, World())
    with pytest.raises(RolloutError, match="no weights"):
        submit(found, PROMPTS, sampling())
    found.load(trainer.change())
    yield found
    found.close()


def assert_engine_processes(count: int) -> None:
    """Asks a few times: a list of processes is not taken at one instant, and may miss one."""
    for _ in range(20):
        if len(engine_processes()) == count:
            return
        time.sleep(0.1)
    raise AssertionError(
        f"not {count} engines among {[each.as_dict(['pid', 'name', 'cmdline']) for each in descendants()]}"
    )


def actor_processes() -> list[psutil.Process]:
    return descendants("EngineActor")


def wait_until_all_are_back(pool: EnginePool) -> None:
    """Lost engines return beside syncs and rollouts."""
    limit = time.monotonic() + TINY.timeout_s
    while any(slot.restart_task is not None for slot in pool.slots):
        assert time.monotonic() < limit
        time.sleep(0.1)


def draw(pool: EnginePool, **settings: Any) -> list[list[Rollout]]:
    return submit(pool, PROMPTS, sampling(**settings))()


def assert_right(pool: EnginePool, trainer: Trainer, drawn: list[list[Rollout]]) -> None:
    assert [len(rollouts) for rollouts in drawn] == [3] * len(PROMPTS)
    assert {rollout.weight_version for rollouts in drawn for rollout in rollouts} == {trainer.version}
    assert_equal_within_rounding(trainer.mismatch(drawn))


def test_two_engines_share_the_prompts_and_say_what_the_trainer_says(pool: EnginePool, trainer: Trainer) -> None:
    for _ in range(3):
        pool.load(trainer.change())
        wait = submit(pool, PROMPTS, sampling())
        assert_right(pool, trainer, wait())
    assert_engine_processes(2)


@pytest.mark.slow  # an engine starts again
def test_the_prompts_of_an_engine_that_is_killed_are_answered_by_others(pool: EnginePool, trainer: Trainer) -> None:
    expected = draw(pool, max_tokens=40)
    killed = engine_processes()[0]
    wait = submit(pool, PROMPTS, sampling(max_tokens=40))
    time.sleep(0.05)
    killed.kill()
    drawn = wait()
    assert_right(pool, trainer, drawn)
    assert tokens_of(drawn) == tokens_of(expected)
    pool.load(trainer.change())
    assert_right(pool, trainer, draw(pool))
    wait_until_all_are_back(pool)
    assert_right(pool, trainer, draw(pool))
    assert_engine_processes(2)
    assert killed not in engine_processes()


@pytest.mark.slow  # an engine starts again
def test_the_other_engine_goes_on_when_one_dies_in_the_middle_of_a_load(pool: EnginePool, trainer: Trainer) -> None:
    dying = engine_processes()[0]
    dying.suspend()
    killer = threading.Timer(2.0, dying.kill)
    killer.start()
    started = time.monotonic()
    pool.load(trainer.change())
    assert time.monotonic() - started < 30
    killer.join()
    assert_right(pool, trainer, draw(pool))
    wait_until_all_are_back(pool)
    assert_right(pool, trainer, draw(pool))


@pytest.mark.slow  # an engine starts again
def test_an_actor_that_is_killed_comes_back_with_the_weights_of_now(
    engines: Engines, config: RunConfig, trainer: Trainer
) -> None:
    pool = attach(dataclasses.replace(engines, count=1), config, World())  # so that nobody else can answer
    pool.load(trainer.change())
    (slot,) = pool.slots
    killed = psutil.Process(ray.get(slot.handle.actor.__ray_call__.remote(lambda _: os.getpid())))
    (engine,) = engine_processes(of=killed.pid)
    wait = submit(pool, PROMPTS, sampling(max_tokens=40))
    time.sleep(0.05)
    killed.kill()
    _, alive = psutil.wait_procs([engine], timeout=60)
    assert not alive, "an engine ends with its actor"
    assert_right(pool, trainer, wait())
    pool.load(trainer.change())
    assert_right(pool, trainer, draw(pool))
    assert killed not in actor_processes()
    pool.close()


@pytest.mark.slow
def test_an_update_that_is_cut_in_half_is_an_error_in_bounded_time(
    engines: Engines, config: RunConfig, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = attach(dataclasses.replace(engines, count=1), config, World())
    pool.load(trainer.change())
    monkeypatch.setattr(file_transfer, "SHARD_BYTES", 50_000)
    good = pool.transfer
    assert isinstance(good, FileWeightTransfer)
    pool.transfer = Damaging(good.name, good.directories)
    started = time.monotonic()
    with pytest.raises(RolloutError, match="could not be loaded"):
        pool.load(trainer.change())
    assert time.monotonic() - started < 2 * TINY.timeout_s
    with pytest.raises(RolloutError, match="no weights"):
        draw(pool)
    for actor in [slot.handle.actor for slot in pool.slots]:
        with pytest.raises(RolloutError, match="stale"):
            ray.get(actor.generate.remote(PROMPTS[0], sampling()))
    pool.transfer = good
    pool.load(trainer.weights())
    assert_right(pool, trainer, draw(pool))
    pool.close()


def test_after_a_sender_that_failed_nothing_is_drawn(pool: EnginePool, trainer: Trainer) -> None:
    with pytest.raises(Failure):
        pool.load(Failing(trainer.change()))
    with pytest.raises(RolloutError, match="no weights"):
        draw(pool)


def test_engines_that_do_not_start_say_why(first_start: FirstStart) -> None:
    assert "config.json" in str(first_start.error)


def test_engines_that_the_cluster_has_no_place_for_are_refused_in_bounded_time(
    ray_here: None, config: RunConfig
) -> None:
    rollout = TINY.model_copy(update={"timeout_s": 1.0})
    settings = RolloutEngineSettings.for_run(config.model, rollout, max_length=MAX_LENGTH, device="cpu")
    with (
        pytest.raises(RolloutError, match="no place for 1 engines within 1 s"),
        running_engines(settings, count=1, cpus=1000, gpus=0),
    ):
        pass
