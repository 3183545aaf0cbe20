"""Losses of preference by name: one, one's own, and weighted sums; and groups that an algorithm adds to a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.algorithms.dpo import DPO
from alignment.batch import Batch, Outputs
from alignment.data.packing import pack
from alignment.errors import ConfigError
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


class Twice(DPO):
    """An algorithm that trains on every pair of a step, and on its mirror image."""

    name: str = f"{__name__}:Twice"

    def assemble(self, groups: list[Group]) -> list[Group]:
        return groups + [_mirrored(group) for group in groups]


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
