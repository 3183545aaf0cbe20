"""Old names of keys and values: a configuration of an earlier release loads, with a note that says the new name."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from typing import Any

logger = logging.getLogger(__name__)

OLD_KEYS = {
    "ratio_per": "importance_level",
    "loss_per": "loss_aggregation",
    "kl_in": "kl_placement",
    "correction": "importance_correction",
    "judges": "eval_rewards",
    "prompts": "num_prompts",
}
"""Old keys of any section, and their new names."""
OLD_VALUES = {("attention", "blocks"): "grouped"}
"""Old values of a key, and their new names."""


def with_new_names(values: dict[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """Gives the keys and values of a section their new names; logs each old name once.

    Args:
        values: the section as it was written.
        fields: the keys that the section has.

    Raises:
        ValueError: a key is given by its old and by its new name.
    """
    section: dict[str, Any] = {}
    for key, value in values.items():
        name = key
        if key not in fields and OLD_KEYS.get(key) in fields:
            name = OLD_KEYS[key]
            if name in values:
                raise ValueError(f"{key} is the old name of {name}, and both are given; leave {key} out")
            _log_old_name(key, name)
        if isinstance(value, str) and (name, value) in OLD_VALUES:
            _log_old_name(f"{name}: {value}", f"{name}: {OLD_VALUES[name, value]}")
            value = OLD_VALUES[name, value]
        section[name] = value
    return section


def rename_old_keys(settings: Any, current: Any) -> Any:
    """Gives old keys in the stored settings of a run their new names, at any depth.

    Args:
        settings: settings as JSON, as an earlier release stored them.
        current: the same settings as this release stores them; a key is renamed if they have the new name only.
    """
    if not isinstance(settings, dict) or not isinstance(current, dict):
        return settings
    names = {key: OLD_KEYS[key] for key in settings if key not in current and OLD_KEYS.get(key) in current}
    return {
        names.get(key, key): rename_old_keys(value, current.get(names.get(key, key))) for key, value in settings.items()
    }


def other_names(key: str) -> list[str]:
    """The old names of a key, or the new name of an old key."""
    return [new for old, new in OLD_KEYS.items() if old == key] + [old for old, new in OLD_KEYS.items() if new == key]


@functools.cache
def _log_old_name(old: str, new: str) -> None:
    """Logs a note, once in a process."""
    logger.warning("the setting %s is called %s now; its old name works in this release only", old, new)
