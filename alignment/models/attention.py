"""Attention over a packed batch: what each token sees, in the three forms that a model's attention can take it.

transformers asks for one mask per kind of layer (full, sliding, chunked), as a function of two indices. It is asked
here about positions inside a sequence instead, so that a window reaches back through an answer into its prompt,
whatever lies between them in the batch.

* grouped (`blocks`): every group by itself, every branch over its prompt. On a CPU this does only the work that is
  needed.
* dense (`sdpa`): one [T, T] mask.
* flex: a block mask for flex_attention, which skips the same blocks inside one CUDA kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import causal_mask_function

from alignment.batch import Batch
from alignment.errors import ModelError

Attention = Literal["blocks", "sdpa", "flex"]
IMPLEMENTATIONS: dict[Attention, str] = {
    "blocks": "raylign_packed",
    "sdpa": "raylign_packed_dense",
    "flex": "raylign_packed_flex",
}
"""Names under which transformers finds them."""
BLOCK = 128
"""Tokens of a block of flex_attention."""
RECOMPILE_LIMIT = 64
"""Shapes of attention that one process may compile; torch's own limit, 8, is met by three models."""
HARMLESS = frozenset({"sliding_window", "position_ids", "cache_position", "position_embeddings", "use_cache"})
"""Keywords that change nothing here: masks hold the window already, and positions were applied to queries and keys."""

MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Where the groups of a packed batch and their branches lie."""

    batch: Batch

    @cached_property
    def runs(self) -> list[Run]:
        """The batch's tokens in order, a run for each prompt and each branch."""
        keys = torch.stack([self.batch.groups, self.batch.branches])
        kinds, counts = torch.unique_consecutive(keys, dim=1, return_counts=True)
        runs: list[Run] = []
        prompt = Run(start=0, end=0, prompt=None)
        end = 0
        for branch, length in zip(kinds[1].tolist(), counts.tolist(), strict=True):
            start, end = end, end + length
            runs.append(Run(start=start, end=end, prompt=None if branch == -1 else prompt))
            if branch == -1:
                prompt = runs[-1]
        return runs

    @cached_property
    def num_positions(self) -> int:
        return int(self.batch.positions.max()) + 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """Tokens of a packed batch that follow one another in one sequence."""

    start: int
    end: int
    """Index after its last token."""
    prompt: Run | None
    """The prompt that a branch continues; None for a prompt."""

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedMask:
    """What the runs of a packed batch see, in order; handed through the model to every layer of one kind."""

    layout: Layout
    branches: list[BranchMask | None]
    """For each run: the mask of a branch over its prompt and itself, or of a prompt over itself; None for a prompt
    that is seen causally."""

    @property
    def lengths(self) -> list[int]:
        return [run.length for run in self.layout.runs]


@dataclass(frozen=True, kw_only=True, eq=False)
class BranchMask:
    """What the tokens of one run see."""

    skip: int
    """Tokens at the prompt's beginning that none of them sees."""
    scores: Tensor
    """[queries, keys] added to the scores: 0 for what is seen, -inf for the rest."""


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """A mask that no packed attention can take, and why."""

    reason: str


_LAYOUT: ContextVar[Layout | None] = ContextVar("raylign_layout", default=None)


@contextlib.contextmanager
def packed_layout(batch: Batch) -> Iterator[None]:
    """While this holds, models that were loaded with a packed attention attend as the batch is laid out."""
    token = _LAYOUT.set(Layout(batch=batch))
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def limit_recompilations() -> None:
    """Lets flex_attention compile as many shapes as models have, and fail instead of falling back to [T, T] scores."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def first_visible(mask_function: MaskFunction, num_positions: int, device: torch.device) -> Tensor | None:
    """[num_positions] lowest position that a token at each position sees; None if that is 0 for all.

    Found by bisection: a causal, sliding or chunked mask shows every token an unbroken run of positions up to its own.

    Raises:
        ModelError: tokens do not see themselves, or see what comes after them.
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


def grouped_mask(layout: Layout, first: Tensor | None, dtype: torch.dtype) -> GroupedMask:
    """
    Args:
        first: as `first_visible` returns it.
        dtype: that of the attention's queries.
    """
    return GroupedMask(layout=layout, branches=[_run_mask(layout.batch, run, first, dtype) for run in layout.runs])


