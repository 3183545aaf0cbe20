"""REINFORCE++ (arXiv 2501.03262): PPO's loss and token-wise KL without a critic, normalised over the whole batch."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from alignment.advantages import gae, group_relative, whiten
from alignment.algorithms._policy_gradient import Discounted
from alignment.batch import Batch


class ReinforcePlusPlus(Discounted):
    """Every token's advantage is what came after it, on the scale of the whole batch."""

    name: Literal["reinforce++"] = "reinforce++"
    """REINFORCE++."""
    kl_in: Literal["reward", "loss", "none"] = "reward"
    """Where the divergence from the reference is paid: per token in the `reward`, or as a term of the `loss`."""
    baseline: Literal["none", "group"] = "none"
    """`group` takes the mean of the prompt's completions off every reward first (REINFORCE++-baseline)."""

    def prepare(self, batch: Batch) -> Batch:
        batch = super().prepare(batch)
        assert batch.advantages is not None
        white = whiten(batch.advantages[batch.learned])
        return dataclasses.replace(batch, advantages=batch.on_learned(white))

    def advantages(self, batch: Batch) -> Tensor:
        rewards = batch.rows(self.token_rewards(batch))
        if self.baseline == "group":
            relative = group_relative(batch.rewards, batch.group_of_completion, divide=False)
            rewards = rewards + batch.rows(batch.at_the_end(relative - batch.rewards))
        to_come = gae(rewards, torch.zeros_like(rewards), batch.lengths, gamma=self.gamma, lam=1.0)
        return batch.from_rows(to_come)


ALGORITHM = ReinforcePlusPlus
