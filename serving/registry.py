"""The versions of the served model: complete copies of checkpoints, and a small file that says which of them answers.

checkpoint ─► add ─► versions/00003/ ─► promote, or canary ─► state.json ─► every replica

REGISTRY/versions/00001.json   the record of a version
REGISTRY/versions/00001/       the files that transformers, peft and vLLM open, manifest.json and COMMITTED; this folder
                               appears last and complete, and only then does the version exist
REGISTRY/versions/00001.deleted  the mark of a deleted version: its number is never given to another version
REGISTRY/bases/                base models of adapters that would otherwise exist only in the cache of one machine
REGISTRY/state.json            which version answers, the versions before it, the canary, and the change in progress
REGISTRY/lease.json            the endpoint that the registry belongs to (see `serving.lease`)

The folder must be readable by every replica. A process that is killed leaves the registry readable: each file is
written completely or not at all, the next `add` removes unfinished copies, and the operating system frees the locks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from alignment.checkpoint import STATE
from alignment.errors import CheckpointError, ServingError
from alignment.files import flush_to_disk, write_durably
from alignment.models.cache import BUNDLED, is_bundled, is_merged
from alignment.models.model_folder import KEPT_BASES, MANIFEST, ModelFolder
from alignment.run_folder import RunFolder, checkpoint_or_path
from serving.bases import base_stamp
from serving.compatibility import LoraCapacity, adapter_of, capacity_for, check_compatible, check_servable

__all__ = ["ChangeUnderWay", "PendingChange", "Registry", "State", "Version"]

MODEL_FILE_SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".tiktoken", ".txt")
"""Suffixes of the files that belong to a model; trainer state, pickles and programs do not."""
READ_ONLY = 0o444
"""Mode of a version's files, so that nobody overwrites one by mistake (root still may)."""
COPY_CHUNK_BYTES = 2**30
"""Bytes that are copied in one call."""
MAX_PREVIOUS_VERSIONS = 100
"""How many earlier versions rollbacks can return to."""
HEARTBEAT_TIMEOUT_S = 30.0
"""Seconds without a heartbeat after which a change in progress counts as abandoned."""

Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class Version:
    """One model that the endpoint can answer with."""

    number: int
    """1, 2, … in the order in which versions were added."""
    name: str
    """Name of the checkpoint, for example `demo-step-00000024`."""
    kind: Literal["adapter", "full"]
    """A LoRA adapter on a base model, or all weights."""
    base: str | None
    """Folder or hub id of an adapter's base model; None for all weights."""
    content: str
    """sha256 (hex) over the names, sizes and hashes of its files."""
    source: str
    """The folder that it was copied from."""
    parent: int | None
    """Number of the version that it is meant to replace; None for the first."""
    data: str | None
    """Fingerprint of the training data; None if the checkpoint does not record it."""
    config: dict[str, Any] | None
    """Configuration of the run that produced it; None if the checkpoint belongs to no run."""
    stamp: str | None = None
    """Hash over the names, sizes, times and inodes of its files and of the files that it was copied from. At the next
    start it shows whether the files are unchanged, without reading them."""
    base_stamp: str | None = None
    """Identifies the base model of an adapter, so that another model in the same place is noticed; None if it is not
    known. See `serving.bases.base_stamp`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The run's last evaluation before the checkpoint, under the names in metrics.jsonl, with its `step`."""
    created: float
    """Time at which it was added (seconds since 1970, UTC)."""


@dataclass(frozen=True, kw_only=True)
class PendingChange:
    """A promotion, canary or rollback that has begun and has not been committed."""

    number: int
    """Number of the version that will answer."""
    share: float | None = None
    """Fraction of the requests that it will answer as a canary; None if it will become the current version."""
    is_rollback: bool = False
    """Whether the change returns to the previous version."""
    token: str = ""
    """Identifies the process that carries out the change."""
    started_by: str = ""
    """Name of the key that requested the change."""
    began: float = 0.0
    """Time of the request (seconds since 1970, UTC)."""
    heartbeat: float = 0.0
    """Last sign of life of the process that carries out the change (seconds since 1970, UTC)."""

    def __str__(self) -> str:
        kind = "the rollback to" if self.is_rollback else "the promotion of" if self.share is None else "the trial of"
        requester = f", which {self.started_by} asked for" if self.started_by else ""
        return f"{kind} version {self.number}{requester}, is under way since {format_time(self.began)}"


