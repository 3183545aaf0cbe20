"""Ids of answers, which tell an endpoint that it issued them, and when, before any database knows of them.

An id ends in 32 hexadecimal digits: 8 of the second, 12 at random, 12 of a keyed check over both (HMAC, RFC 2104).
All ingresses of an endpoint share the key. Who guesses a check gains nothing but to be told to ask again.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from pathlib import Path

from filelock import FileLock

from serving.files import write_whole

ID = re.compile(r"(?:chatcmpl|cmpl|cmp)-([0-9a-f]{20})([0-9a-f]{12})(?:-[0-9]{1,9})?")
"""Of an answer, or of a group of answers."""


class Ids:
    """Issues ids and knows its own. Safe to use from several threads and processes."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the endpoint, where the key is kept; it is made on first use."""
        self._key = _key(folder)

    def fresh(self) -> str:
        """32 hexadecimal digits that were never issued before."""
        body = f"{int(time.time()):08x}{secrets.token_hex(6)}"
        return body + self._check(body)

    def age_s(self, id: str) -> float | None:
        """Seconds since this endpoint issued an id; None if it never did."""
        parts = ID.fullmatch(id)
        if parts is None or not hmac.compare_digest(parts[2], self._check(parts[1])):
            return None
        return max(0.0, time.time() - int(parts[1][:8], 16))

    def _check(self, body: str) -> str:
        return hmac.new(self._key, body.encode(), hashlib.sha256).hexdigest()[:12]


def _key(folder: Path) -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "ids.key"
    with FileLock(folder / ".ids.lock"):
        if not file.is_file():
            write_whole(file, secrets.token_bytes(32))
        return file.read_bytes()
