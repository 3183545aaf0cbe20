"""Adapters and the models below them: what an adapter needs of its base, and the whole model that both are together."""

from __future__ import annotations

import json
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
from alignment.models.folders import has_tokenizer
from alignment.models.saving import mend_generation_settings

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""Of every name in an adapter's file; the rest is the name in the base."""
WHOLE = ("weight", "base_layer.weight", "modules_to_save.weight")
"""Names, after a layer's own, of the layer's whole weight in an adapter's file."""


def merge(adapter: Path, source: str, folder: Path) -> None:
    """Writes a base with an adapter merged in, in the base's number format, with the tokenizer of the two.

    A base whose vocabulary has another size than the one that the adapter was trained with is resized first.

    Args:
        source: folder or hub id of the whole base.

    Raises:
        ModelError: the vocabularies differ in a way that the adapter does not make good.
    """
    from peft import PeftModel

    settings = json.loads((adapter / SETTINGS).read_text(encoding="utf-8"))
    base = _base(adapter, settings, source)
    dtype = base.dtype
    fit_vocabulary(base, adapter)
    merged = PeftModel.from_pretrained(base.to(torch.float32), str(adapter)).merge_and_unload()
    mend_generation_settings(merged, source)
    merged.to(dtype).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(adapter) if has_tokenizer(adapter) else source)
    tokenizer.save_pretrained(folder)


def fit_vocabulary(base: PreTrainedModel, adapter: Path) -> None:
    """Gives a base as many embeddings as the adapter was trained with.

    Raises:
        ModelError: the adapter does not hold the embeddings that its base lacks.
    """
    shapes = tensor_shapes(adapter)
    layers = _vocabulary_layers(base)
    sizes = {size for name in layers for size in _rows(name, shapes)}
    size = base.get_input_embeddings().weight.shape[0]
    if sizes <= {size}:
        return
    whole = [name for name in layers if any(f"{PREFIX}{name}.{kind}" in shapes for kind in WHOLE)]
    if len(sizes) > 1 or not whole or (len(whole) < len(layers) and not _is_tied(base)):
        raise ModelError(
            f"the adapter {adapter} was trained with a vocabulary of {' and '.join(map(str, sorted(sizes)))} tokens, "
            f"its base {base.name_or_path} has {size}, and the adapter does not hold the embeddings that are missing. "
            "Save it with its embeddings (peft: save_embedding_layers=True, or modules_to_save), or save the resized "
            "base and name that in adapter_config.json"
        )
    base.resize_token_embeddings(sizes.pop(), mean_resizing=False)


def tensor_shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an adapter's file, by its name there."""
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _base(adapter: Path, settings: dict[str, Any], source: str) -> PreTrainedModel:
    """The model below an adapter, with a classifier's head if the adapter is one's."""
    if settings.get("task_type") != "SEQ_CLS":
        causal: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        return causal
    # Ours keep the settings of the whole model beside the adapter, which know the head; peft by itself does not.
    model_settings = AutoConfig.from_pretrained(str(adapter) if (adapter / "config.json").is_file() else source)
    model_settings.num_labels = next(
        (shape[0] for name, shape in tensor_shapes(adapter).items() if name.startswith(f"{PREFIX}score.")), 1
    )
    classifier: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        source, dtype="auto", config=model_settings
    )
    return classifier


def _vocabulary_layers(base: PreTrainedModel) -> list[str]:
    """Names of the token embeddings and of the output head, where the model has one."""
    wanted = (base.get_input_embeddings(), base.get_output_embeddings())
    return [name for name, layer in base.named_modules() if any(layer is module for module in wanted)]


def _rows(layer: str, shapes: dict[str, tuple[int, ...]]) -> set[int]:
    """Sizes of the vocabulary that an adapter's tensors of one layer have."""
    sizes = set()
    for name, shape in shapes.items():
        if name.startswith(f"{PREFIX}{layer}."):
            kind = name.removeprefix(f"{PREFIX}{layer}.")
            if kind.endswith("lora_embedding_A"):  # [rank, vocabulary]
                sizes.add(shape[1])
            elif kind in (*WHOLE, "lora_B.weight"):
                sizes.add(shape[0])
    return sizes


def _is_tied(base: PreTrainedModel) -> bool:
    head = base.get_output_embeddings()
    return head is None or head.weight is base.get_input_embeddings().weight
