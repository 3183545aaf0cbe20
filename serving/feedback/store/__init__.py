"""The feedback database: what the service answered, what people said about it, and the keys that it lets in.

request ─► `record`, `record_feedback` ─► queue ─► one thread: all that waits, in one transaction ─► disk ─► futures
                                                                        `export`, `statistics` ◄─┘

It is a file of SQLite on one machine, or PostgreSQL. Several processes may share either.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from alignment.errors import ServingError
from serving.feedback.store.administration import add_entry, add_key, change_key, read_entry
from serving.feedback.store.feedback import feedback_id, record_feedback
from serving.feedback.store.opening import engine_of, prepare, store_error_of
from serving.feedback.store.records import (
    AuditEntry,
    Feedback,
    GenerationRecord,
    MessageLike,
    Receipt,
    Statistics,
    StoreAway,
    StoredKey,
    StoreError,
    StoreFull,
    UnknownId,
    operator,
)
from serving.feedback.store.statistics import statistics_of
from serving.feedback.store.tables import answers, audit, groups, idempotency, judgements, keys
from serving.feedback.store.writer import Writer

T = TypeVar("T")

DAY_S = 86_400.0
REOPEN_S = 2.0
"""Seconds between attempts to open a database that was away at the start."""
EXPIRED_AT_ONCE = 200
"""Most groups that one transaction deletes for their age, so that what people send does not wait long."""
PAGE_ROWS = 100
"""Most rows that an export reads at once."""
RECORD = {
    name: insert(groups).on_conflict_do_nothing().returning(groups.c.number)
    for name, insert in (("sqlite", sqlite.insert), ("postgresql", postgresql.insert))
}
RECORD_ANSWERS = sa.insert(answers)

logger = logging.getLogger("ray.serve")


class Store:
    """The feedback database. It is safe to use from all threads. Its futures fail with a `StoreError` alone."""

    def __init__(self, url: str, *, retention_days: float | None = None, may_be_away: bool = False) -> None:
        """Opens the database. Creates it if there is none, and brings its tables up to date.

        Args:
            url: `sqlite:///FILE` or `postgresql+psycopg://USER@HOST/NAME`.
            retention_days: older groups are deleted with everything that belongs to them, at the start and every hour;
                None keeps all groups.
            may_be_away: continue without the database if it cannot be opened now, and open it as soon as possible.
                Until then every call fails with StoreAway at once.

        Raises:
            ServingError: the URL names no database that can be used, or a database of a newer raylign.
            StoreAway, StoreFull: the database cannot be opened now.
        """
        self._engine = engine_of(url)
        self._new_writer = partial(Writer, self._engine, partial(_delete_expired, retention_days))
        self._writer: Writer | None = None
        self._unavailable: StoreError | None = None
        """Why the database is not open yet; None if it is."""
        self._close_event = threading.Event()
        self._open_thread = threading.Thread(target=self._open_later, name="feedback database", daemon=True)
        try:
            self._open()
        except (StoreAway, StoreFull) as error:
            if not may_be_away:
                self._engine.dispose()
                raise
            logger.error("The endpoint starts without its database, and opens it as soon as that answers: %s", error)
            self._unavailable = error
            self._open_thread.start()
        except BaseException:
            self._engine.dispose()
            raise

    def _open(self) -> None:
        prepare(self._engine)
        self._writer = self._new_writer()
        self._unavailable = None

    def _open_later(self) -> None:
        while not self._close_event.wait(REOPEN_S):
            try:
                self._open()
            except Exception as error:  # whatever it is: without this thread, the database would stay away
                reason = str(error) if isinstance(error, ServingError) else type(error).__name__
                self._unavailable = StoreAway(reason)
            else:
                logger.warning("The database answers now")
                return

    def _submit(self, work: Callable[[Connection], T], *, size: int = 0, erases: bool = False) -> Future[T]:
        error = self._unavailable  # read first: the writer is set before this is cleared
        if self._writer is not None:
            return self._writer.submit(work, size=size, erases=erases)
        future: Future[T] = Future()
        future.set_exception(StoreAway(str(error)))
        return future

    def record(self, group: GenerationRecord) -> Future[None]:
        """Stores a prompt and its answers, so that people can give feedback on them. A second time changes nothing."""
        return self._submit(partial(_record, group), size=group.size)

    def record_feedback(self, feedback: Feedback) -> Future[Receipt]:
        """Stores what a person said. The future holds the receipt, or raises as `feedback.record_feedback` does."""
        return self._submit(partial(_record_feedback, feedback), size=feedback.size)

    def delete(self, id: str) -> Future[int]:
        """Deletes one piece of feedback, or a group with its answers and the feedback on them.

        Returns:
            How many groups, answers and pieces of feedback were deleted. The future raises UnknownId if the id is
            unknown.
        """
        return self._submit(partial(_delete, id), erases=True)

    def export(
        self,
        *,
        after_id: str | None = None,
        limit: int | None = None,
        model: str | None = None,
        names_model: bool = False,
    ) -> Iterator[str]:
        """Yields training rows in the order in which they were stored, as JSON lines with their line breaks.

        Feedback that was superseded before the call is left out. Feedback that comes after the call is not seen.

        Args:
            after_id: id of a piece of feedback; only later rows are returned.
            limit: most rows.
            model: name of a model; only rows about its answers are returned.
            names_model: whether each row has a field `model`: the name of the model that answered.

        Raises:
            UnknownId: `after_id` is no id of a piece of feedback.
            StoreAway: the database cannot be read.
        """
        start = 0 if after_id is None else _number_of(after_id)
        if start is None:
            raise UnknownId("since is not the id of a judgement")
        with self._connect() as connection:
            newest = connection.execute(sa.select(sa.func.max(judgements.c.number))).scalar()
        c = judgements.c
        counts = [c.number <= (newest or 0), c.row.is_not(None)]
        counts.append(c.superseded_by.is_(None) | (c.superseded_by > (newest or 0)))
        query = sa.select(c.number, c.row)
        if model is not None or names_model:
            first_answer = (answers.c.group_number == c.group_number) & (answers.c.position == 0)
            query = sa.select(c.number, c.row, answers.c.model).join(answers, first_answer)
        if model is not None:
            counts.append(answers.c.model == model)
        return self._rows(query.where(*counts), start, limit, names_model=names_model)

    def _rows(self, query: sa.Select[Any], start: int, limit: int | None, *, names_model: bool) -> Iterator[str]:
        """Reads page by page, so that a slow client keeps no transaction open."""
        while limit is None or limit > 0:
            page_size = PAGE_ROWS if limit is None else min(PAGE_ROWS, limit)
            page = query.where(judgements.c.number > start).order_by(judgements.c.number).limit(page_size)
            with self._connect() as connection:
                rows = connection.execute(page).all()
            for row in rows:
                name = f'"model": {json.dumps(row.model)}, ' if names_model else ""
                yield f'{{"id": "{feedback_id(row.number)}", {name}{row.row[1:]}\n'
            if len(rows) < page_size:
                return
            start = rows[-1].number
            limit = None if limit is None else limit - page_size

    def statistics(self, *, model: str | None = None) -> Statistics:
        """Counts what is stored now.

        Args:
            model: name of a model; only its answers, and the feedback on them, are counted.

        Raises:
            StoreAway: the database cannot be read.
        """
        with self._connect() as connection, connection.begin():
            return statistics_of(connection, model)

    def keys(self) -> list[StoredKey]:
        """Returns all keys, revoked ones too, in the order of their names.

        Raises:
            StoreAway: the database cannot be read.
        """
        with self._connect() as connection:
            return [StoredKey(**row._mapping) for row in connection.execute(sa.select(keys).order_by(keys.c.name))]

    def add_key(self, key: StoredKey) -> None:
        """Adds a key.

        Raises:
            Conflict: there is a key of this name, even a revoked one: feedback bears its name.
        """
        detail = {"role": key.role, "expires": key.expires}
        self._change_keys(partial(add_key, key), "create key", key.name, detail)

    def renew_key(self, key: StoredKey, *, keeps_expiry: bool = True) -> None:
        """Replaces the id and the digest of the key of this name.

        Args:
            key: the new id, digest and expiry. The role stays as it is.
            keeps_expiry: whether the expiry stays too. With a new expiry, a key that has expired is valid again.

        Raises:
            UnknownId: there is no valid key of this name.
        """
        new: dict[str, Any] = {"id": key.id, "digest": key.digest, "created": key.created}
        if not keeps_expiry:
            new["expires"] = key.expires
        detail = {} if keeps_expiry else {"expires": key.expires}
        self._change_keys(partial(change_key, key.name, new), "rotate key", key.name, detail)

    def set_role(self, name: str, role: str) -> None:
        """Gives a key another role.

        Raises:
            UnknownId: there is no valid key of this name.
        """
        self._change_keys(partial(change_key, name, {"role": role}), "set role", name, {"role": role})

    def revoke_key(self, name: str) -> None:
        """Revokes a key.

        Raises:
            UnknownId: there is no valid key of this name.
        """
        self._change_keys(partial(change_key, name, {"revoked": time.time()}), "revoke key", name, {})

    def _change_keys(
        self, change: Callable[[Connection], None], action: str, name: str, detail: dict[str, Any]
    ) -> None:
        """Changes the keys and adds an entry to the audit trail, in one transaction."""
        entry = AuditEntry(action=action, who=operator(), detail={"name": name, **detail})

        def change_and_audit(connection: Connection) -> None:
            change(connection)
            add_entry(entry, connection)

        self._submit(change_and_audit).result()

    def audit(self, entry: AuditEntry) -> Future[None]:
        """Adds an entry to the audit trail. The same entry a second time changes nothing."""
        return self._submit(partial(add_entry, entry))

    def audit_trail(self, *, limit: int, before_id: str | None = None) -> list[AuditEntry]:
        """Returns the newest entries of the audit trail, the newest first.

        Args:
            limit: most entries.
            before_id: id of an entry; only earlier entries are returned.

        Raises:
            UnknownId: `before_id` is no id of an entry.
            StoreAway: the database cannot be read.
        """
        c = audit.c
        with self._connect() as connection:
            query = sa.select(audit).order_by(c.number.desc()).limit(limit)
            if before_id is not None:
                number = connection.execute(sa.select(c.number).where(c.id == before_id)).scalar()
                if number is None:
                    raise UnknownId("before is not the id of an entry")
                query = query.where(c.number < number)
            return [read_entry(row) for row in connection.execute(query)]

    def close(self) -> None:
        """Writes everything that waits, and closes the database."""
        self._close_event.set()
        if self._open_thread.is_alive():
            self._open_thread.join()
        if self._writer is not None:
            self._writer.close()
        self._engine.dispose()

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        """A connection for reading. Raises StoreAway or StoreFull if the database cannot be used."""
        if self._unavailable is not None:
            raise StoreAway(str(self._unavailable))
        try:
            with self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise store_error_of(error) from error


def _record(group: GenerationRecord, connection: Connection) -> None:
    values = {
        "id": group.id,
        "kind": group.kind,
        "asked_by": group.asked_by,
        "created": group.created,
        "prompt": json.dumps(_to_json(group.prompt)) if group.recorded else None,
        "reason": group.reason,
    }
    number = connection.execute(RECORD[connection.dialect.name], values).scalar()
    if number is None:
        return
    rows = [
        {
            "group_number": number,
            "position": position,
            "text": json.dumps(answer.text) if group.recorded else None,
            "version": answer.version,
            "model": answer.model,
            "finish_reason": answer.finish_reason,
        }
        for position, answer in enumerate(group.answers)
    ]
    connection.execute(RECORD_ANSWERS, rows)


def _to_json(prompt: str | tuple[MessageLike, ...]) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        return prompt
    return [{"role": message.role, "content": message.content} for message in prompt]


def _record_feedback(feedback: Feedback, connection: Connection) -> Receipt:
    return record_feedback(connection, feedback, time.time())


def _number_of(id: str) -> int | None:
    """Returns the number in the id of a piece of feedback; None for the id of something else."""
    match = re.fullmatch(r"jdg-([0-9]{1,18})", id)
    return int(match[1]) if match else None


def _delete(id: str, connection: Connection) -> int:
    number = _number_of(id)
    if number is not None:
        # The feedback that it replaced stays superseded, by itself: exports compare that number with the newest.
        is_replaced = judgements.c.number.in_(sa.select(judgements.c.replaces).where(judgements.c.number == number))
        connection.execute(sa.update(judgements).where(is_replaced).values(superseded_by=judgements.c.number))
        num_deleted = _delete_judgements(connection, judgements.c.number == number)
    else:
        is_possible_id = id.isascii() and id.isprintable()
        query = sa.select(groups.c.number).where(groups.c.id == id)
        numbers = connection.execute(query).scalars().all() if is_possible_id else []
        num_deleted = _delete_groups(connection, numbers)
    if not num_deleted:
        raise UnknownId("There is nothing of this id")
    return num_deleted


def _delete_groups(connection: Connection, numbers: Sequence[int]) -> int:
    num_deleted = _delete_judgements(connection, judgements.c.group_number.in_(numbers))
    for table, column in ((answers, answers.c.group_number), (groups, groups.c.number)):
        num_deleted += connection.execute(sa.delete(table).where(column.in_(numbers))).rowcount
    return num_deleted


def _delete_judgements(connection: Connection, condition: sa.ColumnElement[bool]) -> int:
    numbers = sa.select(judgements.c.number).where(condition)
    connection.execute(sa.delete(idempotency).where(idempotency.c.judgement_number.in_(numbers)))
    return connection.execute(sa.delete(judgements).where(condition)).rowcount


def _delete_expired(retention_days: float | None, connection: Connection) -> bool:
    """Deletes some of the groups that are too old; returns whether there may be more of them."""
    if retention_days is None:
        return False
    is_expired = groups.c.created < time.time() - retention_days * DAY_S
    numbers = connection.execute(sa.select(groups.c.number).where(is_expired).limit(EXPIRED_AT_ONCE)).scalars().all()
    _delete_groups(connection, numbers)
    return bool(numbers)
