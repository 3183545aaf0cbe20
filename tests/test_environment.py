"""Idle threads sleep, in every process that computes: asked of OpenMP itself where it can tell, else of the process.

Ray's workers, engines and replicas are asked where they run: `tests/cluster`, `tests/serving`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.processes import without_wait_policy

MODULES = ["cluster.cli", "cluster.worker", "serving.replica.scoring"]


def openmp_of(module: str, environment: dict[str, str]) -> str:
    """The settings that OpenMP has read in a process that imports a module, and then whatever loads torch."""
    code = f"import {module}; import torch; torch.ones(2)"
    environment = {**environment, "OMP_DISPLAY_ENV": "true"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_whatever_is_imported_first_openmp_lets_idle_threads_sleep(module: str) -> None:
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in openmp_of(module, without_wait_policy())


def test_the_user_s_own_setting_stays() -> None:
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in openmp_of("cluster.cli", {**os.environ, "OMP_WAIT_POLICY": "active"})


def test_tests_compute_as_users_do() -> None:
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
