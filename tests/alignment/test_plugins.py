"""Whatever a configuration names is looked up when the configuration is loaded, and a wrong name is refused there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import ConfigError
from alignment.settings.load import check_config
from alignment.settings.plugins import (
    builtin_attentions,
    builtin_weight_transfers,
    load_attention,
    load_weight_transfer,
)
from cluster.config import ClusterRunConfig, load_run

Settings = dict[str, Any]

GOOD: Settings = {"name": "run", "steps": 3, "algorithm": {"name": "dpo"}, "data": {"path": "pairs.jsonl"}}
ONLINE: Settings = {**GOOD, "algorithm": {"name": "grpo"}}

PLUGINS: dict[str, tuple[str, Callable[[str], Settings]]] = {
    "algorithm": ("algorithm", lambda name: {**GOOD, "algorithm": {"name": name}}),
    "loss": ("algorithm.loss", lambda name: {**GOOD, "algorithm": {"name": "dpo", "loss": name}}),
    "optimizer": ("optim.name", lambda name: {**GOOD, "optim": {"name": name}}),
    "tracker": ("trackers", lambda name: {**GOOD, "trackers": [name]}),
    "attention": ("model.attention", lambda name: {**GOOD, "model": {"attention": name}}),
    "weight transfer": ("rollout.weight_transfer", lambda name: {**GOOD, "rollout": {"weight_transfer": name}}),
    "environment": ("rollout.environment.name", lambda name: {**ONLINE, "rollout": {"environment": {"name": name}}}),
    "scorer": ("rewards", lambda name: {**ONLINE, "rewards": [{"name": name}]}),
    "scorer of held-out answers": ("eval_rewards", lambda name: {**GOOD, "eval_rewards": [{"name": name}]}),
    "shape": ("data.shape", lambda name: {**GOOD, "data": {"path": "pairs.jsonl", "shape": name}}),
    "shape of a mixture": (
        "data.mixture.0.shape",
        lambda name: {**GOOD, "data": {"mixture": [{"path": "a.jsonl", "shape": name}]}},
    ),
    "source": ("data.path", lambda name: {**GOOD, "data": {"path": name}}),
    "source of held-out rows": (
        "data.eval.path",
        lambda name: {**GOOD, "data": {"path": "pairs.jsonl", "eval": {"path": name}}},
    ),
}
"""The key of each kind of plug-in, and the settings of a run that names one."""
NEAREST = {
    "algorithm": ("dop", "dpo"),
    "loss": ("sgmoid", "sigmoid"),
    "optimizer": ("adam", "adamw"),
    "tracker": ("tensorbord", "tensorboard"),
    "attention": ("groupd", "grouped"),
    "weight transfer": ("file", "files"),
    "scorer": ("lenght", "length"),
    "scorer of held-out answers": ("exact_nubmer", "exact_number"),
}
"""A wrong name of each kind that has built-in ones, and the name that was meant."""


def problem_of(settings: Settings) -> str:
    """The one problem of a configuration."""
    with pytest.raises(ConfigError) as caught:
        check_config(settings, kind=ClusterRunConfig)
    (problem,) = str(caught.value).splitlines()
    return problem


@pytest.mark.parametrize("plugin", NEAREST)
def test_an_unknown_name_is_refused_with_the_nearest_one(plugin: str) -> None:
    key, settings = PLUGINS[plugin]
    wrong_name, nearest_name = NEAREST[plugin]
    kind = plugin.partition(" of ")[0]
    expected = f"{key}: there is no {kind} {wrong_name!r}; did you mean {nearest_name!r}?"
    assert problem_of(settings(wrong_name)).startswith(expected)


@pytest.mark.parametrize("plugin", ["shape", "environment"])
def test_what_has_no_built_in_ones_says_how_ones_own_is_named(plugin: str) -> None:
    key, settings = PLUGINS[plugin]
    expected = f"{key}: there is no {plugin} 'mine'; one's own is given as package.module:function"
    assert problem_of(settings("mine")).startswith(expected)


@pytest.mark.parametrize("plugin", [plugin for plugin in PLUGINS if not plugin.startswith("source")])
def test_a_dot_in_place_of_a_colon_is_told(plugin: str) -> None:
    key, settings = PLUGINS[plugin]
    problem = problem_of(settings("my.code.thing"))
    assert problem.startswith(f"{key}: ") and "one's own is given as module:name, as my.code:thing" in problem


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:thing", "cannot be imported: No module named 'no_such_module'"),
        ("json:laods", "cannot be imported: module 'json' has no attribute 'laods'; did you mean 'loads'?"),
        ("json:__name__", " is a str, n"),
    ],
    ids=["module", "attribute", "kind"],
)
def test_a_dotted_name_of_nothing_usable_is_refused_with_its_key(plugin: str, name: str, reason: str) -> None:
    key, settings = PLUGINS[plugin]
    problem = problem_of(settings(name))
    assert problem.startswith(f"{key}: ") and repr(name) in problem and reason in problem


def test_the_names_of_attentions_and_weight_transfers_are_those_of_their_files() -> None:
    for builtin, load in ((builtin_attentions, load_attention), (builtin_weight_transfers, load_weight_transfer)):
        assert all(load(name) for name in builtin())
    assert (*builtin_attentions(), *builtin_weight_transfers()) == ("flex", "grouped", "sdpa", "files")


def test_a_dry_run_refuses_a_wrong_name_before_anything_else(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(GOOD))
    command = [str(Path(sys.executable).parent / "raylign"), "train", str(config), "--dry-run", "data.shape=json:laods"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert "data.shape: shape 'json:laods' cannot be imported" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_to_look_names_up_needs_neither_torch_nor_the_data(tmp_path: Path) -> None:
    (tmp_path / "own_data.py").write_text("def rows(source): ...\n\n\ndef shape(row): ...\n")
    code = (
        "import sys\n"
        "from alignment.settings.data import DataConfig\n"
        "from alignment.settings.model import ModelConfig\n"
        "from alignment.settings.run import RolloutConfig\n"
        "data = DataConfig(path='own_data:rows', shape='own_data:shape')\n"
        "model, rollout = ModelConfig(attention='grouped'), RolloutConfig(weight_transfer='files')\n"
        "print(data.shape, model.attention, rollout.weight_transfer, *sys.modules)"
    )
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables)
    shape, attention, weight_transfer, *modules = done.stdout.split()
    assert (shape, attention, weight_transfer) == ("own_data:shape", "grouped", "files")
    assert not {"torch", "transformers", "datasets", "pyarrow", "alignment.data.sources"} & set(modules)


def test_a_file_may_be_named_like_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("no_such_module:rows").mkdir()
    (tmp_path / "run.yaml").write_text(json.dumps({**GOOD, "data": {"path": "no_such_module:rows"}}))
    assert load_run(tmp_path / "run.yaml", []).data.path == "no_such_module:rows"
