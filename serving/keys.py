"""Who may come in: bearer keys with roles, kept hashed, looked up in memory, and managed by `raylign keys`.

A key is `rk_{id}_{secret}`. The id finds it, the secret proves it; the secret has 256 random bits, so one round of
SHA-256 is enough to keep it.
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
from serving.files import write_whole

if TYPE_CHECKING:  # SQLAlchemy takes a third of a second, and --help must not
    from serving.store import Store
    from serving.store.records import StoredKey

Role = Literal["monitor", "user", "labeller", "admin"]
ROLES: tuple[Role, ...] = ("user", "labeller", "admin")
"""Each may do what those before it may. Beside them, `monitor` may read the figures, and nothing else."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}"
KEY = re.compile(rb"Bearer rk_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
REFRESH_S = 1.0
UNITS_S = {"h": 3600.0, "d": 86_400.0}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Key:
    """Whom a request comes from."""

    name: str
    role: Role

    def may(self, role: Role) -> bool:
        """Whether this key may do what is meant for `role`."""
        if self.role == "monitor" or role == "monitor":
            return self.role in (role, "admin")
        return ROLES.index(self.role) >= ROLES.index(role)


class KeptKeys:
    """The valid keys as they were last read, in a file that its owner alone may read, without their secrets: an ingress
    can start by them while the database is away."""

    def __init__(self, folder: Path, database: str) -> None:
        """
        Args:
            folder: of the registry.
            database: URL of the database that they are of; those of another one count for nothing.
        """
        self._file = folder / "keys.json"
        self._database = database
        self._written: bytes | None = None

    def read(self) -> list[StoredKey] | None:
        """The keys; None if none were kept."""
        from serving.store.records import StoredKey

        try:
            kept = json.loads(self._file.read_bytes())
            return [StoredKey(**key) for key in kept["keys"]] if kept["database"] == self._database else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, keys: list[StoredKey]) -> None:
        """Keeps the keys, if they have changed.

        Raises:
            OSError: they cannot be written. Another ingress may have done it at the same moment.
        """
        content = json.dumps({"database": self._database, "keys": [asdict(key) for key in keys]}).encode()
        if content != self._written:
            write_whole(self._file, content)
            self._written = content


class Keys:
    """The valid keys, at most a second or two old. While the database is away, those that were valid last."""

    def __init__(self, store: Store, kept: KeptKeys | None = None) -> None:
        """
        Args:
            kept: where keys are kept for a start without the database.

        Raises:
            StoreAway: the database cannot be read, and none are kept.
        """
        from serving.store.records import StoreAway

        self._store = store
        self._kept = kept
        self._cannot_keep = False
        try:
            self._known = self._valid()
        except StoreAway:
            keys = kept.read() if kept is not None else None
            if keys is None:
                raise
            self._known = {key.id: key for key in keys}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="keys", daemon=True)
        self._thread.start()

    def who(self, authorization: list[bytes]) -> Key | None:
        """Whom a request comes from; None refuses it.

        Args:
            authorization: all its `Authorization` headers. Two are refused: another program may look at the other.
        """
        found = KEY.fullmatch(authorization[0]) if len(authorization) == 1 else None
        if found is None:
            return None
        stored = self._known.get(found[1].decode())
        # An unknown id takes as long as a wrong secret.
        matches = hmac.compare_digest(_digest(found[2]), stored.digest if stored else "0" * 64)
        if stored is None or not matches or not stored.is_valid(time.time()):
            return None
        return Key(name=stored.name, role=stored.role)

    def close(self) -> None:
        """Ends the refreshing; the store stays open."""
        self._done.set()
        self._thread.join()

    def _refresh(self) -> None:
        fails = False
        while not self._done.wait(REFRESH_S):
            try:
                self._known, fails = self._valid(), False
            except Exception as error:  # whatever it is: without this thread, no key could be revoked
                if not fails:
                    logger.warning("Keys stay as they are until the database can be read again: %s", error)
                fails = True

    def _valid(self) -> dict[str, StoredKey]:
        keys = [key for key in self._store.keys() if key.revoked is None]  # noqa: SIM118  # not a dict
        if self._kept is not None:
            try:
                self._kept.write(keys)
                self._cannot_keep = False
            except OSError as error:
                if not self._cannot_keep:
                    logger.warning("Keys cannot be kept for a start while the database is away: %s", error)
                self._cannot_keep = True
        return {key.id: key for key in keys}


