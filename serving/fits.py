"""May an engine take a checkpoint, and change to it from the one it serves? Asked of the files, before any engine is.

What vLLM finds out by itself, it finds out half-way through a load, and a load of whole weights that fails leaves an
engine that answers nothing. Shapes and number formats stand in the headers of safetensors files, so nothing is loaded.
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
from alignment.models.folders import base_of, is_adapter, is_merged, model_source

ADAPTER_FILE = "adapter_model.safetensors"
WHOLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
LORA = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")
EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
"""Of the formats that know NaN and infinities: how to read a number as an integer, and its exponent's bits, which
those two have set and no others."""
SCANNED = 2**22
"""Numbers that are looked at in one go."""
NO_ANSWERS = "{folder} is a reward model: it gives scores and no answers; `raylign reward-server` puts it behind HTTP"
FREE_SETTINGS = ("dtype", "pad_token_id", "torch_dtype", "transformers_version", "use_cache")
"""Of config.json: what an engine does not compute with, or what the tensors say."""
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
NOT_VOCABULARY = ("truncation", "padding")
"""Of tokenizer.json: settings of whoever saved it."""


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
    """Names of the layers it adapts; None when the adapter gives a pattern instead of names."""
    chat_template: str | None
    """File with the chat template that it was trained with; None when it keeps the base model's."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What an engine can hold; decided when it starts."""

    rank: int
    """Largest rank of an adapter, one of `LORA_RANKS`."""
    target_modules: tuple[str, ...] | None
    """Names of the layers that may be adapted; None is every one."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor as a safetensors file has it."""

    file: Path
    dtype: str
    """As `BF16`."""
    shape: tuple[int, ...]
    start: int
    """Where its numbers begin in the file (bytes)."""


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What an adapter adds to one linear layer."""

    inputs: int
    outputs: int
    rank: int


def adapter_of(folder: Path, name: str) -> Adapter:
    """Reads what an adapter's folder says about it.

    Raises:
        CheckpointError: adapter_config.json is damaged.
        ServingError: it is of a kind that vLLM does not serve.
    """
    settings = _json(folder / "adapter_config.json")
    try:
        rank = rank_of(settings)
        targets = settings.get("target_modules") or ""
        names = None if isinstance(targets, str) else tuple(sorted(targets))
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}/adapter_config.json is damaged: {error}") from error
    for obstacle in obstacles(settings):  # which vLLM would refuse half a minute later
        raise ServingError(
            f"The adapter {folder} cannot be served beside its base model, since {obstacle}; "
            "merge it into the base model and serve the result"
        )
    template = folder / "chat_template.jinja"
    return Adapter(
        name=name,
        folder=str(folder),
        rank=rank,
        target_modules=names,
        chat_template=str(template) if template.is_file() else None,
    )


def room_for(adapters: Iterable[Adapter]) -> Room:
    """What an engine needs to hold each of some adapters."""
    known = list(adapters)
    most = max(adapter.rank for adapter in known)
    modules: set[str] | None = set()
    for adapter in known:
        modules = None if modules is None or adapter.target_modules is None else modules | set(adapter.target_modules)
    return Room(
        rank=next(rank for rank in LORA_RANKS if rank >= most),
        target_modules=None if modules is None else tuple(sorted(modules)),
    )


def check_servable(folder: Path) -> None:
    """Checks a checkpoint by itself.

    Raises:
        CheckpointError: a file is missing, cut off or contradicts another, or a weight is NaN or infinite.
        ModelError: an adapter's base model is not there.
        ServingError: it is of a kind that is not served.
    """
    tensors = tensors_of(folder)
    if is_adapter(folder):
        _check_adapter(folder, tensors)
    elif any("ForSequenceClassification" in name for name in _settings(folder).get("architectures") or ()):
        raise ServingError(NO_ANSWERS.format(folder=folder))
    for name, stored in tensors.items():
        if not _is_finite(stored):
            raise CheckpointError(f"{stored.file}: {name} holds NaN or an infinity")


def check_fits(candidate: Path, serving: Path, *, room: Room | None = None) -> None:
    """Checks that an engine which serves one checkpoint can change to another.

    Both are folders of models or adapters.

    Args:
        room: what the engine can hold; None takes it to have been started for `serving` alone.

    Raises:
        CheckpointError: a file is missing or damaged.
        ModelError: an adapter's base model is not there.
        ServingError: it cannot; the text says why.
    """
    if is_adapter(candidate) and is_adapter(serving):
        _check_adapter_fits(candidate, serving, room or room_for([adapter_of(serving, serving.name)]))
    elif is_adapter(candidate):
        raise ServingError(
            f"{candidate} is an adapter, and this endpoint serves whole models: merge it into its base model, or start "
            "an endpoint of its own for it"
        )
    elif is_adapter(serving):
        raise ServingError(
            f"{candidate} is a whole model, and this endpoint serves adapters on {base_of(serving)}: train one of "
            "those with model.lora, or start an endpoint of its own for it"
        )
    else:
        _check_weights_fit(candidate, serving)
    _check_vocabulary(candidate, serving)
    _check_template(candidate, serving)


def weight_files(folder: Path) -> list[str]:
    """Names of the files with the weights of a model or an adapter.

    Raises:
        CheckpointError: the index that should list them is damaged.
    """
    if is_adapter(folder):
        return [ADAPTER_FILE]
    if not (folder / INDEX).is_file():
        return [WHOLE_FILE]
    index = _json(folder / INDEX)
    try:
        return sorted(set(index["weight_map"].values()))
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: it has no weight_map") from error


def tensors_of(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model or an adapter, by name.

    Raises:
        CheckpointError: a file is missing, or its header and its size do not agree, as when a copy broke off.
    """
    tensors: dict[str, Stored] = {}
    for name in weight_files(folder):
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX} is damaged: {name!r} is not the name of a file beside it")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing")
        tensors.update(_stored(folder / name))
    return tensors


