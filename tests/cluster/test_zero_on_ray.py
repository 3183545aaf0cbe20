"""ZeRO on real Ray Train workers: two of them learn what one process does, which can go on where they stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.run_folder import find_checkpoint
from tests.alignment.test_train import measured, weights
from tests.cluster.test_train_on_ray import run_on_ray

Settings = dict[str, Any]
pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.mark.slow  # a run of its own on Ray; test_zero.py has the same without
def test_one_process_goes_on_where_two_workers_at_stage_3_have_stopped(run_settings: Settings, tmp_path: Path) -> None:
    settings = {**run_settings, "groups_per_step": 5, "evaluate": {"every": 1}}
    whole = run_on_ray(settings, workers=0)
    other = {**settings, "output": str(tmp_path / "other")}
    spread = {**settings["optim"], "zero": {"stage": 3}}
    assert_whole_model(run_on_ray(other, workers=2, steps=2, optim=spread))
    mixed = run_on_ray(other, workers=0)
    for expected, found in zip(measured(whole), measured(mixed), strict=True):
        expected, found = ({k: v for k, v in line.items() if "accuracies" not in k} for line in (expected, found))
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    for name, tensor in weights(whole).items():
        if not name.startswith("random."):
            torch.testing.assert_close(weights(mixed)[name], tensor, atol=5e-4, rtol=0)


def assert_whole_model(folder: Path) -> None:
    """What transformers opens are the masters, in full."""
    masters = {name.removeprefix("master."): tensor for name, tensor in weights(folder).items() if "master." in name}
    saved = load_file(find_checkpoint(folder) / "model.safetensors")
    assert saved.keys() == masters.keys()
    for name, tensor in masters.items():
        assert torch.equal(saved[name], tensor)
