"""The sum before the start: what a run asks of the cluster, in one sentence, and whether it can ever be placed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from alignment.errors import ConfigError
from cluster.config import ClusterRunConfig, no_gpus_for

Resources = dict[str, float]
"""Amounts by name, as Ray counts them: `CPU`, `GPU`."""
ROUNDING = 1e-6
"""Of an amount: Ray counts in ten-thousandths, and 0.1 + 0.2 is more than 0.3."""
UNTIMED_WORK_S = 2 * 3600
"""Seconds allowed for what has no time limit of its own: one worker's reading, loading, scoring or saving."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What Ray is asked for."""

    workers: int
    resources: Resources
    """Of each worker, as Ray counts them."""
    engines: int = 0
    engine_resources: Resources = field(default_factory=dict)
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
        engine_resources=_bundle(cluster.cpus_per_engine, config.gpus_of_engine),
    )


def check_fits(wanted: Plan, *, nodes: Sequence[Resources]) -> None:
    """Refuses at once what Ray would wait for for ever: a worker and an engine each need one node that has all of it.

    Args:
        nodes: resources of every node that lives, whole, whatever other runs hold of them.

    Raises:
        ConfigError: with the arithmetic.
    """
    _check_sums(wanted, nodes)
    bundles = {"worker": wanted.resources, "engine": wanted.engine_resources if wanted.engines else {}}
    for kind, bundle in bundles.items():
        if not any(_room(node, bundle) for node in nodes):
            raise ConfigError(
                f"each {kind} takes {_listed(bundle)} of one node (cluster.cpus_per_{kind}, "
                f"cluster.gpus_per_{kind}), and there are {_counted(nodes)}. Ask for less, or set cluster.autoscaling "
                "if the cluster adds larger machines by itself"
            )
    most = most_workers(wanted, nodes)
    if most is not None and most >= wanted.workers:
        return
    rooms = "no room for all engines" if most is None else f"room for {most} workers"
    beside = f" and cluster.engines ({wanted.engines}) of {_listed(wanted.engine_resources)}" if wanted.engines else ""
    raise ConfigError(
        f"cluster.workers ({wanted.workers}) of {_listed(wanted.resources)}{beside} do not fit, though the sums do: "
        f"each needs one node that has all of it, and {_counted(nodes)} have {rooms}. Ask for fewer or less, or set "
        "cluster.autoscaling if it adds machines by itself"
    )


def most_workers(wanted: Plan, nodes: Sequence[Resources]) -> int | None:
    """The most workers that have room beside all engines; None if not even the engines have.

    Exact: `best[n]` is the most workers on the nodes so far with n engines on them.
    """
    best: dict[int, int] = {0: 0}
    for node in nodes:
        longer: dict[int, int] = {}
        for engines, workers in best.items():
            for more in range(min(wanted.engines - engines, _room(node, wanted.engine_resources)) + 1):
                rest = {name: have - more * wanted.engine_resources.get(name, 0.0) for name, have in node.items()}
                total = workers + min(wanted.workers, _room(rest, wanted.resources))
                longer[engines + more] = max(total, longer.get(engines + more, 0))
        best = longer
    return best.get(wanted.engines)


def collective_timeout_s(config: ClusterRunConfig) -> int:
    """Seconds after which a worker that waits for the others in a collective gives up: longer than any wait of ours.

    Of these, only waits for engines have a limit. For the rest, loading, evaluating and saving a large model, hours are
    allowed: a worker that has failed or died is noticed at once by other means, so only one that hangs is by this.
    """
    from alignment.rollout.pool import longest_wait_s

    return UNTIMED_WORK_S + round(longest_wait_s(config.rollout.timeout_s))


def check_machine(config: ClusterRunConfig, *, gpus: int) -> str:
    """Refuses a run without Ray that its machine cannot hold; returns what a person should know, or nothing.

    Args:
        gpus: that this process sees.

    Raises:
        ConfigError: the trainer and a vLLM engine would share a GPU, or the engine wants GPUs that are not there.
    """
    rollout = config.rollout
    if config.wants_engines and gpus:
        need, left = 1 + rollout.tensor_parallel, 1 - rollout.gpu_memory
        workers = max(1, gpus - rollout.tensor_parallel)
        where = "" if gpus >= need else " on a machine with more GPUs"
        raise ConfigError(
            "cluster.workers 0 puts the trainer and a vLLM engine onto one GPU: the engine takes rollout.gpu_memory "
            f"({rollout.gpu_memory:g}) of it and leaves the trainer {left:.2g}. Apart, they need 1 GPU + "
            f"{rollout.tensor_parallel} (rollout.tensor_parallel) = {need}, of {gpus} here. Set "
            f"cluster.workers={workers} cluster.gpus_per_worker=1{where}, or rollout.engine=local for a tiny model"
        )
    if config.wants_engines and rollout.tensor_parallel > 1:
        raise ConfigError(no_gpus_for(rollout.tensor_parallel))
    if gpus > 1:
        return (
            f"cluster.workers 0 trains on one of {gpus} GPUs; "
            f"cluster.workers={gpus} cluster.gpus_per_worker=1 would use them all"
        )
    return ""


def _check_sums(wanted: Plan, nodes: Sequence[Resources]) -> None:
    for name in wanted.resources | (wanted.engine_resources if wanted.engines else {}):
        each, each_engine = wanted.resources.get(name, 0.0), wanted.engine_resources.get(name, 0.0)
        need = wanted.workers * each + wanted.engines * each_engine
        have = sum(node.get(name, 0.0) for node in nodes)
        if need > have + ROUNDING:
            engines = f" + cluster.engines ({wanted.engines}) × {each_engine:g} {name}" if wanted.engines else ""
            raise ConfigError(
                f"cluster.workers ({wanted.workers}) × {each:g} {name}{engines} = {need:g} {name}, but there are "
                f"{have:g}. Ask for fewer workers or less for each, or set cluster.autoscaling if it adds machines by "
                "itself"
            )


def _room(node: Resources, bundle: Resources) -> int:
    """How many of a bundle a node holds; what takes nothing fits without end."""
    counts = [int((node.get(name, 0.0) + ROUNDING) // amount) for name, amount in bundle.items() if amount]
    return max(0, min(counts, default=10**9))


def _bundle(cpus: float, gpus: float) -> Resources:
    return {name: float(amount) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}


def _listed(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _counted(nodes: Sequence[Resources]) -> str:
    """Nodes for people, alike ones together: `2 node(s) with 8 CPU and 4 GPU`."""
    kinds: dict[str, int] = {}
    for node in nodes:
        shown = _listed({name: node.get(name, 0.0) for name in ("CPU", "GPU")})
        kinds[shown] = kinds.get(shown, 0) + 1
    return ", ".join(f"{count} node(s) with {kind}" for kind, count in kinds.items()) or "no nodes"
