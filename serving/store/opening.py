"""From a database's URL to an engine whose tables are up to date and whose commits are durable."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InternalError, OperationalError, SQLAlchemyError, TimeoutError

from alignment.errors import ConfigError, ServingError
from alignment.passwords import without_passwords
from serving.store.records import StoreAway, StoreError, StoreFull

MIGRATIONS = Path(__file__).parent / "migrations"
WAIT_S = 30.0
"""How long one process waits for another one to finish writing."""
PATIENCE: dict[str, Any] = {"connect_timeout": 5, "keepalives_idle": 30, "tcp_user_timeout": 30_000}
"""Of connections to PostgreSQL, s and ms: a server that vanishes is noticed."""
WRITERS_LOCK = 0x7261796C69676E
"""PostgreSQL's advisory lock that whoever writes holds."""
FILE = "feedback.sqlite"
ENDPOINTS = "runs/serving"
"""Where endpoints have their folders if none is configured."""
WRITES = {"raylign_writes": True}
"""Execution option of connections that write."""


def default_database(folder: Path) -> str:
    """URL of an endpoint's database if none is configured: a file in its folder, beside its versions."""
    return f"sqlite:///{folder / FILE}"


def found_database(given: str | None) -> str:
    """URL of the database that a command is about.

    Args:
        given: a URL, or an endpoint's folder, which may be new; None is the one endpoint below `runs/serving`.

    Raises:
        ConfigError: there is none, or more than one.
    """
    if given is not None:
        return given if ":" in given else default_database(Path(given).expanduser().absolute())
    endpoints = [folder for folder in sorted(Path(ENDPOINTS).glob("*")) if (folder / "versions").is_dir()]
    if len(endpoints) == 1:
        return default_database(endpoints[0].absolute())
    have = f"there are {', '.join(map(str, endpoints))}" if endpoints else f"there is none below {ENDPOINTS}"
    before = f". What was kept before stands in {old}: --database sqlite:///{old}" if (old := old_file()) else ""
    raise ConfigError(f"--database has to name the endpoint's folder, as {ENDPOINTS}/NAME, or a URL: {have}{before}")


def old_file() -> Path | None:
    """The one file for all endpoints of a user, where keys and feedback were kept before; None if there is none."""
    folder = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    file = Path(folder).expanduser() / "raylign" / FILE
    return file if file.is_file() else None


def engine_of(url: str) -> Engine:
    """Connections to a database, of which none is open yet.

    Raises:
        ServingError: the URL names no database that can be used.
    """
    parsed = _parsed(url)
    return _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _postgresql(parsed)


def prepare(engine: Engine) -> None:
    """Creates what is missing in a database, and brings its tables up to date.

    Raises:
        ServingError: it is of a newer raylign.
        StoreAway: it does not answer.
        StoreFull: it has no space left.
    """
    try:
        if engine.dialect.name == "sqlite":
            _make_file(Path(str(engine.url.database)))
        _migrate(engine)
    except SQLAlchemyError as error:
        raise named(error, f"The database {_shown(engine.url)} cannot be opened") from error


def lock(connection: Connection) -> None:
    """Lets one writer at a time into the transaction, so that numbers become visible in their order."""
    if connection.dialect.name == "postgresql":  # SQLite has done it in `_begin`
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITERS_LOCK)))


def empty_log(engine: Engine) -> None:
    """Moves what SQLite's write-ahead log holds into the database and cuts the log: `secure_delete` overwrites texts in
    the database alone. Somebody who reads just then keeps the log until the next time, which is within the hour.

    Of PostgreSQL, deleted rows go with its own vacuum, and its log with its checkpoints.
    """
    if engine.dialect.name == "sqlite":
        with suppress(SQLAlchemyError), engine.connect() as connection:
            connection.connection.driver_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[union-attr]


def named(error: SQLAlchemyError, what: str = "The feedback database cannot be used now") -> StoreError:
    """The error that a failure of the database means for those who ask, in words that quote no data."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    # Only the low byte is SQLite's error; PostgreSQL's code is five characters.
    if getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL or getattr(cause, "sqlstate", "") == "53100":
        return StoreFull("The disk of the feedback database is full; nothing of this was stored")
    reason = next(iter(str(cause or "").splitlines()), "")
    return StoreAway(f"{what}: {reason or type(error).__name__}")


def is_fault_of_database(error: Exception) -> TypeGuard[SQLAlchemyError]:
    """Whether everything else would have failed too."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, OperationalError | InternalError | TimeoutError)


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:  # whose text quotes the password
        raise ServingError("database must be sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME") from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg") or not parsed.database:
        raise ServingError(
            f"{_shown(parsed)} is no database that can be used; "
            "give sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME"
        )
    return parsed


def _shown(url: URL) -> str:
    """A URL for people. SQLAlchemy hides the password before the host, and not one in the query."""
    return without_passwords(url.render_as_string())


def _sqlite(url: URL) -> Engine:
    assert url.database is not None
    path = Path(url.database).expanduser().absolute()
    engine = sa.create_engine(
        url.set(database=str(path)), hide_parameters=True, connect_args={"timeout": WAIT_S, "isolation_level": None}
    )
    sa.event.listen(engine, "connect", _set_up_sqlite)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _make_file(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)  # SQLite gives its other files the same rights
    except OSError as error:
        raise StoreAway(f"The database {path} cannot be opened: {error.strerror}") from error


def _set_up_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    (mode,) = _in_wal_mode(connection)
    if mode != "wal":
        raise ServingError(f"SQLite cannot keep a write-ahead log beside this database (it says {mode!r})")
    for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _in_wal_mode(connection: sqlite3.Connection) -> Any:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return connection.execute("PRAGMA journal_mode=WAL").fetchone()
        except sqlite3.OperationalError as error:  # here alone SQLite does not wait for other processes by itself
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("raylign_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _postgresql(url: URL) -> Engine:
    patience = {name: value for name, value in PATIENCE.items() if name not in url.query}
    engine = sa.create_engine(
        url, hide_parameters=True, pool_pre_ping=True, isolation_level="READ COMMITTED", connect_args=patience
    )
    sa.event.listen(engine, "connect", _set_up_postgresql)
    return engine


def _set_up_postgresql(connection: Any, _: Any) -> None:
    connection.execute(f"SET lock_timeout = '{WAIT_S:g}s'")
    # A server may be configured to acknowledge what a power cut can still undo.
    connection.execute("SET synchronous_commit = on")
    connection.commit()


def _migrate(engine: Engine) -> None:
    """Several processes may do this at once: the first one does it, in one transaction, and the others wait."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.connect().execution_options(**WRITES) as connection, connection.begin():
        lock(connection)
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise ServingError(f"The database {_shown(engine.url)} is of a newer raylign: {error}") from error
