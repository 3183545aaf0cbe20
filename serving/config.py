"""The configuration of an endpoint: one YAML file, or the arguments of `serving:build`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignment.passwords import holds_password
from alignment.settings.load import load_config
from alignment.settings.section import Count, NonNegative, NumberFormat, Positive, PositiveCount, Section

Device = Literal["cpu", "cuda"]
LOOPBACK = ("127.0.0.1", "::1", "localhost")
ANSWERS_PER_CORE = 4
"""How many answers engines on CPUs give at once, per core, before each becomes much slower."""
KEYS_AT_ONCE = 8
"""How many keys share the places of the replicas, if the configuration sets no limit for one key."""
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=100)]


class LimitsConfig(Section):
    """The limits of one request and of one key; what exceeds them is refused."""

    max_body_mib: Positive = 4.0
    """Largest request body (MiB)."""
    max_body_values: PositiveCount = 100_000
    """Most values in a request body: numbers (also the tokens of a prompt), texts, lists and objects."""
    body_timeout_s: Positive = 30.0
    """Seconds that a client may take to send its request."""
    max_tokens: PositiveCount = 4096
    """Most tokens of one answer. A chat without a limit of its own gets the rest of the context window, up to this."""
    max_n: PositiveCount = 16
    """Most answers to one prompt."""
    max_prompts: PositiveCount = 64
    """Most answers in one request to `/v1/completions` with several prompts, each of which is answered."""
    max_logprobs: Count = 20
    """Most alternatives per token whose log-probabilities are returned."""
    max_stop: PositiveCount = 16
    """Most texts at which an answer stops."""
    max_bad_words: Count = 256
    """Most texts that an answer must not contain."""
    max_logit_bias: Count = 1024
    """Most tokens whose logits a request shifts, and most tokens at which its answer stops."""
    max_form_chars: PositiveCount = 65536
    """Most characters of the form of an answer: a JSON schema, a regular expression, a grammar, or all tools of a
    request together."""
    max_form_nesting: PositiveCount = 64
    """Most levels of nesting in a form; brackets in its patterns count too."""
    max_form_parts: PositiveCount = 5000
    """Most members of lists and objects in a form, and alternatives in its patterns, together."""
    max_form_repeat: PositiveCount = 128
    """Largest count in a pattern of a form, for example 128 in `a{1,128}`; vLLM's compiler (xgrammar 0.2.8) fails from
    129."""
    form_timeout_s: Positive = 10.0
    """CPU seconds for compiling a form on trial, in a process beside the replica. A form that needs more is refused.
    Ordinary schemas take milliseconds, a `maxLength` of 1,000 several seconds."""
    form_memory_mib: Positive = 1024.0
    """Memory for compiling a form (MiB)."""
    form_seconds_per_minute: NonNegative = 10.0
    """CPU seconds per minute that one key may spend on compiling new forms; after that, its requests with a form get
    status 429. 0 sets no limit. Keys with the role admin have no limit."""
    max_completions: PositiveCount = 256
    """Most completions in one request for rewards."""
    requests_per_minute: Count = 0
    """Requests per minute of one key, all of which may come at once; 0 sets no limit. For this limit and those below,
    each ingress counts by itself: with several ingresses, one key may have as many times more."""
    answers_at_once: Count | None = None
    """Answers that the replicas give at once, which the keys share. 0 does not divide them. None takes `max_num_seqs`
    times `max_replicas`, over all models, and on CPUs, where every answer slows down the others, at most 4 per core;
    but 0 if `answers_in_progress` is given."""
    answers_in_progress: Count | None = None
    """Answers in progress of one key: a request's prompts times its `n`. Further requests wait until some have ended. 0
    sets no limit. None takes one eighth of the answers that `min_replicas` give at once, counted in the same way, and
    at least 2. While several keys ask, each may have fewer: `answers_at_once` divided by the number of keys that have
    answers in progress or had some within 10 s, and at least 1."""
    requests_waiting: Count = 32
    """Requests of one key that may wait, for up to a minute, until its other requests have ended. Further requests get
    status 429; so do requests with bodies above 64 KiB, which may not wait."""
    tokens_in_progress: Count = 200_000
    """Tokens of one key's requests that are in progress or wait: one for every 4 bytes of a request, and the largest
    number of tokens of its answers. 0 sets no limit. A key's only request is never too large."""
    admin_answers_in_progress: Count = 0
    """The same as `answers_in_progress`, for each key with the role admin."""
    admin_tokens_in_progress: Count = 0
    """The same as `tokens_in_progress`, for each key with the role admin."""


