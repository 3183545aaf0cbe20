"""A chain of runs in which later stages use the checkpoints of earlier ones, such as SFT → reward model → PPO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from pydantic import Field, model_validator

from alignment.errors import ClusterError, ConfigError
from alignment.run_folder import find_checkpoint
from alignment.settings.load import load_config
from alignment.settings.run import RunName
from alignment.settings.section import Section
from cluster.cli import call
from cluster.config import ClusterRunConfig, load_run


class StageConfig(Section):
    """One training run of the chain."""

    name: RunName
    """Name of the stage; later stages refer to its checkpoint as `{name}`."""
    config: str
    """YAML file of the run, relative to the pipeline's file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings that replace those of the file, by dotted key, such as `{model.path: "{sft}"}`."""


class PipelineConfig(Section):
    """A chain of training runs."""

    name: RunName
    """Name of the chain; the runs are written to `output`/`name`/STAGE."""
    output: str = "runs"
    """Folder of all runs."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """The runs, in order."""

    @model_validator(mode="after")
    def _feeds_forward(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages must have different names, not {names}")
        return self


def pipeline(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of the chain, such as configs/align/rlhf_smollm2.yaml")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of the chain, as stages.2.set.steps=100, or output=/shared"),
    ] = None,
) -> None:
    """Trains several models one after the other, each from the checkpoints of those before it.

    A chain that was stopped goes on where it was when the same command is given again: finished stages are skipped, an
    unfinished one resumes from its newest intact checkpoint.
    """
    chain = load_config(config, overrides or [], kind=PipelineConfig)
    run_configs = check(chain, config.parent)  # all stages are checked before the first one starts
    checkpoints: dict[str, str] = {}
    for number, (stage, run_config) in enumerate(zip(chain.stages, run_configs, strict=True), start=1):
        print(f"\n\033[1m{number}/{len(run_configs)}  {stage.name}: {run_config.algorithm.name}\033[0m", flush=True)
        _run(stage, config.parent / stage.config, settings_of(stage, chain, checkpoints))
        checkpoints[stage.name] = str(find_checkpoint(run_config.folder))


def check(chain: PipelineConfig, folder: Path) -> list[ClusterRunConfig]:
    """Checks all stages, and returns their configurations, with the paths of checkpoints that do not exist yet.

    Raises:
        ConfigError: a stage's configuration is wrong, or it uses the checkpoint of a stage that is not an earlier one.
    """
    checkpoints: dict[str, str] = {}
    run_configs = []
    for stage in chain.stages:
        try:
            run_config = load_run(folder / stage.config, settings_of(stage, chain, checkpoints))
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from error
        run_configs.append(run_config)
        checkpoints[stage.name] = str(run_config.run_folder.checkpoints_folder / "newest")
    return run_configs


def settings_of(stage: StageConfig, chain: PipelineConfig, checkpoints: dict[str, str]) -> list[str]:
    """The settings of a stage as `key=value`, with each `{name}` replaced by the checkpoint of that stage.

    Raises:
        ConfigError: a setting refers to a stage that is not an earlier one.
    """
    settings = {**stage.set, "name": stage.name, "output": str(Path(chain.output) / chain.name)}
    return [f"{key}={json.dumps(_fill_in(value, checkpoints))}" for key, value in settings.items()]


def _fill_in(value: Any, checkpoints: dict[str, str]) -> Any:
    """Replaces each `{name}` in a string by the checkpoint of that stage."""
    if not isinstance(value, str):
        return value
    try:
        return value.format(**checkpoints)
    except (LookupError, ValueError) as error:
        raise ConfigError(f"{value!r}: no earlier stage is called {error}; there are {list(checkpoints)}") from error


def _run(stage: StageConfig, file: Path, settings: list[str]) -> None:
    """Runs a stage in its own process, which frees all memory at the end. A finished stage is skipped."""
    config = load_run(file, settings)
    run_folder, config_text = config.run_folder, config.model_dump_json(indent=1)
    if run_folder.summary_file.exists() and run_folder.config_file.read_text(encoding="utf-8") == config_text:
        print(f"{config.folder} is finished")
        return
    if call("train", str(file), *settings):
        raise ClusterError(f"stage {stage.name} failed; its own words are above. The same command goes on from here")
