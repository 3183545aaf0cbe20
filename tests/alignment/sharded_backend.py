"""A backend of somebody's own: torch's `fully_shard` over the layers and over the root module that is called."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from alignment.distributed.trainable import TrainableModule, named_weights, optimizer_over
from alignment.distributed.world import World
from alignment.models.packed_model import PackedModel
from alignment.settings.run import OptimConfig


class ShardedBackend(TrainableModule):
    """Every worker holds its share of each fp32 weight and of its moments; a pass gathers them layer by layer."""

    needs_lockstep = True

    def __init__(self, root: PackedModel, optim: OptimConfig, world: World) -> None:
        self.module = root.module
        self.optim = optim
        self.world = world
        mesh = init_device_mesh(world.device.type, (world.size,))
        for layer in root.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(root, mesh=mesh)
        for submodule in root.modules():
            if isinstance(submodule, FSDPModule):
                submodule.set_gradient_divide_factor(1.0)
                submodule.set_force_sum_reduction_for_comms(True)
        self.weights = dict(root.module.named_parameters())
        self.optimizer = optimizer_over(list(self.weights.values()), optim)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = whole(nn.utils.clip_grad_norm_(self.weights.values(), self.optim.max_grad_norm, foreach=False))
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def discard(self) -> float:
        self.optimizer.zero_grad()
        return math.nan

    def state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            tensors[f"master.{name}"] = whole(weight)
            for key, value in self.optimizer.state.get(weight, {}).items():
                tensors[f"optimizer.{key}.{name}"] = whole(value)
        return tensors if self.world.is_main else {}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(shares(tensors[f"master.{name}"], weight))
            for key in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[weight][key] = shares(tensors[f"optimizer.{key}.{name}"], weight)
            self.optimizer.state[weight]["step"] = tensors[f"optimizer.step.{name}"]

    def named_weights(self, *, only_trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        for name, weight in named_weights(self.module):
            yield name, whole(weight)


def whole(tensor: Any) -> Tensor:
    """A tensor with the shares of all workers; a collective if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def shares(tensor: Tensor, weight: Any) -> Tensor:
    """A full tensor, sharded as a weight is."""
    return distribute_tensor(tensor.to(weight.dtype), weight.device_mesh, weight.placements)
