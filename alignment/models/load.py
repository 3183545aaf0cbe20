"""Loads a model and its tokenizer, in full or with a LoRA adapter, ready for the packed forward pass."""

from __future__ import annotations

import contextlib
import copy
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
from transformers.pytorch_utils import Conv1D

from alignment.data.chat_templates import chat_template, with_kwargs
from alignment.errors import ConfigError, ModelError
from alignment.models.attention import PackedAttention, register_attention
from alignment.models.check import prove_packing
from alignment.models.folders import model_source
from alignment.models.language_model import LanguageModel
from alignment.models.memory_efficient import patch_memory_efficient
from alignment.models.model_folder import ModelFolder
from alignment.models.rope import fix_rope
from alignment.models.saving import mend_generation_settings
from alignment.run_folder import checkpoint_or_path
from alignment.settings.data import DataConfig
from alignment.settings.model import LoraConfig, ModelConfig
from alignment.settings.plugins import load_attention
from alignment.settings.section import NumberFormat

logger = logging.getLogger(__name__)

__all__ = ["LanguageModel", "load_model", "load_tokenizer"]

Head = Literal["language", "score"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCALE_SETTINGS = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
"""Settings of an adapter that change its effect although names and shapes stay the same."""
LOAD_ERRORS = (AttributeError, ImportError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)
"""Errors that transformers raises if a family has no such head, lacks a package or accepts only its own attention."""
RANDOM_SETTINGS = ("dropout", "pdrop", "jitter")
"""Words in the names of settings that make a model random in training."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerFast:
    """Loads the model's tokenizer, and gives it the configured chat template and the template's variables.

    Raises:
        ModelError: the tokenizer cannot be loaded, or has no end token.
        ConfigError: the configured template is not valid, or does not know the variables.
    """
    source = model_source(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {config.path!r}: no tokenizer can be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.path {config.path!r}: the tokenizer has no end token, so no answer could ever end")
    own_template = tokenizer.chat_template
    template = chat_template(config.chat_template, own_template if isinstance(own_template, dict) else None)
    if template is not None:
        tokenizer.chat_template = template
        _check_syntax(tokenizer)
    if config.chat_template_kwargs:
        own_template = tokenizer.chat_template
        if own_template is None:
            raise ConfigError("model.chat_template_kwargs: the tokenizer has no chat template to be told anything")
        # The variables become a part of the template, so that they are saved with the tokenizer.
        tokenizer.chat_template = (
            {name: with_kwargs(text, config.chat_template_kwargs) for name, text in own_template.items()}
            if isinstance(own_template, dict)
            else with_kwargs(own_template, config.chat_template_kwargs)
        )
    return tokenizer


def _check_syntax(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuses a template that is not valid Jinja. Other refusals of a template show when the rows are rendered.

    Raises:
        ConfigError: the template is not valid; the text names the line.
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
    """Loads weights onto `device`. If configured, the model gets an adapter; only an adapter's dropout stays on.

    `seed` decides the first weights of a new adapter and of a new score head.

    Raises:
        ModelError: the model cannot be loaded, has too few positions, or packed groups give other results than single
            sequences.
    """
    source = model_source(config.path)
    attention_name, attention = _attention(config, device)
    settings = _load_settings(source, config, data)
    tokenizer = load_tokenizer(config)
    torch.manual_seed(seed)
    load_kwargs = {
        "revision": config.revision,
        "config": copy.deepcopy(settings),  # a config object shared by two models is changed by both
        "dtype": DTYPES[number_format(config.dtype, device)],
        "attn_implementation": attention.implementation,
    }
    if head == "language":
        module = _with_language_head(source, load_kwargs, config.path)
    else:
        module = _with_score_head(source, load_kwargs, tokenizer, config.path)
    _turn_dropout_off(module)
    patch_memory_efficient(module)
    fix_rope(module, data.max_length)
    module = module if config.lora is None else _with_adapter(module, config.lora, seed, head)
    if config.gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = LanguageModel(
        module=module.to(device),
        tokenizer=tokenizer,
        source=source,
        attention=attention_name,
        generation_ends=_generation_ends(module, tokenizer, source, config.revision),
    )
    return prove_packing(model, max_length=data.max_length, path=config.path)


def _load_settings(source: str, config: ModelConfig, data: DataConfig) -> Any:
    """Loads a model's configuration, without anything that is random in training.

    Raises:
        ModelError: there is no model, or it has fewer positions than `data.max_length`.
    """
    try:
        settings = AutoConfig.from_pretrained(source, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path {config.path!r} is neither a folder here nor a hub id that can be loaded: {error}"
        ) from error
    _check_length(settings, data, config.path)
    _make_deterministic(settings)
    return settings


def number_format(dtype: NumberFormat, device: torch.device | str) -> Literal["bf16", "fp32"]:
    """The number format in which a model computes; `auto` is bf16 if the device has arithmetic for it, else fp32.

    A CPU without bf16 arithmetic takes about six times as long for a matrix product in bf16 as in fp32.
    """
    if dtype == "auto":
        return "bf16" if _computes_in_bf16(torch.device(device)) else "fp32"
    if dtype == "bf16" and not _computes_in_bf16(torch.device(device)):
        logger.warning(
            "this processor has no bf16 arithmetic: dtype bf16 is several times as slow here as auto or fp32"
        )
    return dtype


def dtype_name(dtype: NumberFormat, device: torch.device | str) -> str:
    """The number format by the name that torch and vLLM use: `bfloat16` or `float32`."""
    return str(DTYPES[number_format(dtype, device)]).removeprefix("torch.")


def _computes_in_bf16(device: torch.device) -> bool:
    """Whether a device has arithmetic for bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(is_there for name, is_there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def freeze(module: nn.Module) -> None:
    """Freezes a module: it gets no gradients, and its dropout is off."""
    module.requires_grad_(False).eval()


def _attention(config: ModelConfig, device: torch.device) -> tuple[str, PackedAttention]:
    """Resolves `model.attention` for a device, and makes it known to transformers.

    Raises:
        ConfigError: there is no such attention.
        ModelError: it needs CUDA, and the device is not CUDA.
    """
    default = "flex" if device.type == "cuda" else "grouped"
    name = default if config.attention == "auto" else config.attention
    attention: PackedAttention = load_attention(name)
    if attention.cuda_reason and device.type != "cuda":
        raise ModelError(f"model.attention {name} needs a CUDA device: {attention.cuda_reason}")
    attention.prepare()
    register_attention(attention)
    return name, attention


def longest_positions(settings: Any) -> int | None:
    """The number of positions in a model's configuration; None if it names none."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None) or None


def _check_length(settings: Any, data: DataConfig, path: str) -> None:
    """Raises ModelError if sequences may be longer than the model's positions."""
    limit = longest_positions(settings)
    if limit is not None and data.max_length > limit:
        raise ModelError(
            f"data.max_length ({data.max_length}) exceeds the {limit} positions of model.path {path!r}; lower it"
        )


def _make_deterministic(settings: Any) -> None:
    """Sets every dropout and every jitter of a configuration, and of the configurations inside it, to 0."""
    for sub_config in (settings, *(getattr(settings, name, None) for name in settings.sub_configs)):
        for name, value in vars(sub_config).items() if sub_config is not None else ():
            if isinstance(value, float) and any(word in name for word in RANDOM_SETTINGS):
                setattr(sub_config, name, 0.0)


def _turn_dropout_off(module: nn.Module) -> None:
    """Sets the rate of every dropout layer to 0."""
    for submodule in module.modules():
        if isinstance(submodule, nn.Dropout):
            submodule.p = 0.0


def _generation_ends(
    module: Any, tokenizer: PreTrainedTokenizerFast, source: str, revision: str | None
) -> frozenset[int]:
    """Token ids at which generation stops according to the model's folder.

    A score head does not generate, and has no such settings in memory. It scores answers of another model, which end as
    the folder's generation_config.json and config.json say, and as the chat template does.
    """
    if module.can_generate():
        return _ids(module.generation_config.eos_token_id)
    ends = _ids(getattr(module.config.get_text_config(), "eos_token_id", None)) | _template_ends(tokenizer)
    try:
        return ends | _ids(GenerationConfig.from_pretrained(source, revision=revision).eos_token_id)
    except (OSError, ValueError):  # the folder has no generation_config.json
        return ends


def _ids(tokens: int | list[int] | None) -> frozenset[int]:
    """Token ids as a set; a configuration may have one, several or none."""
    return frozenset() if tokens is None else frozenset(tokens if isinstance(tokens, list) else [tokens])


def _template_ends(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The special token that the chat template writes after an answer; empty if it writes none."""
    if tokenizer.chat_template is None:
        return frozenset()
    text, mark = "", "raylign"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    with contextlib.suppress(TemplateError, TypeError):  # a template may refuse these turns
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    if mark not in text:
        return frozenset()
    next_ids = tokenizer(text.rpartition(mark)[2].lstrip(), add_special_tokens=False)["input_ids"][:1]
    return frozenset(next_ids) & frozenset(tokenizer.all_special_ids)


def _with_language_head(source: str, load_kwargs: dict[str, Any], path: str) -> Any:
    """Loads a decoder with the head of a language model.

    Raises:
        ModelError: it cannot be loaded, is a reward model, or lacks weights.
    """
    kinds = load_kwargs["config"].architectures or []
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ModelError(
            f"model.path {path!r} is a {kinds[0]}, a reward model, which writes no text; name the model that it was "
            "made from"
        )
    module, loading_info = _load_weights(AutoModelForCausalLM, source, load_kwargs, path)
    _refuse_missing(loading_info["missing_keys"], path)
    mend_generation_settings(module, path)
    return module


def _with_score_head(source: str, load_kwargs: dict[str, Any], tokenizer: PreTrainedTokenizerFast, path: str) -> Any:
    """Loads a decoder with a score head: one output without bias.

    A new head is initialised with variance 1 / (hidden size + 1), as in arXiv 2009.01325.

    Raises:
        ModelError: it cannot be loaded, has no linear score head, or lacks weights.
    """
    settings = load_kwargs["config"]
    settings.num_labels = 1
    # transformers and vLLM read the score at the last token that is not padding. So no token that ends an answer may be
    # the padding token.
    settings.pad_token_id = tokenizer.pad_token_id = _padding_token(tokenizer, settings.get_text_config().vocab_size)
    module, loading_info = _load_weights(AutoModelForSequenceClassification, source, load_kwargs, path)
    if not isinstance(getattr(module, "score", None), nn.Linear):
        raise ModelError(f"model.path {path!r}: {type(module).__name__} has no linear score head")
    _refuse_missing([name for name in loading_info["missing_keys"] if not name.startswith("score.")], path)
    module.score.float()  # differences of rewards can be smaller than bf16 resolves
    if "score.weight" in loading_info["missing_keys"]:
        nn.init.normal_(module.score.weight, std=(module.score.in_features + 1) ** -0.5)
    return module


def _load_weights(kind: Any, source: str, load_kwargs: dict[str, Any], path: str) -> tuple[Any, dict[str, Any]]:
    """Loads a model with one of transformers' classes.

    Returns:
        The model, and transformers' report about its weights.

    Raises:
        ModelError: it cannot be loaded, or its weights have other shapes than its configuration says.
    """
    try:
        module, loading_info = kind.from_pretrained(
            source, **load_kwargs, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except LOAD_ERRORS as error:
        family = load_kwargs["config"].model_type
        raise ModelError(
            f"model {path!r} ({family}) cannot be loaded with {kind.__name__}: {type(error).__name__}: {error}"
        ) from error
    mismatched_shapes = {
        name: (list(stored_shape), list(expected_shape))
        for name, stored_shape, expected_shape in loading_info["mismatched_keys"]
    }
    if "score.weight" in mismatched_shapes:
        raise ModelError(
            f"model {path!r}: the classifier has {mismatched_shapes['score.weight'][0][0]} labels, a reward model has "
            "one. Train one with algorithm reward_model, or name the model that the classifier was made from"
        )
    for name, (stored_shape, expected_shape) in mismatched_shapes.items():
        raise ModelError(
            f"model {path!r}: weights are not of the size that config.json says: {name} is {stored_shape} and should "
            f"be {expected_shape}"
        )
    return module, loading_info


def _refuse_missing(names: Iterable[str], path: str) -> None:
    """Raises ModelError if a model's files lack weights, because these would silently be random."""
    missing_names = sorted(names)
    if missing_names:
        raise ModelError(
            f"model {path!r}: its files lack {len(missing_names)} of its weights, such as {missing_names[0]}, which "
            "would be random"
        )


def _padding_token(tokenizer: PreTrainedTokenizerFast, size: int) -> int:
    """The id of a special token that is not the end token; of any other token if there is no such special token.

    Args:
        size: size of the model's vocabulary, which may be smaller than the tokenizer's.
    """
    special_ids = sorted(tokenizer.all_special_ids)
    added_ids = sorted(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    candidates = [*special_ids, *added_ids, *range(len(tokenizer))]
    return int(next(index for index in candidates if index != tokenizer.eos_token_id and index < size))


def _with_adapter(module: PreTrainedModel, lora: LoraConfig, seed: int, head: Head) -> Any:
    """Adds a LoRA adapter to a model, a new one or a copy of `lora.start`.

    Raises:
        ModelError: no layer matches the configured names, the rank is too large, or `lora.start` does not fit.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    targets: str | list[str] = "all-linear"
    if not isinstance(lora.target_modules, str):
        targets = _target_modules(module, lora.target_modules)
    _check_rank(module, lora.rank, targets)
    peft_config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM" if head == "language" else "SEQ_CLS",
    )
    torch.manual_seed(seed)
    peft_model = get_peft_model(module, peft_config, autocast_adapter_dtype=False)
    if lora.start is not None:
        _load_adapter_weights(peft_model, lora.start)
    return peft_model


def _load_adapter_weights(peft_model: Any, path: str) -> None:
    """Copies the weights of an earlier adapter into a new one.

    Raises:
        ModelError: there is no adapter at the path, or it has another shape.
    """
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    adapter = ModelFolder(Path(checkpoint_or_path(path)).expanduser())
    if not adapter.is_adapter:
        raise ModelError(f"model.lora.start {path!r} is no folder with an adapter")
    settings = adapter.read_adapter_config()
    weights = load_peft_weights(str(adapter.path), device="cpu")
    old_shapes: dict[str, Any] = {name: list(weight.shape) for name, weight in weights.items()}
    new_shapes: dict[str, Any] = {
        name: list(weight.shape) for name, weight in get_peft_model_state_dict(peft_model).items()
    }
    old_scale = {
        "lora_alpha": settings.get("lora_alpha"),
        **{k: settings[k] for k in SCALE_SETTINGS if settings.get(k)},
    }
    new_scale = {"lora_alpha": peft_model.active_peft_config.lora_alpha}
    differences = [
        f"{name} is {old.get(name, 'not there')} in it and {new.get(name, 'not there')} here"
        for old, new in ((old_shapes, new_shapes), (old_scale, new_scale))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise ModelError(
            f"model.lora.start {path!r} is an adapter of another shape ({differences[0]}, and {len(differences) - 1} "
            "more such); rank, alpha, target_modules and model.path have to be as they were in its training. What "
            "raylign does not train, such as its own embeddings, can be merged instead: model.path may name the adapter"
        )
    set_peft_model_state_dict(peft_model, weights)


def _check_rank(module: PreTrainedModel, rank: int, targets: str | list[str]) -> None:
    """Refuses a rank above that of every layer with an adapter, which would cost memory and add nothing.

    Args:
        targets: the names of these layers, or `all-linear`.

    Raises:
        ModelError: the rank is larger than the number of inputs or of outputs of each layer.
    """
    head = module.get_output_embeddings()
    ranks = [
        min(layer.weight.shape)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
        and layer is not head
        and (isinstance(targets, str) or name.rpartition(".")[2] in targets)
    ]
    if ranks and rank > max(ranks):
        raise ModelError(
            f"model.lora.rank ({rank}) is above the largest rank of a layer with an adapter, {max(ranks)}, the smaller "
            f"of its numbers of inputs and outputs; a larger adapter can do no more. Lower it to {max(ranks)} at most"
        )


def _target_modules(module: PreTrainedModel, names: tuple[str, ...]) -> list[str]:
    """The configured names that match a linear layer of the model; warns of the others.

    Raises:
        ModelError: no name matches, or one is the output head's.
    """
    submodules = [(path.rpartition(".")[2], submodule) for path, submodule in module.named_modules()]
    linear_names = {name for name, submodule in submodules if isinstance(submodule, nn.Linear)}
    matches = [name for name in names if name in linear_names]
    absent_names = [name for name in names if name not in linear_names]
    if not matches:
        raise ModelError(
            f"none of model.lora.target_modules {list(names)} is a linear layer of this model; it has "
            f"{sorted(linear_names)}"
        )
    head = module.get_output_embeddings()
    heads = [name for name, submodule in submodules if submodule is head and head is not None]
    if set(heads) & set(matches):
        raise ModelError(f"model.lora.target_modules names the output head {heads[0]!r}, which cannot have an adapter")
    if absent_names:
        logger.warning(
            "model.lora.target_modules: %s match nothing in this model and are left out", ", ".join(absent_names)
        )
    return matches
