"""What a model says about a packed batch: log-probabilities, computed only where a completion token is predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from alignment.models.attention import blocks_of
from alignment.models.load import LanguageModel
from alignment.types import Batch, Outputs

LOGITS_AT_ONCE = 1 << 24
"""Logits held at a time (64 MiB in fp32); [T, vocab] never exists."""


def outputs(model: LanguageModel, batch: Batch) -> Outputs:
    """Runs the model over a packed batch, with gradients if they are enabled."""
    causal = model.causal
    hidden = causal.get_decoder()(
        input_ids=batch.tokens[None],
        position_ids=batch.positions[None],
        use_cache=False,
        **_mask(model, batch),
    ).last_hidden_state[0]
    head = causal.get_output_embeddings()
    predicting = hidden[batch.parents[batch.learned]]
    values = linear_logprobs(predicting, head.weight, batch.tokens[batch.learned], head.bias)
    return Outputs(logprobs=torch.zeros(batch.tokens.shape, device=values.device).masked_scatter(batch.learned, values))


def _mask(model: LanguageModel, batch: Batch) -> dict[str, Any]:
    """The packed mask in the form that the model's attention takes, as keywords of the forward pass."""
    if model.attention == "blocks":
        return {"attention_mask": None, "packed": blocks_of(batch, model.causal.dtype)}
    return {"attention_mask": block_mask(batch) if model.attention == "flex" else dense_mask(batch)[None, None]}


def dense_mask(batch: Batch) -> Tensor:
    """[T, T] bool, true where the row's token attends to the column's token."""
    same_group = batch.groups[:, None] == batch.groups[None, :]
    visible = (batch.branches[None, :] == -1) | (batch.branches[:, None] == batch.branches[None, :])
    return (same_group & visible).tril()


def block_mask(batch: Batch) -> BlockMask:
    """The same mask for flex_attention, which skips the blocks that no token may see."""
    groups, branches = batch.groups, batch.branches

    def visible(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_branch = (branches[key] == -1) | (branches[query] == branches[key])
        return (groups[query] == groups[key]) & (key <= query) & same_branch

    length = batch.tokens.shape[0]
    return create_block_mask(visible, None, None, length, length, device=str(batch.tokens.device))


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """log softmax(hidden · weightᵀ + bias)[target], a chunk of rows at a time, in fp32 from the logits on.

    Args:
        hidden: [n, H] outputs of the decoder.
        weight: [V, H] of the output head.
        targets: [n] int64 token ids.
        bias: [V] of the output head, or None.

    Returns:
        [n] fp32 log-probabilities (nats), differentiable in hidden, weight and bias.
    """
    return _LinearLogprobs.apply(hidden, weight, bias, targets)  # type: ignore[no-any-return,no-untyped-call]


class _LinearLogprobs(torch.autograd.Function):
    """Keeps only hidden states and one number per row; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        chosen = torch.empty(len(targets), device=hidden.device)
        log_normaliser = torch.empty_like(chosen)
        for rows in _chunks(len(targets), weight.shape[0]):
            logits = _logits(hidden[rows], weight, bias)
            picked = logits.gather(1, targets[rows, None]).squeeze(1)
            chosen[rows] = torch.log_softmax(logits, dim=1).gather(1, targets[rows, None]).squeeze(1)
            log_normaliser[rows] = picked - chosen[rows]
        ctx.save_for_backward(hidden, weight, bias, targets, log_normaliser)
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_normaliser = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for rows in _chunks(len(targets), weight.shape[0]):
            # d logprob / d logits = onehot(target) − softmax(logits)
            slope = _logits(hidden[rows], weight, bias).sub_(log_normaliser[rows, None]).exp_().neg_()
            slope.scatter_add_(1, targets[rows, None], torch.ones_like(grad[rows, None]))
            slope.mul_(grad[rows, None])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ hidden[rows]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = (hidden @ weight.T).float()
    return logits if bias is None else logits + bias.float()


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
