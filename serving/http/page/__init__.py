"""The web page of an endpoint. People chat with the model there, and give feedback on its answers.

A browser gets the files beside this one as they are: there is no build step, and nothing comes from other hosts. The
files hold no data, so they need no key. What the page shows comes from the HTTP API, with the key that a person gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

INDEX = "index.html"
"""Name of the page itself, served at `/`; it asks for the other files under `page/`, relative to where it is."""

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "base-uri 'none'",
    # So texts of models and people can become markup nowhere, not even by a mistake in our own scripts.
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "content-security-policy": "; ".join(_POLICY),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",  # a page of an older release must not be used with a newer service
    }
)
"""Headers of every one of the page's files."""


@dataclass(frozen=True, kw_only=True)
class PageFile:
    """One file of the page."""

    body: bytes
    media_type: str


@cache
def page_files() -> Mapping[str, PageFile]:
    """Returns every file of the page by its name (`index.html`, `page.js`, …). They are read once."""
    entries = [entry for entry in files(__name__).iterdir() if _suffix(entry.name) in MEDIA_TYPES]
    return MappingProxyType(
        {
            entry.name: PageFile(body=entry.read_bytes(), media_type=MEDIA_TYPES[_suffix(entry.name)])
            for entry in entries
        }
    )


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2]
