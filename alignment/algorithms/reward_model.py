"""Reward modelling (arXiv 2203.02155): a model learns a score for each completion from people's preferences."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from alignment.algorithms import Algorithm, check_preference
from alignment.batch import Batch, Loss, Outputs, Term
from alignment.groups import Group
from alignment.losses.reward import pairwise_reward
from alignment.settings.section import NonNegative


class RewardModelTraining(Algorithm):
    """Raises the score of the chosen completion above that of the rejected one, for each pair of a group.

    All pairs of a step have the same weight, so a prompt with K ranked answers weighs K(K − 1)/2 times as much as a
    prompt with two. The paper divides by that number, so that all prompts have the same weight.
    """

    head: ClassVar[Literal["language", "score"]] = "score"

    name: Literal["reward_model"] = "reward_model"
    """A Bradley–Terry reward model."""
    centre: NonNegative = 0.0
    """Weight of (chosen + rejected)², which keeps scores around 0 (arXiv 2312.09244); 0 leaves their level free."""

    def select(self, group: Group) -> Group:
        """Keeps groups with at least one pair."""
        check_preference(self.name, group)
        return group

    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        """The Bradley–Terry loss of each pair."""
        assert outputs.scores is not None, "the loop gives scores to algorithms whose head is `score`"
        chosen_scores, rejected_scores = (outputs.scores[side] for side in batch.pairs.unbind(1))
        loss = pairwise_reward(chosen_scores, rejected_scores)
        if self.centre:
            loss = loss + self.centre * (chosen_scores + rejected_scores).square()
        return Loss(terms=(Term(values=loss, unit="pair"),), metrics=self._metrics(batch, outputs.scores.detach()))

    def _metrics(self, batch: Batch, scores: Tensor) -> dict[str, Tensor]:
        chosen_index, rejected_index = batch.pairs.unbind(1)
        margins = scores[chosen_index] - scores[rejected_index]
        accuracies = margins.sign() / 2 + 0.5  # a tie is half right
        lengths = batch.per_completion(torch.ones_like(batch.loss_mask, dtype=torch.float32))
        longer = lengths[chosen_index] - lengths[rejected_index]
        return {
            "rewards/chosen": scores[chosen_index],
            "rewards/rejected": scores[rejected_index],
            "rewards/margins": margins,
            "rewards/accuracies": accuracies,
            # A model that only counts words has a high accuracy in one of these and a low one in the other.
            "rewards/accuracies_chosen_longer": accuracies[longer > 0],
            "rewards/accuracies_chosen_shorter": accuracies[longer < 0],
            "scores/mean": scores,
            "scores/mean_square": scores.square(),
        }


ALGORITHM = RewardModelTraining