class RewardsConfig(Section):
    """The model behind `POST /v1/rewards`, and its replicas."""

    model: str | None = None
    """A reward model (run, checkpoint, sequence classifier or hub id). None takes the implicit reward of the served
    model, β (log π - log π_ref)."""
    reference: str | None = None
    """π_ref for whole weights: folder or hub id. None takes the model from which their training started. For an adapter
    it is always the base model."""
    beta: Positive | None = None
    """β of the implicit reward; None takes that of the version's training, or 0.1."""
    max_length: PositiveCount | None = None
    """Most tokens of a prompt and one completion; None is 2048, or the number of the model's positions if that is
    smaller."""
    min_replicas: Count = 0
    """Replicas that always run. With 0, the first request waits for a start (about 15 s), and an idle replica ends."""
    max_replicas: PositiveCount = 1
    """Largest number of replicas. On CPU they use no GPUs."""
    num_gpus: NonNegative = 1.0
    """GPUs of one replica, in addition to the engines', which are not shared; 0 computes rewards on the CPU. Not used
    if the engines are on CPU."""
    start_timeout_s: Positive = 60.0
    """Seconds that a request waits while no replica runs; then it gets status 503, and the start goes on."""


class FeedbackConfig(Section):
    """What the endpoint keeps of requests and of people's feedback."""

    record: bool = False
    """Whether to keep prompts and answers, so that a run can train on them. Otherwise feedback is counted and holds no
    text."""
    database: str | None = None
    """Database of feedback and keys: `sqlite:///FILE` on a disk of this machine, or, for several machines,
    `postgresql+psycopg://USER@HOST/NAME` (give a password in PGPASSWORD or ~/.pgpass). None is the file
    `feedback.sqlite` in the endpoint's folder, `FOLDER/NAME`."""
    retention_days: Positive | None = None
    """Days after which a prompt is deleted, with its answers and feedback; None keeps it."""

    @field_validator("database")
    @classmethod
    def _holds_no_password(cls, database: str | None) -> str | None:
        if database is not None and holds_password(database):
            raise ValueError("must hold no password, which Ray's dashboard would show; PGPASSWORD or ~/.pgpass may")
        return database


