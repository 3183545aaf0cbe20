"""Rollouts as tensors in a checkpoint, so that a resumed run trains on the same completions as an unstopped one.

Without them, a resumed run would generate the completions of later steps again, with newer weights.
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
"""Prefix of the names of tensors with each scorer's scores."""


def to_tensors(scored_groups: Sequence[Group], pending_batches: Sequence[Sequence[Group]]) -> dict[str, Tensor]:
    """Converts groups with completions, in the order of the stream, to tensors; empty if there are none.

    Args:
        scored_groups: groups with rewards.
        pending_batches: the groups that follow, without rewards, in the batches in which they were submitted.
    """
    groups = [*scored_groups, *itertools.chain.from_iterable(pending_batches)]
    if not groups:
        return {}
    completions = [completion for group in groups for completion in group.completions]
    scored_completions = [completion for group in scored_groups for completion in group.completions]
    names = sorted({name for completion in scored_completions for name in completion.scores})
    return {
        "prompts": torch.tensor(list(_digest(groups)), dtype=torch.uint8),
        "num_scored": torch.tensor([len(scored_groups)]),
        "drawings": torch.tensor([len(batch) for batch in pending_batches], dtype=torch.int64),
        "completions": torch.tensor([len(group.completions) for group in groups]),
        "lengths": torch.tensor([len(completion.tokens) for completion in completions]),
        "tokens": torch.tensor([token for c in completions for token in c.tokens], dtype=torch.int32),
        "logprobs": torch.tensor([p for c in completions for p in c.sampled_logprobs or ()], dtype=torch.float64),
        "versions": torch.tensor([completion.weight_version or 0 for completion in completions]),
        "truncated": torch.tensor([completion.truncated for completion in completions]),
        "rewards": _numbers([completion.reward for completion in scored_completions]),
        "environment_rewards": _numbers([completion.environment_reward for completion in completions]),
        "loss_mask": torch.tensor([loss_mask for completion in completions for loss_mask in completion.loss_mask]),
        **{
            f"{SCORE}{name}": _numbers([completion.scores.get(name) for completion in scored_completions])
            for name in names
        },
    }


def num_groups(tensors: dict[str, Tensor]) -> int:
    """The number of groups in the tensors of `to_tensors`."""
    return len(tensors["completions"])


def from_tensors(
    tensors: dict[str, Tensor], prompts: Sequence[Group], completion_of: Callable[[Rollout], Completion]
) -> tuple[list[Group], list[list[Group]]] | None:
    """Converts the tensors of `to_tensors` back to groups; None if they belong to other prompts.

    That can happen if a stream has changed.

    Args:
        prompts: the same number of groups of the stream, from the same position on, without completions.
        completion_of: converts a rollout to a completion.

    Returns:
        The scored groups, and the pending batches.
    """
    if bytes(tensors["prompts"].tolist()) != _digest(prompts):
        return None
    answers = _completions(tensors, completion_of)
    counts = tensors["completions"].tolist()
    groups = [
        dataclasses.replace(prompt, completions=tuple(itertools.islice(answers, count)))
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    group_iterator = iter(groups)
    scored_groups = list(itertools.islice(group_iterator, int(tensors["num_scored"])))
    return scored_groups, [list(itertools.islice(group_iterator, size)) for size in tensors["drawings"].tolist()]


def _completions(tensors: dict[str, Tensor], completion_of: Callable[[Rollout], Completion]) -> Iterator[Completion]:
    """Yields all completions in order, with the rewards and scores that they have."""
    tokens, logprobs = iter(tensors["tokens"].tolist()), iter(tensors["logprobs"].tolist())
    columns = (tensors[name].tolist() for name in ("lengths", "versions", "truncated"))
    rewards = tensors["rewards"].tolist()
    no_rewards = [math.nan] * len(tensors["lengths"])
    environment_rewards = tensors["environment_rewards"].tolist() if "environment_rewards" in tensors else no_rewards
    loss_masks = iter(tensors["loss_mask"].tolist() if "loss_mask" in tensors else ())
    scores = {name.removeprefix(SCORE): tensors[name].tolist() for name in tensors if name.startswith(SCORE)}
    for index, (length, version, is_truncated) in enumerate(zip(*columns, strict=True)):
        completion = completion_of(
            Rollout(
                tokens=tuple(itertools.islice(tokens, length)),
                logprobs=tuple(itertools.islice(logprobs, length)),
                truncated=is_truncated,
                weight_version=version,
                loss_mask=tuple(itertools.islice(loss_masks, length)),
                reward=None if math.isnan(environment_rewards[index]) else environment_rewards[index],
            )
        )
        if index < len(rewards):
            completion_scores = {
                name: values[index] for name, values in scores.items() if not math.isnan(values[index])
            }
            reward = None if math.isnan(rewards[index]) else rewards[index]
            completion = dataclasses.replace(completion, reward=reward, scores=completion_scores)
        yield completion


def _numbers(values: Sequence[float | None]) -> Tensor:
    """[n] fp64, NaN for a missing number."""
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _digest(groups: Sequence[Group]) -> bytes:
    """A hash of the prompts' tokens."""
    total = hashlib.sha256()
    for group in groups:
        total.update(repr(len(group.prompt_tokens)).encode() + array("q", group.prompt_tokens).tobytes())
    return total.digest()
