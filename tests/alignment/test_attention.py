"""What each token of a packed batch sees: windows by position, block masks without [T, T], caps and sinks."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from alignment.batch import Batch
from alignment.data.packing import pack
from alignment.errors import ModelError
from alignment.groups import Completion, Group
from alignment.models.attention import Layout, find_window_starts
from alignment.models.attention.flex import block_mask
from alignment.models.attention.grouped import grouped_attention, grouped_mask
from alignment.models.attention.sdpa import dense_attention, dense_mask

CPU = torch.device("cpu")


def random_batch(draw: random.Random, *, longest: int) -> Batch:
    def completion(length: int) -> Completion:
        return Completion(text="", tokens=(5,) * length, loss_mask=(True,) * length)

    return pack(
        [
            Group(
                id=str(number),
                prompt="",
                prompt_tokens=(7,) * draw.randrange(1, longest),
                completions=tuple(completion(draw.randrange(1, longest)) for _ in range(draw.randrange(1, 5))),
            )
            for number in range(draw.randrange(1, 6))
        ]
    )


def seen_by_definition(batch: Batch, lowest: Tensor | None) -> Tensor:
    """[T, T] bool, element by element from the sentence in the docstring of Batch, and the window's definition."""
    groups, completion_index, positions = (
        batch.group_index.tolist(),
        batch.completion_index.tolist(),
        batch.positions.tolist(),
    )
    size = len(groups)
    return torch.tensor(
        [
            [
                groups[q] == groups[k]
                and k <= q
                and completion_index[k] in (-1, completion_index[q])
                and (lowest is None or positions[k] >= int(lowest[positions[q]]))
                for k in range(size)
            ]
            for q in range(size)
        ]
    )


def test_a_causal_mask_shows_everything_before() -> None:
    assert find_window_starts(causal_mask_function, 9, CPU) is None
    assert find_window_starts(sliding_window_causal_mask_function(9), 9, CPU) is None, (
        "a window that nothing reaches beyond"
    )


def test_windows_and_chunks_begin_where_transformers_masks_say() -> None:
    window = find_window_starts(sliding_window_causal_mask_function(3), 7, CPU)
    assert window is not None and window.tolist() == [0, 0, 0, 1, 2, 3, 4]
    chunk = find_window_starts(chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64)), 7, CPU)
    assert chunk is not None and chunk.tolist() == [0, 0, 0, 3, 3, 3, 6]


def test_a_mask_that_looks_ahead_is_refused() -> None:
    with pytest.raises(ModelError, match="not causal"):
        find_window_starts(bidirectional_mask_function, 7, CPU)


@pytest.mark.parametrize("window", [None, 1, 4, 7])
def test_a_window_is_counted_in_positions_and_reaches_from_an_answer_into_its_prompt(window: int | None) -> None:
    batch = random_batch(random.Random(3), longest=12)
    layout = Layout(batch=batch)
    first = None
    if window is not None:
        first = find_window_starts(sliding_window_causal_mask_function(window), layout.num_positions, CPU)
    assert torch.equal(dense_mask(batch, first), seen_by_definition(batch, first))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_grouped_and_dense_attention_agree_with_the_formula(
    window: int | None, softcap: float | None, sinks: bool
) -> None:
    torch.manual_seed(0)
    batch = random_batch(random.Random(4), longest=12)
    layout = Layout(batch=batch)
    first = None
    if window is not None:
        first = find_window_starts(sliding_window_causal_mask_function(window), layout.num_positions, CPU)
    size = len(batch.tokens)
    query = torch.randn(1, 4, size, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, size, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)

    scores = query @ key.repeat_interleave(2, dim=1).mT * 0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen_by_definition(batch, first), float("-inf"))
    if sinks:
        scores = torch.cat([scores, sink.view(1, 4, 1, 1).expand(1, 4, size, 1)], dim=-1)
    weights = scores.softmax(-1)[..., :size]
    expected = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)

    leaves = [query, key, value, *([sink] if sinks else [])]
    direction = torch.randn_like(expected)
    slopes = torch.autograd.grad((expected * direction).sum(), leaves)
    for function, mask in (
        (grouped_attention, grouped_mask(layout, first, torch.float64)),
        (dense_attention, dense_mask(batch, first)[None, None]),
    ):
        result, _ = function(  # type: ignore[operator]
            nn.Module(), query, key, value, mask, scaling=0.5, softcap=softcap, s_aux=sink if sinks else None
        )
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(torch.autograd.grad((result * direction).sum(), leaves), slopes, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def blocks_of(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """[blocks, blocks] bool: the blocks that are looked into, and those that are seen whole."""

    def table(counts: Tensor | None, indices: Tensor | None) -> Tensor:
        assert counts is not None and indices is not None
        size = counts.shape[-1]
        marked = torch.zeros(size, indices.shape[-1], dtype=torch.bool)
        for row in range(size):
            marked[row, indices[0, 0, row, : int(counts[0, 0, row])].long()] = True
        return marked

    return table(mask.kv_num_blocks, mask.kv_indices), table(mask.full_kv_num_blocks, mask.full_kv_indices)


@pytest.mark.parametrize("window", [None, 1, 100, 128])
@pytest.mark.parametrize("seed", range(3))
def test_a_block_mask_from_the_runs_has_the_blocks_of_one_from_all_pairs(window: int | None, seed: int) -> None:
    batch = random_batch(random.Random(seed), longest=250)
    layout = Layout(batch=batch)
    first = None
    if window is not None:
        first = find_window_starts(sliding_window_causal_mask_function(window), layout.num_positions, CPU)
    mask = block_mask(layout, first)
    size = len(batch.tokens)
    visible = dense_mask(batch, first)
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None, :]
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), rows, columns), visible)
    partial, full = blocks_of(mask)
    partial_of_all, full_of_all = blocks_of(
        create_block_mask(lambda _, __, q, k: visible[q, k], None, None, size, size, device="cpu")
    )
    assert torch.equal(partial | full, partial_of_all | full_of_all), "exactly the blocks that some token sees"
    assert not (full & ~full_of_all).any(), "only what is seen whole is not looked into"


def test_a_block_mask_needs_no_memory_for_all_pairs_of_tokens() -> None:
    """40,000 tokens: a mask of all pairs would be 1.6 GB, and take most of a minute."""
    length, answers = 2000, 19
    tokens = Completion(text="", tokens=(5,) * length, loss_mask=(True,) * length)
    batch = pack([Group(id="0", prompt="", prompt_tokens=(7,) * length, completions=(tokens,) * answers)])
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Largest():
        mask = block_mask(Layout(batch=batch))
    assert largest < 4e6
    assert mask.sparsity() > 80


def test_a_keyword_that_would_change_attention_is_refused_by_name() -> None:
    batch = random_batch(random.Random(4), longest=12)
    mask = dense_mask(batch)[None, None]
    one = torch.randn(1, 2, len(batch.tokens), 8)
    dense_attention(nn.Module(), one, one, one, mask, sliding_window=4, dropout=0.0, is_causal=True, cache=None)
    for name, value in (("position_bias", torch.zeros(1)), ("dropout", 0.1), ("indices", torch.zeros(1))):
        with pytest.raises(ModelError, match=name):
            dense_attention(nn.Module(), one, one, one, mask, **{name: value})
    with pytest.raises(ModelError, match="what comes after"):
        dense_attention(nn.Module(), one, one, one, mask, is_causal=False)
