"""Finds the files of a folder that hold the rows of a split: by a README as the hub's, or by the names of the files."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path

import yaml

from alignment.data.files import DECOMPRESS, DEFAULT_SPLIT, KINDS, SEPARATORS, SPLIT_WORDS, file_kind, is_data_file
from alignment.errors import DataError

logger = logging.getLogger(__name__)

SAVED_SET = ("dataset_info.json", "state.json")
"""Files beside the .arrow files in a folder written by `save_to_disk` of `datasets`."""
NO_DATA = (*SAVED_SET, "dataset_infos.json", "dataset_dict.json", "config.json")
"""Files that describe a data set and hold no rows."""
SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
NO_SPLIT = ("part", "data", "shard", "chunk", "file", "output", "batch")
"""First words in the names of shards that name no split."""
DEFAULT_CONFIG = "default"


def data_files(folder: Path, split: str, config: str | None = None) -> list[Path]:
    """Returns the files, and folders of saved sets, that hold the rows of a split, in the order of their names.

    The README of a data set from the hub says which files belong to a split. Without one, the names do: `train.jsonl`,
    `train-00000-of-00001.parquet`, `my_test.csv`, `train/a.jsonl`. If no name says a split, all files are the split
    `train`.

    Args:
        split: the name of a split, or of several, as `train+test`.
        config: the configuration (`data.name`) of a data set with several: one that the README names, or a folder.

    Raises:
        DataError: the folder has no file of that split, no such configuration, or the same rows twice; the text names
            the splits or configurations that there are.
    """
    splits_by_file = _declared_splits(folder, config)
    if not splits_by_file and config is not None:
        if not (folder / config).is_dir() and config != DEFAULT_CONFIG:
            raise DataError(f"{folder}: has no configuration {config!r}: neither its README nor a folder is called so")
        folder = folder / config if (folder / config).is_dir() else folder
    files = _list_data_files(folder)
    if not files:
        raise DataError(f"{folder}: holds no file of a known kind ({KINDS})")
    if splits_by_file:
        splits = {file: splits_by_file.get(file, []) for file in files}
    else:
        splits = {file: _split_names(file.relative_to(folder)) for file in files}
    if not any(splits.values()):
        if split != DEFAULT_SPLIT:
            raise DataError(f"{folder}: has no split {split!r}: its files' names say no split")
        return _drop_duplicate_forms(folder, files)
    selected_files = _select_split(folder, split, splits)
    skipped_names = [file.name for file in files if not splits[file]]
    if skipped_names:
        logger.warning("%s: the names of %s say no split, so they are not read", folder, ", ".join(skipped_names[:3]))
    return _drop_duplicate_forms(folder, [file for file in files if file in selected_files])


def _select_split(folder: Path, split: str, splits: dict[Path, list[str]]) -> set[Path]:
    """The files of a split, or of several.

    Args:
        splits: the names that stand for the split of each file.

    Raises:
        DataError: a split has no file; the text names the splits that there are.
    """
    selected_files: set[Path] = set()
    for name in split.split("+"):
        split_files = [file for file, names in splits.items() if name in names]
        if not split_files:
            choices = ", ".join(sorted({names[0] for names in splits.values() if names}))
            raise DataError(f"{folder}: has no split {name!r}; there are {choices}. Choose one by split")
        selected_files.update(split_files)
    return selected_files


def may_hold_split(path: Path, split: str) -> bool:
    """True if a single file can be read as this split. Every file is `train`, and a .json may hold several splits."""
    names = [DEFAULT_SPLIT, *_split_names(Path(path.name))]
    return file_kind(path) == ".json" or all(name in names for name in split.split("+"))


def _list_data_files(folder: Path) -> list[Path]:
    files = []
    for path in sorted(folder.rglob("*")):
        components = path.relative_to(folder).parts
        if any(component.startswith((".", "__", "_delta_log")) for component in components) or path.name in NO_DATA:
            continue
        if _is_saved_set(path) or (path.is_file() and is_data_file(path)):
            files.append(path)
    return [folder] if _is_saved_set(folder) else files


def _declared_splits(folder: Path, config: str | None) -> dict[Path, list[str]]:
    """The splits of each file by the `configs` in the head of a README, as the hub reads it; empty if it has none.

    Raises:
        DataError: the README has several configurations, and `config` is none of them.
    """
    readme = folder / "README.md"
    sections = readme.read_text(encoding="utf-8", errors="replace").split("---", 2) if readme.is_file() else []
    try:
        head = yaml.safe_load(sections[1]) if len(sections) == 3 and not sections[0].strip() else None
    except yaml.YAMLError:
        return {}
    configs = head.get("configs") if isinstance(head, dict) else None
    entries = [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []
    named_entries = {
        str(entry.get("config_name", DEFAULT_CONFIG)): entry for entry in entries if entry.get("data_files")
    }
    if not named_entries:
        return {}
    defaults = (name for name, entry in named_entries.items() if entry.get("default") or len(named_entries) == 1)
    default = next(defaults, DEFAULT_CONFIG)
    if (config or default) not in named_entries:
        reason = "none is named" if config is None else f"{config!r} is none of them"
        raise DataError(
            f"{folder}: has the configurations {', '.join(named_entries)}, and {reason}. Choose one by name"
        )
    files = named_entries[config or default]["data_files"]
    splits: dict[Path, list[str]] = {}
    for entry in files if isinstance(files, list) else [files]:
        patterns = entry.get("path") if isinstance(entry, dict) else entry
        split = str(entry.get("split", DEFAULT_SPLIT)) if isinstance(entry, dict) else DEFAULT_SPLIT
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            for file in folder.glob(str(pattern).removeprefix("./")):
                splits.setdefault(file, []).append(split)
    return splits


def _is_saved_set(path: Path) -> bool:
    return path.is_dir() and all((path / name).is_file() for name in SAVED_SET)


def _split_names(path: Path) -> list[str]:
    """Names for the split of a file, from its path in the folder; an empty list if no name says one."""
    shard = SHARD.match(path.name)
    if shard and shard["split"] not in NO_SPLIT:
        return [shard["split"]]
    for name in (_stem(path).name, *reversed(path.parts[:-1])):
        words = [word for word in re.split(r"[-._ 0-9]+", name.lower()) if word in SPLIT_WORDS]
        if words:
            return [SPLIT_WORDS[words[-1]], words[-1], name]
    return []


def _drop_duplicate_forms(folder: Path, files: list[Path]) -> list[Path]:
    """The files without tables, if there are JSON or parquet files that hold the same rows.

    Raises:
        DataError: two files differ in their suffixes alone, so that the same rows would be read twice.
    """
    tables = [file for file in files if file.is_file() and file_kind(file) in SEPARATORS]
    if tables and len(tables) < len(files):
        logger.warning("%s: holds JSON or parquet files, so %s is not read", folder, tables[0].name)
        files = [file for file in files if file not in tables]
    stems = Counter(map(_stem, files))
    double = next((stem for stem, count in stems.items() if count > 1), None)
    if double is not None:
        names = [file.name for file in files if _stem(file) == double]
        raise DataError(f"{folder}: {' and '.join(names)} would be the same rows twice; take one of them away")
    return files


def _stem(path: Path) -> Path:
    """The path of a file without the suffixes of its kind and its compression."""
    plain = path.with_suffix("") if path.suffix in DECOMPRESS else path
    return plain.with_suffix("") if file_kind(path) else plain
