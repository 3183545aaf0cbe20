"""Direct preference optimisation (arXiv 2305.18290): the language model is its own reward model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from alignment.algorithms import ReferencedAlgorithm, check_preference
from alignment.batch import Batch, Loss, Outputs, Term
from alignment.groups import Group
from alignment.losses import chosen_likelihood, hinge_preference, ipo_preference, sigmoid_preference
from alignment.settings.section import NonNegative, Positive


class DPO(ReferencedAlgorithm):
    """Raises β(log π − log π_ref) of the chosen completion above that of the rejected one, for each pair of a group.

    All pairs of a step have the same weight. So a prompt with K ranked answers, which has K(K − 1)/2 pairs, weighs as
    much as that many prompts with two answers.
    """

    name: Literal["dpo"] = "dpo"
    """Direct preference optimisation and its relatives."""
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """`sigmoid` is DPO itself; `ipo` (arXiv 2310.12036) bounds the margin; `hinge` (arXiv 2305.10425) stops at it."""
    beta: Positive = 0.1
    """Strength of the pull towards the reference, > 0; usually 0.01 to 0.5. For `ipo`, it is the paper's τ."""
    rpo_alpha: NonNegative = 0.0
    """Weight of the chosen completion's mean negative log-likelihood per token, added to the loss of every pair (RPO,
    arXiv 2404.19733), ≥ 0. It keeps good answers likely while the margin grows; the paper takes 1. 0 is DPO alone."""

    def select(self, group: Group) -> Group:
        """Keeps groups with at least one pair."""
        check_preference(self.name, group)
        return group

    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        """The preference loss of each pair."""
        assert batch.reference_logprobs is not None, "the loop annotates the batches of a ReferencedAlgorithm"
        chosen_index, rejected_index = batch.pairs.unbind(1)
        logps = batch.per_completion(outputs.logprobs)
        logratios = logps - batch.per_completion(batch.reference_logprobs)
        rewards = self.beta * logratios.detach()
        margins = rewards[chosen_index] - rewards[rejected_index]
        loss = self._loss(batch, logratios)
        if self.rpo_alpha > 0:
            loss = loss + self.rpo_alpha * chosen_likelihood(logps[chosen_index], batch.lengths[chosen_index])
        return Loss(
            terms=(Term(values=loss, unit="pair"),),
            metrics={
                "rewards/chosen": rewards[chosen_index],
                "rewards/rejected": rewards[rejected_index],
                "rewards/margins": margins,
                "rewards/accuracies": margins.sign() / 2 + 0.5,  # a tie is half right
                "logps/chosen": logps[chosen_index].detach(),
                "logps/rejected": logps[rejected_index].detach(),
            },
        )

    def _loss(self, batch: Batch, logratios: Tensor) -> Tensor:
        """[M] loss of each pair, from the [N] summed log-ratios of the completions (nats)."""
        chosen_index, rejected_index = batch.pairs.unbind(1)
        if self.loss_type == "ipo":
            means = logratios / batch.per_completion(torch.ones_like(batch.loss_mask, dtype=logratios.dtype))
            return ipo_preference(means[chosen_index] - means[rejected_index], beta=self.beta)
        loss = sigmoid_preference if self.loss_type == "sigmoid" else hinge_preference
        return loss(logratios[chosen_index] - logratios[rejected_index], beta=self.beta)


ALGORITHM = DPO
