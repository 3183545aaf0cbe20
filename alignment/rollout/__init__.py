"""Rollout: the model's own answers. The port through which engines enter the loop, and what goes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    completions: int
    """Of each prompt."""
    max_tokens: int
    """Most tokens of a completion."""
    max_length: int
    """Most tokens of prompt and completion together."""
    temperature: float
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    end_tokens: frozenset[int] = frozenset()
    """Ids that end a completion; the end token is the completion's last token."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt to be answered."""

    tokens: tuple[int, ...]
    seed: int
    """Of its completions' randomness; completion k draws with a seed of its own that depends on this and k."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One completion as it was drawn."""

    tokens: tuple[int, ...]
    """With the end token, if it ended by itself."""
    logprobs: tuple[float, ...]
    """Log-probability (nats) of each token in the distribution that it was drawn from."""
    truncated: bool
    """True if it stopped for lack of room."""
    version: int
    """Version of the weights that drew it; the oldest, if they changed meanwhile."""


Rollouts = list[list[Rollout]]
"""The completions of each prompt, in the order asked for."""


class Weights(Protocol):
    """The actor's weights on their way to the engines. Either an adapter or all of them."""

    @property
    def version(self) -> int:
        """Optimizer steps done."""

    def save_adapter(self, folder: Path) -> bool:
        """Writes the LoRA adapter as peft does; false, and nothing written, if all weights are trained."""

    def participate(self) -> None:
        """What every worker but the main one does while that saves an adapter or goes through `full`."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its Hugging Face name, in the model's number format; a tied one once.

        Each must be used before the next is asked for: a sharded one is gathered as its turn comes.
        """


class Generator(Protocol):
    """Engines that draw completions. Called by the main worker only, except `load`."""

    def submit(self, prompts: list[Prompt], sampling: Sampling) -> Callable[[], Rollouts]:
        """Starts drawing; the returned function waits for the end.

        Raises:
            RolloutError: (from the returned function) not all could be drawn within the time allowed.
        """

    def load(self, weights: Weights) -> None:
        """Brings new weights into every engine; returns when all have them. Called by every training worker.

        Waits for what is being drawn, so that no completion is drawn from two versions.

        Raises:
            RolloutError: an engine did not take them within the time allowed, nor after a restart.
        """

    def close(self) -> None:
        """Ends the engines that this object started."""
