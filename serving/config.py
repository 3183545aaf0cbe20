"""What an endpoint serves, and with how much: one flat YAML file, or arguments of `serving:build`."""

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
ANSWERS_PER_CORE = 8
"""What an engine on CPUs answers at once without being much slower for each."""
KEYS_AT_ONCE = 8
"""Keys that share what the replicas answer at once, where the configuration does not say what one may have."""


class LimitsConfig(Section):
    """What one request, and one key, may ask for; more is refused."""

    max_body_mib: Positive = 4.0
    """Largest request body (MiB)."""
    max_body_values: PositiveCount = 100_000
    """Most values in a request body: numbers (tokens of a prompt, too), texts, lists and objects."""
    body_timeout_s: Positive = 30.0
    """Seconds that a client may take to send its request."""
    max_tokens: PositiveCount = 4096
    """Most tokens of one answer. A chat that names no limit gets what its prompt leaves of the window, up to this."""
    max_n: PositiveCount = 16
    """Most answers to one prompt."""
    max_prompts: PositiveCount = 64
    """Most answers in one request to `/v1/completions` that holds several prompts, each of which is answered."""
    max_logprobs: Count = 20
    """Most alternatives per token whose log-probabilities are told."""
    max_stop: PositiveCount = 16
    """Most texts at which an answer stops."""
    max_bad_words: Count = 256
    """Most texts that an answer must not hold."""
    max_logit_bias: Count = 1024
    """Most tokens whose logits a request shifts, and most tokens at which it has the answer stop."""
    max_form_chars: PositiveCount = 65536
    """Most characters of a form that an answer is asked for in: a JSON schema, a regular expression, a grammar, or all
    tools of a request together."""
    max_form_nesting: PositiveCount = 64
    """Most levels of nesting in a form, of which brackets in its patterns are some."""
    max_form_parts: PositiveCount = 5000
    """Most members of lists and objects in a form, and alternatives in its patterns, together."""
    max_form_repeat: PositiveCount = 128
    """Largest count in a pattern of a form, as 128 in `a{1,128}`; vLLM's compiler (xgrammar 0.2.8) fails from 129."""
    form_timeout_s: Positive = 10.0
    """CPU seconds that compiling a form may take, in a process beside the replica; an engine is given none that needs
    more. Ordinary schemas take milliseconds, a `maxLength` of 1,000 several seconds."""
    form_memory_mib: Positive = 1024.0
    """Memory that compiling a form may take (MiB)."""
    form_seconds_per_minute: NonNegative = 10.0
    """CPU seconds per minute that one key may have spent on compiling forms that were not known; once they are used up,
    its requests with a form get status 429. 0 is no limit, as for keys with the role admin."""
    max_completions: PositiveCount = 256
    """Most completions in one request for rewards."""
    requests_per_minute: Count = 0
    """Requests of one key, at most that many at once; 0 is no limit. Each ingress counts by itself, as it does for the
    limits below: with several, one key may have as many of each."""
    answers_in_progress: Count | None = None
    """Answers of one key that are in progress: a request's prompts times its `n`. Further requests wait until some have
    ended. 0 is no limit. None is an eighth of what the replicas answer at once, and at least 2: `max_num_seqs` times
    `min_replicas`, and on CPUs, where every answer slows down the others, 8 per core at most."""
    requests_waiting: Count = 32
    """Requests of one key that may wait, for a minute, until others of it have ended; further ones get status 429, as
    do bodies above 64 KiB, which do not wait."""
    tokens_in_progress: Count = 200_000
    """Tokens of the requests of one key that are in progress or wait: one for every 4 bytes of a request, and what its
    answers may have at most; 0 is no limit. A request of a key that has no other in progress is never too large."""
    admin_answers_in_progress: Count = 0
    """The same as `answers_in_progress` for each key with the role admin."""
    admin_tokens_in_progress: Count = 0
    """The same as `tokens_in_progress` for each key with the role admin."""


