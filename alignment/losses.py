"""Losses as pure functions of tensors, per pair or per token; reduction is the update's business."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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
