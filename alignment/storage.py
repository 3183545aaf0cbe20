"""Where checkpoints are kept besides a run's folder, as an object store: the port, and what makes checkpoints of it.

    run's folder ── upload ──► URL/RUN/checkpoints/step-00000100/model.safetensors …, manifest.json, COMMITTED
                 ◄─ download ─

A `Storage` keeps files by name and knows nothing of checkpoints, so that one's own is four short methods.
`StoredFolders` makes checkpoints of them, for every storage alike: the commit mark is uploaded last and deleted first,
so that a folder is complete or absent, and every downloaded file is compared with the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from alignment.errors import CheckpointError, ConfigError, StorageError
from alignment.models.cache import cache_folder, make_once
from alignment.models.model_folder import COMMITTED, MANIFEST, STATE, TRAINER, ModelFolder
from alignment.settings.plugins import load_plugin

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CHECKPOINTS = "checkpoints"
"""Folder of a run, on a disk or in a storage, that holds its checkpoints."""
STEP = "step-"
"""Prefix of the name of a checkpoint's folder; the step in eight digits follows."""
URL = re.compile(r"(?!https?:)[a-z][a-z0-9+.-]*://(?!.*::)")
"""How the address of a storage begins. Nothing can be stored by HTTP, and `::` would chain addresses."""
PAUSES_S = (1.0, 5.0, 25.0)
"""Seconds before each further attempt of what a storage failed to do."""


class Storage(Protocol):
    """The port: keeps files by name, as `step-00000100/trainer/state.json`.

    Any method may raise any exception; it is then called again, up to three times. Methods are called in threads, but
    never two at the same time.
    """

    def upload(self, file: Path, name: str) -> None:
        """Stores a file under a name, in place of an older one. When this returns, it can be downloaded and listed."""

    def download(self, name: str, file: Path) -> None:
        """Writes what is stored under a name into a file, whose folder exists.

        Raises:
            FileNotFoundError: nothing is stored under the name.
        """

    def list_files(self) -> Iterable[str]:
        """The names of all that is stored; none before the first upload."""

    def delete(self, name: str) -> None:
        """Deletes what is stored under a name.

        Raises:
            FileNotFoundError: nothing is stored under the name.
        """


class FsspecStorage:
    """A folder at any address that fsspec opens: `s3://`, `gs://`, `abfs://`, `file://`, `memory://`, or a path."""

    def __init__(self, url: str, **arguments: Any) -> None:
        """Opens the storage.

        Args:
            url: the folder, which need not exist.
            arguments: for fsspec's file system of this kind of address.

        Raises:
            ConfigError: there is no such kind of address, or its package is not installed.
        """
        import fsspec

        self._is_disk = "://" not in url or url.startswith("file://")
        if self._is_disk:
            arguments = {"auto_mkdir": True, **arguments}
        try:
            self._system: AbstractFileSystem
            self._system, folder = fsspec.url_to_fs(url, **arguments)
        except ImportError as error:
            raise ConfigError(
                f"the storage {url} cannot be opened: {error}. The extras s3 and gcs of raylign bring s3fs and gcsfs; "
                "other addresses need the package that fsspec names"
            ) from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the storage {url} cannot be opened: {error}") from error
        self._folder = str(folder).rstrip("/")

    def upload(self, file: Path, name: str) -> None:
        """Copies a file into the storage."""
        self._system.put_file(str(file), self._path(name))

    def download(self, name: str, file: Path) -> None:
        """Copies a file out of the storage."""
        self._system.get_file(self._path(name), str(file))

    def list_files(self) -> list[str]:
        """Lists the folder at all depths. Whatever fsspec remembers of it is forgotten first."""
        self._system.invalidate_cache()
        return [path.removeprefix(self._folder).lstrip("/") for path in self._system.find(self._folder)]

    def delete(self, name: str) -> None:
        """Deletes a file; on a disk also the folders that it leaves empty."""
        self._system.rm_file(self._path(name))
        if self._is_disk:
            with contextlib.suppress(OSError):  # the folder is not empty
                for _ in range(name.count("/")):
                    name = name.rpartition("/")[0]
                    Path(self._path(name)).rmdir()

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"


STORAGES = {"fsspec": FsspecStorage}
"""The storages that come with raylign, by name."""


def storage_class(name: str) -> Callable[..., Storage]:
    """Finds what opens the storage of a name: it is called with the URL of a folder and with keyword arguments.

    Raises:
        ConfigError: there is no such storage, or it is a class that lacks a method of `Storage`.
    """
    storage = load_plugin(name, STORAGES, "storage", callable_only=True)
    methods = [method for method in vars(Storage) if not method.startswith("_")]
    missing_methods = [method for method in methods if isinstance(storage, type) and not hasattr(storage, method)]
    if missing_methods:
        raise ConfigError(f"storage {name!r} has no {', '.join(missing_methods)}")
    return cast("Callable[..., Storage]", storage)


