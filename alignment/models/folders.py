"""Resolves the model that a configuration names to what transformers and vLLM can open."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeVar

from alignment.errors import ModelError
from alignment.models.cache import BUNDLED, bundled, make_once, merged_folder
from alignment.models.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, TOKENIZER_FILES, ModelFolder
from alignment.run_folder import checkpoint_or_path
from alignment.settings.plugins import ScorerConfig
from alignment.settings.run import RunConfig
from alignment.settings.section import Section
from alignment.storage import is_url, newest_url

__all__ = ["BUNDLED", "bundled", "model_source", "weights_stamp", "with_checkpoints"]

Run = TypeVar("Run", bound=RunConfig)
AnySection = TypeVar("AnySection", bound=Section)


def model_source(path: str) -> str:
    """Resolves a configured path to what transformers and vLLM can open: a folder with a full model, or a hub id.

    The bundled model's name becomes its folder, a run's folder or address becomes its newest intact checkpoint, and an
    adapter's folder becomes a folder with the adapter merged into its base. A folder that does not exist yet is made on
    first use, which takes about 20 s.

    Raises:
        ModelError: the path looks like a folder and does not exist, its model or adapter is incomplete, or the
            bundled model's package is not installed.
        CheckpointError: the path is a damaged checkpoint, or a run without an intact one.
    """
    if path == BUNDLED:
        return str(bundled())
    folder = Path(checkpoint_or_path(path)).expanduser()
    model = ModelFolder(folder)
    if model.is_adapter:
        return str(_merged_folder(model))
    if folder.is_dir():
        if not model.has_config:
            raise ModelError(f"{path} is a folder without {CONFIG}, so it holds no model")
        return str(folder.resolve())
    if path.startswith((".", "/", "~")):
        raise ModelError(f"model folder {path} does not exist (looked from {Path.cwd()})")
    return path


def with_checkpoints(config: Run) -> Run:
    """Replaces each run that a configuration names by that run's checkpoint, so that all processes load the same one.

    When the training run is resumed, these names are compared with those of its beginning.

    Raises:
        CheckpointError: a checkpoint is damaged, or a run has none.
    """

    def pin(section: AnySection, key: str) -> AnySection:
        path = getattr(section, key, None)
        if path is None:
            return section
        # Each machine downloads what lies in a storage to its own cache, so the address must stay the same for all.
        return section.model_copy(update={key: newest_url(path) if is_url(path) else checkpoint_or_path(path)})

    def pin_scorers(scorers: tuple[ScorerConfig, ...]) -> tuple[ScorerConfig, ...]:
        return tuple(pin(scorer, "path") if scorer.name == "model" else scorer for scorer in scorers)

    lora = config.model.lora
    model = config.model.model_copy(update={"lora": None if lora is None else pin(lora, "start")})
    return config.model_copy(
        update={
            "model": pin(model, "path"),
            "critic": pin(config.critic, "path"),
            "rewards": pin_scorers(config.rewards),
            "eval_rewards": pin_scorers(config.eval_rewards),
        }
    )


def weights_stamp(source: str) -> str:
    """A hash of the names, sizes and times of a local model's weight files; the same for every hub id."""
    files = sorted(Path(source).glob("*.safetensors")) + sorted(Path(source).glob("*.bin"))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def _merged_folder(adapter: ModelFolder) -> Path:
    """The folder with an adapter merged into its base; makes it on first use."""
    base = adapter.base
    if not (adapter.path / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{adapter.path} is an adapter's folder without {ADAPTER_WEIGHTS}")
    source = model_source(base)
    digest = hashlib.sha256(f"{base} {weights_stamp(source)}".encode())
    for file in (adapter.path / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, *TOKENIZER_FILES)):
        if file.is_file():
            digest.update(file.read_bytes())
    return make_once(merged_folder(digest.hexdigest()), lambda folder: _merge(adapter, source, folder))


def _merge(adapter: ModelFolder, source: str, folder: Path) -> None:
    """Writes an adapter merged into its base.

    Raises:
        ModelError: base and adapter do not fit together, or one of them cannot be loaded.
    """
    from safetensors import SafetensorError

    from alignment.models.adapters import merge

    try:
        merge(adapter.path, source, folder, tokenizer_source=str(adapter.path) if adapter.has_tokenizer else source)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"the adapter {adapter.path} cannot be merged into its base {source}: {error}") from error