def _stored(file: Path) -> Iterator[tuple[str, Stored]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):  # proves that the header describes the file, to its last byte
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or incomplete: {error}") from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start = 8 + length + entry["data_offsets"][0]
        yield name, Stored(file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]), start=start)


def _is_finite(stored: Stored) -> bool:
    import numpy as np

    if stored.dtype not in EXPONENTS:
        return True
    kind, exponent = EXPONENTS[stored.dtype]
    count = math.prod(stored.shape)
    for first in range(0, count, SCANNED):
        start = stored.start + first * np.dtype(kind).itemsize
        bits = np.fromfile(stored.file, dtype=kind, count=min(SCANNED, count - first), offset=start)
        if ((bits & exponent) == exponent).any():
            return False
    return True


def _check_adapter(folder: Path, tensors: dict[str, Stored]) -> None:
    settings = _json(folder / "adapter_config.json")
    if settings.get("task_type") == "SEQ_CLS":
        raise ServingError(NO_ANSWERS.format(folder=folder))
    adapter_of(folder, folder.name)
    model_source(base_of(folder))
    ranks = {settings.get("r"), *(settings.get("rank_pattern") or {}).values()}
    for module, adapted in _adapted(folder, tensors).items():
        if adapted.rank not in ranks:
            raise CheckpointError(
                f"{folder} is damaged: {module} has rank {adapted.rank}, which adapter_config.json does not know of"
            )


