"""Every worker holds the whole module; gradients are summed over the workers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from alignment.distributed.trainable import GRADIENT_BUCKET, TrainableModule, optimizer_over
from alignment.distributed.world import World
from alignment.optimizers import check_state, group_settings
from alignment.settings.run import OptimConfig


class ReplicatedBackend(TrainableModule):
    """Data parallelism in which every worker holds the full module.

    The gradient of each micro-batch is added in fp32 to the master weight's gradient as soon as the backward pass has
    computed it. The sums are then added up over the workers once per step.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, world: World) -> None:
        self.module = module
        self.optim = optim
        self.world = world
        self.weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.masters = {name: _master(weight) for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            if self.masters[name] is not weight:
                weight.register_post_accumulate_grad_hook(_accumulate_into(self.masters[name]))  # type: ignore[no-untyped-call]
        self.optimizer = optimizer_over(list(self.masters.values()), optim)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss to the master weights' gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> float:
        """Sums and clips the gradients, updates the master weights, and copies them into the module."""
        gradients = [self._gradient(master) for master in self.masters.values()]
        self._sum_over_workers(gradients)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if torch.isfinite(norm):
            limit = self.optim.max_grad_norm
            if 0 < limit < norm:
                torch._foreach_mul_(gradients, limit / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self._update_masters()
            self._publish()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def discard(self) -> float:
        """Clears the gradients of the step without using them."""
        self.optimizer.zero_grad(set_to_none=True)
        return math.nan

    def state(self) -> dict[str, Tensor]:
        """Master weights and optimizer moments by name, on the main worker."""
        if not self.world.is_main:
            return {}
        tensors = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores master weights and moments, and copies the masters into the module."""
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

    def _update_masters(self) -> None:
        """Takes the optimizer's step; after the first one, its state is checked."""
        settings = group_settings(self.optimizer) if not self.optimizer.state else None
        self.optimizer.step()
        if settings is not None:
            check_state(self.optimizer, self.optim.name, settings)

    def _gradient(self, master: nn.Parameter) -> Tensor:
        # A weight that no token of this worker used still takes part in the all-reduce.
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    def _sum_over_workers(self, gradients: list[Tensor]) -> None:
        if self.world.size == 1:
            return
        for bucket in _buckets(gradients):
            flat = self.world.sum(torch.cat([gradient.flatten() for gradient in bucket]))
            chunks = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, chunk in zip(bucket, chunks, strict=True):
                gradient.copy_(chunk.view_as(gradient))

    @torch.no_grad()
    def _publish(self) -> None:
        """Copies the master weights into the weights that the module computes with."""
        torch._foreach_copy_(
            [weight.data for weight in self.weights.values()], [master.data for master in self.masters.values()]
        )


def _master(weight: nn.Parameter) -> nn.Parameter:
    """The fp32 master copy of a weight; the weight itself if it is fp32 already."""
    return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())


def _accumulate_into(master: nn.Parameter) -> Any:
    """Returns a hook that moves a weight's gradient into its master weight's gradient."""

    def add(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    return add


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    """Groups tensors into buckets of about GRADIENT_BUCKET elements."""
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
