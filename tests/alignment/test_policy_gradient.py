"""PPO and its relatives against loops over plain lists, written from the papers, and against what must always hold."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from alignment.algorithms import Algorithm
from alignment.algorithms._policy_gradient import PolicyGradient
from alignment.batch import Batch, Loss, Outputs
from alignment.data.packing import pack
from alignment.distributed.replicated import ReplicatedBackend
from alignment.distributed.world import World
from alignment.groups import Completion, Group
from alignment.metrics import Metrics
from alignment.models.roles import Roles
from alignment.settings.plugins import algorithm_class
from alignment.settings.run import RunConfig
from alignment.step import StepSettings, train_step
from tests.alignment.test_zero import Workers

Settings = dict[str, Any]

PRICE = 0.3
"""Of a nat of divergence."""


def algorithm_of(name: str, **settings: Any) -> PolicyGradient:
    algorithm = algorithm_class(name).model_validate({"name": name, **settings})
    assert isinstance(algorithm, PolicyGradient)
    return algorithm


def rollouts(seed: int = 0) -> list[Group]:
    """Groups of three, one, four and two completions; some are truncated, some have a gap that was not chosen."""
    generator = torch.Generator().manual_seed(seed)

    def completion(number: int, equal: bool) -> Completion:
        length = int(torch.randint(1, 8, (1,), generator=generator))
        loss_mask = [True] * length
        if length > 4:
            loss_mask[2] = loss_mask[length - 1] = number % 2 == 0  # a tool's output in the middle, or at the end
        return Completion(
            text="",
            tokens=tuple(torch.randint(3, 300, (length,), generator=generator).tolist()),
            loss_mask=tuple(loss_mask),
            reward=0.7 if equal else float(torch.randn(1, generator=generator)),
            truncated=number % 3 == 1,
            sampled_logprobs=(0.0,) * length,
        )

    numbers = itertools.count()
    return [
        Group(
            id=f"group {index}",
            prompt="?",
            prompt_tokens=(1,) * (1 + index),
            completions=tuple(completion(next(numbers), equal=index == 3) for _ in range(size)),
        )
        for index, size in enumerate((3, 1, 4, 2))
    ]


def annotated_batch(seed: int = 0, *, truncated: bool = True) -> Batch:
    """The rollouts, packed, with the log-probabilities and values that a run would have found out."""
    batch = pack(rollouts(seed))
    generator = torch.Generator().manual_seed(seed + 100)

    def near(values: Tensor, distance: float) -> Tensor:
        noise = distance * torch.randn(values.shape, generator=generator)
        return batch.scatter((values + noise)[batch.loss_mask])

    old = near(torch.full(batch.tokens.shape, -1.5), 0.5)
    return dataclasses.replace(
        batch,
        old_logprobs=old,
        reference_logprobs=near(old, 0.3),
        sampled_logprobs=near(old, 0.6),
        old_values=near(torch.zeros_like(old), 1.0),
        kl_coefficient=PRICE,
        truncated=batch.truncated & truncated,
    )


def said_of(batch: Batch, seed: int = 0) -> Outputs:
    """What an actor and a critic say that have moved a little since the batch was annotated."""
    generator = torch.Generator().manual_seed(seed + 200)
    assert batch.old_logprobs is not None and batch.old_values is not None
    logprobs, entropies, values = (
        batch.scatter((start + spread * torch.randn(start.shape, generator=generator))[batch.loss_mask])
        for start, spread in ((batch.old_logprobs, 0.3), (batch.old_values + 2.0, 0.1), (batch.old_values, 0.4))
    )
    return Outputs(
        logprobs=logprobs.requires_grad_(), entropies=entropies.requires_grad_(), values=values.requires_grad_()
    )


def reduced(batch: Batch, loss: Loss, role: str = "actor") -> Tensor:
    """What the update makes of the terms of one role."""
    parts = [term.values.sum() / max(1, batch.count(term.unit)) for term in loss.terms if term.trains == role]
    return torch.stack(parts).sum()


@dataclass
class Plain:
    """One completion's chosen tokens, as lists of numbers, and as tensors where a gradient is wanted."""

    group: int
    reward: float
    truncated: bool
    old: list[float]
    reference: list[float]
    sampled: list[float]
    old_values: list[float]
    logprobs: list[Tensor]
    entropies: list[Tensor]
    values: list[Tensor]


