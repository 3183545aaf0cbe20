"""Chooses how a model is trained or frozen in a world of workers: whole on each of them, or sharded by DeepSpeed."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from alignment.distributed.deepspeed import DeepSpeedBackend, partition_frozen
from alignment.distributed.replicated import ReplicatedBackend
from alignment.distributed.trainable import TrainableModule
from alignment.distributed.world import World
from alignment.settings.run import OptimConfig


def wrap(module: nn.Module, optim: OptimConfig, world: World, *, root: nn.Module | None = None) -> TrainableModule:
    """Chooses the backend that trains a module in this world. No other code makes this choice.

    Args:
        root: the module that forward passes call, which holds `module`; by default `module` itself.
    """
    # A single head is too small to be worth sharding.
    if optim.zero.stage == 0 or not any(isinstance(submodule, PreTrainedModel) for submodule in module.modules()):
        return ReplicatedBackend(module, optim, world)
    return DeepSpeedBackend(module, optim, world, root=module if root is None else root)


def wrap_frozen(root: nn.Module, optim: OptimConfig, world: World) -> None:
    """Freezes the module that forward passes call, and shards it over the workers as a trained module would be.

    At ZeRO stage 3, its forward pass is a collective, which every worker must run equally often.
    """
    root.requires_grad_(False).eval()
    if optim.zero.stage == 3:
        partition_frozen(root, optim, world)


def loading_device(optim: OptimConfig, world: World) -> torch.device:
    """The device on which a model is loaded: the worker's device, or the CPU if the model is sharded after loading."""
    return torch.device("cpu") if optim.zero.stage == 3 else world.device
