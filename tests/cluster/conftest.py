"""One Ray for all tests that compute on Ray, started as `raylign train` itself would: its runs then join it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from cluster.launch import start_ray

POLLS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""How often Ray Train asks its workers for reports and whether they have ended (s). With its own 2 s, runs as short as
those of tests wait for most of the time."""


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in POLLS.items():
            patch.setenv(name, value)
        start_ray(None)
        yield
        ray.shutdown()
