"""Attention over a packed batch: which tokens each token sees, and the forms in which a model can apply that.

transformers makes one mask for each kind of layer (full, sliding, chunked) from a function of two indices. This module
calls that function with positions inside a sequence instead of indices in the batch. So a window reaches back through
an answer into its prompt, whatever lies between them in the batch.

* `grouped`: attention is computed group by group, and each completion attends to its prompt and to itself.
  On a CPU this does only the work that is needed.
* `sdpa`: there is one [T, T] mask.
* `flex`: there is a block mask for flex_attention, which skips the same blocks inside one CUDA kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import causal_mask_function

from alignment.batch import Batch
from alignment.errors import ConfigError, ModelError

BLOCK = 128
"""Number of tokens in a block of flex_attention."""
RECOMPILE_LIMIT = 64
"""Number of attention shapes that one process may compile. Three models already reach torch's own limit of 8."""
IGNORED_KEYWORDS = frozenset({"sliding_window", "position_ids", "cache_position", "position_embeddings", "use_cache"})
"""Keywords that change nothing here: the masks already hold the window, and queries and keys hold the positions."""

MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]
MaskMaker = Callable[["Layout", Tensor | None, torch.dtype], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """The prompts and completions of a packed batch as segments of its tokens."""

    batch: Batch

    @cached_property
    def segments(self) -> list[Segment]:
        """One segment for each prompt and each completion, in the order of the batch's tokens."""
        keys = torch.stack([self.batch.group_index, self.batch.completion_index])
        kinds, counts = torch.unique_consecutive(keys, dim=1, return_counts=True)
        segments: list[Segment] = []
        prompt = Segment(start=0, end=0, prompt=None)
        end = 0
        for branch, length in zip(kinds[1].tolist(), counts.tolist(), strict=True):
            start, end = end, end + length
            segments.append(Segment(start=start, end=end, prompt=None if branch == -1 else prompt))
            if branch == -1:
                prompt = segments[-1]
        return segments

    @cached_property
    def num_positions(self) -> int:
        """Number of positions that the longest sequence of the batch has."""
        return int(self.batch.positions.max()) + 1


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens of a packed batch that follow one another: a prompt, or a completion."""

    start: int
    end: int
    """Index after the segment's last token."""
    prompt: Segment | None
    """The prompt that a completion continues; None for a prompt."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.end - self.start


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


@dataclass(frozen=True, kw_only=True)
class UnsupportedMask:
    """Stands for a mask that no packed attention can apply, and holds the reason."""

    reason: str


_LAYOUT: ContextVar[Layout | None] = ContextVar("raylign_layout", default=None)


@contextlib.contextmanager
def packed_layout(batch: Batch) -> Iterator[None]:
    """Inside this context, models that were loaded with a packed attention use the masks of this batch."""
    token = _LAYOUT.set(Layout(batch=batch))
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def limit_recompilations() -> None:
    """Lets flex_attention compile all shapes of several models, and makes it fail rather than fall back to [T, T]."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def find_window_starts(mask_function: MaskFunction, num_positions: int, device: torch.device) -> Tensor | None:
    """Finds the first position of each position's window: [num_positions] int64, or None if it is 0 for all of them.

    It searches by bisection, because a causal, sliding or chunked mask shows each token an unbroken range of positions
    that ends with its own.

    Raises:
        ModelError: tokens do not see themselves, or they see what comes after them.
    """
    if mask_function is causal_mask_function:
        return None
    query = torch.arange(num_positions, device=device)
    zero = torch.zeros_like(query)
    low, high = zero, query
    for _ in range(num_positions.bit_length()):
        middle = (low + high) // 2
        visible = mask_function(zero, zero, query, middle)
        low, high = torch.where(visible, low, middle + 1), torch.where(visible, middle, high)
    if bool((low > query).any()) or bool(mask_function(zero, zero, query, query + 1)[:-1].any()):
        raise ModelError("the model's attention is not causal, so that its answers cannot be packed behind a prompt")
    return low if bool(low.any()) else None


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


def block_mask(layout: Layout, window_starts: Tensor | None = None) -> BlockMask:
    """Makes the same mask for flex_attention from the segments' boundaries alone, without a [T, T] mask."""
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


def _layer_mask(implementation: str, make_mask: MaskMaker) -> Callable[..., Any]:
    """Returns the function with which transformers makes the mask of one kind of layer."""

    def make(
        *,
        q_length: int,
        mask_function: MaskFunction = causal_mask_function,
        dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> Any:
        layout = _LAYOUT.get()
        if layout is None or q_length != layout.batch.tokens.shape[0]:
            raise ModelError(
                f"attention {implementation} is for packed batches; call set_attn_implementation('sdpa') to run "
                "the model by itself"
            )
        try:
            window_starts = find_window_starts(mask_function, layout.num_positions, layout.batch.tokens.device)
        except ModelError as error:  # the model may have no layer of this kind (Qwen2-MoE: a window of 0)
            return UnsupportedMask(reason=str(error))
        return make_mask(layout, window_starts, dtype)

    return make


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
    """Computes the attention of a layer segment by segment; transformers calls this in every layer.

    Args:
        query: [1, heads, T, head size].
        key, value: [1, key-value heads, T, head size].
        softcap: scores become softcap · tanh(scores / softcap) (Gemma 2).
        s_aux: [heads] score of an attention sink, which is a key that every query sees and that has no value (gpt-oss).

    Returns:
        [1, T, heads, head size], and no attention weights.
    """
    _check(module, attention_mask, GroupedMask, kwargs)
    key, value = _repeat_for_heads(query, key), _repeat_for_heads(query, value)
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
        outputs.append(_attend(queries, keys, values, scores, scaling, softcap, s_aux).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


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
    """Computes the same with one [1, 1, T, T] mask."""
    _check(module, attention_mask, Tensor, kwargs)
    key, value = _repeat_for_heads(query, key), _repeat_for_heads(query, value)
    return _attend(query, key, value, attention_mask, scaling, softcap, s_aux).transpose(1, 2).contiguous(), None


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
    """Computes the same with a block mask, in one compiled kernel."""
    _check(module, attention_mask, BlockMask, kwargs)
    return flex_attention_forward(  # type: ignore[no-any-return]
        module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, s_aux=s_aux
    )


def _check(module: nn.Module, mask: Any, kind: type, kwargs: dict[str, Any]) -> None:
    """Raises ModelError for a mask or a keyword that the packed attention would silently ignore."""
    name = type(module).__name__
    if isinstance(mask, UnsupportedMask):
        raise ModelError(f"{name}: {mask.reason}")
    if not isinstance(mask, kind):
        raise ModelError(
            f"{name} attends without the mask that its model asked for; it cannot be run on packed batches"
        )
    for keyword, value in kwargs.items():
        if keyword == "is_causal":
            if value is False:
                raise ModelError(f"{name} attends to what comes after a token, so that answers cannot be packed")
        elif keyword not in IGNORED_KEYWORDS and (isinstance(value, Tensor) or value not in (None, False, 0)):
            raise ModelError(f"{name} attends with {keyword}, which the packed attention does not know")


def _repeat_for_heads(query: Tensor, key: Tensor) -> Tensor:
    """Repeats grouped keys or values so that each query head has its own."""
    num_repeats = query.shape[1] // key.shape[1]
    return key if num_repeats == 1 else key.repeat_interleave(num_repeats, dim=1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Computes attention under one mask, which is bool or is added to the scores; None means causal."""
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(query.dtype)
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[-2]].to(value.dtype)
    return weights @ value


@dataclass(frozen=True, kw_only=True)
class PackedAttention:
    """A form in which a model can apply the packed mask."""

    implementation: str
    """Name by which transformers finds it: letters, digits and underscores, which no other attention has."""
    attend: Callable[..., Any]
    """Computes the attention of a layer, with the arguments and the result of `grouped_attention`."""
    make_mask: MaskMaker
    """Makes the mask that `attend` gets, from the layout, what `find_window_starts` returns, and a dtype."""
    cuda_reason: str = ""
    """Why it runs on CUDA alone; empty if it runs on CPUs too."""
    only_own_format: bool = False
    """True if it computes in the model's own number format only, so that the proof in fp32 takes the dense form."""
    prepare: Callable[[], None] = lambda: None
    """Prepares this process, before a model is loaded."""


def register_attention(attention: PackedAttention) -> None:
    """Makes a packed attention known to transformers.

    Raises:
        ConfigError: another attention has its name.
    """
    name = attention.implementation
    if REGISTERED.get(name, attention) != attention or (name not in REGISTERED and name in AttentionInterface()):
        raise ConfigError(f"an attention with the implementation {name!r} is there already; give yours another name")
    REGISTERED[name] = attention
    AttentionInterface.register(name, attention.attend)
    AttentionMaskInterface.register(name, _layer_mask(name, attention.make_mask))


REGISTERED: dict[str, PackedAttention] = {}
"""The packed attentions that transformers knows, by name."""
GROUPED = PackedAttention(implementation="raylign_packed", attend=grouped_attention, make_mask=grouped_mask)
DENSE = PackedAttention(
    implementation="raylign_packed_dense",
    attend=dense_attention,
    make_mask=lambda layout, window_starts, _: dense_mask(layout.batch, window_starts)[None, None],
)
FLEX = PackedAttention(
    implementation="raylign_packed_flex",
    attend=flex_attention,
    make_mask=lambda layout, window_starts, _: block_mask(layout, window_starts),
    only_own_format=True,
    cuda_reason="on a CPU flex_attention has no backward pass",
    prepare=limit_recompilations,
)
for _attention in (GROUPED, DENSE, FLEX):
    register_attention(_attention)
