"""The thread that writes. Everything that arrives while it waits for the disk becomes its next transaction."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy.engine import Connection, Engine

from serving.feedback.store.opening import WRITES, empty_log, is_fault_of_database, lock, store_error_of
from serving.feedback.store.records import StoreAway, StoreError

T = TypeVar("T")

MAX_BATCH = 256
"""Most writes in one transaction."""
MAX_WAITING = 64 * 2**20
"""Most characters that may wait; further writes are refused."""
WRITE_SIZE = 1000
"""Characters that a write counts for in addition to its texts."""
CHORE_EVERY_S = 3600.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _QueuedWrite:
    """A write that waits for its turn."""

    work: Callable[[Connection], Any]
    size: int
    erases: bool = False
    """Whether it deletes texts, which must not stay in a log of the database."""
    future: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True, kw_only=True)
class _WriteResult:
    """The result of a write, which its future gets after the commit."""

    value: Any = None
    error: Exception | None = None


class Writer:
    """Writes in the background, in the order of submission. A write that fails by its own fault fails alone."""

    def __init__(self, engine: Engine, chore: Callable[[Connection], bool]) -> None:
        """Starts the thread.

        Args:
            chore: work that is done at the start and every hour, a little at a time. It returns whether there is more.
        """
        self._engine = engine
        self._chore = chore
        self._queue: queue.SimpleQueue[_QueuedWrite | None] = queue.SimpleQueue()
        self._lock, self._num_chars, self._is_closed = threading.Lock(), 0, False
        self._thread = threading.Thread(target=self._run, name="feedback writer", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Connection], T], *, size: int = 0, erases: bool = False) -> Future[T]:
        """Queues a write. Its future has a result when the write is on the disk, and cannot be cancelled.

        Args:
            work: may be called a second time, after a rollback. It raises a StoreError before it has written anything,
                or not at all.
            size: number of characters of its texts.
            erases: whether it deletes texts, which then must be nowhere in the database's files.
        """
        write = _QueuedWrite(work=work, size=size + WRITE_SIZE, erases=erases)
        write.future.set_running_or_notify_cancel()
        with self._lock:
            if self._is_closed:
                write.future.set_exception(StoreAway("The feedback database is closed"))
            elif self._num_chars and self._num_chars + write.size > MAX_WAITING:
                write.future.set_exception(StoreAway("Too much waits to be written to the feedback database"))
            else:
                self._num_chars += write.size
                self._queue.put(write)
        return write.future

    def close(self) -> None:
        """Writes everything that waits, and ends the thread."""
        with self._lock:
            if not self._is_closed:
                self._queue.put(None)
            self._is_closed = True
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + (0.0 if self._do_chore() else CHORE_EVERY_S)
            try:
                write = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                continue
            if write is None:
                return
            batch = [write]
            while len(batch) < MAX_BATCH and not self._queue.empty():
                write = self._queue.get()
                if write is None:
                    self._write(batch)
                    return
                batch.append(write)
            self._write(batch)

    def _write(self, batch: list[_QueuedWrite]) -> None:
        results = self._commit(batch)
        if any(write.erases for write in batch):
            empty_log(self._engine)
        with self._lock:
            self._num_chars -= sum(write.size for write in batch)
        for write, result in zip(batch, results, strict=True):
            if result.error is not None:
                write.future.set_exception(result.error)
            else:
                write.future.set_result(result.value)

    def _commit(self, batch: list[_QueuedWrite]) -> list[_WriteResult]:
        """Commits all writes in one transaction; if the database refuses one of them, each in its own transaction."""
        try:
            with self._engine.connect().execution_options(**WRITES) as connection, connection.begin():
                lock(connection)
                return [_attempt(connection, write.work) for write in batch]
        except Exception as error:  # the thread must not end
            if is_fault_of_database(error):
                return [_WriteResult(error=store_error_of(error))] * len(batch)
            if len(batch) == 1:
                logger.exception("The feedback database refused something")
                return [_WriteResult(error=StoreError("The feedback database refuses this"))]
        return [result for write in batch for result in self._commit([write])]

    def _do_chore(self) -> bool:
        write = _QueuedWrite(work=self._chore, size=0, erases=True)
        self._write([write])
        if error := write.future.exception():
            logger.warning("%s", error)
            return False
        return bool(write.future.result())


def _attempt(connection: Connection, work: Callable[[Connection], Any]) -> _WriteResult:
    """Does the work; an error that is the write's own becomes its result."""
    try:
        return _WriteResult(value=work(connection))
    except StoreError as error:
        return _WriteResult(error=error)
