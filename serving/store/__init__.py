"""The memory of the service: what it answered, what people said about it, and the keys that it lets in.

request ─► `record`, `judge` ─► queue ─► one thread: all that waits, in one transaction ─► disk ─► futures
                                                              `export`, `statistics` ◄─┘

A file of SQLite on one machine, or PostgreSQL; several processes may share either.
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
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from alignment.errors import ServingError
from serving.store.judging import judge, judgement_id
from serving.store.opening import engine_of, named, prepare
from serving.store.records import (
    AuditEntry,
    Conflict,
    Issued,
    Judgement,
    Receipt,
    Statistics,
    StoreAway,
    StoredKey,
    StoreError,
    StoreFull,
    Turn,
    UnknownId,
    operator,
)
from serving.store.statistics import statistics_of
from serving.store.tables import answers, audit, groups, idempotency, judgements, keys
from serving.store.writer import Writer

T = TypeVar("T")

DAY_S = 86_400.0
REOPEN_S = 2.0
"""Seconds between attempts to open a database that was away at the start."""
FORGET_AT_ONCE = 200
"""Groups that one transaction forgets, so that what people send is not kept waiting."""
PAGE = 100
"""Rows that an export reads at once."""
RECORD = {
    name: insert(groups).on_conflict_do_nothing().returning(groups.c.number)
    for name, insert in (("sqlite", sqlite.insert), ("postgresql", postgresql.insert))
}
RECORD_ANSWERS = sa.insert(answers)
AUDIT = {
    name: insert(audit).on_conflict_do_nothing()
    for name, insert in (("sqlite", sqlite.insert), ("postgresql", postgresql.insert))
}

logger = logging.getLogger("ray.serve")


class Store:
    """The feedback database. Safe to use from all threads; the futures never fail but with a `StoreError`."""

    def __init__(self, url: str, *, retention_days: float | None = None, may_be_away: bool = False) -> None:
        """Opens the database, and creates it or brings its tables up to date.

        Args:
            url: `sqlite:///FILE` or `postgresql+psycopg://USER@HOST/NAME`.
            retention_days: groups that are older are deleted with all that belongs to them, at once and every hour;
                None keeps them.
            may_be_away: go on without it if it cannot be opened now, and open it as soon as it can be. Until then
                everything that is asked fails with StoreAway at once.

        Raises:
            ServingError: the URL names no database that can be used, or one of a newer raylign.
            StoreAway, StoreFull: it cannot be opened now.
        """
        self._engine = engine_of(url)
        self._new_writer = partial(Writer, self._engine, partial(_forget, retention_days))
        self._writer: Writer | None = None
        self._away: StoreError | None = None
        self._closed = threading.Event()
        self._opening = threading.Thread(target=self._open_later, name="feedback database", daemon=True)
        try:
            self._open()
        except (StoreAway, StoreFull) as error:
            if not may_be_away:
                self._engine.dispose()
                raise
            logger.error("The endpoint starts without its database, and opens it as soon as that answers: %s", error)
            self._away = error
            self._opening.start()
        except BaseException:
            self._engine.dispose()
            raise

    def _open(self) -> None:
        prepare(self._engine)
        self._writer = self._new_writer()
        self._away = None

    def _open_later(self) -> None:
        while not self._closed.wait(REOPEN_S):
            try:
                self._open()
            except Exception as error:  # whatever it is: without this thread, the database would stay away
                self._away = StoreAway(str(error) if isinstance(error, ServingError) else type(error).__name__)
            else:
                logger.warning("The database answers now")
                return

    def _submit(self, work: Callable[[Connection], T], *, size: int = 0, erases: bool = False) -> Future[T]:
        away = self._away
        if self._writer is not None:
            return self._writer.submit(work, size=size, erases=erases)
        future: Future[T] = Future()
        future.set_exception(StoreAway(str(away)))
        return future

    def record(self, issued: Issued) -> Future[None]:
        """Remembers a group, before it can be judged; the same one again changes nothing."""
        return self._submit(partial(_record, issued), size=issued.size)

    def judge(self, judgement: Judgement) -> Future[Receipt]:
        """Stores what a person said; the future holds the receipt, or raises as `judging.judge` does."""
        return self._submit(partial(_judge, judgement), size=judgement.size)

    def delete(self, id: str) -> Future[int]:
        """Deletes a judgement, or a group with its answers and judgements.

        Returns:
            How many of all these are gone. The future raises UnknownId if there is nothing of this id.
        """
        return self._submit(partial(_delete, id), erases=True)

    def export(self, *, since: str | None = None, limit: int | None = None) -> Iterator[str]:
        """Training rows in the order in which they were stored, as JSON lines with their line breaks.

        What is superseded before the call is left out; what comes after it is not seen.

        Args:
            since: id of a judgement; only later ones are given.
            limit: rows at most.

        Raises:
            UnknownId: `since` is no id of a judgement.
            StoreAway: the database cannot be read.
        """
        start = 0 if since is None else _number_of(since)
        if start is None:
            raise UnknownId("since is not the id of a judgement")
        with self._reading() as connection:
            newest = connection.execute(sa.select(sa.func.max(judgements.c.number))).scalar()
        return self._rows(start, newest or 0, limit)

    def _rows(self, start: int, newest: int, limit: int | None) -> Iterator[str]:
        """Reads page by page: a client that is slow to take them keeps no transaction open."""
        c = judgements.c
        counts = (c.number <= newest, c.row.is_not(None), c.superseded_by.is_(None) | (c.superseded_by > newest))
        while limit is None or limit > 0:
            wanted = PAGE if limit is None else min(PAGE, limit)
            query = sa.select(c.number, c.row).where(c.number > start, *counts).order_by(c.number).limit(wanted)
            with self._reading() as connection:
                rows = connection.execute(query).all()
            for number, row in rows:
                yield f'{{"id": "{judgement_id(number)}", {row[1:]}\n'
            if len(rows) < wanted:
                return
            start = rows[-1].number
            limit = None if limit is None else limit - wanted

    def statistics(self) -> Statistics:
        """Counts of what is stored now.

        Raises:
            StoreAway: the database cannot be read.
        """
        with self._reading() as connection, connection.begin():
            return statistics_of(connection)

    def keys(self) -> list[StoredKey]:
        """All keys, with those that are revoked, in the order of their names.

        Raises:
            StoreAway: the database cannot be read.
        """
        with self._reading() as connection:
            return [StoredKey(**row._mapping) for row in connection.execute(sa.select(keys).order_by(keys.c.name))]

    def add_key(self, key: StoredKey) -> None:
        """Raises Conflict if there is a key of this name, even a revoked one: judgements bear its name."""
        detail = {"role": key.role, "expires": key.expires}
        self._change_keys(partial(_add_key, key), "create key", key.name, detail)

    def renew_key(self, key: StoredKey, *, keeps_expiry: bool = True) -> None:
        """Puts a new id and digest in place of those of the key of this name.

        Args:
            key: what it becomes; its role stays what it is.
            keeps_expiry: whether its expiry stays too. With a new one, a key that has expired is valid again.

        Raises:
            UnknownId: there is none that is valid.
        """
        new: dict[str, Any] = {"id": key.id, "digest": key.digest, "created": key.created}
        if not keeps_expiry:
            new["expires"] = key.expires
        detail = {} if keeps_expiry else {"expires": key.expires}
        self._change_keys(partial(_change_key, key.name, new), "rotate key", key.name, detail)

    def set_role(self, name: str, role: str) -> None:
        """Raises UnknownId if there is no valid key of this name."""
        self._change_keys(partial(_change_key, name, {"role": role}), "set role", name, {"role": role})

    def revoke_key(self, name: str) -> None:
        """Raises UnknownId if there is no valid key of this name."""
        self._change_keys(partial(_change_key, name, {"revoked": time.time()}), "revoke key", name, {})

    def _change_keys(
        self, change: Callable[[Connection], None], action: str, name: str, detail: dict[str, Any]
    ) -> None:
        """Changes the keys and writes down who did, both or neither."""
        entry = AuditEntry(action=action, who=operator(), detail={"name": name, **detail})

        def both(connection: Connection) -> None:
            change(connection)
            _audit(entry, connection)

        self._submit(both).result()

    def audit(self, entry: AuditEntry) -> Future[None]:
        """Writes down who did what; the same entry again changes nothing."""
        return self._submit(partial(_audit, entry))

    def audit_trail(self, *, limit: int, before: str | None = None) -> list[AuditEntry]:
        """The newest entries, the newest first.

        Args:
            limit: entries at most.
            before: id of an entry; only earlier ones are given.

        Raises:
            UnknownId: `before` is no id of an entry.
            StoreAway: the database cannot be read.
        """
        c = audit.c
        with self._reading() as connection:
            query = sa.select(audit).order_by(c.number.desc()).limit(limit)
            if before is not None:
                number = connection.execute(sa.select(c.number).where(c.id == before)).scalar()
                if number is None:
                    raise UnknownId("before is not the id of an entry")
                query = query.where(c.number < number)
            return [_entry(row) for row in connection.execute(query)]

    def close(self) -> None:
        """Writes what waits, and closes the database."""
        self._closed.set()
        if self._opening.is_alive():
            self._opening.join()
        if self._writer is not None:
            self._writer.close()
        self._engine.dispose()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        if self._away is not None:
            raise StoreAway(str(self._away))
        try:
            with self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise named(error) from error


def _record(issued: Issued, connection: Connection) -> None:
    values = {
        "id": issued.id,
        "kind": issued.kind,
        "asked_by": issued.asked_by,
        "created": issued.created,
        "prompt": json.dumps(_as_json(issued.prompt)) if issued.recorded else None,
        "reason": issued.reason,
    }
    number = connection.execute(RECORD[connection.dialect.name], values).scalar()
    if number is None:
        return
    rows = [
        {
            "group_number": number,
            "position": position,
            "text": json.dumps(answer.text) if issued.recorded else None,
            "version": answer.version,
            "model": answer.model,
            "finish_reason": answer.finish_reason,
        }
        for position, answer in enumerate(issued.answers)
    ]
    connection.execute(RECORD_ANSWERS, rows)


def _as_json(prompt: str | tuple[Turn, ...]) -> str | list[dict[str, str]]:
    return prompt if isinstance(prompt, str) else [{"role": turn.role, "content": turn.content} for turn in prompt]


def _judge(judgement: Judgement, connection: Connection) -> Receipt:
    return judge(connection, judgement, time.time())


def _number_of(id: str) -> int | None:
    """The number in a judgement's id; None for an id of something else."""
    found = re.fullmatch(r"jdg-([0-9]{1,18})", id)
    return int(found[1]) if found else None


