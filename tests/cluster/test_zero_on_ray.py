"""ZeRO on real Ray Train workers: weights spread over two of them learn what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.alignment.test_train import measured, weights
from tests.cluster.test_train_on_ray import ray_here, run_on_ray

__all__ = ["ray_here"]

Settings = dict[str, Any]
pytestmark = pytest.mark.usefixtures("ray_here")


def test_two_workers_at_stage_3_compute_what_one_process_does(run_settings: Settings, tmp_path: Path) -> None:
    settings = {**run_settings, "steps": 4, "groups_per_step": 5, "evaluate": {"every": 1}}
    alone = run_on_ray(settings, workers=0)
    optim = {**settings["optim"], "zero": {"stage": 3}}
    together = run_on_ray({**settings, "output": str(tmp_path / "two"), "optim": optim}, workers=2)
    for one, other in zip(measured(alone), measured(together), strict=True):
        one, other = ({k: v for k, v in line.items() if "accuracies" not in k} for line in (one, other))
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert weights(together).keys() - {"random.1"} == weights(alone).keys()
    for name in (name for name in weights(alone) if name.startswith("master.")):
        torch.testing.assert_close(weights(together)[name], weights(alone)[name], atol=5e-4, rtol=0)


def test_a_run_goes_on_at_another_stage_with_another_number_of_workers(run_settings: Settings, tmp_path: Path) -> None:
    settings = {**run_settings, "checkpoint": {"every": 2}}
    whole = run_on_ray(settings, workers=0)
    there = {**settings, "output": str(tmp_path / "two")}
    spread = {**settings["optim"], "zero": {"stage": 3}}
    run_on_ray(there, workers=2, steps=2, optim=spread)
    folder = run_on_ray(there, workers=0)
    for name in (name for name in weights(whole) if name.startswith(("master.", "optimizer."))):
        torch.testing.assert_close(weights(folder)[name], weights(whole)[name], atol=5e-4, rtol=0)
