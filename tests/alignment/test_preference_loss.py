"""Losses of preference by name: one, one's own, and weighted sums; and groups that an algorithm adds to a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.algorithms.dpo import DPO
from alignment.batch import Batch, Loss, Outputs, Term
from alignment.data.packing import pack
from alignment.errors import ConfigError, DivergenceError
from alignment.groups import Completion, Group
from alignment.losses.preference import PREFERENCE_LOSSES, Pairs
from alignment.run_folder import RunFolder
from alignment.settings.load import check_config
from alignment.settings.run import RunConfig
from tests.alignment.test_train import run

Settings = dict[str, Any]


def minus_gap(pairs: Pairs, *, beta: float) -> Tensor:
    """A loss of one's own."""
    return -beta * pairs.logratio_gap


def averaged(pairs: Pairs, *, beta: float) -> Tensor:
    return minus_gap(pairs, beta=beta).mean()


def in_a_column(pairs: Pairs, *, beta: float) -> Tensor:
    return minus_gap(pairs, beta=beta)[:, None]


def with_margin(pairs: Pairs, *, beta: float, margin: float) -> Tensor:
    return minus_gap(pairs, beta=beta) + margin


def raises(pairs: Pairs, *, beta: float) -> Tensor:
    return beta(pairs)  # type: ignore[operator]


def plain_number(pairs: Pairs, *, beta: float) -> float:
    return 0.5


def detached(pairs: Pairs, *, beta: float) -> Tensor:
    return minus_gap(pairs, beta=beta).detach()


def unrelated(pairs: Pairs, *, beta: float) -> Tensor:
    return torch.ones(3, requires_grad=True) * 2


def logarithm(pairs: Pairs, *, beta: float) -> Tensor:
    return pairs.logratio_gap.log()


def whole_numbers(pairs: Pairs, *, beta: float) -> Tensor:
    return pairs.chosen.lengths


async def coroutine(pairs: Pairs, *, beta: float) -> Tensor:
    return minus_gap(pairs, beta=beta)


def averaged_later(pairs: Pairs, *, beta: float) -> Tensor:
    """Passes the trial, which has three pairs, and fails in a step."""
    losses = minus_gap(pairs, beta=beta)
    return losses if len(losses) == 3 else losses.mean()


def infinite_later(pairs: Pairs, *, beta: float) -> Tensor:
    losses = minus_gap(pairs, beta=beta)
    return losses if len(losses) == 3 else losses * float("inf")


class Twice(DPO):
    """An algorithm that trains on every pair of a step, and on its mirror image."""

    name: str = f"{__name__}:Twice"

    def assemble(self, groups: list[Group]) -> list[Group]:
        return groups + [_mirrored(group) for group in groups]


class Averaged(DPO):
    """An algorithm that averages its losses itself."""

    name: str = f"{__name__}:Averaged"

    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        loss = super().loss(batch, outputs)
        return dataclasses.replace(loss, terms=(Term(values=loss.terms[0].values.mean(), unit="pair"),))


def _mirrored(group: Group) -> Group:
    rewards = [completion.reward for completion in group.completions]
    completions = zip(group.completions, reversed(rewards), strict=True)
    return dataclasses.replace(group, completions=tuple(dataclasses.replace(c, reward=r) for c, r in completions))


def completion(reward: float, *tokens: int) -> Completion:
    return Completion(
        text="",
        reward=reward,
        tokens=tokens,
        loss_mask=(True,) * len(tokens),
        reference_logprobs=-torch.ones(len(tokens)),
    )


@pytest.fixture
def batch() -> Batch:
    first = Group(id="a", prompt="", prompt_tokens=(1, 2), completions=(completion(1, 3, 4), completion(0, 5)))
    second = Group(id="b", prompt="", prompt_tokens=(1,), completions=(completion(0, 3), completion(1, 6, 7, 8)))
    return pack([first, second])


def values_of(batch: Batch, **settings: Any) -> Tensor:
    logprobs = torch.linspace(-2, 0, len(batch.tokens)) * batch.loss_mask
    (term,) = DPO(name="dpo", beta=0.3, **settings).loss(batch, Outputs(logprobs=logprobs)).terms
    return term.values


def test_a_weighted_sum_is_the_sum_of_its_losses(batch: Batch) -> None:
    weights = {name: 0.5 + index for index, name in enumerate(PREFERENCE_LOSSES)}
    expected = sum(weight * values_of(batch, loss_type=name) for name, weight in weights.items())
    torch.testing.assert_close(values_of(batch, loss_type=weights), expected)
    torch.testing.assert_close(values_of(batch, loss=weights), expected)


def test_rpo_alpha_is_the_weight_of_sft(batch: Batch) -> None:
    by_weight = values_of(batch, loss={"sigmoid": 1.0, "sft": 0.2})
    torch.testing.assert_close(values_of(batch, rpo_alpha=0.2), by_weight)
    torch.testing.assert_close(values_of(batch, loss={"sigmoid": 1.0, "sft": 0.1}, rpo_alpha=0.1), by_weight)


