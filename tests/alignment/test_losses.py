"""The losses against numbers worked by hand, and against what must hold for any numbers."""

import math

import pytest
import torch

from alignment.losses import hinge_preference, ipo_preference, sigmoid_preference


def test_golden_numbers_worked_by_hand() -> None:
    gap = torch.tensor([0.0, 10.0, -10.0])
    # -log σ(0), -log σ(1), -log σ(-1)
    assert sigmoid_preference(gap, beta=0.1).tolist() == pytest.approx([math.log(2), 0.3132617, 1.3132617])
    # (0 - 5)², (10 - 5)², (-10 - 5)²
    assert ipo_preference(gap, beta=0.1).tolist() == pytest.approx([25.0, 25.0, 225.0])
    # 1 - 0, 1 - 1, 1 + 1
    assert hinge_preference(gap, beta=0.1).tolist() == pytest.approx([1.0, 0.0, 2.0])


def test_equal_log_ratios_cost_log_two_whatever_beta_is() -> None:
    for beta in (0.01, 0.1, 5.0):
        assert float(sigmoid_preference(torch.zeros(1), beta=beta)) == pytest.approx(math.log(2))


def test_the_gradient_of_dpo_is_minus_beta_times_sigmoid_of_the_reversed_gap() -> None:
    gap = torch.tensor([-3.0, 0.0, 2.0], requires_grad=True)
    sigmoid_preference(gap, beta=0.5).sum().backward()
    expected = -0.5 * torch.sigmoid(-0.5 * gap.detach())
    torch.testing.assert_close(gap.grad, expected)


def test_extreme_gaps_stay_finite() -> None:
    gap = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = sigmoid_preference(gap, beta=1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and gap.grad is not None and torch.isfinite(gap.grad).all()


def test_ipo_is_smallest_where_the_gap_is_half_the_reciprocal_of_beta() -> None:
    gap = torch.tensor([1 / (2 * 0.25)], requires_grad=True)
    loss = ipo_preference(gap, beta=0.25)
    loss.backward()
    assert loss.item() == 0 and gap.grad is not None and gap.grad.item() == 0


def test_hinge_has_no_gradient_once_the_margin_is_kept() -> None:
    gap = torch.tensor([9.0, 11.0], requires_grad=True)
    hinge_preference(gap, beta=0.1).sum().backward()
    assert gap.grad is not None and gap.grad.tolist() == pytest.approx([-0.1, 0.0])
