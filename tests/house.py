"""Measures the source code: names, sizes, import cycles, docstrings, and the README.

    python -m tests.house              the figures of the working tree
    python -m tests.house 7f14048      and of a commit before them, for comparison

`docs/house.md` has the table, and `tests/test_house.py` holds the limits.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from tests.bare_words import is_bare, is_bare_for_a_function
from tests.walks import WALKS

ROOT = Path(__file__).parent.parent
PACKAGES = ("alignment", "cluster", "serving")
LONG_FUNCTION, LONG_FILE = 40, 400
"""Lines; what is longer is counted."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Name:
    """A name that the code gives to something."""

    name: str
    location: str
    """As `alignment/losses.py:40`."""
    owner: str
    """Function or class that it stands in, as `Batch.cut`."""


@dataclass(frozen=True, kw_only=True)
class Module:
    """One source file."""

    name: str
    """As `alignment.losses`."""
    path: str
    """Below the root, as `alignment/losses.py`."""
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    @cached_property
    def definitions(self) -> list[tuple[str, Function | ast.ClassDef]]:
        """Every function and class with its qualified name, as `Batch.cut`."""
        return list(_definitions(self.tree, ()))

    @property
    def functions(self) -> list[tuple[str, Function]]:
        return [(name, node) for name, node in self.definitions if not isinstance(node, ast.ClassDef)]

    @property
    def classes(self) -> list[tuple[str, ast.ClassDef]]:
        return [(name, node) for name, node in self.definitions if isinstance(node, ast.ClassDef)]


@dataclass(frozen=True)
class House:
    """The packages below one folder."""

    root: Path
    modules: list[Module] = field(default_factory=list)

    @classmethod
    def read(cls, root: Path) -> House:
        """Reads every source file of the packages."""
        paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
        return cls(root, [_module(path, root) for path in paths])

    def package(self, name: str) -> list[Module]:
        """The modules of one package."""
        return [module for module in self.modules if module.name.split(".")[0] == name]


def locals_and_parameters(module: Module) -> list[Name]:
    """Every parameter and local name, once per function in which it is one; a lambda's belong to its function."""
    names = []
    for owner, function in module.functions:
        lines: dict[str, int] = {}
        outer_names: set[str] = set()
        for node in _own_nodes(function):
            for name in _bindings(node):
                lines.setdefault(name, getattr(node, "lineno", function.lineno))
            if isinstance(node, ast.Global | ast.Nonlocal):
                outer_names |= set(node.names)
        if function.name.startswith("__"):
            outer_names.add("other")  # what Python's documentation calls it in `__eq__` and its like
        names += [
            Name(name=name, location=f"{module.path}:{line}", owner=owner)
            for name, line in lines.items()
            if name not in outer_names | {"self", "cls"}
        ]
    return names


def fields(module: Module) -> list[Name]:
    """Every name that a class gives to its members, in its body or as `self.name = …`; once per class."""
    names = []
    for owner, class_ in module.classes:
        lines: dict[str, int] = {}
        for node in class_.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name):
                    lines.setdefault(target.id, node.lineno)
        for node in ast.walk(class_):
            is_stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if is_stored and isinstance(node.value, ast.Name) and node.value.id == "self":
                lines.setdefault(node.attr, node.lineno)
        names += [Name(name=name, location=f"{module.path}:{line}", owner=owner) for name, line in lines.items()]
    return names


def function_names(module: Module) -> list[Name]:
    """Every function and method, also those inside others."""
    return [
        Name(name=node.name, location=f"{module.path}:{node.lineno}", owner=owner) for owner, node in module.functions
    ]


def bare(names: list[Name]) -> list[Name]:
    """Those of locals, parameters and fields that say nothing of what they hold."""
    return [name for name in names if is_bare(name.name)]


def bare_functions(modules: list[Module]) -> list[Name]:
    """Functions whose names are neither verbs nor nouns."""
    return [name for module in modules for name in function_names(module) if is_bare_for_a_function(name.name)]


def long_functions(modules: list[Module]) -> list[str]:
    """Functions over 40 lines, from `def` to the last line of their bodies."""
    return [
        f"{module.path}:{node.lineno} {owner}"
        for module in modules
        for owner, node in module.functions
        if _num_lines(node) > LONG_FUNCTION
    ]


def long_files(modules: list[Module]) -> list[str]:
    """Files over 400 lines."""
    return [module.path for module in modules if module.num_lines > LONG_FILE]


