"""Checks whether an engine can load a checkpoint, and whether it can change to it from the one that it serves.

The checks only read files and need no engine. vLLM would find a problem in the middle of a load, and a failed load of
all weights leaves an engine that cannot answer. Shapes and number formats are read from the headers of safetensors
files, so no model is loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import CheckpointError, ServingError
from alignment.models.adapter_kinds import LORA_RANKS, obstacles, rank_of
from alignment.models.cache import is_merged
from alignment.models.folders import model_source
from alignment.models.model_folder import ADAPTER_CONFIG, TOKENIZER, WEIGHTS_INDEX, ModelFolder, read_json

LORA_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")
EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
"""Number formats with NaN and infinity: the integer type to read a number as, and the bits of its exponent. All of
these bits are set in NaN and infinity, and in no other number."""
SCAN_CHUNK = 2**22
"""How many numbers are examined at once."""
NO_ANSWERS = "{folder} is a reward model: it gives scores and no answers; `raylign reward-server` puts it behind HTTP"
FREE_SETTINGS = ("dtype", "pad_token_id", "torch_dtype", "transformers_version", "use_cache")
"""Keys of config.json that may differ: an engine does not compute with them, or the tensors show them."""
VOCABULARIES = (TOKENIZER, "tokenizer.model", "vocab.json", "merges.txt")
NOT_VOCABULARY = ("truncation", "padding")
"""Keys of tokenizer.json that are settings of whoever saved it, and no part of the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter that an engine holds beside its base model."""

    name: str
    """Model name of the adapted model."""
    folder: str
    """Absolute path of the adapter."""
    rank: int
    """Largest rank of its matrices."""
    target_modules: tuple[str, ...] | None
    """Names of the layers that it adapts, as `q_proj`; None if the adapter has a pattern instead of names."""
    chat_template: str | None
    """File with the chat template that it was trained with; None if it uses the base model's."""


@dataclass(frozen=True, kw_only=True)
class LoraCapacity:
    """The adapters that an engine can hold. An engine is started for one capacity and keeps it."""

    rank: int
    """Largest rank of an adapter, one of `LORA_RANKS`."""
    target_modules: tuple[str, ...] | None
    """Names of the layers that may be adapted; None allows every layer."""


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """What the header of a safetensors file says about a tensor."""

    file: Path
    dtype: str
    """Number format, for example `BF16`."""
    shape: tuple[int, ...]
    start: int
    """Position of its first number in the file (bytes)."""


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """The shapes that an adapter has for one linear layer."""

    in_features: int
    out_features: int
    rank: int


def adapter_of(folder: Path, name: str) -> Adapter:
    """Reads an adapter's folder.

    Raises:
        CheckpointError: adapter_config.json is damaged.
        ServingError: it is of a kind that vLLM does not serve.
    """
    model = ModelFolder(folder)
    settings = model.read_adapter_config()
    try:
        rank = rank_of(settings)
        targets = settings.get("target_modules") or ""
        # peft writes whole paths for a model of few layers, and vLLM, which joins layers, would find none of them.
        names = None if isinstance(targets, str) else tuple(sorted({path.rpartition(".")[2] for path in targets}))
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} is damaged: {error}") from error
    for obstacle in obstacles(settings):  # vLLM would refuse these half a minute later
        raise ServingError(
            f"The adapter {folder} cannot be served beside its base model, since {obstacle}; "
            "merge it into the base model and serve the result"
        )
    return Adapter(
        name=name,
        folder=str(folder),
        rank=rank,
        target_modules=names,
        chat_template=str(model.chat_template_file) if model.chat_template_file.is_file() else None,
    )


def capacity_for(adapters: Iterable[Adapter]) -> LoraCapacity:
    """The smallest capacity with which an engine can hold each of the given adapters."""
    adapters = list(adapters)
    max_rank = max(adapter.rank for adapter in adapters)
    modules: set[str] | None = set()
    for adapter in adapters:
        modules = None if modules is None or adapter.target_modules is None else modules | set(adapter.target_modules)
    return LoraCapacity(
        rank=next(rank for rank in LORA_RANKS if rank >= max_rank),
        target_modules=None if modules is None else tuple(sorted(modules)),
    )


def check_servable(folder: Path) -> None:
    """Checks whether a checkpoint can be served at all.

    Raises:
        CheckpointError: a file is missing, truncated or contradicts another file, or a weight is NaN or infinite.
        ModelError: the base model of an adapter does not exist.
        ServingError: it is of a kind that is not served.
    """
    tensors, model = tensors_of(folder), ModelFolder(folder)
    if model.is_reward_model:
        raise ServingError(NO_ANSWERS.format(folder=folder))
    if model.is_adapter:
        _check_adapter(model, tensors)
    for name, header in tensors.items():
        if not _is_finite(header):
            raise CheckpointError(f"{header.file}: {name} holds NaN or an infinity")


