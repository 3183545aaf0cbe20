"""REINFORCE with a leave-one-out baseline (arXiv 2402.14740): a completion is one action, and there is no critic."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from alignment.advantages import leave_one_out, whiten
from alignment.algorithms._policy_gradient import PolicyGradient
from alignment.batch import Batch


class RLOO(PolicyGradient):
    """The advantage of a completion is its reward minus the mean reward of the other completions of its prompt."""

    min_completions: ClassVar[int] = 2

    name: Literal["rloo"] = "rloo"
    """REINFORCE leave-one-out."""
    importance_level: Literal["token", "sequence", "sequence_mean"] = "sequence"
    """Which importance ratio is clipped: each token's, the whole completion's, or the completion's geometric mean."""
    kl_placement: Literal["reward", "loss", "none"] = "reward"
    """Where the divergence from the reference is penalised: in the `reward`, or as a term of the `loss`."""
    whiten_advantages: bool = False
    """Shift and scale each step's advantages to mean 0 and variance 1."""

    def advantages(self, batch: Batch) -> Tensor:
        """The reward of each completion minus the mean reward of the others."""
        rewards = batch.per_completion(self.token_rewards(batch))
        completion_advantages = leave_one_out(rewards, batch.group_of_completion)
        return batch.per_token(whiten(completion_advantages) if self.whiten_advantages else completion_advantages)


ALGORITHM = RLOO
