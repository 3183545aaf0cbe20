"""Opens a database by its URL: its tables are up to date, and its commits are durable."""

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
from serving.feedback.store.records import StoreAway, StoreError, StoreFull

MIGRATIONS = Path(__file__).parent / "migrations"
WAIT_S = 30.0
"""Seconds that one process waits for another one to finish writing."""
PATIENCE: dict[str, Any] = {"connect_timeout": 5, "keepalives_idle": 30, "tcp_user_timeout": 30_000}
"""Limits of connections to PostgreSQL (s, s and ms), so that the loss of a server is noticed."""
WRITERS_LOCK = 0x7261796C69676E
"""Number of PostgreSQL's advisory lock that a writer holds."""
FILE = "feedback.sqlite"
ENDPOINTS = "runs/serving"
"""Folder of the endpoints' folders where none is configured."""
WRITES = {"raylign_writes": True}
"""Execution option of connections that write."""


def default_database(folder: Path) -> str:
    """Returns the URL of an endpoint's database where none is configured: a file in its folder, beside its versions."""
    return f"sqlite:///{folder / FILE}"


def find_database(location: str | None) -> str:
    """Returns the URL of the database that a command is about.

    Args:
        location: a URL, or an endpoint's folder, which may be new; None is the one endpoint below `runs/serving`.

    Raises:
        ConfigError: no endpoint is there, or more than one.
    """
    if location is not None:
        return location if ":" in location else default_database(Path(location).expanduser().absolute())
    endpoints = [folder for folder in sorted(Path(ENDPOINTS).glob("*")) if (folder / "versions").is_dir()]
    if len(endpoints) == 1:
        return default_database(endpoints[0].absolute())
    endpoint_list = f"there are {', '.join(map(str, endpoints))}" if endpoints else f"there is none below {ENDPOINTS}"
    hint = f". What was kept before stands in {old}: --database sqlite:///{old}" if (old := old_file()) else ""
    raise ConfigError(
        f"--database has to name the endpoint's folder, as {ENDPOINTS}/NAME, or a URL: {endpoint_list}{hint}"
    )


def old_file() -> Path | None:
    """Returns the one file for all endpoints of a user that earlier releases used; None if there is no such file."""
    folder = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    file = Path(folder).expanduser() / "raylign" / FILE
    return file if file.is_file() else None


def engine_of(url: str) -> Engine:
    """Returns an SQLAlchemy engine for a database; it opens no connection yet.

    Raises:
        ServingError: the URL names no database that can be used.
    """
    database_url = _parse_url(url)
    return _sqlite(database_url) if database_url.get_backend_name() == "sqlite" else _postgresql(database_url)


def prepare(engine: Engine) -> None:
    """Creates what is missing in a database, and brings its tables up to date.

    Raises:
        ServingError: the database is of a newer raylign.
        StoreAway: the database does not answer.
        StoreFull: the database has no space left.
    """
    try:
        if engine.dialect.name == "sqlite":
            _make_file(Path(str(engine.url.database)))
        _migrate(engine)
    except SQLAlchemyError as error:
        raise store_error_of(error, f"The database {_public_url(engine.url)} cannot be opened") from error


def lock(connection: Connection) -> None:
    """Lets one writer at a time into its transaction, so that row numbers become visible in their order."""
    if connection.dialect.name == "postgresql":  # SQLite has done it in `_begin`
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITERS_LOCK)))


def empty_log(engine: Engine) -> None:
    """Moves the contents of SQLite's write-ahead log into the database and empties the log.

    `secure_delete` overwrites deleted texts in the database, and not in the log. A reader at this moment keeps the log
    as it is until the next call, which comes within the hour. PostgreSQL removes deleted rows by its own vacuum, and
    its log by its checkpoints.
    """
    if engine.dialect.name == "sqlite":
        with suppress(SQLAlchemyError), engine.connect() as connection:
            connection.connection.driver_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[union-attr]


def store_error_of(error: SQLAlchemyError, context: str = "The feedback database cannot be used now") -> StoreError:
    """Returns the store's error for a failure of the database; its text quotes no data."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    # Only the low byte is SQLite's error; PostgreSQL's code is five characters.
    if getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL or getattr(cause, "sqlstate", "") == "53100":
        return StoreFull("The disk of the feedback database is full; nothing of this was stored")
    reason = next(iter(str(cause or "").splitlines()), "")
    return StoreAway(f"{context}: {reason or type(error).__name__}")


def is_fault_of_database(error: Exception) -> TypeGuard[SQLAlchemyError]:
    """Returns whether every other write would have failed too."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, OperationalError | InternalError | TimeoutError)


def _parse_url(url: str) -> URL:
    try:
        database_url = make_url(url)
    except ArgumentError as error:  # whose text quotes the password
        raise ServingError("database must be sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME") from error
    if database_url.drivername in ("postgresql", "postgres"):
        database_url = database_url.set(drivername="postgresql+psycopg")
    if database_url.drivername not in ("sqlite", "postgresql+psycopg") or not database_url.database:
        raise ServingError(
            f"{_public_url(database_url)} is no database that can be used; "
            "give sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME"
        )
    return database_url


def _public_url(url: URL) -> str:
    """Returns a URL without its passwords. SQLAlchemy hides the one before the host, and not one in the query."""
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
    (mode,) = _set_wal_mode(connection)
    if mode != "wal":
        raise ServingError(f"SQLite cannot keep a write-ahead log beside this database (it says {mode!r})")
    for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _set_wal_mode(connection: sqlite3.Connection) -> Any:
    """Switches to the write-ahead log; returns the row with SQLite's answer."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return connection.execute("PRAGMA journal_mode=WAL").fetchone()
        except sqlite3.OperationalError as error:  # this is the one call that does not wait for other processes
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
    """Brings the tables up to date in one transaction. Of several processes, one does it and the others wait."""
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
            raise ServingError(f"The database {_public_url(engine.url)} is of a newer raylign: {error}") from error
