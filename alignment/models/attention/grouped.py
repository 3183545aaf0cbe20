"""Attention group by group: each completion attends to its prompt and to itself. A CPU does only the needed work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignment.batch import Batch
from alignment.models.attention import (
    Layout,
    PackedAttention,
    Segment,
    attend_under_mask,
    check_call,
    repeat_for_heads,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedMask:
    """What each segment of a packed batch sees. The model hands it on to every layer of one kind."""

    layout: Layout
    segment_masks: list[SegmentMask | None]
    """The mask of each segment: a completion's mask covers its prompt and itself, a prompt's covers itself. None stands
    for a prompt with plain causal attention."""

    @property
    def lengths(self) -> list[int]:
        """Number of tokens in each segment."""
        return [segment.length for segment in self.layout.segments]


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentMask:
    """What the tokens of one segment see."""

    skip: int
    """Number of tokens at the prompt's beginning that no token of the segment sees."""
    scores: Tensor
    """[queries, keys] is added to the attention scores: 0 where a key is visible, -inf elsewhere."""


def grouped_mask(layout: Layout, window_starts: Tensor | None, dtype: torch.dtype) -> GroupedMask:
    """Makes the mask of each segment of a packed batch.

    Args:
        window_starts: as `find_window_starts` returns it.
        dtype: number format of the attention's queries.
    """
    return GroupedMask(
        layout=layout,
        segment_masks=[_segment_mask(layout.batch, segment, window_starts, dtype) for segment in layout.segments],
    )


def _segment_mask(
    batch: Batch, segment: Segment, window_starts: Tensor | None, dtype: torch.dtype
) -> SegmentMask | None:
    """The mask of one segment, or None if plain causal attention does the same."""
    device, prompt = batch.tokens.device, segment.prompt
    if window_starts is None:
        if prompt is None:
            return None
        shape = (segment.length, prompt.length + segment.length)
        mask = torch.full(shape, float("-inf"), dtype=dtype, device=device)
        return SegmentMask(skip=0, scores=mask.triu_(diagonal=prompt.length + 1))
    query = batch.positions[segment.start : segment.end]
    key = query if prompt is None else torch.cat([batch.positions[prompt.start : prompt.end], query])
    visible = (key[None, :] <= query[:, None]) & (key[None, :] >= window_starts[query][:, None])
    skip = 0 if prompt is None else int((key[: prompt.length] < window_starts[query[0]]).sum())
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
    return SegmentMask(skip=skip, scores=mask[:, skip:])


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: GroupedMask,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes the attention of a layer segment by segment; transformers calls this in every layer."""
    check_call(module, attention_mask, GroupedMask, kwargs)
    key, value = repeat_for_heads(query, key), repeat_for_heads(query, value)
    # Split once: the gradient of each slice would be a whole tensor, zero outside the slice.
    splits = zip(*(torch.split(tensor, attention_mask.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for mask, segment, (queries, keys, values) in zip(
        attention_mask.segment_masks, attention_mask.layout.segments, splits, strict=True
    ):
        if segment.prompt is None:
            prompt_keys, prompt_values = keys, values
        else:
            assert mask is not None
            keys = torch.cat([prompt_keys[:, :, mask.skip :], keys], dim=2)
            values = torch.cat([prompt_values[:, :, mask.skip :], values], dim=2)
        scores = None if mask is None else mask.scores
        outputs.append(attend_under_mask(queries, keys, values, scores, scaling, softcap, s_aux).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


ATTENTION = PackedAttention(implementation="raylign_packed", attend=grouped_attention, make_mask=grouped_mask)
