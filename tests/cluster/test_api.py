"""The Python API: a notebook's few lines do what the YAML files and the commands do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import APIConnectionError

from alignment.errors import ClusterError, ConfigError
from cluster.api import load, score, serve, train

Settings = dict[str, Any]


@pytest.fixture
def recipe(run_settings: Settings, tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_settings))
    return file


def test_settings_are_given_as_on_the_command_line_or_as_python_values(recipe: Path) -> None:
    config = load(recipe, "optim.lr=2e-3", steps=2, optim={"max_grad_norm": 0.5}, model={"lora": {"rank": 2}})
    assert (config.optim.lr, config.steps, config.optim.max_grad_norm) == (2e-3, 2, 0.5)
    assert config.model.lora is not None and config.model.lora.rank == 2
    assert config.optim.schedule == "constant", "the file's"


def test_what_is_wrong_is_said_as_on_the_command_line(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.learning_rate"):
        load(recipe, optim={"learning_rate": 1})


def test_a_trained_reward_model_scores_completions(recipe: Path) -> None:
    run = train(load(recipe, steps=2, algorithm={"name": "reward_model"}))
    assert [line["step"] for line in run.metrics] == [0, 1, 2]
    scores = score(run.path, "the cat", [" sat on the mat", " ran"])
    assert len(scores) == 2 and scores[0] != scores[1]
    turns = [{"role": "user", "content": "the cat"}]
    assert score(run.path, turns, ["sat"]) != score(run.path, turns, ["ran away"])


@pytest.mark.slow  # an endpoint starts
def test_a_model_is_served_until_the_block_ends(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    with serve(model, "max_model_len=256", dtype="fp32", kv_cache_gib=0.25) as endpoint:
        answer = endpoint.chat("hello", max_tokens=4, temperature=0)
        assert answer == endpoint.chat("hello", max_tokens=4, temperature=0)
    with pytest.raises(APIConnectionError):
        endpoint.chat("hello")


def test_a_model_that_cannot_be_served_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="ended"), serve(tmp_path / "nothing-here"):
        pass
