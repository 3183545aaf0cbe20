"""Losses of a policy and its critic, per token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k2", "k3", "k3_plain"]

LARGEST_LOGRATIO = 20.0
"""Log-ratios (nats) are limited to ± this before the exponential: e²⁰ is finite, and far above any clipping."""


def clipped_policy(logratio: Tensor, advantages: Tensor, *, low: float, high: float) -> Tensor:
    """PPO's loss, −min(r·A, clip(r, 1 − low, 1 + high)·A) with r = exp(logratio): equation 7 of arXiv 1707.06347.

    Different bounds below and above are the clip-higher of arXiv 2503.14476.

    Args:
        logratio: [n] log π − log π_old of each action (nats).
        advantages: [n] advantage of each action.
        low: how far the ratio may fall below 1 before the gradient is 0.
        high: how far the ratio may rise above 1 before the gradient is 0.

    Returns:
        [n] loss of each action; its gradient is −A·∇log π where the ratio is 1.
    """
    ratio = logratio.clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """A critic's loss, ½·max((v − R)², (v_clipped − R)²), where v_clipped differs by at most `clip` from the old value.

    It is the loss in the published code of arXiv 2005.12729. Because of the maximum, clipping never lowers the loss.

    Args:
        values: [n] value of each state by the critic now.
        old_values: [n] value of each state by the critic before the update.
        returns: [n] return of each state, which the critic should predict.
        clip: largest difference from the old value, > 0; infinity never clips.

    Returns:
        [n] loss of each state.
    """
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped_values - returns).square())


def kl_penalty(logratio: Tensor, *, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from π's own samples, to be minimised.

    J. Schulman named the estimators ("Approximating KL Divergence", 2020).

    `k2` is ½·logratio²; in expectation its gradient is that of the KL divergence. `k3` is exp(−logratio) − 1 +
    logratio; its value is unbiased and never negative, but its gradient is that of another divergence. So `k3` here
    has the value of k3 and the gradient of k2, and `k3_plain` has both of k3, as GRPO was published (arXiv 2402.03300,
    equation 4).

    Args:
        logratio: [n] log π − log π_ref of each sampled token (nats), differentiable in π.
        estimator: the name of the estimator.

    Returns:
        [n] estimates (nats), ≥ 0.
    """
    logratio = logratio.clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO)
    k2 = 0.5 * logratio.square()
    if estimator == "k2":
        return k2
    k3 = torch.exp(-logratio) - 1 + logratio
    return k3 if estimator == "k3_plain" else k2 + (k3 - k2).detach()
