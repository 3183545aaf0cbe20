"""What a run asks of its machines: what can never be placed, or would work against itself, is refused by the sum."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from alignment.errors import ConfigError
from alignment.rollout.pool import HEARTBEAT_S
from alignment.settings.load import check_config
from cluster.config import ClusterRunConfig, load_run
from cluster.plan import Plan, check_fits, check_machine, collective_timeout_s, most_workers, plan
from tests.conftest import ALIGN

Settings = dict[str, Any]
EIGHT_GPUS = {"CPU": 64.0, "GPU": 8.0, "memory": 1e12}


def sampling(cluster: Settings, **rollout: Any) -> ClusterRunConfig:
    """A GRPO run's configuration with these machines."""
    settings = {
        "name": "run",
        "steps": 1,
        "algorithm": {"name": "grpo"},
        "data": {"path": "prompts.jsonl"},
        "rewards": [{"name": "length", "target": 5}],
        "rollout": rollout,
        "cluster": cluster,
    }
    return check_config(settings, kind=ClusterRunConfig)


def test_engines_get_the_gpus_that_they_spread_over_without_being_told() -> None:
    wanted = plan(sampling({"workers": 6, "gpus_per_worker": 1}, tensor_parallel_size=2))
    assert wanted.engine_resources == {"GPU": 2.0}
    assert plan(sampling({"workers": 2})).engine_resources == {}, "beside workers on CPUs they need none"


