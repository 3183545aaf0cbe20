"""One training step: groups are packed, annotated by the models, cut into micro-batches, and learned from.

groups ─► pack ─► annotate ─► Algorithm.prepare ─► minibatches ─► optimizer_step
         (Batch)  (reference,                                      └─► micro-batches ─► Algorithm.loss ─► Terms,
                   old log-probabilities)                               divided by global counts, differentiated
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.algorithms import Algorithm
from alignment.batch import Batch, Loss, Role, Unit
from alignment.data.packing import micro_batches, pack, share
from alignment.distributed.world import World
from alignment.errors import ConfigError, DivergenceError
from alignment.groups import Group
from alignment.metrics import Metrics
from alignment.models.roles import Roles
from alignment.settings.run import OptimConfig

UNITS: tuple[Unit, ...] = ("token", "completion", "pair")


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings that change from step to step."""

    lr: dict[Role, float]
    """Learning rate of each trained role; a role that is missing is not updated."""
    kl_coefficient: float = 0.0
    """Price of a nat of divergence from the reference."""
    seed: int = 0
    """Seed of the order in which minibatches are drawn."""


def train_step(
    roles: Roles, algorithm: Algorithm, groups: list[Group], optim: OptimConfig, world: World, settings: StepSettings
) -> Metrics:
    """Trains the roles on the groups of one step, in as many epochs and minibatches as the algorithm asks for.

    `groups` is the whole global batch on every worker. Neither the cut into micro-batches nor the number of workers
    changes a gradient, because every term is divided by its global count and only then differentiated.

    Returns:
        The means of the metrics over all updates.

    Raises:
        DivergenceError: loss or gradient is not finite and `on_nonfinite` is `fail`. That update changed nothing.
    """
    groups = algorithm.assemble(groups)
    batch = annotate(roles, groups, optim, world)
    batch = algorithm.prepare(dataclasses.replace(batch, kl_coefficient=settings.kl_coefficient))
    updates = [
        optimizer_step(roles, algorithm, batch.cut(group_indices), optim, world, settings.lr)
        for group_indices in _minibatches(len(groups), algorithm, settings.seed)
    ]
    names = {name for update in updates for name in update}
    values_by_name = {name: [update[name] for update in updates if name in update] for name in names}
    return {
        **{name: math.fsum(values) / len(values) for name, values in values_by_name.items()},
        **algorithm.step_metrics(settings.kl_coefficient),
        "lr": settings.lr.get("actor", 0.0),
        "num_tokens": float(sum(group.num_tokens for group in groups)),
    }


@torch.no_grad()
def evaluate(roles: Roles, algorithm: Algorithm, groups: list[Group], optim: OptimConfig, world: World) -> Metrics:
    """Returns loss and metrics of the actor, without an update; every worker passes all of the groups."""
    roles.train(False)
    batch = algorithm.prepare(annotate(roles, algorithm.assemble(groups), optim, world))
    totals = _Totals(batch, world)
    for micro_batch in _micro_batches(batch, roles, optim, world):
        loss = algorithm.loss(micro_batch.batch, roles.outputs(micro_batch.batch))
        if not micro_batch.is_padding:
            totals.add(loss)
    return totals.reduce()


def annotate(roles: Roles, groups: list[Group], optim: OptimConfig, world: World) -> Batch:
    """Packs the global batch and adds what the models say of it before the first update; the same on every worker."""
    batch = pack(groups).to(world.device)
    return Batch(**{**vars(batch), **_gather_outputs(batch, roles.annotations, roles, optim, world)})


def reference_logprobs(roles: Roles, groups: list[Group], optim: OptimConfig, world: World) -> Tensor:
    """[L] log-probability (nats) of every completion token under the reference, group after group; on the CPU."""
    batch = pack(groups).to(world.device)
    outputs = _gather_outputs(batch, roles.reference_annotations, roles, optim, world)
    return outputs["reference_logprobs"][batch.completion_index >= 0].cpu()


def divergences(roles: Roles, groups: list[Group], optim: OptimConfig, world: World) -> list[float]:
    """Σ log π − log π_ref (nats) of every completion that the actor has sampled; empty without a reference model.

    Reference log-probabilities that were precomputed do not cover texts that were sampled later.
    """
    if not roles.has_reference:
        return []
    batch = annotate(roles, groups, optim, world)
    assert batch.reference_logprobs is not None
    logprobs = batch.old_logprobs
    if logprobs is None:
        with torch.no_grad():
            outputs = _gather_outputs(
                batch, lambda micro_batch: {"logprobs": roles.outputs(micro_batch).logprobs}, roles, optim, world
            )
        logprobs = outputs["logprobs"]
    return batch.per_completion(logprobs - batch.reference_logprobs).tolist()


def _gather_outputs(
    batch: Batch, forward: Callable[[Batch], dict[str, Tensor]], roles: Roles, optim: OptimConfig, world: World
) -> dict[str, Tensor]:
    """Runs `forward` on this worker's micro-batches; returns what it gave for the global batch, [T] by name."""
    outputs: dict[str, Tensor] = defaultdict(lambda: torch.zeros(batch.tokens.shape, device=world.device))
    for micro_batch in _micro_batches(batch, roles, optim, world):
        for name, values in forward(micro_batch.batch).items():
            if not micro_batch.is_padding:
                outputs[name][micro_batch.token_index] = values
    # A worker that has no groups has no names either, and still takes part in the sums.
    for name in sorted(set().union(*world.gather(set(outputs)))):
        world.sum(outputs[name])
    return outputs


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
class MicroBatch:
    """The groups of one forward pass of this worker."""

    batch: Batch
    token_index: Tensor
    """[t] int64 index of each of its tokens in the global batch."""
    is_padding: bool
    """True if it only keeps this worker in step with the others: its outputs are not used."""