def test_a_loss_of_ones_own_is_found_by_its_dotted_name(batch: Batch) -> None:
    own = values_of(batch, loss_type=f"{__name__}:minus_gap")
    torch.testing.assert_close(values_of(batch), -torch.nn.functional.logsigmoid(-own))


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        ({"loss": "sgmoid"}, "did you mean 'sigmoid'"),
        ({"loss": {"sigmoid": 1.0, "stf": 0.2}}, "did you mean 'sft'"),
        ({"loss": {}}, "at least one loss is wanted"),
        ({"loss": {"sigmoid": -1.0}}, "greater than 0"),
        ({"loss": "sigmoid", "loss_type": "ipo"}, "both are given"),
        ({"loss": "no.such:module"}, "cannot be imported"),
    ],
)
def test_what_is_no_loss_is_refused_with_the_reason(algorithm: Settings, reason: str, run_settings: Settings) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_config({**run_settings, "algorithm": {"name": "dpo", **algorithm}}, kind=RunConfig)


def test_an_algorithm_may_add_groups_to_a_step(run_settings: Settings) -> None:
    """A pair and its mirror image have opposite gradients where the model is the reference, so nothing is learned."""
    settings = {**run_settings, "algorithm": {"name": f"{__name__}:Twice"}, "steps": 1}
    line = RunFolder(run(settings)).read_metrics()[-1]
    assert line["grad_norm"] < 1e-6 and line["rewards/accuracies"] == 0.5
    assert (
        RunFolder(run({**settings, "name": "once", "algorithm": {"name": "dpo"}})).read_metrics()[-1]["grad_norm"]
        > 1e-3
    )


WRONG_LOSSES = [
    ("averaged", "returned shape (), must be [M]: one loss for each of 3 pairs; leave out the mean or sum"),
    ("in_a_column", "returned shape (3, 1), must be [M]"),
    ("with_margin", "raised TypeError: with_margin() missing 1 required keyword-only argument: 'margin'"),
    ("raises", "raised TypeError: 'float' object is not callable. It is called as loss(pairs, beta=0.3)"),
    ("plain_number", "returned a float, must be a tensor of shape [M]"),
    ("coroutine", "returned a coroutine, must be a tensor of shape [M]"),
    ("detached", "has no gradient, so nothing would be learned"),
    ("unrelated", "has no gradient, so nothing would be learned"),
    ("whole_numbers", "returned a tensor of torch.int64, must be of a floating dtype"),
    ("logarithm", "must be finite"),
]


@pytest.mark.filterwarnings("ignore:coroutine 'coroutine' was never awaited")
@pytest.mark.parametrize("key", ["loss", "loss_type"])
@pytest.mark.parametrize(("function", "fault"), WRONG_LOSSES, ids=[name for name, _ in WRONG_LOSSES])
def test_a_loss_of_ones_own_is_tried_before_a_run(key: str, function: str, fault: str, run_settings: Settings) -> None:
    name = f"{__name__}:{function}"
    for value in (name, {"sigmoid": 1.0, name: 0.5}):
        algorithm = {"name": "dpo", "beta": 0.3, key: value}
        with pytest.raises(ConfigError) as caught:
            check_config({**run_settings, "algorithm": algorithm}, kind=RunConfig)
        (problem,) = str(caught.value).splitlines()
        assert problem.startswith(f"algorithm.{key}: loss '{name}' ") and fault in problem


def test_the_trial_leaves_random_numbers_as_they_are() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    DPO(name="dpo", loss_type=f"{__name__}:minus_gap")
    assert torch.rand(1) == expected


def test_a_loss_that_averages_in_a_step_only_is_refused_there(batch: Batch) -> None:
    with pytest.raises(ConfigError, match=r"averaged_later' returned shape \(\), must be \[M\]"):
        values_of(batch, loss_type=f"{__name__}:averaged_later")


def test_a_term_that_is_averaged_is_refused(run_settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"a term of shape \(\), must be \[n\]: one value per pair, not averaged"):
        run({**run_settings, "algorithm": {"name": f"{__name__}:Averaged"}})


def test_a_loss_that_is_not_finite_is_told_by_its_name(run_settings: Settings) -> None:
    for value in (f"{__name__}:infinite_later", {"sigmoid": 1.0, f"{__name__}:infinite_later": 0.5}):
        with pytest.raises(DivergenceError, match=rf"loss -?(inf|nan) \({__name__}:infinite_later\) and gradient"):
            run({**run_settings, "algorithm": {"name": "dpo", "loss": value}})


def test_each_loss_of_a_sum_is_a_metric(batch: Batch) -> None:
    logprobs = torch.linspace(-2, 0, len(batch.tokens)) * batch.loss_mask
    own = f"{__name__}:minus_gap"
    weights = {"sigmoid": 1.0, own: 0.5}
    metrics = DPO(name="dpo", beta=0.3, loss=weights).loss(batch, Outputs(logprobs=logprobs)).metrics
    torch.testing.assert_close(metrics["loss/sigmoid"], values_of(batch))
    torch.testing.assert_close(metrics["loss/minus_gap"], values_of(batch, loss=own))
    single = DPO(name="dpo", loss=own).loss(batch, Outputs(logprobs=logprobs)).metrics
    assert not any(name.startswith("loss/") for name in single)
