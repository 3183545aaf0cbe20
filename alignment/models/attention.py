"""Attention over a packed batch without a [T, T] mask: every group by itself, every branch over its prompt.

On a CPU this does only the work that is needed. (On CUDA, flex_attention skips the same blocks inside one kernel.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from alignment.errors import ModelError
from alignment.types import Batch

NAME = "raylign_packed"


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Where groups and their branches lie in a packed batch."""

    lengths: list[int]
    """Tokens of each run, in order: a group's prompt, then each of its branches."""
    groups: list[list[Tensor]]
    """For each group, and each of its branches: [queries, keys] added to the scores of the branch over prompt +
    branch."""


def blocks_of(batch: Batch, dtype: torch.dtype) -> Blocks:
    """Where each group and its branches lie; `dtype` is that of the attention's queries."""
    keys = torch.stack([batch.groups, batch.branches])
    runs, counts = torch.unique_consecutive(keys, dim=1, return_counts=True)
    lengths: list[int] = counts.tolist()
    groups: list[list[Tensor]] = []
    prompt = 0
    for branch, length in zip(runs[1].tolist(), lengths, strict=True):
        if branch == -1:
            groups.append([])
            prompt = length
        else:
            groups[-1].append(_after_prompt(prompt, length, dtype, batch.tokens.device))
    return Blocks(lengths=lengths, groups=groups)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    packed: Blocks | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        query: [1, heads, T, head size].
        key, value: [1, key-value heads, T, head size].
        packed: where groups and branches lie, handed through the model's forward.

    Returns:
        [1, T, heads, head size], and no attention weights.
    """
    if packed is None:
        raise ModelError(f"{type(module).__name__} does not hand keywords on to attention; set model.attention to sdpa")
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # Split once: the gradient of a slice would be a whole tensor of zeros around it, for every slice.
    runs = zip(*(torch.split(tensor, packed.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    parts = []
    for masks in packed.groups:
        own_query, prompt_key, prompt_value = next(runs)
        parts.append(scaled_dot_product_attention(own_query, prompt_key, prompt_value, is_causal=True, scale=scaling))
        for mask in masks:
            own_query, own_key, own_value = next(runs)
            keys, values = torch.cat([prompt_key, own_key], dim=2), torch.cat([prompt_value, own_value], dim=2)
            parts.append(scaled_dot_product_attention(own_query, keys, values, attn_mask=mask, scale=scaling))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _after_prompt(prompt: int, branch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[branch, prompt + branch]: 0 for the prompt and for what went before in the branch, -inf for the rest."""
    mask = torch.full((branch, prompt + branch), float("-inf"), dtype=dtype, device=device)
    return mask.triu(diagonal=prompt + 1)


AttentionInterface.register(NAME, packed_attention)
