"""What a run asks of a cluster, and whether the cluster can ever give it; computed before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from alignment.errors import ConfigError
from cluster.config import ClusterRunConfig, no_gpus_for

Resources = dict[str, float]
"""Amounts by name, as Ray counts them: `CPU`, `GPU`."""
ROUNDING = 1e-6
"""Tolerance in comparisons of amounts: Ray counts in ten-thousandths, and 0.1 + 0.2 is more than 0.3."""
UNTIMED_WORK_S = 2 * 3600
"""Time for work without a time limit of its own, such as one worker's reading, loading, scoring or saving."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The workers and engines that a run asks Ray for."""

    workers: int
    """Number of training workers."""
    resources: Resources
    """Resources of each worker, as Ray counts them."""
    engines: int = 0
    """Number of rollout engines."""
    engine_resources: Resources = field(default_factory=dict)
    """Resources of each engine."""

    @property
    def sentence(self) -> str:
        """The plan in words."""
        workers = f"{self.workers} worker(s) with {_format_resources(self.resources)} each"
        if not self.engines:
            return workers
        resources = _format_resources(self.engine_resources)
        share = f"with {resources} each" if resources else "on the workers' cores"
        return f"{workers} and {self.engines} engine(s) {share}"


def plan(config: ClusterRunConfig) -> Plan:
    """The plan of a configuration. Ray Train's own coordinator takes no resources."""
    cluster = config.cluster
    return Plan(
        workers=cluster.workers,
        resources=_bundle(cluster.cpus_per_worker, cluster.gpus_per_worker),
        engines=cluster.engines if config.wants_engines else 0,
        engine_resources=_bundle(cluster.cpus_per_engine, config.gpus_of_engine),
    )


def check_fits(plan: Plan, *, nodes: Sequence[Resources]) -> None:
    """Refuses a plan that Ray would wait for forever. Each worker and each engine needs one node with all it takes.

    Args:
        nodes: the full resources of each live node, including those that other runs use.

    Raises:
        ConfigError: the plan does not fit; the text has the arithmetic.
    """
    _check_sums(plan, nodes)
    bundles = {"worker": plan.resources, "engine": plan.engine_resources if plan.engines else {}}
    for kind, bundle in bundles.items():
        if not any(_num_fitting(node, bundle) for node in nodes):
            raise ConfigError(
                f"each {kind} takes {_format_resources(bundle)} of one node (cluster.cpus_per_{kind}, "
                f"cluster.gpus_per_{kind}), and there are {_format_nodes(nodes)}. Ask for less, or set "
                "cluster.autoscaling if the cluster adds larger machines by itself"
            )
    max_workers = most_workers(plan, nodes)
    if max_workers is not None and max_workers >= plan.workers:
        return
    room_text = "no room for all engines" if max_workers is None else f"room for {max_workers} workers"
    engines_text = f" and cluster.engines ({plan.engines}) of {_format_resources(plan.engine_resources)}"
    raise ConfigError(
        f"cluster.workers ({plan.workers}) of {_format_resources(plan.resources)}{engines_text if plan.engines else ''}"
        f" do not fit, though the sums do: each needs one node that has all of it, and {_format_nodes(nodes)} have "
        f"{room_text}. Ask for fewer or less, or set cluster.autoscaling if it adds machines by itself"
    )


def most_workers(plan: Plan, nodes: Sequence[Resources]) -> int | None:
    """The most workers that fit beside all engines; None if the engines alone do not fit.

    The result is exact: `best[n]` is the most workers on the nodes so far if these nodes have n engines.
    """
    best: dict[int, int] = {0: 0}
    for node in nodes:
        longer: dict[int, int] = {}
        for engines, workers in best.items():
            for count in range(min(plan.engines - engines, _num_fitting(node, plan.engine_resources)) + 1):
                free = {name: amount - count * plan.engine_resources.get(name, 0.0) for name, amount in node.items()}
                num_workers = workers + min(plan.workers, _num_fitting(free, plan.resources))
                longer[engines + count] = max(num_workers, longer.get(engines + count, 0))
        best = longer
    return best.get(plan.engines)