@pytest.mark.parametrize(
    ("cluster", "rollout", "text"),
    [
        ({"gpus_per_engine": 0}, {}, r"gpus_per_engine 0 beside workers with GPUs .* onto a worker's GPU"),
        (
            {"gpus_per_engine": 1},
            {"tensor_parallel_size": 2},
            r"gpus_per_engine \(1\) must be rollout\.tensor_parallel_size \(2\)",
        ),
        ({"gpus_per_engine": 4}, {}, r"gpus_per_engine \(4\) must be rollout\.tensor_parallel_size \(1\)"),
        ({"gpus_per_engine": 0.5}, {}, r"takes a whole one, and 1 \+ 0\.5 > 1"),
        ({"gpus_per_worker": 4}, {}, r"gpus_per_worker \(4\) must be 0 or 1.*cluster\.workers=8"),
        (
            {"gpus_per_worker": 0},
            {"tensor_parallel_size": 2},
            r"tensor_parallel_size \(2\) spreads an engine over GPUs",
        ),
    ],
)
def test_gpus_that_would_be_shared_or_wasted_are_refused(cluster: Settings, rollout: Settings, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        sampling({"workers": 2, "gpus_per_worker": 1, **cluster}, **rollout)


def test_what_no_node_can_hold_is_refused_however_large_the_sum() -> None:
    nodes = [{"CPU": 16.0, "GPU": 4.0}] * 4
    with pytest.raises(ConfigError, match=r"each engine takes 8 GPU of one node .* 4 node\(s\) with 16 CPU and 4 GPU"):
        check_fits(plan(sampling({"workers": 4, "gpus_per_worker": 1}, tensor_parallel_size=8)), nodes=nodes)
    with pytest.raises(ConfigError, match=r"each worker takes 32 CPU and 1 GPU of one node"):
        check_fits(plan(sampling({"workers": 1, "gpus_per_worker": 1, "cpus_per_worker": 32})), nodes=nodes)


def test_bins_are_counted_and_not_sums() -> None:
    """Three engines of 4 GPUs and 4 workers are 16 GPUs, which two nodes of 6 and one of 4 have, but not for them."""
    wanted = plan(sampling({"workers": 4, "gpus_per_worker": 1, "engines": 3}, tensor_parallel_size=4))
    fitting = [{"CPU": 64.0, "GPU": 6.0}, {"CPU": 64.0, "GPU": 6.0}, {"CPU": 64.0, "GPU": 4.0}]
    check_fits(wanted, nodes=fitting)
    split = [{"CPU": 64.0, "GPU": 7.0}, {"CPU": 64.0, "GPU": 7.0}, {"CPU": 64.0, "GPU": 2.0}]
    with pytest.raises(ConfigError, match=r"cluster\.engines \(3\) of 4 GPU do not fit, .* no room for all engines"):
        check_fits(wanted, nodes=split)
    busy = [{"CPU": 1.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}]
    many = plan(sampling({"workers": 8, "gpus_per_worker": 1, "engines": 1}, tensor_parallel_size=4))
    check_fits(many, nodes=busy)  # the engine goes where there are no cores
    more = plan(sampling({"workers": 10, "gpus_per_worker": 1, "engines": 1}, tensor_parallel_size=4))
    with pytest.raises(ConfigError, match=r"have room for 9 workers"):
        check_fits(more, nodes=busy)


def test_the_sum_is_refused_with_the_arithmetic() -> None:
    wanted = plan(sampling({"workers": 7, "gpus_per_worker": 1, "engines": 1}, tensor_parallel_size=2))
    text = r"workers \(7\) × 1 GPU \+ cluster\.engines \(1\) × 2 GPU = 9 GPU, but there are 8"
    with pytest.raises(ConfigError, match=text):
        check_fits(wanted, nodes=[EIGHT_GPUS])


def test_the_recipe_for_eight_gpus_fits_on_eight() -> None:
    check_fits(plan(load_run(ALIGN / "grpo_8b.yaml", [])), nodes=[EIGHT_GPUS])


def brute_force(wanted: Plan, nodes: list[dict[str, float]]) -> int | None:
    """The most workers beside all engines, by trying every spread of the engines."""
    most = None
    for spread in itertools.product(range(wanted.engines + 1), repeat=len(nodes)):
        if sum(spread) != wanted.engines:
            continue
        workers = 0
        for node, engines in zip(nodes, spread, strict=True):
            rest = {name: have - engines * wanted.engine_resources.get(name, 0) for name, have in node.items()}
            if min(rest.values()) < 0:
                break
            workers += int(min(rest[name] // amount for name, amount in wanted.resources.items()))
        else:
            most = max(workers, most or 0)
    return most


def test_packing_is_exact() -> None:
    chance = random.Random(0)
    for _ in range(200):
        nodes = [{"CPU": float(chance.randint(0, 12)), "GPU": float(chance.randint(0, 8))} for _ in range(3)]
        wanted = Plan(
            workers=1000,
            resources={"CPU": float(chance.randint(1, 4)), "GPU": 1.0},
            engines=chance.randint(0, 3),
            engine_resources={"CPU": float(chance.randint(0, 3)), "GPU": float(chance.randint(1, 4))},
        )
        assert most_workers(wanted, nodes) == brute_force(wanted, nodes)


def test_tenths_of_a_core_add_up_to_a_core() -> None:
    wanted = Plan(workers=3, resources={"CPU": 0.1}, engines=7, engine_resources={"CPU": 0.1})
    check_fits(wanted, nodes=[{"CPU": 1.0}])


@pytest.mark.parametrize("timeout_s", [60, 900, 7200.5])
def test_workers_wait_longer_for_each_other_than_for_anything_else(timeout_s: float) -> None:
    """A sync waits for what is being drawn, for a restart, and twice for a load."""
    limit = collective_timeout_s(sampling({"workers": 2}, timeout_s=timeout_s))
    assert isinstance(limit, int) and limit > 4 * (timeout_s + HEARTBEAT_S) + 3600


def test_without_ray_trainer_and_engine_do_not_share_a_gpu() -> None:
    config = sampling({"workers": 0})
    with pytest.raises(
        ConfigError, match=r"1 GPU \+ 1 .* = 2, of 8 here. Set cluster\.workers=7 cluster\.gpus_per_worker=1"
    ):
        check_machine(config, gpus=8)
    with pytest.raises(ConfigError, match=r"= 2, of 1 here\. .* on a machine with more GPUs"):
        check_machine(config, gpus=1)
    assert check_machine(config, gpus=0) == ""
    with pytest.raises(ConfigError, match=r"tensor_parallel_size \(2\) spreads an engine over GPUs"):
        check_machine(sampling({"workers": 0}, tensor_parallel_size=2), gpus=0)


def test_without_ray_gpus_that_stand_idle_are_told() -> None:
    config = sampling({"workers": 0}, engine="local")
    assert check_machine(config, gpus=1) == ""
    assert "one of 4 GPUs; cluster.workers=4" in check_machine(config, gpus=4)
