"""The configuration of a run: one YAML file of flat sections, checked whole before anything heavy starts.

A default is the vetted setting; a file lists only what differs. Nothing changes after loading. `raylign schema` writes
the JSON Schema of this file, which editors use to complete and explain keys.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import string
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from alignment.errors import ConfigError
from alignment.keys_elsewhere import place_of
from alignment.passwords import holds_password, without_passwords

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""Also the name of a folder."""


NumberFormat = Literal["auto", "bf16", "fp32"]
MERGE_KEY = "tag:yaml.org,2002:merge"
"""YAML's `<<`, which a mapping may have several of."""


MODULE_FOLDERS: list[str] = []
"""Where modules are looked for beside what is installed: Ray's workers get the current folder by Ray, these by us."""


class Section(BaseModel):
    """A frozen part of a configuration; unknown keys are refused and every field's docstring reaches the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses `lr: yes` and `max_grad_norm: off`, which pydantic reads as the numbers 1 and 0."""
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and _is_number(field.annotation):
            raise ValueError("Input should be a number; on, off, yes, no, true and false are none")
        return value


def _is_number(annotation: Any) -> bool:
    """Whether a type is that of a number, perhaps with others beside it, and not of true and false."""
    kinds = {annotation, *get_args(annotation)}
    kinds |= {kind for part in kinds for kind in get_args(part)}
    return bool(kinds & {int, float}) and bool not in kinds


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685) instead of full fine-tuning."""

    rank: PositiveCount = 16
    """Rank r of every adapter matrix, ≥ 1."""
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
    checkpoint is taken), or the bundled `smollm2-135m-instruct`. Code that comes with a model is never executed."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None takes its default branch."""
    dtype: NumberFormat = "auto"
    """Number format of weights and activations. `bf16` keeps an fp32 master copy of every trained weight; log-softmax
    and losses are fp32 in either case. `auto` is `bf16` where the processor computes in it (GPUs, CPUs with
    AVX512-BF16 or AMX), else `fp32`, which is several times as fast there."""
    attention: Literal["auto", "blocks", "sdpa", "flex"] = "auto"
    """How the packed mask is applied: `blocks` group by group, `sdpa` with a dense mask, which every model takes,
    `flex` (CUDA only) with a block mask. `auto` takes `flex` on CUDA and `blocks` elsewhere."""
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


class AlgorithmConfig(Section):
    """What to optimise."""

    head: ClassVar[Literal["language", "score"]] = "language"
    """What is trained: a language model, or a model that gives every completion a score."""
    samples: ClassVar[bool] = False
    """True if it learns from the model's own answers to the prompts, as the run's scorers judge them."""
    min_completions: ClassVar[int] = 1
    """Fewest completions of a prompt that it can learn from."""

    name: str
    """A module of `alignment.algorithms`, or a dotted `package.module:Class` of one's own."""


FIELDS = (
    *("prompt", "chosen", "rejected", "completion", "completions", "rewards", "label", "messages", "text"),
    *("system", "tools", "chat_template_kwargs", "finish_reason", "truncated"),
)
"""What `columns` can name: the fields of the shapes that `alignment.data.shapes` reads."""


COLUMN = re.compile(r"(?!\d+$)[^\[\]{}!:]+")
"""A name that braces can hold, with dots for what is inside a column."""


