"""What the code promises of its own shape: names that say what they hold, classes of one name each, no cycles.

`python -m tests.house --details` lists what is counted, with file and line.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bare_words import is_bare, is_bare_for_a_function
from tests.house import (
    PACKAGES,
    ROOT,
    House,
    Module,
    bare,
    fields,
    import_cycles,
    locals_and_parameters,
    repeated_classes,
    table,
    walk_through,
    without_docstring,
)
from tests.walks import WALKS

MAX_BARE_SHARE = 0.01
"""Of bare words among the local names and parameters of a package."""
MAX_HOPS = dict(zip(WALKS, (8, 10), strict=True))
"""Functions on each way."""


@pytest.fixture(scope="module")
def house() -> House:
    return House.read(ROOT)


def module(text: str, path: str = "alignment/sample.py") -> Module:
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return Module(name=name, path=path, text=text)


@pytest.mark.parametrize("package", PACKAGES)
def test_names_say_what_they_hold(house: House, package: str) -> None:
    names = [name for module in house.package(package) for name in locals_and_parameters(module)]
    bare_names = bare(names)
    lines = "\n".join(f"{name.location}: {name.name}, in {name.owner}" for name in bare_names)
    assert len(bare_names) <= MAX_BARE_SHARE * len(names), f"{len(bare_names)} of {len(names)} are bare words:\n{lines}"


def test_a_class_name_names_one_class(house: House) -> None:
    assert not repeated_classes(house.modules)


def test_no_modules_import_each_other_not_even_inside_functions(house: House) -> None:
    assert not import_cycles(house.modules, in_functions=True)


@pytest.mark.parametrize("label", WALKS)
def test_the_way_from_a_command_to_a_loss_is_short(house: House, label: str) -> None:
    walk = walk_through(house.modules, WALKS[label])
    assert walk, (
        f"functions have other names now; write down in tests/walks.py how one comes through the code ({label})"
    )
    assert len(walk) <= MAX_HOPS[label]


@pytest.mark.parametrize("name", ["told", "found", "given", "_kept", "one", "each", "now", "place", "loaded", "asking"])
def test_participles_pronouns_and_adverbs_are_bare(name: str) -> None:
    assert is_bare(name)


@pytest.mark.parametrize("name", ["seed", "string", "embedding", "chosen", "run", "kept_rows", "logprobs", "id"])
def test_nouns_are_not_bare(name: str) -> None:
    assert not is_bare(name)


def test_a_function_may_be_called_by_any_verb() -> None:
    assert not is_bare_for_a_function("read")
    assert not is_bare_for_a_function("_put")
    assert is_bare_for_a_function("taken")


def test_every_name_that_a_function_binds_is_counted_once() -> None:
    text = """
def outer(first, *rest, key=None, **others):
    total = sum(each for each in rest)
    total += (last := first)
    with open(key) as file:
        pass
    for a, (b, c) in others:
        total = a
    try:
        import json
    except OSError as error:
        pass
    def inner(value):
        nonlocal total
        total = value
    return lambda x: x
"""
    names = [(name.owner, name.name) for name in locals_and_parameters(module(text))]
    outer = {"first", "rest", "key", "others", "total", "each", "last", "file", "a", "b", "c", "error", "x"}
    assert sorted(names) == sorted([*(("outer", name) for name in outer), ("outer.inner", "value")])


def test_members_of_a_class_are_counted_wherever_it_sets_them() -> None:
    text = """
class Pool:
    size: int = 0
    limit = 3
    def __init__(self):
        self.lost, self.free = [], []
        self.size = 1
"""
    assert [name.name for name in fields(module(text))] == ["size", "limit", "lost", "free"]


def test_an_import_inside_a_function_closes_a_cycle_too() -> None:
    modules = [
        module("from alignment import second", "alignment/first.py"),
        module("def load():\n    from alignment.first import name", "alignment/second.py"),
        module("if TYPE_CHECKING:\n    from alignment.fourth import Name", "alignment/third.py"),
        module("import alignment.third", "alignment/fourth.py"),
    ]
    assert import_cycles(modules, in_functions=False) == []
    assert import_cycles(modules, in_functions=True) == [["alignment.first", "alignment.second"]]
    assert len(import_cycles(modules, in_functions=True, for_types=True)) == 2


def test_relative_imports_are_followed() -> None:
    modules = [
        module("from . import second", "alignment/data/__init__.py"),
        module("from ..data import name", "alignment/data/second.py"),
    ]
    assert len(import_cycles(modules, in_functions=False)) == 1


def test_only_what_is_public_needs_a_docstring() -> None:
    text = """
class Open:
    def method(self): ...
    def _private(self): ...
class _Closed:
    def method(self): ...
def documented():
    "Says something."
    def inside(): ...
"""
    assert without_docstring([module(text)]) == ["alignment/sample.py:2 Open", "alignment/sample.py:3 Open.method"]


def test_a_way_is_one_on_which_every_function_names_the_next() -> None:
    modules = [
        module("def main():\n    second.Loop().step()", "alignment/first.py"),
        module("class Loop:\n    def step(self): ...", "alignment/second.py"),
    ]
    way = ("alignment.first:main", "alignment.second:Loop.step")
    assert walk_through(modules, [("alignment.first:run",), way]) == way
    assert walk_through(modules, [("alignment.second:Loop.step", "alignment.first:main")]) == ()


def test_the_table_has_a_column_for_each_state_of_the_code() -> None:
    text = table({"before": {"cycles": "2"}, "now": {"cycles": "0"}})
    assert text.splitlines() == ["| figure | before | now |", "|---|---|---|", "| cycles | 2 | 0 |"]


def test_files_are_read_below_the_packages_alone(tmp_path: Path) -> None:
    for path in ("alignment/__init__.py", "alignment/data/chat.py", "tests/test_chat.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    assert [module.name for module in House.read(tmp_path).modules] == ["alignment", "alignment.data.chat"]
