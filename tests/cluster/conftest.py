"""One Ray for all tests of this folder: starting it costs seconds, and a run joins the one that is there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray on this machine with two CPUs, as `raylign train` itself would start it."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - the name is Ray's
    import ray

    ray.init(address="local", num_cpus=2, logging_level="warning", _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()
