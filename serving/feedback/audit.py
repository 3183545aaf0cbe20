"""The audit trail: who changed, exported or deleted something, when and from where. `raylign audit` prints it.

admin's request ─► route ─► file in the registry's folder (on the disk before the client has its answer) ─► database

An entry stays in its file until the database takes it. Any ingress that runs stores it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignment.files import write_durably
from serving.feedback.keys import Database, open_store

if TYPE_CHECKING:  # SQLAlchemy takes a third of a second, and --help must not
    from serving.feedback.store import Store
    from serving.feedback.store.records import AuditEntry

RETRY_S = 5.0
"""Seconds between attempts to store the entries in files."""

logger = logging.getLogger("ray.serve")


class AuditTrail:
    """Stores entries. Neither the absence of the database nor the end of a process loses an entry."""

    def __init__(self, store: Store, folder: Path, *, on_loss: Callable[[], None] = lambda: None) -> None:
        """Starts a thread that stores the entries in files.

        Args:
            folder: folder of the files; several ingresses may share it.
            on_loss: is called for every entry that only the log has.
        """
        self._store = store
        self._folder = folder
        self._on_loss = on_loss
        self.num_waiting = 0
        """Number of entries in files, as of a few seconds ago."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._retry, name="audit trail", daemon=True)
        self._thread.start()

    def record(self, entry: AuditEntry) -> None:
        """Returns when the entry is on the disk. If it cannot be written there, the log has it."""
        is_written = write_entry(self._folder, entry)
        future = self._submit(entry, _file(self._folder, entry))
        if not is_written:
            future.add_done_callback(lambda finished_future: self._on_loss() if finished_future.exception() else None)

    def close(self) -> None:
        """Ends the thread. The store stays open."""
        self._stop.set()
        self._thread.join()

    def _submit(self, entry: AuditEntry, file: Path) -> Future[None]:
        def on_done(future: Future[None]) -> None:
            if future.exception() is None and file.exists():
                file.unlink(missing_ok=True)

        future = self._store.audit(entry)
        future.add_done_callback(on_done)
        return future

    def _retry(self) -> None:
        while not self._stop.wait(RETRY_S):
            files = sorted(self._folder.glob("aud-*.json"))
            self.num_waiting = len(files)
            for file in files:
                try:
                    self._submit(_read(file), file).exception(timeout=60)
                except FileNotFoundError:  # it was stored in the meantime
                    continue
                except Exception:  # one bad file, or a slow database, must not end the retries
                    logger.exception("An entry of the audit trail cannot be stored yet: %s", file)


def write_entry(folder: Path, entry: AuditEntry) -> bool:
    """Writes an entry into a folder, from which an ingress stores it. If it cannot be written, the log has it.

    Returns:
        Whether it was written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(_file(folder, entry), json.dumps(asdict(entry)).encode(), mode=0o600)
    except OSError as error:
        logger.error("An entry of the audit trail cannot be written (%s): %s", error.strerror, _line(entry))
        return False
    return True


def entries_folder(registry_folder: Path) -> Path:
    """Returns the folder in which entries wait for the database, inside a registry's folder."""
    return registry_folder / "audit"


def _file(folder: Path, entry: AuditEntry) -> Path:
    return folder / f"{entry.id}.json"


def _read(file: Path) -> AuditEntry:
    from serving.feedback.store.records import AuditEntry

    return AuditEntry(**json.loads(file.read_text()))


def _line(entry: AuditEntry) -> str:
    timestamp = datetime.fromtimestamp(entry.created, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return f"{timestamp}  {entry.who:24} {entry.address or '-':15} {entry.action:14} {json.dumps(entry.detail)}"


def audit(
    database: Database = None,
    limit: Annotated[int, typer.Option(min=1, help="Entries at most, the newest first.")] = 100,
) -> None:
    """Print who changed, exported or deleted something at an endpoint, and who made and revoked its keys.

    Commands are written down as the operating system's user@host, requests by the name of their key and the address
    that they came from, which behind a load balancer is its own.
    """
    with open_store(database) as store:
        for entry in store.audit_trail(limit=limit):
            typer.echo(_line(entry))