class ChangeUnderWay(ServingError):
    """Versions cannot be changed, because another change is still in progress."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Which versions answer requests."""

    current: int = 0
    """Number of the version that answers; 0 before the first promotion."""
    previous: int | None = None
    """Number of the version that a rollback returns to; None if there is none."""
    older: tuple[int, ...] = ()
    """Numbers of the versions that further rollbacks return to, the newest first."""
    canary: int | None = None
    """Number of the version that answers a share of the requests on trial."""
    share: float = 0.0
    """Fraction of the requests that the canary answers, 0 to below 1; at 0 it answers only requests that name it."""
    serial: int = 0
    """How many times the versions that answer have been changed."""
    pending: PendingChange | None = None
    """The change in progress. It no longer counts once its process has stopped renewing it."""

    def change(self, time_s: float | None = None) -> PendingChange | None:
        """The change in progress, if its process still renews it.

        Args:
            time_s: seconds since 1970 (UTC); None is the current time.
        """
        if self.pending is None:
            return None
        silent_s = (time.time() if time_s is None else time_s) - self.pending.heartbeat
        return self.pending if silent_s < HEARTBEAT_TIMEOUT_S else None


VERSIONS, STATES = TypeAdapter(Version), TypeAdapter(State)


class Registry:
    """The versions in a folder. Several processes and threads may use it at once. It creates the folder when it first
    writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()
        self._versions_folder = self.folder / "versions"
        self._bases_folder = self.folder / KEPT_BASES
        self._state_file = self.folder / "state.json"

    def add(self, checkpoint: Path, *, parent: int | None = None, compatible_with: int | None = None) -> Version:
        """Copies a checkpoint as a new version, or returns the version that already holds the same files.

        A version answers no requests before it is promoted. The checkpoint itself may be deleted afterwards.

        Args:
            checkpoint: a run's folder (its newest intact checkpoint is taken), a checkpoint, or any model or adapter
                folder.
            parent: number of the version that it is meant to replace.
            compatible_with: number of a version; engines that run it must be able to change to the new version. None
                skips this check.

        Raises:
            CheckpointError: the checkpoint does not exist, is damaged or incomplete, or cannot be copied.
            ModelError: it is an adapter whose base model does not exist.
            ServingError: it is of a kind that is not served, or is not compatible.
        """
        version = self._unchanged_version(checkpoint)
        if version is not None:
            return version
        origin = _checkpoint_folder(checkpoint)
        check_servable(origin)
        if compatible_with is not None:
            check_compatible(origin, self.folder_of(compatible_with), capacity=self.lora_capacity())
        try:
            with self._staging_folder() as staging_folder:
                content = _copy(origin, staging_folder)
                duplicate = self._find_by_content(content)
                if duplicate is not None:
                    return self._record_origin(duplicate, origin)
                if (model := ModelFolder(origin)).is_adapter:
                    self._keep_base(model.base)
                return self._store_version(staging_folder, origin, content, parent)
        except OSError as error:
            raise CheckpointError(f"{origin} cannot be copied into {self.folder}: {error}") from error

    def versions(self) -> list[Version]:
        """All versions, sorted by number."""
        return [self.version(number) for number in self._numbers()]

    def version(self, number: int) -> Version:
        """The record of a version.

        Raises:
            ServingError: there is no version of that number.
            CheckpointError: the record's file is missing or damaged.
        """
        file = self.folder_of(number).with_suffix(".json")
        version = read_file(file, VERSIONS)
        if version is None:
            raise CheckpointError(f"{file} is missing")
        return version

    def folder_of(self, number: int) -> Path:
        """The absolute path of the folder with a version's files. No other version ever has the same path.

        Raises:
            ServingError: there is no version of that number.
        """
        folder = self._version_folder(number)
        if not folder.is_dir():
            numbers = ", ".join(map(str, self._numbers())) or "none"
            raise ServingError(f"there is no version {number}; there are {numbers}")
        return folder

    def lora_capacity(self) -> LoraCapacity | None:
        """The capacity that an engine needs to hold any adapter of this registry; None if there are no adapters.

        An engine with capacity for the current version alone could not return to a larger one.
        """
        folders = [folder for folder in map(self._version_folder, self._numbers()) if ModelFolder(folder).is_adapter]
        return capacity_for(adapter_of(folder, folder.name) for folder in folders) if folders else None

    def verify(self, number: int) -> None:
        """Reads all files of a version and compares their hashes. A file that this process has read before is read
        again only if its size, times or inode have changed.

        Raises:
            ServingError: there is no version of that number.
            CheckpointError: a file is missing or has changed; the message names it.
        """
        ModelFolder(self.folder_of(number)).verify(only_model=True)

    def delete(self, number: int) -> int:
        """Deletes a version's files, and its base model if only this version needs the copy; returns the bytes freed.

        The record of the version stays, and its number is never given to another version.

        Raises:
            ServingError: there is no version of that number, or it is in use: it answers, a rollback returns to it, it
                is the canary, or it is about to answer.
            CheckpointError: its files cannot be deleted.
        """
        with self._staging_folder():
            trash = self._versions_folder / f".{number:05d}.deleted"
            self._replace_state(lambda state: self._retire(state, number, trash))
            freed_bytes = _delete_folder(trash)
            for base in self._unused_bases():
                freed_bytes += _delete_folder(base)
            return freed_bytes

    def _retire(self, state: State, number: int, trash: Path) -> State:
        """Moves a version that nothing needs into `trash`; returns the state without it."""
        folder, change = self.folder_of(number), state.change()
        uses = {
            state.current: "it answers",
            state.previous: "`raylign rollback` returns to it",
            state.canary: "it is being tried",
            change.number if change else None: "it is about to answer",
        }
        if number in uses:
            raise ServingError(f"version {number} cannot be deleted: {uses[number]}")
        folder.with_suffix(".deleted").touch()
        folder.rename(trash)
        return replace(state, older=tuple(older_number for older_number in state.older if older_number != number))

    def _unused_bases(self) -> list[Path]:
        used = {Path(base).name for version in self.versions() if (base := version.base) is not None}
        return [base for base in self._bases_folder.glob("*") if base.name not in used]

    def state(self) -> State:
        """Which versions answer at present. Reads one small file.

        Raises:
            CheckpointError: the file is damaged.
        """
        return read_file(self._state_file, STATES) or State()

    def promote(self, number: int) -> State:
        """Makes a version the current one and ends any canary. Promoting the current version only ends the canary.

        This method is for a registry that no endpoint uses; `serving.promotion` changes the versions of a running
        endpoint.

        Raises:
            ChangeUnderWay: another change is in progress.
            ServingError: there is no version of that number.
        """
        return self._update(lambda state: _promote(state, self.version(number).number))

    def canary(self, number: int, share: float) -> State:
        """Makes a version the canary with a share of the requests, or changes the share of the present canary.

        Raises:
            ChangeUnderWay: another change is in progress.
            ServingError: there is no version of that number, it is the current one, there is another canary, or the
                share is not from 0 to below 1.
        """
        return self._update(lambda state: _start_canary(state, self.version(number).number, share))

    def end_canary(self) -> State:
        """Ends the canary: the current version answers its share of the requests again.

        Raises:
            ChangeUnderWay: another change is in progress.
        """
        return self._update(_without_canary)

    def rollback(self) -> State:
        """Undoes the newest change.

        If there is a canary, only the canary ends. Otherwise the previous version answers again. Each further rollback
        goes one version further back: after versions 1, 2 and 3 were promoted, the first returns to 2, the second to 1,
        and the third is refused.

        Raises:
            ChangeUnderWay: another change is in progress.
            ServingError: there is no previous version.
        """
        return self._update(self._roll_back)

    def begin_change(self, number: int, share: float | None = None, *, started_by: str = "") -> PendingChange:
        """Announces that a version will answer, so that replicas can load it. Until the commit nothing changes for
        requests.

        There is one change at a time over all processes. Its process must renew it every few seconds and ends it by
        `commit_change` or `abort_change`. A change that is not renewed for `HEARTBEAT_TIMEOUT_S` counts as ended.

        Args:
            share: fraction of the requests, as a canary; None for all requests.
            started_by: name of the key that requested it.

        Raises:
            ChangeUnderWay: another change is in progress.
            ServingError: as for `promote` and `canary`.
        """
        return self._begin(lambda state: PendingChange(number=number, share=share), started_by)

    def begin_rollback(self, *, started_by: str = "") -> PendingChange:
        """Announces that the previous version will answer again; otherwise as `begin_change`.

        Raises:
            ChangeUnderWay: another change is in progress.
            ServingError: there is no previous version.
        """
        return self._begin(lambda state: PendingChange(number=_previous_number(state), is_rollback=True), started_by)

    def renew_change(self, token: str) -> None:
        """Renews a change: its process is still at work.

        Raises:
            ServingError: the change has ended, because it was not renewed in time and another process began its own.
        """

        def renew(state: State) -> State:
            return replace(state, pending=replace(_own_change(state, token), heartbeat=time.time()))

        self._replace_state(renew)

    def commit_change(self, token: str) -> State:
        """Carries out a change for which every replica is ready.

        Raises:
            ServingError: the change has ended, because it was not renewed in time and another process began its own; or
                the versions that answer are no longer those that it began from.
        """
        return self._replace_state(lambda state: replace(self._apply(state, _own_change(state, token)), pending=None))

    def abort_change(self, token: str) -> State:
        """Ends a change without any effect. If it has ended already, nothing happens."""

        def abort(state: State) -> State:
            is_own = state.pending is not None and state.pending.token == token
            return replace(state, pending=None) if is_own else state

        return self._replace_state(abort)

    def _begin(self, choose: Callable[[State], PendingChange], started_by: str) -> PendingChange:
        """Announces the change that `choose` makes of the present state."""

        def announce(state: State) -> State:
            _check_no_change(state)
            time_s, token = time.time(), secrets.token_hex(16)
            change = replace(choose(state), token=token, started_by=started_by, began=time_s, heartbeat=time_s)
            self._apply(state, change)  # so that an impossible change is refused at once
            return replace(state, pending=change)

        change = self._replace_state(announce).pending
        assert change is not None
        return change

    def _apply(self, state: State, change: PendingChange) -> State:
        """The state after a change."""
        self.version(change.number)
        if change.is_rollback:
            if change.number != state.previous:
                raise ServingError(f"version {change.number} is not the one before any more")
            return self._roll_back(_without_canary(state))
        if change.share is not None:
            return _start_canary(state, change.number, change.share)
        return _promote(state, change.number)

    def _roll_back(self, state: State) -> State:
        """The state after a rollback."""
        if state.canary is not None:
            return _without_canary(state)
        current = self.version(_previous_number(state)).number
        previous = state.older[0] if state.older else None
        return replace(state, current=current, previous=previous, older=state.older[1:])

    def _update(self, transition: Callable[[State], State]) -> State:
        """Changes the versions that answer, in one step."""

        def update(state: State) -> State:
            _check_no_change(state)
            return replace(transition(state), pending=None)

        return self._replace_state(update)

    def _replace_state(self, transition: Callable[[State], State]) -> State:
        """Replaces the state, one process at a time. `serial` counts only changes of the versions that answer."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".state.lock"):
                state = self.state()
                new_state = transition(state)
                if replace(new_state, pending=state.pending) != state:
                    new_state = replace(new_state, serial=state.serial + 1)
                if new_state != state:
                    write_durably(self._state_file, STATES.dump_json(new_state, indent=1))
                return new_state
        except OSError as error:
            raise CheckpointError(f"{self._state_file} cannot be written: {error}") from error

    @contextmanager
    def _staging_folder(self) -> Iterator[Path]:
        """An empty folder for the copy of a new version, one at a time. Its lock is not the lock of the state, so that
        a rollback never waits for a copy."""
        self._versions_folder.mkdir(parents=True, exist_ok=True)
        staging_folder = self._versions_folder / ".unfinished"
        with FileLock(self.folder / ".adding.lock"):
            shutil.rmtree(staging_folder, ignore_errors=True)  # left by a process that was killed
            for trash in self._versions_folder.glob(".*.deleted"):
                _delete_folder(trash)
            staging_folder.mkdir()
            try:
                yield staging_folder
            finally:
                shutil.rmtree(staging_folder, ignore_errors=True)

    def _unchanged_version(self, checkpoint: Path) -> Version | None:
        """The version of a checkpoint, if neither has changed since the copy. The files themselves are not read."""
        with suppress(OSError, RuntimeError, ValueError):
            origin = _newest_checkpoint(checkpoint.expanduser().resolve())
            for version in reversed(self.versions()):
                folder = self._version_folder(version.number)
                if version.source == str(origin) and version.stamp == _files_stamp(origin, folder):
                    return version
        return None

    def _record_origin(self, version: Version, origin: Path) -> Version:
        """Records that the files of a version also exist in another folder, or have other times."""
        folder = self._version_folder(version.number)
        if origin == folder:
            return version
        updated_version = replace(version, stamp=_files_stamp(origin, folder), source=str(origin))
        write_durably(folder.with_suffix(".json"), VERSIONS.dump_json(updated_version, indent=1))
        return updated_version

    def _keep_base(self, base: str) -> None:
        """Copies a base model that exists only in the cache of this machine."""
        folder = Path(base)
        if not is_merged(folder) or not folder.is_dir() or (self._bases_folder / folder.name).is_dir():
            return
        self._bases_folder.mkdir(exist_ok=True)
        staging_folder = self._versions_folder / ".unfinished-base"
        shutil.rmtree(staging_folder, ignore_errors=True)
        staging_folder.mkdir()
        _copy(folder, staging_folder)
        staging_folder.rename(self._bases_folder / folder.name)
        flush_to_disk(self._bases_folder)

    def _find_by_content(self, content: str) -> Version | None:
        """The intact version with this content hash, if there is one."""
        for number in self._numbers():
            with suppress(CheckpointError, OSError):  # a damaged version is passed over: a new copy replaces it
                if ModelFolder(self._version_folder(number)).commit_mark == content:
                    self.verify(number)
                    return self.version(number)
        return None

    def _store_version(self, staging_folder: Path, origin: Path, content: str, parent: int | None) -> Version:
        """Gives a complete copy its number, writes its record, and moves it to its final place."""
        model = ModelFolder(origin)
        base = model.base if model.is_adapter else None
        version = Version(
            number=max([0, *self._numbers(), *self._deleted_numbers()]) + 1,
            name=name_of(str(origin)),
            kind=model.kind,
            base=base,
            content=content,
            source=str(origin),
            parent=parent,
            stamp=_files_stamp(origin, staging_folder),
            base_stamp=None if base is None else base_stamp(base),
            created=time.time(),
            **_training_history(origin),
        )
        folder = self._version_folder(version.number)
        write_durably(folder.with_suffix(".json"), VERSIONS.dump_json(version, indent=1))
        staging_folder.rename(folder)
        flush_to_disk(self._versions_folder)
        return version

    def _version_folder(self, number: int) -> Path:
        return self._versions_folder / f"{number:05d}"

    def _deleted_numbers(self) -> list[int]:
        return [int(file.stem) for file in self._versions_folder.glob("[0-9]*.deleted")]

    def _numbers(self) -> list[int]:
        folders = self._versions_folder.glob("[0-9]*")
        return sorted(int(folder.name) for folder in folders if folder.name.isdecimal() and folder.is_dir())


