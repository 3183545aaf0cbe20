"""One Ray for all tests that compute on Ray, started as `raylign train` itself would: its runs then join it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from cluster.launch import start_ray


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    start_ray(None)
    yield
    ray.shutdown()
