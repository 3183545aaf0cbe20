"""Reference log-probabilities computed once and kept beside the run, so that no second model stays in memory."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from alignment.errors import CheckpointError
from alignment.groups import Group
from alignment.models.folders import weights_stamp
from alignment.models.parallel import World, run_on_main
from alignment.models.roles import Roles
from alignment.settings.run import RunConfig
from alignment.step import reference_logprobs

GROUPS_AT_ONCE = 256
"""Groups whose log-probabilities the workers share out among them at a time."""
LAYOUT = 2
"""Raised whenever the forward pass or the file changes what the same key would mean."""


def precompute(groups: list[Group], roles: Roles, config: RunConfig, world: World, *, progress: bool) -> list[Group]:
    """Returns the groups with log-probabilities under the reference, from the run's folder or from the actor's base.

    To be called before the first step and before a checkpoint is restored: the actor, without the adapter that is
    trained, is then the reference. The file's name is a hash of all that its numbers depend on.

    Raises:
        CheckpointError: the file cannot be written.
    """
    file = config.folder / f"reference-{_key(groups, roles, config)}.safetensors"
    if world.from_main(file.is_file()):
        return _attach(groups, load_file(file)["logprobs"])
    logprobs = _compute(groups, roles, config, world, progress=progress)

    def write() -> None:
        unfinished = file.with_suffix(".unfinished")
        try:
            save_file({"logprobs": logprobs}, unfinished)
            unfinished.rename(file)
        except Exception as error:  # safetensors has an error of its own
            unfinished.unlink(missing_ok=True)
            raise CheckpointError(f"{file} cannot be written: {error}") from error

    run_on_main(write if world.is_main else None, world)
    return _attach(groups, logprobs)


def _compute(groups: list[Group], roles: Roles, config: RunConfig, world: World, *, progress: bool) -> Tensor:
    """[total] fp32 log-probability (nats) of every completion token, group after group."""
    parts = []
    with tqdm(
        total=len(groups), desc="reference", unit=" groups", disable=None if progress else True, leave=False
    ) as bar:
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            part = groups[start : start + GROUPS_AT_ONCE]
            parts.append(reference_logprobs(roles, part, config.optim, world))
            bar.update(len(part))
    return torch.cat(parts)


def _attach(groups: list[Group], logprobs: Tensor) -> list[Group]:
    """Gives every completion its part as a view: millions of Python numbers would silence this process for minutes."""
    lengths = [len(completion.tokens) for group in groups for completion in group.completions]
    views: Iterator[Tensor] = iter(torch.split(logprobs, lengths))
    return [
        dataclasses.replace(
            group,
            completions=tuple(
                dataclasses.replace(completion, reference_logprobs=next(views)) for completion in group.completions
            ),
        )
        for group in groups
    ]


def _key(groups: list[Group], roles: Roles, config: RunConfig) -> str:
    """Of the reference: its weights and settings. Not of an adapter that is trained on it, wherever that starts."""
    network = roles.actor.network
    settings = {key: value for key, value in network.config.to_dict().items() if not key.startswith("raylign_")}
    hub_commit = getattr(network.config, "_commit_hash", None)
    known = (
        LAYOUT,
        (torch.__version__, transformers.__version__),
        (roles.actor.source, weights_stamp(roles.actor.source), config.model.revision, hub_commit),
        (str(network.dtype), roles.actor.attention, network.device.type),
        sorted(settings.items(), key=lambda item: item[0]),
        config.data.max_length,
        roles.temperature,
    )
    digest = hashlib.sha256(repr(known).encode())
    for group in groups:
        answers = [(completion.tokens, completion.learned) for completion in group.completions]
        digest.update(repr((group.prompt_tokens, answers)).encode())
    return digest.hexdigest()[:16]