class SourceConfig(Section):
    """One source of rows: a file, a folder, a hub id, or what people said to an endpoint."""

    path: str | None = None
    """A `.jsonl`, `.json`, `.csv` or `.tsv` file (each also as `.gz`, `.bz2`, `.xz` or `.zst`), a `.parquet` file, a
    folder of such files or of `datasets`' save_to_disk, a pattern as `data/*.jsonl`, or a hub id. What people said to
    an endpoint is read from its `http(s)://HOST/v1/feedback/export` (as the administrator whose key is in $RAYLIGN_KEY;
    with `?since=jdg-7`, what came after that) or from its database, `sqlite:///FILE` or
    `postgresql+psycopg://USER@HOST/NAME`. It grows, so a run writes it into its folder when it begins, and reads that
    ever after: a resume goes on with the rows that the run began with."""
    name: str | None = None
    """Configuration name of a hub dataset, or of a folder that is a copy of one."""
    data_dir: str | None = None
    """Folder inside a hub dataset or a folder, such as `data/rl`."""
    split: str = "train"
    """Split of a hub dataset, or of a folder whose files' names say one, as `test.jsonl`, `train/a.jsonl` and
    `train-00000-of-00001.parquet` do; several are `train+test`. A folder whose names say none is all `train`."""
    fraction: Fraction = 1.0
    """Fraction of the groups to use, 0 to 1, taken from the front after `shuffle`; while streaming, the probability of
    using each, which is the same in every epoch."""
    skip: Count = 0
    """Rows to leave out at the front."""
    take: PositiveCount | None = None
    """Rows to read at most; None reads all."""
    streaming: bool = False
    """Read while training instead of before it: for sets that do not fit into memory."""
    weight: NonNegative = 1.0
    """How often a group is drawn from this source of a streaming mixture, beside the weights of the others. Without
    streaming every group of a mixture is used once per epoch, and `weight` is read as the `fraction`, as which
    it was known."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column stands for which field, as `{chosen: response_j, rejected: response_k}`. Fields: prompt, chosen,
    rejected, completion, completions, rewards, label, messages, text, system, tools, chat_template_kwargs,
    finish_reason, truncated. Dots reach into a column, as `{completion: answer.text}`."""
    prompt_template: str | None = None
    """Text of the prompt with columns in braces, as `"Question: {question}\\n\\nAnswer: "`; dots reach into a column.
    None reads a column."""
    keep: tuple[str, ...] = ()
    """Columns that are handed to the scorers as they are, such as `answer` for one that knows the right one; dots reach
    into a column, as `reward_model.ground_truth`."""
    prompt_as: Literal["text", "user_message"] = "text"
    """What a prompt that is a string means: `text` is continued as it stands, `user_message` goes through the chat
    template as the user's turn."""

    @field_validator("path")
    @classmethod
    def _holds_no_password(cls, path: str | None) -> str | None:
        if path is not None and holds_password(path):
            raise ValueError("must hold no password, for it is kept with the run; PGPASSWORD or ~/.pgpass may")
        return path

    @field_validator("weight")
    @classmethod
    def _draws_from_a_stream(cls, weight: float, info: ValidationInfo) -> float:
        if weight > 1 and not info.data.get("streaming"):
            raise ValueError("above 1 it says how often a stream is drawn from; set streaming, or give a fraction")
        return weight

    @field_validator("columns")
    @classmethod
    def _known_fields(cls, columns: dict[str, str]) -> dict[str, str]:
        for field in columns:
            if field not in FIELDS:
                raise ValueError(f"there is no field {field!r}{nearest(field, FIELDS)}")
        return columns

    @field_validator("prompt_template")
    @classmethod
    def _well_formed(cls, template: str | None) -> str | None:
        try:
            parts = [(name, form, cast) for _, name, form, cast in string.Formatter().parse(template or "")]
        except ValueError as error:
            raise ValueError(f"braces must hold the name of a column ({error})") from error
        for name, form, cast in parts:
            if name is not None and (not COLUMN.fullmatch(name) or form or cast):
                raise ValueError(f"braces must hold the name of a column, as {{question}}, not {name!r}")
        return template


WHICH_ROWS = ("path", "name", "data_dir", "split", "fraction", "skip", "take", "streaming", "weight")
"""Keys of a source that say which rows it has; all others say how a row is read."""


