"""From a configured checkpoint to a version in the registry, what an engine loads for it, and the names in requests."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.errors import AlignmentError, ServingError
from alignment.models.folders import base_of, model_source
from serving.audit import folder_of, leave
from serving.bases import base_stamp
from serving.compatibility import Adapter, LoraCapacity, adapter_of, template_of
from serving.config import ServeConfig
from serving.parsers import tool_call_parser_of
from serving.registry import Registry, Version, name_of
from serving.store.records import AuditEntry, operator

REWARDS_LENGTH = 2048
"""Most tokens of a prompt and one completion that are rated where nothing is configured."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """One version of a model, as an engine loads it."""

    name: str
    """Model name under which versions answer."""
    source: str
    """Absolute path or hub id of the whole model that the engine loads."""
    revision: str | None = None
    """Of a `source` on a hub: the one that the adapter was registered with; None takes the newest."""
    base_name: str | None
    """Model name of `source`, if versions are adapters on it; None if they are whole models."""
    adapter: Adapter | None
    lora_capacity: LoraCapacity | None
    """What the engine has to be able to hold; None for whole models."""
    can_chat: bool = True
    """Whether there is a template for chats; without one only `/v1/completions` answers."""
    tool_call_parser: str | None = None
    """vLLM's name for the form in which the model writes calls of tools; None if it is not known."""

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


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What a start has put into the registry, and what it serves."""

    served: Served
    registry: Registry
    note: str | None
    """A line for people if it is not the configured checkpoint that answers; None if it is."""


def registry_of(config: ServeConfig) -> Registry:
    """Where the versions of an endpoint are kept."""
    name = config.name or name_of(config.checkpoint)
    return Registry(Path(config.folder) / name.replace("/", "--"))


def publish(config: ServeConfig, *, is_live: bool = False) -> Publication:
    """Registers the configured checkpoint, and says what the endpoint serves: what answered before.

    The checkpoint becomes the current version only if there is none yet, or if `config.promote` says so and no other
    endpoint has the registry. A checkpoint that cannot be registered ends no service that has a version to go on with.

    Args:
        is_live: whether replicas may be answering from this registry now: those of another endpoint, or of this one,
            whose configuration has changed.

    Raises:
        CheckpointError: the checkpoint is damaged, or the run has none.
        ModelError: there is no model where the checkpoint, or its base, says.
        ServingError: it is of a kind that is not served, does not fit what is served, or an adapter would have the same
            name as its base; or `rewards.max_length` is more than the model's positions.
    """
    registry = registry_of(config)
    before = current = registry.state().current
    must_fit = bool(current) and (is_live or not config.promote)
    try:
        version = registry.add(
            _folder(config.checkpoint), parent=current or None, compatible_with=current if must_fit else None
        )
    except AlignmentError as error:
        if not current or config.promote:
            raise
        _write_down_start(config, registry, version=None, before=before)
        told = f"{config.checkpoint} was not registered: {error}. {_as_before(registry, current)}"
        return _publication(config, registry, told)
    if not current or config.promote:
        current = registry.promote(version.number).current
    _write_down_start(config, registry, version=version.number, before=before)
    note = None if version.number == current else _not_current(config, registry, version, current)
    return _publication(config, registry, note)


def _publication(config: ServeConfig, registry: Registry, note: str | None) -> Publication:
    served = served_version(config, registry, registry.state().current)
    reference = reference_of(config, registry)
    if config.rewards.model is None and reference is not None:
        is_base = served.base_name is not None and config.rewards.reference is None
        rewards_length(config, served.source if is_base else reference)
    return Publication(served=served, registry=registry, note=note)


def reference_of(config: ServeConfig, registry: Registry) -> str | None:
    """What the implicit rewards of the current version are held against: the base of an adapter; of whole weights, what
    is configured or their training began with. None if nobody says."""
    version = registry.version(registry.state().current)
    base = base_of(registry.folder_of(version.number)) if version.kind == "adapter" else None
    return config.rewards.reference or base or (version.config or {}).get("model", {}).get("path")


def rewards_length(config: ServeConfig, model: str) -> int:
    """Most tokens of a prompt and one completion that a model rates. What is no folder here has positions enough.

    Raises:
        ServingError: `rewards.max_length` is more than the model's positions.
    """
    positions = _positions(Path(model).expanduser())
    wanted = config.rewards.max_length
    if wanted is None:
        return min(REWARDS_LENGTH, positions or REWARDS_LENGTH)
    if positions is not None and wanted > positions:
        raise ServingError(
            f"rewards.max_length ({wanted}) is more than the {positions} positions of {model}, by which answers are "
            "rated; lower it, or leave it out"
        )
    return wanted


def _positions(folder: Path) -> int | None:
    """Of a model's folder; None where there is none, or it does not say."""
    try:
        settings = json.loads((folder / "config.json").read_bytes())
        found = settings.get("text_config", settings).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def _write_down_start(config: ServeConfig, registry: Registry, *, version: int | None, before: int) -> None:
    """Into the audit trail: what a start registered, and what answered before and after it."""
    current = registry.state().current
    detail = {"checkpoint": config.checkpoint, "version": version, "before": before, "current": current}
    leave(folder_of(registry), AuditEntry(action="start", who=operator(), detail=detail))