def check_compatible(candidate: Path, current: Path, *, capacity: LoraCapacity | None = None) -> None:
    """Checks that an engine which serves the current checkpoint can change to the candidate.

    Args:
        candidate: folder of a model or an adapter.
        current: the same of the checkpoint that the engine serves.
        capacity: adapters that the engine can hold; None assumes that it was started for `current` alone.

    Raises:
        CheckpointError: a file is missing or damaged.
        ModelError: the base model of an adapter does not exist.
        ServingError: the engine cannot change to it; the message says why.
    """
    candidate_model, current_model = ModelFolder(candidate), ModelFolder(current)
    if candidate_model.is_adapter and current_model.is_adapter:
        _check_adapter_compatible(candidate, current, capacity or capacity_for([adapter_of(current, current.name)]))
    elif candidate_model.is_adapter:
        raise ServingError(
            f"{candidate} is an adapter, and this endpoint serves whole models: merge it into its base model, or start "
            "an endpoint of its own for it"
        )
    elif current_model.is_adapter:
        raise ServingError(
            f"{candidate} is a whole model, and this endpoint serves adapters on {current_model.base}: train one of "
            "those with model.lora, or start an endpoint of its own for it"
        )
    else:
        _check_weights_compatible(candidate, current)
    _check_vocabulary(candidate, current)
    _check_template(candidate, current)


def tensors_of(folder: Path) -> dict[str, TensorHeader]:
    """The header of every tensor of a model or an adapter, by the tensor's name.

    Raises:
        CheckpointError: a file is missing, or its header contradicts its size, as after an interrupted copy.
    """
    tensors: dict[str, TensorHeader] = {}
    for name in ModelFolder(folder).weight_files():
        if Path(name).name != name:
            raise CheckpointError(f"{folder / WEIGHTS_INDEX} is damaged: {name!r} is not the name of a file beside it")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing")
        tensors.update(_tensor_headers(folder / name))
    return tensors


def _tensor_headers(file: Path) -> Iterator[tuple[str, TensorHeader]]:
    """The headers of one file, with the tensors' names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):  # checks that the header describes the whole file
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or incomplete: {error}") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start = 8 + length + entry["data_offsets"][0]
        yield name, TensorHeader(file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]), start=start)


def _is_finite(header: TensorHeader) -> bool:
    import numpy as np

    if header.dtype not in EXPONENTS:
        return True
    integer_type, exponent = EXPONENTS[header.dtype]
    count = math.prod(header.shape)
    for offset in range(0, count, SCAN_CHUNK):
        start = header.start + offset * np.dtype(integer_type).itemsize
        bits = np.fromfile(header.file, dtype=integer_type, count=min(SCAN_CHUNK, count - offset), offset=start)
        if ((bits & exponent) == exponent).any():
            return False
    return True


def _check_adapter(adapter: ModelFolder, tensors: dict[str, TensorHeader]) -> None:
    folder, settings = adapter.path, adapter.read_adapter_config()
    adapter_of(folder, folder.name)
    model_source(adapter.base)
    ranks = {settings.get("r"), *(settings.get("rank_pattern") or {}).values()}
    for module, layer in _lora_layers(folder, tensors).items():
        if layer.rank not in ranks:
            raise CheckpointError(
                f"{folder} is damaged: {module} has rank {layer.rank}, which {ADAPTER_CONFIG} does not know of"
            )


def _lora_layers(folder: Path, tensors: dict[str, TensorHeader]) -> dict[str, LoraLayer]:
    """The layers that an adapter changes, by name.

    Raises:
        CheckpointError: its tensors are not two matrices for every layer.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, header in tensors.items():
        match = LORA_TENSOR.fullmatch(name)
        if match is None or len(header.shape) != 2:
            raise CheckpointError(f"{folder} holds {name} of shape {list(header.shape)}, which is no matrix of LoRA")
        shapes.setdefault(match["module"], {})[match["side"]] = header.shape
    if not shapes:
        raise CheckpointError(f"{folder} holds no tensors")
    layers = {}
    for module, sides in shapes.items():
        if len(sides) != 2 or sides["A"][0] != sides["B"][1]:
            raise CheckpointError(f"{folder} is damaged: the two matrices of {module} are not there or do not fit")
        layers[module] = LoraLayer(in_features=sides["A"][1], out_features=sides["B"][0], rank=sides["A"][0])
    return layers


def _check_adapter_compatible(candidate: Path, current: Path, capacity: LoraCapacity) -> None:
    bases = [model_source(ModelFolder(folder).base) for folder in (candidate, current)]
    if bases[0] != bases[1] and not (is_merged(bases[0]) and Path(bases[0]).name == Path(bases[1]).name):
        raise ServingError(
            f"{candidate} is an adapter on {bases[0]}, and this endpoint serves {bases[1]}. A run that starts from an "
            "adapter trains a new one on the two merged: start it from the base model instead (model.path), or start "
            "an endpoint of its own for this one"
        )
    candidate_layers, current_layers = (_lora_layers(folder, tensors_of(folder)) for folder in (candidate, current))
    _check_capacity(candidate, candidate_layers, capacity)
    for module in sorted(candidate_layers.keys() & current_layers.keys()):
        candidate_shape, current_shape = (
            (layer.in_features, layer.out_features) for layer in (candidate_layers[module], current_layers[module])
        )
        if candidate_shape != current_shape:
            raise ServingError(
                f"{candidate} fits another model: its {module} is from {candidate_shape[0]} to {candidate_shape[1]} "
                f"numbers, and the one that is served from {current_shape[0]} to {current_shape[1]}"
            )


