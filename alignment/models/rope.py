"""Rotary embeddings whose frequencies depend on a sequence's length, decided once for a run.

transformers looks at the longest position of a pass, so that an answer would get other frequencies beside a long
neighbour than alone. vLLM decides once, by the longest sequence that it is started for
(`Phi3LongRoPEScaledRotaryEmbedding`: the long factors if max_model_len exceeds the original length), and the engines of
a run are started for `data.max_length`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

VARIABLE = ("dynamic", "longrope")
"""Kinds whose frequencies transformers changes in the forward pass."""


def fix_rope(module: nn.Module, max_length: int) -> None:
    """Gives every rotary embedding of a model the frequencies of a sequence of `max_length` tokens, for good."""
    part: Any
    for part in module.modules():
        kinds = getattr(part, "rope_type", None)
        if kinds is not None:
            part.rope_type = _fixed(part, kinds, max_length)


def _fixed(part: Any, kinds: str | dict[str, str], max_length: int) -> str | dict[str, str]:
    if isinstance(kinds, dict):
        return {layer: _fix(part, kind, max_length, layer) for layer, kind in kinds.items()}
    return _fix(part, kinds, max_length, None)


def _fix(part: Any, kind: str, max_length: int, layer: str | None) -> str:
    """Returns the kind by which the forward pass is to know it."""
    prefix = "" if layer is None else f"{layer}_"
    if not any(name in kind for name in VARIABLE) or not hasattr(part, f"{prefix}original_inv_freq"):
        return kind
    how = {} if layer is None else {"layer_type": layer}
    device: torch.device = getattr(part, f"{prefix}inv_freq").device
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](part.config, device, seq_len=max_length, **how)
    part.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
    setattr(part, f"{prefix}attention_scaling", scale)
    return "fixed"
