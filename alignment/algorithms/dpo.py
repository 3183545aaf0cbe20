"""Direct preference optimisation (arXiv 2305.18290): the language model is its own reward model."""

from __future__ import annotations

from typing import Literal, cast

import torch
from pydantic import field_validator
from torch import Tensor

from alignment.algorithms import ReferencedAlgorithm, check_preference
from alignment.batch import Batch, Loss, Outputs, Term
from alignment.groups import Group
from alignment.losses.preference import PREFERENCE_LOSSES, Pairs, PreferenceLoss, Side
from alignment.settings.plugins import load_plugin
from alignment.settings.section import NonNegative, Positive, as_value_error


class DPO(ReferencedAlgorithm):
    """Raises β(log π − log π_ref) of the chosen completion above that of the rejected one, for each pair of a group.

    All pairs of a step have the same weight. So a prompt with K ranked answers, which has K(K − 1)/2 pairs, weighs as
    much as that many prompts with two answers.
    """

    name: Literal["dpo"] = "dpo"
    """Direct preference optimisation and its relatives."""
    loss_type: str | dict[str, Positive] = "sigmoid"
    """`sigmoid` is DPO itself; `ipo` (arXiv 2310.12036) bounds the margin; `hinge` (arXiv 2305.10425) stops at it;
    `sft` is the chosen completion's mean negative log-likelihood per token. Or one's own, as `package.module:function`;
    or a weighted sum of several, as `{sigmoid: 1.0, sft: 0.2}`. `loss` is another name for this key."""
    beta: Positive = 0.1
    """Strength of the pull towards the reference, > 0; usually 0.01 to 0.5. For `ipo`, it is the paper's τ."""
    rpo_alpha: NonNegative = 0.0
    """Weight of the chosen completion's mean negative log-likelihood per token, added to the loss of every pair (RPO,
    arXiv 2404.19733), ≥ 0. It keeps good answers likely while the margin grows; the paper takes 1. 0 is DPO alone."""

    def select(self, group: Group) -> Group:
        """Keeps groups with at least one pair."""
        check_preference(self.name, group)
        return group

    @field_validator("loss_type")
    @classmethod
    def _names_losses(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        if not value:
            raise ValueError("at least one loss is wanted")
        for name in [value] if isinstance(value, str) else value:
            with as_value_error():
                preference_loss(name)
        return value

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss by its name, with `rpo_alpha` as that of `sft`."""
        weights = {self.loss_type: 1.0} if isinstance(self.loss_type, str) else dict(self.loss_type)
        if self.rpo_alpha:
            weights["sft"] = weights.get("sft", 0.0) + self.rpo_alpha
        return weights

    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        """The weighted sum of the losses of each pair."""
        pairs = pairs_of(batch, outputs.logprobs)
        losses = [weight * preference_loss(name)(pairs, beta=self.beta) for name, weight in self.loss_weights.items()]
        chosen_rewards = self.beta * pairs.chosen.logratios.detach()
        rejected_rewards = self.beta * pairs.rejected.logratios.detach()
        margins = chosen_rewards - rejected_rewards
        return Loss(
            terms=(Term(values=torch.stack(losses).sum(0), unit="pair"),),
            metrics={
                "rewards/chosen": chosen_rewards,
                "rewards/rejected": rejected_rewards,
                "rewards/margins": margins,
                "rewards/accuracies": margins.sign() / 2 + 0.5,  # a tie is half right
                "logps/chosen": pairs.chosen.logprobs.detach(),
                "logps/rejected": pairs.rejected.logprobs.detach(),
            },
        )


def preference_loss(name: str) -> PreferenceLoss:
    """Finds a loss by its name, or by a dotted `package.module:function`.

    Raises:
        ConfigError: there is no such loss; the nearest one is named.
    """
    return cast(PreferenceLoss, load_plugin(name, PREFERENCE_LOSSES, "loss", callable_only=True))


def pairs_of(batch: Batch, logprobs: Tensor) -> Pairs:
    """Both sides of every pair of a batch.

    Args:
        logprobs: [T] log-probability (nats) of each trained token under the actor.
    """
    assert batch.reference_logprobs is not None, "the loop annotates the batches of a ReferencedAlgorithm"
    logps = batch.per_completion(logprobs)
    reference_logps = batch.per_completion(batch.reference_logprobs)
    lengths = batch.lengths
    chosen, rejected = (
        Side(logprobs=logps[index], reference_logprobs=reference_logps[index], lengths=lengths[index])
        for index in batch.pairs.unbind(1)
    )
    return Pairs(chosen=chosen, rejected=rejected)


ALGORITHM = DPO
