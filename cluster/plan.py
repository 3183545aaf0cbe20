"""The sum before the start: what a run asks of the cluster, in one sentence, and whether it can ever be placed."""

from __future__ import annotations

from dataclasses import dataclass, field

from alignment.errors import ConfigError
from cluster.config import ClusterRunConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What Ray Train is asked for."""

    workers: int
    resources: dict[str, float]
    """Of each worker, as Ray counts them."""
    engines: int = 0
    engine_resources: dict[str, float] = field(default_factory=dict)
    """Of each engine."""

    @property
    def sentence(self) -> str:
        """The plan for people."""
        parts = [f"{self.workers} worker(s) with {_listed(self.resources)} each"]
        if self.engines:
            each = f"with {_listed(self.engine_resources)} each" if self.engine_resources else "on the workers' cores"
            parts.append(f"{self.engines} engine(s) {each}")
        return " and ".join(parts)


def plan(config: ClusterRunConfig) -> Plan:
    """The bundles of a configuration; Ray Train's own coordinator takes none."""
    cluster = config.cluster
    return Plan(
        workers=cluster.workers,
        resources=_bundle(cluster.cpus_per_worker, cluster.gpus_per_worker),
        engines=cluster.engines if config.wants_engines else 0,
        engine_resources=_bundle(cluster.cpus_per_engine, cluster.gpus_per_engine),
    )


def check_fits(wanted: Plan, *, available: dict[str, float]) -> None:
    """Refuses at once what Ray would wait for for ever.

    Args:
        available: resources of the whole cluster, as `ray.cluster_resources()` gives them.

    Raises:
        ConfigError: with the arithmetic.
    """
    for name in wanted.resources | wanted.engine_resources:
        each, each_engine = wanted.resources.get(name, 0.0), wanted.engine_resources.get(name, 0.0)
        need, have = wanted.workers * each + wanted.engines * each_engine, available.get(name, 0.0)
        if need > have:
            engines = f" + cluster.engines ({wanted.engines}) × {each_engine:g} {name}" if wanted.engines else ""
            raise ConfigError(
                f"cluster.workers ({wanted.workers}) × {each:g} {name}{engines} = {need:g} {name}, but there are "
                f"{have:g}. Ask for fewer workers or less for each, or set cluster.autoscaling if it adds machines by "
                "itself"
            )


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {name: float(amount) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}


def _listed(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