def _delete(id: str, connection: Connection) -> int:
    number = _number_of(id)
    if number is not None:
        # What it replaced stays superseded, though by nothing later than itself: exports compare with the newest.
        replaced = judgements.c.number.in_(sa.select(judgements.c.replaces).where(judgements.c.number == number))
        connection.execute(sa.update(judgements).where(replaced).values(superseded_by=judgements.c.number))
        deleted = _delete_judgements(connection, judgements.c.number == number)
    else:
        known = id.isascii() and id.isprintable()
        found = connection.execute(sa.select(groups.c.number).where(groups.c.id == id)).scalars().all() if known else []
        deleted = _delete_groups(connection, found)
    if not deleted:
        raise UnknownId("There is nothing of this id")
    return deleted


def _delete_groups(connection: Connection, numbers: Sequence[int]) -> int:
    deleted = _delete_judgements(connection, judgements.c.group_number.in_(numbers))
    for table, column in ((answers, answers.c.group_number), (groups, groups.c.number)):
        deleted += connection.execute(sa.delete(table).where(column.in_(numbers))).rowcount
    return deleted


def _delete_judgements(connection: Connection, which: sa.ColumnElement[bool]) -> int:
    of_these = idempotency.c.judgement_number.in_(sa.select(judgements.c.number).where(which))
    connection.execute(sa.delete(idempotency).where(of_these))
    return connection.execute(sa.delete(judgements).where(which)).rowcount


