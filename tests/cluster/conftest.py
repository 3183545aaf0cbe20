"""One Ray for all tests of this folder: starting it costs seconds, and a run joins the one that is there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray on this machine as `raylign train` itself would start it."""
    from cluster.launch import start_ray

    start_ray(None)
    import ray

    yield
    ray.shutdown()
