"""The packed forward pass: log-probabilities, values and scores of a packed batch.

Logits are computed only where a completion token is predicted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.batch import Batch, Outputs
from alignment.errors import ModelError
from alignment.models.attention import REGISTERED, packed_layout
from alignment.models.language_model import LINEAR, LanguageModel, LogitTransform

LOGITS_AT_ONCE = 1 << 24
"""Number of logits in memory at once (64 MiB in fp32). A [T, vocab] tensor never exists."""


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
    head = model.network.get_output_embeddings()
    predicting_states = hidden_states(model, batch)[batch.predictor_index[batch.loss_mask]]
    logprobs, entropy = linear_logprobs(
        predicting_states,
        head.weight,
        batch.tokens[batch.loss_mask],
        head.bias,
        temperature=temperature,
        transform=model.logit_transform,
        entropies=entropies,
    )
    return Outputs(
        logprobs=batch.scatter(logprobs),
        entropies=batch.scatter(entropy) if entropies else None,
        values=None if value_head is None else batch.scatter(value_head(predicting_states.float()).squeeze(1)),
    )


def scores(model: LanguageModel, batch: Batch) -> Tensor:
    """[N] fp32 score of each completion, read at its last token."""
    last_tokens = torch.zeros(batch.num_completions, dtype=torch.int64, device=batch.tokens.device)
    completion_tokens = (batch.completion_index >= 0).nonzero().squeeze(1)
    last_tokens.scatter_reduce_(0, batch.completion_index[completion_tokens], completion_tokens, "amax")
    return _score_states(model, hidden_states(model, batch)[last_tokens])


def values(model: LanguageModel, batch: Batch) -> Tensor:
    """[T] fp32 value of the state that predicts each trained token; 0 elsewhere."""
    return batch.scatter(_score_states(model, hidden_states(model, batch)[batch.predictor_index[batch.loss_mask]]))


def hidden_states(model: LanguageModel, batch: Batch) -> Tensor:
    """[T, H] last hidden states of the decoder for a packed batch.

    Raises:
        ModelError: the network has another attention at this time, which does not handle groups.
    """
    attention = model.network.config._attn_implementation
    if attention not in REGISTERED:
        raise ModelError(f"a packed batch needs a packed attention, and the network's is {attention!r} just now")
    with packed_layout(batch):
        return model.decoder(  # type: ignore[no-any-return]
            input_ids=batch.tokens[None],
            # Ones mean that nothing is padding. Without them, transformers derives sequences from the positions.
            attention_mask=torch.ones_like(batch.tokens[None]),
            position_ids=batch.positions[None],
            use_cache=False,
        ).last_hidden_state[0]


def _score_states(model: LanguageModel, states: Tensor) -> Tensor:
    """[n] fp32 output of the score head for [n, H] hidden states."""
    return model.network.score(states.float()).squeeze(1)  # type: ignore[no-any-return]


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