def _forget(retention_days: float | None, connection: Connection) -> bool:
    """Deletes some of the groups that are too old; True if there may be more."""
    if retention_days is None:
        return False
    old = groups.c.created < time.time() - retention_days * DAY_S
    found = connection.execute(sa.select(groups.c.number).where(old).limit(FORGET_AT_ONCE)).scalars().all()
    _delete_groups(connection, found)
    return bool(found)


def _add_key(key: StoredKey, connection: Connection) -> None:
    taken = connection.execute(sa.select(keys.c.revoked).where(keys.c.name == key.name)).one_or_none()
    if taken is not None:
        state = "was" if taken.revoked else "is"
        raise Conflict(f"There {state} a key called {key.name}; names are used once, since judgements bear them")
    values = {column.name: getattr(key, column.name) for column in keys.c}
    connection.execute(sa.insert(keys).values(values))


def _change_key(name: str, new: dict[str, Any], connection: Connection) -> None:
    is_named = (keys.c.name == name, keys.c.revoked.is_(None))
    lasts = sa.true() if "expires" in new else keys.c.expires.is_(None) | (keys.c.expires > time.time())
    if not connection.execute(sa.update(keys).where(*is_named, lasts).values(new)).rowcount:
        raise UnknownId(f"There is no valid key called {name}")


def _audit(entry: AuditEntry, connection: Connection) -> None:
    values = {**asdict(entry), "detail": json.dumps(entry.detail)}
    connection.execute(AUDIT[connection.dialect.name], values)


def _entry(row: sa.Row[Any]) -> AuditEntry:
    values = {name: value for name, value in row._mapping.items() if name != "number"}
    return AuditEntry(**{**values, "detail": json.loads(values["detail"])})
