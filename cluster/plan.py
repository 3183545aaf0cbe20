"""The sum before the start: what a run asks of the cluster, in one sentence, and whether it can ever be placed."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.errors import ConfigError
from cluster.config import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What Ray Train is asked for."""

    workers: int
    resources: dict[str, float]
    """Of each worker, as Ray counts them."""

    @property
    def sentence(self) -> str:
        """The plan for people."""
        each = " and ".join(f"{amount:g} {name}" for name, amount in self.resources.items())
        return f"{self.workers} worker(s) with {each} each"


def plan(cluster: ClusterConfig) -> Plan:
    """The bundles of a configuration; Ray Train's own coordinator takes none."""
    resources = {"CPU": float(cluster.cpus_per_worker)}
    if cluster.gpus_per_worker:
        resources["GPU"] = float(cluster.gpus_per_worker)
    return Plan(workers=cluster.workers, resources=resources)


def check_fits(wanted: Plan, *, available: dict[str, float]) -> None:
    """Refuses at once what Ray would wait for for ever.

    Args:
        available: resources of the whole cluster, as `ray.cluster_resources()` gives them.

    Raises:
        ConfigError: with the arithmetic.
    """
    for name, each in wanted.resources.items():
        need, have = wanted.workers * each, available.get(name, 0.0)
        if need > have:
            raise ConfigError(
                f"cluster.workers ({wanted.workers}) × {each:g} {name} = {need:g} {name}, but there are {have:g}. "
                "Ask for fewer workers or less for each, or set cluster.autoscaling if it adds machines by itself"
            )
