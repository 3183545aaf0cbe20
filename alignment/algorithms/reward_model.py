"""Reward modelling (arXiv 2203.02155): a score for every completion, from which of two people preferred."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from alignment.algorithms import Algorithm, check_preference
from alignment.batch import Batch, Loss, Outputs, Term
from alignment.groups import Group
from alignment.losses import pairwise_reward
from alignment.settings.section import NonNegative


class RewardModelTraining(Algorithm):
    """Raises the score of the better completion above that of the worse one, for every pair of a group.

    Every pair of a step counts alike, so a prompt with K ranked answers weighs K(K − 1)/2 times a prompt with two. The
    paper divides by that number, so that prompts count alike; here ranking more answers teaches more.
    """

    head: ClassVar[Literal["language", "score"]] = "score"

    name: Literal["reward_model"] = "reward_model"
    """A Bradley–Terry reward model."""
    centre: NonNegative = 0.0
    """Weight of (better + worse)², which keeps scores around 0 (arXiv 2312.09244); 0 leaves their level free."""

    def select(self, group: Group) -> Group:
        check_preference(self.name, group)
        return group

    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        assert outputs.scores is not None, "the loop gives scores to algorithms whose head is `score`"
        better, worse = (outputs.scores[side] for side in batch.pairs.unbind(1))
        loss = pairwise_reward(better, worse)
        if self.centre:
            loss = loss + self.centre * (better + worse).square()
        return Loss(terms=(Term(values=loss, unit="pair"),), metrics=self._metrics(batch, outputs.scores.detach()))

    def _metrics(self, batch: Batch, scores: Tensor) -> dict[str, Tensor]:
        better, worse = batch.pairs.unbind(1)
        margins = scores[better] - scores[worse]
        accuracies = margins.sign() / 2 + 0.5  # a tie is half right
        lengths = batch.per_completion(torch.ones_like(batch.learned, dtype=torch.float32))
        longer = lengths[better] - lengths[worse]
        return {
            "rewards/chosen": scores[better],
            "rewards/rejected": scores[worse],
            "rewards/margins": margins,
            "rewards/accuracies": accuracies,
            # A model that only counts words is right in one of these and wrong in the other.
            "rewards/accuracies_chosen_longer": accuracies[longer > 0],
            "rewards/accuracies_chosen_shorter": accuracies[longer < 0],
            "scores/mean": scores,
            "scores/mean_square": scores.square(),
        }


ALGORITHM = RewardModelTraining