class DataConfig(SourceConfig):
    """Where the preference data comes from and how it is cut to fit."""

    mixture: tuple[SourceConfig, ...] = ()
    """Several sources instead of one `path`. Without streaming all their groups are shuffled together. If one of them
    streams, every group is drawn from a source by `weight`; each goes on from its own place, and begins again when it
    ends."""
    eval: SourceConfig | None = None
    """Held-out rows for evaluation. They are read as the training rows are (`prompt_as`, `prompt_template`, `columns`,
    `keep`), unless it says otherwise; with a `split` alone it is that split of the same set. None cuts `eval_groups`
    from the training data."""
    eval_groups: Count = 0
    """Groups held out for evaluation: cut from the training data, by prompt, if `eval` is None; else the most that
    are used of `eval`, where 0 uses all."""
    hold_out_by: Literal["prompt", "first_turn"] = "prompt"
    """What held-out and training groups may not share: the whole prompt, or the first thing that the user says."""
    shuffle: bool = True
    """Visit groups in a new random order every epoch; false keeps the file's order."""
    shuffle_buffer: PositiveCount = 1000
    """Rows of each source held to shuffle from while streaming."""
    max_length: PositiveCount = 1024
    """Most tokens of prompt and one completion together. A longer completion is cut and gets no end token."""
    max_prompt_length: PositiveCount | None = None
    """Most tokens of a prompt; a longer one is cut as `truncate_prompt` says. None never cuts, so that a prompt of
    `max_length` tokens or more is a bad row."""
    truncate_prompt: Literal["keep_end", "keep_start"] = "keep_end"
    """Which part of a long prompt survives."""
    max_characters: PositiveCount | None = None
    """Leave out rows with prompt + completion longer than this many characters, for any completion. None keeps all."""
    control_tokens: Literal["auto", "text", "control"] = "auto"
    """What the tokenizer's control tokens (`<|im_end|>`) are where they stand in the data's own texts. `text`: ordinary
    characters, so that no text ends its own turn. `control`: what they are in a template. `auto`: text in messages,
    whose control tokens the chat template writes; control in plain text, which has nobody else to write them."""
    train_on_prompt: bool = False
    """Learn the prompt's tokens too (plain language modelling); only for groups with one completion."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """`fail` stops at the first unusable row; `skip` leaves it out, counts it and names it in `bad_rows.jsonl`."""
    bad_row_budget: Fraction = 0.05
    """Largest fraction of bad rows that `skip` accepts, 0 to 1."""

    @model_validator(mode="before")
    @classmethod
    def _held_out_rows_are_read_alike(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("eval"), dict | SourceConfig):
            return values
        held_out = _settings(values["eval"])
        mixture = values.get("mixture")
        if held_out.get("path") is None and "split" in held_out and not mixture:  # another split of the same set
            held_out |= {key: values[key] for key in ("path", "name", "data_dir") if key in values}
        sources = [_settings(each) for each in mixture] if isinstance(mixture, list | tuple) and mixture else [values]
        for key, field in SourceConfig.model_fields.items():
            if key in WHICH_ROWS or key in held_out:
                continue
            settings = [source.get(key, field.get_default(call_default_factory=True)) for source in sources]
            if any(setting != settings[0] for setting in settings):
                raise ValueError(f"the sources of mixture differ in {key}, so eval must say which is its own")
            held_out[key] = settings[0]
        return {**values, "eval": held_out}

    @model_validator(mode="after")
    def _every_source_has_a_path(self) -> Self:
        if any(source.path is None for source in self.mixture):
            raise ValueError("a source of mixture has no path")
        if self.eval is not None and self.eval.path is None:
            raise ValueError("eval has no path; give it one, or a split of data.path that is not trained on")
        return self

    @model_validator(mode="after")
    def _weights_mean_something(self) -> Self:
        drawn = self.sources if self.is_drawn else ()
        if drawn and not any(source.weight != 0 for source in drawn):
            raise ValueError("every weight of mixture is 0, so that no group is ever drawn")
        for source in (*self.sources, *([self.eval] if self.eval else [])):
            if source not in drawn and source.weight != 1 and (source.fraction != 1 or source.weight > 1):
                raise ValueError(f"weight {source.weight:g} means nothing without a streaming mixture; take it away")
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (not self.mixture):
            both = self.path is not None
            raise ValueError(
                "path and mixture are both given; set one of them to null"
                if both
                else "neither path nor mixture is given; say where the data is, e.g. data.path=pairs.jsonl"
            )
        alone = [
            name
            for name, field in SourceConfig.model_fields.items()
            if self.mixture and getattr(self, name) != field.get_default(call_default_factory=True)
        ]
        if alone:
            raise ValueError(f"{alone[0]} beside mixture is read by nothing; give it in the sources of mixture")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be smaller than max_length ({self.max_length}), "
                "or no token is left for the completion"
            )
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The training sources, whether given as one path or as a mixture."""
        return self.mixture or (self,)

    @property
    def is_drawn(self) -> bool:
        """True if every group is drawn from one of several sources, by their weights."""
        return len(self.mixture) > 1 and any(source.streaming for source in self.mixture)

    def fraction_of(self, source: SourceConfig) -> float:
        """Fraction of a source's groups that is used."""
        is_drawn = self.is_drawn and source in self.mixture
        return source.fraction if is_drawn or source.weight == 1 else source.weight


def _settings(source: Any) -> dict[str, Any]:
    """What a source says, whether it is read already or not."""
    return source.model_dump(exclude_unset=True) if isinstance(source, SourceConfig) else dict(source)


class ZeroConfig(Section):
    """DeepSpeed's ZeRO (arXiv 1910.02054): of what a worker holds only its share, for models too large for one GPU."""

    stage: Literal[0, 1, 2, 3] = 0
    """0: of nothing; every worker holds everything, without DeepSpeed. 1: of fp32 master weights and optimizer moments.
    2: of gradients too. 3: of weights too, also of frozen models; layers are gathered while they compute."""
    offload_optimizer: bool = False
    """Keep master weights and moments in the memory of the CPU, which updates them too; needs a stage of at least 1."""
    offload_parameters: bool = False
    """Keep weights in the memory of the CPU until they compute; needs stage 3."""

    @model_validator(mode="after")
    def _has_what_it_offloads(self) -> Self:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs a stage of 1, 2 or 3: at stage 0 there is no DeepSpeed to do it")
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3: at stage {self.stage} every worker holds all weights")
        return self


