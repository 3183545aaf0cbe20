"""The loop on real Ray Train workers: it survives a kill exactly, and more workers change nothing but the speed."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from alignment.errors import CheckpointError, ConfigError, DataError
from alignment.run_folder import RunFolder
from cluster.config import ClusterRunConfig
from cluster.launch import run
from tests.alignment.test_train import assert_same_run, measured, weights
from tests.cluster.uneven import Uneven
from tests.processes import descendants

Settings = dict[str, Any]
pytestmark = pytest.mark.usefixtures("ray_here")


def run_on_ray(settings: Settings, *, workers: int = 1, **changed: Any) -> Path:
    cluster = {"workers": workers, "cpus_per_worker": 1}
    config = ClusterRunConfig.model_validate({**settings, "cluster": cluster, **changed})
    run(config)
    return config.folder


def train_workers() -> list[psutil.Process]:
    """Ray Train's workers among the processes that this test session has started."""
    return descendants("RayTrainWorker")


def kill_when(folder: Path, step: int, killed: list[int]) -> None:
    """Ends the worker with SIGKILL once it has reported a step, in the middle of a later one."""
    while not any(line["step"] >= step for line in RunFolder(folder).read_metrics()):
        time.sleep(0.01)
    for worker in train_workers():
        killed.append(worker.pid)
        worker.kill()


@pytest.mark.slow  # 80 steps, twice, and a restart
@pytest.mark.usefixtures("one_thread")
def test_a_worker_killed_in_the_middle_of_a_step_changes_nothing(run_settings: Settings, tmp_path: Path) -> None:
    settings = {**run_settings, "steps": 80, "checkpoint": {"every": 10}, "evaluate": {"every": 40}}
    settings["model"] = {**settings["model"], "lora": {"rank": 4, "dropout": 0.1}}
    undisturbed = run_on_ray(settings, workers=0)

    disturbed = {**settings, "output": str(tmp_path / "disturbed")}
    killed: list[int] = []
    killer = threading.Thread(target=kill_when, args=(tmp_path / "disturbed" / "run", 25, killed), daemon=True)
    killer.start()
    folder = run_on_ray(disturbed)
    killer.join(timeout=1)
    assert killed, "the test did not kill anything"
    assert_same_run(undisturbed, folder)


def test_how_long_a_worker_may_be_silent_is_left_to_ray() -> None:
    """Python may keep a large worker's threads waiting for longer than a minute."""
    assert "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S" not in os.environ


@pytest.mark.slow
def test_a_worker_that_hangs_is_noticed_and_replaced(
    run_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "10")
    stopped: list[psutil.Process] = []

    def stop() -> None:
        while not any(line["step"] >= 10 for line in RunFolder(tmp_path / "runs" / "run").read_metrics()):
            time.sleep(0.01)
        for worker in train_workers():
            stopped.append(worker)
            worker.suspend()

    threading.Thread(target=stop, daemon=True).start()
    folder = run_on_ray({**run_settings, "steps": 200, "checkpoint": {"every": 10}})
    assert stopped, "the test did not stop anything"
    assert [line["step"] for line in RunFolder(folder).read_metrics()] == list(range(201))
    assert not any(worker.is_running() for worker in stopped)


def test_two_workers_compute_what_one_process_does(run_settings: Settings, tmp_path: Path) -> None:
    settings = {**run_settings, "steps": 5, "groups_per_step": 5, "evaluate": {"every": 1}}
    alone = run_on_ray(settings, workers=0)
    together = run_on_ray({**settings, "output": str(tmp_path / "two")}, workers=2)
    for one, other in zip(measured(alone), measured(together), strict=True):
        one, other = ({k: v for k, v in line.items() if "accuracies" not in k} for line in (one, other))
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
    shared = weights(alone).keys() & weights(together).keys()
    for name in (name for name in shared if name.startswith("master.")):
        torch.testing.assert_close(weights(together)[name], weights(alone)[name], atol=5e-4, rtol=0)


def test_an_error_of_ours_arrives_whole_and_is_not_tried_again(run_settings: Settings) -> None:
    data = {**run_settings["data"], "path": "nowhere.jsonl"}
    started = time.monotonic()
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        run_on_ray(run_settings, data=data)
    assert time.monotonic() - started < 180


@pytest.mark.slow  # a run of its own on Ray
def test_a_row_less_on_one_worker_ends_the_run_with_both_figures(run_settings: Settings) -> None:
    started = time.monotonic()
    settings = {**run_settings, "algorithm": {"name": f"{Uneven.__module__}:Uneven"}}
    text = r"worker 0: 20 groups to train on .*; worker 1: 19 groups to train on"
    with pytest.raises(DataError, match=text):
        run_on_ray(settings, workers=2)
    assert time.monotonic() - started < 60, "of which most is the start of the workers"


@pytest.mark.slow  # a run of its own on Ray
def test_a_disk_that_gets_full_ends_the_run_on_all_workers(run_settings: Settings) -> None:
    """Only the main worker writes; the other waits for it. The process group alone would let it wait for hours."""
    full: list[float] = []

    def fill() -> None:
        while not RunFolder(Path(run_settings["output"]) / "run").read_metrics():
            time.sleep(0.01)
        for worker in train_workers():
            worker.rlimit(psutil.RLIMIT_FSIZE, (200_000, 200_000))
        full.append(time.monotonic())

    threading.Thread(target=fill, daemon=True).start()
    text = r"step-000000\d0 cannot be written: .*File too large.*; earlier ones are intact"
    with pytest.raises(CheckpointError, match=text):
        run_on_ray(run_settings, workers=2, steps=1000, checkpoint={"every": 10})
    assert time.monotonic() - full[0] < 30
    assert not psutil.wait_procs(train_workers(), timeout=10)[1], "nobody is left waiting"


def test_what_can_never_be_placed_is_refused_with_the_arithmetic(run_settings: Settings) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    wanted = rf"cluster\.workers \({cpus + 1}\) × 1 CPU = {cpus + 1} CPU, but there are {cpus}"
    with pytest.raises(ConfigError, match=wanted):
        run_on_ray(run_settings, workers=cpus + 1)
