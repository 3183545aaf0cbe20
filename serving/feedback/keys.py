"""Bearer keys with roles. They are stored as hashes, looked up in memory, and managed by `raylign keys`.

A key is `rk_{id}_{secret}`. The id finds the stored key, and the secret proves that the client has it. The secret has
256 random bits, so that one round of SHA-256 is enough to hide it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from alignment.errors import ConfigError
from alignment.files import write_durably

if TYPE_CHECKING:  # SQLAlchemy takes a third of a second, and --help must not
    from serving.feedback.store import Store
    from serving.feedback.store.records import StoredKey

Role = Literal["monitor", "user", "labeller", "admin"]
ROLES: tuple[Role, ...] = ("user", "labeller", "admin")
"""Each role may do what the roles before it may. Apart from them, `monitor` may read the metrics, and nothing else."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}"
KEY = re.compile(rb"(?i:Bearer) rk_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
REFRESH_S = 1.0
UNITS_S = {"h": 3600.0, "d": 86_400.0}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Key:
    """The key of a request: its name says who sent the request."""

    name: str
    role: Role

    def allows(self, role: Role) -> bool:
        """Returns whether this key may do what needs a role."""
        if self.role == "monitor" or role == "monitor":
            return self.role in (role, "admin")
        return ROLES.index(self.role) >= ROLES.index(role)


class KeyCache:
    """The valid keys as they were last read, in a file without their secrets that only its owner may read.

    An ingress can start with them while the database is away.
    """

    def __init__(self, folder: Path, database: str) -> None:
        """
        Args:
            folder: folder of the registry.
            database: URL of the keys' database. Keys of another database are not used.
        """
        self._file = folder / "keys.json"
        self._database = database
        self._content: bytes | None = None

    def read(self) -> list[StoredKey] | None:
        """Returns the keys; None if there is no file with keys of this database."""
        from serving.feedback.store.records import StoredKey

        try:
            content = json.loads(self._file.read_bytes())
            return [StoredKey(**key) for key in content["keys"]] if content["database"] == self._database else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, keys: list[StoredKey]) -> None:
        """Writes the keys into the file, if they have changed.

        Raises:
            OSError: they cannot be written. Another ingress may have written them at the same moment.
        """
        content = json.dumps({"database": self._database, "keys": [asdict(key) for key in keys]}).encode()
        if content != self._content:
            write_durably(self._file, content, mode=0o600)
            self._content = content


class Keys:
    """The valid keys, at most a second or two old; while the database is away, the keys that were last valid."""

    def __init__(self, store: Store, cache: KeyCache | None = None) -> None:
        """
        Args:
            cache: the file for a start without the database.

        Raises:
            StoreAway: the database cannot be read, and the file has no keys.
        """
        from serving.feedback.store.records import StoreAway

        self._store = store
        self._cache = cache
        self._cache_fails = False
        try:
            self._valid_keys = self._read_store()
        except StoreAway:
            keys = cache.read() if cache is not None else None
            if keys is None:
                raise
            self._valid_keys = {key.id: key for key in keys}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="keys", daemon=True)
        self._thread.start()

    def authenticate(self, authorization: list[bytes]) -> Key | None:
        """Returns the key of a request; None refuses the request.

        Args:
            authorization: all `Authorization` headers of the request. Two headers are refused, since another program
                on the way may have looked at the other one.
        """
        match = KEY.fullmatch(authorization[0]) if len(authorization) == 1 else None
        if match is None:
            return None
        stored_key = self._valid_keys.get(match[1].decode())
        # An unknown id takes as much time as a wrong secret.
        matches = hmac.compare_digest(_digest(match[2]), stored_key.digest if stored_key else "0" * 64)
        if stored_key is None or not matches or not stored_key.is_valid(time.time()):
            return None
        return Key(name=stored_key.name, role=stored_key.role)

    def close(self) -> None:
        """Ends the thread that reads the keys. The store stays open."""
        self._stop.set()
        self._thread.join()

    def _refresh(self) -> None:
        fails = False
        while not self._stop.wait(REFRESH_S):
            try:
                self._valid_keys, fails = self._read_store(), False
            except Exception as error:  # of any kind: without this thread, no key could be revoked
                if not fails:
                    logger.warning("Keys stay as they are until the database can be read again: %s", error)
                fails = True

    def _read_store(self) -> dict[str, StoredKey]:
        """Returns the valid keys of the database by their ids, and writes them into the cache."""
        keys = [key for key in self._store.keys() if key.revoked is None]  # noqa: SIM118  # not a dict
        if self._cache is not None:
            try:
                self._cache.write(keys)
                self._cache_fails = False
            except OSError as error:
                if not self._cache_fails:
                    logger.warning("Keys cannot be kept for a start while the database is away: %s", error)
                self._cache_fails = True
        return {key.id: key for key in keys}


