"""One optimizer step: what must not change its result, and what happens when it cannot be taken."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from alignment.algorithms import Algorithm
from alignment.data.chat import GroupTokenizer
from alignment.data.reader import GroupReader
from alignment.data.stream import load_data
from alignment.distributed.world import World
from alignment.errors import ConfigError, DivergenceError
from alignment.groups import Group
from alignment.metrics import Metrics
from alignment.models.roles import Roles, reference_of
from alignment.settings.run import OptimConfig, RunConfig
from alignment.step import StepSettings, evaluate, learning_rate, train_step

Settings = dict[str, Any]


def prepared(settings: Settings) -> tuple[RunConfig, Algorithm, Roles, list[Group]]:
    config = RunConfig.model_validate(settings)
    algorithm = config.algorithm
    assert isinstance(algorithm, Algorithm)
    roles = Roles.build(config, World())
    tokenizer = GroupTokenizer(roles.actor.tokenizer, config.data, roles.actor.end_tokens)
    data = load_data(GroupReader(config.data, algorithm, tokenizer), seed=0, progress=False)
    return config, algorithm, roles, data.train.take(8)


def one_step(
    roles: Roles, algorithm: Algorithm, groups: list[Group], optim: OptimConfig, world: World, *, lr: float
) -> Metrics:
    return train_step(roles, algorithm, groups, optim, world, StepSettings(lr={"actor": lr}))


def weights_after(settings: Settings, groups_order: int = 1, **optim: Any) -> tuple[dict[str, float], dict[str, Any]]:
    config, algorithm, roles, groups = prepared(settings)
    changed = config.optim.model_copy(update=optim)
    # Plain gradient descent: adaptive optimizers blow rounding of a tiny gradient up to a full step.
    roles.actor_backend.optimizer = torch.optim.SGD(list(roles.actor_backend.masters.values()))
    metrics = one_step(roles, algorithm, groups[::groups_order], changed, World(), lr=1.0)
    return metrics, {name: weight.detach().clone() for name, weight in roles.actor_backend.weights.items()}


@pytest.mark.parametrize(
    "algorithm",
    [{"name": "dpo"}, {"name": "dpo", "loss_type": "ipo"}, {"name": "dpo", "rpo_alpha": 0.5}, {"name": "sft"}],
)
def test_neither_micro_batches_nor_row_order_change_the_step(run_settings: Settings, algorithm: Settings) -> None:
    settings = {**run_settings, "algorithm": algorithm, "optim": {"max_grad_norm": 0}}
    metrics, weights = weights_after(settings)
    for other_metrics, other_weights in (
        weights_after(settings, micro_batch_tokens=1),
        weights_after(settings, groups_order=-1),
        weights_after(settings, groups_order=-1, micro_batch_tokens=60),
    ):
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, atol=1e-5, rtol=1e-5)


def test_before_the_first_step_actor_and_reference_agree(run_settings: Settings) -> None:
    for model in ({}, {"lora": {"rank": 4}}):
        settings = {**run_settings, "model": {**run_settings["model"], **model}}
        config, algorithm, roles, groups = prepared(settings)
        metrics = evaluate(roles, algorithm, groups, config.optim, World())
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
        assert metrics["rewards/accuracies"] == pytest.approx(0.5, abs=0.5)


def test_an_adapter_taken_off_is_the_starting_model_even_after_training(run_settings: Settings) -> None:
    settings = {**run_settings, "model": {**run_settings["model"], "lora": {"rank": 4, "dropout": 0.5}}}
    config, algorithm, roles, groups = prepared(settings)
    before = evaluate(roles, algorithm, groups, config.optim, World())
    for _ in range(3):
        one_step(roles, algorithm, groups, config.optim, World(), lr=1e-2)
    after = evaluate(roles, algorithm, groups, config.optim, World())
    for name in ("chosen", "rejected"):
        reference = after[f"logps/{name}"] - after[f"rewards/{name}"] / 0.1
        assert reference == pytest.approx(before[f"logps/{name}"], abs=1e-3)
    assert after["rewards/margins"] > before["rewards/margins"]


def test_a_ranked_group_costs_its_pairs_and_a_pair_costs_the_same_in_any_company(run_settings: Settings) -> None:
    config, algorithm, roles, groups = prepared(run_settings)
    alone = [evaluate(roles, algorithm, [group], config.optim, World())["loss"] for group in groups]
    together = evaluate(roles, algorithm, groups, config.optim, World())["loss"]
    assert together == pytest.approx(sum(alone) / len(alone), abs=1e-6)


def test_sft_loss_is_the_mean_over_tokens_not_over_rows(run_settings: Settings) -> None:
    config, algorithm, roles, groups = prepared({**run_settings, "algorithm": {"name": "sft"}})
    alone = [evaluate(roles, algorithm, [group], config.optim, World())["loss"] for group in groups]
    lengths = [len(group.completions[0].tokens) for group in groups]
    expected = sum(loss * length for loss, length in zip(alone, lengths, strict=True)) / sum(lengths)
    assert evaluate(roles, algorithm, groups, config.optim, World())["loss"] == pytest.approx(expected, abs=1e-5)


def test_bf16_keeps_fp32_masters_that_small_steps_move(run_settings: Settings) -> None:
    settings = {**run_settings, "model": {**run_settings["model"], "dtype": "bf16"}}
    config, algorithm, roles, groups = prepared(settings)
    name = next(iter(roles.actor_backend.weights))
    master = roles.actor_backend.masters[name].detach().clone()
    weight = roles.actor_backend.weights[name].detach().clone()
    one_step(roles, algorithm, groups, config.optim, World(), lr=1e-6)
    assert roles.actor_backend.weights[name].dtype == torch.bfloat16
    assert roles.actor_backend.masters[name].dtype == torch.float32
    assert (roles.actor_backend.masters[name] != master).any(), "the master must move"
    assert (roles.actor_backend.weights[name] == weight).float().mean() > 0.9, (
        "a step below bf16's resolution rounds away"
    )


def poisoned(settings: Settings) -> tuple[RunConfig, Algorithm, Roles, list[Group]]:
    config, algorithm, roles, groups = prepared(settings)
    with torch.no_grad():
        next(iter(roles.actor_backend.weights.values()))[0, 0] = float("nan")
    return config, algorithm, roles, groups


def test_a_loss_that_is_not_finite_stops_the_run_and_changes_no_weight(run_settings: Settings) -> None:
    config, algorithm, roles, groups = poisoned(run_settings)
    before = {name: weight.detach().clone() for name, weight in roles.actor_backend.weights.items()}
    with pytest.raises(DivergenceError, match=r"not both finite.*pairs\.jsonl"):
        one_step(roles, algorithm, groups, config.optim, World(), lr=1e-2)
    for name, weight in roles.actor_backend.weights.items():
        torch.testing.assert_close(weight, before[name], equal_nan=True)
    assert not roles.actor_backend.optimizer.state, "the optimizer's moments must not be poisoned"


def test_a_loss_that_is_not_finite_can_be_skipped_and_is_counted(run_settings: Settings) -> None:
    config, algorithm, roles, groups = poisoned({**run_settings, "optim": {"on_nonfinite": "skip"}})
    assert one_step(roles, algorithm, groups, config.optim, World(), lr=1e-2)["skipped"] == 1


def test_gradients_are_clipped_to_the_configured_norm(run_settings: Settings) -> None:
    sgd_like = {"name": "rmsprop", "max_grad_norm": 1e-3}
    metrics, _ = weights_after({**run_settings, "optim": sgd_like})
    assert metrics["grad_norm"] > 1e-3, "the reported norm is the one before clipping"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.5, 1.0, 1.0, 0.868198, 0.55, 0.231802]),
        ("inverse_sqrt", [0.5, 1.0, 0.1 + 0.9 * (2 / 3) ** 0.5, 0.1 + 0.9 * 0.5**0.5, 0.669210, 0.619615]),
    ],
)
def test_learning_rates_follow_their_schedule(schedule: Any, expected: list[float]) -> None:
    optim = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=2, min_lr_ratio=0.1)
    assert [learning_rate(optim, step, 6) for step in range(6)] == pytest.approx(expected, abs=1e-6)


def test_warmup_ratio_is_a_fraction_of_all_steps() -> None:
    optim = OptimConfig(lr=1.0, schedule="constant", warmup_ratio=0.25)
    assert [learning_rate(optim, step, 8) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_the_way_to_the_reference_must_go_with_the_training(run_settings: Settings) -> None:
    def reference(**changed: Any) -> str:
        return reference_of(RunConfig.model_validate({**run_settings, **changed}))

    lora = {**run_settings["model"], "lora": {}}
    assert reference() == "copy"
    assert reference(model=lora) == "adapter_off"
    assert reference(algorithm={"name": "sft"}) == "none"
    with pytest.raises(ConfigError, match=r"needs model\.lora"):
        reference(algorithm={"name": "dpo", "reference": "adapter_off"})
    with pytest.raises(ConfigError, match="not a stream"):
        streaming = {**run_settings["data"], "streaming": True, "eval_groups": 0}
        reference(algorithm={"name": "dpo", "reference": "precomputed"}, data=streaming)


def plain_descent(weights: list[torch.nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer of one's own."""
    return torch.optim.SGD(weights, lr=optim.lr)


OWN_OPTIMIZER = "tests.alignment.test_step:plain_descent"


def test_an_optimizer_of_ones_own_trains_a_step(run_settings: Settings) -> None:
    settings = {**run_settings, "optim": {**run_settings["optim"], "name": OWN_OPTIMIZER}}
    config, algorithm, roles, groups = prepared(settings)
    before = {name: weight.detach().clone() for name, weight in roles.actor_backend.weights.items()}
    assert type(roles.actor_backend.optimizer) is torch.optim.SGD
    metrics = one_step(roles, algorithm, groups, config.optim, World(), lr=1.0)
    assert metrics["grad_norm"] > 0
    assert any(not torch.equal(before[name], weight) for name, weight in roles.actor_backend.weights.items())


def test_an_optimizer_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(ValidationError, match="did you mean 'adamw'"):
        OptimConfig(name="adamv")
    with pytest.raises(ValidationError, match="which are not known"):
        OptimConfig.model_validate({"name": OWN_OPTIMIZER, "zero": {"stage": 1}})