@dataclass(frozen=True)
class StoredFolders:
    """The committed folders of a storage, such as the checkpoints of a run."""

    storage: Storage
    url: str
    """Where the storage is, for texts."""

    @classmethod
    def open(cls, url: str, *, name: str = "fsspec", arguments: dict[str, Any] | None = None) -> StoredFolders:
        """Opens the storage at a URL.

        Args:
            name: the kind of storage; see `storage_class`.

        Raises:
            ConfigError: it cannot be opened; the text says why.
        """
        try:
            return cls(storage_class(name)(url, **(arguments or {})), url)
        except ConfigError:
            raise
        except Exception as error:  # one's own may raise anything
            raise ConfigError(f"storage {name!r} of {url} cannot be opened: {type(error).__name__}: {error}") from error

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints that are complete, newest first. A damaged one is found when it is downloaded.

        Raises:
            StorageError: the storage does not answer.
        """
        return sorted((name for name in self._complete_names() if name.startswith(STEP)), reverse=True)

    def commit_mark(self, name: str) -> str | None:
        """The commit mark of a stored folder, which two folders with the same files share; None if there is none.

        Raises:
            StorageError: the storage does not answer.
        """
        if name not in self._complete_names():
            return None
        with tempfile.TemporaryDirectory() as folder:
            self._download(f"{name}/{COMMITTED}", Path(folder) / COMMITTED)
            return ModelFolder(Path(folder)).commit_mark

    def upload(self, folder: Path, name: str | None = None) -> None:
        """Stores a committed folder, in place of an older one of the same name. It is complete when the mark is there.

        Args:
            name: the name to store it by; None is the folder's own.

        Raises:
            StorageError: it cannot be stored; what was stored of it is no complete folder.
        """
        name = name or folder.name
        self.delete(name)
        for file in (*ModelFolder(folder).read_manifest(), MANIFEST, COMMITTED):
            upload = partial(self.storage.upload, folder / file, f"{name}/{file}")
            self._attempt(f"the upload of {name}/{file}", upload)

    def download(self, name: str, folder: Path, *, only_model: bool = False) -> None:
        """Downloads a stored folder into an empty one, and compares every file with the manifest.

        Args:
            only_model: whether to leave out the trainer's tensors, which are larger than the model. The folder is
                then committed anew, without them.

        Raises:
            StorageError: the storage does not answer.
            CheckpointError: a file is missing or differs; the text names it.
        """
        manifest = self._download_manifest(name, folder)
        for file, entry in manifest.items():
            if only_model and file.startswith(TRAINER) and file != STATE:
                continue
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            self._download(f"{name}/{file}", folder / file)
            if damage := ModelFolder(folder).damage_of(file, entry):
                raise self._damage(name, damage)
        if only_model:
            (folder / MANIFEST).unlink()
            (folder / COMMITTED).unlink()
            ModelFolder(folder).commit()

    def fetch(self, name: str, folder: Path) -> None:
        """Downloads a stored folder under a temporary name, and renames it, so that it appears whole or not at all.

        Raises:
            StorageError: the storage does not answer.
            CheckpointError: a file is missing or differs; the text names it.
        """
        temporary_folder = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(temporary_folder, ignore_errors=True)
        temporary_folder.mkdir(parents=True)
        try:
            self.download(name, temporary_folder)
            shutil.rmtree(folder, ignore_errors=True)
            temporary_folder.rename(folder)
        finally:
            shutil.rmtree(temporary_folder, ignore_errors=True)

    def prune(self, newest: str, keep: int) -> None:
        """Deletes all checkpoints but the newest ones, also what is left of incomplete ones.

        Args:
            newest: name of the newest checkpoint of the run. The run did not resume from a later one, as it is damaged.
            keep: number of checkpoints to keep.

        Raises:
            StorageError: one cannot be deleted.
        """
        kept_names = [name for name in self.checkpoints() if name <= newest][:keep]
        for name in self._files_by_folder():
            if name.startswith(STEP) and name not in kept_names:
                self.delete(name)

    def delete(self, name: str) -> None:
        """Deletes a stored folder, its commit mark first.

        Raises:
            StorageError: the storage does not answer.
        """
        for file in sorted(self._files_by_folder().get(name, ()), key=lambda file: (file != COMMITTED, file)):
            self._attempt(f"the deletion of {name}/{file}", partial(self._delete, f"{name}/{file}"))

    def try_out(self, file: Path) -> None:
        """Uploads, lists, downloads and deletes a small file, so that what is not allowed shows before the first step.

        Raises:
            StorageError: one of them fails, or the file does not come back as it was.
        """
        name = f".trial/{file.name}"
        copy = file.with_name(f"{file.name}.downloaded")
        self._attempt(f"the upload of {name}", partial(self.storage.upload, file, name))
        if file.name not in self._files_by_folder().get(".trial", ()):
            raise StorageError(f"{self.url}: {name} was uploaded, and is not listed")
        self._download(name, copy)
        if copy.read_bytes() != file.read_bytes():
            raise StorageError(f"{self.url}: {name} was uploaded, and comes back with another content")
        copy.unlink()
        self.delete(".trial")

    def _complete_names(self) -> list[str]:
        """Names of the folders that have their commit mark."""
        return [name for name, files in self._files_by_folder().items() if COMMITTED in files]

    def _files_by_folder(self) -> dict[str, list[str]]:
        """The names of the stored files, by folder."""
        files: dict[str, list[str]] = {}
        for path in self._attempt("listing", lambda: list(self.storage.list_files())):
            folder, _, file = path.partition("/")
            files.setdefault(folder, []).append(file)
        return files

    def _download_manifest(self, name: str, folder: Path) -> dict[str, dict[str, Any]]:
        """Downloads manifest and commit mark of a stored folder, and compares them."""
        for file in (COMMITTED, MANIFEST):
            self._download(f"{name}/{file}", folder / file)
        model = ModelFolder(folder)
        if hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() != model.commit_mark:
            raise self._damage(name, f"{MANIFEST} is not the one that was committed")
        manifest = model.read_manifest()
        for file in manifest:
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                raise self._damage(name, f"{MANIFEST} names {file!r}, which lies outside")
        return manifest

    def _download(self, name: str, file: Path) -> None:
        """Downloads a file; one that is missing is no failure of the storage, but a damage."""
        try:
            download = partial(self.storage.download, name, file)
            self._attempt(f"the download of {name}", download, final=FileNotFoundError)
        except FileNotFoundError as error:
            folder, _, missing_file = name.partition("/")
            raise self._damage(folder, f"{missing_file} is missing") from error

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # an attempt before this one may have deleted it
            self.storage.delete(name)

    def _damage(self, name: str, text: str) -> CheckpointError:
        return CheckpointError(f"checkpoint {self.url}/{name} is damaged: {text}")

    def _attempt(self, action: str, call: Callable[[], Result], *, final: type[Exception] | tuple[()] = ()) -> Result:
        """Returns the result of a call, which is made again after an error.

        Args:
            final: the kind of error that is raised at once.

        Raises:
            StorageError: the call has failed every time.
        """
        for pause_s in (*PAUSES_S, None):
            try:
                return call()
            except final:
                raise
            except Exception as error:  # storages have errors of their own
                text = f"{type(error).__name__}: {error}"
                if pause_s is None:
                    raise StorageError(f"{self.url}: {action} failed {len(PAUSES_S) + 1} times: {text}") from error
                logger.warning("%s: %s failed, again in %g s: %s", self.url, action, pause_s, text)
                time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")


def is_url(path: str) -> bool:
    """True for the address of a storage rather than a path, a hub id or a web page."""
    return URL.match(path) is not None


def newest_url(url: str) -> str:
    """The address of a checkpoint: of the newest complete one, if the address is that of a run.

    Raises:
        CheckpointError: the run has none there, or the storage does not answer.
        ConfigError: the storage cannot be opened.
    """
    url = url.rstrip("/")
    if url.rpartition("/")[2].startswith(STEP):
        return url
    folder = url if url.endswith(f"/{CHECKPOINTS}") else f"{url}/{CHECKPOINTS}"
    names = StoredFolders.open(folder).checkpoints()
    if not names:
        raise CheckpointError(f"{url} is neither a checkpoint nor a run with a complete one")
    return f"{folder}/{names[0]}"


def download_model(url: str) -> Path:
    """The folder of a stored checkpoint's model in this machine's cache; downloads it on first use, once per machine.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or the storage does not answer.
        ConfigError: the storage cannot be opened.
    """
    folder_url, _, name = newest_url(url).rpartition("/")
    folders = StoredFolders.open(folder_url)
    commit_mark = folders.commit_mark(name)
    if commit_mark is None:
        raise CheckpointError(f"{url} is no complete checkpoint")
    digest = hashlib.sha256(f"{folder_url} {commit_mark}".encode()).hexdigest()[:16]
    run_name = PurePosixPath(folder_url).parent.name
    folder = cache_folder() / "stored" / digest / run_name / CHECKPOINTS / name
    return make_once(folder, lambda temporary_folder: folders.download(name, temporary_folder, only_model=True))
