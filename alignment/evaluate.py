"""Evaluation of a model by its answers: held-out prompts are answered, judged, and held against the reference."""

from __future__ import annotations

import statistics
from typing import Any

from alignment.config import OptimConfig
from alignment.metrics import Metrics
from alignment.models.parallel import World
from alignment.models.roles import Roles
from alignment.rewards import Rewards
from alignment.rollout.feed import Feed, of_scorer
from alignment.step import divergences
from alignment.types import Group


class Examination:
    """Held-out prompts with one answer each, drawn with seeds that are the same every time."""

    def __init__(
        self, prompts: list[Group], feed: Feed, judges: Rewards, roles: Roles, optim: OptimConfig, world: World
    ) -> None:
        """Draws the answers and has them judged. Called by every worker.

        Args:
            judges: scorers that teach nothing; beside those of the feed.

        Raises:
            RolloutError: they could not be drawn.
            RewardError: they could not be judged.
        """
        answered = feed.answer(prompts)
        self.groups = feed.rewards.score(answered, world=world)
        self.judged = judges.score(answered, world=world, may_abstain=True)
        self.scorers, self.judges = feed.rewards.names, judges.names
        self.kl = divergences(roles, self.groups, optim, world)

    def metrics(self) -> Metrics:
        """Means over the prompts: reward and its standard deviation, every score, every judge, length, divergence."""
        answers = [group.completions[0] for group in self.groups]
        judged = [group.completions[0] for group in self.judged]
        scores = {f"scores/{name}": of_scorer(name, answers) for name in self.scorers}
        scores |= {f"judges/{name}": of_scorer(name, judged) for name in self.judges}
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
                "scores": {**group.completions[0].scores, **self.judged[index].completions[0].scores},
                **({"kl": self.kl[index]} if self.kl else {}),
            }
            for index, group in enumerate(self.groups[:count])
        ]


def prompt_text(group: Group) -> str:
    """A group's prompt as one string."""
    return group.prompt if isinstance(group.prompt, str) else "\n".join(turn.content for turn in group.prompt)
