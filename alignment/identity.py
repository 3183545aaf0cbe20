"""What makes the parts of a run one run: settings that must not change when it is resumed, and those that may.

Refused, because results would mix without a trace: the model (path, revision, number format, adapter), the algorithm,
what rollouts are drawn from, the rewards, the critic's start, the optimizer's kind, whose moments are kept, the number
of groups in a step, the order of the data (seed, `data.shuffle`), and the training data itself.

Noted, with the old value and the new, in one line at the start: the number of steps, the optimizer's rates and
schedule, the critic's, how far rollouts run ahead and what draws them, the folder that the model was read from, and, of
a stream, where its rows come from. Everything else changes how and where a run computes, not what.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import CheckpointError
from alignment.settings.run import OptimConfig, RunConfig

SAMPLING = {"completions", "max_tokens", "temperature", "top_p", "top_k"}
"""Keys of `rollout` that decide from which distribution answers are drawn."""
ENGINE = {"engine", "dtype", "steps_ahead"}
"""Keys of `rollout` that decide by what, and how early."""
RATES = set(OptimConfig.model_fields) - {"name", "micro_batch_tokens", "zero"}
"""Keys of `optim` that decide how far a step goes."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A run's settings as far as results depend on them, as JSON."""

    fixed: dict[str, Any]
    """What must not change."""
    adjustable: dict[str, Any]
    """What may, with a note."""


def identify(config: RunConfig, *, data: str, num_groups: int | None, steps: int, source: str) -> Identity:
    """The identity of a configuration, with what its data and model turned out to be.

    Args:
        data: fingerprint of the training data.
        num_groups: groups in it; None for a stream.
        steps: optimizer steps that the run has.
        source: folder or hub id that the model was read from.
    """
    lora = config.model.lora
    fixed = {
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
    adjustable = {
        "steps": steps,
        "optim": config.optim.model_dump(mode="json", include=RATES),
        "critic": config.critic.model_dump(mode="json", include={"lr", "warmup_steps"}),
        "rollout": config.rollout.model_dump(mode="json", include=ENGINE),
        "model read from": source,
        "data": {"groups": num_groups} if num_groups is not None else config.data.model_dump(mode="json"),
    }
    return Identity(fixed=fixed, adjustable=adjustable)


def check_same_run(folder: Path, kept: dict[str, Any], now: Identity, num_groups: int | None = None) -> None:
    """Refuses to go on from a checkpoint of another run.

    Args:
        folder: of the checkpoint.
        kept: `Identity.fixed` of the run that wrote it.
        num_groups: that its training data had, if it is known.

    Raises:
        CheckpointError: with what differs, and what to do.
    """
    changed = [
        f"{key} was {was!r} and is {value!r}" for key, was, value in differences(kept, now.fixed) if key != "data"
    ]
    advice = "Set them back to go on with this run, or give the new one another name"
    if kept["data"] != now.fixed["data"]:
        sizes = [_size(num_groups, kept["data"]), _size(now.adjustable["data"].get("groups"), now.fixed["data"])]
        changed.append(f"data was {sizes[0]} and is {sizes[1]}")
        advice += (
            ". A run goes on only with the data that it began with, token by token: the same rows (a file that has "
            "grown can be cut by data.take), and what makes tokens of them (data.max_length, tokenizer, chat template)"
        )
    if changed:
        raise CheckpointError(f"{folder} belongs to another run: {'; '.join(changed)}. {advice}")


def _size(num_groups: int | None, fingerprint: str) -> str:
    return f"{'' if num_groups is None else f'{num_groups} groups '}({fingerprint[:8]})"


def notes(kept: dict[str, Any], now: Identity) -> list[str]:
    """What has changed that may change, each as `key old → new`."""
    return [f"{key} {was} → {value}" for key, was, value in differences(kept, now.adjustable)]


def differences(kept: Any, now: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """Where two settings differ: key, old value, new value. One that the older does not know is new, not changed."""
    if isinstance(kept, dict) and isinstance(now, dict):
        return [
            difference
            for key in now
            if key in kept
            for difference in differences(kept[key], now[key], f"{place}.{key}" if place else key)
        ]
    if isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        pairs = zip(kept, now, strict=True)
        return [
            difference
            for number, (was, value) in enumerate(pairs)
            for difference in differences(was, value, f"{place}.{number}")
        ]
    return [] if kept == now else [(place, kept, now)]
