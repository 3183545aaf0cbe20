"""Checks that every machine of a Ray cluster sees an endpoint's registry and its database.

A replica on a machine that does not see them would find no version. An ingress there would know no key, and would lose
feedback.
"""

from __future__ import annotations

import logging
from typing import Any

from alignment.errors import ServingError
from alignment.shared_folder import WAIT_S, leave_mark, sees
from serving.registry.versions import Registry

logger = logging.getLogger("ray.serve")

ANSWER_S = 60.0
"""Seconds for a process to start on a node that has not had one yet."""


def check_nodes(registry: Registry, database: str) -> None:
    """Checks that all nodes of the connected Ray cluster can serve from one registry. A single node is not checked.

    Nodes that come later are not checked here. If such a node does not see the registry, no replica starts there.

    Args:
        database: URL of the endpoint's database.

    Raises:
        ServingError: there are several nodes, and the database is a file, or a node does not see the registry's folder.
    """
    import ray

    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2:
        return
    check_database(database, num_nodes=len(nodes))
    blind_nodes = _without_sight(registry, list(nodes))
    if blind_nodes:
        names = ", ".join(sorted(f"{nodes[node]} (node {node[:8]})" for node in blind_nodes))
        raise ServingError(
            f"{registry.folder} is not the same folder on {names} as here, so no replica there would find a version: "
            "it must be shared between all nodes, as a network file system; folder=... names another"
        )


def check_database(database: str, *, num_nodes: int) -> None:
    """Checks that every node can reach the database.

    Raises:
        ServingError: it is a file, and there are several nodes.
    """
    if num_nodes > 1 and database.startswith("sqlite"):
        raise ServingError(
            f"the Ray cluster has {num_nodes} nodes, and {database} is a file that belongs to one of them: keys and "
            "judgements would be lost on the others. Set feedback.database=postgresql+psycopg://USER@HOST/NAME, its "
            "password in PGPASSWORD or ~/.pgpass"
        )


def _without_sight(registry: Registry, nodes: list[str]) -> list[str]:
    """Returns the nodes that do not see what is written into the registry's folder here."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    registry.folder.mkdir(parents=True, exist_ok=True)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(sees)
    blind_nodes = []
    with leave_mark(registry.folder) as mark:
        node_of = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                registry.folder, mark
            ): node
            for node in nodes
        }
        answers, open_answers = ray.wait(list(node_of), num_returns=len(node_of), timeout=WAIT_S + ANSWER_S)
        for answer in answers:
            try:
                if not ray.get(answer):
                    blind_nodes.append(node_of[answer])
            except ray.exceptions.RayError:  # the node was lost; a replica on a node in its place checks by itself
                logger.warning("Node %s could not be asked whether it sees the registry", node_of[answer])
        for answer in open_answers:
            logger.warning("Node %s did not say whether it sees the registry", node_of[answer])
    return blind_nodes