class RewardsConfig(Section):
    """What answers `POST /v1/rewards`."""

    model: str | None = None
    """A reward model (run, checkpoint, sequence classifier or hub id). None takes the served model's own implicit
    reward, β (log π - log π_ref)."""
    reference: str | None = None
    """π_ref of whole weights: folder or hub id. None takes the model that their training began with. Of an adapter it
    is always the base model."""
    beta: Positive | None = None
    """β of the implicit reward; None takes that of the version's training, or 0.1."""
    max_length: PositiveCount | None = None
    """Most tokens of a prompt and one completion; None is 2048, or the model's positions where those are fewer."""
    min_replicas: Count = 0
    """Replicas kept at all times. With 0, the first request waits for a start (about 15 s), and an idle one ends."""
    max_replicas: PositiveCount = 1
    """Replicas at most; 0 GPUs each on CPU."""
    num_gpus: NonNegative = 1.0
    """GPUs of one replica, beside those of the engines, which share theirs with nobody; 0 rates on the CPU. Not used
    where the engines are on CPU."""
    start_timeout_s: Positive = 60.0
    """Seconds that a request waits while no replica runs; then it gets status 503, and the start goes on."""


class FeedbackConfig(Section):
    """What is kept of requests, and of what people say about the answers."""

    record: bool = False
    """Keep prompts and answers, from which one can then train. Without it judgements are counted, and hold no text."""
    database: str | None = None
    """Where judgements and keys are kept: `sqlite:///FILE` on a disk of this machine, or, for several machines,
    `postgresql+psycopg://USER@HOST/NAME` (a password belongs into PGPASSWORD or ~/.pgpass). None is the file
    `feedback.sqlite` in the endpoint's folder, `FOLDER/NAME`."""
    retention_days: Positive | None = None
    """Days after which a prompt is deleted, with its answers and judgements; None keeps it."""

    @field_validator("database")
    @classmethod
    def _holds_no_password(cls, database: str | None) -> str | None:
        if database is not None and holds_password(database):
            raise ValueError("must hold no password, which Ray's dashboard would show; PGPASSWORD or ~/.pgpass may")
        return database


