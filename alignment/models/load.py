"""Loads the model to align and its tokenizer, full or with LoRA adapters, ready for the packed forward pass."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from alignment.config import DataConfig, LoraConfig, ModelConfig
from alignment.data.chat import chat_template
from alignment.errors import ModelError
from alignment.models import attention
from alignment.models.folders import model_source

logger = logging.getLogger(__name__)

Attention = Literal["blocks", "sdpa", "flex"]
IMPLEMENTATIONS = {"blocks": attention.NAME, "sdpa": "sdpa", "flex": "flex_attention"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Settings by which a model bends its logits after the output head; the packed forward pass applies none of them.
BENT_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A causal language model with what is needed to train it and to talk to it."""

    module: Any
    """A transformers model, or a peft model around one."""
    tokenizer: PreTrainedTokenizerFast
    source: str
    """Folder or hub id of the whole model that training starts from."""
    attention: Attention
    """In which form the module takes the packed mask."""

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model, without peft around it."""
        return self.module if isinstance(self.module, PreTrainedModel) else self.module.get_base_model()

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's, and those that the model stops generating at."""
        ends = self.causal.generation_config.eos_token_id
        return frozenset({self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with the configured chat template and an end token.

    Raises:
        ModelError: it cannot be loaded, or has no end token.
    """
    source = model_source(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {config.path!r}: no tokenizer can be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.path {config.path!r}: the tokenizer has no end token, so no answer could ever end")
    template = chat_template(config.chat_template)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def load_model(config: ModelConfig, data: DataConfig, *, device: torch.device, seed: int) -> LanguageModel:
    """Loads weights onto `device`, with a fresh adapter if configured and every dropout but the adapter's off.

    `seed` decides the adapter's first weights.

    Raises:
        ModelError: the model cannot be loaded, is too short for `data.max_length`, or cannot be trained packed.
    """
    source = model_source(config.path)
    form = _attention(config, device)
    try:
        settings = AutoConfig.from_pretrained(source, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path {config.path!r} is neither a folder here nor a hub id that can be loaded: {error}"
        ) from error
    _check(settings, data, config.path)
    settings.attention_dropout = 0.0
    module = AutoModelForCausalLM.from_pretrained(
        source,
        revision=config.revision,
        config=copy.deepcopy(settings),  # a config object shared by two models is changed by both
        dtype=DTYPES[config.dtype],
        attn_implementation=IMPLEMENTATIONS[form],
    )
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    if config.lora is not None:
        module = _with_adapter(module, config.lora, seed)
    if config.gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokenizer = load_tokenizer(config)
    return LanguageModel(module=module.to(device), tokenizer=tokenizer, source=source, attention=form)


def freeze(module: nn.Module) -> None:
    """Makes a module a constant: no gradients, no dropout."""
    module.requires_grad_(False).eval()


def _attention(config: ModelConfig, device: torch.device) -> Attention:
    if config.attention == "flex" and device.type != "cuda":
        raise ModelError("model.attention flex needs a CUDA device: on a CPU flex_attention has no backward pass")
    if config.attention == "auto":
        return "flex" if device.type == "cuda" else "blocks"
    return config.attention


def _check(settings: Any, data: DataConfig, path: str) -> None:
    """Refuses, with the figure, what the packed forward pass would silently compute differently."""
    known = settings.to_dict()
    for name in BENT_LOGITS:
        if known.get(name) not in (None, 1, 1.0):
            raise ModelError(f"model.path {path!r} sets {name} = {known[name]}, which is not supported")
    for name, what in (("max_position_embeddings", "positions"), ("sliding_window", "tokens of sliding window")):
        limit = known.get(name)
        if limit is not None and data.max_length > limit:
            raise ModelError(f"data.max_length ({data.max_length}) exceeds the model's {limit} {what}")


def _with_adapter(module: PreTrainedModel, lora: LoraConfig, seed: int) -> Any:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    targets: str | list[str] = "all-linear"
    if not isinstance(lora.target_modules, str):
        targets = _known_targets(module, lora.target_modules)
    peft_config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    return get_peft_model(module, peft_config, autocast_adapter_dtype=False)


def _known_targets(module: PreTrainedModel, names: tuple[str, ...]) -> list[str]:
    present = {path.rpartition(".")[2] for path, part in module.named_modules() if isinstance(part, nn.Linear)}
    found = [name for name in names if name in present]
    missing = [name for name in names if name not in present]
    if not found:
        raise ModelError(
            f"none of model.lora.target_modules {list(names)} is a linear layer of this model; it has {sorted(present)}"
        )
    head = module.get_output_embeddings()
    heads = [path.rpartition(".")[2] for path, part in module.named_modules() if part is head]
    if set(heads) & set(found):
        raise ModelError(f"model.lora.target_modules names the output head {heads[0]!r}, which cannot have an adapter")
    if missing:
        logger.warning("model.lora.target_modules: %s match nothing in this model and are left out", ", ".join(missing))
    return found
