"""The page of every key of every YAML file."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from alignment.settings.data import SourceConfig
from alignment.settings.old_names import OLD_KEYS, OLD_VALUES
from alignment.settings.plugins import (
    AlgorithmConfig,
    ScorerConfig,
    algorithm_class,
    algorithm_names,
    scorer_class,
    scorer_names,
)
from alignment.settings.section import Section
from cluster.config import ClusterRunConfig
from cluster.pipeline import PipelineConfig
from docs.generate.text import NOTICE, anchor, first_paragraph, item, join_names, page_text, type_text, value_text
from serving.config import FurtherModelConfig, ModelSettings, ServeConfig
from serving.registry.gate import GateConfig


def configuration_page() -> str:
    """Every key of every YAML file, with its type, its default and what it means."""
    algorithms = [(name, algorithm_class(name)) for name in algorithm_names()]
    scorers = [(name, scorer_class(name)) for name in scorer_names()]
    sections = _Sections()
    blocks = [
        "# Configuration",
        NOTICE,
        "Every key of the YAML files. `raylign schema` prints the JSON Schema of a run's file, with which editors "
        "complete and explain keys. An unknown key is refused, with the nearest known one.",
        "## A run: `raylign train`",
        *sections.render("", ClusterRunConfig),
        "## Algorithms: `algorithm:`",
        "`name` chooses the algorithm, and with it the other keys.",
        *_family(AlgorithmConfig, algorithms),
        "## Scorers: `rewards:` and `eval_rewards:`",
        "A list; `name` chooses the scorer, and with it the other keys.",
        *_family(ScorerConfig, scorers),
        "## A chain of runs: `raylign pipeline`",
        *sections.render("", PipelineConfig),
        "## An endpoint: `raylign serve`",
        *sections.render("", ServeConfig),
        "## A gate: `raylign promote --gate`",
        *sections.render("", GateConfig),
        "## Names of before",
        "Keys and values of the release before are read by these names too, with a note that says the new one.",
        *_old_names(),
    ]
    return page_text(blocks)


def _old_names() -> Iterator[str]:
    values = {f"{key}: {old}": f"{key}: {new}" for (key, old), new in OLD_VALUES.items()}
    rows = "\n".join(f"| `{old}` | `{new}` |" for old, new in (OLD_KEYS | values).items())
    yield f"| before | now |\n|---|---|\n{rows}"


class _Sections:
    """The sections of one page, each of which is explained where it comes first."""

    def __init__(self) -> None:
        self._paths: dict[type[Section], str] = {}

    def render(self, path: str, kind: type[Section]) -> Iterator[str]:
        """The keys of a section, and then the sections in it, each under its path, as `model.lora`."""
        if path:
            yield f"### `{path}`"
        if kind in self._paths:
            yield f"The keys of {self._link(kind)}."
            return
        self._paths[kind] = path
        if path:
            yield first_paragraph(kind)
        is_source = issubclass(kind, SourceConfig) and kind is not SourceConfig
        is_further_model = kind is FurtherModelConfig
        shared = SourceConfig.model_fields if is_source else ModelSettings.model_fields if is_further_model else {}
        names = [name for name in kind.model_fields if name not in shared]
        inner = {name: section for name in names if (section := _inner_section(kind.model_fields[name]))}
        yield _keys(kind, names)
        if is_source:
            yield f"And, where there is one source, the keys of [`{path}.mixture`](#{anchor(f'{path}.mixture')})."
        if is_further_model:
            keys = join_names(list(ModelSettings.model_fields), "and")
            yield f"And these keys of the endpoint, each with the endpoint's value where it does not stand: {keys}."
        for name, section in inner.items():
            yield from self.render(f"{path}.{name}" if path else name, section)

    def _link(self, kind: type[Section]) -> str:
        path = self._paths[kind]
        return f"[`{path}`](#{anchor(path)})"


def _family(base: type[Section], members: list[tuple[str, type[Section]]]) -> Iterator[str]:
    """Classes that are chosen by name: first the keys that several share, then those of each."""
    kinds = [kind for _, kind in members]
    modules = [kind.__module__ for kind in kinds]
    for parent in _ancestors(kinds, base):
        takers = [name for name, kind in members if issubclass(kind, parent)]
        yield "### Keys of " + ("all" if len(takers) == len(members) else join_names(takers, "and"))
        yield _keys(parent, _own_keys(parent))
    for name, kind in members:
        yield f"### `{name}`"
        has_module = modules.count(kind.__module__) == 1
        yield first_paragraph(sys.modules[kind.__module__] if has_module else kind)
        yield _keys(kind, [key for key in _own_keys(kind) if key != "name"]) or "It has no keys of its own."
        names = [parent_name for parent_name, parent in members if parent is not kind and issubclass(kind, parent)]
        if names:
            yield f"And the keys of {join_names(names, 'and')}."


def _ancestors(kinds: list[type[Section]], base: type[Section]) -> list[type[Section]]:
    """The classes with keys that others of a family are made of, the most general first."""
    parents = {parent for kind in kinds for parent in kind.__mro__ if issubclass(parent, base)} - set(kinds)
    return sorted(filter(_own_keys, parents), key=lambda parent: (len(parent.__mro__), parent.__name__))


def _own_keys(kind: type[Section]) -> list[str]:
    """The keys that a class declares itself."""
    return [name for name in kind.model_fields if name in inspect.get_annotations(kind)]


def _keys(kind: type[Section], names: Iterable[str]) -> str:
    schema = kind.model_json_schema(by_alias=False)
    fields = kind.model_fields
    return "\n".join(
        item(name, [type_text(schema["properties"][name], schema), *_default(fields[name])], fields[name].description)
        for name in names
    )


def _default(field: FieldInfo) -> list[str]:
    if field.is_required():
        return ["required"]
    value = field.get_default(call_default_factory=True)
    return [] if isinstance(value, Section) or value in ((), {}) else [f"default {value_text(value)}"]


def _inner_section(field: FieldInfo) -> type[Section] | None:
    """The section that a key holds, alone or in a list; None if it holds values, or what its `name` chooses."""
    kinds: list[Any] = [field.annotation]
    while kinds:
        kind = kinds.pop()
        if isinstance(kind, type) and issubclass(kind, Section) and kind not in (AlgorithmConfig, ScorerConfig):
            return kind
        kinds += get_args(kind)
    return None
