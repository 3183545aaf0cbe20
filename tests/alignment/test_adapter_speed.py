"""Rollout's products with adapters on a CPU, by brute force."""

from __future__ import annotations

import pytest
import torch

from alignment.vllm import adapter_speed


@pytest.mark.parametrize("adapters", [[0, 0, 0, 0], [2, 2, 2, 2], [-1, -1, -1, -1], [0, 2, 1, -1]])
def test_adapters_are_multiplied_token_by_token(adapters: list[int]) -> None:
    torch.manual_seed(0)
    inputs, stacked = torch.randn(4, 5), torch.randn(3, 1, 6, 5)
    expected = torch.stack([stacked[adapter, 0] @ token for adapter, token in zip(adapters, inputs, strict=True)])
    indices = torch.tensor(adapters)
    start = torch.randn(4, 8)

    shrunk, added, sliced = start.clone(), start.clone(), start.clone()
    adapter_speed.shrink(inputs, stacked, shrunk, indices, 0.5)
    adapter_speed.expand(inputs, stacked, added, indices)
    adapter_speed.expand_slice(inputs, stacked, sliced, indices, 2, 6, add_inputs=False)
    torch.testing.assert_close(shrunk[:, :6], 0.5 * expected)
    torch.testing.assert_close(added[:, :6], start[:, :6] + expected)
    torch.testing.assert_close(sliced[:, 2:], expected)
    for result, untouched in ((shrunk, slice(6, 8)), (added, slice(6, 8)), (sliced, slice(0, 2))):
        torch.testing.assert_close(result[:, untouched], start[:, untouched])
