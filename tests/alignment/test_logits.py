"""What models do to their logits: golden numbers, and gradients against autograd's."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.models import output_head
from alignment.models.logit_transform import LogitTransform
from alignment.models.output_head import linear_logprobs


def test_a_capped_logit_is_what_the_formula_says() -> None:
    """Hidden 1, head weights 2 and −4, scale 0.5, cap 3: logits 3·tanh(1/3) and 3·tanh(−2/3)."""
    logprobs, _ = linear_logprobs(
        torch.ones(1, 1), torch.tensor([[2.0], [-4.0]]), torch.tensor([0]), transform=LogitTransform(scale=0.5, cap=3.0)
    )
    first, second = 3 * math.tanh(1 / 3), 3 * math.tanh(-2 / 3)
    assert logprobs.item() == pytest.approx(first - math.log(math.exp(first) + math.exp(second)), abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_through_a_transform_are_those_of_autograd(
    scale: float, cap: float | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "LOGITS_AT_ONCE", 3 * 11)  # three rows at a time
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    bias = torch.randn(11, requires_grad=True)
    targets = torch.randint(0, 11, (7,))
    logits = (hidden @ weight.T + bias) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    exact = torch.log_softmax(logits / temperature, dim=1)
    expected = exact.gather(1, targets[:, None]).squeeze(1), -(exact.exp() * exact).sum(1)
    result = linear_logprobs(
        hidden, weight, targets, bias, temperature=temperature, transform=LogitTransform(scale=scale, cap=cap),
        entropies=True,
    )  # fmt: skip
    directions = torch.randn(7), torch.randn(7)
    leaves = [hidden, weight, bias]

    def slopes(values: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(sum((v * d).sum() for v, d in zip(values, directions, strict=True)), leaves)  # type: ignore[arg-type]

    for mine, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(slopes(result), slopes(expected), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
