"""Rollout's adapters on a CPU: vLLM's arithmetic for them, without a copy of the adapter for every token.

vLLM 0.32 gathers a [tokens, out, in] tensor of adapter weights in each layer, in case every token has another adapter.
Where all tokens of a batch have the same one, as in rollouts always, a matrix product says the same, several times as
fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def install() -> None:
    """Puts these functions in the place of vLLM's, in the process that calls it."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for module in (lora_ops, punica_cpu):
        module.bgmv_shrink = shrink
        module.bgmv_expand = expand
        module.bgmv_expand_slice = expand_slice


def shrink(inputs: Tensor, stacked: Tensor, output: Tensor, adapters: Tensor, scaling: float = 1.0) -> None:
    """Writes scaling · A x into the first columns of `output`; arguments as of `product`."""
    values = product(inputs, stacked, adapters, output.dtype)
    output[:, : values.shape[1]] = scaling * values


def expand(inputs: Tensor, stacked: Tensor, output: Tensor, adapters: Tensor, add_inputs: bool = True) -> None:
    """Adds B x to the first columns of `output`, or writes it there; arguments as of `product`."""
    values = product(inputs, stacked, adapters, output.dtype)
    columns = min(values.shape[1], output.shape[1])  # either may be padded
    _write(values[:, :columns], output[:, :columns], add=add_inputs)


def expand_slice(
    inputs: Tensor, stacked: Tensor, output: Tensor, adapters: Tensor, start: int, size: int, add_inputs: bool = True
) -> None:
    """Adds B x to some columns of `output`, or writes it there; arguments as of `product`."""
    _write(product(inputs, stacked, adapters, output.dtype), output[:, start : start + size], add=add_inputs)


def product(inputs: Tensor, stacked: Tensor, adapters: Tensor, dtype: torch.dtype) -> Tensor:
    """Every token times the matrix of its adapter.

    Args:
        inputs: [T, in] one row per token.
        stacked: [adapters, out, in], or [adapters, 1, out, in].
        adapters: [T] int64, the index of each token's adapter.
        dtype: number format to compute in.

    Returns:
        [T, out]
    """
    matrices = stacked.squeeze(1) if stacked.dim() == 4 else stacked
    inputs = inputs.to(dtype)
    if bool((adapters == adapters[0]).all()):
        return inputs @ matrices[adapters[0]].to(dtype).T
    return torch.einsum("ti, toi -> to", inputs, matrices[adapters].to(dtype))


def _write(values: Tensor, place: Tensor, *, add: bool) -> None:
    if add:
        place += values
    else:
        place.copy_(values)