def create_key(store: Store, *, name: str, role: Role, lifetime_s: float | None = None) -> str:
    """Makes a key that is valid at once, and returns it. The key itself is stored nowhere.

    Args:
        lifetime_s: seconds after which the key is refused; None never refuses it.

    Raises:
        ConfigError: the name has a wrong form.
        Conflict: there is a key of this name.
    """
    _check_name(name)
    stored_key, key = _new_key(name, role, lifetime_s)
    store.add_key(stored_key)
    return key


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME, name):
        raise ConfigError("a key's name has 1 to 100 letters, digits, dots, dashes, underscores and @, a letter first")


def register_key(store: Store, key: str, *, name: str, role: Role, lifetime_s: float | None = None) -> None:
    """Makes a key valid that was made elsewhere, in the form of our keys. A second time changes nothing.

    Raises:
        ConfigError: the name or the key has a wrong form.
        Conflict: there is another key of this name.
    """
    _check_name(name)
    match = KEY.fullmatch(b"Bearer " + key.encode())
    if match is None:
        raise ConfigError("a key is rk_, 16 hexadecimal digits, _, and 43 letters, digits, dashes and underscores")
    stored_key = _stored_key(match[1].decode(), match[2], name=name, role=role, lifetime_s=lifetime_s)
    properties = (stored_key.name, stored_key.id, stored_key.digest, stored_key.role)
    valid_keys = [valid_key for valid_key in store.keys() if valid_key.revoked is None]  # noqa: SIM118  # not a dict
    if properties not in [(valid_key.name, valid_key.id, valid_key.digest, valid_key.role) for valid_key in valid_keys]:
        store.add_key(stored_key)


def rotate_key(store: Store, name: str, *, lifetime: KeyLifetime | None = None) -> str:
    """Replaces the key of this name, and returns the new key. The old key is refused from then on.

    Args:
        lifetime: how long the new key is valid, also if the old one has expired; None keeps the expiry of the old key.

    Raises:
        UnknownId: there is no valid key of this name.
    """
    stored_key, key = _new_key(name, "user", lifetime.seconds if lifetime else None)  # the role stays what it is
    store.renew_key(stored_key, keeps_expiry=lifetime is None)
    return key


@dataclass(frozen=True, kw_only=True)
class KeyLifetime:
    """How long a key is valid."""

    seconds: float | None
    """None never ends."""

    @classmethod
    def parse(cls, text: str) -> KeyLifetime:
        """Reads `30d`, `12h` or `never`.

        Raises:
            ConfigError: the text is none of these.
        """
        match = re.fullmatch(r"([1-9][0-9]{0,4})([dh])", text)
        if match:
            return cls(seconds=int(match[1]) * UNITS_S[match[2]])
        if text == "never":
            return cls(seconds=None)
        raise ConfigError(f"--expires is a number of days or hours, as 30d or 12h, or never, and not {text!r}")


def _new_key(name: str, role: Role, lifetime_s: float | None = None) -> tuple[StoredKey, str]:
    id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    return _stored_key(id, secret.encode(), name=name, role=role, lifetime_s=lifetime_s), f"rk_{id}_{secret}"