def create_key(store: Store, *, name: str, role: Role, lasts_s: float | None = None) -> str:
    """Makes a key that is valid at once, and returns it: it is kept nowhere.

    Args:
        lasts_s: seconds after which it is refused; None is never.

    Raises:
        ConfigError: the name is not one.
        Conflict: it is taken.
    """
    _check_name(name)
    stored, key = _new(name, role, lasts_s)
    store.add_key(stored)
    return key


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME, name):
        raise ConfigError("a key's name has 1 to 100 letters, digits, dots, dashes, underscores and @, a letter first")


def register_key(store: Store, key: str, *, name: str, role: Role, lasts_s: float | None = None) -> None:
    """Makes a key valid that was made elsewhere, in the form of ours. Once more with the same key changes nothing.

    Raises:
        ConfigError: the name is not one, or the key has another form.
        Conflict: there is another key of this name.
    """
    _check_name(name)
    parts = KEY.fullmatch(b"Bearer " + key.encode())
    if parts is None:
        raise ConfigError("a key is rk_, 16 hexadecimal digits, _, and 43 letters, digits, dashes and underscores")
    stored = _stored(parts[1].decode(), parts[2], name=name, role=role, lasts_s=lasts_s)
    wanted = (stored.name, stored.id, stored.digest, stored.role)
    valid = [other for other in store.keys() if other.revoked is None]  # noqa: SIM118  # not a dict
    if wanted not in [(other.name, other.id, other.digest, other.role) for other in valid]:
        store.add_key(stored)


def rotate_key(store: Store, name: str, *, lasts: Lasting | None = None) -> str:
    """Makes another key in place of one of this name, and returns it; the old one is refused from then on.

    Args:
        lasts: how long from now it is valid, also if the old one has expired; None leaves its expiry as it is.

    Raises:
        UnknownId: there is no valid key of this name.
    """
    stored, key = _new(name, "user", lasts.seconds if lasts else None)  # the role stays what it is
    store.renew_key(stored, keeps_expiry=lasts is None)
    return key


@dataclass(frozen=True, kw_only=True)
class Lasting:
    """How long a key is valid."""

    seconds: float | None
    """None is for ever."""

    @classmethod
    def of(cls, text: str) -> Lasting:
        """Reads `30d`, `12h` or `never`.

        Raises:
            ConfigError: it is none of these.
        """
        parts = re.fullmatch(r"([1-9][0-9]{0,4})([dh])", text)
        if parts:
            return cls(seconds=int(parts[1]) * UNITS_S[parts[2]])
        if text == "never":
            return cls(seconds=None)
        raise ConfigError(f"--expires is a number of days or hours, as 30d or 12h, or never, and not {text!r}")


def _new(name: str, role: Role, lasts_s: float | None = None) -> tuple[StoredKey, str]:
    id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    return _stored(id, secret.encode(), name=name, role=role, lasts_s=lasts_s), f"rk_{id}_{secret}"


def _stored(id: str, secret: bytes, *, name: str, role: Role, lasts_s: float | None = None) -> StoredKey:
    from serving.store.records import StoredKey

    now = time.time()
    expires = None if lasts_s is None else now + lasts_s
    return StoredKey(id=id, name=name, role=role, digest=_digest(secret), created=now, expires=expires)


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
    lasts_s = Lasting.of(expires or "never").seconds
    with opened_store(database) as store:
        if key_from is None:
            typer.echo(create_key(store, name=name, role=role, lasts_s=lasts_s))
        else:
            from alignment.rewards.remote import key_from as value_of

            register_key(store, value_of(key_from), name=name, role=role, lasts_s=lasts_s)


@commands.command("list")
def _list(database: Database = None) -> None:
    """Print who has a key."""
    with opened_store(database) as store:
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
    with opened_store(database) as store:
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
    with opened_store(database) as store:
        store.set_role(name, role)


@commands.command("rotate")
def _rotate(
    name: Annotated[str, typer.Argument(help="Whose key.")], database: Database = None, expires: Expires = None
) -> None:
    """Replace a key and print the new one.

    A running endpoint refuses the old one within two seconds. Without --expires, the new one expires as the old one.
    """
    lasts = None if expires is None else Lasting.of(expires)
    with opened_store(database) as store:
        typer.echo(rotate_key(store, name, lasts=lasts))


@contextmanager
def opened_store(database: str | None) -> Iterator[Store]:
    """The database of a command, closed afterwards.

    Args:
        database: its URL or the endpoint's folder; None is the one endpoint there is.
    """
    from serving.store import Store
    from serving.store.opening import found_database

    store = Store(found_database(database))
    try:
        yield store
    finally:
        store.close()


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%MZ")
