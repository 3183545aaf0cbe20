"""Runs that the first version of raylign has written, before its names were those of the field.

`tests/data/first_version` was made by commit 7f14048 from the two YAML files there, with two steps each.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alignment.distributed.world import World
from alignment.metrics import FileReporter
from alignment.train import train
from cluster.config import ClusterRunConfig, load_run

FIRST_VERSION = Path(__file__).parents[1] / "data" / "first_version"


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_run_of_the_first_version_loads_and_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "first"
    shutil.copytree(FIRST_VERSION, folder)
    monkeypatch.chdir(folder)
    config = load_run(Path(f"{name}.yaml"), ["steps=3"])
    train(config, World(), FileReporter(config))
    assert "resuming after step 2" in capsys.readouterr().out
    assert [row["step"] for row in config.run_folder.read_metrics()][-3:] == [1, 2, 3]


def test_the_configuration_that_a_run_of_the_first_version_has_kept_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIRST_VERSION)
    for name in ("dpo", "grpo"):
        text = Path(f"runs/{name}/config.json").read_text(encoding="utf-8")
        kept, read = ClusterRunConfig.model_validate_json(text), load_run(Path(f"{name}.yaml"), [])
        # The default of cluster.gpus_per_engine has changed since.
        assert kept.model_dump(exclude={"cluster"}) == read.model_dump(exclude={"cluster"})
