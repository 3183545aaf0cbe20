"""Training on several Ray nodes: an output that they do not share ends the run at once, and a node that is taken away
after a notice counts as no failure."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from alignment.errors import ConfigError
from alignment.run_folder import RunFolder
from cluster.config import ClusterRunConfig
from cluster.launch import run

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
ANOTHER_NODE = """
import sys
from ray._private.node import Node
from ray._private.parameter import RayParams

ports = dict(min_worker_port=0, max_worker_port=0, node_manager_port=0, dashboard_agent_listen_port=None)
room = dict(num_cpus=1, num_gpus=0, object_store_memory=150 * 2**20)
place = dict(node_ip_address="127.0.0.1", gcs_address=sys.argv[1], redis_address=sys.argv[1], include_log_monitor=False)
node = Node(RayParams(**ports, **room, **place), head=False, shutdown_at_exit=True, spawn_reaper=True)
sys.stdin.read()
"""
"""A program that is a Ray node, as those that `cluster.add_node` makes in this process, until its input ends."""


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster whose head, with the driver, runs no worker."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    ray.init(address=started.address, _node_ip_address="127.0.0.1")
    yield started
    ray.shutdown()
    started.shutdown()


def run_here(settings: dict[str, Any], **changed: Any) -> Path:
    cluster = {"workers": 1, "cpus_per_worker": 1, "max_failures": 0, "autoscaling": True}
    config = ClusterRunConfig.model_validate({**settings, "cluster": cluster, **changed})
    run(config)
    return config.folder


def apart(folder: Path, *command: str) -> list[str]:
    """A command that sees an empty disk of its own in place of a folder."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces for mounts are not permitted here")
    script = 'mount --make-rprivate / && mount -t tmpfs tmpfs "$1" && shift && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh", str(folder), *command]


def test_an_output_that_a_node_does_not_share_ends_the_run_before_its_first_step(
    cluster: Any, run_settings: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "runs"
    output.mkdir()
    command = apart(output, sys.executable, "-c", ANOTHER_NODE, cluster.address)
    node = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        while sum(each["Alive"] for each in ray.nodes()) < 2:
            assert node.poll() is None
            time.sleep(0.2)
        with pytest.raises(ConfigError, match="must be shared"):
            run_here(run_settings)
    finally:
        node.communicate(timeout=60)
    assert [path.name for path in (output / "run").iterdir() if path.name.startswith(".")] == []


def test_a_node_that_is_taken_away_after_a_notice_is_no_failure(
    cluster: Any, run_settings: dict[str, Any], tmp_path: Path
) -> None:
    nodes = {node.node_id: node for node in (cluster.add_node(**NODE), cluster.add_node(**NODE))}
    taken: list[int] = []

    def take_away() -> None:
        folder = tmp_path / "runs" / "run"
        while not any(line["step"] >= 25 for line in RunFolder(folder).read_metrics()):
            time.sleep(0.05)
        (lost,) = [
            node["NodeID"]
            for node in ray.nodes()
            if node["NodeID"] in nodes
            and ray._private.state.available_resources_per_node()[node["NodeID"]].get("CPU", 0) < 1
        ]
        notice = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=5"]
        command = [str(BIN / "ray"), "drain-node", f"--address={cluster.address}", f"--node-id={lost}", *notice]
        subprocess.run(command, check=True, capture_output=True)
        time.sleep(5)
        cluster.remove_node(nodes[lost], allow_graceful=False)
        taken.append(RunFolder(folder).read_metrics()[-1]["step"])

    thread = threading.Thread(target=take_away, daemon=True)
    thread.start()
    folder = run_here(run_settings, steps=400, checkpoint={"every": 10}, evaluate={"every": 200})
    thread.join(timeout=60)
    assert taken and taken[0] < 400, "it was lost in the middle"
    assert [line["step"] for line in RunFolder(folder).read_metrics() if "loss" in line][-1] == 400
