"""Group relative policy optimisation (arXiv 2402.03300), with what Dr. GRPO and DAPO changed as options.

Dr. GRPO (arXiv 2503.20783) is `divide_by_deviation: false, loss_aggregation: constant`. DAPO (arXiv 2503.14476) is
`clip_high: 0.28, loss_aggregation: token, kl_placement: none, drop_equal_groups: true`, with the scorer `length`, its
`max_length` and its `buffer`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from alignment.advantages import group_relative
from alignment.algorithms._policy_gradient import PolicyGradient
from alignment.batch import Batch
from alignment.groups import Group


class GRPO(PolicyGradient):
    """The advantage of a completion is its reward relative to the others of its prompt; there is no critic."""

    min_completions: ClassVar[int] = 2

    name: Literal["grpo"] = "grpo"
    """Group relative policy optimisation."""
    loss_aggregation: Literal["token", "completion", "constant"] = "completion"
    """What the loss is averaged over: the tokens of the step (DAPO), the completions (GRPO as published), or a constant
    number of tokens per completion (Dr. GRPO). Only for `importance_level: token`."""
    divide_by_deviation: bool = True
    """Divide by the group's standard deviation."""
    drop_equal_groups: bool = False
    """Replace groups whose rewards are all equal, and which have no gradient, by new prompts (DAPO's dynamic
    sampling)."""

    def is_informative(self, group: Group) -> bool:
        """False for groups with equal rewards, if `drop_equal_groups` is set."""
        if not self.drop_equal_groups:
            return True
        # A penalty counts here, because it can make two equal rewards different.
        penalty = self.truncated_penalty if self.truncated == "penalise" else 0.0
        return len({(c.reward or 0.0) - penalty * c.truncated for c in group.completions}) > 1

    def advantages(self, batch: Batch) -> Tensor:
        """The reward of each completion relative to its group."""
        rewards = batch.rewards
        if self.kl_placement == "reward":
            rewards = batch.per_completion(self.token_rewards(batch))
        completion_advantages = group_relative(rewards, batch.group_of_completion, divide=self.divide_by_deviation)
        return batch.per_token(completion_advantages)


ALGORITHM = GRPO
