"""A module in training: its fp32 master weights and optimizer, behind a port that every backend implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from alignment.distributed.world import World
from alignment.errors import AlignmentError, ConfigError
from alignment.optimizers import optimizer_kind
from alignment.settings.run import OptimConfig

GRADIENT_BUCKET = 1 << 24
"""Number of gradient elements in one all-reduce (64 MiB in fp32)."""


class TrainableModule(ABC):
    """A module in training: its weights, fp32 master copies of the trained ones, and the optimizer over them.

    Gradients are summed over micro-batches and over workers and never averaged. So a loss must already be divided by
    global counts.
    """

    module: nn.Module
    """The module that forward passes use."""
    world: World
    """The workers that train it together."""
    needs_lockstep = False
    """True if forward and backward passes are collectives, so that every worker must run the same number of them."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss to the gradient of the step."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Updates the weights with the summed gradients, and clears the gradients. Every worker must call this.

        Returns:
            The global L2 norm of the gradient before clipping. If it is not finite, no weight is changed.
        """

    @abstractmethod
    def discard(self) -> float:
        """Clears the gradients of the step without using them; returns NaN. Every worker must call this."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Master weights and optimizer moments by name, for a checkpoint: all on the main worker, none on the others.

        Every worker must call this. The names are `master.NAME` and, after the first step, `optimizer.MOMENT.NAME`.
        They do not depend on the number of workers or on how the weights are spread over them.
        """

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state` returned. Every worker must call this with the same tensors.

        Raises:
            KeyError: a trained weight is missing.
        """

    def named_weights(self, *, only_trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yields each weight of the module by name, in the number format in which the module computes.

        A tied weight comes once. Every worker must call this and iterate to the end. Sharded weights are gathered one
        at a time, so a tensor is valid only until the next one is taken, and must be copied to be kept.
        """
        for name, weight in named_weights(self.module):
            if weight.requires_grad or not only_trained:
                yield name, weight.detach()

    def gather_weights(self, *, only_trained: bool = False) -> dict[str, Tensor]:
        """Collects all weights that `full` yields on the CPU of the main worker; empty on the others.

        Every worker must call this.
        """
        weights = {}
        for name, weight in self.named_weights(only_trained=only_trained):
            if self.world.is_main:
                weights[name] = weight.cpu()
        return weights


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name. A tied one comes once, under the first of its names."""
    seen_ids: set[int] = set()
    for name, weight in module.state_dict(keep_vars=True).items():
        if id(weight) not in seen_ids:
            seen_ids.add(id(weight))
            yield name, weight


def optimizer_over(weights: list[nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """Makes the configured optimizer over some weights.

    Raises:
        ConfigError: the optimizer refuses its settings, or a function of one's own returns something else.
    """
    try:
        optimizer = optimizer_kind(optim.name).build(weights, optim)
    except AlignmentError:
        raise
    except Exception as error:  # one's own function may raise anything
        raise ConfigError(
            f"optim.name {optim.name!r}: the optimizer cannot be made with the settings of optim: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optim.name {optim.name!r} returns a {type(optimizer).__name__}, not a torch.optim.Optimizer"
        )
    return optimizer
