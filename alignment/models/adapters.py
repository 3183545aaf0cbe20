"""Adapters and their base models: fitting a base to its adapter, and merging the two into one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from alignment.errors import ModelError
from alignment.models.model_folder import ADAPTER_WEIGHTS, ModelFolder
from alignment.models.saving import mend_generation_settings

PREFIX = "base_model.model."
"""Prefix of every tensor's name in an adapter's file; the rest is the name in the base model."""
FULL_WEIGHTS = ("weight", "base_layer.weight", "modules_to_save.weight")
"""Suffixes by which an adapter's file holds the full weight of a layer."""


def merge(adapter: Path, source: str, folder: Path, *, tokenizer_source: str) -> None:
    """Merges an adapter into its base and writes the result, in the base's number format, with a tokenizer.

    If the base's vocabulary has another size than the adapter was trained with, the base is resized first.

    Args:
        source: folder or hub id of the base model.
        folder: where the merged model is written.
        tokenizer_source: folder or hub id of the tokenizer.

    Raises:
        ModelError: the vocabularies differ, and the adapter does not hold the missing embeddings.
    """
    from peft import PeftModel

    settings = ModelFolder(adapter).read_adapter_config()
    base = _base(adapter, settings, source)
    dtype = base.dtype
    fit_vocabulary(base, adapter)
    model = PeftModel.from_pretrained(base.to(torch.float32), str(adapter)).merge_and_unload()
    mend_generation_settings(model, source)
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_source).save_pretrained(folder)


def fit_vocabulary(base: PreTrainedModel, adapter: Path) -> None:
    """Resizes a base to the number of embeddings that the adapter was trained with.

    Raises:
        ModelError: the adapter does not hold the embeddings that its base lacks.
    """
    shapes = tensor_shapes(adapter)
    layers = _vocabulary_layers(base)
    sizes = {size for name in layers for size in _rows(name, shapes)}
    size = base.get_input_embeddings().weight.shape[0]
    if sizes <= {size}:
        return
    saved_layers = [name for name in layers if any(f"{PREFIX}{name}.{kind}" in shapes for kind in FULL_WEIGHTS)]
    if len(sizes) > 1 or not saved_layers or (len(saved_layers) < len(layers) and not _is_tied(base)):
        raise ModelError(
            f"the adapter {adapter} was trained with a vocabulary of {' and '.join(map(str, sorted(sizes)))} tokens, "
            f"its base {base.name_or_path} has {size}, and the adapter does not hold the embeddings that are missing. "
            "Save it with its embeddings (peft: save_embedding_layers=True, or modules_to_save), or save the resized "
            "base and name that in adapter_config.json"
        )
    base.resize_token_embeddings(sizes.pop(), mean_resizing=False)


def tensor_shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in an adapter's file, by its name there."""
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _base(adapter: Path, settings: dict[str, Any], source: str) -> PreTrainedModel:
    """Loads the base model of an adapter, with a score head if the adapter belongs to a classifier."""
    if settings.get("task_type") != "SEQ_CLS":
        causal: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        return causal
    # Our adapters keep the model's own settings beside them, which describe the head; peft does not keep them.
    model_settings = AutoConfig.from_pretrained(str(adapter) if ModelFolder(adapter).has_config else source)
    model_settings.num_labels = next(
        (shape[0] for name, shape in tensor_shapes(adapter).items() if name.startswith(f"{PREFIX}score.")), 1
    )
    classifier: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        source, dtype="auto", config=model_settings
    )
    return classifier


def _vocabulary_layers(base: PreTrainedModel) -> list[str]:
    """The names of the token embeddings and of the output head, if the model has one."""
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    return [name for name, layer in base.named_modules() if any(layer is module for module in modules)]


def _rows(layer: str, shapes: dict[str, tuple[int, ...]]) -> set[int]:
    """The vocabulary sizes of an adapter's tensors for one layer."""
    sizes = set()
    for name, shape in shapes.items():
        if name.startswith(f"{PREFIX}{layer}."):
            kind = name.removeprefix(f"{PREFIX}{layer}.")
            if kind.endswith("lora_embedding_A"):  # [rank, vocabulary]
                sizes.add(shape[1])
            elif kind in (*FULL_WEIGHTS, "lora_B.weight"):
                sizes.add(shape[0])
    return sizes


def _is_tied(base: PreTrainedModel) -> bool:
    """Whether the output head shares its weight with the embeddings; also true without a head."""
    head = base.get_output_embeddings()
    return head is None or head.weight is base.get_input_embeddings().weight
