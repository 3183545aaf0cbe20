"""Adapters and models of a few numbers each, made by hand: enough for everything that never loads one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from alignment.models.model_folder import ModelFolder

BASE = "org/base"
MODULES = ("q_proj", "v_proj")
HIDDEN = 16
VOCABULARY = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [], "padding": None}
SETTINGS = {"architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_attention_heads": 4}


def numbers(*shape: int, seed: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def lora(module: str, *, rank: int, inputs: int = HIDDEN, outputs: int = HIDDEN, seed: int = 0) -> dict[str, Any]:
    """The two matrices that adapt one layer."""
    name = f"base_model.model.model.layers.0.self_attn.{module}"
    return {
        f"{name}.lora_A.weight": numbers(rank, inputs, seed=seed),
        f"{name}.lora_B.weight": numbers(outputs, rank, seed=seed + 1),
    }


def adapter(
    folder: Path,
    *,
    rank: int = 8,
    modules: tuple[str, ...] = MODULES,
    seed: int = 0,
    tensors: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """An adapter's folder as peft writes it, with a tokenizer; `settings` go into adapter_config.json."""
    folder.mkdir(parents=True)
    known = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "target_modules": list(modules)}
    config = {**known, "base_model_name_or_path": BASE, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    made = {name: value for module in modules for name, value in lora(module, rank=rank, seed=seed).items()}
    save_file(made if tensors is None else tensors, folder / "adapter_model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(VOCABULARY))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def whole(folder: Path, *, seed: int = 0, tensors: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A whole model's folder; `settings` go into config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**SETTINGS, **settings}))
    made = {"model.embed_tokens.weight": numbers(32, HIDDEN, seed=seed), "model.norm.weight": np.ones(HIDDEN)}
    save_file(made if tensors is None else tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(VOCABULARY))
    return folder


def of_run(run: Path, step: int, *, seed: int = 0, **settings: Any) -> Path:
    """A checkpoint of a run as training leaves it, with trainer state, manifest and commit mark."""
    folder = adapter(run / "checkpoints" / f"step-{step:08d}", seed=seed, **settings)
    (folder / "README.md").write_text("An adapter.")
    (folder / "trainer").mkdir()
    (folder / "trainer" / "state.json").write_text(json.dumps({"step": step, "identity": {"data": "fingerprint"}}))
    (folder / "trainer" / "tensors.safetensors").write_bytes(b"masters")
    ModelFolder(folder).commit()
    return folder
