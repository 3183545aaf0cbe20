"""Versions of the served model: whole copies of checkpoints, and a small file that says which of them answers.

checkpoint ─► add ─► versions/00003/ ─► promote, or canary ─► state.json ─► every replica

REGISTRY/versions/00001.json   what is known about a version
REGISTRY/versions/00001/       the files that transformers, peft and vLLM open, manifest.json and COMMITTED; it appears
                               last and whole, and with it the version
REGISTRY/versions/00001.deleted  of a version that was deleted: its number is given to no other one
REGISTRY/bases/                base models of adapters that lie nowhere else than in the cache of one machine
REGISTRY/state.json            which version answers, those before it, the canary, and what is under way
REGISTRY/lease.json            which endpoint it belongs to (see `serving.lease`)

The folder lies where every replica can read it. A process that is killed leaves it readable: files appear whole or not
at all, what is unfinished is cleared away by the next `add`, and the system frees the locks.
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

from alignment.checkpoint import (
    COMMITTED,
    MANIFEST,
    STATE,
    checkpoint_or_path,
    checkpoints_of,
    commit,
    to_disk,
    verify,
)
from alignment.errors import CheckpointError, ServingError
from alignment.metrics import read_metrics
from alignment.models.folders import BUNDLED, KEPT_BASES, base_of, bundled_folder, is_adapter, is_merged
from serving.bases import base_stamp
from serving.fits import Room, adapter_of, check_fits, check_servable, room_for, weight_files

__all__ = ["ChangeUnderWay", "PendingChange", "Registry", "State", "Version", "check_fits"]

COPIED = (".json", ".jinja", ".model", ".safetensors", ".tiktoken", ".txt")
"""Endings of the files that belong to a model; trainer state, pickles and programs do not."""
READ_ONLY = 0o444
"""Mode of a version's files: who writes over one by mistake is refused (not root, who may write anywhere)."""
COPIED_BYTES = 2**30
"""That are copied in one call."""
REMEMBERED = 100
"""Versions that rollbacks can go back over."""
SILENT_S = 30.0
"""Seconds without a heartbeat after which a change that was under way counts for nothing."""

Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class Version:
    """One model that the endpoint can answer with."""

    number: int
    """1, 2, … in the order of arrival."""
    name: str
    """What the checkpoint was called, as `demo-step-00000024`."""
    kind: Literal["adapter", "full"]
    """A LoRA adapter on a base model, or all weights."""
    base: str | None
    """Folder or hub id of an adapter's base model; None for all weights."""
    content: str
    """sha256 (hex) over names, sizes and hashes of its files."""
    source: str
    """Folder that it was copied from."""
    parent: int | None
    """The version that it is meant to follow; None for the first."""
    data: str | None
    """Fingerprint of the data that it was trained on; None if the checkpoint does not say."""
    config: dict[str, Any] | None
    """Configuration of the run that made it; None if the checkpoint lies in no run."""
    stamp: str | None = None
    """Names, sizes, times and places of its files and of those that it was copied from, hashed: what tells at the next
    start whether they are still the same, without reading them."""
    base_stamp: str | None = None
    """What tells the base model from another one in its place; None if nobody knows. See `serving.bases.base_stamp`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The run's last evaluation before the checkpoint, by the names in metrics.jsonl, with its `step`."""
    created: float
    """When it was added (seconds since 1970, UTC)."""


@dataclass(frozen=True, kw_only=True)
class PendingChange:
    """A promotion, canary or rollback that is under way, and has not been committed."""

    number: int
    """The version that is to answer."""
    share: float | None = None
    """Of the requests, as a canary; None if it is to become the current one."""
    is_rollback: bool = False
    """Whether it is the version before that answers again."""
    token: str = ""
    """Which of the processes that change versions it belongs to."""
    started_by: str = ""
    """Name of the key that asked for it."""
    began: float = 0.0
    """When it was asked for (seconds since 1970, UTC)."""
    heartbeat: float = 0.0
    """When the process that carries it out was last heard of (seconds since 1970, UTC)."""

    def __str__(self) -> str:
        kind = "the rollback to" if self.is_rollback else "the promotion of" if self.share is None else "the trial of"
        asker = f", which {self.started_by} asked for" if self.started_by else ""
        return f"{kind} version {self.number}{asker}, is under way since {clock(self.began)}"