class OptimConfig(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "rmsprop"] = "adamw"
    """`adamw` (arXiv 1711.05101) or `rmsprop`, the DPO paper's choice."""
    lr: Positive = 1e-6
    """Peak learning rate, > 0. Full fine-tuning by DPO wants 1e-7 to 1e-6, LoRA about 100 times as much."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of AdamW's first and second moment, each 0 to 1."""
    eps: Positive = 1e-8
    """Added to AdamW's denominator, > 0."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, ≥ 0; 0 is none."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this global L2 norm; 0 never clips."""
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "linear"
    """Shape of the learning rate after warm-up, down to `min_lr_ratio`."""
    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up; 0 is none, unless `warmup_ratio` says otherwise."""
    warmup_ratio: Fraction = 0.0
    """Warm-up as a fraction of all steps, 0 to 1; used when `warmup_steps` is 0."""
    min_lr_ratio: Fraction = 0.0
    """Final learning rate as a fraction of the peak, 0 to 1."""
    micro_batch_tokens: PositiveCount = 4096
    """Most tokens in one forward pass, prompts counted once. Decides memory and speed, never the result."""
    on_nonfinite: Literal["fail", "skip"] = "fail"
    """What to do when the loss or gradient is not finite: stop the run, or skip the step and say so."""
    zero: ZeroConfig = Field(default_factory=ZeroConfig)
    """How a trained model is spread over the workers."""


class RolloutConfig(Section):
    """How an algorithm that learns from the model's own answers gets them."""

    engine: Literal["vllm", "local"] = "vllm"
    """`vllm`: engines beside the training workers, or one in this process. `local`: the trained module itself, with
    transformers, for tiny models."""
    completions: PositiveCount = 8
    """Completions of each prompt, ≥ 1; together they are a group."""
    max_tokens: PositiveCount = 256
    """Most tokens of a completion; also bounded by what `data.max_length` leaves beside the prompt."""
    temperature: Positive = 1.0
    """Sampling temperature, > 0. The trained log-probabilities are those at this temperature too."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability, 0 to 1; 1 is off."""
    top_k: Count = 0
    """Sample among this many tokens only; 0 is off."""
    steps_ahead: Count = 0
    """Steps by which sampling runs ahead of learning, and so the most by which a completion's weights are older than
    those that learn from it. 0 is exactly on-policy; 1 samples the next step's while the update runs."""
    dtype: NumberFormat = "auto"
    """Number format of the engine; `auto` is `model.dtype`."""
    timeout_s: Positive = 900.0
    """Seconds after which a step's rollouts, or a weight sync, count as failed. Long answers want more: 32,000 tokens
    at 40 a second take 800 s, once for every `max_sequences` of them. Workers that wait for others allow for it."""
    cache_gb: Positive = 1.0
    """GiB of key-value cache of an engine on a CPU."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Fraction of a GPU's memory that an engine takes, 0 to 1."""
    max_sequences: PositiveCount = 256
    """Completions that an engine works on at once."""
    tensor_parallel: PositiveCount = 1
    """GPUs of one engine."""


class CriticConfig(Section):
    """The value model of an algorithm that has one."""

    trunk: Literal["separate", "shared"] = "separate"
    """`separate`: a model of its own. `shared`: only a value head on the actor's last hidden states."""
    path: str | None = None
    """Model, reward model or run that a separate critic starts from; None is `model.path`. A reward model begins with
    the rewards that it would give as a scorer."""
    lr: Positive | None = None
    """Peak learning rate; None is `optim.lr`."""
    warmup_steps: Count = 0
    """Steps in which only the critic learns."""


class GuardsConfig(Section):
    """When a run is no longer what it should be, and what is done about it. A limit of 0 never triggers."""

    action: Literal["warn", "stop", "roll_back"] = "stop"
    """`warn` only says so. `stop` ends the run with an error, before the step is checkpointed. `roll_back` goes on from
    the newest checkpoint with the prompts that come next."""
    max_roll_backs: PositiveCount = 2
    """Roll-backs after which the run stops."""
    max_kl: NonNegative = 0.0
    """Largest mean KL divergence from the reference, in nats per completion."""
    min_entropy: NonNegative = 0.0
    """Smallest mean entropy of the sampled distributions, in nats per token."""
    max_truncated: NonNegative = 0.0
    """Largest share of completions that end for lack of room, 0 to 1."""
    max_mismatch: NonNegative = 0.0
    """Largest mean |log π_trainer − log π_sampler|, in nats per token."""
    patience: PositiveCount = 3
    """Steps in a row that a limit must be broken for."""
    hacking_window: Count = 0
    """Evaluations over which rising rewards and falling `judges` are taken for reward hacking."""


