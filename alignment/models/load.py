"""Loads a model and its tokenizer, full or with LoRA adapters, ready for the packed forward pass."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from alignment.checkpoint import checkpoint_or_path
from alignment.data.chat import chat_template, with_kwargs
from alignment.errors import ConfigError, ModelError
from alignment.models.attention import IMPLEMENTATIONS, Attention, limit_recompilations
from alignment.models.check import prove_packing
from alignment.models.folders import is_adapter, model_source
from alignment.models.language_model import LanguageModel
from alignment.models.lean import make_lean
from alignment.models.rope import fix_rope
from alignment.models.saving import mend_generation_settings
from alignment.settings.data import DataConfig
from alignment.settings.model import LoraConfig, ModelConfig
from alignment.settings.section import NumberFormat

logger = logging.getLogger(__name__)

__all__ = ["LanguageModel", "load_model", "load_tokenizer"]

Head = Literal["language", "score"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCALES = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
"""Of an adapter's settings: what changes its effect where names and shapes are the same."""
UNLOADABLE = (AttributeError, ImportError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)
"""What transformers raises where a family has no such head, lacks a package or takes no attention but its own."""
RANDOM_SETTINGS = ("dropout", "pdrop", "jitter")
"""Parts of the names by which configurations call what is random in training."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with an end token, and the configured chat template and what this is told.

    Raises:
        ModelError: it cannot be loaded, or has no end token.
        ConfigError: the configured template is none, or does not know what it is told.
    """
    source = model_source(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {config.path!r}: no tokenizer can be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.path {config.path!r}: the tokenizer has no end token, so no answer could ever end")
    own = tokenizer.chat_template
    template = chat_template(config.chat_template, own if isinstance(own, dict) else None)
    if template is not None:
        tokenizer.chat_template = template
        _check_syntax(tokenizer)
    if config.chat_template_kwargs:
        own = tokenizer.chat_template
        if own is None:
            raise ConfigError("model.chat_template_kwargs: the tokenizer has no chat template to be told anything")
        # Whoever loads the saved tokenizer has them too: they become a part of the template.
        tokenizer.chat_template = (
            {name: with_kwargs(text, config.chat_template_kwargs) for name, text in own.items()}
            if isinstance(own, dict)
            else with_kwargs(own, config.chat_template_kwargs)
        )
    return tokenizer


def _check_syntax(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuses a template that no messages could ever be rendered by; what it refuses otherwise is seen with the rows.

    Raises:
        ConfigError: with the line.
    """
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(f"model.chat_template: line {error.lineno} is not Jinja: {error.message}") from error
    except Exception as error:
        logger.debug("model.chat_template does not render a lone question: %s", error)


def load_model(
    config: ModelConfig, data: DataConfig, *, device: torch.device, seed: int, head: Head = "language"
) -> LanguageModel:
    """Loads weights onto `device`, with a fresh adapter if configured and every dropout but the adapter's off.

    `seed` decides the first weights of an adapter, and of a score head that the model does not have yet.

    Raises:
        ModelError: the model cannot be loaded, is too short for `data.max_length`, or says something else of packed
            groups than of each sequence alone.
    """
    source = model_source(config.path)
    form = _attention(config, device)
    try:
        settings = AutoConfig.from_pretrained(source, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path {config.path!r} is neither a folder here nor a hub id that can be loaded: {error}"
        ) from error
    _check_length(settings, data, config.path)
    _make_deterministic(settings)
    tokenizer = load_tokenizer(config)
    torch.manual_seed(seed)
    how = {
        "revision": config.revision,
        "config": copy.deepcopy(settings),  # a config object shared by two models is changed by both
        "dtype": DTYPES[number_format(config.dtype, device)],
        "attn_implementation": IMPLEMENTATIONS[form],
    }
    if head == "language":
        module = _with_language_head(source, how, config.path)
    else:
        module = _with_score_head(source, how, tokenizer, config.path)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    make_lean(module)
    fix_rope(module, data.max_length)
    if config.lora is not None:
        module = _with_adapter(module, config.lora, seed, head)
    if config.gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = LanguageModel(
        module=module.to(device),
        tokenizer=tokenizer,
        source=source,
        attention=form,
        generation_ends=_generation_ends(module, tokenizer, source, config.revision),
    )
    return prove_packing(model, max_length=data.max_length, path=config.path)


def number_format(wanted: NumberFormat, device: torch.device | str) -> Literal["bf16", "fp32"]:
    """What a model computes in on a device; `auto` is bf16 where its arithmetic knows that, else fp32.

    Without it, a CPU takes about six times as long for a matrix product in bf16 as for the same in fp32.
    """
    if wanted == "auto":
        return "bf16" if _computes_in_bf16(torch.device(device)) else "fp32"
    if wanted == "bf16" and not _computes_in_bf16(torch.device(device)):
        logger.warning(
            "this processor has no bf16 arithmetic: dtype bf16 is several times as slow here as auto or fp32"
        )
    return wanted


def dtype_name(wanted: NumberFormat, device: torch.device | str) -> str:
    """The same as torch and vLLM call it: `bfloat16`, `float32`."""
    return str(DTYPES[number_format(wanted, device)]).removeprefix("torch.")


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(is_there for name, is_there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def freeze(module: nn.Module) -> None:
    """Makes a module a constant: no gradients, no dropout."""
    module.requires_grad_(False).eval()


def _attention(config: ModelConfig, device: torch.device) -> Attention:
    if config.attention == "flex" and device.type != "cuda":
        raise ModelError("model.attention flex needs a CUDA device: on a CPU flex_attention has no backward pass")
    form: Attention = config.attention if config.attention != "auto" else "flex" if device.type == "cuda" else "blocks"
    if form == "flex":
        limit_recompilations()
    return form


def longest_positions(settings: Any) -> int | None:
    """Number of positions that a model's configuration names; None if it names none."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None) or None


def _check_length(settings: Any, data: DataConfig, path: str) -> None:
    limit = longest_positions(settings)
    if limit is not None and data.max_length > limit:
        raise ModelError(
            f"data.max_length ({data.max_length}) exceeds the {limit} positions of model.path {path!r}; lower it"
        )


def _make_deterministic(settings: Any) -> None:
    """Sets every dropout and every jitter of a configuration, and of those inside it, to 0."""
    for part in (settings, *(getattr(settings, name, None) for name in settings.sub_configs)):
        for name, value in vars(part).items() if part is not None else ():
            if isinstance(value, float) and any(word in name for word in RANDOM_SETTINGS):
                setattr(part, name, 0.0)


def _generation_ends(
    module: Any, tokenizer: PreTrainedTokenizerFast, source: str, revision: str | None
) -> frozenset[int]:
    """Ids at which generation stops, by the model's folder.

    A score head generates nothing and has no such settings in memory. Its answers end as those of the model that wrote
    them: by the folder's generation_config.json and config.json, and by the chat template.
    """
    if module.can_generate():
        return _ids(module.generation_config.eos_token_id)
    ends = _ids(getattr(module.config.get_text_config(), "eos_token_id", None)) | _template_ends(tokenizer)
    try:
        return ends | _ids(GenerationConfig.from_pretrained(source, revision=revision).eos_token_id)
    except (OSError, ValueError):  # there is none
        return ends


def _ids(tokens: int | list[int] | None) -> frozenset[int]:
    return frozenset() if tokens is None else frozenset(tokens if isinstance(tokens, list) else [tokens])


def _template_ends(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The special token that the chat template writes behind an answer, if it does."""
    if tokenizer.chat_template is None:
        return frozenset()
    text, mark = "", "raylign"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    with contextlib.suppress(TemplateError, TypeError):  # a template that refuses these turns says nothing of ends
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    if mark not in text:
        return frozenset()
    following = tokenizer(text.rpartition(mark)[2].lstrip(), add_special_tokens=False)["input_ids"][:1]
    return frozenset(following) & frozenset(tokenizer.all_special_ids)


def _with_language_head(source: str, how: dict[str, Any], path: str) -> Any:
    kinds = how["config"].architectures or []
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ModelError(
            f"model.path {path!r} is a {kinds[0]}, a reward model, which writes no text; name the model that it was "
            "made from"
        )
    module, loading = _opened(AutoModelForCausalLM, source, how, path)
    _refuse_missing(loading["missing_keys"], path)
    mend_generation_settings(module, path)
    return module


def _with_score_head(source: str, how: dict[str, Any], tokenizer: PreTrainedTokenizerFast, path: str) -> Any:
    """A decoder with one bias-free output, of variance 1 / (hidden size + 1) if the model has none yet (the
    initialisation of arXiv 2009.01325)."""
    settings = how["config"]
    settings.num_labels = 1
    # Both transformers and vLLM look for the last token that is not padding: it must never be one that ends an answer.
    settings.pad_token_id = tokenizer.pad_token_id = _padding(tokenizer, settings.get_text_config().vocab_size)
    module, loading = _opened(AutoModelForSequenceClassification, source, how, path)
    if not isinstance(getattr(module, "score", None), nn.Linear):
        raise ModelError(f"model.path {path!r}: {type(module).__name__} has no linear score head")
    _refuse_missing([name for name in loading["missing_keys"] if not name.startswith("score.")], path)
    module.score.float()  # rewards differ by less than bf16 resolves
    if "score.weight" in loading["missing_keys"]:
        nn.init.normal_(module.score.weight, std=(module.score.in_features + 1) ** -0.5)
    return module


def _opened(kind: Any, source: str, how: dict[str, Any], path: str) -> tuple[Any, dict[str, Any]]:
    """A model, and what transformers tells of its weights.

    Raises:
        ModelError: it cannot be opened, or its weights are not of the sizes that its configuration says.
    """
    try:
        module, loading = kind.from_pretrained(source, **how, output_loading_info=True, ignore_mismatched_sizes=True)
    except UNLOADABLE as error:
        family = how["config"].model_type
        raise ModelError(
            f"model {path!r} ({family}) cannot be loaded with {kind.__name__}: {type(error).__name__}: {error}"
        ) from error
    mismatched = {name: (list(stored), list(expected)) for name, stored, expected in loading["mismatched_keys"]}
    if "score.weight" in mismatched:
        raise ModelError(
            f"model {path!r}: the classifier has {mismatched['score.weight'][0][0]} labels, a reward model has one. "
            "Train one with algorithm reward_model, or name the model that the classifier was made from"
        )
    for name, (stored, expected) in mismatched.items():
        raise ModelError(
            f"model {path!r}: weights are not of the size that config.json says: {name} is {stored} and should be "
            f"{expected}"
        )
    return module, loading


def _refuse_missing(names: Iterable[str], path: str) -> None:
    """Weights that a model's files lack would be random, without a word."""
    missing = sorted(names)
    if missing:
        raise ModelError(
            f"model {path!r}: its files lack {len(missing)} of its weights, such as {missing[0]}, which would be random"
        )


def _padding(tokenizer: PreTrainedTokenizerFast, size: int) -> int:
    """Id of a special token that is not the end token, or of the tokenizer's padding if there is none.

    Args:
        size: of the model's vocabulary, which may be smaller than the tokenizer's.
    """
    named = sorted(tokenizer.all_special_ids)
    added = sorted(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    indices = [*named, *added, *range(len(tokenizer))]
    return int(next(index for index in indices if index != tokenizer.eos_token_id and index < size))


def _with_adapter(module: PreTrainedModel, lora: LoraConfig, seed: int, head: Head) -> Any:
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
        task_type="CAUSAL_LM" if head == "language" else "SEQ_CLS",
    )
    torch.manual_seed(seed)
    adapted = get_peft_model(module, peft_config, autocast_adapter_dtype=False)
    if lora.start is not None:
        _go_on_from(adapted, lora.start)
    return adapted


def _go_on_from(adapted: Any, path: str) -> None:
    """Fills a fresh adapter with an earlier one.

    Raises:
        ModelError: there is none, or it is of another shape.
    """
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    folder = Path(checkpoint_or_path(path)).expanduser()
    if not is_adapter(folder):
        raise ModelError(f"model.lora.start {path!r} is no folder with an adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    weights = load_peft_weights(str(folder), device="cpu")
    expected = {name: list(weight.shape) for name, weight in get_peft_model_state_dict(adapted).items()}
    stored = {name: list(weight.shape) for name, weight in weights.items()}
    alphas = {"lora_alpha": settings.get("lora_alpha")} | {key: settings[key] for key in SCALES if settings.get(key)}
    different = [
        f"{name} is {there.get(name, 'not there')} in it and {here.get(name, 'not there')} here"
        for there, here in ((stored, expected), (alphas, {"lora_alpha": adapted.active_peft_config.lora_alpha}))
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if different:
        raise ModelError(
            f"model.lora.start {path!r} is an adapter of another shape ({different[0]}, and {len(different) - 1} more "
            "such); rank, alpha, target_modules and model.path have to be as they were in its training. What raylign "
            "does not train, such as its own embeddings, can be merged instead: model.path may name the adapter"
        )
    set_peft_model_state_dict(adapted, weights)


def _known_targets(module: PreTrainedModel, names: tuple[str, ...]) -> list[str]:
    present = {path.rpartition(".")[2] for path, part in module.named_modules() if isinstance(part, nn.Linear)}
    found = [name for name in names if name in present]
    missing = [name for name in names if name not in present]
    if not found:
        raise ModelError(
            f"none of model.lora.target_modules {list(names)} is a linear layer of this model; it has {sorted(present)}"
        )
    head = module.get_output_embeddings()
    heads = [path.rpartition(".")[2] for path, part in module.named_modules() if part is head and head is not None]
    if set(heads) & set(found):
        raise ModelError(f"model.lora.target_modules names the output head {heads[0]!r}, which cannot have an adapter")
    if missing:
        logger.warning("model.lora.target_modules: %s match nothing in this model and are left out", ", ".join(missing))
    return found