class ChangeUnderWay(ServingError):
    """Versions cannot be changed, because another change has not ended."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Which versions answer requests."""

    current: int = 0
    """Number of the version that answers; 0 before one was promoted."""
    previous: int | None = None
    """The one that a rollback returns to; None if there is none."""
    older: tuple[int, ...] = ()
    """Those that further rollbacks return to, the newest first."""
    canary: int | None = None
    """The version that is tried out."""
    share: float = 0.0
    """Fraction of the requests that the canary answers, 0 to below 1; at 0 it answers those that ask for it."""
    serial: int = 0
    """Changes so far of what answers."""
    pending: PendingChange | None = None
    """What is under way; it counts for nothing any more once its process is silent."""

    def change(self, now: float | None = None) -> PendingChange | None:
        """What is under way, if its process was heard of lately.

        Args:
            now: seconds since 1970 (UTC); None is the present.
        """
        if self.pending is None:
            return None
        silent_s = (time.time() if now is None else now) - self.pending.heartbeat
        return self.pending if silent_s < SILENT_S else None


VERSIONS, STATES = TypeAdapter(Version), TypeAdapter(State)


class Registry:
    """Versions in a folder. Safe to use from several processes and threads at once; makes the folder when it writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()
        self._versions = self.folder / "versions"
        self._bases = self.folder / KEPT_BASES
        self._state = self.folder / "state.json"

    def add(self, checkpoint: Path, *, parent: int | None = None, fits: int | None = None) -> Version:
        """Keeps a checkpoint as a new version, or returns the version that holds the same files already.

        It answers nothing before it is promoted. What becomes of the checkpoint afterwards does not matter.

        Args:
            checkpoint: a run's folder (its newest intact checkpoint), a checkpoint, or any model or adapter folder.
            parent: number of the version that it is meant to follow.
            fits: number of a version that running engines must be able to change from; None asks for nothing.

        Raises:
            CheckpointError: it is not there, damaged or incomplete, or cannot be copied.
            ModelError: it is an adapter whose base model is not there.
            ServingError: it is of a kind that is not served, or does not fit.
        """
        known = self._known(checkpoint)
        if known is not None:
            return known
        origin = _folder(checkpoint)
        check_servable(origin)
        if fits is not None:
            check_fits(origin, self.folder_of(fits), room=self.room())
        try:
            with self._adding() as unfinished:
                content = _copy(origin, unfinished)
                same = self._same(content)
                if same is not None:
                    return self._noted(same, origin)
                if is_adapter(origin):
                    self._keep_base(base_of(origin))
                return self._keep(unfinished, origin, content, parent)
        except OSError as error:
            raise CheckpointError(f"{origin} cannot be copied into {self.folder}: {error}") from error

    def versions(self) -> list[Version]:
        """All versions, in the order of their numbers."""
        return [self.version(number) for number in self._numbers()]

    def version(self, number: int) -> Version:
        """What is known about a version.

        Raises:
            ServingError: there is none of that number.
            CheckpointError: its file is missing or damaged.
        """
        file = self.folder_of(number).with_suffix(".json")
        version = read_file(file, VERSIONS)
        if version is None:
            raise CheckpointError(f"{file} is missing")
        return version

    def folder_of(self, number: int) -> Path:
        """The folder with a version's files: an absolute path that no other version ever has.

        Raises:
            ServingError: there is none of that number.
        """
        folder = self._place(number)
        if not folder.is_dir():
            known = ", ".join(map(str, self._numbers())) or "none"
            raise ServingError(f"there is no version {number}; there are {known}")
        return folder

    def room(self) -> Room | None:
        """What every engine needs to be able to hold any of the adapters here; None if there are none.

        An engine with room for the current version alone could not go back to a larger one.
        """
        folders = [self._place(number) for number in self._numbers() if is_adapter(self._place(number))]
        return room_for(adapter_of(folder, folder.name) for folder in folders) if folders else None

    def verify(self, number: int) -> None:
        """Reads all of a version's files and compares their hashes. What this process has read before is read again
        only if its size, its times or its place on the disk are others.

        Raises:
            ServingError: there is none of that number.
            CheckpointError: a file is missing or has changed; the text names it.
        """
        verify(self.folder_of(number), only_model=True)

    def delete(self, number: int) -> int:
        """Deletes a version's files, and the base model that is kept for it alone; returns the bytes that were freed.

        What is known about it stays, and its number is given to no other one.

        Raises:
            ServingError: there is none of that number, or it is needed: it answers, a rollback returns to it, it is
                being tried, or is about to answer.
            CheckpointError: its files cannot be deleted.
        """
        with self._adding():
            gone = self._versions / f".{number:05d}.deleted"
            self._move(lambda now: self._without(now, number, gone))
            freed = _delete(gone)
            for base in self._unused_bases():
                freed += _delete(base)
            return freed

    def _without(self, now: State, number: int, gone: Path) -> State:
        folder, change = self.folder_of(number), now.change()
        uses = {
            now.current: "it answers",
            now.previous: "`raylign rollback` returns to it",
            now.canary: "it is being tried",
            change.number if change else None: "it is about to answer",
        }
        if number in uses:
            raise ServingError(f"version {number} cannot be deleted: {uses[number]}")
        folder.with_suffix(".deleted").touch()
        folder.rename(gone)
        return replace(now, older=tuple(other for other in now.older if other != number))

    def _unused_bases(self) -> list[Path]:
        used = {Path(base).name for version in self.versions() if (base := version.base) is not None}
        return [base for base in self._bases.glob("*") if base.name not in used]

    def state(self) -> State:
        """Which version answers now. Reads one small file.

        Raises:
            CheckpointError: the file is damaged.
        """
        return read_file(self._state, STATES) or State()

    def promote(self, number: int) -> State:
        """Makes a version the one that answers, and ends any canary; promoting the current one does only that.

        For a registry whose replicas need not be asked; of a running endpoint, `serving.promotion` changes versions.

        Raises:
            ChangeUnderWay: another change has not ended.
            ServingError: there is none of that number.
        """
        return self._change(lambda now: _promoted(now, self.version(number).number))

    def canary(self, number: int, share: float) -> State:
        """Gives a version a share of the requests, or another share than it has.

        Raises:
            ChangeUnderWay: another change has not ended.
            ServingError: there is none of that number, it is the current one, another canary is being tried, or the
                share is not from 0 to below 1.
        """
        return self._change(lambda now: _tried(now, self.version(number).number, share))

    def end_canary(self) -> State:
        """Gives the canary's share back to the current version.

        Raises:
            ChangeUnderWay: another change has not ended.
        """
        return self._change(_settled)

    def rollback(self) -> State:
        """Takes the newest change back.

        A canary ends, and no more. Without one, the version before answers again; the next rollback goes further back,
        never forth: after versions 1, 2 and 3 were promoted it returns to 2, then to 1, and then refuses.

        Raises:
            ChangeUnderWay: another change has not ended.
            ServingError: there is nothing to go back to.
        """
        return self._change(self._rolled_back)

    def begin_change(self, number: int, share: float | None = None, *, started_by: str = "") -> PendingChange:
        """Announces that a version is to answer, which replicas now make ready; nothing answers differently yet.

        One change at a time, over all processes: what is begun is to be renewed every few seconds, and ends by
        `commit_change` or `abort_change`. What is not renewed for `SILENT_S` has ended.

        Args:
            share: of the requests, as a canary; None for all.
            started_by: who asked for it.

        Raises:
            ChangeUnderWay: another change has not ended.
            ServingError: as `promote` and `canary`.
        """
        return self._begin(lambda now: PendingChange(number=number, share=share), started_by)

    def begin_rollback(self, *, started_by: str = "") -> PendingChange:
        """The same for the version before, which is to answer again.

        Raises:
            ChangeUnderWay: another change has not ended.
            ServingError: there is nothing to go back to.
        """
        return self._begin(lambda now: PendingChange(number=_before(now), is_rollback=True), started_by)

    def renew_change(self, token: str) -> None:
        """Says that whoever carries a change out is still there.

        Raises:
            ServingError: it has ended, as another process has found it silent and begun a change of its own.
        """
        self._move(lambda now: replace(now, pending=replace(_pending(now, token), heartbeat=time.time())))

    def commit_change(self, token: str) -> State:
        """Lets the version answer that every replica has made ready.

        Raises:
            ServingError: the change has ended, as another process has found it silent and begun one of its own; or
                what answers is not what it was.
        """
        return self._move(lambda now: replace(self._carried_out(now, _pending(now, token)), pending=None))

    def abort_change(self, token: str) -> State:
        """Ends a change without any effect; nothing happens if it has ended already."""
        return self._move(lambda now: replace(now, pending=None) if now.pending and now.pending.token == token else now)

    def _begin(self, choose: Callable[[State], PendingChange], started_by: str) -> PendingChange:
        def begun(now: State) -> State:
            _check_settled(now)
            at = time.time()
            change = replace(choose(now), token=secrets.token_hex(16), started_by=started_by, began=at, heartbeat=at)
            self._carried_out(now, change)  # what cannot be is said at once
            return replace(now, pending=change)

        pending = self._move(begun).pending
        assert pending is not None
        return pending

    def _carried_out(self, now: State, change: PendingChange) -> State:
        self.version(change.number)
        if change.is_rollback:
            if change.number != now.previous:
                raise ServingError(f"version {change.number} is not the one before any more")
            return self._rolled_back(_settled(now))
        return _promoted(now, change.number) if change.share is None else _tried(now, change.number, change.share)

    def _rolled_back(self, now: State) -> State:
        if now.canary is not None:
            return _settled(now)
        older = now.older[0] if now.older else None
        return replace(now, current=self.version(_before(now)).number, previous=older, older=now.older[1:])

    def _change(self, change: Callable[[State], State]) -> State:
        """Changes what answers, in one step."""

        def changed(now: State) -> State:
            _check_settled(now)
            return replace(change(now), pending=None)

        return self._move(changed)

    def _move(self, change: Callable[[State], State]) -> State:
        """Replaces the state, one process at a time. What changes nothing that answers is not counted."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".state.lock"):
                now = self.state()
                then = change(now)
                if replace(then, pending=now.pending) != now:
                    then = replace(then, serial=now.serial + 1)
                if then != now:
                    write_file(self._state, STATES.dump_json(then, indent=1))
                return then
        except OSError as error:
            raise CheckpointError(f"{self._state} cannot be written: {error}") from error

    @contextmanager
    def _adding(self) -> Iterator[Path]:
        """An empty folder for a version that arrives, one at a time; its lock is not the state's, so that nobody who
        rolls back waits for a copy."""
        self._versions.mkdir(parents=True, exist_ok=True)
        unfinished = self._versions / ".unfinished"
        with FileLock(self.folder / ".adding.lock"):
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            for deleted in self._versions.glob(".*.deleted"):
                _delete(deleted)
            unfinished.mkdir()
            try:
                yield unfinished
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)

    def _known(self, checkpoint: Path) -> Version | None:
        """The version of a checkpoint that has not changed since, told without reading its files."""
        with suppress(OSError, RuntimeError, ValueError):
            origin = _newest(checkpoint.expanduser().resolve())
            for version in reversed(self.versions()):
                if version.source == str(origin) and version.stamp == _stamp(origin, self._place(version.number)):
                    return version
        return None

    def _noted(self, version: Version, origin: Path) -> Version:
        """A version of which the same files were found in another place, or with another time."""
        folder = self._place(version.number)
        if origin == folder:
            return version
        noted = replace(version, stamp=_stamp(origin, folder), source=str(origin))
        write_file(folder.with_suffix(".json"), VERSIONS.dump_json(noted, indent=1))
        return noted

    def _keep_base(self, base: str) -> None:
        """Copies a base model that another machine, or this one tomorrow, does not have."""
        folder = Path(base)
        if not is_merged(folder) or not folder.is_dir() or (self._bases / folder.name).is_dir():
            return
        self._bases.mkdir(exist_ok=True)
        unfinished = self._versions / ".unfinished-base"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        _copy(folder, unfinished)
        unfinished.rename(self._bases / folder.name)
        to_disk(self._bases)

    def _same(self, content: str) -> Version | None:
        """The intact version with that content, if there is one."""
        for number in self._numbers():
            with suppress(CheckpointError, OSError):  # a damaged one is of no use, and a fresh copy is
                if (self._place(number) / COMMITTED).read_text() == content:
                    self.verify(number)
                    return self.version(number)
        return None

    def _keep(self, unfinished: Path, origin: Path, content: str, parent: int | None) -> Version:
        version = Version(
            number=max([0, *self._numbers(), *self._deleted()]) + 1,
            name=name_of(str(origin)),
            kind="adapter" if is_adapter(origin) else "full",
            base=base_of(origin) if is_adapter(origin) else None,
            content=content,
            source=str(origin),
            parent=parent,
            stamp=_stamp(origin, unfinished),
            base_stamp=base_stamp(base_of(origin)) if is_adapter(origin) else None,
            created=time.time(),
            **_history(origin),
        )
        folder = self._place(version.number)
        write_file(folder.with_suffix(".json"), VERSIONS.dump_json(version, indent=1))
        unfinished.rename(folder)
        to_disk(self._versions)
        return version

    def _place(self, number: int) -> Path:
        return self._versions / f"{number:05d}"

    def _deleted(self) -> list[int]:
        return [int(file.stem) for file in self._versions.glob("[0-9]*.deleted")]

    def _numbers(self) -> list[int]:
        folders = self._versions.glob("[0-9]*")
        return sorted(int(folder.name) for folder in folders if folder.name.isdecimal() and folder.is_dir())


