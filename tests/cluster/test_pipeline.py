"""The chain of runs: every stage starts from the checkpoints of those before it, and is run once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.errors import ClusterError, ConfigError
from alignment.run_folder import RunFolder
from alignment.settings.load import load_config
from cluster.pipeline import PipelineConfig, check, pipeline
from tests.conftest import pair_rows
from tests.processes import descendants

Settings = dict[str, Any]


@pytest.fixture
def chain(run_settings: Settings, tmp_path: Path, write_rows: Callable[..., Path]) -> Path:
    """SFT, a reward model on it, and PPO of it against that, on the tiny model and without Ray."""
    small = {**run_settings, "steps": 2}
    prompts = write_rows([{"prompt": row["prompt"]} for row in pair_rows(12)], "prompts.jsonl")
    ppo = {
        **small,
        "algorithm": {"name": "ppo"},
        "data": {"path": str(prompts), "max_length": 64, "eval_groups": 2},
        "rollout": {"engine": "local", "completions": 2, "max_tokens": 6},
        "rewards": [{"name": "model", "path": "nowhere"}],
    }
    stages = {"sft": {**small, "algorithm": {"name": "sft"}}, "rm": {**small, "algorithm": {"name": "reward_model"}}}
    for name, settings in {**stages, "ppo": ppo}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    tree = {
        "name": "chain",
        "output": str(tmp_path / "out"),
        "stages": [
            {"name": "sft", "config": "sft.yaml"},
            {"name": "reward", "config": "rm.yaml", "set": {"model.path": "{sft}"}},
            {"name": "ppo", "config": "ppo.yaml", "set": {"model.path": "{sft}", "rewards.0.path": "{reward}"}},
        ],
    }
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def test_each_stage_feeds_the_next_and_is_run_once(
    chain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline(chain)
    runs = {name: tmp_path / "out" / "chain" / name for name in ("sft", "reward", "ppo")}
    assert all(RunFolder(run).read_metrics()[-1]["step"] == 2 for run in runs.values())
    settings = yaml.safe_load((runs["ppo"] / "config.json").read_text())
    assert settings["model"]["path"] == str(runs["sft"] / "checkpoints" / "step-00000002")
    assert settings["rewards"][0]["path"] == str(runs["reward"] / "checkpoints" / "step-00000002")

    written = {run: os.stat(run / "metrics.jsonl").st_mtime_ns for run in runs.values()}
    capfd.readouterr()
    pipeline(chain)
    assert capfd.readouterr().out.count("is finished") == 3
    assert {run: os.stat(run / "metrics.jsonl").st_mtime_ns for run in runs.values()} == written


def test_a_mistake_in_the_last_stage_is_told_before_the_first_starts(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)stage ppo: .*optim\.lt: unknown key; did you mean 'lr'"):
        pipeline(chain, ["stages.2.set.optim.lt=1"])
    assert not (tmp_path / "out").exists()


def test_a_stage_cannot_use_one_that_comes_later(chain: Path) -> None:
    with pytest.raises(ConfigError, match="no earlier stage is called 'ppo'; there are"):
        pipeline(chain, ["stages.0.set={model.path: '{ppo}'}"])


def test_two_stages_cannot_share_a_name(chain: Path) -> None:
    with pytest.raises(ConfigError, match="different names"):
        load_config(chain, ["stages.1.name=sft"], kind=PipelineConfig)


def test_a_failed_stage_stops_the_chain_with_its_name(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="stage sft failed"):
        pipeline(chain, ["stages.0.set={data.path: nowhere.jsonl}"])
    assert not (tmp_path / "out" / "chain" / "reward").exists()


def test_the_shipped_chain_is_whole() -> None:
    file = Path(__file__).parents[2] / "configs" / "align" / "rlhf_smollm2.yaml"
    runs = check(load_config(file, kind=PipelineConfig), file.parent)
    assert [run.algorithm.name for run in runs] == ["sft", "reward_model", "ppo"]


def test_a_chain_that_is_ended_ends_its_stage_too(chain: Path, tmp_path: Path) -> None:
    endless = "stages.0.set={steps: 1000000}"
    started = subprocess.Popen([sys.executable, "-m", "cluster.cli", "pipeline", str(chain), endless])
    metrics = tmp_path / "out" / "chain" / "sft" / "metrics.jsonl"
    while not metrics.exists() or metrics.stat().st_size == 0:
        assert started.poll() is None
        time.sleep(0.1)
    stages = descendants(of=started.pid)
    started.terminate()
    assert started.wait(timeout=60) == 128 + signal.SIGTERM
    assert stages and not any(stage.is_running() for stage in stages)
