"""An endpoint on several Ray nodes: what they do not share is found out at the start."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from alignment.errors import ServingError
from serving.registry.nodes import check_nodes
from serving.registry.versions import Registry
from tests.cluster.test_nodes import ANOTHER_NODE, NODE, apart

pytestmark = pytest.mark.slow
SHARED = "postgresql+psycopg://raylign@database/raylign"


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    ray.init(address=started.address, _node_ip_address="127.0.0.1")
    yield started
    ray.shutdown()
    started.shutdown()


def wait_for_nodes(count: int) -> None:
    end = time.monotonic() + 120
    while sum(node["Alive"] for node in ray.nodes()) < count:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_what_several_nodes_share_is_served_and_what_they_do_not_is_refused(cluster: Any, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    check_nodes(registry, "sqlite:////one/node")  # nothing is to be shared yet
    cluster.add_node(**NODE)
    wait_for_nodes(2)
    check_nodes(registry, SHARED)
    with pytest.raises(
        ServingError, match=r"has 2 nodes, and sqlite:////two is a file .*postgresql\+psycopg://USER@HOST"
    ):
        check_nodes(registry, "sqlite:////two")
    command = apart(registry.folder, sys.executable, "-c", ANOTHER_NODE, cluster.address)
    node = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        wait_for_nodes(3)
        with pytest.raises(ServingError, match=r"is not the same folder on \S+ \(node \w{8}\) as here"):
            check_nodes(registry, SHARED)
    finally:
        node.communicate(timeout=60)
    assert not list(registry.folder.glob(".seen-*"))
