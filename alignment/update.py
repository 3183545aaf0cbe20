"""One optimizer step: micro-batches, gradients and metrics, all divided by the counts of the whole global batch."""

from __future__ import annotations

import math

import torch

from alignment.algorithms import Algorithm
from alignment.config import OptimConfig
from alignment.data.packing import micro_batches, pack, share
from alignment.errors import DivergenceError
from alignment.models.forward import outputs
from alignment.models.parallel import World
from alignment.models.roles import Roles
from alignment.types import Batch, Group, Loss, Unit

UNITS: tuple[Unit, ...] = ("token", "completion", "pair")

Metrics = dict[str, float]


def train_step(
    roles: Roles, algorithm: Algorithm, groups: list[Group], optim: OptimConfig, world: World, *, lr: float
) -> Metrics:
    """Learns from the groups of one step; `groups` is the whole global batch on every worker.

    Neither the cut into micro-batches nor the number of workers changes the gradient, because every term is divided
    by its global count and only then differentiated.

    Raises:
        DivergenceError: loss or gradient is not finite and `on_nonfinite` is `fail`. The weights are unchanged.
    """
    batches = _my_batches(groups, optim, world)
    totals = _Totals(batches, world)
    roles.actor.module.train()
    for batch in batches:
        loss = algorithm.loss(batch := roles.annotate(batch), outputs(roles.actor, batch))
        roles.trained.backward(totals.add(loss))
    metrics = totals.reduce()
    norm = roles.trained.step(lr) if math.isfinite(metrics["loss"]) else roles.trained.discard()
    skipped = not math.isfinite(norm)
    if skipped and optim.on_nonfinite == "fail":
        raise DivergenceError(
            f"loss {metrics['loss']} and gradient norm {norm} are not both finite, in a step on {groups[0].id} and "
            f"{len(groups) - 1} other groups; a lower optim.lr or optim.max_grad_norm may help"
        )
    num_tokens = sum(group.num_tokens for group in groups)
    return {**metrics, "grad_norm": norm, "lr": lr, "num_tokens": float(num_tokens), "skipped": float(skipped)}


@torch.no_grad()
def evaluate(roles: Roles, algorithm: Algorithm, groups: list[Group], optim: OptimConfig, world: World) -> Metrics:
    """Loss and metrics of the actor as it is, on groups that every worker knows whole."""
    batches = _my_batches(groups, optim, world)
    totals = _Totals(batches, world)
    roles.actor.module.eval()
    for batch in batches:
        totals.add(algorithm.loss(batch := roles.annotate(batch), outputs(roles.actor, batch)))
    return totals.reduce()


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


class _Totals:
    """Sums of losses and metrics over the micro-batches of all workers, and the global counts that divide them."""

    def __init__(self, batches: list[Batch], world: World) -> None:
        self.world = world
        counts = [float(sum(batch.count(unit) for batch in batches)) for unit in UNITS]
        counts = world.sum(torch.tensor(counts, dtype=torch.float64, device=world.device)).tolist()
        self.counts = dict(zip(UNITS, counts, strict=True))
        self.sums: dict[str, float] = {}

    def add(self, loss: Loss) -> torch.Tensor:
        """Adds one micro-batch; returns its share of the global mean loss, to be differentiated."""
        total = torch.stack([term.values.sum() / self.counts[term.unit] for term in loss.terms]).sum()
        self._count("loss", float(total.detach()))
        for name, metric in loss.metrics.items():
            self._count(name, float(metric.values.sum()) / self.counts[metric.unit])
        return total

    def reduce(self) -> Metrics:
        """Means over the global batch, the same on every worker."""
        names = sorted(set().union(*self.world.gather(set(self.sums))))
        sums = torch.tensor([self.sums.get(name, 0.0) for name in names], dtype=torch.float64, device=self.world.device)
        return dict(zip(names, self.world.sum(sums).tolist(), strict=True))

    def _count(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value


def _my_batches(groups: list[Group], optim: OptimConfig, world: World) -> list[Batch]:
    mine = share(groups, rank=world.rank, size=world.size)
    return [pack(cut).to(world.device) for cut in micro_batches(mine, max_tokens=optim.micro_batch_tokens)]
