"""Keys: who may come in, for as long as the database says so."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignment.errors import ConfigError
from serving.config import ServeConfig
from serving.feedback.keys import ROLES, Key, KeyCache, KeyLifetime, Keys, create_key, rotate_key
from serving.feedback.store import Store
from serving.feedback.store.opening import find_database
from serving.feedback.store.records import Conflict, StoreAway, UnknownId
from serving.launch import _other_database
from serving.registry.versions import Registry
from tests.commands import raylign_here
from tests.databases import connection_to, new_database

VISIBLE_AFTER_S = 6.0
"""A change is seen after one second; machines that run tests may be busy."""


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    opened = Store(database)
    yield opened
    opened.close()


@pytest.fixture
def keys(store: Store) -> Iterator[Keys]:
    opened = Keys(store)
    yield opened
    opened.close()


def bearer(key: str) -> list[bytes]:
    return [f"Bearer {key}".encode()]


def soon(condition: Callable[[], bool]) -> None:
    """Waits as long as a change may take to be seen."""
    deadline = time.monotonic() + VISIBLE_AFTER_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def raylign(*arguments: str, database: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`raylign keys` in a process of its own."""
    command = [sys.executable, "-m", "cluster.cli", "keys", *arguments]
    environment = {**os.environ, "RAYLIGN_DATABASE": database, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def keys_here(*arguments: str, database: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`raylign keys` in this process."""
    return raylign_here("keys", *arguments, RAYLIGN_DATABASE=database, **variables)


def test_a_key_lets_in_whom_it_was_made_for(store: Store) -> None:
    made = {name: create_key(store, name=name, role=role) for name, role in zip(("u", "l", "a"), ROLES, strict=True)}
    keys = Keys(store)
    assert {name: keys.authenticate(bearer(key)) for name, key in made.items()} == {
        "u": Key(name="u", role="user"),
        "l": Key(name="l", role="labeller"),
        "a": Key(name="a", role="admin"),
    }
    keys.close()


def test_a_role_may_what_those_below_it_may() -> None:
    allowed = {role: [asked for asked in ROLES if Key(name="x", role=role).allows(asked)] for role in ROLES}
    assert allowed == {"user": ["user"], "labeller": ["user", "labeller"], "admin": ["user", "labeller", "admin"]}


def test_a_monitor_may_read_the_figures_and_nothing_else() -> None:
    monitor = Key(name="prometheus", role="monitor")
    assert monitor.allows("monitor") and not any(monitor.allows(role) for role in ROLES)
    assert [role for role in ROLES if Key(name="x", role=role).allows("monitor")] == ["admin"]


def test_everything_but_one_sound_header_with_the_right_secret_is_refused(store: Store) -> None:
    key = create_key(store, name="anna", role="admin")
    other = create_key(store, name="ben", role="user")
    keys = Keys(store)
    _, id, secret = key.split("_", 2)
    good = f"Bearer {key}".encode()
    for scheme in ("Bearer", "bearer", "BEARER"):  # RFC 7235: its case means nothing
        assert keys.authenticate([f"{scheme} {key}".encode()]) == Key(name="anna", role="admin")
    wrong_secret = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    refused: list[list[bytes]] = [
        [],
        [good, good],
        [good, b"Bearer x"],
        [b""],
        [key.encode()],
        [b"Basic " + key.encode()],
        [b"Bearer  " + key.encode()],
        [good + b" "],
        [good + b"\n"],
        [good + b", " + good],
        [good[:-1]],
        [good + b"A"],
        [f"Bearer rk_{id}_{wrong_secret}".encode()],
        [f"Bearer rk_{id}_".encode()],
        [f"Bearer rk_{'0' * 16}_{secret}".encode()],
        [f"Bearer rk_{other.split('_')[1]}_{secret}".encode()],
        [f"Bearer rk_{id.upper()}_{secret}".encode()] if id.upper() != id else [],
        [b"Bearer \xff\xfe" + key.encode()],
        [b"Bearer " + b"x" * 1_000_000],
    ]
    for headers in refused:
        assert keys.authenticate(headers) is None, headers
    keys.close()


def test_only_hashes_are_kept(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'keys.sqlite'}")
    key = create_key(store, name="anna", role="user")
    store.close()
    kept = (tmp_path / "keys.sqlite").read_bytes()
    assert b"anna" in kept
    assert key.split("_", 2)[2].encode() not in kept


def test_new_revoked_and_rotated_keys_are_seen_by_a_running_service(keys: Keys, database: str) -> None:
    other = Store(database)  # as that of another process
    key = create_key(other, name="anna", role="labeller")
    soon(lambda: keys.authenticate(bearer(key)) == Key(name="anna", role="labeller"))
    rotated = rotate_key(other, "anna")
    soon(lambda: keys.authenticate(bearer(rotated)) == Key(name="anna", role="labeller"))
    assert keys.authenticate(bearer(key)) is None
    other.revoke_key("anna")
    soon(lambda: keys.authenticate(bearer(rotated)) is None)
    other.close()


def test_keys_are_managed_by_command(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'keys.sqlite'}"
    store = Store(database)
    keys = Keys(store)
    key = raylign("create", "--name", "anna", "--role", "admin", database=database).stdout.strip()
    soon(lambda: keys.authenticate(bearer(key)) == Key(name="anna", role="admin"))
    rotated = keys_here("rotate", "anna", database=database).stdout.strip()
    soon(lambda: keys.authenticate(bearer(rotated)) == Key(name="anna", role="admin"))
    assert keys.authenticate(bearer(key)) is None
    assert keys_here("revoke", "anna", database=database).returncode == 0
    soon(lambda: keys.authenticate(bearer(rotated)) is None)
    told = keys_here("list", database=database).stdout
    assert "anna" in told and "revoked" in told
    assert rotated.split("_", 2)[2] not in told
    keys.close()
    store.close()


def test_a_key_that_was_made_elsewhere_becomes_valid_by_command_and_is_printed_nowhere(tmp_path: Path) -> None:
    """Such as one that lies in a Secret of Kubernetes, whose job may run again."""
    database = f"sqlite:///{tmp_path / 'keys.sqlite'}"
    key = f"rk_{'a1' * 8}_{'Secret-_' * 5}abc"
    command = ("create", "--name", "operator", "--role", "admin", "--key-from", "FIRST_KEY")
    for create in (raylign, keys_here):
        ended = create(*command, database=database, FIRST_KEY=key)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    store = Store(database)
    keys = Keys(store)
    assert keys.authenticate(bearer(key)) == Key(name="operator", role="admin")
    keys.close()
    store.close()
    for value in (key[:-1], "", f"{key}\n{key}"):
        assert keys_here(*command, database=database, FIRST_KEY=value).returncode != 0
    other = keys_here(*command, database=database, FIRST_KEY=key.replace("a1", "b2"))
    assert other.returncode != 0 and "operator" in other.stderr and key[20:] not in other.stderr


def test_a_name_is_used_once_because_judgements_bear_it(store: Store) -> None:
    create_key(store, name="anna", role="user")
    with pytest.raises(Conflict, match="anna"):
        create_key(store, name="anna", role="admin")
    store.revoke_key("anna")
    with pytest.raises(Conflict, match="anna"):
        create_key(store, name="anna", role="admin")
    for gone in (lambda: store.revoke_key("anna"), lambda: rotate_key(store, "anna"), lambda: store.revoke_key("ben")):
        with pytest.raises(UnknownId):
            gone()


def test_a_name_is_plain(store: Store) -> None:
    for name in ("", " anna", "a b", "../anna", "<b>", "é", "a\n", "a" * 101, "-x"):
        with pytest.raises(ConfigError, match="a key's name has"):
            create_key(store, name=name, role="user")


def test_while_the_database_is_away_those_who_were_in_stay_in(postgresql: str) -> None:
    database = new_database(postgresql)
    store = Store(database)
    key = create_key(store, name="anna", role="user")
    keys = Keys(store)
    name = database.rpartition("/")[2]
    with connection_to(f"{postgresql}/postgres") as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")  # type: ignore[call-overload]
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        with pytest.raises(StoreAway):
            store.keys()
        time.sleep(1.5)
        assert keys.authenticate(bearer(key)) == Key(name="anna", role="user")
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")  # type: ignore[call-overload]
        store.revoke_key("anna")
        soon(lambda: keys.authenticate(bearer(key)) is None)
    keys.close()
    store.close()


def test_who_was_in_stays_in_after_a_start_without_the_database(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    database = f"sqlite:///{path}"
    store = Store(database)
    key = create_key(store, name="anna", role="user")
    short = create_key(store, name="ben", role="user", lifetime_s=1.0)
    gone = create_key(store, name="cleo", role="admin")
    kept = KeyCache(tmp_path, database)
    keys = Keys(store, kept)
    store.revoke_key("cleo")
    soon(lambda: keys.authenticate(bearer(gone)) is None)
    keys.close()
    store.close()

    file = tmp_path / "keys.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert not any(each.split("_", 2)[2] in file.read_text() for each in (key, short, gone))
    for each in tmp_path.glob("keys.sqlite*"):
        each.rename(tmp_path / f"away-{each.name}")
    path.mkdir()  # root may read any file, and no folder is a database
    store = Store(database, may_be_away=True)
    keys = Keys(store, KeyCache(tmp_path, database))
    assert keys.authenticate(bearer(key)) == Key(name="anna", role="user")
    assert keys.authenticate(bearer(gone)) is None
    soon(lambda: keys.authenticate(bearer(short)) is None)
    with pytest.raises(StoreAway, match="unable to open"):
        Keys(store)
    with pytest.raises(StoreAway, match="unable to open"):
        Keys(store, KeyCache(tmp_path, "sqlite:///another"))
    keys.close()
    store.close()


def test_the_command_explains_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'keys.sqlite'}"
    done = raylign("revoke", "nobody", database=database)
    assert (done.returncode, done.stderr) == (1, "UnknownId: There is no valid key called nobody\n")
    done = keys_here("create", "--name", "anna", "--role", "labeler", database=database)
    assert done.returncode == 2 and "labeller" in done.stderr
    done = keys_here(database=database)
    assert done.returncode == 2 and "Missing command" in done.stderr


def test_a_key_ends_by_itself(store: Store) -> None:
    short = create_key(store, name="anna", role="user", lifetime_s=0.5)
    long = create_key(store, name="ben", role="user", lifetime_s=3600)
    keys = Keys(store)
    assert keys.authenticate(bearer(short)) == Key(name="anna", role="user")
    soon(lambda: keys.authenticate(bearer(short)) is None)
    assert keys.authenticate(bearer(long)) == Key(name="ben", role="user")
    with pytest.raises(UnknownId):
        rotate_key(store, "anna")
    again = rotate_key(store, "anna", lifetime=KeyLifetime.parse("never"))
    soon(lambda: keys.authenticate(bearer(again)) == Key(name="anna", role="user"))
    keys.close()


def test_a_role_is_changed_and_the_key_stays(keys: Keys, store: Store) -> None:
    key = create_key(store, name="anna", role="user")
    store.set_role("anna", "labeller")
    soon(lambda: keys.authenticate(bearer(key)) == Key(name="anna", role="labeller"))
    store.revoke_key("anna")
    with pytest.raises(UnknownId):
        store.set_role("anna", "admin")


def test_expiry_and_role_are_set_by_command_and_all_of_it_is_written_down(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'keys.sqlite'}"
    key = raylign("create", "--name", "anna", "--role", "user", "--expires", "30d", database=database).stdout.strip()
    assert "valid until" in keys_here("list", database=database).stdout
    assert keys_here("set-role", "anna", "admin", database=database).returncode == 0
    keys_here("rotate", "anna", "--expires", "never", database=database)
    keys_here("revoke", "anna", database=database)
    wrong = keys_here("create", "--name", "ben", "--role", "user", "--expires", "soon", database=database)
    assert wrong.returncode == 1 and "30d" in wrong.stderr
    store = Store(database)
    trail = store.audit_trail(limit=10)
    assert [entry.action for entry in trail] == ["revoke key", "rotate key", "set role", "create key"]
    assert {entry.who for entry in trail} == {f"{getpass.getuser()}@{socket.gethostname()}"}
    assert {entry.detail["name"] for entry in trail} == {"anna"}
    assert trail[1].detail["expires"] is None and trail[2].detail["role"] == "admin"
    assert [entry.id for entry in store.audit_trail(limit=2, before_id=trail[1].id)] == [one.id for one in trail[2:]]
    store.close()
    assert key.split("_", 2)[2].encode() not in (tmp_path / "keys.sqlite").read_bytes()


def test_keys_are_those_of_the_one_endpoint_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with pytest.raises(ConfigError, match=r"as runs/serving/NAME, or a URL: there is none below runs/serving$"):
        find_database(None)
    (tmp_path / "runs/serving/one/versions").mkdir(parents=True)
    (tmp_path / "runs/serving/notes").mkdir()
    assert find_database(None) == f"sqlite:///{tmp_path}/runs/serving/one/feedback.sqlite"
    (tmp_path / "runs/serving/two/versions").mkdir(parents=True)
    with pytest.raises(ConfigError, match="there are runs/serving/one, runs/serving/two"):
        find_database(None)
    assert find_database("runs/serving/new") == f"sqlite:///{tmp_path}/runs/serving/new/feedback.sqlite"
    assert find_database("postgresql://h/n") == "postgresql://h/n"


def test_keys_of_before_are_not_forgotten_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    registry, config = Registry(tmp_path / "serving"), ServeConfig(checkpoint="x")
    assert _other_database(config, registry) is None
    old = tmp_path / "raylign" / "feedback.sqlite"
    Store(f"sqlite:///{old}").close()
    assert f"feedback.database=sqlite:///{old}" in str(_other_database(config, registry))
    with pytest.raises(ConfigError, match=f"--database sqlite:///{old}"):
        find_database(None)
    Store(f"sqlite:///{registry.folder}/feedback.sqlite").close()
    assert _other_database(config, registry) is None
