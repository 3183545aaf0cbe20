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
    "cache_gb": "kv_cache_gib",
    "gpu_memory": "gpu_memory_utilization",
    "max_sequences": "max_num_seqs",
    "tensor_parallel": "tensor_parallel_size",
    "prompts": "num_prompts",
}
"""Old keys of any section, and their new names."""
SYNONYMS = {"loss": "loss_type"}
"""Other names of keys, which stay."""
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
        name = _current_name(key, fields)
        if name != key and name in values:
            kind = "the old name" if key in OLD_KEYS else "another name"
            raise ValueError(f"{key} is {kind} of {name}, and both are given; leave {key} out")
        if name != key and key in OLD_KEYS:
            _log_old_name(key, name)
        section[name] = _current_value(name, value)
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
    """The other names of a key: old ones and synonyms, or the name that these stand for."""
    pairs = (OLD_KEYS | SYNONYMS).items()
    return [name for alias, name in pairs if alias == key] + [alias for alias, name in pairs if name == key]


def _current_name(key: str, fields: Collection[str]) -> str:
    """The field that a key stands for; the key itself if it is a field, or stands for none."""
    name = OLD_KEYS.get(key) or SYNONYMS.get(key, key)
    return name if key not in fields and name in fields else key


def _current_value(name: str, value: Any) -> Any:
    """The new name of a key's value; the value itself if it has none."""
    if not isinstance(value, str) or (name, value) not in OLD_VALUES:
        return value
    _log_old_name(f"{name}: {value}", f"{name}: {OLD_VALUES[name, value]}")
    return OLD_VALUES[name, value]


@functools.cache
def _log_old_name(old: str, new: str) -> None:
    """Logs a note, once in a process."""
    logger.warning("the setting %s is called %s now; its old name works in this release only", old, new)
