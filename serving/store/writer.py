"""The thread that writes: whatever arrives while it waits for the disk becomes one transaction afterwards."""

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

from serving.store.opening import WRITES, empty_log, is_fault_of_database, lock, named
from serving.store.records import StoreAway, StoreError

T = TypeVar("T")

MAX_BATCH = 256
"""Items in one transaction."""
MAX_WAITING = 64 * 2**20
"""Characters that may wait; with more, further items are refused."""
ITEM_SIZE = 1000
"""Characters that an item counts for beside its texts."""
CHORE_EVERY_S = 3600.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Item:
    work: Callable[[Connection], Any]
    size: int
    erases: bool = False
    """Whether texts are deleted, which must not be left over in a log."""
    future: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What came of an item, to be told after the commit."""

    value: Any = None
    error: Exception | None = None


class Writer:
    """Writes in the background, in the order of submission; an item that fails by its own fault fails alone."""

    def __init__(self, engine: Engine, chore: Callable[[Connection], bool]) -> None:
        """`chore`: some work to be done at once and every hour, by and by: True as long as there is more."""
        self._engine = engine
        self._chore = chore
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._lock, self._waiting, self._closed = threading.Lock(), 0, False
        self._thread = threading.Thread(target=self._run, name="feedback writer", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Connection], T], *, size: int = 0, erases: bool = False) -> Future[T]:
        """Queues work; its future is resolved when it is on the disk, and cannot be cancelled.

        Args:
            work: may be done again, after a rollback. It raises a StoreError before it has written anything, or never.
            size: characters of its texts.
            erases: it deletes texts, which then must be nowhere in the database's files.
        """
        item = _Item(work=work, size=size + ITEM_SIZE, erases=erases)
        item.future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                item.future.set_exception(StoreAway("The feedback database is closed"))
            elif self._waiting and self._waiting + item.size > MAX_WAITING:
                item.future.set_exception(StoreAway("Too much waits to be written to the feedback database"))
            else:
                self._waiting += item.size
                self._queue.put(item)
        return item.future

    def close(self) -> None:
        """Writes what waits, and ends."""
        with self._lock:
            if not self._closed:
                self._queue.put(None)
            self._closed = True
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + (0.0 if self._do_chore() else CHORE_EVERY_S)
            try:
                first = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                continue
            if first is None:
                return
            batch = [first]
            while len(batch) < MAX_BATCH and not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    self._write(batch)
                    return
                batch.append(following)
            self._write(batch)

    def _write(self, batch: list[_Item]) -> None:
        outcomes = self._commit(batch)
        if any(item.erases for item in batch):
            empty_log(self._engine)
        with self._lock:
            self._waiting -= sum(item.size for item in batch)
        for item, outcome in zip(batch, outcomes, strict=True):
            if outcome.error is not None:
                item.future.set_exception(outcome.error)
            else:
                item.future.set_result(outcome.value)

    def _commit(self, batch: list[_Item]) -> list[_Outcome]:
        """All in one transaction; if the database refuses one of them, each in one of its own."""
        try:
            with self._engine.connect().execution_options(**WRITES) as connection, connection.begin():
                lock(connection)
                return [_attempt(connection, item.work) for item in batch]
        except Exception as error:  # the thread has to live on
            if is_fault_of_database(error):
                return [_Outcome(error=named(error))] * len(batch)
            if len(batch) == 1:
                logger.exception("The feedback database refused something")
                return [_Outcome(error=StoreError("The feedback database refuses this"))]
        return [outcome for item in batch for outcome in self._commit([item])]

    def _do_chore(self) -> bool:
        item = _Item(work=self._chore, size=0, erases=True)
        self._write([item])
        if error := item.future.exception():
            logger.warning("%s", error)
            return False
        return bool(item.future.result())


def _attempt(connection: Connection, work: Callable[[Connection], Any]) -> _Outcome:
    try:
        return _Outcome(value=work(connection))
    except StoreError as error:
        return _Outcome(error=error)
