"""The packed Batch that is made of groups, what the models say of it, and what an algorithm makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Unit = Literal["token", "completion", "pair"]
Role = Literal["actor", "critic"]

COMPLETION_FIELDS = ("rewards", "truncated")
"""Fields of a Batch with one entry per completion; `pairs` apart, all other tensors have one per token."""


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
    truncated: Tensor
    """[N] bool, true where a completion's end was cut off."""
    sampled_logprobs: Tensor | None = None
    """[T] fp32 log-probability (nats) of each token as it was sampled, 0 where not learned; None if we sampled none."""
    reference_logprobs: Tensor | None = None
    """[T] fp32 log-probability (nats) of each token under the reference model, 0 where not learned; None before the
    reference was asked, or if the algorithm needs none."""
    old_logprobs: Tensor | None = None
    """[T] fp32 log-probability (nats) of each token under the actor before this step's first update, 0 where not
    learned; None if they are those of the update itself."""
    old_values: Tensor | None = None
    """[T] fp32 value of the state in which each token was chosen, before the update; None without a critic."""
    advantages: Tensor | None = None
    """[T] fp32 advantage of each token over the policy's average, 0 where not learned; None before `prepare`."""
    returns: Tensor | None = None
    """[T] fp32 what a critic should have said in place of `old_values`; None without a critic."""
    kl_coefficient: float = 0.0
    """Price of a nat of divergence from the reference, as the run has it now."""
    group_ids: tuple[str, ...] = ()
    """Where each group came from, for messages."""

    @property
    def num_completions(self) -> int:
        return self.rewards.shape[0]

    @property
    def group_of_completion(self) -> Tensor:
        """[N] int64 index of each completion's group."""
        first = self.branches >= 0
        groups = torch.zeros(self.num_completions, dtype=torch.int64, device=self.tokens.device)
        return groups.scatter(0, self.branches[first], self.groups[first])

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

    def on_learned(self, values: Tensor) -> Tensor:
        """[T] fp32 with one value for each learned token, in order, and 0 elsewhere."""
        whole = torch.zeros(self.tokens.shape, device=values.device)
        return whole.masked_scatter(self.learned, values.float())

    @property
    def lengths(self) -> Tensor:
        """[N] int64 number of learned tokens of each completion."""
        return self.per_completion(torch.ones_like(self.tokens))

    def at_the_end(self, values: Tensor) -> Tensor:
        """[T] of [N]: each completion's value at its last learned token, 0 elsewhere."""
        learned = self.learned.nonzero().squeeze(1)
        of = self.branches[learned]
        last = learned[of.diff(append=of.new_tensor([-1])) != 0]
        return torch.zeros(self.tokens.shape, device=values.device).index_put((last,), values[self.branches[last]])

    def rows(self, values: Tensor) -> Tensor:
        """[N, L] of [T] values: the learned tokens of each completion side by side, left-aligned, 0 beyond them."""
        table = torch.zeros(self._in_rows().shape, dtype=values.dtype, device=values.device)
        return table.masked_scatter(self._in_rows(), values[self.learned])

    def from_rows(self, table: Tensor) -> Tensor:
        """[T] of [N, L]: the inverse of `rows`, 0 where not learned."""
        return self.on_learned(table[self._in_rows()])

    def of_completions(self, values: Tensor) -> Tensor:
        """[T] of [N]: every learned token gets its completion's value, the rest 0."""
        return self.on_learned(values[self.branches[self.learned]])

    def _in_rows(self) -> Tensor:
        lengths = self.lengths
        return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]

    def tokens_of(self, groups: Sequence[int]) -> Tensor:
        """[t] int64 indices of the tokens of some groups, group after group."""
        starts = torch.searchsorted(self.groups, torch.arange(len(self.group_ids) + 1, device=self.groups.device))
        bounds = starts.tolist()
        return torch.cat([torch.arange(bounds[group], bounds[group + 1]) for group in groups]).to(starts.device)

    def cut(self, groups: Sequence[int]) -> Batch:
        """The batch of some of these groups, in the order asked for, as if only they had been packed."""
        kept = self.tokens_of(groups)
        completions = torch.unique_consecutive(self.branches[kept])
        completions = completions[completions >= 0]

        # Where the kept tokens and completions come to stand; -1 stays -1 as the last entry of each table.
        token_to = _renumbered(kept, len(self.tokens))
        completion_to = _renumbered(completions, self.num_completions)
        pairs = completion_to[self.pairs]
        cut = {name: value[kept] for name, value in self._tensors().items() if name not in COMPLETION_FIELDS}
        cut |= {name: value[completions] for name, value in self._tensors().items() if name in COMPLETION_FIELDS}
        cut |= {
            "groups": self.groups[kept].diff(prepend=self.groups[kept[:1]]).ne(0).cumsum(0),
            "branches": completion_to[self.branches[kept]],
            "parents": token_to[self.parents[kept]],
            "pairs": pairs[(pairs >= 0).all(1)],
        }
        return Batch(**{**vars(self), **cut, "group_ids": tuple(self.group_ids[group] for group in groups)})

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        del tensors["pairs"]
        return tensors

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **tensors})


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the actor says about a batch."""

    logprobs: Tensor
    """[T] fp32 log-probability (nats) of each learned token under the actor; 0 where not learned."""
    entropies: Tensor | None = None
    """[T] fp32 entropy (nats) of the distribution of each learned token; None if the algorithm does not ask for it."""
    values: Tensor | None = None
    """[T] fp32 value of the state in which each learned token was chosen; None without a critic."""
    scores: Tensor | None = None
    """[N] fp32 score of each completion, if the trained model is a reward model; `logprobs` is empty then."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """Unreduced values and the unit that they are counted in; the update divides their sum by the global count."""

    values: Tensor
    """[n] one value per unit of the micro-batch, in the batch's order."""
    unit: Unit
    trains: Role = "actor"
    """Whose loss it is."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What an algorithm returns for one micro-batch."""

    terms: tuple[Term, ...]
    """Summed after reduction, this is what is minimised."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """[n] values to report, without gradient; the mean over the global batch is what is shown."""


def _renumbered(kept: Tensor, size: int) -> Tensor:
    """[size + 1] position of each index in `kept`, -1 where it is not; the last entry serves the index -1."""
    table = torch.full((size + 1,), -1, dtype=torch.int64, device=kept.device)
    return table.scatter(0, kept, torch.arange(len(kept), device=kept.device))