def _check_capacity(candidate: Path, layers: dict[str, LoraLayer], capacity: LoraCapacity) -> None:
    rank = adapter_of(candidate, candidate.name).rank
    if rank > capacity.rank:
        raise ServingError(
            f"{candidate} has rank {rank}, and the engines were started for ranks up to {capacity.rank}: train it with "
            "a smaller one (model.lora.rank), or restart the endpoint with it"
        )
    unexpected_modules = {module.rpartition(".")[2] for module in layers} - set(capacity.target_modules or ())
    if capacity.target_modules is not None and unexpected_modules:
        raise ServingError(
            f"{candidate} adapts {_first_names(unexpected_modules)}, and the engines were started for "
            f"{_first_names(capacity.target_modules)}: train it with these (model.lora.target_modules), or restart the "
            "endpoint with it"
        )


def _check_weights_compatible(candidate: Path, current: Path) -> None:
    candidate_settings, current_settings = (ModelFolder(folder).read_config() for folder in (candidate, current))
    for key in sorted(candidate_settings.keys() & current_settings.keys() - set(FREE_SETTINGS)):
        if candidate_settings[key] != current_settings[key] and "dropout" not in key and not key.startswith("_"):
            raise ServingError(
                f"{candidate} is another model: in its config.json {key} is {candidate_settings[key]!r}, and in that "
                f"of the one that is served {current_settings[key]!r}"
            )
    # Shapes alone: the number format may differ, since an engine has its own.
    candidate_shapes = _weight_shapes(candidate, candidate_settings)
    current_shapes = _weight_shapes(current, current_settings)
    if candidate_shapes.keys() != current_shapes.keys():
        raise ServingError(
            f"{candidate} is another model: of the tensors that the served one has, it lacks "
            f"{_first_names(current_shapes.keys() - candidate_shapes.keys())}, and has "
            f"{_first_names(candidate_shapes.keys() - current_shapes.keys())} besides"
        )
    for name, shape in sorted(candidate_shapes.items()):
        if shape != current_shapes[name]:
            raise ServingError(
                f"{candidate} is another model: its {name} is of shape {list(shape)}, and the one that is served "
                f"{list(current_shapes[name])}"
            )


def _weight_shapes(folder: Path, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors, without an output head that is tied to the embedding: not every file stores
    such a head."""
    shapes = {name: header.shape for name, header in tensors_of(folder).items()}
    if settings.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return shapes


def _check_vocabulary(candidate: Path, current: Path) -> None:
    candidate_vocabulary, current_vocabulary = _vocabulary(candidate), _vocabulary(current)
    if candidate_vocabulary and current_vocabulary and candidate_vocabulary != current_vocabulary:
        files = [name for name in VOCABULARIES if candidate_vocabulary.get(name) != current_vocabulary.get(name)]
        raise ServingError(
            f"{candidate} has another vocabulary than the model that is served (its {' and '.join(files)}), and the "
            "endpoint would read and write every text wrongly; start an endpoint of its own for it"
        )


def _vocabulary(folder: Path) -> dict[str, Any]:
    """The contents of the tokenizer's files, by name. An adapter without a tokenizer has that of its base model, if
    that model is a folder here."""
    contents: dict[str, Any] = {
        file.name: file.read_bytes() for name in VOCABULARIES if (file := folder / name).is_file()
    }
    model = ModelFolder(folder)
    if not contents and model.is_adapter:
        return _vocabulary(Path(model_source(model.base)))
    if TOKENIZER in contents:
        tokenizer = read_json(folder / TOKENIZER)
        return {TOKENIZER: {key: tokenizer[key] for key in tokenizer if key not in NOT_VOCABULARY}}
    return contents


def _check_template(candidate: Path, current: Path) -> None:
    candidate_template, current_template = template_of(candidate), template_of(current)
    if candidate_template and current_template and candidate_template != current_template:
        raise ServingError(
            f"{candidate} has another chat template than the model that is served, whose template the endpoint would "
            "go on with: it would be asked in a form that it was not trained on. Start an endpoint of its own for it"
        )


def template_of(folder: Path) -> str | None:
    """The text of the chat template, or None. An adapter without a template has that of its base model, if that model
    is a folder here."""
    model = ModelFolder(folder)
    template = model.read_chat_template()
    if template is None and model.is_adapter:
        return template_of(Path(model_source(model.base)))
    return template if isinstance(template, str) else None


def _first_names(names: Iterable[str]) -> str:
    """The first three names and how many follow, for a sentence."""
    sorted_names = sorted(names)
    ending = f" and {len(sorted_names) - 3} more" if len(sorted_names) > 3 else ""
    return (", ".join(sorted_names[:3]) or "none") + ending
