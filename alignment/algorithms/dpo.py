"""Direct preference optimisation (arXiv 2305.18290): the language model is its own reward model."""

from __future__ import annotations

from typing import Literal, Self, cast

import torch
from pydantic import field_validator, model_validator
from torch import Tensor

from alignment.algorithms import ReferencedAlgorithm, check_preference
from alignment.batch import Batch, Loss, Outputs, Term
from alignment.errors import ConfigError
from alignment.groups import Group
from alignment.losses.preference import PREFERENCE_LOSSES, Pairs, PreferenceLoss, Side
from alignment.losses.trial import check_losses, try_preference_loss
from alignment.settings.plugins import load_plugin
from alignment.settings.section import NonNegative, Positive, as_value_error, problem_of_key


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

    @model_validator(mode="after")
    def _tries_own_losses(self) -> Self:
        """Calls every loss of one's own once, with the `beta` of the run."""
        for name in self.loss_weights:
            if ":" in name:
                try:
                    try_preference_loss(name, preference_loss(name), beta=self.beta)
                except ConfigError as error:
                    raise problem_of_key(type(self), "loss_type", str(error), self.loss_weights) from error
        return self

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss by its name, with `rpo_alpha` as that of `sft`."""
        weights = {self.loss_type: 1.0} if isinstance(self.loss_type, str) else dict(self.loss_type)
        if self.rpo_alpha:
            weights["sft"] = weights.get("sft", 0.0) + self.rpo_alpha
        return weights

    @property
    def loss_metrics(self) -> dict[str, str]:
        """Metric of each loss, with its name: a loss of one's own is called without its module, if that is enough."""
        names = list(self.loss_weights)
        short_names = [name.rpartition(":")[2] for name in names]
        return {
            f"loss/{short_name if short_names.count(short_name) == 1 else name}": name
            for name, short_name in zip(names, short_names, strict=True)
        }

    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        """The weighted sum of the losses of each pair; if there are several, each one is a metric too."""
        pairs = pairs_of(batch, outputs.logprobs)
        losses = {name: self._losses_of(name, pairs) for name in self.loss_weights}
        weighted_losses = [weight * losses[name] for name, weight in self.loss_weights.items()]
        chosen_rewards = self.beta * pairs.chosen.logratios.detach()
        rejected_rewards = self.beta * pairs.rejected.logratios.detach()
        margins = chosen_rewards - rejected_rewards
        metrics = dict(zip(self.loss_metrics, (values.detach() for values in losses.values()), strict=True))
        return Loss(
            terms=(Term(values=torch.stack(weighted_losses).sum(0), unit="pair"),),
            metrics={
                **(metrics if len(losses) > 1 else {}),
                "rewards/chosen": chosen_rewards,
                "rewards/rejected": rejected_rewards,
                "rewards/margins": margins,
                "rewards/accuracies": margins.sign() / 2 + 0.5,  # a tie is half right
                "logps/chosen": pairs.chosen.logprobs.detach(),
                "logps/rejected": pairs.rejected.logprobs.detach(),
            },
        )

    def _losses_of(self, name: str, pairs: Pairs) -> Tensor:
        """[M] of one of the losses."""
        losses = preference_loss(name)(pairs, beta=self.beta)
        check_losses(name, losses, num_pairs=len(pairs.chosen.lengths))
        return losses


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
