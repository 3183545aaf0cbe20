"""Refuses JSON objects that have a key twice: `json` keeps the last value, and the other one would be lost."""

from __future__ import annotations

import json
from typing import Any

from alignment.errors import DataError


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of an object's keys and values; it is an `object_pairs_hook` of `json.loads`.

    Raises:
        DataError: a key occurs twice.
    """
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"an object has the key {key!r:.50} twice, and only one of its values could be read")
    return mapping


def check_keys(text: Any, field: str) -> None:
    """Checks the objects in a text that is JSON; any other value passes.

    Raises:
        DataError: an object in the text has a key twice.
    """
    if not isinstance(text, str):
        return
    try:
        json.loads(text, object_pairs_hook=unique_keys)
    except DataError as error:
        raise DataError(f"{field}: {error}") from error
    except (ValueError, RecursionError):
        return
