"""Packs groups into Batches, each prompt once and without padding, and divides a step into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from alignment.batch import Batch
from alignment.groups import Group


def pack(groups: list[Group]) -> Batch:
    """Packs tokenised groups into one Batch: one group after another, each as its prompt followed by its completions.

    `alignment.batch.Batch` draws the layout. Every prompt must have at least one token, because its last token predicts
    the first token of each of its completions.
    """
    tokens: list[int] = []
    positions: list[int] = []
    group_index: list[int] = []
    completion_index: list[int] = []
    predictor_index: list[int] = []
    loss_mask: list[bool] = []
    rewards: list[float] = []
    pairs: list[tuple[int, int]] = []
    truncation_flags: list[bool] = []
    reference_logprobs: list[float] = []
    sampled_logprobs: list[float] = []

    for number, group in enumerate(groups):
        prompt_length = len(group.prompt_tokens)
        first_completion = len(rewards)
        tokens += group.prompt_tokens
        positions += range(prompt_length)
        completion_index += [-1] * prompt_length
        predictor_index += [-1] * prompt_length
        loss_mask += [False] * prompt_length
        reference_logprobs += [0.0] * prompt_length
        sampled_logprobs += [0.0] * prompt_length
        last_prompt_token = len(tokens) - 1
        for completion in group.completions:
            start = len(tokens)
            tokens += completion.tokens
            positions += range(prompt_length, prompt_length + len(completion.tokens))
            completion_index += [len(rewards)] * len(completion.tokens)
            predictor_index += [last_prompt_token, *range(start, len(tokens) - 1)]
            loss_mask += completion.loss_mask
            rewards.append(math.nan if completion.reward is None else completion.reward)
            truncation_flags.append(completion.truncated)
            reference = completion.reference_logprobs
            reference_logprobs += [0.0] * len(completion.tokens) if reference is None else reference.tolist()
            sampled_logprobs += completion.sampled_logprobs or [0.0] * len(completion.tokens)
        group_index += [number] * (len(tokens) - len(group_index))
        pairs += [
            (first_completion + chosen_index, first_completion + rejected_index)
            for chosen_index, rejected_index in group.pairs
        ]

    completions = [completion for group in groups for completion in group.completions]
    has_reference_logprobs = bool(groups) and all(
        completion.reference_logprobs is not None for completion in completions
    )
    has_sampled_logprobs = bool(completions) and all(
        completion.sampled_logprobs is not None for completion in completions
    )
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        group_index=torch.tensor(group_index),
        completion_index=torch.tensor(completion_index),
        predictor_index=torch.tensor(predictor_index),
        loss_mask=torch.tensor(loss_mask),
        rewards=torch.tensor(rewards),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        truncated=torch.tensor(truncation_flags, dtype=torch.bool),
        reference_logprobs=torch.tensor(reference_logprobs) if has_reference_logprobs else None,
        sampled_logprobs=torch.tensor(sampled_logprobs) if has_sampled_logprobs else None,
        group_ids=tuple(group.id for group in groups),
    )


def share(lengths: Sequence[int], *, rank: int, size: int) -> list[int]:
    """Returns the indices of the groups of one worker, so that all workers have about the same number of tokens.

    Every worker computes the same division: the longest group first, each to the worker with the fewest tokens so far.

    Args:
        lengths: number of tokens of each group.
        rank: the worker, from 0 to `size` - 1.
        size: number of workers.
    """
    token_counts = [0] * size
    indices = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        worker = token_counts.index(min(token_counts))
        token_counts[worker] += lengths[index]
        if worker == rank:
            indices.append(index)
    return sorted(indices)


def micro_batches(indices: Sequence[int], lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Divides groups, given by index, into micro-batches of at most `max_tokens` tokens; a longer group is alone.

    It uses first-fit-decreasing bin packing, so that the micro-batches are few and about equally full.

    Args:
        indices: the groups to divide.
        lengths: number of tokens of each group, by the same index.

    Returns:
        The indices of each micro-batch's groups.
    """
    batches: list[list[int]] = []
    token_counts: list[int] = []
    for index in sorted(indices, key=lambda i: -lengths[i]):
        candidates = (
            position for position, token_count in enumerate(token_counts) if token_count + lengths[index] <= max_tokens
        )
        position = next(candidates, len(batches))
        if position == len(batches):
            batches.append([])
            token_counts.append(0)
        batches[position].append(index)
        token_counts[position] += lengths[index]
    return batches
