"""Learning from one step's groups: what is known before, micro-batches, gradients, and metrics by global counts."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.algorithms import Algorithm
from alignment.config import OptimConfig
from alignment.data.packing import micro_batches, pack, share
from alignment.errors import DivergenceError
from alignment.models.parallel import World
from alignment.models.roles import Roles
from alignment.types import Batch, Group, Loss, Role, Unit

UNITS: tuple[Unit, ...] = ("token", "completion", "pair")

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What changes from step to step in how a run learns."""

    lr: dict[Role, float]
    """Learning rate of each trained role; a role that is missing does not learn."""
    kl_coefficient: float = 0.0
    """Price of a nat of divergence from the reference."""
    seed: int = 0
    """Of the order in which minibatches are drawn."""


def learn(
    roles: Roles, algorithm: Algorithm, groups: list[Group], optim: OptimConfig, world: World, pace: Pace
) -> Metrics:
    """Learns from the groups of one step, in as many epochs and minibatches as the algorithm takes.

    `groups` is the whole global batch on every worker. Neither the cut into micro-batches nor the number of workers
    changes a gradient, because every term is divided by its global count and only then differentiated.

    Returns:
        The means of the metrics over all updates.

    Raises:
        DivergenceError: loss or gradient is not finite and `on_nonfinite` is `fail`. That update changed nothing.
    """
    batch = annotated(roles, groups, optim, world)
    batch = algorithm.prepare(dataclasses.replace(batch, kl_coefficient=pace.kl_coefficient))
    updates = [
        _update(roles, algorithm, batch.cut(part), optim, world, pace.lr)
        for part in _minibatches(len(groups), algorithm, pace.seed)
    ]
    names = {name for update in updates for name in update}
    means = {name: [update[name] for update in updates if name in update] for name in names}
    return {
        **{name: math.fsum(found) / len(found) for name, found in means.items()},
        "lr": pace.lr.get("actor", 0.0),
        "num_tokens": float(sum(group.num_tokens for group in groups)),
    }


@torch.no_grad()
def evaluate(roles: Roles, algorithm: Algorithm, groups: list[Group], optim: OptimConfig, world: World) -> Metrics:
    """Loss and metrics of the actor as it is, on groups that every worker knows whole."""
    roles.train(False)
    batch = algorithm.prepare(annotated(roles, groups, optim, world))
    totals = _Totals(batch, world)
    for one in _passes(batch, roles, optim, world):
        loss = algorithm.loss(one.batch, roles.outputs(one.batch))
        if one.counts:
            totals.add(loss)
    return totals.reduce()


def annotated(roles: Roles, groups: list[Group], optim: OptimConfig, world: World) -> Batch:
    """The packed global batch with all that must be known before the first update; the same on every worker."""
    batch = pack(groups).to(world.device)
    return Batch(**{**vars(batch), **_said(batch, roles.annotations, roles, optim, world)})


def reference_logprobs(roles: Roles, groups: list[Group], optim: OptimConfig, world: World) -> Tensor:
    """[L] log-probability (nats) of every completion token under the reference, group after group; on the CPU."""
    batch = pack(groups).to(world.device)
    said = _said(batch, roles.under_reference, roles, optim, world)
    return said["reference_logprobs"][batch.branches >= 0].cpu()


def divergences(roles: Roles, groups: list[Group], optim: OptimConfig, world: World) -> list[float]:
    """Σ log π − log π_ref (nats) of every completion that the actor has drawn; empty without a reference in memory.

    A reference that was only computed beforehand knows nothing of texts that did not exist then.
    """
    if not roles.has_reference:
        return []
    batch = annotated(roles, groups, optim, world)
    assert batch.reference_logprobs is not None
    logprobs = batch.old_logprobs
    if logprobs is None:
        with torch.no_grad():
            said = _said(batch, lambda one: {"logprobs": roles.outputs(one).logprobs}, roles, optim, world)
        logprobs = said["logprobs"]
    return batch.per_completion(logprobs - batch.reference_logprobs).tolist()


def _said(
    batch: Batch, ask: Callable[[Batch], dict[str, Tensor]], roles: Roles, optim: OptimConfig, world: World
) -> dict[str, Tensor]:
    """What the models say of a batch, each [T] by name: every worker asks about its share, and all know the whole."""
    known: dict[str, Tensor] = defaultdict(lambda: torch.zeros(batch.tokens.shape, device=world.device))
    for one in _passes(batch, roles, optim, world):
        for name, values in ask(one.batch).items():
            if one.counts:
                known[name][one.tokens] = values
    # A worker without groups of its own knows no names, but takes part in the sums.
    for name in sorted(set().union(*world.gather(set(known)))):
        world.sum(known[name])
    return known


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of a step (0 to steps - 1): linear warm-up from lr/n to lr, then the schedule.

    `linear` and `cosine` reach `min_lr_ratio` after the last step; `inverse_sqrt` falls as √(warmup/step).
    """
    warmup = optim.warmup_steps or math.ceil(optim.warmup_ratio * steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    shape = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "inverse_sqrt": math.sqrt(max(1, warmup) / max(1, warmup, step + 1)),
    }[optim.schedule]
    return optim.lr * max(optim.min_lr_ratio, optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape)


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One forward pass of this worker."""

    batch: Batch
    tokens: Tensor
    """[t] int64 where its tokens stand in the global batch."""
    counts: bool
    """False if it only keeps this worker in step with the others."""


