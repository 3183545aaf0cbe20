"""Attention by flex_attention: a block mask lets one CUDA kernel skip what no token sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flex_attention import flex_attention_forward

from alignment.models.attention import Layout, PackedAttention, Segment, check_call

BLOCK = 128
"""Number of tokens in a block of flex_attention."""
RECOMPILE_LIMIT = 64
"""Number of attention shapes that one process may compile. Three models already reach torch's own limit of 8."""


def limit_recompilations() -> None:
    """Lets flex_attention compile all shapes of several models, and makes it fail rather than fall back to [T, T]."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def block_mask(layout: Layout, window_starts: Tensor | None = None) -> BlockMask:
    """Makes the mask of a batch for flex_attention, from the segments' boundaries alone, without a [T, T] mask."""
    batch = layout.batch
    partial, full = _block_tables(layout, window_starts)
    device = batch.tokens.device
    groups, completion_index, positions = batch.group_index, batch.completion_index, batch.positions

    def visible(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_branch = (completion_index[key] == -1) | (completion_index[query] == completion_index[key])
        return (groups[query] == groups[key]) & (key <= query) & same_branch

    mask_function = visible
    if window_starts is not None:
        lowest_visible = window_starts[positions]

        def visible_in_window(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible(_, __, query, key) & (positions[key] >= lowest_visible[query])

        mask_function = visible_in_window
    length = batch.tokens.shape[0]
    return BlockMask.from_kv_blocks(
        *_block_lists(partial, device),
        *_block_lists(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_function,
        seq_lengths=(length, length),
    )


def _block_tables(layout: Layout, window_starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two [blocks, blocks] bool tables for a row's block of queries and a column's block of keys.

    The first is true where some query sees some key but not every query sees every key, the second where each query
    sees each key.
    """
    batch = layout.batch
    count = -(-batch.tokens.shape[0] // BLOCK)
    visible = torch.zeros(count, count, dtype=torch.bool)
    full = torch.zeros(count, count, dtype=torch.bool)
    positions = batch.positions.tolist()
    starts = None if window_starts is None else window_starts.tolist()

    def first_index(key_segment: Segment, query: int) -> int:
        """Index of the first token of a segment that the token at index `query` sees."""
        start = key_segment.start
        return start if starts is None else start + max(0, starts[positions[query]] - positions[start])

    for segment in layout.segments:
        for row in range(segment.start // BLOCK, (segment.end - 1) // BLOCK + 1):
            start, end = max(segment.start, row * BLOCK), min(segment.end, (row + 1) * BLOCK)
            for key_segment in (segment,) if segment.prompt is None else (segment.prompt, segment):
                low, high = first_index(key_segment, start), min(key_segment.end, end)
                if low < high:
                    visible[row, low // BLOCK : (high - 1) // BLOCK + 1] = True
                if end - start == BLOCK:
                    low, high = first_index(key_segment, end - 1), min(key_segment.end, start)
                    full[row, -(-low // BLOCK) : high // BLOCK] = True
    if starts is None:
        # A block of rows that holds the end of one completion and the beginning of the next sees their whole prompt.
        for prompt, end in _spans(layout):
            for row in range(-(-prompt.start // BLOCK), end // BLOCK):
                full[row, -(-prompt.start // BLOCK) : min(prompt.end, row * BLOCK) // BLOCK] = True
    return visible & ~full, full


def _spans(layout: Layout) -> Iterator[tuple[Segment, int]]:
    """The prompt of each group, and the index after its last completion."""
    prompts = [segment for segment in layout.segments if segment.prompt is None]
    ends = [prompt.start for prompt in prompts[1:]] + [layout.batch.tokens.shape[0]]
    return zip(prompts, ends, strict=True)


def _block_lists(table: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A table as flex_attention takes it.

    Returns:
        [1, 1, rows] int32 number of marked columns, and [1, 1, rows, columns] int32 indices, the marked ones first.
    """
    counts = table.sum(1, dtype=torch.int32)
    indices = torch.argsort(table.to(torch.int8), dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].to(device), indices[None, None].to(device)


def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes the attention of a layer with a block mask, in one compiled kernel."""
    check_call(module, attention_mask, BlockMask, kwargs)
    return flex_attention_forward(  # type: ignore[no-any-return]
        module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, s_aux=s_aux
    )


ATTENTION = PackedAttention(
    implementation="raylign_packed_flex",
    attend=flex_attention,
    make_mask=lambda layout, window_starts, _: block_mask(layout, window_starts),
    only_own_format=True,
    cuda_reason="on a CPU flex_attention has no backward pass",
    prepare=limit_recompilations,
)
