"""The versions of the served model: complete copies of checkpoints, and a small file that says which of them answers.

checkpoint ─► add ─► versions/00003/ ─► promote, or canary ─► state.json ─► every replica

REGISTRY/versions/00001.json   the record of a version
REGISTRY/versions/00001/       the files that transformers, peft and vLLM open, manifest.json and COMMITTED; this folder
                               appears last and complete, and only then does the version exist
REGISTRY/versions/00001.deleted  the mark of a deleted version: its number is never given to another version
REGISTRY/bases/                base models of adapters that would otherwise exist only in the cache of one machine
REGISTRY/state.json            which version answers, the versions before it, the canary, and the change in progress
REGISTRY/lease.json            the endpoint that the registry belongs to (see `serving.registry.lease`)

The folder must be readable by every replica. A process that is killed leaves the registry readable: each file is
written completely or not at all, the next `add` removes unfinished copies, and the operating system frees the locks.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import TypeAdapter

from alignment.errors import CheckpointError, ServingError
from alignment.files import flush_to_disk, write_durably
from alignment.models.cache import is_merged
from alignment.models.model_folder import KEPT_BASES, ModelFolder
from serving.registry.bases import base_stamp
from serving.registry.checkpoints import (
    checkpoint_folder,
    copy_model,
    delete_folder,
    files_stamp,
    name_of,
    newest_checkpoint,
    training_history,
)
from serving.registry.compatibility import LoraCapacity, adapter_of, capacity_for, check_compatible, check_servable
from serving.registry.state import PendingChange, State, read_file


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
    known. See `serving.registry.bases.base_stamp`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The run's last evaluation before the checkpoint, under the names in metrics.jsonl, with its `step`."""
    created: float
    """Time at which it was added (seconds since 1970, UTC)."""


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
        origin = checkpoint_folder(checkpoint)
        check_servable(origin)
        if compatible_with is not None:
            check_compatible(origin, self.folder_of(compatible_with), capacity=self.lora_capacity())
        try:
            with self._staging_folder() as staging_folder:
                content = copy_model(origin, staging_folder)
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
            freed_bytes = delete_folder(trash)
            for base in self._unused_bases():
                freed_bytes += delete_folder(base)
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

        This method is for a registry that no endpoint uses; `serving.registry.promotion` changes the versions of a
        running endpoint.

        Raises:
            ChangeUnderWay: another change is in progress.
            ServingError: there is no version of that number.
        """
        return self._update(lambda state: state.promote(self.version(number).number))

    def canary(self, number: int, share: float) -> State:
        """Makes a version the canary with a share of the requests, or changes the share of the present canary.

        Raises:
            ChangeUnderWay: another change is in progress.
            ServingError: there is no version of that number, it is the current one, there is another canary, or the
                share is not from 0 to below 1.
        """
        return self._update(lambda state: state.start_canary(self.version(number).number, share))

    def end_canary(self) -> State:
        """Ends the canary: the current version answers its share of the requests again.

        Raises:
            ChangeUnderWay: another change is in progress.
        """
        return self._update(State.end_canary)

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
        return self._begin(lambda state: PendingChange(number=state.rollback_target(), is_rollback=True), started_by)

    def renew_change(self, token: str) -> None:
        """Renews a change: its process is still at work.

        Raises:
            ServingError: the change has ended, because it was not renewed in time and another process began its own.
        """

        def renew(state: State) -> State:
            return replace(state, pending=replace(state.own_change(token), heartbeat=time.time()))

        self._replace_state(renew)

    def commit_change(self, token: str) -> State:
        """Carries out a change for which every replica is ready.

        Raises:
            ServingError: the change has ended, because it was not renewed in time and another process began its own; or
                the versions that answer are no longer those that it began from.
        """
        return self._replace_state(lambda state: replace(self._apply(state, state.own_change(token)), pending=None))

    def abort_change(self, token: str) -> State:
        """Ends a change without any effect. If it has ended already, nothing happens."""

        def abort(state: State) -> State:
            is_own = state.pending is not None and state.pending.token == token
            return replace(state, pending=None) if is_own else state

        return self._replace_state(abort)

    def _begin(self, choose: Callable[[State], PendingChange], started_by: str) -> PendingChange:
        """Announces the change that `choose` makes of the present state."""

        def announce(state: State) -> State:
            state.check_no_change()
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
            return self._roll_back(state.end_canary())
        if change.share is not None:
            return state.start_canary(change.number, change.share)
        return state.promote(change.number)

    def _roll_back(self, state: State) -> State:
        """The state after a rollback."""
        if state.canary is not None:
            return state.end_canary()
        current = self.version(state.rollback_target()).number
        previous = state.older[0] if state.older else None
        return replace(state, current=current, previous=previous, older=state.older[1:])

    def _update(self, transition: Callable[[State], State]) -> State:
        """Changes the versions that answer, in one step."""

        def update(state: State) -> State:
            state.check_no_change()
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
                delete_folder(trash)
            staging_folder.mkdir()
            try:
                yield staging_folder
            finally:
                shutil.rmtree(staging_folder, ignore_errors=True)

    def _unchanged_version(self, checkpoint: Path) -> Version | None:
        """The version of a checkpoint, if neither has changed since the copy. The files themselves are not read."""
        with suppress(OSError, RuntimeError, ValueError):
            origin = newest_checkpoint(checkpoint.expanduser().resolve())
            for version in reversed(self.versions()):
                folder = self._version_folder(version.number)
                if version.source == str(origin) and version.stamp == files_stamp(origin, folder):
                    return version
        return None

    def _record_origin(self, version: Version, origin: Path) -> Version:
        """Records that the files of a version also exist in another folder, or have other times."""
        folder = self._version_folder(version.number)
        if origin == folder:
            return version
        updated_version = replace(version, stamp=files_stamp(origin, folder), source=str(origin))
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
        copy_model(folder, staging_folder)
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
            stamp=files_stamp(origin, staging_folder),
            base_stamp=None if base is None else base_stamp(base),
            created=time.time(),
            **training_history(origin),
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
