"""Evaluation on the held-out groups: loss on the data's completions, rewards of the model's own, and samples."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from alignment.algorithms import Algorithm
from alignment.distributed.world import World
from alignment.groups import Group
from alignment.metrics import Metrics
from alignment.models.roles import Roles
from alignment.rewards import Rewards
from alignment.rollout.local import greedy
from alignment.rollout.queue import scores_of
from alignment.rollout.sampler import Sampler
from alignment.run_log import RunLog
from alignment.settings.run import RunConfig
from alignment.step import divergences, evaluate


class Evaluator:
    """Evaluates the actor as it is. Every worker calls each method."""

    def __init__(
        self,
        config: RunConfig,
        algorithm: Algorithm,
        groups: list[Group],
        roles: Roles,
        world: World,
        run_log: RunLog,
        sampled_evaluation: SampledEvaluation | None,
    ) -> None:
        """`sampled_evaluation`: evaluates what the model answers; None if nothing scores answers."""
        self.config = config
        self.algorithm = algorithm
        self.groups = groups
        self.roles = roles
        self.world = world
        self.run_log = run_log
        self.sampled_evaluation = sampled_evaluation
        self.last_step: int | None = None
        """Step whose model was evaluated last; None if none was since the run began, or was rolled back."""
        self._measures: list[Callable[[int], Metrics]] = []
        if not algorithm.is_online:
            self._measures.append(self._evaluate_loss)
        if sampled_evaluation is not None:
            self._measures.append(self._evaluate_answers)

    def evaluate(self, step: int) -> Metrics:
        """Returns figures on what is held out, by names that begin with `eval/`; none if nothing is held out."""
        self.last_step = step
        if not self.groups:
            return {}
        return {f"eval/{name}": value for measure in self._measures for name, value in measure(step).items()}

    def write_samples(self, step: int) -> None:
        """Answers some held-out prompts greedily and logs the answers, where no evaluation does that."""
        groups = self.groups[: self.config.evaluate.samples]
        is_idle = not self.world.is_main and not self.roles.in_lockstep
        if not groups or is_idle or self.sampled_evaluation is not None or self.algorithm.head == "score":
            return
        prompts = [group.prompt_tokens for group in groups]
        answers = greedy(self.roles.actor, prompts, max_tokens=self.config.evaluate.sample_tokens)
        if not self.world.is_main:
            return
        decode = self.roles.actor.tokenizer.decode
        self.run_log.write_samples(
            {"step": step, "prompt": prompt_text(group), "tokens": len(answer), "answer": decode(answer)}
            for group, answer in zip(groups, answers, strict=True)
        )

    def _evaluate_loss(self, step: int) -> Metrics:
        metrics = evaluate(self.roles, self.algorithm, self.groups, self.config.optim, self.world)
        self.roles.store_reward_statistics(metrics)
        return metrics

    def _evaluate_answers(self, step: int) -> Metrics:
        assert self.sampled_evaluation is not None
        result = self.sampled_evaluation.evaluate(self.groups, step)
        if self.world.is_main:
            self.run_log.write_samples(result.rows(step, self.config.evaluate.samples))
        return result.metrics()


class SampledEvaluation:
    """Has the held-out prompts answered, and the answers scored."""

    def __init__(
        self,
        config: RunConfig,
        sampler: Sampler,
        rewards: Rewards,
        eval_rewards: Rewards,
        roles: Roles,
        *,
        publishes_weights: bool,
    ) -> None:
        """`rewards` also train the actor, `eval_rewards` do not.

        `publishes_weights`: true if the engines get the actor's weights for the evaluation only, because nothing else
        is sampled.
        """
        self.config = config
        self.sampler = sampler
        self.rewards = rewards
        self.eval_rewards = eval_rewards
        self.roles = roles
        self.publishes_weights = publishes_weights

    def evaluate(self, groups: list[Group], step: int) -> SampledResult:
        """Samples one answer to each prompt, with seeds that are the same every time.

        Raises:
            RolloutError: the answers could not be sampled.
            RewardError: they could not be scored.
        """
        if self.publishes_weights:
            self.sampler.publish(self.roles, step)
        prompts = [dataclasses.replace(group, completions=()) for group in groups]
        numbers = [-1 - index for index in range(len(prompts))]
        answered_groups = self.sampler.start(prompts, numbers, num_completions=1)()
        world = self.sampler.world
        scored_groups = self.rewards.score(answered_groups, world=world)
        return SampledResult(
            groups=scored_groups,
            eval_groups=self.eval_rewards.score(answered_groups, world=world, may_abstain=True),
            reward_names=tuple(self.rewards.names),
            eval_reward_names=tuple(self.eval_rewards.names),
            kl=divergences(self.roles, scored_groups, self.config.optim, world),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledResult:
    """One answer to each held-out prompt, with what it was given."""

    groups: list[Group]
    """With the answers and the rewards that train."""
    eval_groups: list[Group]
    """The same answers, with the scores of the scorers that do not train."""
    reward_names: tuple[str, ...]
    eval_reward_names: tuple[str, ...]
    kl: list[float]
    """Σ log π − log π_ref (nats) of each answer; empty without a reference model."""

    def metrics(self) -> Metrics:
        """Means over the prompts: reward and its standard deviation, every score, length, divergence."""
        answers = [group.completions[0] for group in self.groups]
        eval_answers = [group.completions[0] for group in self.eval_groups]
        scores = {f"scores/{name}": scores_of(name, answers) for name in self.reward_names}
        scores |= {f"eval_rewards/{name}": scores_of(name, eval_answers) for name in self.eval_reward_names}
        rewards = [answer.reward for answer in answers if answer.reward is not None]
        return {
            **({"reward": statistics.fmean(rewards), "reward_std": statistics.pstdev(rewards)} if rewards else {}),
            **{name: statistics.fmean(values) for name, values in scores.items() if values},
            **({"kl": statistics.fmean(self.kl)} if self.kl else {}),
            "length": statistics.fmean(len(answer.tokens) for answer in answers),
            "truncated": statistics.fmean(answer.truncated for answer in answers),
        }

    def rows(self, step: int, count: int) -> list[dict[str, Any]]:
        """The first answers, for people: prompt, answer, reward, scores and divergence (nats)."""
        return [
            {
                "step": step,
                "prompt": prompt_text(group),
                "tokens": len(group.completions[0].tokens),
                "answer": group.completions[0].text,
                "reward": group.completions[0].reward,
                "scores": {**group.completions[0].scores, **self.eval_groups[index].completions[0].scores},
                **({"kl": self.kl[index]} if self.kl else {}),
            }
            for index, group in enumerate(self.groups[:count])
        ]


def prompt_text(group: Group) -> str:
    """A group's prompt as one string."""
    return group.prompt if isinstance(group.prompt, str) else "\n".join(turn.content for turn in group.prompt)