def without_docstring(modules: list[Module]) -> list[str]:
    """Public functions, methods and classes that say nothing of themselves; those inside functions are not public."""
    return [
        f"{module.path}:{node.lineno} {name}"
        for module in modules
        for name, node in _public(module)
        if not _inherits_docstring(node) and ast.get_docstring(node) is None
    ]


def repeated_classes(modules: list[Module]) -> dict[str, list[str]]:
    """Where each class name that several classes have is defined."""
    paths: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        for _, node in module.classes:
            paths[node.name].append(f"{module.path}:{node.lineno}")
    return {name: locations for name, locations in sorted(paths.items()) if len(locations) > 1}


def import_cycles(modules: list[Module], *, in_functions: bool, for_types: bool = False) -> list[list[str]]:
    """Groups of modules that each need all others of their group.

    Args:
        in_functions: count the imports that stand in functions too, which run later than the modules themselves.
        for_types: count those under `if TYPE_CHECKING` too, which never run.
    """
    module_names = {module.name for module in modules}
    graph = {
        module.name: {name for name in _imports(module, module_names, in_functions, for_types) if name != module.name}
        for module in modules
    }
    reachable = {name: _reachable(graph, name) for name in graph}
    groups = {frozenset(neighbour for neighbour in reachable[name] if name in reachable[neighbour]) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def walk_through(modules: list[Module], walks: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The first of several ways on which every function is there, and each calls the next; empty if there is none."""
    by_name = {module.name: module for module in modules}
    return next((walk for walk in walks if _can_be_walked(walk, by_name)), ())


def _can_be_walked(walk: tuple[str, ...], modules: dict[str, Module]) -> bool:
    steps = [tuple(function.split(":")) for function in walk]
    if not all(module in modules and name in dict(modules[module].functions) for module, name in steps):
        return False
    calls = [(modules[module].text, name.rpartition(".")[2]) for (module, _), (_, name) in pairwise(steps)]
    return all(re.search(rf"\b{name}\b", text) for text, name in calls)


def readme_size(root: Path) -> tuple[int, int]:
    """Lines of the README, and characters of its longest line."""
    lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
    return len(lines), max(map(len, lines))


def figures(house: House) -> dict[str, str]:
    """Every figure by its label, in the order of the table."""
    rows: dict[str, str] = {}

    def per_package(label: str, measure: Callable[[list[Module]], str]) -> None:
        rows.update({f"{label}: {package}": measure(house.package(package)) for package in PACKAGES})

    def share(names: Callable[[Module], list[Name]]) -> Callable[[list[Module]], str]:
        def measure_share(modules: list[Module]) -> str:
            all_names = [name for module in modules for name in names(module)]
            return _share(len(bare(all_names)), len(all_names))

        return measure_share

    per_package("bare words among local names and parameters", share(locals_and_parameters))
    per_package("bare words among fields and attributes", share(fields))
    per_package(
        "bare words among names of functions",
        lambda modules: _share(len(bare_functions(modules)), sum(len(module.functions) for module in modules)),
    )
    per_package("functions over 40 lines", lambda modules: str(len(long_functions(modules))))
    per_package("files over 400 lines", lambda modules: str(len(long_files(modules))))
    per_package(
        "public functions and classes without docstring",
        lambda modules: _share(len(without_docstring(modules)), sum(len(_public(module)) for module in modules)),
    )
    rows["class names that exist twice"] = str(len(repeated_classes(house.modules)))
    rows["import cycles between modules"] = _sizes(import_cycles(house.modules, in_functions=False))
    rows["the same, with imports in functions"] = _sizes(import_cycles(house.modules, in_functions=True))
    rows["the same, with imports for types"] = _sizes(import_cycles(house.modules, in_functions=True, for_types=True))
    rows |= {label: str(len(walk_through(house.modules, walks)) or "?") for label, walks in WALKS.items()}
    num_lines, longest = readme_size(house.root)
    rows["lines of the README"] = str(num_lines)
    rows["characters of its longest line"] = str(longest)
    return rows


def table(columns: dict[str, dict[str, str]]) -> str:
    """A Markdown table: one row per figure, one column per state of the code."""
    labels = next(reversed(columns.values()))
    head = ["| figure | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    body = [f"| {label} | " + " | ".join(rows[label] for rows in columns.values()) + " |" for label in labels]
    return "\n".join(head + body)


def figures_of_commit(commit: str) -> dict[str, str]:
    """The figures of a commit of this repository."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
        return figures(House.read(Path(folder)))


def details(house: House) -> Iterator[str]:
    """What the figures count, one line each, with file and line."""
    for module in house.modules:
        for name in bare(locals_and_parameters(module)):
            yield f"{name.location}: {name.name} in {name.owner} is a bare word"
        for name in bare(fields(module)):
            yield f"{name.location}: the field {name.name} of {name.owner} is a bare word"
    yield from (f"{name.location}: the function {name.owner} is a bare word" for name in bare_functions(house.modules))
    yield from (f"{function}: over {LONG_FUNCTION} lines" for function in long_functions(house.modules))
    yield from (f"{path}: over {LONG_FILE} lines" for path in long_files(house.modules))
    yield from (f"{name}: no docstring" for name in without_docstring(house.modules))
    yield from (f"{paths[0]}: {name} is also {', '.join(paths[1:])}" for name, paths in _repeats(house))
    yield from (f"cycle: {' '.join(group)}" for group in import_cycles(house.modules, in_functions=True))


def main() -> None:
    """Prints the table, or with `--details` what it counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.house", description=__doc__.splitlines()[0])
    parser.add_argument("commits", nargs="*", help="commits to compare the working tree with")
    parser.add_argument("--details", action="store_true", help="print what the figures count instead")
    arguments = parser.parse_args()
    house = House.read(ROOT)
    if arguments.details:
        print("\n".join(details(house)))
    else:
        columns = {commit: figures_of_commit(commit) for commit in arguments.commits}
        print(table(columns | {"now": figures(house)}))


def _module(path: Path, root: Path) -> Module:
    relative = path.relative_to(root)
    names = relative.with_suffix("").parts
    name = ".".join(names[:-1] if names[-1] == "__init__" else names)
    return Module(name=name, path=relative.as_posix(), text=path.read_text(encoding="utf-8"))


def _definitions(node: ast.AST, parents: tuple[str, ...]) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            names = (*parents, child.name)
            yield ".".join(names), child
            yield from _definitions(child, names)
        else:
            yield from _definitions(child, parents)


def _own_nodes(function: Function) -> Iterator[ast.AST]:
    """The nodes of a function without its decorators, and without those of functions and classes inside it."""
    yield function.args
    nodes: list[ast.AST] = [*_arguments(function.args), *reversed(function.body)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, Function | ast.ClassDef):
            continue
        yield node
        nodes += reversed(list(ast.iter_child_nodes(node)))


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    regular_arguments = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return regular_arguments + [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]


def _bindings(node: ast.AST) -> list[str]:
    """Names that a node gives to something."""
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        return [node.name]
    return []


def _public(module: Module) -> list[tuple[str, Function | ast.ClassDef]]:
    functions = {name for name, _ in module.functions}
    return [
        (name, node)
        for name, node in module.definitions
        if not any(word.startswith("_") for word in name.split("."))
        and not any(name.startswith(f"{function}.") for function in functions)
    ]


def _inherits_docstring(node: Function | ast.ClassDef) -> bool:
    """Whether it is marked as an override, or an overload of what has one."""
    return any(
        ast.unparse(decorator).rpartition(".")[2] in ("override", "overload") for decorator in node.decorator_list
    )


def _num_lines(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _imports(module: Module, module_names: set[str], in_functions: bool, for_types: bool) -> Iterator[str]:
    """Modules among `known` that a module imports."""
    for node in _statements(module.tree, in_functions, for_types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in module_names)
        elif isinstance(node, ast.ImportFrom):
            parent = _absolute(module, node)
            for alias in node.names:
                name = f"{parent}.{alias.name}"
                if name in module_names:
                    yield name
                elif parent in module_names:
                    yield parent


def _statements(node: ast.AST, in_functions: bool, for_types: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function) and not in_functions:
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING") and not for_types:
            continue
        yield child
        yield from _statements(child, in_functions, for_types)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    names = module.name.split(".") + (["__init__"] if module.path.endswith("__init__.py") else [])
    return ".".join([*names[: -node.level], *([node.module] if node.module else [])])


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """The modules that one needs, with itself."""
    reachable_names, queue = {start}, [start]
    while queue:
        fresh = graph[queue.pop()] - reachable_names
        reachable_names |= fresh
        queue += fresh
    return reachable_names


def _repeats(house: House) -> list[tuple[str, list[str]]]:
    return list(repeated_classes(house.modules).items())


def _share(count: int, total: int) -> str:
    return f"{count / max(1, total):.1%} ({count} of {total})"


def _sizes(cycles: list[list[str]]) -> str:
    """How many there are, and of how many modules each."""
    sizes = ", ".join(str(size) for size in sorted(map(len, cycles), reverse=True))
    return f"{len(cycles)} (of {sizes} modules)" if cycles else "0"


if __name__ == "__main__":
    main()