class ScorerConfig(Section):
    """One source of rewards."""

    name: str
    """A ready-made rule, `model`, `http`, or a dotted `package.module:function` of one's own."""
    weight: float = 1.0
    """Factor of this reward in the sum; may be negative."""
    clip: Positive | None = None
    """Rewards are cut to -clip … clip before the weight; None never cuts."""
    attempts: PositiveCount = 3
    """Times that a reward is asked for which is missing, late or not a finite number, before the run stops."""
    on_unreadable: Literal["fail"] | float = 0.0
    """Reward of a text that the scorer cannot read, such as one that is too long for it, which a policy may write at
    any time; `fail` stops the run instead. The first such text is told. What is wrong with a row is an error in either
    case."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it compares with, which `data.keep` must name."""
        return ()


def _load_scorers(value: Any) -> Any:
    return tuple(_load_scorer(item) for item in value) if isinstance(value, list | tuple) else value


Scorers = Annotated[tuple[SerializeAsAny[ScorerConfig], ...], BeforeValidator(_load_scorers)]
"""Each with the settings of its own class, which its name decides."""


class EvaluateConfig(Section):
    """Evaluation on held-out groups, and samples."""

    every: Count = 0
    """Optimizer steps between evaluations; 0 evaluates only before the first and after the last step."""
    samples: Count = 0
    """Held-out prompts to answer before and after training, kept in `samples.jsonl`; 0 samples none."""
    sample_tokens: PositiveCount = 128
    """Most tokens of a sampled answer."""


class CheckpointConfig(Section):
    """What is kept of a run, and how often."""

    every: Count = 0
    """Optimizer steps between checkpoints; 0 writes only the last, so that a run that breaks off begins again."""
    keep: PositiveCount = 2
    """Newest checkpoints to keep, ≥ 1; older ones are deleted."""


