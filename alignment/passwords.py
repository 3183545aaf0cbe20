"""Passwords in URLs: finds them where none is allowed, and hides them in texts for people."""

from __future__ import annotations

import re

IN_URL = re.compile(r"(://[^:/@\s]*:)\S+@|(\b(?:ssl)?password=)[^&\s'\"]+", re.IGNORECASE)
"""`scheme://user:PASSWORD@host` and `?password=PASSWORD`."""


def holds_password(url: str) -> bool:
    """True if a URL has a password, before its host or in its query."""
    return IN_URL.search(url) is not None


def without_passwords(text: str) -> str:
    """Returns the text with `***` in place of every password of a URL."""
    return IN_URL.sub(lambda match: f"{match[1]}***@" if match[1] else f"{match[2]}***", text)
