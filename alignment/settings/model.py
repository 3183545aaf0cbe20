"""The `model:` section: which model, in which number format, with which adapter and chat template."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from alignment.settings.plugins import builtin_attentions, hint_for, load_attention
from alignment.settings.section import NumberFormat, Positive, PositiveCount, Section, as_value_error


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685) instead of full fine-tuning."""

    rank: PositiveCount = 16
    """Rank r of every adapter matrix, ≥ 1, and at most the smaller side of some layer that gets one."""
    alpha: Positive = 32.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an adapter input, 0 to 1. 0 (off) keeps log-ratios exact; only `sft` should raise it."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter. A name that matches nothing is tolerated, with a warning, as long as
    another matches. `all-linear` is every linear layer except the output head."""
    start: str | None = None
    """An adapter to go on from: a run, a checkpoint or a folder, made on `model.path` with the same rank and modules.
    The reference is the model without it. None starts a new one, which changes nothing at first."""


TEMPLATE_ARGUMENTS = (
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "strftime_now"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
)
"""What `apply_chat_template` takes besides the variables of a template."""


class ModelConfig(Section):
    """The model to align."""

    path: str = "smollm2-135m-instruct"
    """A hub id, a local folder (a model; an adapter, which is merged into its base; a run, of which the newest intact
    checkpoint is taken), a run's address in a storage (`s3://bucket/runs/NAME`), or the bundled
    `smollm2-135m-instruct`. Code that comes with a model is never executed."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None takes its default branch."""
    dtype: NumberFormat = "auto"
    """Number format of weights and activations. `bf16` keeps an fp32 master copy of every trained weight; log-softmax
    and losses are fp32 in either case. `auto` is `bf16` where the processor computes in it (GPUs, CPUs with
    AVX512-BF16 or AMX), else `fp32`, which is several times as fast there."""
    attention: str = "auto"
    """How the packed mask is applied: `grouped` group by group, `sdpa` with a dense mask, which every model takes,
    `flex` (CUDA only) with a block mask. `auto` takes `flex` on CUDA and `grouped` elsewhere. One's own is a dotted
    `package.module:attribute`, an `alignment.models.attention.PackedAttention`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time for a fraction of the memory."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights; None is full fine-tuning."""
    chat_template: str | None = None
    """Template for message lists: `chatml`, `zephyr`, a path to a Jinja file, Jinja text, or the name of one of several
    that the tokenizer has. None uses the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What the template is told besides the messages, as `{enable_thinking: false}`. It is written into the template
    as defaults, so that training, rollouts, evaluation, the saved model and its endpoint all have the same."""

    @field_validator("attention")
    @classmethod
    def _known_attention(cls, name: str) -> str:
        if name not in (builtin := ["auto", *builtin_attentions()]):
            if ":" not in name:
                raise ValueError(f"there is no attention {name!r}{hint_for(name, builtin)}")
            with as_value_error():
                load_attention(name)
        return name

    @field_validator("chat_template_kwargs")
    @classmethod
    def _names_of_variables(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        for name in kwargs:
            if not is_template_variable(name):
                raise ValueError(f"{name!r} cannot be told to a chat template")
        return kwargs


def is_template_variable(name: str) -> bool:
    """Whether a chat template can be told something by this name: transformers needs a few names for itself."""
    return name.isidentifier() and name not in TEMPLATE_ARGUMENTS