class RunConfig(Section):
    """Everything about one training run."""

    name: RunName
    """Name of the run, and of its folder under `output`: letters, digits, dot, dash and underscore."""
    output: str = "runs"
    """Folder of all runs. On several machines it must be shared between them."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the data order and of everything random, 0 to 2³² - 1."""
    steps: PositiveCount | None = None
    """Optimizer steps to run; None runs `epochs`."""
    epochs: Positive | None = None
    """Passes over the data; exactly one of `steps` and `epochs` is given."""
    groups_per_step: PositiveCount = 16
    """Groups (pairs, for DPO) that make one optimizer step, over all workers together."""
    algorithm: SerializeAsAny[AlgorithmConfig]
    """What to optimise, and with which settings."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """The model to align."""
    data: DataConfig
    """Where the preference data comes from."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """The model's own answers, for algorithms that learn from them."""
    rewards: Scorers = ()
    """What those answers are worth: the weighted sum of these."""
    judges: Scorers = ()
    """Scorers that see only held-out answers and teach nothing: what a hacked reward is caught with. With them, any
    language model's run answers its held-out prompts at every evaluation."""
    critic: CriticConfig = Field(default_factory=CriticConfig)
    """The value model, for algorithms that have one."""
    guards: GuardsConfig = Field(default_factory=GuardsConfig)
    """What may not happen to a run."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """The optimizer."""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    """Evaluation."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""

    @field_validator("algorithm", mode="before")
    @classmethod
    def _load_algorithm(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("name"), str):
            raise ValueError(f"needs a name: {', '.join(algorithm_names())}, or your own package.module:Class")
        try:
            return algorithm_class(value["name"]).model_validate(value)
        except ConfigError as error:  # pydantic collects ValueErrors, so that every other problem is told as well
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs (override the other with null)")
        if self.epochs is not None and any(source.streaming for source in self.data.sources):
            raise ValueError("a streaming source has no known length, so give steps instead of epochs")
        if self.steps is not None:
            try:
                self.check_warmup(self.steps)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    def check_warmup(self, steps: int) -> None:
        """Raises ConfigError if a warm-up is longer than a run of so many steps, so that it would never end."""
        if self.optim.warmup_steps > steps:
            raise ConfigError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) is more than the {steps} steps of the run, which "
                "would end before its learning rate is reached; use fewer, or optim.warmup_ratio"
            )
        if self.critic.warmup_steps >= steps:
            raise ConfigError(
                f"critic.warmup_steps ({self.critic.warmup_steps}) leaves none of the {steps} steps to train the model "
                "itself; use fewer"
            )

    @model_validator(mode="after")
    def _can_sample(self) -> Self:
        algorithm = self.algorithm
        if not algorithm.samples:
            if self.rewards:
                raise ValueError(f"{algorithm.name} learns from the data, not from rewards; give them as judges")
            if self.judges and algorithm.head == "score":
                raise ValueError(f"{algorithm.name} trains a model that answers nothing that judges could see")
            return self
        if self.rollout.engine == "local" and self.optim.zero.stage == 3:
            raise ValueError("rollout.engine local needs all weights on one worker, which optim.zero.stage 3 spreads")
        if not self.rewards:
            raise ValueError(f"{algorithm.name} learns from rewards, and none are given; see `rewards`")
        if self.rollout.completions < algorithm.min_completions:
            raise ValueError(
                f"{algorithm.name} compares the completions of a prompt: rollout.completions "
                f"({self.rollout.completions}) must be at least {algorithm.min_completions}"
            )
        if self.model.lora is not None and self.model.lora.dropout:
            raise ValueError(f"model.lora.dropout must be 0 for {algorithm.name}, or its ratios mean nothing")
        return self

    @model_validator(mode="after")
    def _keeps_columns(self) -> Self:
        sources = [*self.data.sources, *([self.data.eval] if self.data.eval else [])]
        kept = {column for source in sources for column in source.keep}
        for scorer in (*self.rewards, *self.judges):
            for column in scorer.columns:
                if column not in kept:
                    raise ValueError(
                        f"scorer {scorer.name} compares with the column {column!r}, which no source keeps; name it in "
                        f"data.keep, as [{column}]"
                    )
        return self

    @property
    def answers_prompts(self) -> bool:
        """True if the run draws completions, to learn from or to be judged by."""
        return self.algorithm.samples or bool(self.judges)

    @property
    def wants_engines(self) -> bool:
        """True if it draws them by vLLM."""
        return self.answers_prompts and self.rollout.engine == "vllm"

    @property
    def folder(self) -> Path:
        """Where this run writes: metrics, checkpoints, samples."""
        return Path(self.output) / self.name

    def make_folder(self) -> Path:
        """Makes `folder`, and returns it.

        Raises:
            ConfigError: it cannot be made or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ConfigError(
                f"output {self.output!r}: the run's folder {self.folder} cannot be written: {error.strerror}"
            ) from error
        return self.folder


def algorithm_names() -> list[str]:
    """Names of the algorithms that come with raylign: the modules of `alignment.algorithms`."""
    stems = (path.stem for path in (Path(__file__).parent / "algorithms").glob("[a-z]*.py"))
    return sorted(stem.replace("_plus_plus", "++") for stem in stems)


def imported(name: str, what: str) -> Any:
    """What a dotted `package.module:attribute` names.

    Args:
        what: what it is the name of, for the error.

    Raises:
        ConfigError: there is no such thing.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        folders = [folder for folder in sys.path if not folder.startswith((sys.prefix, sys.base_prefix))]
        raise ConfigError(
            f"{what} {name!r} cannot be imported: {error}. Modules are looked for in the current folder, in that of "
            f"the configuration, on PYTHONPATH ({', '.join(folders) or 'none'}), and among the installed packages"
        ) from error
    except Exception as error:  # anything may come: the module's code is run, and its name may be malformed
        kind = "" if isinstance(error, ImportError | AttributeError | TypeError | ValueError) else type(error).__name__
        raise ConfigError(f"{what} {name!r} cannot be imported: {kind}{': ' if kind else ''}{error}") from error


def search_for_modules(folder: Path) -> None:
    """Lets functions and classes that a configuration names be found in a folder, behind what is installed."""
    if (path := str(folder.resolve())) not in sys.path:
        sys.path.append(path)
    if path not in MODULE_FOLDERS:
        MODULE_FOLDERS.append(path)


