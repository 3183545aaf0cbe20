"""The identity of a run: settings that must stay the same when the run is resumed, and settings that may change.

A change of these is refused, because the results would be a mixture: the model (path, revision, number format,
adapter), the algorithm, the sampling distribution of rollouts, the rewards, the model that the critic starts from, the
kind of the optimizer (its moments are kept), the number of groups in a step, the order of the data (seed,
`data.shuffle`), and the training data.

A change of these is reported at the start, in one line with the old and the new value: the number of steps, the rates
and the schedule of the optimizer and of the critic, how many steps rollouts are ahead, the engine, the folder that the
model was read from, and, for a stream, where its rows come from. All other settings do not change what a run computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import CheckpointError
from alignment.settings.run import OptimConfig, RunConfig

SAMPLING = {"completions", "max_tokens", "temperature", "top_p", "top_k"}
"""Keys of `rollout` that decide the distribution from which answers are sampled."""
ENGINE = {"engine", "dtype", "steps_ahead"}
"""Keys of `rollout` that decide which engine samples the answers, and how many steps ahead."""
RATES = set(OptimConfig.model_fields) - {"name", "micro_batch_tokens", "zero"}
"""Keys of `optim` that decide the size of a step."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The settings of a run on which its results depend, as JSON values."""

    fixed_settings: dict[str, Any]
    """Settings that must not change, by key."""
    adjustable_settings: dict[str, Any]
    """Settings that may change, by key; a change is reported."""


def identify(config: RunConfig, *, data: str, num_groups: int | None, steps: int, source: str) -> Identity:
    """Returns the identity of a configuration, with facts about its data and its model.

    Args:
        data: fingerprint of the training data.
        num_groups: number of groups in the training data; None for a stream.
        steps: number of optimizer steps of the run.
        source: folder or hub id that the model was read from.
    """
    lora = config.model.lora
    fixed_settings = {
        "model.path": config.model.path,
        "model.revision": config.model.revision,
        "model.dtype": config.model.dtype,
        "model.lora": None if lora is None else lora.model_dump(mode="json"),
        "algorithm": config.algorithm.model_dump(mode="json"),
        "rollout": config.rollout.model_dump(mode="json", include=SAMPLING),
        "critic": config.critic.model_dump(mode="json", include={"trunk", "path"}),
        "rewards": [scorer.model_dump(mode="json") for scorer in config.rewards],
        "optim": config.optim.model_dump(mode="json", include={"name"}),
        "groups_per_step": config.groups_per_step,
        "seed": config.seed,
        "data.shuffle": config.data.shuffle,
        "data": data,
    }
    adjustable_settings = {
        "steps": steps,
        "optim": config.optim.model_dump(mode="json", include=RATES),
        "critic": config.critic.model_dump(mode="json", include={"lr", "warmup_steps"}),
        "rollout": config.rollout.model_dump(mode="json", include=ENGINE),
        "model read from": source,
        "data": {"groups": num_groups} if num_groups is not None else config.data.model_dump(mode="json"),
    }
    return Identity(fixed_settings=fixed_settings, adjustable_settings=adjustable_settings)


def check_same_run(
    folder: Path, saved_settings: dict[str, Any], identity: Identity, num_groups: int | None = None
) -> None:
    """Checks that a checkpoint belongs to this run.

    Args:
        folder: the folder of the checkpoint.
        saved_settings: `Identity.fixed_settings` of the run that wrote it.
        identity: the identity of this run.
        num_groups: number of groups that its training data had, if it is known.

    Raises:
        CheckpointError: it belongs to another run; the text says what differs and what to do.
    """
    changes = [
        f"{key} was {old_value!r} and is {value!r}"
        for key, old_value, value in differences(saved_settings, identity.fixed_settings)
        if key != "data"
    ]
    advice = "Set them back to go on with this run, or give the new one another name"
    if saved_settings["data"] != identity.fixed_settings["data"]:
        sizes = [
            _size(num_groups, saved_settings["data"]),
            _size(identity.adjustable_settings["data"].get("groups"), identity.fixed_settings["data"]),
        ]
        changes.append(f"data was {sizes[0]} and is {sizes[1]}")
        advice += (
            ". A run goes on only with the data that it began with, token by token: the same rows (a file that has "
            "grown can be cut by data.take), and what makes tokens of them (data.max_length, tokenizer, chat template)"
        )
    if changes:
        raise CheckpointError(f"{folder} belongs to another run: {'; '.join(changes)}. {advice}")


def _size(num_groups: int | None, fingerprint: str) -> str:
    return f"{'' if num_groups is None else f'{num_groups} groups '}({fingerprint[:8]})"


def notes(saved_settings: dict[str, Any], identity: Identity) -> list[str]:
    """Returns the changes of the settings that may change, each as `key old → new`.

    Args:
        saved_settings: `Identity.adjustable_settings` of the run that wrote the checkpoint.
        identity: the identity of this run.
    """
    return [
        f"{key} {old_value} → {value}"
        for key, old_value, value in differences(saved_settings, identity.adjustable_settings)
    ]


def differences(old_settings: Any, new_settings: Any, key_prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Returns the differences of two settings as (key, old value, new value); a key that the old one lacks is none.

    Args:
        key_prefix: the dotted key under which both stand; empty at the top.
    """
    if isinstance(old_settings, dict) and isinstance(new_settings, dict):
        return [
            difference
            for key in new_settings
            if key in old_settings
            for difference in differences(
                old_settings[key], new_settings[key], f"{key_prefix}.{key}" if key_prefix else key
            )
        ]
    if isinstance(old_settings, list) and isinstance(new_settings, list) and len(old_settings) == len(new_settings):
        pairs = zip(old_settings, new_settings, strict=True)
        return [
            difference
            for number, (old_value, new_value) in enumerate(pairs)
            for difference in differences(old_value, new_value, f"{key_prefix}.{number}")
        ]
    return [] if old_settings == new_settings else [(key_prefix, old_settings, new_settings)]
