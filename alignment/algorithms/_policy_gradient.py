"""The common part of PPO and its relatives: rewards become advantages, and advantages a clipped policy loss.

old and sampled log-probabilities ─► importance correction ──────────────────────────┐
rewards ─► shaping ─► advantages ─► clipped policy loss ◄── ratio to the old policy ─┴─► + KL + entropy
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from alignment.advantages import whiten
from alignment.algorithms import ReferencedAlgorithm
from alignment.batch import Batch, Loss, Outputs, Term
from alignment.errors import DataError
from alignment.groups import Group
from alignment.losses.policy import LARGEST_LOGRATIO, KLEstimator, clipped_policy, kl_penalty
from alignment.settings.section import Fraction, NonNegative, Positive, PositiveCount

LARGEST_CHANGE = 0.2
"""An adaptive KL coefficient changes as if the measured KL were at most this fraction away from its target."""


class PolicyGradient(ReferencedAlgorithm):
    """An algorithm that samples answers to prompts, has them scored, and makes the better ones more probable."""

    is_online: ClassVar[bool] = True
    uses_sampling_temperature: ClassVar[bool] = True

    reference: Literal["auto", "adapter_off", "copy", "none"] = "auto"  # type: ignore[assignment]
    """Where log π_ref comes from: `adapter_off` (LoRA only), a frozen `copy`, or `none` to do without. `auto` is
    `adapter_off` with LoRA, else `copy`."""
    epochs_per_step: PositiveCount = 1
    """Passes over each step's rollouts."""
    minibatches_per_epoch: PositiveCount = 1
    """Optimizer steps in each pass; each uses another part of the prompts."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """How far the ratio to the old policy may fall below 1 before its gradient stops, 0 to 1."""
    clip_high: Positive = 0.2
    """How far the ratio may rise above 1 before its gradient stops. A value above `clip_low` lets improbable tokens
    grow (DAPO takes 0.28)."""
    importance_level: Literal["token", "sequence", "sequence_mean"] = "token"
    """Which importance ratio is clipped: each token's, the whole completion's, or the completion's geometric mean
    (GSPO, arXiv 2507.18071)."""
    loss_aggregation: Literal["token", "completion", "constant"] = "token"
    """What the loss is averaged over: the tokens of the step (DAPO), the completions (GRPO as published), or a constant
    number of tokens per completion (Dr. GRPO). Only for `importance_level: token`."""
    tokens_per_completion: PositiveCount | None = None
    """The constant of `loss_aggregation: constant`; usually `rollout.max_tokens`."""
    kl_placement: Literal["reward", "loss", "none"] = "loss"
    """Where the divergence from the reference is penalised: per token in the `reward`, or as a term of the `loss`."""
    kl_coefficient: NonNegative = 0.05
    """Price of a nat of divergence, ≥ 0."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of the loss term: `k2`; `k3`, with k3's value and k2's gradient; or `k3_plain`, as GRPO's paper has
    it."""
    kl_target: NonNegative = 0.0
    """Divergence (nats per completion) to which the price adapts, as in arXiv 1909.08593; 0 keeps the price."""
    kl_horizon: Positive = 10000.0
    """Completions over which an adapting price can change by a factor of about e^0.2."""
    entropy_coefficient: NonNegative = 0.0
    """Bonus for a nat of entropy, ≥ 0."""
    importance_correction: Literal["token", "sequence", "none"] = "token"
    """How differences between trainer and sampler are corrected (truncated importance sampling). `token`: each token's
    loss is weighted by π_old/π_sampler, cut to `max_correction`; if `importance_level` is not `token`, each completion
    gets the mean of its tokens' weights. `sequence`: completions are left out whose mean ratio is not within a factor
    of `max_correction`. `none`: there is no correction."""
    max_correction: Annotated[float, Field(gt=1)] = 2.0
    """Bound of the importance correction, > 1."""
    truncated: Literal["keep", "mask", "penalise"] = "keep"
    """How truncated completions are treated. `keep`: like the others. `mask`: they are not trained on, but they count
    in the mean of their prompt. `penalise`: `truncated_penalty` is subtracted from their reward."""
    truncated_penalty: NonNegative = 1.0
    """See `truncated`."""
    reward_clip: NonNegative = 0.0
    """Rewards are cut to ± this; 0 leaves them."""
    normalise_rewards: bool = False
    """Shift and scale each step's rewards to mean 0 and variance 1, after `truncated_penalty`, before `reward_clip`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.loss_aggregation == "constant") != (self.tokens_per_completion is not None):
            raise ValueError("loss_aggregation constant and tokens_per_completion go together: give both or neither")
        if self.importance_level != "token" and self.loss_aggregation == "constant":
            raise ValueError(
                f"importance_level {self.importance_level} has one loss per completion; leave loss_aggregation out"
            )
        if self.reference == "none" and self.kl_placement != "none":
            raise ValueError(f"kl_placement {self.kl_placement} needs a reference; set kl_placement to none too")
        if self.kl_target and self.kl_placement == "none":
            raise ValueError("kl_target has no price to adapt: kl_placement is none")
        if self.kl_target and not self.kl_coefficient:
            raise ValueError("kl_target changes the price by a factor, and kl_coefficient is 0; start from e.g. 0.05")
        return self

    @abstractmethod
    def advantages(self, batch: Batch) -> Tensor:
        """[T] fp32 advantage of each trained token, from the shaped rewards of the global batch."""

    @property
    def epochs(self) -> int:
        """Passes over the groups of each step."""
        return self.epochs_per_step

    @property
    def minibatches(self) -> int:
        """Optimizer steps in each pass."""
        return self.minibatches_per_epoch

    @property
    def needs_old_logprobs(self) -> bool:
        """True if a step has several updates, or if rewards contain the divergence from the reference."""
        return self.epochs_per_step * self.minibatches_per_epoch > 1 or self.kl_placement == "reward"

    @property
    def needs_entropy(self) -> bool:
        """Always true: the entropy is reported, and may be in the loss."""
        return True

    @property
    def init_kl_coef(self) -> float:
        """The price of divergence in the first step; 0 without a penalty."""
        return self.kl_coefficient if self.kl_placement != "none" else 0.0

    def select(self, group: Group) -> Group:
        """Keeps the prompt alone, because the answers are sampled."""
        if not group.prompt:
            raise DataError(f"{self.name} needs a prompt to answer; this row has none")
        return dataclasses.replace(group, completions=())

    def prepare(self, batch: Batch) -> Batch:
        """Shapes the rewards, computes the advantages, and masks truncated completions if so configured."""
        rewards = batch.rewards
        if self.truncated == "penalise":
            rewards = rewards - self.truncated_penalty * batch.truncated
        if self.normalise_rewards:
            rewards = whiten(rewards)
        if self.reward_clip:
            rewards = rewards.clamp(-self.reward_clip, self.reward_clip)
        batch = dataclasses.replace(batch, rewards=rewards)
        advantages = self.advantages(batch)
        if self.truncated == "mask":  # after the advantages, in which their rewards count
            is_kept = ~batch.truncated[batch.completion_index] | (batch.completion_index < 0)
            batch = dataclasses.replace(batch, loss_mask=batch.loss_mask & is_kept)
        return dataclasses.replace(batch, advantages=batch.scatter(advantages[batch.loss_mask]))

    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        """The clipped policy loss, and the KL and entropy terms."""
        assert batch.advantages is not None and outputs.entropies is not None, "the loop prepares and asks for both"
        old_logprobs = outputs.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        logratio = outputs.logprobs - old_logprobs
        metrics = {
            "entropy": outputs.entropies[batch.loss_mask].detach(),
            "ratio": logratio.detach()[batch.loss_mask].clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO).exp(),
        }
        if batch.reference_logprobs is not None:
            metrics["kl"] = batch.per_completion(old_logprobs - batch.reference_logprobs)[batch.lengths > 0]
        weights = self._importance_weights(batch, old_logprobs, metrics)
        terms = [self._policy(batch, logratio, weights, metrics)]
        if batch.reference_logprobs is not None:
            terms += self._divergence(batch, outputs.logprobs - batch.reference_logprobs)
        if self.entropy_coefficient:
            terms.append(self._reduce(batch, -self.entropy_coefficient * outputs.entropies))
        return Loss(terms=tuple(terms), metrics=metrics)

    def next_kl_coefficient(self, kl_coefficient: float, *, kl: float, num_completions: int) -> float:
        """Moves the price of divergence towards `kl_target`, if there is a target."""
        if not self.kl_target:
            return kl_coefficient
        error = max(-LARGEST_CHANGE, min(LARGEST_CHANGE, kl / self.kl_target - 1))
        # A factor of exp never makes it negative, however short the horizon is.
        return kl_coefficient * math.exp(error * num_completions / self.kl_horizon)

    def token_rewards(self, batch: Batch) -> Tensor:
        """[T] reward of each token: minus the price of its divergence if `kl_placement` is `reward`, and at a
        completion's last token the completion's reward."""
        rewards = batch.at_last_token(batch.rewards)
        if self.kl_placement == "reward":
            assert batch.old_logprobs is not None and batch.reference_logprobs is not None, "both are annotated"
            divergence = batch.old_logprobs - batch.reference_logprobs
            rewards -= batch.kl_coefficient * batch.scatter(divergence[batch.loss_mask])
        return rewards

    def _importance_weights(self, batch: Batch, old_logprobs: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """[T] weight of each token that corrects for the sampler; adds the mismatch to `metrics`."""
        weights = batch.loss_mask.float()
        if batch.sampled_logprobs is None:
            return weights
        logratio = old_logprobs - batch.sampled_logprobs
        ratio = logratio.clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO).exp()
        metrics["mismatch/mean_abs"] = logratio[batch.loss_mask].abs()
        metrics["mismatch/kl"] = (ratio - 1 - logratio)[batch.loss_mask]  # KL(sampler ‖ trainer), by k3
        metrics["mismatch/kl_reverse"] = (ratio * logratio - ratio + 1)[batch.loss_mask]
        metrics["mismatch/ratio"] = ratio[batch.loss_mask]
        if self.importance_correction == "token":
            return weights * ratio.clamp(max=self.max_correction)
        if self.importance_correction == "sequence":
            mean_logratio = batch.per_completion(logratio) / batch.lengths.clamp(min=1)
            is_within = (mean_logratio.abs() <= torch.tensor(self.max_correction).log()).float()
            metrics["mismatch/left_out"] = 1 - is_within
            return batch.per_token(is_within)
        return weights

    def _policy(self, batch: Batch, logratio: Tensor, weights: Tensor, metrics: dict[str, Tensor]) -> Term:
        """The clipped policy loss, from [T] log-ratios to the old policy (nats) and [T] importance weights."""
        assert batch.advantages is not None
        if self.importance_level == "token":
            loss_mask = batch.loss_mask
            logratio, advantages = logratio[loss_mask], batch.advantages[loss_mask]
            loss = clipped_policy(logratio, advantages, low=self.clip_low, high=self.clip_high)
            self._add_clip_ratio(logratio, advantages, metrics)
            metrics["policy_loss"] = loss.detach()
            return self._reduce(batch, batch.scatter(loss * weights[loss_mask]))
        lengths = batch.lengths.clamp(min=1)
        sequence_logratio = batch.per_completion(logratio)
        if self.importance_level == "sequence_mean":
            sequence_logratio = sequence_logratio / lengths
        advantages = batch.per_completion(batch.advantages) / lengths
        loss = clipped_policy(sequence_logratio, advantages, low=self.clip_low, high=self.clip_high)
        self._add_clip_ratio(sequence_logratio, advantages, metrics)
        metrics["policy_loss"] = loss.detach()
        return Term(values=loss * batch.per_completion(weights) / lengths, unit="completion")

    def _add_clip_ratio(self, logratio: Tensor, advantages: Tensor, metrics: dict[str, Tensor]) -> None:
        """Adds to `metrics` where clipping stops the gradient."""
        ratio = logratio.detach().exp()
        is_below = (ratio < 1 - self.clip_low) & (advantages < 0)
        is_above = (ratio > 1 + self.clip_high) & (advantages > 0)
        metrics["clip_ratio"] = (is_below | is_above).float()

    def _divergence(self, batch: Batch, logratio: Tensor) -> list[Term]:
        """The KL term of the loss, or none, from [T] log π − log π_ref (nats)."""
        if self.kl_placement != "loss" or not batch.kl_coefficient:
            return []
        return [self._reduce(batch, batch.kl_coefficient * kl_penalty(logratio, estimator=self.kl_estimator))]

    def _reduce(self, batch: Batch, values: Tensor) -> Term:
        """Makes a term of [T] losses, in the unit that `loss_aggregation` names."""
        if self.importance_level == "token" and self.loss_aggregation == "token":
            return Term(values=values[batch.loss_mask], unit="token")
        sums = batch.per_completion(values)
        return Term(values=sums / (self.tokens_per_completion or batch.lengths.clamp(min=1)), unit="completion")


class Discounted(PolicyGradient):
    """A policy gradient algorithm that discounts the rewards of later tokens."""

    gamma: Fraction = 1.0
    """Discount of the future per token, 0 to 1."""
