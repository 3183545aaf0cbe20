"""The page docs/model-families.md: what loading says of tiny random models of transformers' families.

python -m tests.alignment.family_table > docs/model-families.md
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.alignment.families import write_family

PAGE = Path(__file__).parents[2] / "docs" / "model-families.md"
LENGTH = 128
"""`data.max_length`: windows, chunks and original lengths of the models here are shorter."""
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One family with some of its settings."""

    family: str
    """`model_type` of config.json."""
    models: str
    """Some that people know."""
    feature: str = ""
    """What of it is tried."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}, {self.feature}" if self.feature else self.family


def row(family: str, models: str, feature: str = "", **settings: Any) -> Row:
    return Row(family=family, models=models, feature=feature, settings=settings)


ROWS = [
    row("llama", "Llama 2, 3; SmolLM2; TinyLlama; DeepSeek-R1-Distill"),
    row("llama", "", "dynamic NTK", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
    row("llama4_text", "Llama 4 Scout, Maverick", "chunks of 8", attention_chunk_size=8),
    row("mistral", "Mistral 7B v0.2 and later; Zephyr", sliding_window=None),
    row("mistral", "Mistral 7B v0.1", "window of 8", sliding_window=8),
    row("ministral", "Ministral 8B", "window of 8", sliding_window=8),
    row("ministral3", "Ministral 3"),
    row("mixtral", "Mixtral 8x7B"),
    row("qwen2", "Qwen 2, 2.5; QwQ"),
    row(
        "qwen2",
        "",
        "window of 8",
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    row("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", sliding_window=0),
    row("qwen3", "Qwen 3"),
    row("qwen3_moe", "Qwen3-30B-A3B, 235B-A22B"),
    row("qwen3_next", "Qwen3-Next"),
    row("qwen3_5", "Qwen 3.5"),
    row("qwen3_5_moe", "Qwen3.5-35B-A3B"),
    row("gemma", "Gemma 1"),
    row("gemma2", "Gemma 2", "window of 8, both caps", sliding_window=8),
    row("gemma3_text", "Gemma 3 1B", "window of 8", sliding_window=8),
    row("gemma3", "Gemma 3 4B, 12B, 27B", "window of 8", sliding_window=8),
    row("gemma3n_text", "Gemma 3n", "window of 8, cap", sliding_window=8),
    row("gemma4_text", "Gemma 4", "window of 8, cap", sliding_window=8, final_logit_softcapping=30.0),
    row("gemma4", "Gemma 4, nested", "window of 8, cap", sliding_window=8, final_logit_softcapping=30.0),
    row("vaultgemma", "VaultGemma", "window of 8, caps", sliding_window=8),
    row("recurrent_gemma", "RecurrentGemma"),
    row("phi", "Phi-1, 2"),
    row("phi3", "Phi-3-mini-4k", "window of 8", sliding_window=8),
    row("phi3", "Phi-3.5-mini, Phi-4-mini", "longrope", rope_parameters=LONGROPE),
    row("phimoe", "Phi-3.5-MoE"),
    row(
        "phimoe",
        "",
        "longrope, over its original length",
        rope_parameters={**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.3},
    ),
    row("gpt_oss", "gpt-oss 20B, 120B", "window of 8, sinks", sliding_window=8),
    row("olmo", "OLMo"),
    row("olmo2", "OLMo 2; Tülu 3"),
    row("olmo3", "OLMo 3", "window of 8", sliding_window=8),
    row("olmoe", "OLMoE"),
    row("olmo_hybrid", "OLMo Hybrid"),
    row("cohere", "Command R", "logit scale"),
    row("cohere2", "Command R7B, A", "window of 8, logit scale", sliding_window=8),
    row("granite", "Granite 3", "logit scale", logits_scaling=8.0),
    row("granitemoe", "Granite 3 MoE", "logit scale", logits_scaling=8.0),
    row("granitemoeshared", "Granite MoE with shared experts"),
    row("granitemoehybrid", "Granite 4"),
    row("deepseek_v2", "DeepSeek V2"),
    row("deepseek_v3", "DeepSeek V3, R1; Kimi K2"),
    row("deepseek_v32", "DeepSeek V3.2"),
    row("deepseek_v4", "DeepSeek V4"),
    row("minicpm3", "MiniCPM 3"),
    row("glm", "GLM-4-9B"),
    row("glm4", "GLM-4-0414"),
    row("glm4_moe", "GLM 4.5, 4.6"),
    row("glm4_moe_lite", "GLM-4.7-Flash"),
    row("ernie4_5", "ERNIE 4.5"),
    row("ernie4_5_moe", "ERNIE 4.5 MoE"),
    row("hunyuan_v1_dense", "Hunyuan dense"),
    row("hunyuan_v1_moe", "Hunyuan MoE"),
    row("minimax_m2", "MiniMax M2"),
    row("minimax", "MiniMax-Text-01"),
    row("mimo_v2_flash", "MiMo V2 Flash", "window of 8", sliding_window=8),
    row("seed_oss", "Seed-OSS", "its dropout", residual_dropout=0.1, attention_dropout=0.1),
    row("smollm3", "SmolLM 3"),
    row("exaone4", "EXAONE 4", "window of 8", sliding_window=8),
    row("starcoder2", "StarCoder 2", "window of 8", sliding_window=8),
    row("stablelm", "StableLM"),
    row("nemotron", "Nemotron 4, Minitron"),
    row("nemotron_h", "Nemotron Nano 2, 3"),
    row("apertus", "Apertus"),
    row("arcee", "AFM-4.5B"),
    row("afmoe", "Trinity", "window of 8", sliding_window=8),
    row("dots1", "dots.llm1"),
    row("bitnet", "BitNet"),
    row("helium", "Helium"),
    row("nanochat", "nanochat", "cap"),
    row("hyperclovax", "HyperCLOVA X"),
    row("lfm2", "LFM2"),
    row("jamba", "Jamba"),
    row("bamba", "Bamba"),
    row("mamba", "Mamba"),
    row("falcon_mamba", "Falcon Mamba"),
    row("xlstm", "xLSTM"),
    row("gpt2", "GPT-2"),
    row("gpt_neox", "Pythia, GPT-NeoX"),
    row("gpt_bigcode", "StarCoder"),
    row("opt", "OPT", "its dropout", dropout=0.1),
    row("persimmon", "Persimmon"),
    row("biogpt", "BioGPT"),
    row("doge", "Doge"),
    row("falcon", "Falcon"),
    row("gptj", "GPT-J"),
    row("codegen", "CodeGen"),
    row("bloom", "BLOOM"),
    row("mpt", "MPT"),
    row("xglm", "XGLM"),
    row("modernbert-decoder", "ModernBERT decoder"),
]

REASONS = (
    (r"two passes over one batch in train mode", "draws at random in training"),
    (r"differs by up to", "packed differs from alone"),
    (r"cannot be exchanged", "its attention cannot be exchanged"),
    (r"KeyError: 'raylign", "its attention cannot be exchanged"),
    (r"Unrecognized configuration class", "has no such head"),
    (r"no linear score head", "its head is no linear layer"),
    (r"bends its logits", "more than a factor and a cap before its logits"),
    (r"attends with (\w+)", "its attention takes `{}`"),
    (r"attends without the mask", "its attention makes its own masks"),
    (r"cannot run \((\w+)", "cannot run packed"),
)
PLAIN = ("full_attention", "sliding_attention")
"""Kinds of layers that are no reason."""


def verdict(entry: Row, folder: Path, *, head: str) -> str:
    """What loading a tiny model of the family comes to, without figures."""
    import torch

    from alignment.errors import ModelError
    from alignment.models.load import load_model
    from alignment.settings.data import DataConfig
    from alignment.settings.model import ModelConfig

    try:
        write_family(folder, entry.family, head=head, **entry.settings)
    except ValueError as error:
        return f"no: {reason(str(error))}"
    first = ""
    for attention in ("grouped", "sdpa"):
        config = ModelConfig.model_validate({"path": str(folder), "dtype": "fp32", "attention": attention})
        data = DataConfig(path="none", max_length=LENGTH)
        try:
            load_model(config, data, device=torch.device("cpu"), seed=0, head=head)  # type: ignore[arg-type]
        except ModelError as error:
            first = first or f"no: {reason(str(error))}"
            continue
        return "yes" if attention == "grouped" else "with `model.attention: sdpa`"
    return first


def reason(message: str) -> str:
    for pattern, text in REASONS:
        found = re.search(pattern, message)
        if found:
            return text.format(*found.groups()) + kinds_in(message)
    raise AssertionError(f"this refusal has no reason here: {message}")


def kinds_in(message: str) -> str:
    """The kinds of layers that a refusal names, beside those with plain attention."""
    found = re.search(r"(?:layer_types|layers_block_type|block_types): ([a-z_, ]+)\)", message)
    kinds = [] if found is None else [kind for kind in found.group(1).split(", ") if kind not in PLAIN]
    return f" ({', '.join(f'`{kind}`' for kind in kinds)})" if kinds else ""


def table_row(entry: Row) -> str:
    with tempfile.TemporaryDirectory() as folder:
        language = verdict(entry, Path(folder) / "language", head="language")
        score = verdict(entry, Path(folder) / "score", head="score")
    return f"| `{entry.family}` | {entry.models} | {entry.feature} | {language} | {score} |"


HEAD = f"""# Model families

