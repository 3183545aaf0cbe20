"""One worker or many: the World a loop runs in, and the one function that decides how a module is trained in it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alignment.config import OptimConfig

Item = TypeVar("Item")
GRADIENT_BUCKET = 1 << 24
"""Gradient elements (64 MiB in fp32) in one all-reduce."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This worker's place among the workers; alone, every collective is the identity."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on the one worker that writes and talks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, item: Item) -> Item:
        """What the main worker has, on every worker."""
        if self.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, item: Item) -> list[Item]:
        """One item of every worker, by rank, on every worker."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Returns when every worker has come here."""
        if self.size > 1:
            dist.barrier()


class Trained:
    """A module, the fp32 master copy of its trained weights, and the optimizer over them.

    Gradients are summed in fp32 into the masters as soon as a backward pass has finished with a weight, however many
    micro-batches make a step, and over all workers once per step. The loss must therefore already be divided by global
    counts.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, world: World) -> None:
        self.module = module
        self.optim = optim
        self.world = world
        self.weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.masters = {name: _master(weight) for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            if self.masters[name] is not weight:
                weight.register_post_accumulate_grad_hook(_into(self.masters[name]))  # type: ignore[no-untyped-call]
        self.optimizer = _optimizer(list(self.masters.values()), optim)

    def backward(self, loss: Tensor) -> None:
        """Adds this loss's gradient to that of the step."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> float:
        """Updates the weights from the summed gradients and clears them.

        Returns the global L2 norm of the gradient before clipping. If it is not finite, nothing is changed.
        """
        gradients = [self._gradient(master) for master in self.masters.values()]
        self._sum_over_workers(gradients)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if torch.isfinite(norm):
            limit = self.optim.max_grad_norm
            if 0 < limit < norm:
                torch._foreach_mul_(gradients, limit / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._publish()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def discard(self) -> float:
        """Clears the step's gradients unused; returns NaN in place of their norm."""
        self.optimizer.zero_grad(set_to_none=True)
        return math.nan

    def state(self) -> dict[str, Tensor]:
        """Masters and optimizer moments by name, for a checkpoint."""
        tensors = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` returned, bit for bit.

        Raises:
            KeyError: a trained weight is missing.
        """
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"master.{name}"])
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                moment, _, name = rest.partition(".")
                # The step counter of a fused optimizer lives on the device like the moments, as fp32.
                self.optimizer.state[self.masters[name]][moment] = value.to(self.masters[name].device)
        self._publish()

    def _gradient(self, master: nn.Parameter) -> Tensor:
        # A weight that no token of this worker's share touched still takes part in the all-reduce.
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    def _sum_over_workers(self, gradients: list[Tensor]) -> None:
        if self.world.size == 1:
            return
        for bucket in _buckets(gradients):
            flat = self.world.sum(torch.cat([gradient.flatten() for gradient in bucket]))
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def _publish(self) -> None:
        """Copies the masters into the weights that compute."""
        torch._foreach_copy_(
            [weight.data for weight in self.weights.values()], [master.data for master in self.masters.values()]
        )


def shard(module: nn.Module, optim: OptimConfig, world: World) -> Trained:
    """Decides how a module is trained in this world. Nothing else knows.

    Every worker holds the whole module and sums gradients with the others; DeepSpeed's ZeRO enters here.
    """
    return Trained(module, optim, world)


def _master(weight: nn.Parameter) -> nn.Parameter:
    return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())


def _into(master: nn.Parameter) -> Any:
    def add(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    return add


def _optimizer(masters: list[nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    if optim.name == "rmsprop":
        return torch.optim.RMSprop(masters, lr=optim.lr, eps=optim.eps, weight_decay=optim.weight_decay)
    return torch.optim.AdamW(
        masters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel()
        if size >= GRADIENT_BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