def name_of(checkpoint: str) -> str:
    """The name of a checkpoint: that of its run, folder or hub id."""
    path = Path(checkpoint).expanduser().resolve()
    if not path.is_dir():
        return checkpoint
    if run_folder := RunFolder.of_checkpoint(path):
        return f"{run_folder.path.name}-{path.name}"
    return BUNDLED if is_bundled(path) else path.name


def _promote(state: State, number: int) -> State:
    if number == state.current:
        return _without_canary(state)
    older = state.older if state.previous is None else (state.previous, *state.older)
    previous = state.current or None
    return replace(_without_canary(state), current=number, previous=previous, older=older[:MAX_PREVIOUS_VERSIONS])


def _previous_number(state: State) -> int:
    if state.previous is None:
        raise ServingError(f"nothing answered before version {state.current}, so there is nothing to go back to")
    return state.previous


def _check_no_change(state: State) -> None:
    change = state.change()
    if change is not None:
        raise ChangeUnderWay(f"{change}; versions are changed one after the other, so try again when it has ended")


def _own_change(state: State, token: str) -> PendingChange:
    if state.pending is None or state.pending.token != token:
        raise ServingError(
            f"the change has been given up, since its process was silent for {HEARTBEAT_TIMEOUT_S:g} s and longer; "
            "try again"
        )
    return state.pending