def dense_mask(batch: Batch, first: Tensor | None = None) -> Tensor:
    """[T, T] bool, true where the row's token attends to the column's token.

    Args:
        first: [P] lowest position that is visible from each; None if everything before is.
    """
    same_group = batch.groups[:, None] == batch.groups[None, :]
    visible = (batch.branches[None, :] == -1) | (batch.branches[:, None] == batch.branches[None, :])
    mask = (same_group & visible).tril()
    return mask if first is None else mask & (batch.positions[None, :] >= first[batch.positions][:, None])


def block_mask(layout: Layout, first: Tensor | None = None) -> BlockMask:
    """The same mask for flex_attention, from the runs' boundaries alone: no [T, T] mask is ever made."""
    batch = layout.batch
    partial, full = _blocks(layout, first)
    device = batch.tokens.device
    groups, branches, positions = batch.groups, batch.branches, batch.positions

    def visible(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_branch = (branches[key] == -1) | (branches[query] == branches[key])
        return (groups[query] == groups[key]) & (key <= query) & same_branch

    mask_function = visible
    if first is not None:
        lowest = first[positions]

        def visible_in_window(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible(_, __, query, key) & (positions[key] >= lowest[query])

        mask_function = visible_in_window
    length = batch.tokens.shape[0]
    return BlockMask.from_kv_blocks(
        *_block_lists(partial, device),
        *_block_lists(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_function,
        seq_lengths=(length, length),
    )


def _run_mask(batch: Batch, run: Run, first: Tensor | None, dtype: torch.dtype) -> BranchMask | None:
    device = batch.tokens.device
    if first is None:
        if run.prompt is None:
            return None
        mask = torch.full((run.length, run.prompt.length + run.length), float("-inf"), dtype=dtype, device=device)
        return BranchMask(skip=0, scores=mask.triu_(diagonal=run.prompt.length + 1))
    query = batch.positions[run.start : run.end]
    key = query if run.prompt is None else torch.cat([batch.positions[run.prompt.start : run.prompt.end], query])
    visible = (key[None, :] <= query[:, None]) & (key[None, :] >= first[query][:, None])
    skip = 0 if run.prompt is None else int((key[: run.prompt.length] < first[query[0]]).sum())
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
    return BranchMask(skip=skip, scores=mask[:, skip:])


def _blocks(layout: Layout, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two [blocks, blocks] bool: where some token of a row's block sees some but not all of a column's, and all."""
    batch = layout.batch
    count = -(-batch.tokens.shape[0] // BLOCK)
    some = torch.zeros(count, count, dtype=torch.bool)
    full = torch.zeros(count, count, dtype=torch.bool)
    positions = batch.positions.tolist()
    lowest = None if first is None else first.tolist()

    def first_index(part: Run, query: int) -> int:
        """Index of the first token of a run that the token at index `query` sees."""
        return part.start if lowest is None else part.start + max(0, lowest[positions[query]] - positions[part.start])

    for run in layout.runs:
        for row in range(run.start // BLOCK, (run.end - 1) // BLOCK + 1):
            begin, end = max(run.start, row * BLOCK), min(run.end, (row + 1) * BLOCK)
            for part in (run,) if run.prompt is None else (run.prompt, run):
                low, high = first_index(part, begin), min(part.end, end)
                if low < high:
                    some[row, low // BLOCK : (high - 1) // BLOCK + 1] = True
                if end - begin == BLOCK:
                    full[row, -(-first_index(part, end - 1) // BLOCK) : min(part.end, begin) // BLOCK] = True
    if lowest is None:
        # A block of rows that holds the end of one branch and the beginning of the next sees their whole prompt too.
        for prompt, end in _spans(layout):
            for row in range(-(-prompt.start // BLOCK), end // BLOCK):
                full[row, -(-prompt.start // BLOCK) : min(prompt.end, row * BLOCK) // BLOCK] = True
    return some & ~full, full


def _spans(layout: Layout) -> Iterator[tuple[Run, int]]:
    """The prompt of each group, and the index after its last branch."""
    prompts = [run for run in layout.runs if run.prompt is None]
    ends = [prompt.start for prompt in prompts[1:]] + [layout.batch.tokens.shape[0]]
    return zip(prompts, ends, strict=True)


def _block_lists(table: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """[1, 1, rows] int32 number of marked columns and [1, 1, rows, columns] int32 their indices, first."""
    counts = table.sum(1, dtype=torch.int32)
    indices = torch.argsort(table.to(torch.int8), dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].to(device), indices[None, None].to(device)


def _layer_mask(form: Attention) -> Callable[..., Any]:
    """The function by which transformers makes the mask of one kind of layer."""

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
                f"attention {IMPLEMENTATIONS[form]} is for packed batches; call set_attn_implementation('sdpa') to run "
                "the model by itself"
            )
        try:
            first = first_visible(mask_function, layout.num_positions, layout.batch.tokens.device)
        except ModelError as error:  # of a kind of layer that the model may not even have (Qwen2-MoE: a window of 0)
            return Unusable(reason=str(error))
        if form == "blocks":
            return grouped_mask(layout, first, dtype)
        return dense_mask(layout.batch, first)[None, None] if form == "sdpa" else block_mask(layout, first)

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
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls in every layer, run by run.

    Args:
        query: [1, heads, T, head size].
        key, value: [1, key-value heads, T, head size].
        softcap: scores become softcap · tanh(scores / softcap) (Gemma 2).
        s_aux: [heads] score of a key that everybody sees and that says nothing: an attention sink (gpt-oss).

    Returns:
        [1, T, heads, head size], and no attention weights.
    """
    _check(module, attention_mask, GroupedMask, others)
    key, value = _for_every_head(query, key), _for_every_head(query, value)
    # Split once: the gradient of a slice would be a whole tensor of zeros around it, for every slice.
    runs = zip(*(torch.split(tensor, attention_mask.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    parts = []
    for mask, run, (queries, keys, values) in zip(
        attention_mask.branches, attention_mask.layout.runs, runs, strict=True
    ):
        if run.prompt is None:
            prompt_keys, prompt_values = keys, values
        else:
            assert mask is not None
            keys = torch.cat([prompt_keys[:, :, mask.skip :], keys], dim=2)
            values = torch.cat([prompt_values[:, :, mask.skip :], values], dim=2)
        scores = None if mask is None else mask.scores
        parts.append(_attend(queries, keys, values, scores, scaling, softcap, s_aux).transpose(1, 2))
    return torch.cat(parts, dim=1), None


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
    **others: Any,
) -> tuple[Tensor, None]:
    """The same with one [1, 1, T, T] mask."""
    _check(module, attention_mask, Tensor, others)
    key, value = _for_every_head(query, key), _for_every_head(query, value)
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
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same with a block mask, in one compiled kernel."""
    _check(module, attention_mask, BlockMask, others)
    return flex_attention_forward(  # type: ignore[no-any-return]
        module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, s_aux=s_aux
    )


def _check(module: nn.Module, mask: Any, kind: type, others: dict[str, Any]) -> None:
    """Refuses what would be left out without a word."""
    name = type(module).__name__
    if isinstance(mask, Unusable):
        raise ModelError(f"{name}: {mask.reason}")
    if not isinstance(mask, kind):
        raise ModelError(
            f"{name} attends without the mask that its model asked for; it cannot be run on packed batches"
        )
    for keyword, value in others.items():
        if keyword == "is_causal":
            if value is False:
                raise ModelError(f"{name} attends to what comes after a token, so that answers cannot be packed")
        elif keyword not in HARMLESS and (isinstance(value, Tensor) or value not in (None, False, 0)):
            raise ModelError(f"{name} attends with {keyword}, which the packed attention does not know")


def _for_every_head(query: Tensor, shared: Tensor) -> Tensor:
    repeats = query.shape[1] // shared.shape[1]
    return shared if repeats == 1 else shared.repeat_interleave(repeats, dim=1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention under one mask, bool or added to the scores; None is causal."""
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(query.dtype)
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[-2]].to(value.dtype)
    return weights @ value


FUNCTIONS: dict[Attention, Callable[..., Any]] = {
    "blocks": grouped_attention,
    "sdpa": dense_attention,
    "flex": flex_attention,
}

for _form, _name in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, FUNCTIONS[_form])
    AttentionMaskInterface.register(_name, _layer_mask(_form))