def name_of(checkpoint: str) -> str:
    """What a checkpoint is called: after its run, folder or hub id."""
    path = Path(checkpoint).expanduser().resolve()
    if not path.is_dir():
        return checkpoint
    if path.parent.name == "checkpoints":
        return f"{path.parents[1].name}-{path.name}"
    return BUNDLED if path.name == bundled_folder().name else path.name


def _promoted(now: State, number: int) -> State:
    if number == now.current:
        return _settled(now)
    older = now.older if now.previous is None else (now.previous, *now.older)
    return replace(_settled(now), current=number, previous=now.current or None, older=older[:REMEMBERED])


def _before(now: State) -> int:
    if now.previous is None:
        raise ServingError(f"nothing answered before version {now.current}, so there is nothing to go back to")
    return now.previous


def _check_settled(now: State) -> None:
    change = now.change()
    if change is not None:
        raise ChangeUnderWay(f"{change}; versions are changed one after the other, so try again when it has ended")


def _pending(now: State, token: str) -> PendingChange:
    if now.pending is None or now.pending.token != token:
        raise ServingError(
            f"the change has been given up, since its process was silent for {SILENT_S:g} s and longer; try again"
        )
    return now.pending


def clock(at: float) -> str:
    """A time (seconds since 1970, UTC) as people write it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)) + " UTC"


def _tried(now: State, number: int, share: float) -> State:
    if not 0 <= share < 1:
        raise ServingError(f"the share of a canary is from 0 to below 1, not {share:g}; to give it all, promote it")
    if number == now.current:
        raise ServingError(f"version {number} answers already, so it cannot be tried beside itself")
    if now.canary not in (None, number):
        raise ServingError(f"version {now.canary} is being tried already; promote it first, or roll it back")
    return replace(now, canary=number, share=share)


def _settled(now: State) -> State:
    return replace(now, canary=None, share=0.0)


def _folder(checkpoint: Path) -> Path:
    try:
        origin = Path(checkpoint_or_path(str(checkpoint))).expanduser().resolve()
        if origin.is_dir():
            return origin
    except (OSError, RuntimeError, ValueError):
        pass  # no path at all: too long, or of a user that there is not
    raise CheckpointError(f"{str(checkpoint)[:200]} is not a folder here (looked from {Path.cwd()})")


def _copy(origin: Path, target: Path) -> str:
    """Brings a model's files into an empty folder; returns their content hash.

    Raises:
        CheckpointError: one of ours is not what was committed any more.
    """
    known = _manifest(origin)
    for name in known or [file.name for file in origin.iterdir() if file.is_file()]:
        if _belongs(name, weight_files(origin)):
            _bring((origin / name).resolve(), target / name)
    content = commit(target)
    for file in target.iterdir():
        file.chmod(READ_ONLY)
    changed = [name for name, entry in _manifest(target).items() if known and known[name] != entry]
    if changed:
        raise CheckpointError(f"{origin} changed while it was copied ({', '.join(changed)}); add it again")
    return content


def _manifest(folder: Path) -> dict[str, Any]:
    """Size and hash of every file, by name; empty for a folder that training did not write."""
    file = folder / MANIFEST
    return dict(json.loads(file.read_bytes())) if file.is_file() else {}


def _belongs(name: str, weights: list[str]) -> bool:
    suffix = Path(name).suffix
    if suffix == ".safetensors":
        return name in weights  # some folders hold the same weights in a second form
    return suffix in COPIED and "/" not in name and name != MANIFEST


def _bring(source: Path, target: Path) -> None:
    """Copies a file: a link would be the same file, which changes when the other one is written over.

    Where the file system can share the bytes of two files until one is written to (XFS, Btrfs), or copy them by itself
    (NFS 4.2), it does.
    """
    with source.open("rb") as opened, target.open("xb") as copied:
        try:
            while os.copy_file_range(opened.fileno(), copied.fileno(), COPIED_BYTES):
                pass
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
            opened.seek(0)
            copied.seek(0)
            shutil.copyfileobj(opened, copied, length=2**22)


def _delete(folder: Path) -> int:
    """Returns the bytes that it took on the disk; of a file that lies elsewhere too, none."""
    freed = sum(
        status.st_size for file in folder.rglob("*") if (status := file.lstat()).st_nlink == 1 and file.is_file()
    )
    shutil.rmtree(folder)
    return freed


def _newest(checkpoint: Path) -> Path:
    """The folder that a path means if nothing is damaged: itself, or the newest checkpoint of a run."""
    run = checkpoint.parent if checkpoint.name == checkpoints_of(checkpoint.parent).name else checkpoint
    committed = [folder for folder in checkpoints_of(run).glob("step-*") if (folder / COMMITTED).is_file()]
    return max(committed, default=checkpoint)


def _stamp(*folders: Path) -> str:
    """What changes when a file of the folders is written, replaced, added or deleted."""
    files = ((file.name, file.stat()) for folder in folders for file in sorted(folder.iterdir()) if file.is_file())
    known = [(name, status.st_size, status.st_mtime_ns, status.st_ino) for name, status in files]
    return hashlib.sha256(repr(known).encode()).hexdigest()


def _history(origin: Path) -> dict[str, Any]:
    """What a checkpoint and the run around it say about how it was made."""
    if STATE not in _manifest(origin):
        return {"data": None, "config": None}
    state = json.loads((origin / STATE).read_bytes())
    data, run = state["identity"]["data"], origin.parent.parent
    if origin.parent != checkpoints_of(run):
        return {"data": data, "config": None}
    return {"data": data, "config": _config(run / "config.json"), "metrics": _evaluation(run, state["step"])}


def _config(file: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError):  # none, or the run is starting again and writes it just now
        return None


def _evaluation(run: Path, step: int) -> dict[str, float]:
    """The last figures on held-out data up to a step."""
    for line in reversed(read_metrics(run)):
        found = {name: value for name, value in line.items() if name.startswith("eval/") and math.isfinite(value)}
        if found and line["step"] <= step:
            return {"step": line["step"], **found}
    return {}


def read_file(file: Path, kind: TypeAdapter[Read]) -> Read | None:
    """What a file holds; None if there is no such file."""
    try:
        return kind.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: it does not hold what was written there") from error


def write_file(file: Path, content: bytes) -> None:
    """Replaces a file whole, and waits until it is on the disk. Called under a lock."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    with unfinished.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    unfinished.replace(file)
    to_disk(file.parent)
