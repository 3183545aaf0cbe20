"""Proximal policy optimisation (arXiv 1707.06347), in the form that RLHF uses (arXiv 1909.08593, 2203.02155)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from torch import Tensor

from alignment.advantages import gae, whiten
from alignment.algorithms._policy_gradient import Discounted
from alignment.batch import Batch, Loss, Outputs, Term
from alignment.losses.policy import clipped_value
from alignment.settings.section import Fraction, NonNegative, Positive, PositiveCount


class PPO(Discounted):
    """A critic estimates the value of each token's state, so that each token gets its own advantage."""

    needs_critic: ClassVar[bool] = True

    name: Literal["ppo"] = "ppo"
    """Proximal policy optimisation with a critic."""
    epochs_per_step: PositiveCount = 4
    """Passes over each step's rollouts."""
    kl_placement: Literal["reward", "loss", "none"] = "reward"
    """Where the divergence from the reference is penalised: per token in the `reward`, or as a term of the `loss`."""
    lam: Fraction = 0.95
    """Generalised advantage estimation: 0 trusts the critic alone, 1 the rewards alone."""
    whiten_advantages: bool = True
    """Shift and scale each step's advantages to mean 0 and variance 1."""
    value_clip: NonNegative = 0.2
    """How far a value may move from the old one before its gradient stops; 0 never stops it."""
    value_coefficient: Positive = 0.1
    """Weight of the critic's loss. It matters for a shared trunk and for gradient clipping."""

    def prepare(self, batch: Batch) -> Batch:
        """Adds the returns that the critic learns, and normalises the advantages."""
        batch = super().prepare(batch)
        advantages = batch.advantages
        assert advantages is not None and batch.old_values is not None
        returns = advantages + batch.old_values
        if self.whiten_advantages:
            advantages = batch.scatter(whiten(advantages[batch.loss_mask]))
        return dataclasses.replace(batch, advantages=advantages, returns=returns)

    def advantages(self, batch: Batch) -> Tensor:
        """Generalised advantage estimates of each token."""
        assert batch.old_values is not None, "the loop annotates values where needs_critic"
        rewards, values = batch.rows(self.token_rewards(batch)), batch.rows(batch.old_values)
        return batch.from_rows(gae(rewards, values, batch.lengths, gamma=self.gamma, lam=self.lam))

    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        """The policy loss and the critic's loss."""
        assert outputs.values is not None and batch.old_values is not None and batch.returns is not None
        loss = super().loss(batch, outputs)
        loss_mask = batch.loss_mask
        errors = clipped_value(
            outputs.values[loss_mask],
            batch.old_values[loss_mask],
            batch.returns[loss_mask],
            clip=self.value_clip or math.inf,
        )
        term = Term(values=self.value_coefficient * errors, unit="token", trains="critic")
        metrics = {
            "value_loss": errors.detach(),
            "value": outputs.values[loss_mask].detach(),
            "return": batch.returns[loss_mask],
        }
        return Loss(terms=(*loss.terms, term), metrics=loss.metrics | metrics)


ALGORITHM = PPO
