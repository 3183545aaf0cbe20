"""REINFORCE with a leave-one-out baseline (arXiv 2402.14740): a completion as one action, without a critic."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from alignment.advantages import leave_one_out, whiten
from alignment.algorithms._policy_gradient import PolicyGradient
from alignment.batch import Batch


class RLOO(PolicyGradient):
    """A completion is as good as it is better than the mean of the others of its prompt."""

    min_completions: ClassVar[int] = 2

    name: Literal["rloo"] = "rloo"
    """REINFORCE leave-one-out."""
    ratio_per: Literal["token", "sequence", "sequence_mean"] = "sequence"
    """What is clipped: the ratio of each token, of the whole completion, or the completion's geometric mean."""
    kl_in: Literal["reward", "loss", "none"] = "reward"
    """Where the divergence from the reference is paid: in the `reward`, or as a term of the `loss`."""
    whiten_advantages: bool = False
    """Shift and scale each step's advantages to mean 0 and variance 1."""

    def advantages(self, batch: Batch) -> Tensor:
        rewards = batch.per_completion(self.token_rewards(batch))
        relative = leave_one_out(rewards, batch.group_of_completion)
        return batch.of_completions(whiten(relative) if self.whiten_advantages else relative)


ALGORITHM = RLOO
