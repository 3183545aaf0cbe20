"""The served model: how a configured checkpoint becomes a version in the registry, and what an engine loads for it."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from alignment.errors import AlignmentError, CheckpointError, ServingError
from alignment.models.folders import model_source
from alignment.models.model_folder import ModelFolder
from serving.config import ServeConfig
from serving.feedback.audit import entries_folder, write_entry
from serving.feedback.store.records import AuditEntry, operator
from serving.registry.bases import base_stamp
from serving.registry.checkpoints import local_path, name_of
from serving.registry.compatibility import Adapter, LoraCapacity, adapter_of, template_of
from serving.registry.model_id import ModelId
from serving.registry.parsers import tool_call_parser_of
from serving.registry.versions import Registry, Version

REWARDS_LENGTH = 2048
"""Default of `rewards.max_length`: the most tokens of a prompt and one completion."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One version of a model, as an engine loads it."""

    name: str
    """Model name under which versions answer."""
    source: str
    """Absolute path or hub id of the whole model that the engine loads."""
    revision: str | None = None
    """If `source` is on a hub: the revision that the adapter was registered with; None takes the newest."""
    base_name: str | None
    """Model name of `source`, if versions are adapters on it; None if they are whole models."""
    adapter: Adapter | None
    """The version's adapter; None for whole models."""
    lora_capacity: LoraCapacity | None
    """The adapters that the engine must be able to hold; None for whole models."""
    can_chat: bool = True
    """Whether there is a chat template; without one only `/v1/completions` answers."""
    tool_call_parser: str | None = None
    """vLLM's name for the form in which the model writes tool calls; None if it is not known."""

    @property
    def names(self) -> list[str]:
        """Every model name that requests may give, the aligned model first."""
        return [self.name] if self.base_name is None else [self.name, self.base_name]

    @property
    def engine_name(self) -> str:
        """The engine's name for the model in `source`."""
        return self.base_name or self.name

    def version_name(self, number: int) -> str:
        """The engine's name for a version."""
        return self.name if self.base_name is None else adapter_name(number)


def adapter_name(number: int) -> str:
    """The engine's name for a version's adapter. No configured model name begins with this sign."""
    return f"@{number}"


@dataclass(frozen=True, kw_only=True)
class Publication:
    """The result of `publish`: the registry and the model that the endpoint serves."""

    served_model: ServedModel
    registry: Registry
    note: str | None
    """A line for people if another version than the configured checkpoint answers; else None."""


def model_id_of(config: ServeConfig) -> ModelId:
    """The name of an endpoint's first model."""
    return ModelId(config.name or name_of(config.checkpoint))


def registry_of(config: ServeConfig) -> Registry:
    """The registry with the versions of an endpoint's first model."""
    return Registry(Path(config.folder) / model_id_of(config).folder_name)


@dataclass(frozen=True, kw_only=True)
class Membership:
    """What tells a model of an endpoint with several from the others."""

    name: ModelId
    audit_folder: Path
    """Folder in which entries of the endpoint's audit trail wait."""
    promote_setting: str
    """The setting by which a start promotes the model's checkpoint."""

    @property
    def option(self) -> str:
        """The option of `raylign promote` that names the model."""
        return f"--model {self.name}"


def publish(config: ServeConfig, *, is_live: bool = False, membership: Membership | None = None) -> Publication:
    """Registers the configured checkpoint, and finds the version to serve: the one that was current before.

    The checkpoint becomes the current version only if there is no current version, or if `config.promote` is true. If
    the checkpoint cannot be registered, the endpoint still serves the current version.

    Args:
        is_live: whether replicas may be using the registry now: those of another endpoint, or those of this one if its
            configuration has changed.
        membership: where the model is one of several; None where it is the only one.

    Raises:
        CheckpointError: the checkpoint is damaged, or the run has none.
        ModelError: the model, or the base model of an adapter, does not exist.
        ServingError: the checkpoint is of a kind that is not served, is not compatible with the current version, or is
            an adapter with the same name as its base; or `rewards.max_length` is more than the model's positions.
    """
    registry = registry_of(config)
    record_start = partial(_record_start, config, registry, membership)
    previous = current = registry.state().current
    must_fit = bool(current) and (is_live or not config.promote)
    try:
        version = registry.add(
            _checkpoint_folder(config.checkpoint), parent=current or None, compatible_with=current if must_fit else None
        )
    except AlignmentError as error:
        if not current or config.promote:
            raise
        record_start(version=None, previous=previous)
        refusal = f"{config.checkpoint} was not registered: {error}. {_unchanged_note(registry, current)}"
        return _publication(config, registry, refusal)
    if not current or config.promote:
        current = registry.promote(version.number).current
    record_start(version=version.number, previous=previous)
    note = None if version.number == current else _not_current_note(config, registry, version, current, membership)
    return _publication(config, registry, note)


def _publication(config: ServeConfig, registry: Registry, note: str | None) -> Publication:
    served_model = served_version(config, registry, registry.state().current)
    reference = reference_of(config, registry)
    if config.rewards.model is None and reference is not None:
        is_base = served_model.base_name is not None and config.rewards.reference is None
        rewards_length(config, served_model.source if is_base else reference)
    return Publication(served_model=served_model, registry=registry, note=note)


