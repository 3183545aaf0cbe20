"""Which LoRA adapters vLLM can serve beside their base model, judged by their adapter_config.json."""

from __future__ import annotations

from typing import Any

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for max_lora_rank."""
PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Initialisations of an adapter that do not change the base model's weights."""


def rank_of(settings: dict[str, Any]) -> int:
    """The largest rank of an adapter's matrices.

    Raises:
        TypeError, AttributeError: the settings are damaged.
    """
    return int(max(settings.get("r", 0), *(settings.get("rank_pattern") or {}).values(), 1))


def obstacles(settings: dict[str, Any]) -> list[str]:
    """The reasons why vLLM cannot serve an adapter, each as the end of a sentence; empty if it can."""
    initialisation, rank = settings.get("init_lora_weights"), rank_of(settings)
    reasons = {
        f"it is of the kind {settings.get('peft_type')}": settings.get("peft_type", "LORA") != "LORA",
        f"its rank is {rank}, above {LORA_RANKS[-1]}": rank > LORA_RANKS[-1],
        "it is a DoRA adapter": settings.get("use_dora", False),
        "it has biases": settings.get("lora_bias") or settings.get("bias", "none") != "none",
        f"it began as {initialisation}, which changes the base model": (
            isinstance(initialisation, str) and initialisation not in PLAIN_INITIALISATIONS
        ),
        "it repeats layers": bool(settings.get("layer_replication")),
        f"it replaces whole modules ({settings.get('modules_to_save')})": bool(settings.get("modules_to_save")),
    }
    return [reason for reason, applies in reasons.items() if applies]
