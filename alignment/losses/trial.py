"""A trial of a preference loss of one's own on three made-up pairs, before a run starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignment.errors import ConfigError
from alignment.losses.preference import Pairs, PreferenceLoss, Side


def try_preference_loss(name: str, loss: PreferenceLoss, *, beta: float) -> None:
    """Calls a loss once with three pairs; in the second one, the model is the reference, as in a run's first step.

    Args:
        name: the dotted name of the loss, for the error.
        beta: the strength that the run has.

    Raises:
        ConfigError: the loss cannot be called, or it does not return a finite loss of each pair with a gradient.
    """
    pairs = _made_up_pairs()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        try:
            losses = loss(pairs, beta=beta)
        except Exception as error:  # a function of one's own may raise anything
            text = " ".join(str(error).split())
            raise ConfigError(
                f"loss {name!r} raised {type(error).__name__}: {text}. It is called as loss(pairs, beta={beta:g}), "
                "where pairs is an alignment.losses.preference.Pairs, and returns the [M] loss of each pair"
            ) from error
        check_losses(name, losses, num_pairs=len(pairs.chosen.lengths))
        if not losses.isfinite().all():
            raise ConfigError(f"loss {name!r} returned {losses.tolist()} for three ordinary pairs, must be finite")
        logprobs = [pairs.chosen.logprobs, pairs.rejected.logprobs]
        gradients = torch.autograd.grad(losses.sum(), logprobs, allow_unused=True) if losses.requires_grad else ()
    if all(gradient is None for gradient in gradients):
        raise ConfigError(
            f"loss {name!r} has no gradient, so nothing would be learned: compute it from pairs.chosen.logprobs and "
            "pairs.rejected.logprobs (or logratios), without detach, item or numpy"
        )


def check_losses(name: str, losses: Any, *, num_pairs: int) -> None:
    """Checks what a preference loss returned: a loss that is averaged already would weigh too little.

    Raises:
        ConfigError: it is not a tensor of real numbers with one entry for each pair.
    """
    if not isinstance(losses, Tensor):
        raise ConfigError(f"loss {name!r} returned a {type(losses).__name__}, must be a tensor of shape [M]")
    if losses.shape != (num_pairs,):
        hint = "; leave out the mean or sum" if losses.dim() == 0 else ""
        raise ConfigError(
            f"loss {name!r} returned shape {tuple(losses.shape)}, must be [M]: one loss for each of {num_pairs} "
            f"pairs{hint}"
        )
    if not losses.is_floating_point():
        raise ConfigError(f"loss {name!r} returned a tensor of {losses.dtype}, must be of a floating dtype")


def _made_up_pairs() -> Pairs:
    chosen_logprobs, rejected_logprobs = torch.tensor([-4.0, -9.0, -2.5]), torch.tensor([-6.0, -7.5, -2.0])
    return Pairs(
        chosen=Side(
            logprobs=chosen_logprobs.requires_grad_(),
            reference_logprobs=torch.tensor([-5.0, -9.0, -2.0]),
            lengths=torch.tensor([3, 7, 2]),
        ),
        rejected=Side(
            logprobs=rejected_logprobs.requires_grad_(),
            reference_logprobs=torch.tensor([-5.5, -7.5, -2.5]),
            lengths=torch.tensor([4, 5, 1]),
        ),
    )
