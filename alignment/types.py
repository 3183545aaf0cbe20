"""The nouns that go round the circle: a Group of text, the packed Batch made of it, and what a model says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Unit = Literal["token", "completion", "pair"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """Who speaks: `system`, `user`, `assistant`, or what the chat template knows besides."""
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer to a group's prompt."""

    text: str
    """The answer as the data gives it."""
    following: tuple[Message, ...] = ()
    """Turns after the answer, for a conversation that is learned as one example."""
    reward: float | None = None
    """How good it is, in any unit in which higher is better; None if nobody has said."""
    tokens: tuple[int, ...] = ()
    """Token ids as they follow the prompt, with the end token if the answer ends; empty before tokenisation."""
    learned: tuple[bool, ...] = ()
    """Which of `tokens` are learned from; the rest is context (another speaker's turn)."""
    truncated: bool = False
    """True if its end was cut off to fit the window: it has no end token."""
    reference_logprobs: tuple[float, ...] | None = None
    """Log-probability (nats) of each of `tokens` under the reference model, once known; 0 where not learned."""
    sampled_logprobs: tuple[float, ...] | None = None
    """Log-probability (nats) of each of `tokens` as it was sampled, temperature and all; None if it was not sampled by
    us."""
    version: int | None = None
    """Version of the weights that sampled it: optimizer steps done by then."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What each scorer gave, before weights, by the scorer's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One prompt and its completions: an SFT example (one), a preference pair (two), ranked answers or rollouts (many).

    Example: `Group(id="pairs.jsonl:7", prompt="2 + 2 =", completions=(Completion(text=" 4", reward=1.0),
    Completion(text=" 5", reward=0.0)))` is a preference pair.
    """

    id: str
    """Where it came from, as `file:line`."""
    prompt: str | tuple[Message, ...]
    """Plain text, or the turns before the answer."""
    completions: tuple[Completion, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    """Token ids of the prompt, shared by all completions; empty before tokenisation."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the row that `data.keep` names, for scorers that compare with a known answer."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, once, and of all completions."""
        return len(self.prompt_tokens) + sum(len(completion.tokens) for completion in self.completions)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Indices (better, worse) of every two completions with different rewards."""
        rated = [(index, c.reward) for index, c in enumerate(self.completions) if c.reward is not None]
        return [(i, j) for i, better in rated for j, worse in rated if better > worse]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Groups packed into flat vectors, each prompt once; T tokens, N completions, M pairs. No padding.

    Two groups, the first with two completions and the second with one:

        tokens     p p p | c c | r r r | p p | c c
        positions  0 1 2   3 4   3 4 5   0 1   2 3
        groups     0 0 0   0 0   0 0 0   1 1   1 1
        branches   - - -   0 0   1 1 1   - -   2 2      (- is -1: a prompt token, seen by every branch of its group)
        parents    - - -   2 3   2 5 6   - -   9 10     (- is -1: nothing predicts it)

    Token q attends to token k iff both are of one group, k ≤ q, and k is a prompt token or of q's branch.
    """

    tokens: Tensor
    """[T] int64 token ids."""
    positions: Tensor
    """[T] int64 position inside the token's own sequence (prompt + branch), for rotary embeddings."""
    groups: Tensor
    """[T] int64 index of the token's group."""
    branches: Tensor
    """[T] int64 index of the token's completion, 0..N-1; -1 for a prompt token."""
    parents: Tensor
    """[T] int64 index of the token whose output predicts this one; -1 for a prompt token."""
    learned: Tensor
    """[T] bool, true where the token is learned from."""
    rewards: Tensor
    """[N] fp32 reward of each completion; NaN where nobody has said."""
    pairs: Tensor
    """[M, 2] int64 indices (better, worse) of completions of one group."""
    reference_logprobs: Tensor | None = None
    """[T] fp32 log-probability (nats) of each token under the reference model, 0 where not learned; None before the
    reference was asked, or if the algorithm needs none."""
    group_ids: tuple[str, ...] = ()
    """Where each group came from, for messages."""

    @property
    def num_completions(self) -> int:
        return self.rewards.shape[0]

    def count(self, unit: Unit) -> int:
        """How many of a unit this batch holds; tokens are the learned ones."""
        if unit == "token":
            return int(self.learned.sum())
        return self.num_completions if unit == "completion" else self.pairs.shape[0]

    def per_completion(self, values: Tensor) -> Tensor:
        """Sums [T] values over the learned tokens of each completion.

        Values elsewhere are never read, so that an inf or NaN there cannot leak in. Returns [N].
        """
        sums = torch.zeros(self.num_completions, dtype=values.dtype, device=values.device)
        return sums.index_add(0, self.branches[self.learned], values[self.learned])

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **tensors})


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the actor says about a batch."""

    logprobs: Tensor
    """[T] fp32 log-probability (nats) of each learned token under the actor; 0 where not learned."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """Unreduced values and the unit that they are counted in; the update divides their sum by the global count."""

    values: Tensor
    """[n] one value per unit of the micro-batch, in the batch's order."""
    unit: Unit


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What an algorithm returns for one micro-batch."""

    terms: tuple[Term, ...]
    """Summed after reduction, this is what is minimised."""
    metrics: dict[str, Term] = field(default_factory=dict)
    """Quantities to report, without gradient, reduced like the terms."""
