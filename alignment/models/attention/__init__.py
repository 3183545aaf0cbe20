"""Attention over a packed batch: which tokens each token sees, and the forms in which a model can apply that.

transformers makes one mask for each kind of layer (full, sliding, chunked) from a function of two indices. This module
calls that function with positions inside a sequence instead of indices in the batch. So a window reaches back through
an answer into its prompt, whatever lies between them in the batch.

Each form is one file in this folder, which `ATTENTION` names: `attention: grouped` is `grouped.py`.
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
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from alignment.batch import Batch
from alignment.errors import ConfigError, ModelError

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


def check_call(module: nn.Module, mask: Any, kind: type, kwargs: dict[str, Any]) -> None:
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


def repeat_for_heads(query: Tensor, key: Tensor) -> Tensor:
    """Repeats grouped keys or values so that each query head has its own."""
    num_repeats = query.shape[1] // key.shape[1]
    return key if num_repeats == 1 else key.repeat_interleave(num_repeats, dim=1)


def attend_under_mask(
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
    """Computes the attention of a layer, with the arguments and the result of `dense_attention` in `sdpa.py`; only
    `attention_mask` is what `make_mask` makes."""
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
