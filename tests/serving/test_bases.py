"""Base models of adapters: kept with the registry if only this machine has them, else known again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import ServingError
from alignment.models.model_folder import ModelFolder
from serving.config import ServeConfig
from serving.registry.compatibility import check_compatible
from serving.registry.served_model import publish, served_version
from serving.registry.versions import Registry
from tests.serving.tiny import adapter, whole


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that was made of an adapter and its base, in the cache of this machine."""
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    return whole(tmp_path / "cache" / "models" / "merged-3-0123456789abcdef")


def start(checkpoint: Path, tmp_path: Path, **settings: Any) -> tuple[ServeConfig, Registry]:
    config = ServeConfig(checkpoint=str(checkpoint), folder=str(tmp_path / "serving"), name="chained", **settings)
    return config, publish(config).registry


def test_an_adapter_on_a_merged_one_is_served_where_that_is_not_in_the_cache(merged: Path, tmp_path: Path) -> None:
    first = adapter(tmp_path / "first", base_model_name_or_path=str(merged))
    config, registry = start(first, tmp_path)
    second = registry.add(adapter(tmp_path / "second", seed=2, base_model_name_or_path=str(merged)), compatible_with=1)
    shutil.rmtree(tmp_path / "cache")
    served = served_version(config, registry, 1)
    kept = registry.folder / "bases" / merged.name
    assert (served.source, served.base_name) == (str(kept), merged.name)
    assert ModelFolder(registry.folder_of(2)).base == str(kept)
    check_compatible(registry.folder_of(2), registry.folder_of(1))
    registry.folder.rename(tmp_path / "elsewhere")
    moved = Registry(tmp_path / "elsewhere")
    assert served_version(config, moved, 2).source == str(moved.folder / "bases" / merged.name)
    assert second.base == str(merged)


def test_a_base_goes_with_its_last_version(merged: Path, tmp_path: Path) -> None:
    _, registry = start(adapter(tmp_path / "other"), tmp_path)
    for number in (2, 3):
        registry.add(adapter(tmp_path / f"a{number}", seed=number, base_model_name_or_path=str(merged)))
    kept = registry.folder / "bases" / merged.name

    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.iterdir())

    assert registry.delete(2) == size(registry.folder_of(3)) and kept.is_dir()
    both = size(registry.folder_of(3)) + size(kept)
    assert registry.delete(3) == both and not kept.exists()


def test_another_model_in_the_place_of_a_base_is_not_taken_for_it(tmp_path: Path) -> None:
    base = whole(tmp_path / "shared" / "base", seed=1)
    config, registry = start(adapter(tmp_path / "adapter", base_model_name_or_path=str(base)), tmp_path)
    assert served_version(config, registry, 1).source == str(base)
    shutil.rmtree(base)
    whole(base, seed=2)
    with pytest.raises(ServingError, match="is another one than when version 1 was registered"):
        served_version(config, registry, 1)


def test_the_revision_of_a_base_on_a_hub_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    refs = tmp_path / "hub" / "models--org--base" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc123")
    config, registry = start(adapter(tmp_path / "adapter"), tmp_path)
    (refs / "main").write_text("def456")
    served = served_version(config, registry, 1)
    assert (served.source, served.revision) == ("org/base", "abc123")
