"""What processes of ours find in their environment, set before anything reads it."""

from __future__ import annotations

import os
import sys

IDLE_THREADS = {"OMP_WAIT_POLICY": "passive"}
"""Idle OpenMP threads sleep. By default they spin while they wait for each other, and so keep the thread that they wait
for off its core when another program wants one too: on two cores beside two busy processes a training step takes
several times as long (`tests/benchmarks/openmp.py`). GNU's runtime, which torch brings and vLLM preloads, and Intel's
both read this variable when they are loaded."""
NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Libraries draw no progress bars where these are set when they are imported: in a file they are lines of noise."""


def set_environment() -> None:
    """Sets what the user has not set; child processes inherit it, Ray's workers on this machine among them.

    Called when the package is imported, which comes before torch in every process of ours.
    """
    for name, value in (IDLE_THREADS if sys.stderr.isatty() else IDLE_THREADS | NO_BARS).items():
        os.environ.setdefault(name, value)


def compute_on(device: str) -> None:
    """Tells DeepSpeed, which transformers and peft import, what this process computes on: `cpu` or `cuda`.

    Otherwise it looks for accelerators, and prints a warning where there are none.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)


def inherited() -> dict[str, str]:
    """The variables as this process has them, for processes elsewhere that load torch before this package."""
    return {name: os.environ[name] for name in IDLE_THREADS}
