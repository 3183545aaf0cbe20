"""What a model says about a packed batch: log-probabilities and values, only where a completion token is predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.batch import Batch, Outputs
from alignment.errors import ModelError
from alignment.models.attention import IMPLEMENTATIONS, packed_layout
from alignment.models.language_model import LINEAR, LanguageModel, LogitTransform

LOGITS_AT_ONCE = 1 << 24
"""Logits held at a time (64 MiB in fp32); [T, vocab] never exists."""


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
        entropies: whether the entropy of every distribution is wanted too.
        value_head: [H] → [1], applied to the hidden states that predict: a critic that shares the trunk.
    """
    head = model.network.get_output_embeddings()
    predicting = hidden_states(model, batch)[batch.parents[batch.learned]]
    logprobs, entropy = linear_logprobs(
        predicting,
        head.weight,
        batch.tokens[batch.learned],
        head.bias,
        temperature=temperature,
        transform=model.logit_transform,
        entropies=entropies,
    )
    return Outputs(
        logprobs=batch.on_learned(logprobs),
        entropies=batch.on_learned(entropy) if entropies else None,
        values=None if value_head is None else batch.on_learned(value_head(predicting.float()).squeeze(1)),
    )


def scores(model: LanguageModel, batch: Batch) -> Tensor:
    """[N] fp32 score of every completion, read at its last token."""
    last = torch.zeros(batch.num_completions, dtype=torch.int64, device=batch.tokens.device)
    answer = (batch.branches >= 0).nonzero().squeeze(1)
    last.scatter_reduce_(0, batch.branches[answer], answer, "amax")
    return _scored(model, hidden_states(model, batch)[last])


def values(model: LanguageModel, batch: Batch) -> Tensor:
    """[T] fp32 value of the state in which each learned token was chosen, read where it is predicted; 0 elsewhere."""
    return batch.on_learned(_scored(model, hidden_states(model, batch)[batch.parents[batch.learned]]))


def hidden_states(model: LanguageModel, batch: Batch) -> Tensor:
    """[T, H] last hidden states of the decoder over a packed batch.

    Raises:
        ModelError: the network was given another attention, which knows nothing of groups.
    """
    attention = model.network.config._attn_implementation
    if attention not in IMPLEMENTATIONS.values():
        raise ModelError(f"a packed batch needs a packed attention, and the network's is {attention!r} just now")
    with packed_layout(batch):
        return model.decoder(  # type: ignore[no-any-return]
            input_ids=batch.tokens[None],
            # Ones say that nothing is padding; without them transformers looks for sequences in the positions.
            attention_mask=torch.ones_like(batch.tokens[None]),
            position_ids=batch.positions[None],
            use_cache=False,
        ).last_hidden_state[0]


def _scored(model: LanguageModel, hidden: Tensor) -> Tensor:
    return model.network.score(hidden.float()).squeeze(1)  # type: ignore[no-any-return]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    transform: LogitTransform = LINEAR,
    entropies: bool = False,
) -> tuple[Tensor, Tensor]:
    """log softmax(f(hidden · weightᵀ + bias) / temperature)[target], some rows at a time, in fp32 from the logits.

    Args:
        hidden: [n, H] outputs of the decoder.
        weight: [V, H] of the output head.
        targets: [n] int64 token ids.
        bias: [V] of the output head, or None.
        temperature: > 0.
        transform: f, what the model does to its logits.
        entropies: whether to compute the second result; it is zeros otherwise.

    Returns:
        [n] fp32 log-probabilities (nats) and [n] fp32 entropies of the whole distributions (nats), both differentiable
        in hidden, weight and bias.
    """
    return _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, transform, entropies)  # type: ignore[no-any-return,no-untyped-call]


class _LinearLogprobs(torch.autograd.Function):
    """Keeps only hidden states and two numbers per row; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        transform: LogitTransform,
        entropies: bool,
    ) -> tuple[Tensor, Tensor]:
        chosen = torch.empty(len(targets), device=hidden.device)
        log_normaliser, entropy = torch.empty_like(chosen), torch.zeros_like(chosen)
        for rows in _chunks(len(targets), weight.shape[0]):
            logits = _logits(hidden[rows], weight, bias, temperature, transform)
            picked = logits.gather(1, targets[rows, None]).squeeze(1)
            logprobs = torch.log_softmax(logits, dim=1)
            chosen[rows] = logprobs.gather(1, targets[rows, None]).squeeze(1)
            log_normaliser[rows] = picked - chosen[rows]
            if entropies:
                entropy[rows] = -torch.linalg.vecdot(torch.exp(logprobs, out=logits), logprobs)
        ctx.save_for_backward(hidden, weight, bias, targets, log_normaliser, entropy)
        ctx.temperature, ctx.transform = temperature, transform
        ctx.set_materialize_grads(False)
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_normaliser, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        grad = torch.zeros_like(log_normaliser) if grad is None else grad
        for rows in _chunks(len(targets), weight.shape[0]):
            logits = _logits(hidden[rows], weight, bias, ctx.temperature, ctx.transform)
            bend = ctx.transform.slope(logits * ctx.temperature) if ctx.transform.cap else ctx.transform.scale
            logprobs = logits.sub_(log_normaliser[rows, None])
            # d logprob / d logits = onehot(target) − p;  d entropy / d logits = −p (log p + entropy)
            if grad_entropy is None:
                slope = logprobs.exp_().mul_(-grad[rows, None])
            else:
                factor = (logprobs + entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(grad[rows, None])
                slope = logprobs.exp_().mul_(factor).neg_()
            slope.scatter_add_(1, targets[rows, None], grad[rows, None])
            if ctx.temperature != 1:
                slope /= ctx.temperature
            if ctx.transform != LINEAR:
                slope *= bend
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
            None,
            None,
            None,
        )


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, transform: LogitTransform
) -> Tensor:
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = (hidden @ weight.T).float()
    logits = transform.apply_(logits if bias is None else logits + bias.float())
    return logits if temperature == 1 else logits / temperature


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