def plainly(batch: Batch, outputs: Outputs) -> list[Plain]:
    """Every completion by itself; which tokens are whose is found out by looking at every one."""
    completions = []
    for number in range(len(batch.rewards)):
        chosen = [t for t in range(len(batch.tokens)) if batch.completion_index[t] == number and batch.loss_mask[t]]
        old, reference, sampled, old_values = (
            [float(values[t]) for t in chosen]
            for values in (batch.old_logprobs, batch.reference_logprobs, batch.sampled_logprobs, batch.old_values)
            if values is not None
        )
        logprobs, entropies, values = (
            [said[t].double() for t in chosen]
            for said in (outputs.logprobs, outputs.entropies, outputs.values)
            if said is not None
        )
        group = next(int(batch.group_index[t]) for t in range(len(batch.tokens)) if batch.completion_index[t] == number)
        completions.append(
            Plain(
                group=group,
                reward=float(batch.rewards[number]),
                truncated=bool(batch.truncated[number]),
                old=old,
                reference=reference,
                sampled=sampled,
                old_values=old_values,
                logprobs=logprobs,
                entropies=entropies,
                values=values,
            )
        )
    return completions


def standardised(numbers: list[float]) -> list[float]:
    mean, deviation = statistics.fmean(numbers), statistics.stdev(numbers)
    return [(number - mean) / (deviation + 1e-8) for number in numbers]


def plain_rewards(algorithm: Any, completions: list[Plain]) -> list[float]:
    """The reward of every completion after penalty, normalisation and clipping."""
    penalty = algorithm.truncated_penalty if algorithm.truncated == "penalise" else 0.0
    rewards = [c.reward - penalty * c.truncated for c in completions]
    if algorithm.normalise_rewards:
        rewards = standardised(rewards)
    bound = algorithm.reward_clip or math.inf
    return [max(-bound, min(bound, reward)) for reward in rewards]


def plain_token_rewards(algorithm: Any, completions: list[Plain]) -> list[list[float]]:
    price = PRICE if algorithm.kl_placement == "reward" else 0.0
    table = []
    for completion, reward in zip(completions, plain_rewards(algorithm, completions), strict=True):
        row = [-price * (old - ref) for old, ref in zip(completion.old, completion.reference, strict=True)]
        row[-1] += reward
        table.append(row)
    return table


def plain_advantages(algorithm: Any, completions: list[Plain]) -> tuple[list[list[float]], list[list[float]]]:
    """Advantage and return of every chosen token, before whitening."""
    rewards = plain_token_rewards(algorithm, completions)
    totals = [sum(row) for row in rewards]
    advantages, returns = [], []
    for number, completion in enumerate(completions):
        mates = [totals[i] for i, c in enumerate(completions) if c.group == completion.group]
        length = len(completion.old)
        if algorithm.name == "grpo":
            deviation = statistics.stdev(mates) if len(mates) > 1 else 0.0
            scale = deviation + 1e-4 if algorithm.divide_by_deviation else 1.0
            row = [(totals[number] - statistics.fmean(mates)) / scale] * length
        elif algorithm.name == "rloo":
            others = [t for i, t in enumerate(totals) if completions[i].group == completion.group and i != number]
            row = [totals[number] - statistics.fmean(others) if others else 0.0] * length
        else:
            row = plain_gae(algorithm, completions, rewards, number)
        advantages.append(row)
        returns.append([a + v for a, v in zip(row, completion.old_values, strict=True)])
    return advantages, returns


def plain_gae(algorithm: Any, completions: list[Plain], rewards: list[list[float]], number: int) -> list[float]:
    completion, row = completions[number], list(rewards[number])
    values = [*completion.old_values, 0.0]
    lam = 1.0
    if algorithm.name == "ppo":
        lam = algorithm.lam
    else:
        values = [0.0] * len(values)
        if algorithm.baseline == "group":
            bare = plain_rewards(algorithm, completions)
            row[-1] -= statistics.fmean(bare[i] for i, c in enumerate(completions) if c.group == completion.group)
    deltas = [row[t] + algorithm.gamma * values[t + 1] - values[t] for t in range(len(row))]
    decay = algorithm.gamma * lam
    return [sum(decay ** (s - t) * deltas[s] for s in range(t, len(row))) for t in range(len(row))]


def plain_weights(algorithm: Any, completion: Plain) -> list[float]:
    ratios = [math.exp(old - sampled) for old, sampled in zip(completion.old, completion.sampled, strict=True)]
    if algorithm.importance_correction == "token":
        return [min(ratio, algorithm.max_correction) for ratio in ratios]
    if algorithm.importance_correction == "sequence":
        mean = statistics.geometric_mean(ratios)
        return [float(1 / algorithm.max_correction <= mean <= algorithm.max_correction)] * len(ratios)
    return [1.0] * len(ratios)