def algorithm_class(name: str) -> type[AlgorithmConfig]:
    """Finds the class behind an algorithm's name.

    Raises:
        ConfigError: no module of that name, or `package.module:Class` does not exist.
    """
    if ":" in name:
        found = imported(name, "algorithm")
        if not (isinstance(found, type) and issubclass(found, AlgorithmConfig)):
            raise ConfigError(f"algorithm {name!r} is not a subclass of alignment.algorithms.Algorithm")
        return found
    if name not in algorithm_names():
        raise ConfigError(f"there is no algorithm {name!r}{nearest(name, algorithm_names())}")
    return importlib.import_module(f"alignment.algorithms.{name.replace('++', '_plus_plus')}").ALGORITHM  # type: ignore[no-any-return]


def _load_scorer(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if not isinstance(value.get("name"), str):
        raise ValueError("needs a name: that of a rule, model, http, or your own package.module:function")
    from alignment.rewards import scorer_class  # here, because scorers are Sections themselves

    try:
        kind = scorer_class(value["name"])
        return kind.model_validate(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    except ValidationError as error:  # pydantic would name the key, but not which of the scorers it belongs to
        found = (problem.removeprefix("the whole file: ") for problem in _explain(error, kind, value))
        raise ValueError(f"{value['name']}: {'; '.join(found)}") from error


def json_schema(kind: type[RunConfig]) -> dict[str, Any]:
    """JSON Schema of a run's YAML file, with one alternative per algorithm and per scorer."""
    from alignment.rewards import scorer_class, scorer_names

    schema = kind.model_json_schema()
    algorithms = [algorithm_class(name) for name in algorithm_names()]
    scorers = [scorer_class(name) for name in scorer_names()]
    schema["properties"]["algorithm"] = {
        "anyOf": _alternatives(schema, AlgorithmConfig, algorithms),
        "description": RunConfig.model_fields["algorithm"].description,
    }
    for section in ("rewards", "judges"):
        schema["properties"][section]["items"] = {"anyOf": _alternatives(schema, ScorerConfig, scorers)}
    return schema


def _alternatives(
    schema: dict[str, Any], base: type[AlgorithmConfig | ScorerConfig], known: Sequence[type[Section]]
) -> list[dict[str, Any]]:
    """One's own, by a dotted name, or one of those known; the sections that they use join the schema's `$defs`."""
    own = {"type": "string", "pattern": ":", "description": base.model_fields["name"].description}
    choices: list[dict[str, Any]] = [{"type": "object", "properties": {"name": own}, "required": ["name"]}]
    for section in known:
        choice = section.model_json_schema()
        schema["$defs"].update(choice.pop("$defs", {}))
        choices.append({**choice, "required": ["name", *choice.get("required", [])]})
    return choices


Config = TypeVar("Config", bound=Section)


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, kind: type[Config]) -> Config:
    """Reads a YAML file (None: nothing), applies `section.key=value` overrides and checks the result against `kind`.

    Functions that it names are looked for in the file's folder too, by this process and by the Ray workers that it
    starts.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; the text lists every problem found.
    """
    tree = {} if path is None else _read(path)
    if path is not None:
        search_for_modules(Path(path).parent)
    for override in overrides:
        _apply(tree, override)
    try:
        return check_config(_with_nulls(tree, kind), kind=kind)
    except ConfigError as error:
        if path is None:
            raise
        raise ConfigError(f"{path}:\n{error}") from error


def check_config(tree: dict[str, Any], *, kind: type[Config]) -> Config:
    """Checks settings that are read already against `kind`.

    Raises:
        ConfigError: a key or value is wrong; the text has a line for every problem.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, kind, tree))) from error


class _DuplicateKey(ValueError):
    """A key that one mapping has twice."""

    def __init__(self, key: yaml.ScalarNode, first: yaml.ScalarNode) -> None:
        self.line: int = key.start_mark.line + 1
        before = first.start_mark.line + 1
        place = "the same line" if before == self.line else f"line {before}"
        super().__init__(f"key {key.value!r} is given twice in one mapping, the other time in {place}; merge the two")


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML keeps the last one without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE_KEY:
                first = keys.setdefault((key.tag, key.value), key)
                if first is not key:
                    raise _DuplicateKey(key, first)
        return node


def _parsed(text: str) -> Any:
    return yaml.load(text, Loader=_StrictLoader)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        tree = _parsed(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except _DuplicateKey as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, not {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not all((*sections, last)):
        raise ConfigError(f"override {override!r} must have the form section.key=value, as optim.lr=1e-6")
    try:
        value = _parsed(text)
    except _DuplicateKey as error:
        raise ConfigError(f"override {override!r}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    place: Any = tree
    for section in sections:
        if isinstance(place, list):
            place = place[_index(place, section, override)]
        else:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
        if not isinstance(place, dict | list):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
    place[_index(place, last, override) if isinstance(place, list) else last] = value


def _index(items: list[Any], text: str, override: str) -> int:
    if not text.isdecimal() or int(text) >= len(items):
        raise ConfigError(f"override {override!r}: {text!r} is not an index below {len(items)}")
    return int(text)


def _with_nulls(value: Any, kind: type[BaseModel]) -> Any:
    """A section's tree with null for the word None, which is Python's null, and for none where a key may be null."""
    if not isinstance(value, dict):
        return value
    tree = dict(value)
    for name, field in kind.model_fields.items():
        child = tree.get(name)
        words = ("None", "none") if type(None) in get_args(field.annotation) else ("None",)
        if child in words and isinstance(child, str):
            tree[name] = None
        elif sections := _sections(field.annotation):
            many = isinstance(child, list)
            tree |= {name: [_with_nulls(item, sections[0]) for item in child or []]} if many else {}
            tree |= {name: _with_nulls(child, sections[0])} if isinstance(child, dict) else {}
    return tree


def _explain(error: ValidationError, kind: type[BaseModel], tree: dict[str, Any]) -> list[str]:
    """One line per problem: where, what, and the nearest known name for an unknown key."""
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        *parents, last = problem["loc"] or ("the whole file",)
        # pydantic names the alternatives of a union as if they were keys, as in `target_modules.tuple[str, ...].0`.
        path = [str(part) for part in problem["loc"] if "[" not in str(part)]
        where, message = ".".join(path) or "the whole file", _message(problem, kind, path)
        if problem["type"] == "extra_forbidden":
            section = ".".join(part for part in path[:-1] if not part.isdecimal())
            known = _fields(kind, parents, tree)
            inside = _elsewhere(kind, path[-1], f"{section}.") if section else ""
            others = place_of(path[-1], section) if issubclass(kind, RunConfig) else ""
            place = inside or others or _dotted(path[-1]) or _elsewhere(kind, path[-1], "")
            message = f"unknown key{place or nearest(str(last), known)}"
        elif problem["type"] == "missing":
            message = "is required and missing"
        else:
            message += _given(problem["input"])
        # Two problems of one value are those of a union's alternatives: what it should be, or what else.
        both = where in lines and message != lines[where]
        lines[where] = f"{lines[where].rpartition(' (given: ')[0] or lines[where]}; or {message}" if both else message
    return [without_passwords(f"{where}: {message}") for where, message in lines.items()]


def _message(problem: ErrorDetails, kind: type[BaseModel], path: list[str]) -> str:
    """What is wrong with a value, in the words of who writes YAML."""
    value, text = problem["input"], problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "tuple_type":
        example = f", as [{', '.join(part.strip() for part in value.split(','))}]" if isinstance(value, str) else ""
        return f"a list is wanted{example}"
    if problem["type"] not in ("model_type", "dict_type") or not isinstance(value, str):
        return text
    fields = kind.model_fields[path[0]].annotation if len(path) == 1 else None
    keys = [key for section in _sections(fields) for key in ("path", "name") if key in section.model_fields]
    return "Input should be a valid dictionary, a section" + (f", as {path[0]}: {{{keys[0]}: {value}}}" if keys else "")


def _dotted(name: str) -> str:
    section, dot, last = name.rpartition(".")
    return f"; dots are for the command line, a file has sections: `{section}: {{{last}: …}}`" if dot else ""


def _elsewhere(kind: type[BaseModel], name: str, within: str) -> str:
    """Sections that have a key of this name, where it was written in another; empty if none has."""
    places = [place for place in _keys(kind, "") if place.endswith(f".{name}") and place.startswith(within)]
    return f"; here it is {' or '.join(places[:3])}" if places else ""


def _keys(kind: type[BaseModel], section: str) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield section + name
        inner = _sections(field.annotation)
        if inner and not issubclass(inner[0], kind) and get_origin(field.annotation) is not tuple:
            yield from _keys(inner[0], f"{section}{name}.")


def _given(value: Any) -> str:
    return f" (given: {value!r})" if isinstance(value, str | int | float | bool | None) else ""


def _fields(kind: type[BaseModel], parents: list[Any], tree: dict[str, Any]) -> list[str]:
    """Names that would have been known at the place of an unknown key."""
    for part in parents:
        if part == "algorithm" and issubclass(kind, RunConfig):
            kind = algorithm_class(tree[part]["name"])
        elif part in kind.model_fields:
            kind = _sections(kind.model_fields[part].annotation)[0]
    return list(kind.model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def nearest(name: str, known: Sequence[str]) -> str:
    """What a name may have meant: the nearest known one, or all of them; the end of a sentence."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