class AddressConfig(Section):
    """What is served first, where its versions are, and who may reach the endpoint."""

    checkpoint: str
    """The model to serve: a run's folder (its newest checkpoint), a checkpoint, any model or LoRA adapter folder, the
    address of a run or checkpoint in a storage (`s3://bucket/runs/NAME`), a hub id, or the bundled
    `smollm2-135m-instruct`. An adapter is served together with its base model, from one engine."""
    name: ModelName | None = None
    """Name that requests give as `model`. None takes the name of the run, folder or hub id."""
    folder: str = "runs/serving"
    """Folder of the model's versions and of people's feedback, `FOLDER/NAME`. Several machines must share it, and use
    PostgreSQL in place of the database file."""
    promote: bool = False
    """Whether the start promotes `checkpoint`. Otherwise, if a version answers already, the checkpoint is only
    registered: a start, also one by Ray after a failure, does not change what is served; `raylign promote` does."""
    on_lease: Literal["auto", "refuse", "wait"] = "auto"
    """What a start does if another endpoint holds the registry's lease. `refuse` ends the start. `wait` serves the same
    versions, changes none, and takes over when the other endpoint has ended, for example when one cluster replaces
    another. `auto` waits in `serving:build`, and refuses in `raylign serve`."""
    no_keys: bool = False
    """Whether to serve everyone who can reach `host`, which must then be this machine's own 127.0.0.1."""
    cors_origins: tuple[Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.\[\]:-]+$", max_length=300)], ...] = ()
    """Origins of other web pages whose scripts may send requests, for example `https://example.org`. They need keys
    like all clients."""
    public_metrics: bool = False
    """Whether `/metrics` needs no key."""
    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` is every network interface."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port to listen on, 1 to 65535."""


class ModelSettings(Section):
    """The settings of a model and of its replicas."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the engine runs. `auto` takes GPUs if Ray has any at that moment. On a cluster that starts GPU nodes only
    on demand, set `cuda`."""
    dtype: NumberFormat = "auto"
    """Number format of weights and activations. `auto` is the format of the checkpoint, but fp32 on a CPU without bf16
    arithmetic."""
    max_model_len: PositiveCount | None = None
    """Most tokens of prompt and answer together; None is the model's own limit."""
    max_num_seqs: PositiveCount = 64
    """Requests that one replica answers at the same time; further ones wait."""
    max_queued_requests: Count = 256
    """Requests that may wait for a replica; further ones are refused with status 503."""
    chat_template: str | None = None
    """Chat template: `chatml`, `zephyr`, a path to a Jinja file, or Jinja text. None uses the checkpoint's own; a base
    model without one answers only `/v1/completions`."""
    control_tokens: Literal["text", "control"] = "text"
    """Meaning of the tokenizer's control tokens (`<|im_end|>`) in the messages of a chat. `text`: ordinary characters,
    as in training, so that no message can end its own turn or begin another's. `control`: as in a template."""
    tool_call_parser: str | None = "auto"
    """vLLM's name for the form in which the model writes tool calls, for example `hermes` or `llama3_json`. `auto`
    finds it from the chat template, if the template teaches a known form. With None, or if the form is not known,
    requests with tools are refused."""
    reasoning_parser: str | None = "auto"
    """vLLM's name for the form in which the model writes its thoughts, for example `qwen3` or `deepseek_r1`; thoughts
    are then returned in a field of their own. `auto` chooses a parser if the template's prompt opens a thought, so that
    every answer begins with one. None leaves thoughts in the answer."""
    enforce_eager: bool | None = None
    """Whether to skip compilation and CUDA graphs, for a faster start and slower answers. None skips them on CPU only,
    where they cost about 50 s and gain 10 to 20 %."""
    kv_cache_gib: Positive = 2.0
    """Memory of one replica on CPU for attention keys and values (GiB); not used on GPUs."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Fraction of each GPU's memory that a replica may use, above 0 to 1; not used on CPU."""
    tensor_parallel_size: PositiveCount = 1
    """GPUs that share one replica's weights."""
    min_replicas: Count = 1
    """Replicas that always run. With 0, an idle endpoint frees its memory, and the next request waits for a start."""
    max_replicas: PositiveCount = 1
    """Largest number of replicas; if it equals `min_replicas`, nothing scales."""
    target_ongoing_requests: Positive = 32.0
    """Requests in progress per replica that autoscaling aims at; with more, it starts another replica."""
    upscale_delay_s: NonNegative = 10.0
    """Seconds for which there must be more requests than that before another replica starts."""
    downscale_delay_s: NonNegative = 600.0
    """Seconds for which there must be fewer requests than that before a replica ends."""
    promotion_wait_s: Positive = 30.0
    """Seconds that a request waits while the only replica lets its answers end, in order to change whole weights. If
    some are still in progress after that, they go on, and the promotion is given up. With more replicas no request
    waits, since the others answer."""
    candidate_start_s: Positive = 600.0
    """Seconds in which one more replica must have started for a canary or a gate of whole weights. It needs resources
    besides the others': memory on CPU, else `tensor_parallel_size` GPUs."""
    rewards: RewardsConfig = RewardsConfig()


class FurtherModelConfig(ModelSettings):
    """A further model of the endpoint. What it does not set, it has from the endpoint."""

    checkpoint: str
    """The model to serve: a run, a checkpoint, a folder or a hub id, as the endpoint's `checkpoint`."""
    promote: bool = False
    """Whether the start promotes this checkpoint, as the endpoint's `promote` does for its own."""


class ServeConfig(ModelSettings, AddressConfig):
    """The configuration of one endpoint."""

    request_timeout_s: Positive = 600.0
    """Seconds after which a request that is not fully answered is aborted."""
    drain_timeout_s: NonNegative = 660.0
    """Seconds that answers in progress get to end when a replica stops; with more than `request_timeout_s`, none is cut
    off."""
    limits: LimitsConfig = LimitsConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    models: dict[ModelName, FurtherModelConfig] = Field(default_factory=dict)
    """Further models of the endpoint, by the names that requests give as `model`. Each has versions and replicas of its
    own, in `FOLDER/NAME/models/MODEL`, and its own values of the keys from `device` to `rewards`. A key that it does
    not set has the endpoint's value."""

    @property
    def all_models(self) -> list[ServeConfig]:
        """The settings of every model, each as those of an endpoint that serves it alone; the endpoint's own first."""
        return [self, *map(self.settings_of, self.models)]

    def settings_of(self, name: str) -> ServeConfig:
        """The settings of a further model, as those of an endpoint that serves it alone."""
        model = self.models[name]
        own_values = {key: getattr(model, key) for key in model.model_fields_set}
        if "rewards" in own_values:
            rewards = {key: getattr(model.rewards, key) for key in model.rewards.model_fields_set}
            own_values["rewards"] = self.rewards.model_copy(update=rewards)
        own_values |= {"name": name, "promote": model.promote, "models": {}}
        return self.model_copy(update=own_values)

    def limits_on(self, device: Device, *, num_cores: int) -> LimitsConfig:
        """The limits, with `answers_at_once` and `answers_in_progress` filled in.

        Args:
            device: the engines' device.
            num_cores: CPU cores of the machine.
        """

        def num_answers(replicas: Literal["min_replicas", "max_replicas"]) -> int:
            num: int = sum(model.max_num_seqs * max(1, getattr(model, replicas)) for model in self.all_models)
            return min(num, ANSWERS_PER_CORE * num_cores) if device == "cpu" else num

        at_once, in_progress = self.limits.answers_at_once, self.limits.answers_in_progress
        if at_once is None:
            at_once = num_answers("max_replicas") if in_progress is None else 0
        if in_progress is None:
            in_progress = max(2, num_answers("min_replicas") // KEYS_AT_ONCE)
        return self.limits.model_copy(update={"answers_at_once": at_once, "answers_in_progress": in_progress})

    @property
    def url(self) -> str:
        """The endpoint's URL on its own machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"

    @model_validator(mode="after")
    def _open_to_this_machine_only(self) -> Self:
        if self.no_keys and self.host not in LOOPBACK:
            raise ValueError(
                f"no_keys is for host 127.0.0.1; on {self.host} every machine that reaches it could ask, so it needs "
                "keys: `raylign keys create`"
            )
        return self

    @model_validator(mode="after")
    def _replicas_in_order(self) -> Self:
        for model in self.all_models:
            if model.min_replicas > model.max_replicas:
                location = "" if model is self else f"models.{model.name}."
                raise ValueError(
                    f"{location}min_replicas ({model.min_replicas}) is larger than {location}max_replicas "
                    f"({model.max_replicas}); raise it"
                )
        return self


def load_serve_config(checkpoint: str, overrides: list[str], path: Path | None) -> ServeConfig:
    """The configuration of `raylign serve`: the file if there is one, then the checkpoint, then `key=value` overrides.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; the message lists every problem.
    """
    settings = [f"checkpoint={json.dumps(checkpoint)}", *overrides]  # JSON is YAML that no name can break out of
    return load_config(path, settings, kind=ServeConfig)
