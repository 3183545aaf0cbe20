"""Reference log-probabilities computed once and kept beside the run, so that no second model stays in memory."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from alignment.config import RunConfig
from alignment.models.parallel import World
from alignment.models.roles import Roles
from alignment.types import Completion, Group
from alignment.update import annotated

GROUPS_AT_ONCE = 256
"""Groups whose log-probabilities the workers share out among them at a time."""


def precompute(groups: list[Group], roles: Roles, config: RunConfig, world: World, *, progress: bool) -> list[Group]:
    """Returns the groups with reference log-probabilities, from the run's folder or from the untrained actor.

    The file's name is a hash of the model and of every token, so a changed model or data set is computed anew.
    """
    file = config.folder / f"reference-{_key(groups, roles, config)}.safetensors"
    if world.from_main(file.is_file()):
        known = load_file(file)["logprobs"]
    else:
        known = _compute(groups, roles, config, world, progress=progress)
        if world.is_main:
            unfinished = file.with_suffix(".unfinished")
            save_file({"logprobs": known}, unfinished)
            unfinished.rename(file)
        world.wait()
    return _attach(groups, known)


def _compute(groups: list[Group], roles: Roles, config: RunConfig, world: World, *, progress: bool) -> Tensor:
    """[total] fp32 log-probability (nats) of every completion token, group after group."""
    parts = []
    with tqdm(
        total=len(groups), desc="reference", unit=" groups", disable=None if progress else True, leave=False
    ) as bar:
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            batch = annotated(roles, groups[start : start + GROUPS_AT_ONCE], config.optim, world)
            assert batch.reference_logprobs is not None
            parts.append(batch.reference_logprobs[batch.branches >= 0].cpu())
            bar.update(len(batch.group_ids))
    return torch.cat(parts)


def _attach(groups: list[Group], known: Tensor) -> list[Group]:
    values = iter(known.tolist())

    def annotated(completion: Completion) -> Completion:
        return dataclasses.replace(completion, reference_logprobs=tuple(next(values) for _ in completion.tokens))

    return [
        dataclasses.replace(group, completions=tuple(annotated(completion) for completion in group.completions))
        for group in groups
    ]


def _key(groups: list[Group], roles: Roles, config: RunConfig) -> str:
    dtype = str(roles.actor.network.dtype)
    digest = hashlib.sha256(repr((roles.actor.source, config.model.revision, dtype)).encode())
    for file in sorted(Path(roles.actor.source).glob("*.safetensors")):
        digest.update(repr((file.name, file.stat().st_size, file.stat().st_mtime_ns)).encode())
    for group in groups:
        digest.update(repr((group.prompt_tokens, [completion.tokens for completion in group.completions])).encode())
    return digest.hexdigest()[:16]
