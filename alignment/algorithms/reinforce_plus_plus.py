"""REINFORCE++ (arXiv 2501.03262): PPO's loss and token-wise KL without a critic, normalised over the global batch."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from alignment.advantages import gae, group_relative, whiten
from alignment.algorithms._policy_gradient import Discounted
from alignment.batch import Batch


class ReinforcePlusPlus(Discounted):
    """The advantage of each token is its discounted return, normalised over the global batch."""

    name: Literal["reinforce++"] = "reinforce++"
    """REINFORCE++."""
    kl_placement: Literal["reward", "loss", "none"] = "reward"
    """Where the divergence from the reference is penalised: per token in the `reward`, or as a term of the `loss`."""
    baseline: Literal["none", "group"] = "none"
    """`group` subtracts the mean reward of the prompt's completions from each reward first (REINFORCE++-baseline)."""

    def prepare(self, batch: Batch) -> Batch:
        """Normalises the advantages over the global batch."""
        batch = super().prepare(batch)
        assert batch.advantages is not None
        advantages = whiten(batch.advantages[batch.loss_mask])
        return dataclasses.replace(batch, advantages=batch.scatter(advantages))

    def advantages(self, batch: Batch) -> Tensor:
        """The discounted return of each token."""
        rewards = batch.rows(self.token_rewards(batch))
        if self.baseline == "group":
            relative = group_relative(batch.rewards, batch.group_of_completion, divide=False)
            rewards = rewards + batch.rows(batch.at_last_token(relative - batch.rewards))
        returns = gae(rewards, torch.zeros_like(rewards), batch.lengths, gamma=self.gamma, lam=1.0)
        return batch.from_rows(returns)


ALGORITHM = ReinforcePlusPlus