def collective_timeout_s(config: ClusterRunConfig) -> int:
    """The time limit of a collective (s), which is longer than any regular wait of one worker for another.

    Only waits for engines have a limit of their own. Loading, evaluating and saving a large model may take hours. The
    limit only ends runs in which a worker hangs, because a worker that fails or dies is noticed at once by other means.
    """
    from alignment.rollout.pool import longest_wait_s

    return UNTIMED_WORK_S + round(longest_wait_s(config.rollout.timeout_s))


def check_machine(config: ClusterRunConfig, *, gpus: int) -> str:
    """Refuses a run without Ray that does not fit on this machine; returns advice in words, or nothing.

    Args:
        gpus: number of GPUs that this process sees.

    Raises:
        ConfigError: the trainer and a vLLM engine would share a GPU, or the engine needs GPUs that do not exist.
    """
    rollout = config.rollout
    if config.wants_engines and gpus:
        num_gpus, trainer_share = 1 + rollout.tensor_parallel_size, 1 - rollout.gpu_memory_utilization
        workers = max(1, gpus - rollout.tensor_parallel_size)
        machine_note = "" if gpus >= num_gpus else " on a machine with more GPUs"
        raise ConfigError(
            "cluster.workers 0 puts the trainer and a vLLM engine onto one GPU: the engine takes "
            f"{rollout.gpu_memory_utilization:g} of it (rollout.gpu_memory_utilization) and leaves the trainer "
            f"{trainer_share:.2g}. Apart, they need 1 GPU + {rollout.tensor_parallel_size} "
            f"(rollout.tensor_parallel_size) = {num_gpus}, of {gpus} here. Set "
            f"cluster.workers={workers} cluster.gpus_per_worker=1{machine_note}, or rollout.engine=local for a tiny "
            "model"
        )
    if config.wants_engines and rollout.tensor_parallel_size > 1:
        raise ConfigError(no_gpus_for(rollout.tensor_parallel_size))
    if gpus > 1:
        return (
            f"cluster.workers 0 trains on one of {gpus} GPUs; "
            f"cluster.workers={gpus} cluster.gpus_per_worker=1 would use them all"
        )
    return ""


def _check_sums(plan: Plan, nodes: Sequence[Resources]) -> None:
    """Raises ConfigError if a plan asks for more than all nodes together have."""
    for name in plan.resources | (plan.engine_resources if plan.engines else {}):
        per_worker, per_engine = plan.resources.get(name, 0.0), plan.engine_resources.get(name, 0.0)
        demand = plan.workers * per_worker + plan.engines * per_engine
        supply = sum(node.get(name, 0.0) for node in nodes)
        if demand > supply + ROUNDING:
            engines = f" + cluster.engines ({plan.engines}) × {per_engine:g} {name}" if plan.engines else ""
            raise ConfigError(
                f"cluster.workers ({plan.workers}) × {per_worker:g} {name}{engines} = {demand:g} {name}, but there are "
                f"{supply:g}. Ask for fewer workers or less for each, or set cluster.autoscaling if it adds machines "
                "by itself"
            )


def _num_fitting(node: Resources, bundle: Resources) -> int:
    """How many times a bundle fits on a node; practically without limit if it takes nothing."""
    counts = [int((node.get(name, 0.0) + ROUNDING) // amount) for name, amount in bundle.items() if amount]
    return max(0, min(counts, default=10**9))


def _bundle(cpus: float, gpus: float) -> Resources:
    """CPUs and GPUs as Ray's resources, without those of which there are 0."""
    return {name: float(amount) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}


def _format_resources(resources: Resources) -> str:
    """Resources in words, as `8 CPU and 4 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _format_nodes(nodes: Sequence[Resources]) -> str:
    """Nodes in words, with equal ones counted together: `2 node(s) with 8 CPU and 4 GPU`."""
    kinds: dict[str, int] = {}
    for node in nodes:
        description = _format_resources({name: node.get(name, 0.0) for name in ("CPU", "GPU")})
        kinds[description] = kinds.get(description, 0) + 1
    return ", ".join(f"{count} node(s) with {kind}" for kind, count in kinds.items()) or "no nodes"
