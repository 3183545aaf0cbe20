"""Advantages against numbers worked by hand, loops written from the papers, and what must hold for any numbers."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from alignment.advantages import gae, group_relative, leave_one_out, whiten

GROUPS = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])  # of three, of one, of four
REWARDS = torch.tensor([1.0, 2.0, 6.0, 5.0, -1.0, -1.0, -1.0, -1.0])


def rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and lengths of six left-aligned rows, 0 beyond each row's length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 1, 3, 5, 7, 2])
    inside = torch.arange(7) < lengths[:, None]
    rewards, values = torch.randn(2, 6, 7, generator=generator)
    return rewards * inside, values * inside, lengths


def gae_by_definition(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """Σ over l of (γλ)^l · δ[t + l], equation 16 of arXiv 1506.02438, term by term."""
    result = torch.zeros_like(rewards)
    for row, length in enumerate(lengths.tolist()):
        value = [*values[row, :length].tolist(), 0.0]
        delta = [rewards[row, t].item() + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            result[row, t] = sum((gamma * lam) ** later * delta[t + later] for later in range(length - t))
    return result


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_gae_is_the_discounted_sum_of_td_errors(gamma: float, lam: float) -> None:
    rewards, values, lengths = rows()
    expected = gae_by_definition(rewards, values, lengths, gamma, lam)
    torch.testing.assert_close(gae(rewards, values, lengths, gamma=gamma, lam=lam), expected, atol=1e-5, rtol=1e-5)


def test_gae_of_two_actions_worked_by_hand() -> None:
    # δ₁ = 1 − 0.5 = 0.5; δ₀ = 0 + 0.9·0.5 − 0.2 = 0.25; A₀ = 0.25 + 0.9·0.8·0.5 = 0.61
    rewards, values = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.2, 0.5, 0.0]])
    found = gae(rewards, values, torch.tensor([2]), gamma=0.9, lam=0.8)
    assert found.tolist() == [pytest.approx([0.61, 0.5, 0.0])]


def test_gae_without_discount_is_the_reward_to_go_minus_the_value() -> None:
    rewards, values, lengths = rows()
    to_go = rewards.flip(1).cumsum(1).flip(1)
    inside = torch.arange(7) < lengths[:, None]
    torch.testing.assert_close(gae(rewards, values, lengths, gamma=1, lam=1), (to_go - values) * inside)


def test_gae_that_trusts_only_the_values_is_the_td_error() -> None:
    rewards, values, lengths = rows()
    after = torch.cat([values[:, 1:], torch.zeros(6, 1)], dim=1)
    inside = torch.arange(7) < lengths[:, None]
    errors = (rewards + 0.9 * after - values) * inside
    torch.testing.assert_close(gae(rewards, values, lengths, gamma=0.9, lam=0), errors)


def test_what_stands_beyond_a_row_is_never_read_by_gae() -> None:
    rewards, values, lengths = rows()
    outside = torch.arange(7) >= lengths[:, None]
    found = gae(rewards + 9.0 * outside, values - 5.0 * outside, lengths, gamma=0.9, lam=0.9)
    torch.testing.assert_close(found, gae(rewards, values, lengths, gamma=0.9, lam=0.9))


def test_group_relative_advantages_worked_by_hand() -> None:
    # Of 1, 2, 6: mean 3, variance ((−2)² + (−1)² + 3²) / 2 = 7.
    assert group_relative(REWARDS, GROUPS, divide=False).tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    divided = [difference / (math.sqrt(7) + 1e-4) for difference in (-2.0, -1.0, 3.0)]
    assert group_relative(REWARDS, GROUPS, divide=True).tolist() == pytest.approx([*divided, 0, 0, 0, 0, 0])


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others() -> None:
    # 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2
    assert leave_one_out(REWARDS, GROUPS).tolist() == pytest.approx([-3.0, -1.5, 4.5, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("seed", range(3))
def test_advantages_of_groups_equal_loops_over_the_groups(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(9).repeat_interleave(torch.randint(1, 6, (9,), generator=generator))
    rewards = 3 * torch.randn(len(groups), generator=generator) + 7
    for index, (reward, group) in enumerate(zip(rewards.tolist(), groups.tolist(), strict=True)):
        mine = rewards[groups == group].tolist()
        centred = reward - statistics.fmean(mine)
        deviation = statistics.stdev(mine) if len(mine) > 1 else 0.0
        others = rewards[(groups == group) & (torch.arange(len(groups)) != index)].tolist()
        alone = reward - (statistics.fmean(others) if others else reward)
        assert group_relative(rewards, groups, divide=False)[index].item() == pytest.approx(centred, abs=1e-5)
        expected = pytest.approx(centred / (deviation + 1e-4), abs=1e-4)
        assert group_relative(rewards, groups, divide=True)[index].item() == expected
        assert leave_one_out(rewards, groups)[index].item() == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.1, -0.7, 100.3, 12345.67])
@pytest.mark.parametrize("count", [1, 3, 7, 24])
def test_equal_rewards_have_no_advantage_at_all_whatever_their_level(level: float, count: int) -> None:
    """Not even by rounding: the mean of equal numbers need not be that number, and a tiny deviation divides."""
    rewards, groups = torch.full((count,), level), torch.zeros(count, dtype=torch.int64)
    assert group_relative(rewards, groups, divide=True).tolist() == [0.0] * count
    assert group_relative(rewards, groups, divide=False).tolist() == [0.0] * count
    assert leave_one_out(rewards, groups).tolist() == [0.0] * count
    assert whiten(rewards).tolist() == [0.0] * count


def test_advantages_of_a_group_do_not_depend_on_the_level_of_its_rewards() -> None:
    shifted = REWARDS + torch.tensor([64.0, -32.0, 8.0])[GROUPS]
    for divide in (True, False):
        torch.testing.assert_close(
            group_relative(shifted, GROUPS, divide=divide), group_relative(REWARDS, GROUPS, divide=divide)
        )
    torch.testing.assert_close(leave_one_out(shifted, GROUPS), leave_one_out(REWARDS, GROUPS))


def test_white_numbers_have_mean_zero_and_variance_one() -> None:
    white = whiten(100 + 5 * torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert white.mean().item() == pytest.approx(0, abs=1e-5)
    assert white.var().item() == pytest.approx(1, abs=1e-4)


def test_whitening_worked_by_hand() -> None:
    # Mean 2, variance (1 + 0 + 1) / 2 = 1.
    assert whiten(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-1.0, 0.0, 1.0])


def test_whitening_keeps_order_and_forgets_level_and_scale() -> None:
    values = torch.tensor([3.0, -1.0, 0.5, 8.0])
    torch.testing.assert_close(whiten(4 * values - 7), whiten(values))
