"""Parts of a decoder that remember less for the backward pass, and say the same numbers forward.

Written out, an RMSNorm keeps three fp32 copies of its input, and a gated MLP one more activation than its gradient
needs. Together that is about half of what a Llama-like decoder remembers per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
"""Classes that compute weight · x / √(mean x² + ε), the mean in fp32 and the product in the input's format."""
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""Classes that compute down(silu(gate(x)) · up(x))."""


def make_lean(module: nn.Module) -> None:
    """Replaces what is known among a model's parts, in place; the rest, and all weights, stay as they are."""
    for part in module.modules():
        if type(part).__name__ in NORMS:
            part.forward = _norm_of(part)
        elif type(part).__name__ in GATED_MLPS and isinstance(part.act_fn, nn.SiLU):
            part.forward = _mlp_of(part)


def _norm_of(norm: Any) -> Any:
    return lambda hidden: _RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]


def _mlp_of(mlp: Any) -> Any:
    return lambda hidden: mlp.down_proj(_Gated.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden)))  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = hidden.float()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (exact * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        normal = hidden.float() * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normal.to(hidden.dtype)).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        grad_normal = (grad * weight).float()
        shared = (grad_normal * normal).mean(-1, keepdim=True)
        return (grad_normal.sub_(normal.mul_(shared)).mul_(scale)).to(hidden.dtype), grad_weight, None


class _Gated(torch.autograd.Function):
    """silu(gate) · up, which computes silu again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        # d silu = σ + silu·(1 − σ), as silu's own backward pass computes it: in fp32, and rounded once.
        exact = gate.float()
        sigmoid = torch.sigmoid(exact)
        silu = exact.mul_(sigmoid) if exact is not gate else exact * sigmoid
        slope = sigmoid.addcmul_(silu, 1 - sigmoid)
        return slope.mul_(grad * up).to(gate.dtype), (grad * silu).to(up.dtype)
