"""From a configured checkpoint to a version in the registry, what an engine loads for it, and the names in requests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignment.errors import ServingError
from alignment.models.folders import base_of, model_source
from serving.config import ServeConfig
from serving.fits import Adapter, Room, adapter_of, template_of
from serving.registry import Registry, Version, name_of


@dataclass(frozen=True, kw_only=True)
class Served:
    """One version of a model, as an engine loads it."""

    name: str
    """Model name under which versions answer."""
    source: str
    """Absolute path or hub id of the whole model that the engine loads."""
    base_name: str | None
    """Model name of `source`, if versions are adapters on it; None if they are whole models."""
    adapter: Adapter | None
    room: Room | None
    """What the engine has to be able to hold; None for whole models."""
    can_chat: bool = True
    """Whether there is a template for chats; without one only `/v1/completions` answers."""

    @property
    def names(self) -> list[str]:
        """Every model name that clients can ask for, the aligned model first."""
        return [self.name] if self.base_name is None else [self.name, self.base_name]

    @property
    def engine_name(self) -> str:
        """What the engine calls the model in `source`."""
        return self.base_name or self.name

    def inside(self, number: int) -> str:
        """What the engine calls a version."""
        return self.name if self.base_name is None else adapter_name(number)


def adapter_name(number: int) -> str:
    """What an engine calls a version's adapter; no model name of ours begins with this sign."""
    return f"@{number}"


def publish(config: ServeConfig) -> tuple[Served, Registry]:
    """Puts the configured checkpoint into the registry, and says what the endpoint serves.

    A checkpoint that the registry does not know becomes the current version. One that it knows leaves what is current
    as it is: who starts the same service again goes on with what was promoted since.

    Raises:
        CheckpointError: the checkpoint is damaged, or the run has none.
        ModelError: there is no model where the checkpoint, or its base, says.
        ServingError: it is of a kind that is not served, or an adapter would have the same name as its base.
    """
    name = config.name or name_of(config.checkpoint)
    registry = Registry(Path(config.folder) / name.replace("/", "--"))
    known = {version.number for version in registry.versions()}
    state = registry.state()
    version = registry.add(_folder(config.checkpoint), parent=state.current or None)
    if version.number not in known or not state.current:
        state = registry.promote(version.number)
    return served_version(config, registry, state.current), registry


def served_version(config: ServeConfig, registry: Registry, number: int) -> Served:
    """What an engine loads for a version.

    Raises:
        ServingError: there is no such version, or it would have the same name as its base.
    """
    version = registry.version(number)
    name = config.name or name_of(config.checkpoint)
    folder = registry.folder_of(number)
    can_chat = config.chat_template is not None or template_of(folder) is not None
    if version.kind == "full":
        return Served(name=name, source=str(folder), base_name=None, adapter=None, room=None, can_chat=can_chat)
    base = _base(version, folder)
    if name_of(base) == name:
        raise ServingError(
            f"The adapter {config.checkpoint} and its base model would both be called {name!r}, and requests choose "
            "between them by name; give the adapter another with name=..."
        )
    return Served(
        name=name,
        source=model_source(base),
        base_name=name_of(base),
        adapter=adapter_of(folder, name),
        room=registry.room(),
        can_chat=can_chat,
    )


def _base(version: Version, folder: Path) -> str:
    return version.base or base_of(folder)


def _folder(checkpoint: str) -> Path:
    """The folder of a checkpoint; what is bundled or lies on a hub is fetched first."""
    if Path(checkpoint).expanduser().is_dir():
        return Path(checkpoint)
    source = Path(model_source(checkpoint))
    if source.is_dir():
        return source
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(checkpoint, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
