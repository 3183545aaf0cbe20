"""Ids of answers. By an id, an endpoint knows that it issued it, and when, before any database knows the answer.

An id ends with 32 hexadecimal digits: 8 are the second, 12 are random, and 12 are a keyed check of both (HMAC, RFC
2104). All ingresses of an endpoint share the key. Somebody who guesses a check is only told to ask again.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from pathlib import Path

from filelock import FileLock

from alignment.files import write_durably

ID = re.compile(r"(?:chatcmpl|cmpl|cmp)-([0-9a-f]{20})([0-9a-f]{12})(?:-[0-9]{1,9})?")
"""The id of an answer, or of a group of answers."""


class Ids:
    """Issues ids, and recognises them. It is safe to use from several threads and processes."""

    def __init__(self, folder: Path) -> None:
        """`folder`: the endpoint's folder, which holds the key; the key is made on first use."""
        self._key = _key(folder)

    def issue(self) -> str:
        """Returns 32 hexadecimal digits that were never issued before."""
        body = f"{int(time.time()):08x}{secrets.token_hex(6)}"
        return body + self._check(body)

    def age_s(self, id: str) -> float | None:
        """Returns the seconds since this endpoint issued an id; None if it never issued it."""
        match = ID.fullmatch(id)
        if match is None or not hmac.compare_digest(match[2], self._check(match[1])):
            return None
        return max(0.0, time.time() - int(match[1][:8], 16))

    def _check(self, body: str) -> str:
        return hmac.new(self._key, body.encode(), hashlib.sha256).hexdigest()[:12]


def _key(folder: Path) -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "ids.key"
    with FileLock(folder / ".ids.lock"):
        if not file.is_file():
            write_durably(file, secrets.token_bytes(32), mode=0o600)
        return file.read_bytes()
