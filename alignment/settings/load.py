"""Reading a YAML file, with overrides from the command line, into a checked configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from alignment.errors import ConfigError
from alignment.settings.explain import explain
from alignment.settings.old_names import other_names
from alignment.settings.plugins import search_for_modules
from alignment.settings.section import Section, sections_of

MERGE_KEY = "tag:yaml.org,2002:merge"
"""YAML's `<<`, which a mapping may have several of."""

NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

Config = TypeVar("Config", bound=Section)


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, kind: type[Config]) -> Config:
    """Reads a YAML file (None: nothing), applies `section.key=value` overrides and checks the result against `kind`.

    Functions that it names are looked for in the file's folder too, by this process and by the Ray workers that it
    starts.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; the text lists every problem found.
    """
    tree = {} if path is None else _read(path)
    if path is not None:
        search_for_modules(Path(path).parent)
    for override in overrides:
        _apply(tree, override)
    try:
        return check_config(_with_nulls(tree, kind), kind=kind)
    except ConfigError as error:
        if path is None:
            raise
        raise ConfigError(f"{path}:\n{error}") from error


def check_config(tree: dict[str, Any], *, kind: type[Config]) -> Config:
    """Checks settings that are read already against `kind`.

    Raises:
        ConfigError: a key or value is wrong; the text has a line for every problem.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, kind, tree))) from error


class _YamlTrap(ValueError):
    """Something that YAML reads in another way than its author means it."""

    line: int
    """Line of the file, from 1."""


class _DuplicateKey(_YamlTrap):
    """A key that one mapping has twice."""

    def __init__(self, key: yaml.ScalarNode, first_key: yaml.ScalarNode) -> None:
        self.line = key.start_mark.line + 1
        first_line = first_key.start_mark.line + 1
        location = "the same line" if first_line == self.line else f"line {first_line}"
        super().__init__(
            f"key {key.value!r} is given twice in one mapping, the other time in {location}; merge the two"
        )


class _OldNumber(_YamlTrap):
    """A number that YAML 1.1 reads in another base than ten: 010 as 8, and 1:30 as 90."""

    def __init__(self, number: yaml.ScalarNode, key: str) -> None:
        self.line = number.start_mark.line + 1
        base = "60" if ":" in number.value else "8"
        super().__init__(
            f"{key}{number.value} would be read in base {base}; write a number without leading zeros or colons, or "
            f"'{number.value}' in quotes for a text"
        )


class _StrictLoader(yaml.SafeLoader):
    """Refuses what YAML reads in another way than its author means it, without a word.

    That is a key that a mapping has twice, of which the last one would count, and a number in base 8 or 60.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and node.style is None and _is_old_number(node):
            raise _OldNumber(node, f"key {index.value!r}: " if isinstance(index, yaml.ScalarNode) else "")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE_KEY:
                first_key = keys.setdefault((key.tag, key.value), key)
                if first_key is not key:
                    raise _DuplicateKey(key, first_key)
        return node


def _is_old_number(node: yaml.ScalarNode) -> bool:
    """True if a plain scalar is a number in base 8 (with a leading zero) or 60 (with colons)."""
    if node.tag not in NUMBER_TAGS:
        return False
    return ":" in node.value or (node.tag == NUMBER_TAGS[0] and bool(re.match(r"[-+]?0[0-9_]", node.value)))


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_StrictLoader)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        tree = _parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except _YamlTrap as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, not {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last_key = key.split(".")
    if not equals or not all((*sections, last_key)):
        raise ConfigError(f"override {override!r} must have the form section.key=value, as optim.lr=1e-6")
    try:
        value = _parse(text)
    except _YamlTrap as error:
        raise ConfigError(f"override {override!r}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    container: Any = tree
    for section in sections:
        if isinstance(container, list):
            container = container[_index(container, section, override)]
        else:
            name = _name_in(container, section)
            if container.get(name) is None:
                container[name] = {}
            container = container[name]
        if not isinstance(container, dict | list):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
    if isinstance(container, list):
        container[_index(container, last_key, override)] = value
    else:
        for name in other_names(last_key):  # an override replaces the file's value by whichever name the file calls it
            container.pop(name, None)
        container[last_key] = value


def _name_in(container: dict[str, Any], key: str) -> str:
    """The name by which a tree has a key: its own, or an old or a new one of it."""
    return next((name for name in (key, *other_names(key)) if container.get(name) is not None), key)


def _index(items: list[Any], text: str, override: str) -> int:
    if not text.isdecimal() or int(text) >= len(items):
        raise ConfigError(f"override {override!r}: {text!r} is not an index below {len(items)}")
    return int(text)


def _with_nulls(value: Any, kind: type[Section]) -> Any:
    """A section's tree with null for the word None, which is Python's null, and for none where a key may be null."""
    if not isinstance(value, dict):
        return value
    tree = dict(value)
    for name, field in kind.model_fields.items():
        child = tree.get(name)
        words = ("None", "none") if type(None) in get_args(field.annotation) else ("None",)
        if child in words and isinstance(child, str):
            tree[name] = None
        elif sections := sections_of(field.annotation):
            is_mapping = get_origin(field.annotation) is dict
            tree |= {name: _children_with_nulls(child, sections[0], is_mapping=is_mapping)} if name in tree else {}
    return tree


def _children_with_nulls(child: Any, kind: type[Section], *, is_mapping: bool) -> Any:
    """The same of what a key holds: a section, a list of sections, or sections by their names."""
    if isinstance(child, list):
        return [_with_nulls(item, kind) for item in child]
    if is_mapping and isinstance(child, dict):
        return {name: _with_nulls(section, kind) for name, section in child.items()}
    return _with_nulls(child, kind)