def plain_divergence(estimator: str, logprob: Tensor, reference: float) -> Tensor:
    x = logprob - reference
    return x * x / 2 if estimator == "k2" else torch.exp(-x) - 1 + x


def plain_clipped(algorithm: Any, ratio: Tensor, advantage: float) -> Tensor:
    bounded = torch.clamp(ratio, 1 - algorithm.clip_low, 1 + algorithm.clip_high)
    return -torch.min(ratio * advantage, bounded * advantage)


def plain_losses(algorithm: Any, batch: Batch, outputs: Outputs, *, estimator: str) -> tuple[Tensor, Tensor]:
    """The actor's and the critic's loss; `estimator` of the divergence, whatever the algorithm says."""
    completions = plainly(batch, outputs)
    advantages, returns = plain_advantages(algorithm, completions)
    kept = [n for n, c in enumerate(completions) if not (algorithm.truncated == "mask" and c.truncated)]
    num_tokens = sum(len(completions[n].old) for n in kept)
    if algorithm.name == "reinforce++" or getattr(algorithm, "whiten_advantages", False):
        numbers = [a for n in kept for a in advantages[n]]
        if algorithm.name == "rloo":
            numbers = [row[0] for row in advantages]
        mean, deviation = statistics.fmean(numbers), statistics.stdev(numbers)
        advantages = [[(a - mean) / deviation for a in row] for row in advantages]

    by_token = algorithm.importance_level == "token" and algorithm.loss_aggregation == "token"
    actor = critic = torch.zeros((), dtype=torch.float64)
    for n in kept:
        c = completions[n]
        policy, extra = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        weights = plain_weights(algorithm, c)
        for t, (logprob, entropy) in enumerate(zip(c.logprobs, c.entropies, strict=True)):
            policy = policy + weights[t] * plain_clipped(algorithm, torch.exp(logprob - c.old[t]), advantages[n][t])
            if algorithm.kl_placement == "loss":
                extra = extra + PRICE * plain_divergence(estimator, logprob, c.reference[t])
            extra = extra - algorithm.entropy_coefficient * entropy
        length = len(c.old)
        if algorithm.importance_level != "token":
            logratio = sum((p - o for p, o in zip(c.logprobs, c.old, strict=True)), torch.zeros(()))
            ratio = torch.exp(logratio / (length if algorithm.importance_level == "sequence_mean" else 1))
            # A loss per completion is divided by its number of tokens below, like the sums over tokens.
            policy = (
                length * statistics.fmean(weights) * plain_clipped(algorithm, ratio, statistics.fmean(advantages[n]))
            )
        if by_token:
            actor = actor + (policy + extra) / num_tokens
        else:
            per = algorithm.tokens_per_completion if algorithm.loss_aggregation == "constant" else length
            actor = actor + (policy + extra) / per / len(completions)
        for t, value in enumerate(c.values if algorithm.needs_critic else []):
            clip = algorithm.value_clip or math.inf
            near = c.old_values[t] + (value - c.old_values[t]).clamp(-clip, clip)
            worse = torch.max((value - returns[n][t]) ** 2, (near - returns[n][t]) ** 2)
            critic = critic + algorithm.value_coefficient * 0.5 * worse / num_tokens
    return actor, critic


def gradients(loss: Tensor, outputs: Outputs, *names: str) -> list[Tensor]:
    leaves = [getattr(outputs, name) for name in names]
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


