"""Fixes rotary embeddings whose frequencies depend on the length of a sequence, for the length of a run.

transformers chooses the frequencies by the longest position of a forward pass, so that an answer beside a longer one
would get other frequencies than alone. vLLM chooses them once, by the longest sequence that an engine is started for
(`Phi3LongRoPEScaledRotaryEmbedding` takes the long factors if max_model_len exceeds the original length). The engines
of a run are started for `data.max_length`, so the trainer uses that length too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

VARIABLE = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies transformers changes in the forward pass."""


def fix_rope(module: nn.Module, max_length: int) -> None:
    """Gives each rotary embedding of a model the fixed frequencies of a sequence of `max_length` tokens."""
    submodule: Any
    for submodule in module.modules():
        kinds = getattr(submodule, "rope_type", None)
        if kinds is not None:
            submodule.rope_type = _fix_kinds(submodule, kinds, max_length)


def _fix_kinds(rotary: Any, kinds: str | dict[str, str], max_length: int) -> str | dict[str, str]:
    """Fixes one rotary embedding, which may have a kind for each kind of layer; returns its new `rope_type`."""
    if isinstance(kinds, dict):
        return {layer: _fix_kind(rotary, kind, max_length, layer) for layer, kind in kinds.items()}
    return _fix_kind(rotary, kinds, max_length, None)


def _fix_kind(rotary: Any, kind: str, max_length: int, layer: str | None) -> str:
    """Sets the frequencies of one kind; returns the kind that the forward pass should use from now on."""
    prefix = "" if layer is None else f"{layer}_"
    if not any(name in kind for name in VARIABLE) or not hasattr(rotary, f"{prefix}original_inv_freq"):
        return kind
    layer_kwargs = {} if layer is None else {"layer_type": layer}
    device: torch.device = getattr(rotary, f"{prefix}inv_freq").device
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](rotary.config, device, seq_len=max_length, **layer_kwargs)
    rotary.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
    setattr(rotary, f"{prefix}attention_scaling", scale)
    return "fixed"
