"""Rollout: the model's own answers. This module has the port to the engines and the records that go through it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are sampled."""

    num_completions: int
    """Number of completions of each prompt."""
    max_tokens: int
    """Most tokens of a completion."""
    max_length: int
    """Most tokens of prompt and completion together."""
    temperature: float
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Smallest probability of the tokens that are sampled from; 1 is off."""
    top_k: int = 0
    """Number of tokens that are sampled from; 0 is off."""
    end_tokens: frozenset[int] = frozenset()
    """Token ids that end a completion. The end token is the last token of the completion."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt to be answered."""

    tokens: tuple[int, ...]
    """Token ids of the prompt."""
    seed: int
    """Seed of the prompt's completions. Each completion gets a seed of its own, from this one and its index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One completion as an engine has generated it."""

    tokens: tuple[int, ...]
    """Token ids; the last one is the end token, unless the completion was truncated."""
    logprobs: tuple[float, ...]
    """Log-probability (nats) of each token in the distribution that it was sampled from."""
    truncated: bool
    """True if the completion was cut off because it reached the length limit."""
    weight_version: int
    """Version of the weights that generated it; the oldest one if they changed meanwhile."""
    loss_mask: tuple[bool, ...] = ()
    """Which of the tokens the policy has sampled; the others are what an environment said. Empty if all of them."""
    reward: float | None = None
    """What an environment gave for it; None without one."""


class Weights(Protocol):
    """The actor's weights for the engines: either an adapter, or all weights."""

    @property
    def version(self) -> int:
        """Number of optimizer steps behind the weights."""

    def save_adapter(self, folder: Path) -> bool:
        """Writes the LoRA adapter as peft does. Returns false and writes nothing if all weights are trained."""

    def participate(self) -> None:
        """Takes part in the collectives of `save_adapter` or `named_weights`, on all workers but the main one."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields each weight by its Hugging Face name, in the model's number format; a tied weight comes once.

        A weight must be used before the next one is taken, because sharded weights are gathered one at a time.
        """


class Policy(Protocol):
    """The actor, as it is sampled from."""

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        """Generates the completions of one prompt.

        Raises:
            RolloutError: they could not be generated.
        """


class Generator(Protocol):
    """The port to the engines that generate completions. Only the main worker calls it, except for `load`."""

    def start(self, work: Callable[[Policy], Coroutine[Any, Any, Result]]) -> Callable[[], Result]:
        """Starts work that asks the policy, beside the training; the returned function waits for its result.

        Raises:
            RolloutError: (from the returned function) the work has not ended within the time limit.
        """

    def load(self, weights: Weights) -> None:
        """Loads new weights into all engines; called by every training worker.

        It waits for completions in progress first, so that no completion comes from two versions of the weights.

        Raises:
            RolloutError: an engine did not load them within the time limit, nor after a restart.
        """

    def close(self) -> None:
        """Stops the engines that this object has started."""
