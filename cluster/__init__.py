"""The machines: Ray Train worker group, placement, and the entry that `ray job submit` runs."""

from alignment.environment import set_environment

set_environment()  # before a module of this package loads torch
