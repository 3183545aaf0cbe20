"""Sampling: prompts go from the main worker to the engines, and every worker gets its groups back completed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from alignment.groups import Completion, Group
from alignment.models.load import LanguageModel
from alignment.models.parallel import World, run_on_all, run_on_main
from alignment.models.roles import Roles
from alignment.rollout import Generator, Prompt, Rollout, Sampling
from alignment.settings.run import RunConfig


class Sampler:
    """Completes groups by what the actor answers to their prompts. Every worker calls each method."""

    def __init__(self, config: RunConfig, model: LanguageModel, generator: Generator | None, world: World) -> None:
        """`generator`: the engines, on the main worker; on the others it may be None and only receives weights."""
        self.config = config
        self.model = model
        self.generator = generator
        self.world = world

    def start(
        self, groups: list[Group], numbers: Sequence[int], *, num_completions: int | None = None
    ) -> Callable[[], list[Group]]:
        """Starts to sample completions of the groups' prompts; the returned function waits for them.

        Args:
            numbers: one for each group, of which its seed is made; the same number samples with the same randomness.
            num_completions: of each prompt; None is as many as `rollout.completions`.

        Raises:
            RolloutError: (from the returned function) not all could be sampled within the time allowed.
        """
        wait = None
        if self.world.is_main:
            assert self.generator is not None, "the main worker has the generator"
            prompts = [
                Prompt(tokens=group.prompt_tokens, seed=self._seed(number))
                for group, number in zip(groups, numbers, strict=True)
            ]
            wait = self.generator.submit(prompts, self._sampling(num_completions))

        def completed_groups() -> list[Group]:
            rollouts = run_on_main(wait, self.world)
            return [
                dataclasses.replace(group, completions=tuple(map(self.completion, group_rollouts)))
                for group, group_rollouts in zip(groups, rollouts, strict=True)
            ]

        return completed_groups

    def publish(self, roles: Roles, weight_version: int) -> float:
        """Loads the actor's weights into the engines; returns the seconds that it took.

        Raises:
            RolloutError: an engine did not load them.
        """
        started_at = time.perf_counter()
        generator = self.generator
        assert generator is not None, "every worker takes part in the transfer of weights"
        run_on_all(lambda: generator.load(roles.weights(weight_version)), self.world)
        return time.perf_counter() - started_at

    def completion(self, rollout: Rollout) -> Completion:
        """The completion that a rollout is; every token that the actor has sampled is trained on."""
        return Completion(
            text=self.model.tokenizer.decode(rollout.tokens, skip_special_tokens=True),
            tokens=rollout.tokens,
            learned=(True,) * len(rollout.tokens),
            truncated=rollout.truncated,
            sampled_logprobs=rollout.logprobs,
            version=rollout.weight_version,
        )

    def _sampling(self, num_completions: int | None) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            num_completions=num_completions or rollout.completions,
            max_tokens=rollout.max_tokens,
            max_length=self.config.data.max_length,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            end_tokens=self.model.end_tokens,
        )

    def _seed(self, number: int) -> int:
        return (self.config.seed * 1_000_003 + number * 7919) % 2**31
