"""Blocks of the key-value cache are set to zero before a request uses them, on a CPU.

On a CPU, vLLM 0.32's attention multiplies whole blocks, and gives the weight 0 to rows that hold no token of the
request yet. Such rows hold what an earlier request has left there. If that was not finite, 0 · NaN = NaN spoils the
answer of sound weights too, long after the weights that overflowed were replaced. On a GPU, the kernels do not read
such rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def install() -> None:
    """Makes vLLM set new blocks to zero, as it does for models with other layers than attention, in this process."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    KVCacheConfig.needs_kv_cache_zeroing = property(lambda _: True)
    CPUModelRunner._zero_block_ids = zero_blocks


def zero_blocks(runner: Any, block_ids: list[int]) -> None:
    """Sets blocks to zero in all layers with attention.

    vLLM's own function passes over sliding windows, and takes a call for each block of each layer.

    Args:
        runner: vLLM's `CPUModelRunner`.
        block_ids: indices of the blocks that requests are about to use.
    """
    import torch

    num_blocks = runner.kv_cache_config.num_blocks
    rows = torch.tensor(block_ids)
    for cache in _attention_caches(runner):
        # The kernel's blocks may be smaller than vLLM's.
        cache.view(num_blocks, -1, *cache.shape[1:]).index_fill_(0, rows, 0)


def _attention_caches(runner: Any) -> Iterator[Tensor]:
    """Yields the caches of the layers with attention, each once. Their first dimension counts blocks."""
    from torch import Tensor
    from vllm.v1.kv_cache_interface import AttentionSpec

    addresses: set[int] = set()
    for group in runner.kv_cache_config.kv_cache_groups:
        if not isinstance(group.kv_cache_spec, AttentionSpec):
            continue
        for name in group.layer_names:
            layer = runner.compilation_config.static_forward_context.get(name)
            cache = None if layer is None else layer.kv_cache
            if isinstance(cache, Tensor) and cache.data_ptr() not in addresses:
                addresses.add(cache.data_ptr())
                yield cache
