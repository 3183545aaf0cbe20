"""The end of the circle: an aligned model behind an OpenAI-compatible HTTP endpoint, on Ray Serve.

`serving:build` is what `serve run` and a RayService name as their import path.
"""

from __future__ import annotations

from typing import Any

from alignment.environment import set_environment

set_environment()  # before a module of this package loads torch

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    if name == "build":  # imported when asked for: Ray takes seconds, and `--help` must not
        from serving.app import build

        return build
    raise AttributeError(f"module 'serving' has no attribute {name!r}")
