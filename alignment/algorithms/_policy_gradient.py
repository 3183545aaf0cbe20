"""What PPO and its relatives share: rewards of the model's own answers become advantages, and those a clipped loss.

old and sampled log-probabilities ─► correction of what the sampler did differently ─┐
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
from alignment.losses import LARGEST_LOGRATIO, KLEstimator, clipped_policy, kl_penalty
from alignment.settings.section import Fraction, NonNegative, Positive, PositiveCount

LARGEST_CHANGE = 0.2
"""An adaptive KL coefficient moves as if the measured KL were at most this fraction from its target."""


class PolicyGradient(ReferencedAlgorithm):
    """Answers prompts, has the answers judged, and makes the better ones more probable."""

    samples: ClassVar[bool] = True
    tempered: ClassVar[bool] = True

    reference: Literal["auto", "adapter_off", "copy", "none"] = "auto"  # type: ignore[assignment]
    """Where log π_ref comes from: `adapter_off` (LoRA only), a frozen `copy`, or `none` to do without. `auto` is
    `adapter_off` with LoRA, else `copy`."""
    epochs_per_step: PositiveCount = 1
    """Passes over each step's rollouts."""
    minibatches_per_epoch: PositiveCount = 1
    """Optimizer steps in each pass; every one sees a different part of the prompts."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """How far the ratio to the old policy may fall below 1 before its gradient stops, 0 to 1."""
    clip_high: Positive = 0.2
    """How far it may rise above 1; more than `clip_low` lets improbable tokens grow (DAPO takes 0.28)."""
    ratio_per: Literal["token", "sequence", "sequence_mean"] = "token"
    """What is clipped: the ratio of each token, of the whole completion, or the completion's geometric mean (GSPO,
    arXiv 2507.18071)."""
    loss_per: Literal["token", "completion", "constant"] = "token"
    """Who weighs the same: every token of the step (DAPO), every completion (GRPO as published), or every token, over
    a constant number of them per completion (Dr. GRPO). Only for `ratio_per: token`."""
    tokens_per_completion: PositiveCount | None = None
    """The constant of `loss_per: constant`; usually `rollout.max_tokens`."""
    kl_in: Literal["reward", "loss", "none"] = "loss"
    """Where the divergence from the reference is paid: per token in the `reward`, or as a term of the `loss`."""
    kl_coefficient: NonNegative = 0.05
    """Price of a nat of divergence, ≥ 0."""
    kl_estimator: KLEstimator = "k3"
    """Of the loss term: `k2`; `k3`, with k3's value and k2's gradient; `k3_plain`, as GRPO was published."""
    kl_target: NonNegative = 0.0
    """Divergence (nats per completion) to which the price adapts, as in arXiv 1909.08593; 0 keeps the price."""
    kl_horizon: Positive = 10000.0
    """Completions over which an adapting price can change by a factor of about e^0.2."""
    entropy_coefficient: NonNegative = 0.0
    """Bonus for a nat of entropy, ≥ 0."""
    correction: Literal["token", "sequence", "none"] = "token"
    """How differences between trainer and sampler are mended: each token's loss is weighted by π_old/π_sampler, cut to
    `max_correction` (with a `ratio_per` of sequences, by the mean of its tokens' weights); or completions are left out
    whose mean ratio is not within a factor of it; or not at all."""
    max_correction: Annotated[float, Field(gt=1)] = 2.0
    """Bound of the correction, > 1."""
    truncated: Literal["keep", "mask", "penalise"] = "keep"
    """What becomes of completions that ended for lack of room: learned like the others, not at all (they still count in
    the average of their prompt), or with `truncated_penalty` taken from their reward."""
    truncated_penalty: NonNegative = 1.0
    """See `truncated`."""
    reward_clip: NonNegative = 0.0
    """Rewards are cut to ± this; 0 leaves them."""
    normalise_rewards: bool = False
    """Shift and scale each step's rewards to mean 0 and variance 1, after `truncated_penalty`, before `reward_clip`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.loss_per == "constant") != (self.tokens_per_completion is not None):
            raise ValueError("loss_per constant and tokens_per_completion go together: give both or neither")
        if self.ratio_per != "token" and self.loss_per == "constant":
            raise ValueError(f"ratio_per {self.ratio_per} has one loss per completion; leave loss_per out")
        if self.reference == "none" and self.kl_in != "none":
            raise ValueError(f"kl_in {self.kl_in} needs a reference; set kl_in to none too")
        if self.kl_target and self.kl_in == "none":
            raise ValueError("kl_target has no price to adapt: kl_in is none")
        if self.kl_target and not self.kl_coefficient:
            raise ValueError("kl_target changes the price by a factor, and kl_coefficient is 0; start from e.g. 0.05")
        return self

    @abstractmethod
    def advantages(self, batch: Batch) -> Tensor:
        """[T] fp32 advantage of every learned token, from the shaped rewards of the whole global batch."""

    @property
    def epochs(self) -> int:
        return self.epochs_per_step

    @property
    def minibatches(self) -> int:
        return self.minibatches_per_epoch

    @property
    def needs_old(self) -> bool:
        return self.epochs_per_step * self.minibatches_per_epoch > 1 or self.kl_in == "reward"

    @property
    def wants_entropy(self) -> bool:
        return True

    @property
    def first_kl_coefficient(self) -> float:
        return self.kl_coefficient if self.kl_in != "none" else 0.0

    def select(self, group: Group) -> Group:
        if not group.prompt:
            raise DataError(f"{self.name} needs a prompt to answer; this row has none")
        return dataclasses.replace(group, completions=())

    def prepare(self, batch: Batch) -> Batch:
        rewards = batch.rewards
        if self.truncated == "penalise":
            rewards = rewards - self.truncated_penalty * batch.truncated
        if self.normalise_rewards:
            rewards = whiten(rewards)
        if self.reward_clip:
            rewards = rewards.clamp(-self.reward_clip, self.reward_clip)
        batch = dataclasses.replace(batch, rewards=rewards)
        advantages = self.advantages(batch)
        if self.truncated == "mask":  # only now: what they are worth still tells what is usual for their prompt
            kept = ~batch.truncated[batch.branches] | (batch.branches < 0)
            batch = dataclasses.replace(batch, learned=batch.learned & kept)
        return dataclasses.replace(batch, advantages=batch.on_learned(advantages[batch.learned]))

    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        assert batch.advantages is not None and outputs.entropies is not None, "the loop prepares and asks for both"
        old = outputs.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        logratio = outputs.logprobs - old
        metrics = {
            "entropy": outputs.entropies[batch.learned].detach(),
            "ratio": logratio.detach()[batch.learned].clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO).exp(),
        }
        if batch.reference_logprobs is not None:
            metrics["kl"] = batch.per_completion(old - batch.reference_logprobs)[batch.lengths > 0]
        weights = self._correction(batch, old, metrics)
        terms = [self._policy(batch, logratio, weights, metrics)]
        if batch.reference_logprobs is not None:
            terms += self._divergence(batch, outputs.logprobs - batch.reference_logprobs)
        if self.entropy_coefficient:
            terms.append(self._reduced(batch, -self.entropy_coefficient * outputs.entropies))
        return Loss(terms=tuple(terms), metrics=metrics)

    def next_kl_coefficient(self, now: float, *, kl: float, completions: int) -> float:
        if not self.kl_target:
            return now
        error = max(-LARGEST_CHANGE, min(LARGEST_CHANGE, kl / self.kl_target - 1))
        return now * math.exp(error * completions / self.kl_horizon)  # never negative, however short the horizon

    def token_rewards(self, batch: Batch) -> Tensor:
        """[T] reward of every action: the price of its divergence, if `kl_in` is reward, and the completion's reward
        at its last token."""
        rewards = batch.at_the_end(batch.rewards)
        if self.kl_in == "reward":
            assert batch.old_logprobs is not None and batch.reference_logprobs is not None, "both are annotated"
            divergence = batch.old_logprobs - batch.reference_logprobs
            rewards -= batch.kl_coefficient * batch.on_learned(divergence[batch.learned])
        return rewards

    def _correction(self, batch: Batch, old: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """[T] weight of every token for what the sampler did differently; what it measures goes into `metrics`."""
        weights = batch.learned.float()
        if batch.sampled_logprobs is None:
            return weights
        gap = old - batch.sampled_logprobs
        ratio = gap.clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO).exp()
        metrics["mismatch/mean_abs"] = gap[batch.learned].abs()
        metrics["mismatch/kl"] = (ratio - 1 - gap)[batch.learned]  # KL(sampler ‖ trainer), by k3
        metrics["mismatch/kl_reverse"] = (ratio * gap - ratio + 1)[batch.learned]
        metrics["mismatch/ratio"] = ratio[batch.learned]
        if self.correction == "token":
            return weights * ratio.clamp(max=self.max_correction)
        if self.correction == "sequence":
            mean = batch.per_completion(gap) / batch.lengths.clamp(min=1)
            within = (mean.abs() <= torch.tensor(self.max_correction).log()).float()
            metrics["mismatch/left_out"] = 1 - within
            return batch.of_completions(within)
        return weights

    def _policy(self, batch: Batch, logratio: Tensor, weights: Tensor, metrics: dict[str, Tensor]) -> Term:
        assert batch.advantages is not None
        if self.ratio_per == "token":
            learned = batch.learned
            loss = clipped_policy(logratio[learned], batch.advantages[learned], low=self.clip_low, high=self.clip_high)
            self._note_clipped(logratio[learned], batch.advantages[learned], metrics)
            metrics["policy_loss"] = loss.detach()
            return self._reduced(batch, batch.on_learned(loss * weights[learned]))
        lengths = batch.lengths.clamp(min=1)
        whole = batch.per_completion(logratio)
        if self.ratio_per == "sequence_mean":
            whole = whole / lengths
        advantages = batch.per_completion(batch.advantages) / lengths
        loss = clipped_policy(whole, advantages, low=self.clip_low, high=self.clip_high)
        self._note_clipped(whole, advantages, metrics)
        metrics["policy_loss"] = loss.detach()
        return Term(values=loss * batch.per_completion(weights) / lengths, unit="completion")

    def _note_clipped(self, logratio: Tensor, advantages: Tensor, metrics: dict[str, Tensor]) -> None:
        ratio = logratio.detach().exp()
        outside = ((ratio < 1 - self.clip_low) & (advantages < 0)) | ((ratio > 1 + self.clip_high) & (advantages > 0))
        metrics["clip_ratio"] = outside.float()

    def _divergence(self, batch: Batch, logratio: Tensor) -> list[Term]:
        """`logratio`: [T] log π − log π_ref (nats)."""
        if self.kl_in != "loss" or not batch.kl_coefficient:
            return []
        return [self._reduced(batch, batch.kl_coefficient * kl_penalty(logratio, estimator=self.kl_estimator))]

    def _reduced(self, batch: Batch, values: Tensor) -> Term:
        """The term of [T] losses in the unit that `loss_per` asks for."""
        if self.ratio_per == "token" and self.loss_per == "token":
            return Term(values=values[batch.learned], unit="token")
        sums = batch.per_completion(values)
        return Term(values=sums / (self.tokens_per_completion or batch.lengths.clamp(min=1)), unit="completion")


class Discounted(PolicyGradient):
    """A policy gradient whose rewards fall on single tokens."""

    gamma: Fraction = 1.0
    """Discount of the future per token, 0 to 1."""
