"""What the store does for those who run the service: it changes keys, and keeps the audit trail."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from serving.feedback.store.records import AuditEntry, Conflict, StoredKey, UnknownId
from serving.feedback.store.tables import audit, keys

AUDIT = {
    name: insert(audit).on_conflict_do_nothing()
    for name, insert in (("sqlite", sqlite.insert), ("postgresql", postgresql.insert))
}


def add_key(key: StoredKey, connection: Connection) -> None:
    """Adds a key; raises Conflict if there is a key of this name, even a revoked one."""
    row = connection.execute(sa.select(keys.c.revoked).where(keys.c.name == key.name)).one_or_none()
    if row is not None:
        state = "was" if row.revoked else "is"
        raise Conflict(f"There {state} a key called {key.name}; names are used once, since judgements bear them")
    values = {column.name: getattr(key, column.name) for column in keys.c}
    connection.execute(sa.insert(keys).values(values))


def change_key(name: str, new: dict[str, Any], connection: Connection) -> None:
    """Changes columns of a valid key; raises UnknownId if there is none of this name.

    With a new expiry, a key that has expired may be changed too.
    """
    is_named = (keys.c.name == name, keys.c.revoked.is_(None))
    lasts = sa.true() if "expires" in new else keys.c.expires.is_(None) | (keys.c.expires > time.time())
    if not connection.execute(sa.update(keys).where(*is_named, lasts).values(new)).rowcount:
        raise UnknownId(f"There is no valid key called {name}")


def add_entry(entry: AuditEntry, connection: Connection) -> None:
    """Adds an entry to the audit trail, if it is not there."""
    values = {**asdict(entry), "detail": json.dumps(entry.detail)}
    connection.execute(AUDIT[connection.dialect.name], values)


def read_entry(row: sa.Row[Any]) -> AuditEntry:
    """Returns the entry of a row of the audit trail."""
    values = {name: value for name, value in row._mapping.items() if name != "number"}
    return AuditEntry(**{**values, "detail": json.loads(values["detail"])})
