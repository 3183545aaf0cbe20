"""The packed Batch that is made of groups, what the models say of it, and what an algorithm makes of that."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Unit = Literal["token", "completion", "pair"]
Role = Literal["actor", "critic"]

COMPLETION_FIELDS = ("rewards", "truncated")
"""Fields of a Batch with one entry per completion; `pairs` apart, all other tensors have one per token."""

OLD_NAMES = {
    "learned": "loss_mask",
    "groups": "group_index",
    "branches": "completion_index",
    "parents": "predictor_index",
    "on_learned": "scatter",
    "of_completions": "per_token",
    "at_the_end": "at_last_token",
    "tokens_of": "token_indices",
}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Groups packed into flat vectors, each prompt once; T tokens, N completions, M pairs. No padding.

    Two groups, the first with two completions and the second with one:

        tokens            p p p | c c | r r r | p p | c c
        positions         0 1 2   3 4   3 4 5   0 1   2 3
        group_index       0 0 0   0 0   0 0 0   1 1   1 1
        completion_index  - - -   0 0   1 1 1   - -   2 2      (- is -1: a prompt token, seen by its whole group)
        predictor_index   - - -   2 3   2 5 6   - -   9 10     (- is -1: nothing predicts it)

    Token q attends to token k iff both are of one group, k ≤ q, and k is a prompt token or of q's completion.
    """

    tokens: Tensor
    """[T] int64 token ids."""
    positions: Tensor
    """[T] int64 position inside the token's own sequence (prompt + completion), for rotary embeddings."""
    group_index: Tensor
    """[T] int64 index of the token's group."""
    completion_index: Tensor
    """[T] int64 index of the token's completion, 0..N-1; -1 for a prompt token."""
    predictor_index: Tensor
    """[T] int64 index of the token whose output predicts this one; -1 for a prompt token."""
    loss_mask: Tensor
    """[T] bool, true where the token is trained on."""
    rewards: Tensor
    """[N] fp32 reward of each completion; NaN where nobody has said."""
    pairs: Tensor
    """[M, 2] int64 indices (chosen, rejected) of completions of one group."""
    truncated: Tensor
    """[N] bool, true where a completion's end was cut off."""
    sampled_logprobs: Tensor | None = None
    """[T] fp32 log-probability (nats) of each token as it was sampled, 0 where not trained on; None if none was."""
    reference_logprobs: Tensor | None = None
    """[T] fp32 log-probability (nats) of each token under the reference model, 0 where not trained on; None before the
    reference was asked, or if the algorithm needs none."""
    old_logprobs: Tensor | None = None
    """[T] fp32 log-probability (nats) of each token under the actor before this step's first update, 0 where not
    trained on; None if they are those of the update itself."""
    old_values: Tensor | None = None
    """[T] fp32 value of the state in which each token was chosen, before the update; None without a critic."""
    advantages: Tensor | None = None
    """[T] fp32 advantage of each token over the policy's average, 0 where not trained on; None before `prepare`."""
    returns: Tensor | None = None
    """[T] fp32 what a critic should have said in place of `old_values`; None without a critic."""
    kl_coefficient: float = 0.0
    """Price of a nat of divergence from the reference, as the run has it now."""
    group_ids: tuple[str, ...] = ()
    """Where each group came from, for messages."""

    def __getattr__(self, name: str) -> Any:
        """Finds an attribute by its name of before, for one's own algorithms; these names go with the next release."""
        if name not in OLD_NAMES:
            raise AttributeError(f"a Batch has no attribute {name!r}")
        warnings.warn(f"Batch.{name} is called {OLD_NAMES[name]} now", DeprecationWarning, stacklevel=2)
        return getattr(self, OLD_NAMES[name])

    @property
    def num_completions(self) -> int:
        """How many completions this batch holds."""
        return self.rewards.shape[0]

    @property
    def group_of_completion(self) -> Tensor:
        """[N] int64 index of each completion's group."""
        in_completion = self.completion_index >= 0
        groups = torch.zeros(self.num_completions, dtype=torch.int64, device=self.tokens.device)
        return groups.scatter(0, self.completion_index[in_completion], self.group_index[in_completion])

    def count(self, unit: Unit) -> int:
        """How many of a unit this batch holds; tokens are those that are trained on."""
        if unit == "token":
            return int(self.loss_mask.sum())
        return self.num_completions if unit == "completion" else self.pairs.shape[0]

    def per_completion(self, values: Tensor) -> Tensor:
        """Sums [T] values over the trained tokens of each completion.

        Values elsewhere are never read, so that an inf or NaN there cannot leak in. Returns [N].
        """
        sums = torch.zeros(self.num_completions, dtype=values.dtype, device=values.device)
        return sums.index_add(0, self.completion_index[self.loss_mask], values[self.loss_mask])

    def scatter(self, values: Tensor) -> Tensor:
        """[T] fp32 with one value for each trained token, in order, and 0 elsewhere."""
        tokens = torch.zeros(self.tokens.shape, device=values.device)
        return tokens.masked_scatter(self.loss_mask, values.float())

    @property
    def lengths(self) -> Tensor:
        """[N] int64 number of trained tokens of each completion."""
        return self.per_completion(torch.ones_like(self.tokens))

    def at_last_token(self, values: Tensor) -> Tensor:
        """[T] of [N]: each completion's value at its last trained token, 0 elsewhere."""
        token_index = self.loss_mask.nonzero().squeeze(1)
        completions = self.completion_index[token_index]
        last_index = token_index[completions.diff(append=completions.new_tensor([-1])) != 0]
        last_values = values[self.completion_index[last_index]]
        return torch.zeros(self.tokens.shape, device=values.device).index_put((last_index,), last_values)

    def rows(self, values: Tensor) -> Tensor:
        """[N, L] of [T] values: the trained tokens of each completion side by side, left-aligned, 0 beyond them."""
        table = torch.zeros(self._in_rows().shape, dtype=values.dtype, device=values.device)
        return table.masked_scatter(self._in_rows(), values[self.loss_mask])

    def from_rows(self, table: Tensor) -> Tensor:
        """[T] of [N, L]: the inverse of `rows`, 0 where not trained on."""
        return self.scatter(table[self._in_rows()])

    def per_token(self, values: Tensor) -> Tensor:
        """[T] of [N]: every trained token gets its completion's value, the rest 0."""
        return self.scatter(values[self.completion_index[self.loss_mask]])

    def _in_rows(self) -> Tensor:
        lengths = self.lengths
        return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]

    def token_indices(self, groups: Sequence[int]) -> Tensor:
        """[t] int64 indices of the tokens of some groups, group after group."""
        starts = torch.searchsorted(
            self.group_index, torch.arange(len(self.group_ids) + 1, device=self.group_index.device)
        )
        bounds = starts.tolist()
        return torch.cat([torch.arange(bounds[group], bounds[group + 1]) for group in groups]).to(starts.device)

    def cut(self, groups: Sequence[int]) -> Batch:
        """The batch of some of these groups, in the order asked for, as if only they had been packed."""
        token_index = self.token_indices(groups)
        completions = torch.unique_consecutive(self.completion_index[token_index])
        completions = completions[completions >= 0]

        # Where the selected tokens and completions come to stand; -1 stays -1 as the last entry of each table.
        token_to = _inverse_index(token_index, len(self.tokens))
        completion_to = _inverse_index(completions, self.num_completions)
        pairs = completion_to[self.pairs]
        cut = {name: value[token_index] for name, value in self._tensors().items() if name not in COMPLETION_FIELDS}
        cut |= {name: value[completions] for name, value in self._tensors().items() if name in COMPLETION_FIELDS}
        cut |= {
            "group_index": self.group_index[token_index]
            .diff(prepend=self.group_index[token_index[:1]])
            .ne(0)
            .cumsum(0),
            "completion_index": completion_to[self.completion_index[token_index]],
            "predictor_index": token_to[self.predictor_index[token_index]],
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
    """[T] fp32 log-probability (nats) of each trained token under the actor; 0 where not trained on."""
    entropies: Tensor | None = None
    """[T] fp32 entropy (nats) of the distribution of each trained token; None if the algorithm does not ask for it."""
    values: Tensor | None = None
    """[T] fp32 value of the state in which each trained token was chosen; None without a critic."""
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


def _inverse_index(index: Tensor, size: int) -> Tensor:
    """[size + 1] position of each number in `index`, -1 where it is not; the last entry serves the index -1."""
    table = torch.full((size + 1,), -1, dtype=torch.int64, device=index.device)
    return table.scatter(0, index, torch.arange(len(index), device=index.device))
