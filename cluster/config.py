"""The section `cluster` of a run's configuration: its workers, their resources, and what happens when one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from alignment.settings.load import load_config
from alignment.settings.run import RunConfig
from alignment.settings.section import Count, NonNegative, PositiveCount, Section


class ClusterConfig(Section):
    """The workers and engines of a run."""

    workers: Count = 0
    """Number of Ray Train workers, each with a copy of the models and a share of each step. 0 runs the loop in this
    process, without Ray."""
    cpus_per_worker: PositiveCount = 1
    """CPU cores of each worker, and also its number of torch threads."""
    gpus_per_worker: Count = 0
    """GPUs of each worker: 1 trains on CUDA, 0 on the CPU. A worker uses one GPU; more GPUs need more workers."""
    engines: PositiveCount = 1
    """Number of vLLM engines, for algorithms that learn from the model's own answers. Without Ray (`workers` 0), there
    is one engine beside the loop."""
    cpus_per_engine: NonNegative = 0.0
    """CPU cores that are reserved for each engine; with 0, engines share those of the workers, which wait meanwhile."""
    gpus_per_engine: NonNegative | None = None
    """GPUs of each engine, which no worker and no other engine uses: `rollout.tensor_parallel_size`, or 0 for an engine
    on the CPU beside workers on CPUs. None is `rollout.tensor_parallel_size` if workers have GPUs, else 0."""
    max_failures: Count = 2
    """How often Ray Train restarts the workers after one has died, from the newest intact checkpoint; 0 is never. The
    loss of a node after a notice (Kubernetes drains it) does not count. The loss of a node without a notice does, as of
    a spot machine of `ray up`."""
    autoscaling: bool = False
    """True if the cluster adds machines by itself. A run that asks for more than the cluster has then waits, instead of
    being refused."""
    address: str | None = None
    """Address of the Ray cluster to join, such as `auto`; None joins the one in RAY_ADDRESS, or starts Ray on this
    machine."""


class ClusterRunConfig(RunConfig):
    """A training run with the section `cluster`."""

    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    """The workers and engines."""

    @property
    def gpus_of_engine(self) -> int:
        """The GPUs of each engine, with the default resolved."""
        if self.cluster.gpus_per_engine is None:
            return self.rollout.tensor_parallel_size if self.cluster.gpus_per_worker else 0
        return int(self.cluster.gpus_per_engine)

    @model_validator(mode="after")
    def _fits_gpus(self) -> Self:
        """Refuses numbers of GPUs that workers and engines cannot use."""
        cluster, size = self.cluster, self.rollout.tensor_parallel_size
        if cluster.gpus_per_worker > 1:
            raise ValueError(
                f"cluster.gpus_per_worker ({cluster.gpus_per_worker}) must be 0 or 1: a worker computes on one GPU and "
                f"the others would stand idle; cluster.workers={max(1, cluster.workers) * cluster.gpus_per_worker} "
                "cluster.gpus_per_worker=1 uses as many"
            )
        gpus = cluster.gpus_per_engine
        if not self.wants_engines or cluster.workers == 0:
            return self
        if gpus is None:
            if size > 1 and not cluster.gpus_per_worker:
                raise ValueError(no_gpus_for(size))
            return self
        if gpus == 0 and cluster.gpus_per_worker:
            raise ValueError(
                "cluster.gpus_per_engine 0 beside workers with GPUs would put every engine onto a worker's GPU; give "
                f"it {size} (rollout.tensor_parallel_size), or leave it out"
            )
        if gpus and gpus != size:
            share_note = (
                f"; it cannot share a GPU: a worker takes a whole one, and 1 + {gpus:g} > 1" if 0 < gpus < 1 else ""
            )
            raise ValueError(
                f"cluster.gpus_per_engine ({gpus:g}) must be rollout.tensor_parallel_size ({size}), over whose GPUs an "
                f"engine spreads its model{share_note}; set one of them to the other, or leave gpus_per_engine out"
            )
        return self


def no_gpus_for(size: int) -> str:
    """The text of the error about tensor parallelism without GPUs."""
    return f"rollout.tensor_parallel_size ({size}) spreads an engine over GPUs, and this one is on a CPU; set it to 1"


def load_run(path: Path, overrides: list[str]) -> ClusterRunConfig:
    """Reads a run's YAML file with overrides.

    Raises:
        ConfigError: as `alignment.settings.load.load_config`.
    """
    return load_config(path, overrides, kind=ClusterRunConfig)
