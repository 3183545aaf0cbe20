"""Group relative policy optimisation (arXiv 2402.03300), with what Dr. GRPO and DAPO changed as options.

Dr. GRPO (arXiv 2503.20783) is `divide_by_deviation: false, loss_per: constant`. DAPO (arXiv 2503.14476) is `clip_high:
0.28, loss_per: token, kl_in: none, drop_equal_groups: true`, and the scorer `length` with `max_length` and `buffer`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from alignment.advantages import group_relative
from alignment.algorithms._policy_gradient import PolicyGradient
from alignment.batch import Batch
from alignment.groups import Group


class GRPO(PolicyGradient):
    """A completion is as good as it is better than the others of its prompt; no critic."""

    min_completions: ClassVar[int] = 2

    name: Literal["grpo"] = "grpo"
    """Group relative policy optimisation."""
    loss_per: Literal["token", "completion", "constant"] = "completion"
    """Who weighs the same: every token of the step (DAPO), every completion (GRPO as published), or every token, over
    a constant number of them per completion (Dr. GRPO). Only for `ratio_per: token`."""
    divide_by_deviation: bool = True
    """Divide by the group's standard deviation."""
    drop_equal_groups: bool = False
    """Replace groups whose rewards are all equal, which teach nothing, by new prompts (DAPO's dynamic sampling)."""

    def is_informative(self, group: Group) -> bool:
        if not self.drop_equal_groups:
            return True
        # Rewards are compared as they are learned from: a penalty can tell two of them apart.
        penalty = self.truncated_penalty if self.truncated == "penalise" else 0.0
        return len({(c.reward or 0.0) - penalty * c.truncated for c in group.completions}) > 1

    def advantages(self, batch: Batch) -> Tensor:
        rewards = batch.rewards
        if self.kl_in == "reward":
            rewards = batch.per_completion(self.token_rewards(batch))
        relative = group_relative(rewards, batch.group_of_completion, divide=self.divide_by_deviation)
        return batch.of_completions(relative)


ALGORITHM = GRPO
