"""The loss of a reward model, per pair."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def pairwise_reward(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """The Bradley–Terry loss of a reward model, −log σ(chosen − rejected): equation 1 of arXiv 2203.02155.

    Args:
        chosen_scores: [M] score of the chosen completion of each pair.
        rejected_scores: [M] score of the rejected completion of each pair.

    Returns:
        [M] loss of each pair (nats); log 2 where both scores are equal.
    """
    return -logsigmoid(chosen_scores - rejected_scores)
