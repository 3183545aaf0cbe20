"""Memory-efficient forms of two layers: they compute the same numbers, and keep less for the backward pass.

An RMSNorm written in plain torch keeps three fp32 copies of its input, and a gated MLP keeps one activation more than
its gradient needs. Together that is about half of what a Llama-like decoder keeps per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
"""Classes that compute weight · x / √(mean x² + ε), with the mean in fp32 and the product in the input's format."""
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""Classes that compute down(silu(gate(x)) · up(x))."""


def patch_memory_efficient(module: nn.Module) -> None:
    """Replaces the forward pass of a model's known norms and MLPs, in place. Weights and other layers do not change."""
    for submodule in module.modules():
        if type(submodule).__name__ in NORMS:
            submodule.forward = _norm_forward(submodule)
        elif type(submodule).__name__ in GATED_MLPS and isinstance(submodule.act_fn, nn.SiLU):
            submodule.forward = _mlp_forward(submodule)


def _norm_forward(norm: Any) -> Any:
    """The forward pass that replaces that of an RMSNorm."""
    return lambda hidden_states: _MemoryEfficientRMSNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]


def _mlp_forward(mlp: Any) -> Any:
    """The forward pass that replaces that of a gated MLP."""

    def forward(hidden_states: Tensor) -> Tensor:
        gate_output, up_output = mlp.gate_proj(hidden_states), mlp.up_proj(hidden_states)
        product: Tensor = mlp.down_proj(_MemoryEfficientGate.apply(gate_output, up_output))  # type: ignore[no-untyped-call]
        return product

    return forward


class _MemoryEfficientRMSNorm(torch.autograd.Function):
    """An RMSNorm that keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Computes weight · x / √(mean x² + ε)."""
        fp32_states = hidden_states.float()
        scale = torch.rsqrt(fp32_states.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden_states, weight, scale)
        return weight * (fp32_states * scale).to(hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients of the input and of the weight."""
        hidden_states, weight, scale = ctx.saved_tensors
        unit_states = hidden_states.float() * scale  # their mean square is 1
        grad_weight = None
        if ctx.needs_input_grad[1]:
            weight_grads = grad * unit_states.to(hidden_states.dtype)
            grad_weight = weight_grads.flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        grad_unit = (grad * weight).float()
        radial = (grad_unit * unit_states).mean(-1, keepdim=True)
        grad_hidden = grad_unit.sub_(unit_states.mul_(radial)).mul_(scale).to(hidden_states.dtype)
        return grad_hidden, grad_weight, None


class _MemoryEfficientGate(torch.autograd.Function):
    """silu(gate) · up, computed so that the backward pass computes silu again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, gate_output: Tensor, up_output: Tensor) -> Tensor:
        """Computes silu(gate) · up."""
        ctx.save_for_backward(gate_output, up_output)
        return nn.functional.silu(gate_output) * up_output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the gradients of the gate's and of the up-projection's output."""
        gate_output, up_output = ctx.saved_tensors
        # d silu = σ + silu·(1 − σ), computed in fp32 and rounded once, as torch does in its own backward pass of silu.
        fp32_gate = gate_output.float()
        sigmoid = torch.sigmoid(fp32_gate)
        silu = fp32_gate.mul_(sigmoid) if fp32_gate is not gate_output else fp32_gate * sigmoid
        slope = sigmoid.addcmul_(silu, 1 - sigmoid)
        return slope.mul_(grad * up_output).to(gate_output.dtype), (grad * silu).to(up_output.dtype)
