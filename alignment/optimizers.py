"""The optimizers that a configuration can name, each with what a checkpoint must know of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignment.errors import ConfigError
from alignment.settings.plugins import load_plugin

if TYPE_CHECKING:
    import torch

    from alignment.settings.run import OptimConfig


@dataclass(frozen=True)
class OptimizerKind:
    """How an optimizer is made, and what it remembers of every weight."""

    build: Callable[[Iterable[Any], OptimConfig], torch.optim.Optimizer]
    """Makes the optimizer over weights or groups of weights."""
    moments: tuple[str, ...] | None = None
    """The parts of its state that have the shape of a weight; None if they are not known."""


def _adamw(weights: Iterable[Any], optim: OptimConfig) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(
        weights, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def _rmsprop(weights: Iterable[Any], optim: OptimConfig) -> torch.optim.Optimizer:
    import torch

    return torch.optim.RMSprop(weights, lr=optim.lr, eps=optim.eps, weight_decay=optim.weight_decay)


OPTIMIZERS = {
    "adamw": OptimizerKind(_adamw, moments=("exp_avg", "exp_avg_sq")),
    "rmsprop": OptimizerKind(_rmsprop, moments=("square_avg",)),
}
"""The optimizers that come with raylign, by name."""


def optimizer_kind(name: str) -> OptimizerKind:
    """Finds the optimizer of a name, or of a dotted `package.module:function` of one's own.

    Raises:
        ConfigError: there is no such optimizer.
    """
    kind = load_plugin(name, OPTIMIZERS, "optimizer")
    return kind if isinstance(kind, OptimizerKind) else OptimizerKind(kind)


def sharded_moments(name: str) -> tuple[str, ...]:
    """The moments of an optimizer that DeepSpeed shards.

    Raises:
        ConfigError: they are not known, so that DeepSpeed cannot gather them for a checkpoint.
    """
    moments = optimizer_kind(name).moments
    if moments is None:
        raise ConfigError(
            f"optim.zero.stage above 0 shards the moments of optimizer {name!r}, which are not known; let it be an "
            "alignment.optimizers.OptimizerKind that names them, or set optim.zero.stage to 0"
        )
    return moments
