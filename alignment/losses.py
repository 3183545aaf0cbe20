"""Losses as pure functions of tensors, per pair or per token; reduction is the update's business."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

KLEstimator = Literal["k2", "k3", "k3_plain"]

LARGEST_LOGRATIO = 20.0
"""Log-ratios are cut to ± this (nats) before they are exponentiated: e²⁰ is far above any clipping, and finite."""


def sigmoid_preference(logratio_gap: Tensor, *, beta: float) -> Tensor:
    """DPO's loss, -log σ(β·gap): equation 7 of arXiv 2305.18290.

    Args:
        logratio_gap: [M] (log π − log π_ref) of the better completion minus that of the worse one, summed over
            tokens (nats).
        beta: strength of the pull towards the reference, > 0.

    Returns:
        [M] loss of each pair (nats); log 2 where the gap is 0.
    """
    return -logsigmoid(beta * logratio_gap)


def ipo_preference(mean_logratio_gap: Tensor, *, beta: float) -> Tensor:
    """IPO's loss, (gap − 1/(2β))²: equation 17 of arXiv 2310.12036.

    Args:
        mean_logratio_gap: [M] difference of the per-token *means* of log π − log π_ref between the better and the
            worse completion (nats per token); sums would tie the target to the length of the answers.
        beta: the paper's τ, > 0.

    Returns:
        [M] loss of each pair (nats² per token²).
    """
    return (mean_logratio_gap - 1 / (2 * beta)).square()


def hinge_preference(logratio_gap: Tensor, *, beta: float) -> Tensor:
    """SLiC's loss on DPO's margin, max(0, 1 − β·gap): arXiv 2305.10425, as normalised in arXiv 2309.06657.

    Args:
        logratio_gap: [M] as in `sigmoid_preference` (nats).
        beta: reciprocal of the margin, > 0.

    Returns:
        [M] loss of each pair; 0 where the margin is kept.
    """
    return torch.relu(1 - beta * logratio_gap)


def chosen_likelihood(logps: Tensor, lengths: Tensor) -> Tensor:
    """The term that RPO adds to DPO's loss, −log π(chosen) / |chosen|: equation 2 of arXiv 2404.19733.

    DPO alone widens a gap, and may do so while both answers become less likely; this term keeps the chosen one likely.

    Args:
        logps: [M] log-probability (nats) of the chosen completion of each pair, summed over its tokens.
        lengths: [M] number of those tokens, > 0.

    Returns:
        [M] mean negative log-probability of a token (nats).
    """
    return -logps / lengths


def pairwise_reward(better: Tensor, worse: Tensor) -> Tensor:
    """A reward model's Bradley–Terry loss, −log σ(better − worse): equation 1 of arXiv 2203.02155.

    Args:
        better, worse: [M] scores of the two completions of each pair.

    Returns:
        [M] loss of each pair (nats); log 2 where both are equal.
    """
    return -logsigmoid(better - worse)


def clipped_policy(logratio: Tensor, advantages: Tensor, *, low: float, high: float) -> Tensor:
    """PPO's loss, −min(r·A, clip(r, 1 − low, 1 + high)·A) with r = exp(logratio): equation 7 of arXiv 1707.06347.

    Different bounds below and above are the clip-higher of arXiv 2503.14476.

    Args:
        logratio: [n] log π − log π_old of each action (nats).
        advantages: [n] of each action.
        low, high: how far the ratio may go below and above 1 before the gradient stops.

    Returns:
        [n] loss of each action; its gradient is −A·∇log π where the ratio is 1.
    """
    ratio = logratio.clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """A critic's loss, ½·max((v − R)², (v_clipped − R)²), where v_clipped is at most `clip` from the old value.

    As in the published code of arXiv 2005.12729; the larger of the two keeps the bound one-sided.

    Args:
        values: [n] what the critic says now.
        old_values: [n] what it said before the update.
        returns: [n] what it should say.
        clip: > 0; infinite never clips.

    Returns:
        [n] loss of each state.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def kl_penalty(logratio: Tensor, *, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from π's own samples, to be minimised.

    The estimators' names are J. Schulman's ("Approximating KL Divergence", 2020).

    `k2` is ½·logratio², whose gradient is that of the KL divergence in expectation. `k3` is exp(−logratio) − 1 +
    logratio: unbiased and never negative in value, but its own gradient is another divergence's. So `k3` here has
    k3's value and k2's gradient; `k3_plain` has both of k3, as GRPO was published (arXiv 2402.03300, equation 4).

    Args:
        logratio: [n] log π − log π_ref of each sampled token (nats), differentiable in π.

    Returns:
        [n] estimates (nats), ≥ 0.
    """
    logratio = logratio.clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO)
    k2 = 0.5 * logratio.square()
    if estimator == "k2":
        return k2
    k3 = torch.exp(-logratio) - 1 + logratio
    return k3 if estimator == "k3_plain" else k2 + (k3 - k2).detach()