def reference_of(config: ServeConfig, registry: Registry) -> str | None:
    """The reference model of the current version's implicit rewards: the base model of an adapter; for whole weights
    the configured reference, or the model that their training started from. None if it is not known."""
    version = registry.version(registry.state().current)
    base = ModelFolder(registry.folder_of(version.number)).base if version.kind == "adapter" else None
    return config.rewards.reference or base or (version.config or {}).get("model", {}).get("path")


def rewards_length(config: ServeConfig, model: str) -> int:
    """The most tokens of a prompt and one completion that a model rates. A model that is not a folder on this machine
    is assumed to have enough positions.

    Raises:
        ServingError: `rewards.max_length` is more than the model's positions.
    """
    positions = _num_positions(Path(model).expanduser())
    max_length = config.rewards.max_length
    if max_length is None:
        return min(REWARDS_LENGTH, positions or REWARDS_LENGTH)
    if positions is not None and max_length > positions:
        raise ServingError(
            f"rewards.max_length ({max_length}) is more than the {positions} positions of {model}, by which answers "
            "are rated; lower it, or leave it out"
        )
    return max_length


def _num_positions(folder: Path) -> int | None:
    """The number of positions of a model; None if the folder does not exist, or does not say."""
    try:
        config = ModelFolder(folder).read_config()
        positions = config.get("text_config", config).get("max_position_embeddings")
    except (CheckpointError, AttributeError):
        return None
    return positions if isinstance(positions, int) and positions > 0 else None


def _record_start(
    config: ServeConfig, registry: Registry, membership: Membership | None, *, version: int | None, previous: int
) -> None:
    """Writes a start into the audit trail: the version that it registered, and those that answered before and after."""
    current = registry.state().current
    detail: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        "version": version,
        "before": previous,
        "current": current,
    }
    if membership is not None:
        detail |= {"model": membership.name}
    folder = entries_folder(registry.folder) if membership is None else membership.audit_folder
    write_entry(folder, AuditEntry(action="start", who=operator(), detail=detail))


def _unchanged_note(registry: Registry, current: int) -> str:
    return f"Version {current} ({registry.version(current).name}) answers, as before."


def _not_current_note(
    config: ServeConfig, registry: Registry, version: Version, current: int, membership: Membership | None
) -> str:
    url = "" if config.port == 8000 else f" --url http://127.0.0.1:{config.port}"
    option, promote_setting = ("", "--promote")
    if membership is not None:
        option, promote_setting = f" {membership.option}", membership.promote_setting
    return (
        f"{config.checkpoint} is version {version.number}. {_unchanged_note(registry, current)} "
        f"`raylign promote {version.number}{option}{url}` changes to version {version.number}; so does a start with "
        f"{promote_setting}."
    )


def check_here(registry: Registry) -> None:
    """Checks that this machine, on which a part of the endpoint starts, sees the registry's versions.

    Raises:
        ServingError: it does not.
    """
    if not registry.state().current:
        raise ServingError(
            f"the registry {registry.folder} as {socket.gethostname()} sees it has no version that answers: several "
            "machines must share it, as by a network file system"
        )


def served_version(config: ServeConfig, registry: Registry, number: int) -> ServedModel:
    """The model that an engine loads for a version.

    Raises:
        ServingError: there is no such version, its base model has changed, or it has the same name as its base.
    """
    check_here(registry)
    version = registry.version(number)
    name = str(model_id_of(config))
    folder = registry.folder_of(number)
    template = _template(config, folder)
    served_model = ServedModel(
        name=name,
        source=str(folder),
        base_name=None,
        adapter=None,
        lora_capacity=None,
        can_chat=template is not None,
        tool_call_parser=_tool_call_parser(config, template),
    )
    if version.kind == "full":
        return served_model
    base = ModelFolder(folder).base
    _check_base(base, version)
    if name_of(base) == name:
        raise ServingError(
            f"The adapter {config.checkpoint} and its base model would both be called {name!r}, and requests choose "
            "between them by name; give the adapter another with name=..."
        )
    return replace(
        served_model,
        source=model_source(base),
        revision=None if Path(base).is_dir() else version.base_stamp,
        base_name=name_of(base),
        adapter=adapter_of(folder, name),
        lora_capacity=registry.lora_capacity(),
    )


def _check_base(base: str, version: Version) -> None:
    """Checks that the base model of an adapter is the one that the adapter was registered with."""
    if Path(base).is_dir() and version.base_stamp is not None and base_stamp(base) != version.base_stamp:
        raise ServingError(
            f"the base model {base} is another one than when version {version.number} was registered, whose adapter "
            "changes what it was trained on and nothing else. Put the former one back there, or train on this one"
        )


def _template(config: ServeConfig, folder: Path) -> str | None:
    """The text of the chat template; None if there is none."""
    if config.chat_template is None:
        return template_of(folder)
    from alignment.data.chat_templates import chat_template

    return chat_template(config.chat_template)


def _tool_call_parser(config: ServeConfig, template: str | None) -> str | None:
    return tool_call_parser_of(template) if config.tool_call_parser == "auto" else config.tool_call_parser


def _checkpoint_folder(checkpoint: str) -> Path:
    """The folder of a checkpoint. A bundled model is unpacked first, and one on a hub or in a storage is downloaded."""
    if (path := local_path(checkpoint)).expanduser().is_dir():
        return path
    source = Path(model_source(checkpoint))
    if source.is_dir():
        return source
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(checkpoint, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
