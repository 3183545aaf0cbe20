"""A model on disk: what its folder holds, and whether that is complete and unchanged. It needs no torch.

FOLDER/
    config.json, model.safetensors, tokenizer.json …     what transformers, peft and vLLM open
    adapter_config.json, adapter_model.safetensors       in their place, if it is a LoRA adapter
    trainer/                                             what a run resumes from, if it is a checkpoint of a run
    manifest.json                                        sha256 and size of every file
    COMMITTED                                            sha256 of the manifest; written last

Folders that other programs wrote have neither manifest nor commit mark.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignment.errors import CheckpointError, ModelError
from alignment.files import flush_to_disk
from alignment.models.cache import bundled, is_bundled, is_merged

CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "tokenizer.model", "vocab.json", CHAT_TEMPLATE)
"""A folder that has any of these files has a tokenizer."""
MANIFEST, COMMITTED = "manifest.json", "COMMITTED"
TRAINER = "trainer/"
"""Folder of a checkpoint with the trainer's state, which is no part of the model."""
STATE = f"{TRAINER}state.json"
"""File of a checkpoint with the step and all of the trainer's state that is no tensor."""
KEPT_BASES = "bases"
"""Folder of a registry that keeps base models which would otherwise lie in a cache only."""


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a model: all weights or a LoRA adapter; a checkpoint of a run, or what another program wrote."""

    path: Path

    @property
    def is_adapter(self) -> bool:
        """True for a LoRA adapter rather than a whole model."""
        return (self.path / ADAPTER_CONFIG).is_file()

    @property
    def kind(self) -> Literal["adapter", "full"]:
        """A LoRA adapter on a base model, or all weights."""
        return "adapter" if self.is_adapter else "full"

    @property
    def is_reward_model(self) -> bool:
        """True for a model that gives scores and no answers.

        Raises:
            CheckpointError: the file with its settings is missing or damaged.
        """
        if self.is_adapter:
            return self.read_adapter_config().get("task_type") == "SEQ_CLS"
        return any("ForSequenceClassification" in name for name in self.read_config().get("architectures") or ())

    @property
    def base(self) -> str:
        """The model that an adapter was trained on, as a folder or hub id.

        Raises:
            ModelError: the adapter's settings are damaged or name no base model.
        """
        file = self.path / ADAPTER_CONFIG
        try:
            name = json.loads(file.read_text())["base_model_name_or_path"]
        except (ValueError, LookupError, TypeError) as error:
            raise ModelError(f"{file} is damaged or names no base model: {error!r}") from error
        if not isinstance(name, str):
            raise ModelError(f"{file} names no base model (base_model_name_or_path is {name!r})")
        registry_copy = self.path.resolve().parent.parent / KEPT_BASES / Path(name).name
        if is_merged(name) and registry_copy.is_dir():
            return str(registry_copy)  # the adapter is a version of an endpoint, whose registry has a copy of the base
        if not Path(name).exists() and is_bundled(name):
            return str(bundled())  # the adapter was trained on another machine, whose cache lies elsewhere
        return name

    @property
    def has_config(self) -> bool:
        """True if the folder has a model's settings. Adapters that peft wrote by itself have none."""
        return (self.path / CONFIG).is_file()

    @property
    def has_tokenizer(self) -> bool:
        """True if the folder has a tokenizer. Adapters that peft wrote by itself have none."""
        return any((self.path / name).is_file() for name in TOKENIZER_FILES)

    @property
    def chat_template_file(self) -> Path:
        """The file with the chat template; older folders have it in the tokenizer's settings instead."""
        return self.path / CHAT_TEMPLATE

    def read_config(self) -> dict[str, Any]:
        """The settings of the model.

        Raises:
            CheckpointError: their file is missing or damaged.
        """
        return read_json(self.path / CONFIG)

    def read_adapter_config(self) -> dict[str, Any]:
        """The settings of the adapter.

        Raises:
            CheckpointError: their file is missing or damaged.
        """
        return read_json(self.path / ADAPTER_CONFIG)

    def read_chat_template(self) -> Any:
        """The folder's own chat template: a text of Jinja, several texts with their names, or None.

        Raises:
            CheckpointError: the tokenizer's settings cannot be read.
        """
        if self.chat_template_file.is_file():
            return self.chat_template_file.read_text(encoding="utf-8")
        file = self.path / TOKENIZER_CONFIG
        return read_json(file).get("chat_template") if file.is_file() else None

    def weight_files(self) -> list[str]:
        """Names of the files that hold the weights of the model or adapter.

        Raises:
            CheckpointError: the index of these files is damaged.
        """
        if self.is_adapter:
            return [ADAPTER_WEIGHTS]
        file = self.path / WEIGHTS_INDEX
        if not file.is_file():
            return [WEIGHTS]
        index = read_json(file)
        try:
            return sorted(set(index["weight_map"].values()))
        except (LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged: it has no weight_map") from error

    @property
    def is_checkpoint(self) -> bool:
        """True for a folder that raylign committed, even if it is incomplete or damaged by now."""
        return any((self.path / name).is_file() for name in (COMMITTED, MANIFEST))

    @property
    def commit_mark(self) -> str | None:
        """sha256 (hex) of the manifest that was committed; None if the folder was not committed."""
        try:
            return (self.path / COMMITTED).read_text().strip()
        except FileNotFoundError:
            return None

    def read_manifest(self) -> dict[str, dict[str, Any]]:
        """Size and hash of every file, by name; empty for a folder that raylign did not write."""
        file = self.path / MANIFEST
        return dict(json.loads(file.read_bytes())) if file.is_file() else {}

    def verify(self, *, only_model: bool = False) -> None:
        """Compares all files with the manifest, and the manifest with the commit mark.

        Args:
            only_model: whether to verify the model alone, without reading the trainer's state, which is larger.

        Raises:
            CheckpointError: a file is missing or differs; the text names it.
        """
        folder = self.path
        try:
            manifest = (folder / MANIFEST).read_bytes()
            commit_mark = (folder / COMMITTED).read_text()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {folder} is incomplete: {Path(error.filename).name} is missing"
            ) from error
        if hashlib.sha256(manifest).hexdigest() != commit_mark.strip():
            raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} is not the one that was committed")
        for name, entry in json.loads(manifest).items():
            only_size = only_model and name.startswith(TRAINER)
            if damage := self.damage_of(name, entry, only_size=only_size, reads_once=only_model):
                raise CheckpointError(f"checkpoint {folder} is damaged: {damage}")

    def damage_of(
        self, name: str, entry: dict[str, Any], *, only_size: bool = False, reads_once: bool = False
    ) -> str | None:
        """Says how a file differs from its entry in the manifest; None if it does not.

        Args:
            only_size: whether to leave the content unread.
            reads_once: whether this process reads an unchanged file only once, however often it is compared.
        """
        file = self.path / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if not only_size and (_sha256_once(file) if reads_once else _sha256(file)) != entry["sha256"]:
            return f"the content of {name} has changed"
        return None

    def commit(self) -> str:
        """Writes the manifest of the files and the commit mark, and flushes everything to the disk.

        Returns:
            sha256 of the manifest in hex; it is the same for folders with the same files.
        """
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        entries = {
            str(file.relative_to(self.path)): {"sha256": _sha256(file), "bytes": file.stat().st_size} for file in files
        }
        manifest = json.dumps(entries, indent=1)
        commit_mark = hashlib.sha256(manifest.encode()).hexdigest()
        (self.path / MANIFEST).write_text(manifest)
        (self.path / COMMITTED).write_text(commit_mark)
        for path in [*self.path.rglob("*"), self.path]:
            if path.is_dir() or path.stat().st_nlink == 1:  # a file that is hard-linked elsewhere keeps its mode
                path.chmod(0o755 if path.is_dir() else 0o644)  # the endpoint may run as another user
            flush_to_disk(path)
        return commit_mark


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object")
    return value


def _sha256(file: Path) -> str:
    """sha256 of a file in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_once(file: Path) -> str:
    """sha256 of a file in hex. An unchanged file is read only once by this process, which may open a model often."""
    state = file.stat()
    return _cached_sha256(file, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


@functools.lru_cache(maxsize=1024)
def _cached_sha256(file: Path, size: int, modified_ns: int, changed_ns: int, inode: int) -> str:
    """sha256 of a file, cached by what changes together with its content."""
    return _sha256(file)
