"""The `cluster:` section of a run's configuration: how many workers, on what, and what happens when one fails."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from alignment.config import Count, NonNegative, PositiveCount, RunConfig, Section, load_config


class ClusterConfig(Section):
    """Where the loop runs."""

    workers: Count = 0
    """Ray Train workers, each with a copy of the models and a share of every step. 0 runs the loop in this process,
    without Ray."""
    cpus_per_worker: PositiveCount = 1
    """CPU cores of each worker, which are also its torch threads."""
    gpus_per_worker: Count = 0
    """GPUs of each worker: 1 trains on CUDA, 0 on the CPU."""
    engines: PositiveCount = 1
    """vLLM engines that answer prompts, for algorithms that learn from the model's own answers. Without Ray (`workers`
    0) there is one, beside the loop."""
    cpus_per_engine: NonNegative = 0.0
    """CPU cores that each engine is counted with; 0 shares those of the workers, which wait while it answers."""
    gpus_per_engine: NonNegative = 0.0
    """GPUs that each engine is counted with: `rollout.tensor_parallel` of its own, or a fraction of a worker's."""
    max_failures: Count = 2
    """Times that Ray Train restarts the workers after one has died, from the newest intact checkpoint; 0 never."""
    autoscaling: bool = False
    """True if the cluster adds machines when asked: then more than it has now is waited for, instead of refused."""
    address: str | None = None
    """Ray cluster to join, as `auto`; None joins the one in RAY_ADDRESS, else starts Ray on this machine."""


class ClusterRunConfig(RunConfig):
    """A training run and the machines it runs on."""

    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    """The machines."""


def load_run(path: Path, overrides: list[str]) -> ClusterRunConfig:
    """Reads a run's YAML file with overrides.

    Raises:
        ConfigError: as `alignment.config.load_config`.
    """
    return load_config(path, overrides, kind=ClusterRunConfig)