def _adapted(folder: Path, tensors: dict[str, Stored]) -> dict[str, Adapted]:
    """What an adapter adds, by the name of the layer.

    Raises:
        CheckpointError: its tensors are not the two matrices of every layer.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, stored in tensors.items():
        match = LORA.fullmatch(name)
        if match is None or len(stored.shape) != 2:
            raise CheckpointError(f"{folder} holds {name} of shape {list(stored.shape)}, which is no matrix of LoRA")
        shapes.setdefault(match["module"], {})[match["side"]] = stored.shape
    if not shapes:
        raise CheckpointError(f"{folder} holds no tensors")
    adapted = {}
    for module, sides in shapes.items():
        if len(sides) != 2 or sides["A"][0] != sides["B"][1]:
            raise CheckpointError(f"{folder} is damaged: the two matrices of {module} are not there or do not fit")
        adapted[module] = Adapted(inputs=sides["A"][1], outputs=sides["B"][0], rank=sides["A"][0])
    return adapted


def _check_adapter_fits(candidate: Path, serving: Path, room: Room) -> None:
    bases = [model_source(base_of(folder)) for folder in (candidate, serving)]
    if bases[0] != bases[1] and not (is_merged(bases[0]) and Path(bases[0]).name == Path(bases[1]).name):
        raise ServingError(
            f"{candidate} is an adapter on {bases[0]}, and this endpoint serves {bases[1]}. A run that starts from an "
            "adapter trains a new one on the two merged: start it from the base model instead (model.path), or start "
            "an endpoint of its own for this one"
        )
    theirs, ours = (_adapted(folder, tensors_of(folder)) for folder in (candidate, serving))
    _check_room(candidate, theirs, room)
    for module in sorted(theirs.keys() & ours.keys()):
        one, other = ((layer.inputs, layer.outputs) for layer in (theirs[module], ours[module]))
        if one != other:
            raise ServingError(
                f"{candidate} fits another model: its {module} is from {one[0]} to {one[1]} numbers, and the one that "
                f"is served from {other[0]} to {other[1]}"
            )


def _check_room(candidate: Path, adapted: dict[str, Adapted], room: Room) -> None:
    rank = adapter_of(candidate, candidate.name).rank
    if rank > room.rank:
        raise ServingError(
            f"{candidate} has rank {rank}, and the engines were started for ranks up to {room.rank}: train it with a "
            "smaller one (model.lora.rank), or restart the endpoint with it"
        )
    strange = {module.rpartition(".")[2] for module in adapted} - set(room.target_modules or ())
    if room.target_modules is not None and strange:
        raise ServingError(
            f"{candidate} adapts {_some(strange)}, and the engines were started for {_some(room.target_modules)}: "
            "train it with these (model.lora.target_modules), or restart the endpoint with it"
        )


def _check_weights_fit(candidate: Path, serving: Path) -> None:
    theirs, ours = _settings(candidate), _settings(serving)
    for key in sorted(theirs.keys() & ours.keys() - set(FREE_SETTINGS)):
        if theirs[key] != ours[key] and "dropout" not in key and not key.startswith("_"):
            raise ServingError(
                f"{candidate} is another model: in its config.json {key} is {theirs[key]!r}, and in that of the one "
                f"that is served {ours[key]!r}"
            )
    new, old = (_weights(folder, settings) for folder, settings in ((candidate, theirs), (serving, ours)))
    if new.keys() != old.keys():
        raise ServingError(
            f"{candidate} is another model: of the tensors that the served one has, it lacks "
            f"{_some(old.keys() - new.keys())}, and has {_some(new.keys() - old.keys())} besides"
        )
    for name in sorted(new):
        if new[name].shape != old[name].shape:  # the number format may differ: an engine has its own
            raise ServingError(
                f"{candidate} is another model: its {name} is of shape {list(new[name].shape)}, and the one that is "
                f"served {list(old[name].shape)}"
            )


def _weights(folder: Path, settings: dict[str, Any]) -> dict[str, Stored]:
    """The tensors, without an output head that is the embedding under a second name: not every file stores that."""
    tensors = tensors_of(folder)
    if settings.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    return tensors


def _check_vocabulary(candidate: Path, serving: Path) -> None:
    theirs, ours = _vocabulary(candidate), _vocabulary(serving)
    if theirs and ours and theirs != ours:
        files = [name for name in VOCABULARIES if theirs.get(name) != ours.get(name)]
        raise ServingError(
            f"{candidate} has another vocabulary than the model that is served (its {' and '.join(files)}), and the "
            "endpoint would read and write every text wrongly; start an endpoint of its own for it"
        )


def _vocabulary(folder: Path) -> dict[str, Any]:
    """What turns text into tokens, by file; that of the base model, if it is here, for an adapter without its own."""
    found: dict[str, Any] = {file.name: file.read_bytes() for name in VOCABULARIES if (file := folder / name).is_file()}
    if not found and is_adapter(folder):
        return _vocabulary(Path(model_source(base_of(folder))))
    if "tokenizer.json" in found:
        known = _json(folder / "tokenizer.json")
        return {"tokenizer.json": {key: known[key] for key in known if key not in NOT_VOCABULARY}}
    return found


def _check_template(candidate: Path, serving: Path) -> None:
    theirs, ours = template_of(candidate), template_of(serving)
    if theirs and ours and theirs != ours:
        raise ServingError(
            f"{candidate} has another chat template than the model that is served, whose template the endpoint would "
            "go on with: it would be asked in a form that it was not trained on. Start an endpoint of its own for it"
        )


def template_of(folder: Path) -> str | None:
    """What turns messages into text; that of the base model, if it is here, for an adapter without its own."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = _json(settings).get("chat_template") if settings.is_file() else None
    if found is None and is_adapter(folder):
        return template_of(Path(model_source(base_of(folder))))
    return found if isinstance(found, str) else None


def _settings(folder: Path) -> dict[str, Any]:
    return _json(folder / "config.json")


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object")
    return value


def _some(names: Iterable[str]) -> str:
    """The first few names, for a sentence."""
    known = sorted(names)
    more = f" and {len(known) - 3} more" if len(known) > 3 else ""
    return (", ".join(known[:3]) or "none") + more
