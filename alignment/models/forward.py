"""The packed forward pass: log-probabilities, values and scores of a packed batch.

Logits are computed only where a completion token is predicted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alignment.batch import Batch, Outputs
from alignment.models.language_model import LanguageModel


def outputs(
    model: LanguageModel,
    batch: Batch,
    *,
    temperature: float = 1.0,
    entropies: bool = False,
    value_head: nn.Module | None = None,
) -> Outputs:
    """Runs a language model over a packed batch, with gradients if they are enabled.

    Args:
        temperature: divides the logits; > 0.
        entropies: whether to compute the entropy of each distribution too.
        value_head: [H] → [1], the head of a critic that shares the trunk; it reads the states that predict tokens.
    """
    logprobs, entropy, *values = model.root(
        batch=batch,
        positions=_predictors(batch),
        targets=batch.tokens[batch.loss_mask],
        value_head=value_head,
        temperature=temperature,
        transform=model.logit_transform,
        entropies=entropies,
    )
    return Outputs(
        logprobs=batch.scatter(logprobs),
        entropies=batch.scatter(entropy) if entropies else None,
        values=batch.scatter(values[0]) if values else None,
    )


def scores(model: LanguageModel, batch: Batch) -> Tensor:
    """[N] fp32 score of each completion, read at its last token."""
    last_tokens = torch.zeros(batch.num_completions, dtype=torch.int64, device=batch.tokens.device)
    completion_tokens = (batch.completion_index >= 0).nonzero().squeeze(1)
    last_tokens.scatter_reduce_(0, batch.completion_index[completion_tokens], completion_tokens, "amax")
    (completion_scores,) = model.root(batch=batch, positions=last_tokens)
    return completion_scores  # type: ignore[no-any-return]


def values(model: LanguageModel, batch: Batch) -> Tensor:
    """[T] fp32 value of the state that predicts each trained token; 0 elsewhere."""
    (token_values,) = model.root(batch=batch, positions=_predictors(batch))
    return batch.scatter(token_values)


def _predictors(batch: Batch) -> Tensor:
    """[n] index of the token whose state predicts each trained token."""
    return batch.predictor_index[batch.loss_mask]