def format_time(time_s: float) -> str:
    """A time (seconds since 1970, UTC) for people to read."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time_s)) + " UTC"


def _start_canary(state: State, number: int, share: float) -> State:
    if not 0 <= share < 1:
        raise ServingError(f"the share of a canary is from 0 to below 1, not {share:g}; to give it all, promote it")
    if number == state.current:
        raise ServingError(f"version {number} answers already, so it cannot be tried beside itself")
    if state.canary not in (None, number):
        raise ServingError(f"version {state.canary} is being tried already; promote it first, or roll it back")
    return replace(state, canary=number, share=share)


def _without_canary(state: State) -> State:
    return replace(state, canary=None, share=0.0)


def _checkpoint_folder(checkpoint: Path) -> Path:
    try:
        origin = Path(checkpoint_or_path(str(checkpoint))).expanduser().resolve()
        if origin.is_dir():
            return origin
    except (OSError, RuntimeError, ValueError):
        pass  # not a valid path: it is too long, or names a user who does not exist
    raise CheckpointError(f"{str(checkpoint)[:200]} is not a folder here (looked from {Path.cwd()})")


def _copy(origin: Path, target: Path) -> str:
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


def _delete_folder(folder: Path) -> int:
    """Deletes a folder; returns the bytes freed. A file with another hard link frees none."""
    freed_bytes = sum(
        status.st_size for file in folder.rglob("*") if (status := file.lstat()).st_nlink == 1 and file.is_file()
    )
    shutil.rmtree(folder)
    return freed_bytes


def _newest_checkpoint(checkpoint: Path) -> Path:
    """The folder that a path stands for: a run's newest committed checkpoint, else the path itself."""
    folders = RunFolder.at(checkpoint).checkpoints()
    return next((folder for folder in folders if ModelFolder(folder).commit_mark), checkpoint)


def _files_stamp(*folders: Path) -> str:
    """A hash that changes when a file of the folders is written, replaced, added or deleted."""
    files = ((file.name, file.stat()) for folder in folders for file in sorted(folder.iterdir()) if file.is_file())
    fingerprints = [(name, status.st_size, status.st_mtime_ns, status.st_ino) for name, status in files]
    return hashlib.sha256(repr(fingerprints).encode()).hexdigest()


def _training_history(origin: Path) -> dict[str, Any]:
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


def read_file(file: Path, kind: TypeAdapter[Content]) -> Content | None:
    """Reads and checks a JSON file; None if there is no such file."""
    try:
        return kind.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: it does not hold what was written there") from error