class ServeConfig(Section):
    """Everything about one endpoint."""

    checkpoint: str
    """What to serve: a run's folder (its newest checkpoint), a checkpoint, any model or LoRA adapter folder, a hub id,
    or the bundled `smollm2-135m-instruct`. An adapter is served together with its base model, from one engine."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=100)
    """Name that requests give as `model`. None takes the name of the run, folder or hub id."""
    folder: str = "runs/serving"
    """Folder of the model's versions and of what people said, `FOLDER/NAME`. On several machines it must be shared
    between them, as must PostgreSQL in place of the database file."""
    promote: bool = False
    """Have a start change to `checkpoint`. Otherwise it is only registered where a version answers already: a start,
    also one by Ray after a failure, changes nothing that is served, and `raylign promote` does."""
    on_lease: Literal["auto", "refuse", "wait"] = "auto"
    """What a start does where another endpoint has the registry. `refuse` ends it. `wait` serves the same versions,
    changes none, and takes over when the other one has ended, as when a cluster replaces another. `auto` waits in
    `serving:build`, and refuses in `raylign serve`."""
    no_keys: bool = False
    """Serve everyone who can reach `host`, which must then be this machine's own 127.0.0.1."""
    cors_origins: tuple[Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.\[\]:-]+$", max_length=300)], ...] = ()
    """Pages elsewhere whose scripts may ask here, as `https://example.org`. They need keys like all others."""
    public_metrics: bool = False
    """Whether `/metrics` needs no key."""
    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` is every network interface."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port to listen on, 1 to 65535."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the engine runs. `auto` takes GPUs if Ray has any at that moment; on a cluster that starts GPU nodes only
    when they are asked for, say `cuda`."""
    dtype: NumberFormat = "auto"
    """Number format of weights and activations; `auto` is the one that the checkpoint is stored in, but fp32 on a CPU
    that has no arithmetic for bf16."""
    max_model_len: PositiveCount | None = None
    """Most tokens of prompt and answer together; None is the model's own limit."""
    max_num_seqs: PositiveCount = 64
    """Requests that one replica answers at the same time; more wait for a place."""
    max_queued_requests: Count = 256
    """Requests that may wait for a place; further ones are refused with status 503."""
    chat_template: str | None = None
    """Template for chats: `chatml`, `zephyr`, a path to a Jinja file, or Jinja text. None uses the checkpoint's own;
    a base model that has none answers `/v1/completions` only."""
    control_tokens: Literal["text", "control"] = "text"
    """What the tokenizer's control tokens (`<|im_end|>`) are where they stand in a chat's messages. `text`: ordinary
    characters, as in training, so that no message ends its own turn or opens another's. `control`: what they are in a
    template."""
    tool_call_parser: str | None = "auto"
    """vLLM's name for the form in which the model writes calls of tools, as `hermes` or `llama3_json`. `auto` tells it
    from the chat template, if that teaches a known one. None, as does an unknown form, refuses requests with tools."""
    reasoning_parser: str | None = "auto"
    """vLLM's name for the form in which the model writes its thoughts, as `qwen3` or `deepseek_r1`, which then are
    answered apart. `auto` chooses one if the template's own prompt opens a thought, so that every answer begins in one.
    None leaves thoughts in the answer."""
    enforce_eager: bool | None = None
    """Skip compilation and CUDA graphs: a faster start, slower answers. None skips them on CPU only, where they cost
    about 50 s and gain 10 to 20 %."""
    kv_cache_gib: Positive = 2.0
    """Memory for attention keys and values of one replica on CPU (GiB); not used on GPUs."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Fraction of each GPU's memory that a replica may take, above 0 to 1; not used on CPU."""
    tensor_parallel_size: PositiveCount = 1
    """GPUs that share one replica's weights."""
    min_replicas: Count = 1
    """Replicas kept at all times; 0 frees everything while idle, and the first request then waits for a start."""
    max_replicas: PositiveCount = 1
    """Replicas at most; equal to `min_replicas`, nothing scales."""
    target_ongoing_requests: Positive = 32.0
    """Requests in progress per replica that autoscaling aims at; with more, it starts another replica."""
    upscale_delay_s: NonNegative = 10.0
    """Seconds that there must have been more of them before a replica is started."""
    downscale_delay_s: NonNegative = 600.0
    """Seconds that there must have been fewer of them before a replica is ended."""
    request_timeout_s: Positive = 600.0
    """Seconds until a request that is not answered in full is given up."""
    drain_timeout_s: NonNegative = 660.0
    """Seconds that answers in progress still get when a replica stops; more than `request_timeout_s` cuts none off."""
    promotion_wait_s: Positive = 30.0
    """Seconds that a request waits while the only replica ends its answers to change whole weights. What is then still
    in progress is not cut off: the promotion is given up. With more replicas, nobody waits: the others answer."""
    candidate_start_s: Positive = 600.0
    """Seconds in which a further replica must have started for a canary or a gate of whole weights, for which there
    must be room beside the others: memory on CPU, else `tensor_parallel_size` GPUs."""
    limits: LimitsConfig = LimitsConfig()
    rewards: RewardsConfig = RewardsConfig()
    feedback: FeedbackConfig = FeedbackConfig()

    def limits_on(self, device: Device, *, num_cores: int) -> LimitsConfig:
        """The limits, with the number of answers that a key may have in progress.

        Args:
            device: on which the engines run.
            num_cores: of the machine, if they run on CPUs.
        """
        if self.limits.answers_in_progress is not None:
            return self.limits
        at_once = self.max_num_seqs * max(1, self.min_replicas)
        if device == "cpu":
            at_once = min(at_once, ANSWERS_PER_CORE * num_cores)
        return self.limits.model_copy(update={"answers_in_progress": max(2, at_once // KEYS_AT_ONCE)})

    @property
    def url(self) -> str:
        """Where the endpoint is, asked from its own machine."""
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
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) is larger than max_replicas ({self.max_replicas}); raise it"
            )
        return self


def load_serve_config(checkpoint: str, overrides: list[str], path: Path | None) -> ServeConfig:
    """The configuration of `raylign serve`: a file if one is given, then the checkpoint, then `key=value` overrides.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; the text lists every problem found.
    """
    settings = [f"checkpoint={json.dumps(checkpoint)}", *overrides]  # JSON is YAML that no name can break out of
    return load_config(path, settings, kind=ServeConfig)
