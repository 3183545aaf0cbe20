"""Databases to test with: files of SQLite, and a real PostgreSQL server of our own where Debian's package is there."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import free_port


@contextmanager
def postgresql_server() -> Iterator[str]:
    """URL of a running server, to which the name of a database has to be added; skips where there can be none."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="raylign-postgresql-"))
    try:
        user = _unprivileged(folder)
        options = ["-U", "raylign", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run(
            [programs[-1] / "initdb", "-D", folder / "data", *options],
            cwd=folder, check=True, stdout=subprocess.DEVNULL, **user,
        )  # fmt: skip
        yield from _running(programs[-1], folder, user)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged(folder: Path) -> dict[str, Any]:
    """Who runs the server, as arguments of `subprocess`: it refuses to be root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")


def _running(programs: Path, folder: Path, user: dict[str, Any]) -> Iterator[str]:
    port = free_port()
    # No fsync: these tests kill processes, not the machine.
    settings = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
    command = [programs / "postgres", "-D", folder / "data", *(part for each in settings for part in ("-c", each))]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **user)
    url = f"postgresql+psycopg://raylign@127.0.0.1:{port}"
    try:
        _wait(server, url, folder / "log")
        yield url
    finally:
        server.send_signal(signal.SIGQUIT)  # at once: what it holds is thrown away
        server.wait(timeout=30)


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with connection_to(f"{url}/postgres"):
                return
        except psycopg.OperationalError:
            time.sleep(0.05)
    raise AssertionError(log.read_text())


def connection_to(url: str) -> psycopg.Connection[Any]:
    """A plain connection, in which every statement is committed by itself."""
    return psycopg.connect(url.replace("+psycopg", ""), autocommit=True)


def new_database(server: str) -> str:
    """URL of an empty database."""
    name = f"test_{uuid.uuid4().hex}"
    with connection_to(f"{server}/postgres") as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
    return f"{server}/{name}"


def new_schema(server: str) -> str:
    """The same for an empty schema of one that exists, which is made sooner."""
    name = f"test_{uuid.uuid4().hex}"
    with connection_to(f"{server}/postgres") as connection:
        connection.execute(f"CREATE SCHEMA {name}")  # type: ignore[call-overload]
    return f"{server}/postgres?options=-csearch_path%3D{name}"
