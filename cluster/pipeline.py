"""Several runs as one chain: each stage's checkpoint feeds the next, as SFT → reward model → PPO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from pydantic import Field, model_validator

from alignment.checkpoint import find_checkpoint
from alignment.cli import call
from alignment.errors import ClusterError, ConfigError
from alignment.settings.load import load_config
from alignment.settings.run import RunName
from alignment.settings.section import Section
from cluster.config import ClusterRunConfig, load_run
from cluster.launch import CONFIG

SUMMARY = "summary.json"  # as alignment.train writes it, whose import takes seconds


class StageConfig(Section):
    """One training run of the chain."""

    name: RunName
    """Name of the stage; later stages write its checkpoint as `{name}`."""
    config: str
    """YAML file of the run, as seen from the pipeline's file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings that replace the file's, by dotted key, as `{model.path: "{sft}"}`."""


class PipelineConfig(Section):
    """A chain of training runs."""

    name: RunName
    """Name of the chain; its runs go to `output`/`name`/STAGE."""
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
    runs = check(chain, config.parent)  # all of them, before the first one starts
    places: dict[str, str] = {}
    for number, (stage, run) in enumerate(zip(chain.stages, runs, strict=True), start=1):
        print(f"\n\033[1m{number}/{len(runs)}  {stage.name}: {run.algorithm.name}\033[0m", flush=True)
        _run(stage, config.parent / stage.config, settings_of(stage, chain, places))
        places[stage.name] = str(find_checkpoint(run.folder))


def check(chain: PipelineConfig, folder: Path) -> list[ClusterRunConfig]:
    """The configurations of all stages, with the places of checkpoints that do not exist yet.

    Raises:
        ConfigError: a stage cannot run as configured, or uses the checkpoint of one that does not come before it.
    """
    places: dict[str, str] = {}
    runs = []
    for stage in chain.stages:
        try:
            run = load_run(folder / stage.config, settings_of(stage, chain, places))
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from error
        runs.append(run)
        places[stage.name] = str(run.folder / "checkpoints" / "newest")
    return runs


def settings_of(stage: StageConfig, chain: PipelineConfig, places: dict[str, str]) -> list[str]:
    """A stage's settings as `key=value`, with `{stage}` replaced by that stage's place.

    Raises:
        ConfigError: a place is asked for that is not known (yet).
    """
    settings = {**stage.set, "name": stage.name, "output": str(Path(chain.output) / chain.name)}
    return [f"{key}={json.dumps(_filled(value, places))}" for key, value in settings.items()]


def _filled(value: Any, places: dict[str, str]) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return value.format(**places)
    except (LookupError, ValueError) as error:
        raise ConfigError(f"{value!r}: no earlier stage is called {error}; there are {list(places)}") from error


def _run(stage: StageConfig, file: Path, settings: list[str]) -> None:
    """Runs a stage in a process of its own, so that it leaves no memory behind; a finished one is skipped."""
    run = load_run(file, settings)
    if (run.folder / SUMMARY).exists() and (run.folder / CONFIG).read_text() == run.model_dump_json(indent=1):
        print(f"{run.folder} is finished")
        return
    if call("train", str(file), *settings):
        raise ClusterError(f"stage {stage.name} failed; its own words are above. The same command goes on from here")