def _passes(batch: Batch, roles: Roles, optim: OptimConfig, world: World) -> Iterator[_Pass]:
    """This worker's share of a batch, in forward passes."""
    lengths = torch.bincount(batch.groups).tolist()
    shares = [share(lengths, rank=rank, size=world.size) for rank in range(world.size)]
    cuts = [micro_batches(mine, lengths, max_tokens=optim.micro_batch_tokens) for mine in shares]
    own = cuts[world.rank]
    idle = max(map(len, cuts)) - len(own) if roles.in_lockstep else 0
    for groups in own:
        yield _Pass(batch=batch.cut(groups), tokens=batch.tokens_of(groups), counts=True)
    shortest = [lengths.index(min(lengths))]
    for _ in range(idle):
        yield _Pass(batch=batch.cut(shortest), tokens=batch.tokens_of(shortest), counts=False)


def _update(
    roles: Roles, algorithm: Algorithm, batch: Batch, optim: OptimConfig, world: World, lr: dict[Role, float]
) -> Metrics:
    """One optimizer step on a prepared batch, which is the same on every worker."""
    totals = _Totals(batch, world)
    roles.train()
    for one in _passes(batch, roles, optim, world):
        loss = algorithm.loss(one.batch, roles.outputs(one.batch))
        _backward(roles, totals.add(loss) if one.counts else _nothing(loss))
    metrics = totals.reduce()
    finite = math.isfinite(metrics["loss"])
    norms: dict[Role, float] = {}
    for role, trained in reversed(roles.trained_by_role.items()):  # an actor does not follow a critic that has failed
        finite = finite and all(math.isfinite(norm) for done, norm in norms.items() if done in lr)
        norms[role] = trained.step(lr[role]) if finite and role in lr else trained.discard()
    skipped = any(not math.isfinite(norms[role]) for role in lr)
    if skipped and optim.on_nonfinite == "fail":
        raise DivergenceError(
            f"loss {metrics['loss']} and gradient norm {norms['actor']} are not both finite, in a step on "
            f"{batch.group_ids[0]} and {len(batch.group_ids) - 1} other groups; a lower optim.lr or "
            "optim.max_grad_norm may help"
        )
    named = {"grad_norm" if role == "actor" else f"grad_norm_{role}": norms[role] for role in lr}
    return {**metrics, **named, "skipped": float(skipped)}


def _backward(roles: Roles, losses: dict[Role, Tensor]) -> None:
    """Differentiates each role's loss; a critic on the actor's trunk shares the actor's graph."""
    if roles.critic is not None and roles.critic.model is None:
        losses = {"actor": torch.stack(list(losses.values())).sum()}
    for role, loss in losses.items():
        roles.trained_by_role[role].backward(loss)


def _nothing(loss: Loss) -> dict[Role, Tensor]:
    return {term.trains: 0.0 * term.values.sum() for term in loss.terms}


def _minibatches(num_groups: int, algorithm: Algorithm, seed: int) -> Iterator[list[int]]:
    """The groups of each optimizer step, in the order of the data where there is one step only."""
    if algorithm.epochs == algorithm.minibatches == 1:
        yield list(range(num_groups))
        return
    order = torch.Generator().manual_seed(seed)
    for _ in range(algorithm.epochs):
        shuffled = torch.randperm(num_groups, generator=order).tolist()
        count = min(algorithm.minibatches, num_groups)
        yield from (sorted(shuffled[part::count]) for part in range(count))


class _Totals:
    """Sums of losses and metrics over the micro-batches of all workers, and the global counts that divide them."""

    def __init__(self, batch: Batch, world: World) -> None:
        self.world = world
        self.counts = {unit: max(1, batch.count(unit)) for unit in UNITS}
        self.loss = 0.0
        self.sums: dict[str, float] = defaultdict(float)
        self.numbers: dict[str, float] = defaultdict(float)

    def add(self, loss: Loss) -> dict[Role, Tensor]:
        """Adds one micro-batch; returns its share of each role's global mean loss, to be differentiated."""
        shares: dict[Role, list[Tensor]] = defaultdict(list)
        for term in loss.terms:
            shares[term.trains].append(term.values.sum() / self.counts[term.unit])
        losses = {role: torch.stack(parts).sum() for role, parts in shares.items()}
        self.loss += sum(float(value.detach()) for value in losses.values())
        for name, values in loss.metrics.items():
            self.sums[name] += float(values.sum())
            self.numbers[name] += values.numel()
        return losses

    def reduce(self) -> Metrics:
        """The loss, and each metric's mean over the global batch, the same on every worker."""
        names = sorted(set().union(*self.world.gather(set(self.sums))))
        found = [[self.sums[name], self.numbers[name]] for name in names] + [[self.loss, 1.0]]
        totals = self.world.sum(torch.tensor(found, dtype=torch.float64, device=self.world.device)).tolist()
        means = {name: total / count for name, (total, count) in zip(names, totals, strict=False) if count}
        return {"loss": totals[-1][0], **means}