This page says which families of models can be trained, and why others cannot. Loading a model tells the same:

```
raylign train configs/align/dpo_hh.yaml model.path=MODEL --dry-run
```

Groups are trained packed: a prompt once, its completions behind it. So when a model is loaded, for training or for
scoring, the network is proved. It runs two small groups packed, and every sequence of them alone by transformers' own
forward pass. What differs by more than rounding is refused (`alignment/models/check.py`).

The table is what that proof says of tiny random models of each family, with `data.max_length` {LENGTH} and windows,
chunks and original lengths below it. It is written by `python -m tests.alignment.family_table`, and a test fails when
it is stale. A family that is not here is not refused for that.

**Lengths.** Rotary embeddings whose factors depend on the length (longrope, dynamic NTK) take those of
`data.max_length` for every sequence of a run, as vLLM takes those of `max_model_len`. So serve with a length on the
same side of the model's original one. Sliding windows and chunks are counted inside each sequence.

* **actor**: can be trained, be a reference, and be asked for log-probabilities.
* **scores**: can be a reward model or a critic.
* **with `model.attention: sdpa`**: works in that form, not in the default one of CPUs.
* **packed differs from alone**: packed groups get other results than each sequence alone. Layers that carry a state
  from token to token (Mamba, gated delta nets, short convolutions, linear attention) would take it from one completion
  into the next.
* **has no such head**: transformers has no sequence classifier of this family.

| `model_type` | such as | tried with | actor | scores |
|---|---|---|---|---|
"""


def page(rows: Sequence[str]) -> str:
    return HEAD + "".join(f"{text}\n" for text in rows)


if __name__ == "__main__":
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    PAGE.write_text(page([table_row(entry) for entry in ROWS]), encoding="utf-8")
