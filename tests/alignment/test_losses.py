"""The losses against numbers worked by hand, and against what must hold for any numbers."""

import math

import pytest
import torch
from torch import Tensor

from alignment.losses.policy import KLEstimator, clipped_policy, clipped_value, kl_penalty
from alignment.losses.preference import Pairs, Side, hinge, ipo, sft, sigmoid
from alignment.losses.reward import pairwise_reward


def pairs_with(gap: Tensor) -> Pairs:
    """Pairs of completions of one token each, whose log-ratios differ by so much."""
    zeros, ones = torch.zeros_like(gap), torch.ones_like(gap)
    chosen = Side(logprobs=gap - 3, reference_logprobs=zeros - 3, lengths=ones)
    return Pairs(chosen=chosen, rejected=Side(logprobs=zeros - 2, reference_logprobs=zeros - 2, lengths=ones))


def test_golden_numbers_worked_by_hand() -> None:
    gap = torch.tensor([0.0, 10.0, -10.0])
    # -log σ(0), -log σ(1), -log σ(-1)
    assert sigmoid(pairs_with(gap), beta=0.1).tolist() == pytest.approx([math.log(2), 0.3132617, 1.3132617])
    # (0 - 5)², (10 - 5)², (-10 - 5)²
    assert ipo(pairs_with(gap), beta=0.1).tolist() == pytest.approx([25.0, 25.0, 225.0])
    # 1 - 0, 1 - 1, 1 + 1
    assert hinge(pairs_with(gap), beta=0.1).tolist() == pytest.approx([1.0, 0.0, 2.0])


def test_equal_log_ratios_cost_log_two_whatever_beta_is() -> None:
    for beta in (0.01, 0.1, 5.0):
        assert float(sigmoid(pairs_with(torch.zeros(1)), beta=beta)) == pytest.approx(math.log(2))


def test_the_gradient_of_dpo_is_minus_beta_times_sigmoid_of_the_reversed_gap() -> None:
    gap = torch.tensor([-3.0, 0.0, 2.0], requires_grad=True)
    sigmoid(pairs_with(gap), beta=0.5).sum().backward()
    expected = -0.5 * torch.sigmoid(-0.5 * gap.detach())
    torch.testing.assert_close(gap.grad, expected)


def test_extreme_gaps_stay_finite() -> None:
    gap = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = sigmoid(pairs_with(gap), beta=1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and gap.grad is not None and torch.isfinite(gap.grad).all()


def test_ipo_is_smallest_where_the_gap_is_half_the_reciprocal_of_beta() -> None:
    gap = torch.tensor([1 / (2 * 0.25)], requires_grad=True)
    loss = ipo(pairs_with(gap), beta=0.25)
    loss.backward()
    assert loss.item() == 0 and gap.grad is not None and gap.grad.item() == 0


def test_hinge_has_no_gradient_once_the_margin_is_kept() -> None:
    gap = torch.tensor([9.0, 11.0], requires_grad=True)
    hinge(pairs_with(gap), beta=0.1).sum().backward()
    assert gap.grad is not None and gap.grad.tolist() == pytest.approx([-0.1, 0.0])


def gradient_of(loss: Tensor, leaf: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return gradient


def test_the_likelihood_of_the_chosen_answer_worked_by_hand() -> None:
    logps = torch.tensor([-6.0, -1.0], requires_grad=True)
    zeros = torch.zeros(2)
    chosen = Side(logprobs=logps, reference_logprobs=zeros, lengths=torch.tensor([3, 4]))
    rejected = Side(logprobs=zeros, reference_logprobs=zeros, lengths=torch.ones(2))
    values = sft(Pairs(chosen=chosen, rejected=rejected), beta=0.1)
    assert values.tolist() == pytest.approx([2.0, 0.25])
    values.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([-1 / 3, -1 / 4]))


def test_the_reward_models_loss_worked_by_hand() -> None:
    loss = pairwise_reward(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([2.0, -1.0, 1.0]))
    assert loss.tolist() == pytest.approx([math.log(2), 0.3132617, 1.3132617])
    extreme = torch.tensor([-1e4, 1e4], requires_grad=True)
    assert torch.isfinite(gradient_of(pairwise_reward(extreme, torch.zeros(2)), extreme)).all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.6, 0.0),  # good, and grown enough: 1.3 · 2
        (1.5, -2.0, 3.0, 3.0),  # bad, and grown all the same: no bound
        (0.5, 2.0, -1.0, -1.0),  # good, and shrunk all the same
        (0.5, -2.0, 1.8, 0.0),  # bad, and shrunk enough: 0.9 · 2
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_loss_worked_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logratio = torch.tensor([ratio]).log().requires_grad_()
    found = clipped_policy(logratio, torch.tensor([advantage]), low=0.1, high=0.3)
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert gradient_of(found, logratio).item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (1.1, 0.5 * 0.9**2, -0.9),  # near the old value of 1: not clipped
        (1.5, 0.5 * 0.8**2, 0.0),  # moved by more than 0.2 towards the return of 2: no further
        (0.5, 0.5 * 1.5**2, -1.5),  # moved away from it: the way back is open
    ],
)
def test_the_critics_loss_worked_by_hand(value: float, loss: float, slope: float) -> None:
    said = torch.tensor([value], requires_grad=True)
    found = clipped_value(said, torch.ones(1), torch.tensor([2.0]), clip=0.2)
    assert found.item() == pytest.approx(loss)
    assert gradient_of(found, said).item() == pytest.approx(slope, abs=1e-6)