SHARED: list[Settings] = [
    {},
    {"clip_low": 0.1, "clip_high": 0.4},
    {"kl_placement": "reward"},
    {"kl_placement": "none"},
    {"kl_placement": "loss", "kl_estimator": "k2"},
    {"kl_placement": "loss", "kl_estimator": "k3"},
    {"kl_placement": "loss", "kl_estimator": "k3_plain"},
    {"kl_placement": "loss", "importance_level": "sequence", "loss_aggregation": "token"},
    {"kl_placement": "loss", "importance_level": "sequence_mean", "loss_aggregation": "token"},
    {"importance_level": "token", "loss_aggregation": "token"},
    {
        "importance_level": "token",
        "loss_aggregation": "completion",
        "kl_placement": "loss",
        "entropy_coefficient": 0.05,
    },
    {
        "importance_level": "token",
        "loss_aggregation": "constant",
        "tokens_per_completion": 9,
        "entropy_coefficient": 0.05,
    },
    {"importance_correction": "sequence", "max_correction": 1.2},
    {"importance_correction": "none"},
    {
        "importance_correction": "token",
        "max_correction": 1.1,
        "importance_level": "sequence",
        "loss_aggregation": "token",
    },
    {"truncated": "mask"},
    {"truncated": "mask", "importance_level": "token", "loss_aggregation": "token", "kl_placement": "loss"},
    {"truncated": "penalise", "truncated_penalty": 0.6},
    {"reward_clip": 0.5},
    {"normalise_rewards": True, "reward_clip": 1.0, "truncated": "penalise"},
]
OWN: dict[str, list[Settings]] = {
    "grpo": [{"divide_by_deviation": False}, {"kl_placement": "reward", "truncated": "mask"}],
    "rloo": [{"whiten_advantages": True}, {"kl_placement": "none", "whiten_advantages": True}],
    "reinforce++": [{"baseline": "group"}, {"gamma": 0.8}, {"gamma": 0.9, "baseline": "group", "truncated": "mask"}],
    "ppo": [
        {"gamma": 0.9, "lam": 0.7},
        {"lam": 1.0, "whiten_advantages": False},
        {"lam": 0.0, "value_clip": 0.0},
        {"value_coefficient": 2.0, "truncated": "mask"},
    ],
}
CASES = [(name, settings) for name in OWN for settings in SHARED + OWN[name]]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda part: str(part) if part else "as it comes")
def test_loss_and_gradient_equal_plain_loops(name: str, settings: Settings) -> None:
    algorithm, batch = algorithm_of(name, **settings), annotated_batch()
    outputs = said_of(batch)
    ready = algorithm.prepare(batch)
    loss = algorithm.loss(ready, outputs)
    # k3 as a loss has the value of k3 and the gradient of k2.
    value, slope = ("k3", "k2") if algorithm.kl_estimator == "k3" else (algorithm.kl_estimator,) * 2
    expected, _ = plain_losses(algorithm, batch, outputs, estimator=value)
    source, critic = plain_losses(algorithm, batch, outputs, estimator=slope)

    ours = reduced(ready, loss)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    compare(gradients(ours, outputs, "logprobs", "entropies"), gradients(source, outputs, "logprobs", "entropies"))
    if algorithm.needs_critic:
        ours = reduced(ready, loss, "critic")
        assert ours.item() == pytest.approx(critic.item(), rel=1e-4)
        compare(gradients(ours, outputs, "values"), gradients(critic, outputs, "values"))


