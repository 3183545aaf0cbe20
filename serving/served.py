"""From a configured checkpoint to what the engine loads, and to the names that clients ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import ServingError
from alignment.models.folders import BUNDLED, base_of, bundled, is_adapter, model_source
from serving.config import ServeConfig

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter that the engine holds beside its base model."""

    name: str
    """Model name of the adapted model."""
    folder: str
    """Absolute path of the adapter."""
    rank: int
    """Largest rank of its matrices."""
    target_modules: tuple[str, ...] | None
    """Names of the layers it adapts; None when the adapter gives a pattern instead of names."""
    chat_template: str | None
    """File with the chat template that it was trained with; None when it keeps the base model's."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model, and perhaps an adapter on it."""

    name: str
    """Model name of the whole model."""
    source: str
    """Absolute path or hub id of the whole model."""
    adapter: Adapter | None

    @property
    def names(self) -> list[str]:
        """Every model name that clients can ask for, the aligned model first."""
        return [self.adapter.name, self.name] if self.adapter else [self.name]


def resolve(config: ServeConfig) -> Served:
    """Finds what a configuration serves, and checks it as far as is possible without loading it.

    Raises:
        CheckpointError: the checkpoint is damaged, or the run has none.
        ModelError: there is no model where the checkpoint, or its base, says.
        ServingError: the adapter is of a kind that vLLM does not serve, or would have the same name as its base.
    """
    folder = _folder(config.checkpoint)
    if folder is None or not is_adapter(folder):
        source = config.checkpoint if folder is None else str(folder)
        return Served(name=config.name or _name(config.checkpoint), source=model_source(source), adapter=None)
    base = base_of(folder)
    served = Served(
        name=_name(base), source=model_source(base), adapter=_adapter(folder, config.name or _name(config.checkpoint))
    )
    if len(set(served.names)) == 1:
        raise ServingError(
            f"The adapter {config.checkpoint} and its base model would both be called {served.name!r}, and requests "
            "choose between them by name; give the adapter another with name=..."
        )
    return served


def _folder(checkpoint: str) -> Path | None:
    """The folder to load for a local checkpoint; None for the bundled model and for hub ids."""
    path = Path(checkpoint).expanduser()
    if checkpoint == BUNDLED or not path.is_dir():
        return None
    if any((path / mark).exists() for mark in ("COMMITTED", "manifest.json", "checkpoints")):
        from alignment.checkpoint import find_checkpoint

        path = find_checkpoint(path)
    return path.resolve()


def _name(checkpoint: str) -> str:
    path = Path(checkpoint).expanduser().resolve()
    if not path.is_dir():
        return checkpoint
    if path.parent.name == "checkpoints":
        return f"{path.parents[1].name}-{path.name}"
    return BUNDLED if path.name == bundled().name else path.name


def _adapter(folder: Path, name: str) -> Adapter:
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max(settings["r"], *settings.get("rank_pattern", {}).values(), 1)
    _check_kind(folder, settings, rank)
    targets, template = settings["target_modules"], folder / "chat_template.jinja"
    return Adapter(
        name=name,
        folder=str(folder),
        rank=rank,
        target_modules=None if isinstance(targets, str) else tuple(sorted(targets)),
        chat_template=str(template) if template.is_file() else None,
    )


def _check_kind(folder: Path, settings: dict[str, Any], rank: int) -> None:
    """Refuses what vLLM would refuse half a minute later."""
    reasons = {
        f"its rank is {rank}, above {LORA_RANKS[-1]}": rank > LORA_RANKS[-1],
        "it is a DoRA adapter": settings.get("use_dora", False),
        f"it replaces whole modules ({settings.get('modules_to_save')})": bool(settings.get("modules_to_save")),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ServingError(
                f"The adapter {folder} cannot be served beside its base model, since {reason}; "
                "merge it into the base model and serve the result"
            )
