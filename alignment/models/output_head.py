"""The output head in training: log-probabilities of tokens, from logits that are computed a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.models.logit_transform import LINEAR, LogitTransform

LOGITS_AT_ONCE = 1 << 24
"""Number of logits in memory at once (64 MiB in fp32). A [T, vocab] tensor never exists."""


class OutputHead(nn.Module):
    """A model's output head, which gives log-probabilities of tokens instead of logits.

    It has the weights of the model's own head, as parameters of its own, and is called like a layer. So a backend that
    shards weights can gather them for the call and for its backward pass.
    """

    bias: nn.Parameter | None

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.register_parameter("bias", head.bias)

    def forward(
        self, hidden_states: Tensor, targets: Tensor, *, temperature: float, transform: LogitTransform, entropies: bool
    ) -> tuple[Tensor, Tensor]:
        """[n] log-probabilities and [n] entropies; see `linear_logprobs`."""
        return linear_logprobs(
            hidden_states,
            self.weight,
            targets,
            self.bias,
            temperature=temperature,
            transform=transform,
            entropies=entropies,
        )


def linear_logprobs(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    transform: LogitTransform = LINEAR,
    entropies: bool = False,
) -> tuple[Tensor, Tensor]:
    """log softmax(f(hidden · weightᵀ + bias) / temperature)[target], computed in chunks of rows, in fp32.

    Args:
        hidden_states: [n, H] outputs of the decoder.
        weight: [V, H] of the output head.
        targets: [n] int64 token ids.
        bias: [V] of the output head, or None.
        temperature: > 0.
        transform: f, the model's transform of its logits.
        entropies: whether to compute the entropies; they are zeros otherwise.

    Returns:
        [n] fp32 log-probabilities (nats) and [n] fp32 entropies of the full distributions (nats), both differentiable
        in hidden_states, weight and bias.
    """
    return _LinearLogprobs.apply(hidden_states, weight, bias, targets, temperature, transform, entropies)  # type: ignore[no-any-return,no-untyped-call]


class _LinearLogprobs(torch.autograd.Function):
    """Keeps only hidden states and two numbers per row; the backward pass computes the logits again.

    The methods are those of `torch.autograd.Function`, and their arguments are those of `linear_logprobs`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        transform: LogitTransform,
        entropies: bool,
    ) -> tuple[Tensor, Tensor]:
        """Computes log-probabilities and entropies in chunks of rows."""
        token_logprobs = torch.empty(len(targets), device=hidden_states.device)
        log_normaliser, entropy = torch.empty_like(token_logprobs), torch.zeros_like(token_logprobs)
        for rows in _chunks(len(targets), weight.shape[0]):
            logits = _logits(hidden_states[rows], weight, bias, temperature, transform)
            token_logits = logits.gather(1, targets[rows, None]).squeeze(1)
            logprobs = torch.log_softmax(logits, dim=1)
            token_logprobs[rows] = logprobs.gather(1, targets[rows, None]).squeeze(1)
            log_normaliser[rows] = token_logits - token_logprobs[rows]
            if entropies:
                entropy[rows] = -torch.linalg.vecdot(torch.exp(logprobs, out=logits), logprobs)
        ctx.save_for_backward(hidden_states, weight, bias, targets, log_normaliser, entropy)
        ctx.temperature, ctx.transform = temperature, transform
        ctx.set_materialize_grads(False)
        return token_logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Computes the logits again, in chunks of rows, and the gradients from them."""
        hidden_states, weight, bias, targets, log_normaliser, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        grad = torch.zeros_like(log_normaliser) if grad is None else grad
        for rows in _chunks(len(targets), weight.shape[0]):
            logits = _logits(hidden_states[rows], weight, bias, ctx.temperature, ctx.transform)
            transform_slope = (
                ctx.transform.slope(logits * ctx.temperature) if ctx.transform.cap else ctx.transform.scale
            )
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
                slope *= transform_slope
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ hidden_states[rows]
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
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, transform: LogitTransform
) -> Tensor:
    """[n, V] fp32 logits of some rows, divided by the temperature."""
    if hidden_states.is_cuda and hidden_states.dtype != torch.float32:
        logits = torch.mm(hidden_states, weight.T, out_dtype=torch.float32)
    else:
        logits = (hidden_states @ weight.T).float()
    logits = transform.apply_(logits if bias is None else logits + bias.float())
    return logits if temperature == 1 else logits / temperature


def _chunks(num_rows: int, vocabulary_size: int) -> list[slice]:
    """Slices of the rows whose logits fit into memory together."""
    size = max(1, LOGITS_AT_ONCE // vocabulary_size)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
