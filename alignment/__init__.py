"""The method: data → rollout → reward → advantage → update. Knows no Ray and no HTTP server."""

from alignment.environment import set_environment

set_environment()  # before a module of ours loads torch, whose OpenMP reads its settings once