def _stored_key(id: str, secret: bytes, *, name: str, role: Role, lifetime_s: float | None = None) -> StoredKey:
    from serving.feedback.store.records import StoredKey

    created_at = time.time()
    expires = None if lifetime_s is None else created_at + lifetime_s
    return StoredKey(id=id, name=name, role=role, digest=_digest(secret), created=created_at, expires=expires)


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


commands = typer.Typer()

Database = Annotated[
    str | None,
    typer.Option(
        envvar="RAYLIGN_DATABASE",
        help="The endpoint's folder, as runs/serving/NAME, or the URL of its database (feedback.database); the "
        "default is the one endpoint below runs/serving.",
    ),
]


Expires = Annotated[
    str | None,
    typer.Option(help="How long it is valid from now on: days or hours, as 30d or 12h, or never."),
]


@commands.command("create")
def _create(
    name: Annotated[str, typer.Option(help="Who it is for. Judgements bear this name.")],
    role: Annotated[
        Role,
        typer.Option(help="user: completions and rewards; labeller: feedback too; admin: all; monitor: metrics alone."),
    ],
    database: Database = None,
    expires: Expires = None,
    key_from: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE", help="Make the key valid that this environment variable holds; print nothing."
        ),
    ] = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept.

    A name is used once, also after its key was revoked: judgements bear it.
    """
    lifetime_s = KeyLifetime.parse(expires or "never").seconds
    with open_store(database) as store:
        if key_from is None:
            typer.echo(create_key(store, name=name, role=role, lifetime_s=lifetime_s))
        else:
            from alignment.rewards.remote import key_from as value_of

            register_key(store, value_of(key_from), name=name, role=role, lifetime_s=lifetime_s)


@commands.command("list")
def _list(database: Database = None) -> None:
    """Print who has a key."""
    with open_store(database) as store:
        keys = store.keys()
    typer.echo(f"{'name':24} {'role':9} {'created':17} {'id':17} state")
    for key in keys:
        state = _state(key)
        typer.echo(f"{key.name:24} {key.role:9} {_day(key.created):17} {key.id:17} {state}")


def _state(key: StoredKey) -> str:
    if key.revoked is not None:
        return f"revoked {_day(key.revoked)}"
    if key.expires is None:
        return "valid"
    return f"{'valid until' if key.is_valid(time.time()) else 'expired'} {_day(key.expires)}"


@commands.command("revoke")
def _revoke(name: Annotated[str, typer.Argument(help="Whose key.")], database: Database = None) -> None:
    """Refuse a key from now on.

    A running endpoint learns it within two seconds, and then ends answers in progress too.
    """
    with open_store(database) as store:
        store.revoke_key(name)


@commands.command("set-role")
def _set_role(
    name: Annotated[str, typer.Argument(help="Whose key.")],
    role: Annotated[Role, typer.Argument(help="user, labeller, admin or monitor.")],
    database: Database = None,
) -> None:
    """Give a key another role.

    A running endpoint learns it within two seconds.
    """
    with open_store(database) as store:
        store.set_role(name, role)


@commands.command("rotate")
def _rotate(
    name: Annotated[str, typer.Argument(help="Whose key.")], database: Database = None, expires: Expires = None
) -> None:
    """Replace a key and print the new one.

    A running endpoint refuses the old one within two seconds. Without --expires, the new one expires as the old one.
    """
    lifetime = None if expires is None else KeyLifetime.parse(expires)
    with open_store(database) as store:
        typer.echo(rotate_key(store, name, lifetime=lifetime))


@contextmanager
def open_store(database: str | None) -> Iterator[Store]:
    """Opens the database that a command is about, and closes it when the block ends.

    Args:
        database: its URL, or the endpoint's folder; None is the only endpoint below `runs/serving`.
    """
    from serving.feedback.store import Store
    from serving.feedback.store.opening import find_database

    store = Store(find_database(database))
    try:
        yield store
    finally:
        store.close()


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%MZ")
