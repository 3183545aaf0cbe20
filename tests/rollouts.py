"""What tests of engines share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alignment.rollout import Generator, Prompt, Rollout, Sampling
from alignment.rollout.rollouter import gather_all


def submit(generator: Generator, prompts: Sequence[Prompt], sampling: Sampling) -> Callable[[], list[list[Rollout]]]:
    """Has prompts answered together; the returned function waits for the completions of each."""
    return generator.start(lambda policy: gather_all(policy.generate(prompt, sampling) for prompt in prompts))
