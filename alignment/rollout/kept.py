"""What was drawn ahead, as tensors in a checkpoint: a resumed run learns from the answers that it would have had.

Answers drawn anew would come from newer weights, and the run would not be the one that was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from array import array
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from alignment.groups import Completion, Group
from alignment.rollout import Rollout

SCORE = "score."
"""Prefix of the tensors with what each scorer gave."""


def to_tensors(scored: Sequence[Group], drawings: Sequence[Sequence[Group]]) -> dict[str, Tensor]:
    """Groups in the order of the stream as tensors; empty if there are none.

    Args:
        scored: with rewards.
        drawings: what follows, without rewards, as it was asked for together.
    """
    groups = [*scored, *itertools.chain.from_iterable(drawings)]
    if not groups:
        return {}
    completions = [completion for group in groups for completion in group.completions]
    rated = [completion for group in scored for completion in group.completions]
    names = sorted({name for completion in rated for name in completion.scores})
    return {
        "prompts": torch.tensor(list(_digest(groups)), dtype=torch.uint8),
        "num_scored": torch.tensor([len(scored)]),
        "drawings": torch.tensor([len(drawing) for drawing in drawings], dtype=torch.int64),
        "completions": torch.tensor([len(group.completions) for group in groups]),
        "lengths": torch.tensor([len(completion.tokens) for completion in completions]),
        "tokens": torch.tensor([token for c in completions for token in c.tokens], dtype=torch.int32),
        "logprobs": torch.tensor([p for c in completions for p in c.sampled_logprobs or ()], dtype=torch.float64),
        "versions": torch.tensor([completion.version or 0 for completion in completions]),
        "truncated": torch.tensor([completion.truncated for completion in completions]),
        "rewards": _numbers([completion.reward for completion in rated]),
        **{f"{SCORE}{name}": _numbers([completion.scores.get(name) for completion in rated]) for name in names},
    }


def num_groups(tensors: dict[str, Tensor]) -> int:
    """Groups that `to_tensors` was given."""
    return len(tensors["completions"])


def from_tensors(
    tensors: dict[str, Tensor], prompts: Sequence[Group], completion_of: Callable[[Rollout], Completion]
) -> tuple[list[Group], list[list[Group]]] | None:
    """The inverse of `to_tensors`; None if these are not the prompts that were answered, as when a stream has changed.

    Args:
        prompts: as many groups of the stream, from the same position on, without completions.
        completion_of: makes a completion of what was drawn.
    """
    if bytes(tensors["prompts"].tolist()) != _digest(prompts):
        return None
    answers = _completions(tensors, completion_of)
    counts = tensors["completions"].tolist()
    groups = [
        dataclasses.replace(prompt, completions=tuple(itertools.islice(answers, count)))
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    rest = iter(groups)
    scored = list(itertools.islice(rest, int(tensors["num_scored"])))
    return scored, [list(itertools.islice(rest, size)) for size in tensors["drawings"].tolist()]


def _completions(tensors: dict[str, Tensor], completion_of: Callable[[Rollout], Completion]) -> Iterator[Completion]:
    """All completions in their order; the first ones have rewards."""
    tokens, logprobs = iter(tensors["tokens"].tolist()), iter(tensors["logprobs"].tolist())
    columns = (tensors[name].tolist() for name in ("lengths", "versions", "truncated"))
    rewards = tensors["rewards"].tolist()
    scores = {name.removeprefix(SCORE): tensors[name].tolist() for name in tensors if name.startswith(SCORE)}
    for number, (length, version, truncated) in enumerate(zip(*columns, strict=True)):
        completion = completion_of(
            Rollout(
                tokens=tuple(itertools.islice(tokens, length)),
                logprobs=tuple(itertools.islice(logprobs, length)),
                truncated=truncated,
                version=version,
            )
        )
        if number < len(rewards):
            given = {name: values[number] for name, values in scores.items() if not math.isnan(values[number])}
            reward = None if math.isnan(rewards[number]) else rewards[number]
            completion = dataclasses.replace(completion, reward=reward, scores=given)
        yield completion


def _numbers(values: Sequence[float | None]) -> Tensor:
    """[n] fp64, NaN for what is missing."""
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _digest(groups: Sequence[Group]) -> bytes:
    """Of the prompts' tokens."""
    total = hashlib.sha256()
    for group in groups:
        total.update(repr(len(group.prompt_tokens)).encode() + array("q", group.prompt_tokens).tobytes())
    return total.digest()
