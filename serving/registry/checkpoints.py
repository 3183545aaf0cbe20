"""Checkpoints on their way into the registry: which of their files belong to a model, their copy, and their history."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from alignment.errors import CheckpointError
from alignment.models.cache import BUNDLED, is_bundled
from alignment.models.model_folder import MANIFEST, STATE, ModelFolder
from alignment.run_folder import RunFolder, checkpoint_or_path
from alignment.storage import is_url

MODEL_FILE_SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".tiktoken", ".txt")
"""Suffixes of the files that belong to a model; trainer state, pickles and programs do not."""
READ_ONLY = 0o444
"""Mode of a version's files, so that nobody overwrites one by mistake (root still may)."""
COPY_CHUNK_BYTES = 2**30
"""Bytes that are copied in one call."""


def name_of(checkpoint: str) -> str:
    """The name of a checkpoint: that of its run, folder, address in a storage or hub id."""
    path = Path(checkpoint).expanduser().resolve()
    if not path.is_dir() and not is_url(checkpoint):
        return checkpoint
    if run_folder := RunFolder.of_checkpoint(path):
        return f"{run_folder.path.name}-{path.name}"
    return BUNDLED if is_bundled(path) else path.name


def local_path(checkpoint: str) -> Path:
    """The path of a checkpoint; one that is given by its address in a storage is downloaded first.

    Raises:
        CheckpointError: the storage does not answer or has no such checkpoint, or that is damaged.
        ConfigError: the storage cannot be opened.
    """
    return Path(checkpoint_or_path(checkpoint) if is_url(checkpoint) else checkpoint)


def checkpoint_folder(checkpoint: Path) -> Path:
    """The folder of a checkpoint: of a run, that of its newest intact checkpoint.

    Raises:
        CheckpointError: it is not a folder of this machine, or the run has no intact checkpoint.
    """
    try:
        origin = Path(checkpoint_or_path(str(checkpoint))).expanduser().resolve()
        if origin.is_dir():
            return origin
    except (OSError, RuntimeError, ValueError):
        pass  # not a valid path: it is too long, or names a user who does not exist
    raise CheckpointError(f"{str(checkpoint)[:200]} is not a folder here (looked from {Path.cwd()})")


def copy_model(origin: Path, target: Path) -> str:
    """Copies a model's files into an empty folder; returns the hash of their content.

    Raises:
        CheckpointError: a file of a checkpoint that raylign wrote has changed since its commit.
    """
    model, version = ModelFolder(origin), ModelFolder(target)
    manifest = model.read_manifest()
    for name in manifest or [file.name for file in origin.iterdir() if file.is_file()]:
        if _is_model_file(name, model.weight_files()):
            _copy_file((origin / name).resolve(), target / name)
    content = version.commit()
    for file in target.iterdir():
        file.chmod(READ_ONLY)
    changed_names = [name for name, entry in version.read_manifest().items() if manifest and manifest[name] != entry]
    if changed_names:
        raise CheckpointError(f"{origin} changed while it was copied ({', '.join(changed_names)}); add it again")
    return content


def _is_model_file(name: str, weights: list[str]) -> bool:
    suffix = Path(name).suffix
    if suffix == ".safetensors":
        return name in weights  # some folders hold the same weights in a second format
    return suffix in MODEL_FILE_SUFFIXES and "/" not in name and name != MANIFEST


def _copy_file(source: Path, target: Path) -> None:
    """Copies a file. A hard link would not do: the version would change when the original is overwritten.

    Some file systems share the bytes of both files until one is written to (XFS, Btrfs), or copy on the server (NFS
    4.2); this function lets them.
    """
    with source.open("rb") as source_file, target.open("xb") as target_file:
        try:
            while os.copy_file_range(source_file.fileno(), target_file.fileno(), COPY_CHUNK_BYTES):
                pass
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
            source_file.seek(0)
            target_file.seek(0)
            shutil.copyfileobj(source_file, target_file, length=2**22)


def delete_folder(folder: Path) -> int:
    """Deletes a folder; returns the bytes freed. A file with another hard link frees none."""
    freed_bytes = sum(
        status.st_size for file in folder.rglob("*") if (status := file.lstat()).st_nlink == 1 and file.is_file()
    )
    shutil.rmtree(folder)
    return freed_bytes


def newest_checkpoint(checkpoint: Path) -> Path:
    """The folder that a path stands for: a run's newest committed checkpoint, else the path itself."""
    folders = RunFolder.at(checkpoint).checkpoints()
    return next((folder for folder in folders if ModelFolder(folder).commit_mark), checkpoint)


def files_stamp(*folders: Path) -> str:
    """A hash that changes when a file of the folders is written, replaced, added or deleted."""
    files = ((file.name, file.stat()) for folder in folders for file in sorted(folder.iterdir()) if file.is_file())
    fingerprints = [(name, status.st_size, status.st_mtime_ns, status.st_ino) for name, status in files]
    return hashlib.sha256(repr(fingerprints).encode()).hexdigest()


def training_history(origin: Path) -> dict[str, Any]:
    """Data, configuration and evaluation of the run that a checkpoint comes from, as far as they are recorded."""
    if STATE not in ModelFolder(origin).read_manifest():
        return {"data": None, "config": None}
    state = json.loads((origin / STATE).read_bytes())
    data, run_folder = state["identity"]["data"], RunFolder.of_checkpoint(origin)
    if run_folder is None:
        return {"data": data, "config": None}
    return {"data": data, "config": run_folder.read_config(), "metrics": _last_evaluation(run_folder, state["step"])}


def _last_evaluation(run_folder: RunFolder, step: int) -> dict[str, float]:
    """The last metrics on held-out data up to a step."""
    for line in reversed(run_folder.read_metrics()):
        metrics = {name: value for name, value in line.items() if name.startswith("eval/") and math.isfinite(value)}
        if metrics and line["step"] <= step:
            return {"step": line["step"], **metrics}
    return {}
