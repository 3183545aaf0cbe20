"""The configuration of a run: one YAML file of flat sections, checked whole before anything heavy starts.

A default is the vetted setting; a file lists only what differs. Nothing changes after loading.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from alignment.errors import ConfigError
from alignment.optimizers import optimizer_kind, sharded_moments
from alignment.run_folder import RunFolder
from alignment.settings.checkpoint import CheckpointConfig
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from alignment.settings.plugins import (
    AlgorithmConfig,
    EnvironmentConfig,
    Scorers,
    algorithm_class,
    algorithm_names,
    builtin_weight_transfers,
    load_weight_transfer,
)
from alignment.settings.section import (
    Count,
    Fraction,
    NonNegative,
    NumberFormat,
    Positive,
    PositiveCount,
    Section,
    as_value_error,
)
from alignment.trackers import tracker_class

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Share of a moment that one step keeps."""
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""Also the name of a folder."""


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

    name: str = "adamw"
    """`adamw` (arXiv 1711.05101); `rmsprop`, the DPO paper's choice; or a dotted `package.module:function` of one's
    own, which is called with the weights and this section and returns a `torch.optim.Optimizer`. What that remembers
    of a weight must be tensors. ZeRO needs an `alignment.optimizers.OptimizerKind` in place of the function."""
    lr: Positive = 1e-6
    """Peak learning rate, > 0. Full fine-tuning by DPO wants 1e-7 to 1e-6, LoRA about 100 times as much."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of AdamW's first and second moment, each at least 0 and below 1: with 1, a moment would never change."""
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

    @field_validator("name")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        with as_value_error():
            optimizer_kind(name)
        return name

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Self:
        if self.zero.stage > 0:
            with as_value_error():
                sharded_moments(self.name)
        return self


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
    at 40 a second take 800 s, once for every `max_num_seqs` of them. Workers that wait for others allow for it."""
    kv_cache_gib: Positive = 1.0
    """GiB of key-value cache of an engine on a CPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Fraction of a GPU's memory that an engine takes, 0 to 1."""
    max_num_seqs: PositiveCount = 256
    """Completions that an engine works on at once."""
    tensor_parallel_size: PositiveCount = 1
    """GPUs of one engine."""
    weight_transfer: str = "files"
    """What brings the trained weights into vLLM's engines. `files`: through shared memory, or through the run's folder
    if an engine is on another machine. Or a dotted `package.module:Class` of one's own, which has the methods of
    `alignment.rollout.transfer.WeightTransfer`."""
    environment: EnvironmentConfig | None = None
    """What the model talks with; None has every prompt answered once."""

    @field_validator("weight_transfer")
    @classmethod
    def _has_a_transfer(cls, name: str) -> str:
        if name not in builtin_weight_transfers():  # the import of a built-in one needs torch
            with as_value_error():
                load_weight_transfer(name)
        return name


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
    """Evaluations over which rising rewards and falling `eval_rewards` are taken for reward hacking."""


class EvaluateConfig(Section):
    """Evaluation on held-out groups, and samples."""

    every: Count = 0
    """Optimizer steps between evaluations; 0 evaluates only before the first and after the last step."""
    samples: Count = 0
    """Held-out prompts to answer before and after training, kept in `samples.jsonl`; 0 samples none."""
    sample_tokens: PositiveCount = 128
    """Most tokens of a sampled answer."""


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
    eval_rewards: Scorers = ()
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
    trackers: tuple[str, ...] = ("tensorboard",)
    """What gets the metrics besides `metrics.jsonl`: `tensorboard`, or a dotted `package.module:attribute` of one's
    own, which is called with the run's configuration and returns an `alignment.trackers.Tracker`."""

    is_run: ClassVar[bool] = True

    @classmethod
    def section_class(cls, key: str, value: Any) -> type[Section]:
        """The class of the section under a key; that of `algorithm` is the named algorithm's own."""
        if key == "algorithm" and isinstance(value, dict):
            return algorithm_class(value["name"])
        return super().section_class(key, value)

    @field_validator("algorithm", mode="before")
    @classmethod
    def _load_algorithm(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("name"), str):
            raise ValueError(f"needs a name: {', '.join(algorithm_names())}, or your own package.module:Class")
        with as_value_error():
            return algorithm_class(value["name"]).model_validate(value)

    @field_validator("trackers")
    @classmethod
    def _known_trackers(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        for name in trackers:
            with as_value_error():
                tracker_class(name)
        return trackers

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs (override the other with null)")
        if self.epochs is not None and any(source.streaming for source in self.data.sources):
            raise ValueError("a streaming source has no known length, so give steps instead of epochs")
        if self.steps is not None:
            with as_value_error():
                self.check_warmup(self.steps)
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
        if not algorithm.is_online:
            if self.rewards:
                raise ValueError(f"{algorithm.name} learns from the data, not from rewards; give them as eval_rewards")
            if self.eval_rewards and algorithm.head == "score":
                raise ValueError(f"{algorithm.name} trains a model that writes no answers, which eval_rewards rate")
            return self
        if self.rollout.engine == "local" and self.optim.zero.stage == 3:
            raise ValueError("rollout.engine local needs all weights on one worker, which optim.zero.stage 3 spreads")
        if not self.rewards and self.rollout.environment is None:
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
        kept_columns = {column for source in sources for column in source.keep}
        for scorer in (*self.rewards, *self.eval_rewards):
            for column in scorer.columns:
                if column not in kept_columns:
                    raise ValueError(
                        f"scorer {scorer.name} compares with the column {column!r}, which no source keeps; name it in "
                        f"data.keep, as [{column}]"
                    )
        return self

    @property
    def answers_prompts(self) -> bool:
        """True if the run draws completions, to learn from or to be judged by."""
        return self.algorithm.is_online or bool(self.eval_rewards)

    @property
    def wants_engines(self) -> bool:
        """True if it draws them by vLLM."""
        return self.answers_prompts and self.rollout.engine == "vllm"

    @property
    def folder(self) -> Path:
        """Where this run writes: metrics, checkpoints, samples."""
        return Path(self.output) / self.name

    @property
    def run_folder(self) -> RunFolder:
        """The same folder, with the names of its files."""
        return RunFolder(self.folder)

    def make_folder(self) -> RunFolder:
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
        return self.run_folder
