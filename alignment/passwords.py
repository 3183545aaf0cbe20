"""Passwords in URLs: found where there must be none, and hidden where the text is told."""

from __future__ import annotations

import re

IN_URL = re.compile(r"(://[^:/@\s]*:)\S+@|(\b(?:ssl)?password=)[^&\s'\"]+", re.IGNORECASE)
"""`scheme://user:PASSWORD@host` and `?password=PASSWORD`."""


def holds_password(url: str) -> bool:
    """Whether a URL has a password in it, before its host or behind its path."""
    return IN_URL.search(url) is not None


def without_passwords(text: str) -> str:
    """The same with `***` in place of each password of a URL in it."""
    return IN_URL.sub(lambda found: f"{found[1]}***@" if found[1] else f"{found[2]}***", text)
