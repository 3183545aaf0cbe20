"""Advantages as pure functions of tensors: how much better an action is than the policy's average."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to a standard deviation before a division by it."""


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation: equations 11 to 16 of arXiv 1506.02438, for episodes that end.

    A[t] = δ[t] + γλ·A[t + 1] with δ[t] = r[t] + γ·V[t + 1] − V[t]; A and V are 0 after the last action. The columns are
    actions of the policy alone: tokens that it did not choose (a prompt, the output of a tool) must be left out, so
    that V[t + 1] is the value of the next state in which the policy acted.

    Args:
        rewards: [N, L] reward of each action, left-aligned.
        values: [N, L] value of the state in which each action was chosen.
        lengths: [N] int64 number of actions of each row.
        gamma: discount of future rewards, 0 to 1.
        lam: λ, 0 to 1; 0 relies on the values alone, 1 on the rewards alone.

    Returns:
        [N, L] advantages; 0 beyond each row's length.
    """
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros_like(values[:, 0])  # A[t + 1]
    next_value = torch.zeros_like(next_advantage)  # V[t + 1]
    for t in reversed(range(values.shape[1])):
        is_action = (t < lengths).to(values.dtype)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = is_action * (delta + gamma * lam * next_advantage)
        next_value = is_action * values[:, t]
        advantages[:, t] = next_advantage
    return advantages


def group_relative(rewards: Tensor, group_index: Tensor, *, divide: bool) -> Tensor:
    """Reward minus the mean of its group, optionally divided by the group's standard deviation: arXiv 2402.03300.

    Args:
        rewards: [N] reward of each completion.
        group_index: [N] int64 index of each completion's group.
        divide: divide by the standard deviation (of n − 1). Without it, as in Dr. GRPO (arXiv 2503.20783), hard and
            easy prompts have the same weight.

    Returns:
        [N] advantages; exactly 0 in groups of one or of equal rewards.
    """
    centred_rewards, group_sizes = _centre(rewards, group_index)
    if not divide:
        return centred_rewards
    squares = torch.zeros_like(group_sizes).index_add(0, group_index, centred_rewards.square())
    deviation = (squares / (group_sizes - 1).clamp(min=1)).sqrt()
    return centred_rewards / (deviation[group_index] + EPSILON)


def leave_one_out(rewards: Tensor, group_index: Tensor) -> Tensor:
    """Reward minus the mean of the *other* completions of its group (RLOO): equation 8 of arXiv 2402.14740.

    Args:
        rewards: [N] reward of each completion.
        group_index: [N] int64 index of each completion's group.

    Returns:
        [N] advantages; exactly 0 in groups of one or of equal rewards.
    """
    centred_rewards, group_sizes = _centre(rewards, group_index)
    return centred_rewards * (group_sizes / (group_sizes - 1).clamp(min=1))[group_index]


def whiten(values: Tensor) -> Tensor:
    """Shifts and scales values to mean 0 and variance 1.

    Args:
        values: [n] the values of the whole global batch.

    Returns:
        [n] whitened values; zeros for a single value or equal values.
    """
    centred_values, _ = _centre(values, torch.zeros(values.shape, dtype=torch.int64, device=values.device))
    deviation = (centred_values.square().sum() / max(1, values.numel() - 1)).sqrt()
    return centred_values / (deviation + 1e-8)


def _centre(rewards: Tensor, group_index: Tensor) -> tuple[Tensor, Tensor]:
    """[N] rewards minus the mean of their group, and [G] number of completions of each group."""
    group_sizes = torch.bincount(group_index).to(rewards.dtype)
    # The mean of equal numbers may differ from them by rounding, and that difference would be divided by a deviation
    # that is rounding too. Measured from the largest reward of its group, equal rewards are exactly 0.
    best_rewards = torch.full_like(group_sizes, -torch.inf).scatter_reduce(0, group_index, rewards, "amax")
    distances = rewards - best_rewards[group_index]
    mean_distances = torch.zeros_like(group_sizes).index_add(0, group_index, distances) / group_sizes.clamp(min=1)
    return distances - mean_distances[group_index], group_sizes
