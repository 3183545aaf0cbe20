"""Imports point one way: the method knows neither Ray nor HTTP, and what needs little imports little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("alignment", "cluster", "serving")
FORBIDDEN = {
    "alignment": {"ray", "fastapi", "starlette", "uvicorn", "cluster", "serving"},
    "cluster": {"serving", "fastapi"},
    "serving": {"cluster"},
}
ALLOWED = {"cluster.ray_access"}
"""What both who train and who serve ask of Ray."""
ROOMS_OF_SERVING = ("feedback", "registry", "replica", "http")
"""A room may import those before it, also inside functions."""
COMMON_IN_SERVING = {"config", "garbage", "schema"}
"""Modules of `serving` that every room may import, and that import no room."""
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Importing these must stay cheap: they run before anything heavy, or in processes that need nothing heavy.
LIGHT = ["alignment.settings.run", "alignment.settings.load", "alignment.groups", "alignment.errors", "cluster.cli"]
LIGHT += ["cluster.config", "cluster.plan", "cluster.launch", "serving.registry.promote", "serving.registry.versions"]


def imported(tree: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Full names of the modules that a tree imports; `if TYPE_CHECKING:` imports nothing at run time."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would escape this test"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported(node, inside_functions=inside_functions)


def packages_of(path: Path, *, inside_functions: bool) -> set[str]:
    names = imported(ast.parse(path.read_text(encoding="utf-8")), inside_functions=inside_functions)
    allowed = tuple(ALLOWED)
    return {name.partition(".")[0] for name in names if not name.startswith(allowed)}


def rooms_of(path: Path) -> set[str]:
    """The rooms and modules directly in `serving` that a file imports."""
    names = imported(ast.parse(path.read_text(encoding="utf-8")), inside_functions=True)
    return {name.split(".")[1] for name in names if name.startswith("serving.")}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_package_imports_nothing_from_its_left(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert not packages_of(path, inside_functions=True) & FORBIDDEN[package]


@pytest.mark.parametrize("room", ROOMS_OF_SERVING)
def test_a_room_of_serving_imports_only_the_rooms_below_it(room: str) -> None:
    below = {*COMMON_IN_SERVING, *ROOMS_OF_SERVING[: ROOMS_OF_SERVING.index(room) + 1]}
    above = {name_of(path): rooms_of(path) - below for path in (ROOT / "serving" / room).rglob("*.py")}
    assert above and not {path: names for path, names in above.items() if names}


@pytest.mark.parametrize("name", sorted(COMMON_IN_SERVING))
def test_what_all_rooms_of_serving_import_knows_none_of_them(name: str) -> None:
    assert rooms_of(ROOT / "serving" / f"{name}.py") <= COMMON_IN_SERVING


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_vllm_is_imported_inside_functions_only(path: Path) -> None:
    assert "vllm" not in packages_of(path, inside_functions=False)


@pytest.mark.parametrize("name", ["batch", "losses/policy", "losses/preference", "losses/reward", "advantages"])
def test_the_mathematics_needs_torch_alone(name: str) -> None:
    path = ROOT / "alignment" / f"{name}.py"
    assert packages_of(path, inside_functions=True) - sys.stdlib_module_names <= {"torch"}


@pytest.mark.parametrize("path", sorted((ROOT / "alignment" / "algorithms").glob("*.py")), ids=name_of)
def test_an_algorithm_needs_torch_and_pydantic_alone(path: Path) -> None:
    known = {"torch", "pydantic", "alignment"}
    assert packages_of(path, inside_functions=True) - sys.stdlib_module_names <= known


def loaded_with(*modules: str) -> set[str]:
    """Names of all modules that a process has loaded that imports these."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(process.stdout.split())


def test_what_runs_first_loads_neither_torch_nor_transformers_nor_ray() -> None:
    heavy = {"torch", "transformers", "datasets", "ray", "vllm", "deepspeed", "fastapi", "numpy"}
    assert not heavy & loaded_with(*LIGHT)


def test_what_starts_an_endpoint_and_reads_its_requests_loads_neither_torch_nor_transformers() -> None:
    heavy = {"torch", "transformers", "datasets", "vllm", "deepspeed"}
    assert not heavy & loaded_with("serving.app", "serving.http.ingress")


def test_this_test_sees_imports_wherever_they_hide() -> None:
    tree = ast.parse(
        "import a.b\n"
        "from c import d\n"
        "if TYPE_CHECKING:\n    import no\n"
        "try:\n    import e\nexcept ImportError:\n    pass\n"
        "class K:\n    import f\n    def m(self):\n        import g\n"
        "async def h():\n    with x:\n        from i.j import k\n"
    )
    outside = {"a.b", "c", "c.d", "e", "f"}
    assert set(imported(tree, inside_functions=False)) == outside
    assert set(imported(tree, inside_functions=True)) == outside | {"g", "i.j", "i.j.k"}
