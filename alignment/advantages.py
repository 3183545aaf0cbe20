"""Advantages as pure functions of tensors: how much better an action was than what the policy does on average."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it."""


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation: equations 11 to 16 of arXiv 1506.02438, for episodes that end.

    A[t] = δ[t] + γλ·A[t + 1] with δ[t] = r[t] + γ·V[t + 1] − V[t], and nothing after the last action. Only actions are
    rows here: whatever a policy did not choose (a prompt, a tool's output) must be left out before, so that the value
    of the next state that it acted in is the one carried over the gap.

    Args:
        rewards: [N, L] of each action, left-aligned.
        values: [N, L] of the state in which each action was chosen.
        lengths: [N] int64 number of actions of each row.
        gamma: discount of the future, 0 to 1.
        lam: 0 trusts the values alone, 1 the rewards alone.

    Returns:
        [N, L] advantages; 0 beyond each row's length.
    """
    advantages = torch.zeros_like(values)
    after = torch.zeros_like(values[:, 0])  # A[t + 1]
    value_after = torch.zeros_like(after)  # V[t + 1]
    for t in reversed(range(values.shape[1])):
        inside = (t < lengths).to(values.dtype)
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        after = inside * (delta + gamma * lam * after)
        value_after = inside * values[:, t]
        advantages[:, t] = after
    return advantages


def group_relative(rewards: Tensor, groups: Tensor, *, divide: bool) -> Tensor:
    """Reward minus the mean of its group, divided by the group's standard deviation if asked for: arXiv 2402.03300.

    Args:
        rewards: [N] of each completion.
        groups: [N] int64 group of each completion.
        divide: by the standard deviation (of n − 1); without, as in Dr. GRPO (arXiv 2503.20783), hard and easy
            prompts weigh alike.

    Returns:
        [N] advantages; exactly 0 in groups of one or of equal rewards.
    """
    centred, count = _centred(rewards, groups)
    if not divide:
        return centred
    squares = torch.zeros_like(count).index_add(0, groups, centred.square())
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    return centred / (deviation[groups] + EPSILON)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """Reward minus the mean of the *other* completions of its group (RLOO): equation 8 of arXiv 2402.14740.

    Args:
        rewards: [N] of each completion.
        groups: [N] int64 group of each completion.

    Returns:
        [N] advantages; exactly 0 in groups of one or of equal rewards.
    """
    centred, count = _centred(rewards, groups)
    return centred * (count / (count - 1).clamp(min=1))[groups]


def whiten(values: Tensor) -> Tensor:
    """Values with mean 0 and variance 1.

    Args:
        values: [n], the whole global batch's.

    Returns:
        [n]; of one value, or of equal ones, zeros.
    """
    centred, _ = _centred(values, torch.zeros(values.shape, dtype=torch.int64, device=values.device))
    deviation = (centred.square().sum() / max(1, values.numel() - 1)).sqrt()
    return centred / (deviation + 1e-8)


def _centred(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """[N] rewards minus the mean of their group, and [G] number of completions of each group."""
    count = torch.bincount(groups).to(rewards.dtype)
    # Measured from the group's best, equal rewards are exactly 0; the mean of equal numbers need not be that number,
    # and the rest of the rounding would be divided by a deviation that is rounding too.
    best = torch.full_like(count, -torch.inf).scatter_reduce(0, groups, rewards, "amax")
    below = rewards - best[groups]
    mean = torch.zeros_like(count).index_add(0, groups, below) / count.clamp(min=1)
    return below - mean[groups], count
