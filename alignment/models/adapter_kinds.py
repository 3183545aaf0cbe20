"""Which LoRA adapters vLLM takes beside their base model, by what their adapter_config.json says."""

from __future__ import annotations

from typing import Any

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's max_lora_rank may be."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Ways to begin an adapter that leave the base model's weights alone."""


def rank_of(settings: dict[str, Any]) -> int:
    """The largest rank of an adapter's matrices.

    Raises:
        TypeError, AttributeError: the settings are damaged.
    """
    return int(max(settings.get("r", 0), *(settings.get("rank_pattern") or {}).values(), 1))


def obstacles(settings: dict[str, Any]) -> list[str]:
    """Why vLLM cannot hold an adapter, each as the end of a sentence; empty if it can."""
    start, rank = settings.get("init_lora_weights"), rank_of(settings)
    reasons = {
        f"it is of the kind {settings.get('peft_type')}": settings.get("peft_type", "LORA") != "LORA",
        f"its rank is {rank}, above {LORA_RANKS[-1]}": rank > LORA_RANKS[-1],
        "it is a DoRA adapter": settings.get("use_dora", False),
        "it has biases": settings.get("lora_bias") or settings.get("bias", "none") != "none",
        f"it began as {start}, which changes the base model": isinstance(start, str) and start not in PLAIN_STARTS,
        "it repeats layers": bool(settings.get("layer_replication")),
        f"it replaces whole modules ({settings.get('modules_to_save')})": bool(settings.get("modules_to_save")),
    }
    return [reason for reason, applies in reasons.items() if applies]
