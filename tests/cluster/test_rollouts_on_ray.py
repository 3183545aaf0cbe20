"""Whole runs with training workers and vLLM engines on Ray, some of which are killed in the middle of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from alignment.run_folder import RunFolder
from cluster.config import ClusterRunConfig
from cluster.launch import run
from tests.cluster.test_train_on_ray import train_workers
from tests.processes import assert_idle_threads_sleep, descendants, engine_processes

Settings = dict[str, Any]
pytestmark = pytest.mark.usefixtures("ray_here")
STEPS, PROMPTS = 8, 3


def run_on_ray(settings: Settings, write_rows: Callable[..., Path], **cluster: int) -> Path:
    prompts = write_rows([{"prompt": f"the quick brown fox {number}"} for number in range(40)], "prompts.jsonl")
    config = ClusterRunConfig.model_validate(
        {
            **settings,
            "steps": STEPS,
            "groups_per_step": PROMPTS,
            "algorithm": {"name": "ppo" if cluster["workers"] == 2 else "grpo"},
            "data": {"path": str(prompts), "max_length": 64, "eval_groups": 4},
            "rollout": {"completions": 2, "max_tokens": 12, "timeout_s": 240},
            "rewards": [{"name": "length", "unit": "characters", "target": 20}],
            "checkpoint": {"every": 2},
            "cluster": {"cpus_per_worker": 1, **cluster},
        }
    )
    run(config)
    return config.folder


def wait_for_report(folder: Path, step: int) -> None:
    """Returns in the middle of the step after `step`."""
    while not any(line["step"] >= step for line in RunFolder(folder).read_metrics()):
        time.sleep(0.01)


def assert_each_prompt_was_used_once(folder: Path) -> None:
    """Every step is in the provenance once, with the prompts that come next and the weights of the step before."""
    provenance = [json.loads(line) for line in (folder / "provenance.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in provenance] == list(range(1, STEPS + 1))
    assert [entry["position"] for entry in provenance] == [PROMPTS * step for step in range(1, STEPS + 1)]
    prompts = [prompt for entry in provenance for prompt in entry["prompts"]]
    assert len(set(prompts)) == len(prompts) == STEPS * PROMPTS
    assert [entry["versions"] for entry in provenance] == [[step] for step in range(STEPS)]
    metrics = RunFolder(folder).read_metrics()
    assert [line["step"] for line in metrics] == list(range(STEPS + 1))
    assert max(line["mismatch/mean_abs"] for line in metrics[1:]) < 1e-4, "engine and trainer have the same weights"


@pytest.mark.slow  # two restarts
def test_a_killed_engine_is_replaced_a_killed_worker_comes_back_and_no_prompt_is_lost(
    run_settings: Settings, write_rows: Callable[..., Path]
) -> None:
    folder = Path(run_settings["output"]) / "run"

    def kill_an_engine_then_the_worker() -> None:
        wait_for_report(folder, 2)
        while len(engines := engine_processes()) != 2:  # a list of processes is not taken at one instant
            time.sleep(0.1)
        killed, survivor = engines
        assert_idle_threads_sleep([*engine_processes(), *descendants("EngineActor"), *train_workers()])
        killed.kill()
        wait_for_report(folder, 4)
        for worker in train_workers():
            worker.kill()
        wait_for_report(folder, 6)
        assert survivor in engine_processes(), "engines outlive the workers"

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill_an_engine_then_the_worker)
        assert run_on_ray(run_settings, write_rows, workers=1, engines=2) == folder
        killer.result(timeout=1)
    assert_each_prompt_was_used_once(folder)


@pytest.mark.slow
def test_two_workers_share_one_engine(run_settings: Settings, write_rows: Callable[..., Path]) -> None:
    folder = run_on_ray(run_settings, write_rows, workers=2, engines=1)
    assert_each_prompt_was_used_once(folder)
