"""Groups become packed Batches: each prompt once, no padding; and the cutting of a step into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from alignment.batch import Batch
from alignment.groups import Group


def pack(groups: list[Group]) -> Batch:
    """Lays tokenised groups one after another, each as its prompt followed by its completions.

    `alignment.batch.Batch` draws the layout. Every prompt must have at least one token, which predicts the first token
    of each of its completions.
    """
    tokens: list[int] = []
    positions: list[int] = []
    group_of: list[int] = []
    branches: list[int] = []
    parents: list[int] = []
    learned: list[bool] = []
    rewards: list[float] = []
    pairs: list[tuple[int, int]] = []
    truncated: list[bool] = []
    references: list[float] = []
    sampled: list[float] = []

    for number, group in enumerate(groups):
        length = len(group.prompt_tokens)
        first_completion = len(rewards)
        tokens += group.prompt_tokens
        positions += range(length)
        branches += [-1] * length
        parents += [-1] * length
        learned += [False] * length
        references += [0.0] * length
        sampled += [0.0] * length
        last_of_prompt = len(tokens) - 1
        for completion in group.completions:
            start = len(tokens)
            tokens += completion.tokens
            positions += range(length, length + len(completion.tokens))
            branches += [len(rewards)] * len(completion.tokens)
            parents += [last_of_prompt, *range(start, len(tokens) - 1)]
            learned += completion.learned
            rewards.append(math.nan if completion.reward is None else completion.reward)
            truncated.append(completion.truncated)
            reference = completion.reference_logprobs
            references += [0.0] * len(completion.tokens) if reference is None else reference.tolist()
            sampled += completion.sampled_logprobs or [0.0] * len(completion.tokens)
        group_of += [number] * (len(tokens) - len(group_of))
        pairs += [(first_completion + better, first_completion + worse) for better, worse in group.pairs]

    completions = [completion for group in groups for completion in group.completions]
    referenced = bool(groups) and all(completion.reference_logprobs is not None for completion in completions)
    ours = bool(completions) and all(completion.sampled_logprobs is not None for completion in completions)
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        groups=torch.tensor(group_of),
        branches=torch.tensor(branches),
        parents=torch.tensor(parents),
        learned=torch.tensor(learned),
        rewards=torch.tensor(rewards),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        truncated=torch.tensor(truncated, dtype=torch.bool),
        reference_logprobs=torch.tensor(references) if referenced else None,
        sampled_logprobs=torch.tensor(sampled) if ours else None,
        group_ids=tuple(group.id for group in groups),
    )


def share(lengths: Sequence[int], *, rank: int, size: int) -> list[int]:
    """Indices of one of `size` workers' groups, chosen so that all have about the same number of tokens.

    Every worker computes the same division: longest group first, each to the worker with the fewest tokens so far.
    """
    loads = [0] * size
    mine = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        worker = loads.index(min(loads))
        loads[worker] += lengths[index]
        if worker == rank:
            mine.append(index)
    return sorted(mine)


def micro_batches(indices: Sequence[int], lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Cuts groups, given by index, into forward passes of at most `max_tokens` tokens; a longer group goes alone.

    First fit by falling length, so that few passes are needed and those are about equally full.
    """
    passes: list[list[int]] = []
    loads: list[int] = []
    for index in sorted(indices, key=lambda i: -lengths[i]):
        fitting = (number for number, load in enumerate(loads) if load + lengths[index] <= max_tokens)
        number = next(fitting, len(passes))
        if number == len(passes):
            passes.append([])
            loads.append(0)
        passes[number].append(index)
        loads[number] += lengths[index]
    return passes
