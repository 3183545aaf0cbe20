"""Sets the environment variables of our processes, before any library reads them."""

from __future__ import annotations

import os
import sys

IDLE_THREADS = {"OMP_WAIT_POLICY": "passive"}
"""Makes idle OpenMP threads sleep. By default they spin while they wait for each other; if other programs need the
cores too, they take the core of the thread that they wait for. On two cores beside two busy processes, a training step
then takes several times as long (`tests/benchmarks/openmp.py`). GNU's runtime, which comes with torch and is preloaded
by vLLM, and Intel's runtime both read this variable when they are loaded."""
NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Turns off the progress bars of libraries, if it is set before their import; in a log file, bars are useless lines."""


def set_environment() -> None:
    """Sets the variables that the user has not set. Child processes inherit them, also Ray's workers on this machine.

    It is called when the package is imported, which happens before the import of torch in all our processes.
    """
    for name, value in (IDLE_THREADS if sys.stderr.isatty() else IDLE_THREADS | NO_BARS).items():
        os.environ.setdefault(name, value)


def compute_on(device: str) -> None:
    """Tells DeepSpeed, which transformers and peft import, the device of this process: `cpu` or `cuda`.

    Otherwise DeepSpeed looks for accelerators, and prints a warning if there is none.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)


def inherited_variables() -> dict[str, str]:
    """Returns the variables of this process, for processes on other machines that import torch before this package."""
    return {name: os.environ[name] for name in IDLE_THREADS}