def _as_before(registry: Registry, current: int) -> str:
    return f"Version {current} ({registry.version(current).name}) answers, as before."


def _not_current(config: ServeConfig, registry: Registry, version: Version, current: int) -> str:
    url = "" if config.port == 8000 else f" --url http://127.0.0.1:{config.port}"
    return (
        f"{config.checkpoint} is version {version.number}. {_as_before(registry, current)} "
        f"`raylign promote {version.number}{url}` changes to version {version.number}; so does a start with --promote."
    )


def check_here(registry: Registry) -> None:
    """Checks on a machine where a part of the endpoint starts that it sees what is served.

    Raises:
        ServingError: it does not.
    """
    if not registry.state().current:
        raise ServingError(
            f"the registry {registry.folder} as {socket.gethostname()} sees it has no version that answers: several "
            "machines must share it, as by a network file system"
        )


def served_version(config: ServeConfig, registry: Registry, number: int) -> Served:
    """What an engine loads for a version.

    Raises:
        ServingError: there is no such version, or it would have the same name as its base.
    """
    check_here(registry)
    version = registry.version(number)
    name = config.name or name_of(config.checkpoint)
    folder = registry.folder_of(number)
    template = _template(config, folder)
    whole = Served(
        name=name,
        source=str(folder),
        base_name=None,
        adapter=None,
        lora_capacity=None,
        can_chat=template is not None,
        tool_call_parser=_tool_call_parser(config, template),
    )
    if version.kind == "full":
        return whole
    base = base_of(folder)
    is_folder = Path(base).is_dir()
    if is_folder and version.base_stamp is not None and base_stamp(base) != version.base_stamp:
        raise ServingError(
            f"the base model {base} is another one than when version {number} was registered, whose adapter changes "
            "what it was trained on and nothing else. Put the former one back there, or train on this one"
        )
    if name_of(base) == name:
        raise ServingError(
            f"The adapter {config.checkpoint} and its base model would both be called {name!r}, and requests choose "
            "between them by name; give the adapter another with name=..."
        )
    return replace(
        whole,
        source=model_source(base),
        revision=None if is_folder else version.base_stamp,
        base_name=name_of(base),
        adapter=adapter_of(folder, name),
        lora_capacity=registry.lora_capacity(),
    )


def _template(config: ServeConfig, folder: Path) -> str | None:
    """Text of the template for chats."""
    if config.chat_template is None:
        return template_of(folder)
    from alignment.data.chat import chat_template

    return chat_template(config.chat_template)


def _tool_call_parser(config: ServeConfig, template: str | None) -> str | None:
    return tool_call_parser_of(template) if config.tool_call_parser == "auto" else config.tool_call_parser


def _folder(checkpoint: str) -> Path:
    """The folder of a checkpoint; what is bundled or lies on a hub is fetched first."""
    if Path(checkpoint).expanduser().is_dir():
        return Path(checkpoint)
    source = Path(model_source(checkpoint))
    if source.is_dir():
        return source
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(checkpoint, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