def compare(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


EVERY = pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce++", "ppo"])


@EVERY
def test_where_the_ratio_is_one_the_gradient_is_that_of_reinforce(name: str) -> None:
    algorithm = algorithm_of(
        name, kl_placement="none", importance_correction="none", importance_level="token", loss_aggregation="token"
    )
    batch = algorithm.prepare(annotated_batch())
    outputs = said_of(batch)
    at_start = dataclasses.replace(batch, old_logprobs=None)
    (gradient,) = gradients(reduced(batch, algorithm.loss(at_start, outputs)), outputs, "logprobs")
    assert batch.advantages is not None
    torch.testing.assert_close(gradient, -batch.advantages / batch.count("token"))
    assert algorithm.loss(at_start, outputs).metrics["ratio"].tolist() == [1.0] * batch.count("token")


@EVERY
@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_a_sampler_that_agrees_with_the_trainer_is_not_corrected(name: str, correction: str) -> None:
    """The ratio to the old policy is in the loss already: it must not enter a second time."""
    batch = annotated_batch()
    agreeing = dataclasses.replace(batch, sampled_logprobs=batch.old_logprobs)
    outputs, found = said_of(batch), []
    for setting in (correction, "none"):
        algorithm = algorithm_of(name, importance_correction=setting)
        loss = reduced(batch, algorithm.loss(algorithm.prepare(agreeing), outputs))
        found.append([loss, *gradients(loss, outputs, "logprobs")])
    torch.testing.assert_close(*found)


def test_the_correction_carries_no_gradient_and_weighs_the_sampled_tokens() -> None:
    """Without old log-probabilities the trainer's own, held fast, take their place: truncated importance sampling."""
    algorithm = algorithm_of("grpo", kl_placement="none", loss_aggregation="token", max_correction=1.5)
    batch = dataclasses.replace(algorithm.prepare(annotated_batch()), old_logprobs=None)
    outputs = said_of(annotated_batch())
    assert batch.sampled_logprobs is not None and batch.advantages is not None
    weights = (outputs.logprobs.detach() - batch.sampled_logprobs).exp().clamp(max=1.5)
    (gradient,) = gradients(reduced(batch, algorithm.loss(batch, outputs)), outputs, "logprobs")
    torch.testing.assert_close(gradient, -batch.advantages * weights / batch.count("token"))


def test_the_mismatch_is_reported_as_it_is_defined() -> None:
    algorithm = algorithm_of("grpo", importance_correction="none")
    batch = algorithm.prepare(annotated_batch())
    metrics = algorithm.loss(batch, said_of(batch)).metrics
    assert batch.old_logprobs is not None and batch.sampled_logprobs is not None
    gaps = (batch.old_logprobs - batch.sampled_logprobs)[batch.loss_mask].tolist()
    expected = {
        "mismatch/mean_abs": statistics.fmean(abs(gap) for gap in gaps),
        "mismatch/ratio": statistics.fmean(math.exp(gap) for gap in gaps),
        "mismatch/kl": statistics.fmean(math.exp(gap) - 1 - gap for gap in gaps),
        "mismatch/kl_reverse": statistics.fmean(math.exp(gap) * gap - math.exp(gap) + 1 for gap in gaps),
    }
    assert {name: metrics[name].mean().item() for name in expected} == pytest.approx(expected, rel=1e-4)


def test_both_divergences_between_sampler_and_trainer_are_right_in_expectation() -> None:
    """Over all three tokens of a vocabulary, each counted as often as the sampler draws it."""
    sampler, trainer = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    answers = tuple(
        Completion(text="", tokens=(token,), loss_mask=(True,), reward=float(token), sampled_logprobs=(log,))
        for token, log in enumerate(sampler.log().tolist())
    )
    batch = pack([Group(id="0", prompt="?", prompt_tokens=(1,), completions=answers)])
    old = batch.scatter(trainer.log())
    algorithm = algorithm_of("grpo", kl_placement="none")
    ready = algorithm.prepare(dataclasses.replace(batch, old_logprobs=old))
    metrics = algorithm.loss(ready, Outputs(logprobs=old, entropies=-old)).metrics
    there = (sampler * (sampler / trainer).log()).sum().item()
    back = (trainer * (trainer / sampler).log()).sum().item()
    assert (sampler * metrics["mismatch/kl"]).sum().item() == pytest.approx(there, abs=1e-6)
    assert (sampler * metrics["mismatch/kl_reverse"]).sum().item() == pytest.approx(back, abs=1e-6)


def test_clipped_tokens_are_counted_where_the_gradient_has_stopped() -> None:
    algorithm = algorithm_of("ppo", kl_placement="none", importance_correction="none", clip_low=0.1, clip_high=0.2)
    batch = algorithm.prepare(annotated_batch())
    outputs = said_of(batch)
    loss = algorithm.loss(batch, outputs)
    (gradient,) = gradients(reduced(batch, loss), outputs, "logprobs")
    clipped = loss.metrics["clip_ratio"].bool()
    assert 0 < clipped.sum() < len(clipped)
    assert torch.equal(gradient[batch.loss_mask] == 0, clipped)


def test_gae_carries_the_next_value_over_a_gap_and_the_reward_comes_at_the_last_chosen_token() -> None:
    answer = Completion(
        text="",
        tokens=(5, 6, 7, 8, 9),
        loss_mask=(True, False, False, True, False),  # a tool speaks in the middle and at the end
        reward=2.0,
    )
    batch = pack([Group(id="0", prompt="?", prompt_tokens=(1, 2), completions=(answer,))])
    known = torch.zeros(7)
    values = torch.tensor([99.0, 99.0, 0.3, 99.0, 99.0, 0.7, 99.0])
    algorithm = algorithm_of("ppo", kl_placement="none", gamma=0.9, lam=0.5, whiten_advantages=False)
    batch = dataclasses.replace(batch, old_logprobs=known, old_values=values)
    ready = algorithm.prepare(batch)
    assert algorithm.token_rewards(batch).tolist() == [0, 0, 0, 0, 0, 2.0, 0]
    # δ of the last: 2 − 0.7 = 1.3. Of the first: 0.9·0.7 − 0.3 = 0.33, and 0.33 + 0.9·0.5·1.3 = 0.915.
    assert ready.advantages is not None and ready.returns is not None
    assert ready.advantages.tolist() == pytest.approx([0, 0, 0.915, 0, 0, 1.3, 0])
    assert ready.returns[ready.loss_mask].tolist() == pytest.approx([0.915 + 0.3, 2.0])


@pytest.mark.parametrize("settings", [{}, {"truncated": "mask"}])
@pytest.mark.parametrize("name", ["ppo", "reinforce++"])
def test_advantages_are_white_over_all_learned_tokens_of_the_step(name: str, settings: Settings) -> None:
    batch = algorithm_of(name, **settings).prepare(annotated_batch())
    assert batch.advantages is not None
    white = batch.advantages[batch.loss_mask]
    assert white.mean().item() == pytest.approx(0, abs=1e-6)
    assert white.var().item() == pytest.approx(1, abs=1e-4)
    assert batch.advantages[~batch.loss_mask].tolist() == [0.0] * int((~batch.loss_mask).sum())


def test_returns_are_those_of_the_advantages_before_whitening() -> None:
    plain, white = (algorithm_of("ppo", whiten_advantages=on).prepare(annotated_batch()) for on in (False, True))
    assert plain.advantages is not None and plain.returns is not None and plain.old_values is not None
    assert white.returns is not None
    torch.testing.assert_close(white.returns, plain.returns)
    torch.testing.assert_close(plain.returns, plain.advantages + plain.old_values)


@pytest.mark.parametrize(("kl_placement", "terms"), [("reward", 1), ("loss", 2), ("none", 1)])
def test_divergence_is_paid_for_once(kl_placement: Any, terms: int) -> None:
    algorithm, batch = algorithm_of("grpo", kl_placement=kl_placement), annotated_batch()
    dear, free = (algorithm.prepare(dataclasses.replace(batch, kl_coefficient=price)) for price in (5.0, 0.0))
    assert len(algorithm.loss(dear, said_of(batch)).terms) == terms
    assert dear.advantages is not None and free.advantages is not None
    assert torch.equal(dear.advantages, free.advantages) == (kl_placement != "reward")


@EVERY
def test_a_step_of_which_every_completion_is_masked_teaches_nothing_and_stays_finite(name: str) -> None:
    batch = annotated_batch()
    batch = dataclasses.replace(batch, truncated=torch.ones_like(batch.truncated))
    algorithm = algorithm_of(name, truncated="mask", kl_placement="loss")
    ready, outputs = algorithm.prepare(batch), said_of(batch)
    loss = algorithm.loss(ready, outputs)
    total = reduced(ready, loss)
    assert total.item() == 0
    assert gradients(total, outputs, "logprobs")[0].abs().sum() == 0
    assert all(torch.isfinite(values).all() for values in loss.metrics.values())


def test_masked_completions_change_neither_the_loss_of_the_others_nor_what_they_are_compared_with() -> None:
    batch = annotated_batch()
    algorithm = algorithm_of("rloo", truncated="mask")
    masked = algorithm.prepare(batch)
    whole = algorithm_of("rloo").prepare(batch)
    assert masked.advantages is not None and whole.advantages is not None
    torch.testing.assert_close(masked.advantages[masked.loss_mask], whole.advantages[masked.loss_mask])
    outputs = said_of(batch)
    (gradient,) = gradients(reduced(masked, algorithm.loss(masked, outputs)), outputs, "logprobs")
    truncated = batch.truncated[batch.completion_index] & (batch.completion_index >= 0)
    assert gradient[truncated].abs().sum() == 0 and gradient[~truncated].abs().sum() > 0


@EVERY
def test_neither_the_order_of_groups_nor_a_cut_changes_the_gradient_of_a_token(name: str) -> None:
    algorithm, batch = algorithm_of(name, kl_placement="loss"), annotated_batch()
    ready, outputs = algorithm.prepare(batch), said_of(batch)
    (whole,) = gradients(reduced(ready, algorithm.loss(ready, outputs)), outputs, "logprobs")
    parts = torch.zeros_like(whole)
    for groups in ([3, 1], [0], [2]):
        tokens = ready.token_indices(groups)
        assert outputs.entropies is not None and outputs.values is not None
        part = Outputs(
            logprobs=outputs.logprobs[tokens], entropies=outputs.entropies[tokens], values=outputs.values[tokens]
        )
        loss = algorithm.loss(ready.cut(groups), part)
        total = torch.stack([t.values.sum() / ready.count(t.unit) for t in loss.terms if t.trains == "actor"]).sum()
        parts += gradients(total, outputs, "logprobs")[0]
    torch.testing.assert_close(parts, whole)


def test_the_price_of_divergence_moves_towards_the_target_in_bounded_steps() -> None:
    algorithm = algorithm_of("ppo", kl_target=4.0, kl_horizon=1000)

    def after(kl: float, completions: int = 100) -> float:
        return algorithm.next_kl_coefficient(0.1, kl=kl, num_completions=completions)

    assert after(4.0) == 0.1
    assert after(4.4) == pytest.approx(0.1 * math.exp(0.1 * 0.1)), "10 % above the target, a tenth of the horizon"
    assert after(1e9) == after(5.0) == pytest.approx(0.1 * math.exp(0.2 * 0.1)), "no step is larger than that of 20 %"
    assert after(-1e9) == after(3.0) == pytest.approx(0.1 * math.exp(-0.2 * 0.1))
    assert after(0.0, completions=10**6) > 0, "a horizon shorter than the step must not turn the price around"


def test_the_price_of_divergence_stays_where_no_target_is_given() -> None:
    assert algorithm_of("ppo").next_kl_coefficient(0.1, kl=99.0, num_completions=10) == 0.1


def test_the_adapting_price_brings_a_divergence_that_answers_to_it_to_its_target() -> None:
    algorithm = algorithm_of("ppo", kl_target=6.0, kl_horizon=500)
    price = 0.02
    for _ in range(400):
        price = algorithm.next_kl_coefficient(price, kl=1 / price, num_completions=64)
    assert 1 / price == pytest.approx(6.0, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"loss_aggregation": "constant"}, "tokens_per_completion go together"),
        ({"tokens_per_completion": 8}, "tokens_per_completion go together"),
        (
            {"importance_level": "sequence", "loss_aggregation": "constant", "tokens_per_completion": 8},
            "one loss per completion",
        ),
        ({"reference": "none"}, "needs a reference"),
        ({"kl_placement": "none", "kl_target": 1.0}, "no price to adapt"),
        ({"kl_coefficient": 0, "kl_target": 1.0}, "changes the price by a factor"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: Settings, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        algorithm_of("grpo", **settings)


def test_groups_of_equal_rewards_are_replaced_only_if_asked() -> None:
    def group(*rewards: float, truncated: int = 0) -> Group:
        answers = (Completion(text="", reward=r, truncated=n < truncated) for n, r in enumerate(rewards))
        return Group(id="", prompt="?", completions=tuple(answers))

    asked, not_asked = algorithm_of("grpo", drop_equal_groups=True), algorithm_of("grpo")
    assert not asked.is_informative(group(1, 1, 1)) and not_asked.is_informative(group(1, 1, 1))
    assert asked.is_informative(group(1, 1, 0))
    penalising = algorithm_of("grpo", drop_equal_groups=True, truncated="penalise")
    assert penalising.is_informative(group(1, 1, truncated=1)), "the penalty makes them differ"


@EVERY
def test_old_log_probabilities_are_asked_for_where_more_than_one_step_is_taken(name: str) -> None:
    one: Settings = {"epochs_per_step": 1, "kl_placement": "loss"}
    assert not algorithm_of(name, **one).needs_old_logprobs
    assert algorithm_of(name, **one | {"epochs_per_step": 2}).needs_old_logprobs
    assert algorithm_of(name, **one, minibatches_per_epoch=2).needs_old_logprobs
    assert algorithm_of(name, **one | {"kl_placement": "reward"}).needs_old_logprobs, (
        "the price is that of the policy that answered"
    )


# On a model: what must not change the step that is taken.

SEVERAL: list[tuple[str, Settings]] = [
    ("grpo", {"loss_aggregation": "completion"}),
    ("grpo", {"loss_aggregation": "token", "truncated": "mask"}),
    ("rloo", {}),
    ("reinforce++", {}),
    ("ppo", {"epochs_per_step": 1}),
    ("ppo shared", {"epochs_per_step": 1, "kl_placement": "loss"}),
]
on_a_model = pytest.mark.parametrize(("name", "settings"), SEVERAL, ids=lambda part: str(part))


def settings_of(run_settings: Settings, name: str, settings: Settings) -> Settings:
    kind, _, trunk = name.partition(" ")
    return {
        **run_settings,
        "algorithm": {"name": kind, **settings},
        "critic": {"trunk": trunk or "separate"},
        "rollout": {"engine": "local", "completions": 4},
        "rewards": [{"name": "length", "target": 3}],
        "optim": {"max_grad_norm": 0},
    }


def step_of(
    settings: Settings, groups: list[Group], world: World | None = None, **optim: Any
) -> tuple[Metrics, dict[str, Tensor]]:
    """One step of plain gradient descent; adaptive optimizers blow rounding of a tiny gradient up to a full step."""
    config = RunConfig.model_validate(settings)
    world = world or World()
    algorithm = config.algorithm
    assert isinstance(algorithm, Algorithm)
    roles = Roles.build(config, world)
    for backend in roles.backends_by_role.values():
        assert isinstance(backend, ReplicatedBackend)
        backend.optimizer = torch.optim.SGD(backend.masters.values())
    with torch.no_grad():  # away from the reference, so that there is a divergence to pay for
        for name, weight in roles.actor_backend.module.named_parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    step_settings = StepSettings(lr={"actor": 0.1, "critic": 0.1}, kl_coefficient=0.1, seed=3)
    if roles.critic is None:
        step_settings.lr.pop("critic")
    metrics = train_step(roles, algorithm, groups, config.optim.model_copy(update=optim), world, step_settings)
    weights = {
        f"{role}.{name}": master.detach().clone()
        for role, backend in roles.backends_by_role.items()
        if isinstance(backend, ReplicatedBackend)
        for name, master in backend.masters.items()
    }
    return metrics, weights


def assert_same_step(one: tuple[Metrics, dict[str, Tensor]], other: tuple[Metrics, dict[str, Tensor]]) -> None:
    assert other[0] == pytest.approx(one[0], rel=1e-3, abs=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, weight in one[1].items():
        torch.testing.assert_close(other[1][name], weight, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@on_a_model
def test_neither_micro_batches_nor_the_order_of_rows_change_the_step(
    name: str, settings: Settings, run_settings: Settings
) -> None:
    changed, groups = settings_of(run_settings, name, settings), rollouts()
    whole = step_of(changed, groups)
    assert whole[0]["grad_norm"] > 1e-3
    assert_same_step(whole, step_of(changed, groups, micro_batch_tokens=1))
    assert_same_step(whole, step_of(changed, groups[::-1], micro_batch_tokens=30))


def step_of_workers(world: World, settings: Settings, groups: list[Group]) -> tuple[Metrics, dict[str, Tensor]]:
    return step_of(settings, groups, world, micro_batch_tokens=30)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grpo", {"minibatches_per_epoch": 2}),
        ("ppo", {"epochs_per_step": 2, "minibatches_per_epoch": 2}),
        ("ppo shared", {"epochs_per_step": 2}),
    ],
)
def test_two_workers_take_the_step_that_one_takes(
    name: str, settings: Settings, run_settings: Settings, workers: Workers
) -> None:
    changed, groups = settings_of(run_settings, name, settings), rollouts()
    assert_same_step(step_of(changed, groups), workers.run(step_of_workers, changed, groups))


@on_a_model
def test_the_first_ratio_of_a_step_is_exactly_one(name: str, settings: Settings, run_settings: Settings) -> None:
    """Old log-probabilities come from a pass of their own, which must be the very same."""
    config = RunConfig.model_validate(settings_of(run_settings, name, {**settings, "kl_placement": "reward"}))
    algorithm, groups = config.algorithm, rollouts()
    assert isinstance(algorithm, PolicyGradient) and algorithm.needs_old_logprobs
    roles = Roles.build(config, World())
    step_settings = StepSettings(lr={"actor": 1e-3}, seed=0)
    metrics = train_step(roles, algorithm, groups, config.optim, World(), step_settings)
    assert (metrics["ratio"], metrics["clip_ratio"]) == (1, 0)
    twice = algorithm.model_copy(update={"epochs_per_step": 2})
    assert train_step(roles, twice, groups, config.optim, World(), step_settings)["ratio"] != 1


def test_every_epoch_is_cut_into_minibatches_that_hold_every_group_once(run_settings: Settings) -> None:
    """Seen from outside: where no role learns, the mean over all updates is that over the groups, one by one."""
    changed = settings_of(
        run_settings, "grpo", {"minibatches_per_epoch": 4, "epochs_per_step": 3, "loss_aggregation": "token"}
    )
    config = RunConfig.model_validate(changed)
    algorithm = config.algorithm
    assert isinstance(algorithm, PolicyGradient)
    roles = Roles.build(config, World())
    groups = [dataclasses.replace(group, id=str(number)) for number, group in enumerate(rollouts())]
    found = train_step(roles, algorithm, groups, config.optim, World(), StepSettings(lr={}, kl_coefficient=0.1))
    alone = [
        train_step(roles, algorithm, [group], config.optim, World(), StepSettings(lr={}, kl_coefficient=0.1))["entropy"]
        for group in groups
    ]
    assert found["entropy"] == pytest.approx(statistics.fmean(alone), rel=1e-5)