def test_a_value_without_a_bound_is_half_the_squared_error() -> None:
    values, old, returns = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    found = clipped_value(values, old, returns, clip=math.inf)
    torch.testing.assert_close(found, (values - returns).square() / 2)


def test_divergence_estimates_worked_by_hand() -> None:
    gap = torch.tensor([0.0, 0.5, -0.5])
    assert kl_penalty(gap, estimator="k2").tolist() == pytest.approx([0, 0.125, 0.125])
    k3 = [0, math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5]
    assert kl_penalty(gap, estimator="k3").tolist() == pytest.approx(k3)
    assert kl_penalty(gap, estimator="k3_plain").tolist() == pytest.approx(k3)


def test_k3_has_its_own_value_and_the_gradient_of_k2() -> None:
    gap = torch.linspace(-3, 3, 31, requires_grad=True)
    torch.testing.assert_close(kl_penalty(gap, estimator="k3"), kl_penalty(gap, estimator="k3_plain"))
    torch.testing.assert_close(
        gradient_of(kl_penalty(gap, estimator="k3"), gap), gradient_of(kl_penalty(gap, estimator="k2"), gap)
    )


def softmaxes(size: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy, its probabilities, and those of a reference that is clearly another."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
    return logits, logits.softmax(0), torch.randn(size, generator=generator, dtype=torch.float64).softmax(0)


def expected_slope(estimator: KLEstimator) -> Tensor:
    """Of the penalty, over all tokens of the vocabulary, each as often as the policy draws it."""
    logits, policy, reference = softmaxes()
    penalty = kl_penalty(policy.log() - reference.log(), estimator=estimator)
    return gradient_of(policy.detach() * penalty, logits)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_in_expectation_the_gradient_of_the_penalty_is_that_of_the_divergence(estimator: KLEstimator) -> None:
    logits, policy, reference = softmaxes()
    divergence = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close(expected_slope(estimator), gradient_of(divergence, logits))


def test_in_expectation_plain_k3_follows_the_reversed_divergence_instead() -> None:
    logits, policy, reference = softmaxes()
    reversed_divergence = (reference * (reference / policy).log()).sum()
    torch.testing.assert_close(expected_slope("k3_plain"), gradient_of(reversed_divergence, logits))
    assert (expected_slope("k3_plain") - expected_slope("k2")).abs().max() > 0.01


@pytest.mark.parametrize("estimator", ["k3", "k3_plain"])
def test_in_expectation_the_value_of_k3_is_the_divergence(estimator: KLEstimator) -> None:
    _, policy, reference = softmaxes()
    found = (policy * kl_penalty(policy.log() - reference.log(), estimator=estimator)).sum()
    torch.testing.assert_close(found, (policy * (policy / reference).log()).sum())


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_plain"])
def test_extreme_log_ratios_stay_finite(estimator: KLEstimator) -> None:
    gap = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    for loss in (
        kl_penalty(gap, estimator=estimator),
        clipped_policy(gap, torch.tensor([-1.0, -1.0, 1.0]), low=0.2, high=0.2),
    ):
        assert torch.isfinite(loss).all() and torch.isfinite(gradient_of(loss, gap)).all()
