"""Faster LoRA arithmetic for rollouts on a CPU: it does not copy the adapter for each token.

In each layer, vLLM 0.32 gathers a [tokens, out, in] tensor of adapter weights, because each token may have another
adapter. If all tokens of a batch have the same adapter, as in rollouts, a matrix product gives the same result several
times as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def install() -> None:
    """Replaces vLLM's functions by those of this module, in the calling process."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for module in (lora_ops, punica_cpu):
        module.bgmv_shrink = shrink
        module.bgmv_expand = expand
        module.bgmv_expand_slice = expand_slice


def shrink(inputs: Tensor, adapter_weights: Tensor, output: Tensor, adapter_index: Tensor, scale: float = 1.0) -> None:
    """Writes scale · A x to the first columns of `output`; the other arguments are those of `product`."""
    values = product(inputs, adapter_weights, adapter_index, output.dtype)
    output[:, : values.shape[1]] = scale * values


def expand(
    inputs: Tensor, adapter_weights: Tensor, output: Tensor, adapter_index: Tensor, add_inputs: bool = True
) -> None:
    """Adds B x to the first columns of `output`, or writes it there; the other arguments are those of `product`."""
    values = product(inputs, adapter_weights, adapter_index, output.dtype)
    columns = min(values.shape[1], output.shape[1])  # either may be padded
    _write(values[:, :columns], output[:, :columns], add=add_inputs)


def expand_slice(
    inputs: Tensor,
    adapter_weights: Tensor,
    output: Tensor,
    adapter_index: Tensor,
    start: int,
    size: int,
    add_inputs: bool = True,
) -> None:
    """Adds B x to `size` columns of `output` from `start`, or writes it there; see `product` for the arguments."""
    _write(
        product(inputs, adapter_weights, adapter_index, output.dtype), output[:, start : start + size], add=add_inputs
    )


def product(inputs: Tensor, adapter_weights: Tensor, adapter_index: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies each token by the matrix of its adapter.

    Args:
        inputs: [T, in] one row per token.
        adapter_weights: [adapters, out, in], or [adapters, 1, out, in].
        adapter_index: [T] int64, the index of each token's adapter.
        dtype: number format to compute in.

    Returns:
        [T, out]
    """
    matrices = adapter_weights.squeeze(1) if adapter_weights.dim() == 4 else adapter_weights
    inputs = inputs.to(dtype)
    if bool((adapter_index == adapter_index[0]).all()):
        return inputs @ matrices[adapter_index[0]].to(dtype).T
    return torch.einsum("ti, toi -> to", inputs, matrices[adapter_index].to(dtype))


def _write(values: Tensor, target: Tensor, *, add: bool) -> None:
    """Adds values to a target, or writes them there."""
    if add:
        target += values
    else:
        target.copy_(values)
