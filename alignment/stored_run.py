"""A run in its storage: its checkpoints, which are uploaded beside the loop, and what a resumed run takes as it was."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from alignment.errors import CheckpointError, StorageError
from alignment.models.model_folder import ModelFolder
from alignment.settings.run import RunConfig
from alignment.storage import CHECKPOINTS, StoredFolders

logger = logging.getLogger(__name__)

INPUTS = "inputs"
"""Stored folder with the day of the run and the rows of its live sources."""


class StoredRun:
    """A run's checkpoints in its storage. Without a storage, and on all workers but the main one, it does nothing.

    One checkpoint at a time is uploaded, in a thread, while the loop goes on; the next one waits for it. An upload that
    fails is counted and logged, because the next one makes up for it; only the last one must succeed.
    """

    def __init__(self, config: RunConfig, *, is_main: bool) -> None:
        """Opens the storage.

        Raises:
            ConfigError: it cannot be opened.
        """
        self._run_folder, self._keep = config.run_folder, config.checkpoint.keep
        self._folders: StoredFolders | None = None
        storage = config.checkpoint.storage
        if is_main and storage is not None:
            url = f"{storage.url.rstrip('/')}/{config.name}/{CHECKPOINTS}"
            self._folders = StoredFolders.open(url, name=storage.name, arguments=storage.arguments)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.num_failed_uploads = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Waits for the upload that is going on. Whoever interrupts the run does not wait: it stays incomplete."""
        if kind is None or issubclass(kind, Exception):
            self.wait()

    @property
    def url(self) -> str | None:
        """Where the checkpoints are stored; None if they are not."""
        return None if self._folders is None else self._folders.url

    def try_out(self, file: Path) -> None:
        """Tries with a small file whether the storage takes and gives files.

        Raises:
            StorageError: it does not.
        """
        if self._folders is not None:
            self._folders.try_out(file)

    def newest_checkpoint(self) -> Path | None:
        """The newest intact checkpoint of the run's folder, or a newer one, which is downloaded into that folder.

        Raises:
            StorageError: the storage does not answer. An older checkpoint is not taken for that.
        """
        local = self._run_folder.newest_intact()
        if self._folders is None:
            return local
        self.wait()
        for name in self._folders.checkpoints():
            if local is not None and name <= local.name:
                break
            folder = self._run_folder.checkpoints_folder / name
            try:
                logger.warning("downloading %s/%s to %s", self.url, name, folder)
                self._folders.fetch(name, folder)
                return folder
            except StorageError:
                raise
            except CheckpointError as damage:
                logger.warning("%s; trying the one before", damage)
        return local

    def fetch_inputs(self) -> None:
        """Downloads what a resumed run takes as it was, if the run's folder has none of it.

        Raises:
            CheckpointError: it is damaged, or the storage does not answer.
        """
        run_folder = self._run_folder
        if self._folders is None or run_folder.date_file.exists() or self._folders.commit_mark(INPUTS) is None:
            return
        copy = run_folder.path / f".{INPUTS}"
        self._folders.fetch(INPUTS, copy)
        for path in (run_folder.rows_folder, run_folder.date_file):  # the day comes last, as it is looked for above
            if (copy / path.name).exists() and not path.exists():
                (copy / path.name).rename(path)
        shutil.rmtree(copy)

    def store_inputs(self) -> None:
        """Uploads what a resumed run takes as it was, unless it is there.

        Raises:
            StorageError: the storage does not take it.
        """
        if self._folders is None:
            return
        run_folder = self._run_folder
        copy = run_folder.path / f".{INPUTS}"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        try:
            shutil.copy2(run_folder.date_file, copy)
            if run_folder.rows_folder.is_dir():
                shutil.copytree(run_folder.rows_folder, copy / run_folder.rows_folder.name)
            if ModelFolder(copy).commit() != self._folders.commit_mark(INPUTS):
                self._folders.upload(copy, INPUTS)
        finally:
            shutil.rmtree(copy)

    def complete(self, folder: Path) -> None:
        """Begins to upload the checkpoint that a run resumes from, unless the storage has it.

        Raises:
            StorageError: the storage does not answer.
        """
        if self._folders is not None and self._folders.commit_mark(folder.name) != ModelFolder(folder).commit_mark:
            self.upload(folder)

    def upload(self, folder: Path) -> None:
        """Begins to upload a checkpoint of the run's folder, when the upload before has ended."""
        if self._folders is None:
            return
        self.wait()
        self._thread = threading.Thread(
            target=self._upload, args=(self._folders, folder), name=f"upload of {folder.name}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until no checkpoint is being uploaded; then any of the run's folder may be deleted."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Waits for the last upload.

        Raises:
            StorageError: it has failed.
        """
        self.wait()
        if self._error is not None:
            raise StorageError(
                f"the last checkpoint is complete in {self._run_folder.checkpoints_folder}, and not in {self.url}: "
                f"{self._error}. Start the run again, and it is uploaded"
            ) from self._error

    def _upload(self, folders: StoredFolders, folder: Path) -> None:
        """Uploads a checkpoint and deletes old ones; runs in the thread."""
        try:
            folders.upload(folder)
            self._error = None
        except Exception as error:  # beside the storage's: a file of ours that cannot be read
            self._error = error
            self.num_failed_uploads += 1
            logger.warning("%s was not uploaded (failed uploads: %d): %s", folder, self.num_failed_uploads, error)
            return
        try:
            folders.prune(folder.name, self._keep)
        except StorageError as error:
            logger.warning("older checkpoints are not deleted: %s", error)
