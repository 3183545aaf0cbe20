"""The memory-efficient layers compute what transformers' own compute, forward and backward, and keep less."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from alignment.models.memory_efficient import _MemoryEfficientGate, patch_memory_efficient

IDS = torch.arange(3, 43).reshape(2, 20)


def decoder(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
    return model


def gradients(model: LlamaForCausalLM) -> dict[str, Tensor]:
    torch.manual_seed(1)
    said = model(input_ids=IDS).logits
    (said * torch.randn_like(said)).sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def remembered(model: LlamaForCausalLM) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart."""
    kept: dict[int, int] = {}
    weights = {weight.data_ptr() for weight in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        said = model.model(input_ids=IDS).last_hidden_state
    assert said.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    plain = decoder(dtype)
    patched = copy.deepcopy(plain)
    patch_memory_efficient(patched)
    with torch.no_grad():
        assert torch.equal(patched(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_gradients_are_the_same_within_rounding(dtype: torch.dtype, tolerance: float) -> None:
    plain = decoder(dtype)
    patched = copy.deepcopy(plain)
    patch_memory_efficient(patched)
    expected = gradients(plain)
    for name, gradient in gradients(patched).items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(gradient / scale, expected[name] / scale, atol=tolerance, rtol=0, msg=name)


def test_less_is_remembered() -> None:
    plain = decoder(torch.bfloat16)
    patched = copy.deepcopy(plain)
    patch_memory_efficient(patched)
    assert remembered(patched) < 0.8 * remembered(plain)


def test_what_is_not_known_is_left_alone() -> None:
    part = nn.RMSNorm(8)
    patch_memory_efficient(nn.Sequential(part))
    assert "forward" not in vars(part)


def test_the_gated_mlps_gradients_are_as_exact_as_transformers_own() -> None:
    """Their bf16 error against fp64, as a ratio to that of silu and a product by autograd; it was 1.4 to 1.7."""
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(512, 256, dtype=torch.bfloat16) for _ in range(3))

    def slopes(dtype: torch.dtype, patched: bool) -> tuple[Tensor, ...]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (gate, up)]
        result = _MemoryEfficientGate.apply(*inputs) if patched else nn.functional.silu(inputs[0]) * inputs[1]  # type: ignore[no-untyped-call]
        return torch.autograd.grad(result, inputs, grad.to(dtype))

    exact = slopes(torch.float64, False)
    for which, (mine, stock) in enumerate(
        zip(slopes(torch.bfloat16, True), slopes(torch.bfloat16, False), strict=True)
    ):
        error, own = (float((tensor.double() - exact[which]).norm()) for tensor in (mine, stock))
        assert error < 1.05 * own