def _micro_batches(batch: Batch, roles: Roles, optim: OptimConfig, world: World) -> Iterator[MicroBatch]:
    """Cuts this worker's share of a batch into forward passes."""
    lengths = torch.bincount(batch.group_index).tolist()
    shares = [share(lengths, rank=rank, size=world.size) for rank in range(world.size)]
    cuts = [micro_batches(groups, lengths, max_tokens=optim.micro_batch_tokens) for groups in shares]
    own_cut = cuts[world.rank]
    num_padding = max(map(len, cuts)) - len(own_cut) if roles.in_lockstep else 0
    for groups in own_cut:
        yield MicroBatch(batch=batch.cut(groups), token_index=batch.token_indices(groups), is_padding=False)
    shortest = [lengths.index(min(lengths))]
    for _ in range(num_padding):
        yield MicroBatch(batch=batch.cut(shortest), token_index=batch.token_indices(shortest), is_padding=True)


def optimizer_step(
    roles: Roles, algorithm: Algorithm, batch: Batch, optim: OptimConfig, world: World, lr: dict[Role, float]
) -> Metrics:
    """Does one optimizer step on a prepared batch, which is the same on every worker.

    Raises:
        DivergenceError: loss or gradient is not finite and `on_nonfinite` is `fail`; nothing has changed.
    """
    totals = _Totals(batch, world)
    roles.train()
    for micro_batch in _micro_batches(batch, roles, optim, world):
        loss = algorithm.loss(micro_batch.batch, roles.outputs(micro_batch.batch))
        _backward(roles, _zero_loss(loss) if micro_batch.is_padding else totals.add(loss))
    metrics = totals.reduce()
    is_finite = math.isfinite(metrics["loss"])
    norms: dict[Role, float] = {}
    for role, backend in reversed(roles.backends_by_role.items()):  # an actor does not follow a critic that has failed
        is_finite = is_finite and all(math.isfinite(norm) for role_done, norm in norms.items() if role_done in lr)
        norms[role] = backend.step(lr[role]) if is_finite and role in lr else backend.discard()
    is_skipped = any(not math.isfinite(norms[role]) for role in lr)
    if is_skipped and optim.on_nonfinite == "fail":
        raise DivergenceError(
            f"loss {metrics['loss']}{_loss_names(algorithm, metrics)} and gradient norm {norms['actor']} are not both "
            "finite, in a step on "
            f"{batch.group_ids[0]} and {len(batch.group_ids) - 1} other groups; a lower optim.lr or "
            "optim.max_grad_norm may help"
        )
    grad_norms = {"grad_norm" if role == "actor" else f"grad_norm_{role}": norms[role] for role in lr}
    return {**metrics, **grad_norms, "skipped": float(is_skipped)}


def _loss_names(algorithm: Algorithm, metrics: Metrics) -> str:
    """Names, in brackets, the losses that are not finite, or else all that the configuration names."""
    names = algorithm.loss_metrics
    nonfinite_names = [name for metric, name in names.items() if not math.isfinite(metrics.get(metric, 0.0))]
    text = ", ".join(nonfinite_names or names.values())
    return f" ({text})" if text else ""


def _backward(roles: Roles, losses: dict[Role, Tensor]) -> None:
    """Differentiates each role's loss; a critic on the actor's trunk shares the actor's graph."""
    if roles.critic is not None and roles.critic.model is None:
        losses = {"actor": torch.stack(list(losses.values())).sum()}
    for role, loss in losses.items():
        roles.backends_by_role[role].backward(loss)


def _zero_loss(loss: Loss) -> dict[Role, Tensor]:
    """A loss of 0 on every role's graph, so that a padding pass takes part in the collectives of a backward pass."""
    return {term.trains: 0.0 * term.values.sum() for term in loss.terms}


def _minibatches(num_groups: int, algorithm: Algorithm, seed: int) -> Iterator[list[int]]:
    """The groups of each optimizer step, in the order of the data where there is one step only."""
    if algorithm.epochs == algorithm.minibatches == 1:
        yield list(range(num_groups))
        return
    order = torch.Generator().manual_seed(seed)
    for _ in range(algorithm.epochs):
        permutation = torch.randperm(num_groups, generator=order).tolist()
        count = min(algorithm.minibatches, num_groups)
        yield from (sorted(permutation[start::count]) for start in range(count))


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
            if term.values.dim() != 1:
                raise ConfigError(
                    f"the algorithm's loss has a term of shape {tuple(term.values.shape)}, must be [n]: one value per "
                    f"{term.unit}, not averaged"
                )
            shares[term.trains].append(term.values.sum() / self.counts[term.unit])
        losses = {role: torch.stack(terms).sum() for role, terms in shares.items()}
        self.loss += sum(float(value.detach()) for value in losses.values())
        for name, values in loss.metrics.items():
            self.sums[name] += float(values.sum())
            self.numbers[name] += values.numel()
        return losses

    def reduce(self) -> Metrics:
        """The loss, and each metric's mean over the global batch, the same on every worker."""
        names = sorted(set().union(*self.world.gather(set(self.sums))))
        rows = [[self.sums[name], self.numbers[name]] for name in names] + [[self.loss, 1.0]]
        totals = self.world.sum(torch.tensor(rows, dtype=torch.float64, device=self.world.device)).tolist()
        means = {name: total / count for name, (total, count) in zip(names, totals, strict=False) if count}
        return {"loss": totals[-1][0], **means}
