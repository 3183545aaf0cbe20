"""Sampling: prompts go from the main worker to the engines, and every worker gets its groups back completed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial

from alignment.distributed.world import World, run_on_all, run_on_main
from alignment.groups import Completion, Group
from alignment.models.load import LanguageModel
from alignment.models.roles import Roles
from alignment.rollout import Generator, Policy, Rollout, Sampling
from alignment.rollout.rollouter import MultiTurn, Rollouter, SingleTurn, gather_all
from alignment.settings.plugins import load_function
from alignment.settings.run import RunConfig


class Sampler:
    """Completes groups by what the actor answers to their prompts. Every worker calls each method."""

    def __init__(
        self,
        config: RunConfig,
        model: LanguageModel,
        generator: Generator | None,
        world: World,
        rollouter: Rollouter | None = None,
    ) -> None:
        """Makes a sampler.

        Args:
            generator: the engines, on the main worker; on the others it may be None, or only receive weights.
            rollouter: makes the completions of a group; None is the one that the configuration names.
        """
        self.config = config
        self.model = model
        self.generator = generator
        self.world = world
        self.rollouter = rollouter or make_rollouter(config, model)

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
            seeds = [self._seed(number) for number in numbers]
            sampling = self._sampling(num_completions)

            async def complete_groups(policy: Policy) -> list[list[Rollout]]:
                return await gather_all(
                    self.rollouter.complete(group, policy, sampling, seed)
                    for group, seed in zip(groups, seeds, strict=True)
                )

            wait = self.generator.start(complete_groups)

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
        """The completion that a rollout is; the tokens that the actor has sampled are trained on, and no others."""
        return Completion(
            text=self.model.tokenizer.decode(rollout.tokens, skip_special_tokens=True),
            tokens=rollout.tokens,
            loss_mask=rollout.loss_mask or (True,) * len(rollout.tokens),
            reward=rollout.reward,
            environment_reward=rollout.reward,
            truncated=rollout.truncated,
            sampled_logprobs=rollout.logprobs,
            weight_version=rollout.weight_version,
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


def make_rollouter(config: RunConfig, model: LanguageModel) -> Rollouter:
    """The rollouter that a configuration names: one answer to each prompt, or a conversation with an environment.

    Raises:
        ConfigError: the environment's name stands for nothing that can be imported.
    """
    environment = config.rollout.environment
    if environment is None:
        return SingleTurn()
    make_environment = partial(load_function(environment.name, "environment"), **environment.arguments)
    return MultiTurn(make_environment, model.tokenizer, max_turns=environment.max_turns, name=environment.name)
