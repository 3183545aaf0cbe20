"""Tiny random models of the families that transformers has, written to a folder as people's models lie in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import make_tokenizer

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "n_groups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("pad_token_id", "eos_token_id"), 2),
    "bos_token_id": 0,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "sliding_window": 64,
    "initializer_range": 0.3,  # large enough that different contexts get clearly different probabilities
}
"""Settings by every name that families have for them; each takes those that it knows."""

LATENT_ATTENTION = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "minicpm3")
SPECIAL: dict[str, dict[str, Any]] = {
    **{family: {"num_key_value_heads": 4, "head_dim": None} for family in LATENT_ATTENTION},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"attention_window_size": 16},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 64},
    "gemma3": {
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 28,
        }
    },
}
"""What a family needs besides; None leaves a setting to the family."""


def tiny_config(family: str, **settings: Any) -> Any:
    """A small configuration of a `model_type`; its text part, where it is nested, takes the settings."""
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[family]
    default = kind()
    text = default.get_text_config()
    names = text.to_dict()
    special = {**SPECIAL.get(family, {}), **settings}
    chosen = {**SIZES, "vocab_size": 350, "vocab_size_per_layer_input": 350, **special}
    aliases = getattr(type(text), "attribute_map", {})
    taken = {name: value for name, value in chosen.items() if name in names and name not in aliases}
    taken = {name: value for name, value in taken.items() if value is not None or name in settings}
    if names.get("layer_types") and "layer_types" not in special:
        kinds = list(dict.fromkeys(names["layer_types"]))
        taken["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
    if "layer_types" in taken:
        taken["num_hidden_layers"] = len(taken["layer_types"])
    if text is default:
        return kind(**taken)
    inner = next(name for name in default.sub_configs if isinstance(getattr(default, name), type(text)))
    outer = {name: value for name, value in special.items() if name not in names and name != inner}
    return kind(**{inner: type(text)(**taken).to_dict()}, **outer)


def write_model(folder: Path, config: Any, *, head: str = "language", seed: int = 0) -> Path:
    """Writes random weights (fp32), and a tokenizer of 350 tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    if head == "language":
        model = AutoModelForCausalLM.from_config(config)
    else:
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_family(folder: Path, family: str, *, head: str = "language", **settings: Any) -> Path:
    """The same of a family by its `model_type`."""
    return write_model(folder, tiny_config(family, **settings), head=head)
