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
class Branch:
    """A completion of a group, beside its prompt."""

    begin: int
    end: int
    mask: Tensor
    """[queries, keys] added to the scores of the branch over prompt + branch."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A group in the packed order: prompt and first completion are one causal sequence, further completions follow."""

    begin: int
    prompt_end: int
    first_end: int
    """Where the first completion ends, or the prompt if there is none."""
    others: tuple[Branch, ...]


def blocks_of(batch: Batch, dtype: torch.dtype) -> list[Block]:
    """Where each group and its branches lie; `dtype` is that of the attention's queries."""
    runs: list[list[tuple[int, int]]] = []  # (begin, end) of the prompt and of each branch, by group
    keys = torch.stack([batch.groups, batch.branches])
    lengths = torch.unique_consecutive(keys, dim=1, return_counts=True)
    begin = 0
    for group, length in zip(lengths[0][0].tolist(), lengths[1].tolist(), strict=True):
        if group == len(runs):
            runs.append([])
        runs[group].append((begin, begin + length))
        begin += length
    return [_block(run, dtype, batch.tokens.device) for run in runs]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    packed: list[Block] | None = None,
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
    parts = []
    for block in packed:
        whole = slice(block.begin, block.first_end)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, whole], key[:, :, whole], value[:, :, whole], is_causal=True, scale=scaling
            )
        )
        prompt = slice(block.begin, block.prompt_end)
        for branch in block.others:
            own = slice(branch.begin, branch.end)
            keys = torch.cat([key[:, :, prompt], key[:, :, own]], dim=2)
            values = torch.cat([value[:, :, prompt], value[:, :, own]], dim=2)
            parts.append(
                scaled_dot_product_attention(query[:, :, own], keys, values, attn_mask=branch.mask, scale=scaling)
            )
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _block(runs: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> Block:
    (begin, prompt_end), *branches = runs
    others = [
        Branch(begin=start, end=end, mask=_after_prompt(prompt_end - begin, end - start, dtype, device))
        for start, end in branches[1:]
    ]
    first_end = branches[0][1] if branches else prompt_end
    return Block(begin=begin, prompt_end=prompt_end, first_end=first_end, others=tuple(others))


def _after_prompt(prompt: int, branch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[branch, prompt + branch]: 0 for the prompt and for what went before in the branch, -inf for the rest."""
    mask = torch.full((branch, prompt + branch), float("-inf"), dtype=dtype, device=device)
    return mask.triu(diagonal=prompt + 1)


AttentionInterface.register(NAME, packed_attention)
