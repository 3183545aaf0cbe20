"""Losses of preference, per pair: each a pure function of both sides. The table at the end gives them their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, kw_only=True)
class Side:
    """The chosen or the rejected completions of M pairs."""

    logprobs: Tensor
    """[M] log π (nats) of each completion, summed over its tokens."""
    reference_logprobs: Tensor
    """[M] log π_ref (nats) of each completion, summed over its tokens."""
    lengths: Tensor
    """[M] number of those tokens, > 0."""

    @property
    def logratios(self) -> Tensor:
        """[M] log π − log π_ref (nats)."""
        return self.logprobs - self.reference_logprobs


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Both sides of M pairs."""

    chosen: Side
    rejected: Side

    @property
    def logratio_gap(self) -> Tensor:
        """[M] log-ratio of the chosen completion minus that of the rejected one (nats)."""
        return self.chosen.logratios - self.rejected.logratios


class PreferenceLoss(Protocol):
    """What a loss of preference is called as."""

    def __call__(self, pairs: Pairs, *, beta: float) -> Tensor:
        """Returns the [M] loss of each pair; `beta` > 0 is the strength of the pull towards the reference."""


def sigmoid(pairs: Pairs, *, beta: float) -> Tensor:
    """DPO's loss, −log σ(β·gap): equation 7 of arXiv 2305.18290. It is log 2 where the gap is 0."""
    return -logsigmoid(beta * pairs.logratio_gap)


def ipo(pairs: Pairs, *, beta: float) -> Tensor:
    """IPO's loss, (gap − 1/(2β))²: equation 17 of arXiv 2310.12036, where β is τ.

    The gap is that of the per-token *means* of the log-ratios; sums would tie the target to the length of the answers.
    """
    chosen, rejected = (side.logratios / side.lengths for side in (pairs.chosen, pairs.rejected))
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge(pairs: Pairs, *, beta: float) -> Tensor:
    """SLiC's loss on DPO's margin, max(0, 1 − β·gap): arXiv 2305.10425, as normalised in arXiv 2309.06657.

    It is 0 where the margin is at least 1.
    """
    return torch.relu(1 - beta * pairs.logratio_gap)


def sft(pairs: Pairs, *, beta: float) -> Tensor:
    """The term that RPO adds to DPO's loss, −log π(chosen) / |chosen|: equation 2 of arXiv 2404.19733.

    DPO alone makes a gap wider, and may do so while both answers become less likely; this term keeps the chosen one
    likely. It does not depend on `beta`.
    """
    return -pairs.chosen.logprobs / pairs.chosen.lengths


PREFERENCE_LOSSES: Mapping[str, PreferenceLoss] = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge, "sft": sft}
"""Every loss by its name in a configuration."""
