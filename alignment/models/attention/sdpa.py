"""Attention with one [T, T] mask. Every model and every device takes it, and it is what others are compared with."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from alignment.batch import Batch
from alignment.models.attention import PackedAttention, attend_under_mask, check_call, repeat_for_heads


def dense_mask(batch: Batch, window_starts: Tensor | None = None) -> Tensor:
    """Makes one mask of the whole batch: [T, T] bool, true where the row's token attends to the column's token.

    Args:
        window_starts: [P] lowest visible position of each position; None if all earlier positions are visible.
    """
    same_group = batch.group_index[:, None] == batch.group_index[None, :]
    visible = (batch.completion_index[None, :] == -1) | (
        batch.completion_index[:, None] == batch.completion_index[None, :]
    )
    mask = (same_group & visible).tril()
    if window_starts is None:
        return mask
    return mask & (batch.positions[None, :] >= window_starts[batch.positions][:, None])


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes the attention of a layer under one mask; transformers calls this in every layer.

    Args:
        query: [1, heads, T, head size].
        key, value: [1, key-value heads, T, head size].
        attention_mask: [1, 1, T, T] bool, as `dense_mask` makes it.
        softcap: scores become softcap · tanh(scores / softcap) (Gemma 2).
        s_aux: [heads] score of an attention sink, which is a key that every query sees and that has no value (gpt-oss).

    Returns:
        [1, T, heads, head size], and no attention weights.
    """
    check_call(module, attention_mask, Tensor, kwargs)
    key, value = repeat_for_heads(query, key), repeat_for_heads(query, value)
    output = attend_under_mask(query, key, value, attention_mask, scaling, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


DENSE = PackedAttention(
    implementation="raylign_packed_dense",
    attend=dense_attention,
    make_mask=lambda layout, window_starts, _: dense_mask(layout.batch, window_starts)[None, None],
)
ATTENTION = DENSE
