"""Computes the reference log-probabilities once and keeps them in a file, so that no second model stays in memory."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from alignment.distributed.world import World, run_on_main
from alignment.errors import CheckpointError
from alignment.files import replace_atomically
from alignment.groups import Group
from alignment.models.folders import weights_stamp
from alignment.models.roles import Roles
from alignment.settings.run import RunConfig
from alignment.step import reference_logprobs

GROUPS_AT_ONCE = 256
"""Number of groups whose log-probabilities the workers compute together at a time."""
LAYOUT = 2
"""Version of the file; increase it whenever a change of the forward pass or the file changes the stored numbers."""


def precompute(groups: list[Group], roles: Roles, config: RunConfig, world: World, *, progress: bool) -> list[Group]:
    """Returns the groups with their log-probabilities under the reference, computed or from the file of the run.

    Every worker must call this before the first step and before a checkpoint is restored: until then, the actor without
    the adapter that is trained is the reference. The name of the file is a hash of all that its numbers depend on.

    Args:
        groups: the tokenised groups of the training data.
        progress: whether to show a progress bar.

    Raises:
        CheckpointError: the file cannot be written.
    """
    file = config.run_folder.reference_file(_key(groups, roles, config))
    if world.from_main(file.is_file()):
        return _attach(groups, load_file(file)["logprobs"])
    logprobs = _compute(groups, roles, config, world, progress=progress)

    def write() -> None:
        """Writes the file of the log-probabilities."""
        try:
            with replace_atomically(file) as partial_file:
                save_file({"logprobs": logprobs}, partial_file)
        except Exception as error:  # safetensors raises an error class of its own
            raise CheckpointError(f"{file} cannot be written: {error}") from error

    run_on_main(write if world.is_main else None, world)
    return _attach(groups, logprobs)


def _compute(groups: list[Group], roles: Roles, config: RunConfig, world: World, *, progress: bool) -> Tensor:
    """[total] fp32 log-probability (nats) of every completion token, group after group."""
    chunks = []
    with tqdm(
        total=len(groups), desc="reference", unit=" groups", disable=None if progress else True, leave=False
    ) as bar:
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            chunk = groups[start : start + GROUPS_AT_ONCE]
            chunks.append(reference_logprobs(roles, chunk, config.optim, world))
            bar.update(len(chunk))
    return torch.cat(chunks)


def _attach(groups: list[Group], logprobs: Tensor) -> list[Group]:
    """Gives every completion its log-probabilities as a view; lists of Python numbers would need minutes."""
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
    """Hash of all that the numbers depend on: weights and settings of the reference, and the tokens of the groups.

    The adapter that is trained is not a part of it.
    """
    network = roles.actor.network
    settings = {key: value for key, value in network.config.to_dict().items() if not key.startswith("raylign_")}
    hub_commit = getattr(network.config, "_commit_hash", None)
    key_fields = (
        LAYOUT,
        (torch.__version__, transformers.__version__),
        (roles.actor.source, weights_stamp(roles.actor.source), config.model.revision, hub_commit),
        (str(network.dtype), roles.actor.attention, network.device.type),
        sorted(settings.items(), key=lambda item: item[0]),
        config.data.max_length,
        roles.temperature,
    )
    digest = hashlib.sha256(repr(key_fields).encode())
    for group in groups:
        answers = [(completion.tokens, completion.loss_mask) for completion in group.completions]
        digest.update(repr((group.prompt_tokens, answers)).encode())
    return digest.hexdigest()[:16]
