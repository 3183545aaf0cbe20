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


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """How an optimizer is made, and what it remembers of every weight."""

    build: Callable[[Iterable[Any], OptimConfig], torch.optim.Optimizer]
    """Makes the optimizer over weights or groups of weights."""
    moments: tuple[str, ...] | None = None
    """The parts of its state that have the shape of a weight; None if they are not known. ZeRO needs them, and cuts
    weights into flat shares, so an optimizer that names them must treat each number of a weight by itself."""


def _adamw(weights: Iterable[Any], optim: OptimConfig) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(
        weights, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def _rmsprop(weights: Iterable[Any], optim: OptimConfig) -> torch.optim.Optimizer:
    import torch

    return torch.optim.RMSprop(weights, lr=optim.lr, eps=optim.eps, weight_decay=optim.weight_decay)


OPTIMIZERS = {
    "adamw": OptimizerKind(build=_adamw, moments=("exp_avg", "exp_avg_sq")),
    "rmsprop": OptimizerKind(build=_rmsprop, moments=("square_avg",)),
}
"""The optimizers that come with raylign, by name."""


def optimizer_kind(name: str) -> OptimizerKind:
    """Finds the optimizer of a name, or of a dotted `package.module:function` of one's own.

    Raises:
        ConfigError: there is no such optimizer.
    """
    kind = load_plugin(name, OPTIMIZERS, "optimizer")
    if isinstance(kind, OptimizerKind):
        return kind
    if not callable(kind):
        raise ConfigError(f"optimizer {name!r} is a {type(kind).__name__}, neither a function nor an OptimizerKind")
    return OptimizerKind(build=kind)


def check_state(optimizer: torch.optim.Optimizer, name: str, groups_before: list[dict[str, Any]]) -> None:
    """Checks, after an optimizer's first step, that a checkpoint can store all that the optimizer remembers.

    Args:
        groups_before: the settings of its groups of weights before that step, without the weights.

    Raises:
        ConfigError: it remembers something else than tensors by weight, so a run could not be resumed exactly.
    """
    import torch

    unstored_keys = {
        key for state in optimizer.state.values() for key, value in state.items() if not isinstance(value, torch.Tensor)
    }
    if group_settings(optimizer) != groups_before:
        unstored_keys.add("a setting of its groups, which a step has changed")
    if unstored_keys:
        raise ConfigError(
            f"optimizer {name!r} remembers {', '.join(sorted(unstored_keys))}, and a checkpoint stores only tensors in "
            "`optimizer.state`; without it the run could not be resumed exactly"
        )


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of an optimizer's groups of weights, without the weights."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


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
