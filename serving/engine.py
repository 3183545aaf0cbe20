"""One replica: a vLLM engine behind Ray Serve LLM's server, which knows Ray, placement and OpenAI's protocol.

vLLM is imported by the replica alone. It costs 10 s of CPU time per process, which is why neither the launcher nor the
ingress may touch it, and why this module does so inside functions.

Names of Ray that are not public, each used in one place: `VLLMEngine` and its `_start_async_llm_engine`
(`_engine_class`), `_oai_models`, vLLM's model registry (`Adapters`), `_oai_serving_chat`, vLLM's answers to chats
(`_tokenization`), `_engine_client`, vLLM's AsyncLLM (`Engine.__init__`), `LLMConfig.get_or_create_callback`
(`_llm_config`), `ErrorResponse` (`_outgoing`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any

from ray import serve

from alignment.errors import AlignmentError, ServingError
from alignment.settings.section import NumberFormat
from alignment.start_failure import SettingNames, StartLog
from serving.batching import batch_items
from serving.compatibility import Adapter, LoraCapacity
from serving.config import Device, ServeConfig
from serving.grammar import forms_of
from serving.parsers import OPENED, reasoning_parser_of
from serving.prompts import read_shielded_prompts, shield_chat
from serving.registry import Registry, State
from serving.scheduling import SCHEDULER
from serving.schema import (
    TOKEN_ROUTES,
    Redirect,
    Reply,
    RequestError,
    Route,
    error_reply,
    event,
    validation_error_reply,
)
from serving.served import ServedModel, adapter_name, served_version
from serving.trial import Trials
from serving.versions import (
    TURN_LOCK,
    Loader,
    LoadFailure,
    MoveLimits,
    PartialLoadError,
    ReplicaUnavailable,
    Versions,
    candidate_version,
    fleet_version,
)

if TYPE_CHECKING:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from ray.serve.llm import LLMConfig
    from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger("ray.serve")

ADAPTERS_AT_ONCE = 3
"""The current version, the canary, and one that answers its last requests."""
VLLMS_LOGPROBS = 20
"""Alternatives per token that vLLM takes anyway."""
FORMS = {"response_format", "structured_outputs"}
"""Fields of requests that ask for an answer in a certain form."""
VLLMS_FINGERPRINT = re.compile(r',"system_fingerprint":(?:null|"[^"\\]*")')
"""vLLM's own, in the last events of a stream; in a text of the answer, the quotation marks would be escaped."""
TOO_LONG = re.compile("maximum context length|max_model_len|longer than the maximum model length")
"""In what vLLM says of a prompt that does not fit."""
MAX_MESSAGE = 1000
"""Characters of an error message, which may quote what was sent."""
STAY_S = 10.0
"""Seconds that a candidate is kept by one call, which a process that died does not repeat."""
STATUS_S = 0.5
"""Seconds between what it then says of itself."""
MORE_DRAIN_S = 30.0
"""Seconds that answers in progress get to end beyond `request_timeout_s`, by which they have."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """All that a replica needs to start."""

    config: ServeConfig
    registry: str
    """Folder of the versions."""
    device: Device


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a replica says of itself."""

    replica: str
    """Its name in Ray Serve."""
    version: int
    """Number of the version that answers; 0 while a candidate starts."""
    loaded: tuple[int, ...]
    asked: int
    """Requests that it has been given since it started."""
    max_model_len: int = 0
    """Most tokens of prompt and answer together; 0 while a candidate starts."""
    error: str | None = None
    """Why it could not move to what the registry says; None if it has."""
    failed: int | None = None
    """Number of the version that `error` is about."""


class Engine:
    """The Ray Serve deployment that holds the weights."""

    async def __init__(self, settings: EngineSettings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._begin(settings)
        state = self._registry.state()  # not what the service began with: this replica may be a late one
        await self._start(settings, state, state.current)
        self._following = asyncio.create_task(self._versions.follow())

    def _begin(self, settings: EngineSettings) -> None:
        self._cleanup = ExitStack()
        self._asked = 0
        self._replica: str = serve.get_replica_context().replica_id.unique_id
        self._registry = Registry(Path(settings.registry))

    async def _start(self, settings: EngineSettings, state: State, number: int, *, is_candidate: bool = False) -> None:
        """Loads a version; returns when it can answer.

        Raises:
            AlignmentError: there is no such version, or a file of it is not what it was.
        """
        _set_environment(settings)
        from ray.serve.llm.deployment import LLMServer

        registry = self._registry
        self._served = served_version(settings.config, registry, number)
        verification = asyncio.ensure_future(asyncio.to_thread(registry.verify, number))
        with StartLog() as log:
            try:
                config = _llm_config(settings, self._served, log)
                self._server = LLMServer.sync_init(config)
                # In place of `server.start()`, which also reports the model to a telemetry actor, for 3 s.
                self._server.engine = _engine_class(settings)(config)
                await self._server.engine.start()
                client = self._server.engine._engine_client
                self._cleanup.callback(client.shutdown)
                await _warm_up(client)
            except AlignmentError:
                raise
            except Exception as error:  # of any kind: vLLM raises what its model code raises
                reason = log.reason(error, _setting_names(settings))
                where = f"{self._served.source} on {gethostname()}"
                raise ServingError(f"vLLM does not start with {where}: {reason}") from error
            finally:
                await verification  # what is wrong with the files says more than what an engine makes of them
        self._trials = Trials(lambda: _tokenizer_info(client), settings.config.limits)
        self._cleanup.callback(self._trials.close)
        reads_text = settings.config.control_tokens == "text"
        self._control_tokens = read_shielded_prompts(client.renderer) if reads_text else None
        self._tokenization = _tokenization(self._server.engine)
        loader: Loader
        if self._served.adapter:
            loader = Adapters(self._server.engine._oai_models, registry)
            await loader.load(number)
        else:
            loader = WholeWeights(client, registry)
            await loader.begin()
        self._versions = Versions(
            registry,
            loader,
            limits=MoveLimits(
                drain_s=settings.config.request_timeout_s + MORE_DRAIN_S, wait_s=settings.config.promotion_wait_s
            ),
            target=candidate_version if is_candidate else fleet_version,
            lock_file=None if is_candidate else registry.folder / TURN_LOCK,
        )
        self._versions.begin(state, number)
        try:
            await self._versions.adopt()  # it may have changed meanwhile
        except AlignmentError:  # as when it changes later: it answers with what it has
            logger.exception("A replica could not follow the registry")

    async def answer(
        self, route: Route, body: dict[str, Any], wanted: int | None, avoid: tuple[str, ...] = ()
    ) -> AsyncIterator[str | Reply | Redirect]:
        """Answers one request: with server-sent events if it asks for a stream, else with one `Reply`.

        What comes first is always a `Reply`, that of a stream without a body yet; or `Redirect` and nothing more.

        Args:
            wanted: number of the model version to answer; None takes what this replica holds.
            avoid: names of the replicas that sent it elsewhere. One of those takes it if it comes back.
        """
        self._asked += 1
        if self._server.engine._engine_client.errored:
            yield Redirect(replica=self._replica, moves_to=None, is_broken=True)
            return
        try:
            form_s = await self._trials.check([] if route in TOKEN_ROUTES else forms_of(body))
            if "messages" in body and self._control_tokens is not None:
                body = shield_chat(self._control_tokens, body)
            request = self._request(route, body)
            if isinstance(request, Reply):
                yield request
            elif route in TOKEN_ROUTES:
                yield await self._tokens(route, request)
            elif body["model"] == self._served.base_name:
                names = _Names(asked=body["model"], inside=body["model"], form_s=form_s)
                async for part in self._parts(route, request, names):
                    yield part
            else:
                asked_at = time.perf_counter()
                async with self._versions.hold(wanted, may_leave=self._replica not in avoid) as number:
                    names = _Names(
                        asked=body["model"],
                        inside=self._served.version_name(number),
                        version=number,
                        version_s=time.perf_counter() - asked_at,
                        form_s=form_s,
                    )
                    async for part in self._parts(route, request, names):
                        yield part
        except ReplicaUnavailable as error:
            yield Redirect(replica=self._replica, moves_to=error.moves_to, is_broken=error.is_broken)
        except RequestError as refused:
            yield refused.reply
        except ServingError as error:
            yield error_reply(409, str(error))
        except Exception:  # the client must get an answer, and must not get the exception's text
            logger.exception("A request failed in the engine")
            if self._server.engine._engine_client.errored:
                raise  # the ingress says so; no other replica is given what may have killed this engine
            failure = error_reply(500, "The engine failed on this request.")
            if FORMS & body.keys():  # the grammar is compiled after the request has been taken
                failure = error_reply(400, "The engine could not answer in the form that was asked for.")
            yield event(failure) if body.get("stream") else failure

    def _request(self, route: Route, body: dict[str, Any]) -> Any:
        return _parse(route, body)

    async def _tokens(self, route: Route, request: Any) -> Reply:
        """Token ids of a text or a chat, as it would be answered, or the text of token ids."""
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        ask = self._tokenization.create_tokenize if route == "tokenize" else self._tokenization.create_detokenize
        try:
            told = await ask(request, None)
        except Exception as error:  # a template may raise anything about messages that it does not expect
            logger.info("A text could not be tokenized: %s", type(error).__name__)
            return error_reply(400, "The chat template, or the tokenizer, does not take this.")
        if isinstance(told, ErrorResponse):
            return _refusal(told.error.code, told.error.message)
        return Reply(status=200, body=told.model_dump_json(exclude_none=True))

    async def _parts(self, route: Route, request: Any, names: _Names) -> AsyncIterator[str | Reply]:
        request.model = names.inside
        began = False
        async for batch in batch_items(await getattr(self._server, route)(request)):
            told = _outgoing(batch, names)
            if isinstance(told, str) and not began:
                told = Reply(
                    status=200,
                    body="",
                    events=told,
                    version=names.label,
                    version_s=names.version_s,
                    form_s=names.form_s,
                )
            began = True
            yield told

    async def status(self) -> Status:
        """Which versions this replica holds; also says that it can answer."""
        await self.check_health()
        return self._status()

    async def adopt(self) -> Status:
        """Moves to what the registry says."""
        return await self._moved(self._versions.adopt())

    async def prepare(self, number: int) -> Status:
        """Makes a version ready, as far as requests do not notice."""
        return await self._moved(self._versions.prepare(number))

    async def move(self, number: int, replica: str) -> Status:
        """Changes to a version of whole weights, if this is the replica that is meant; Ray Serve can only tell all."""
        return await self._moved(self._versions.move(number)) if replica == self._replica else self._status()

    async def _moved(self, moving: Awaitable[object]) -> Status:
        error = None
        try:
            await moving
        except AlignmentError as problem:
            error = str(problem)
        return self._status(error)

    def _status(self, error: str | None = None) -> Status:
        versions = self._versions
        return Status(
            replica=self._replica,
            version=versions.current,
            loaded=versions.loaded_numbers,
            asked=self._asked,
            max_model_len=self._server.engine._engine_client.model_config.max_model_len,
            error=error,
        )

    async def check_health(self) -> None:
        """Asked by Ray Serve every 10 s; a replica whose engine died is replaced.

        Raises:
            EngineDeadError: the engine is gone.
            HalfLoaded: it got stuck between two versions.
        """
        if self._versions.is_broken:
            raise PartialLoadError("this replica got stuck between two versions")
        await self._server.check_health()

    def __del__(self) -> None:
        """Called by Ray Serve when a replica stops: an engine that is killed leaves its shared memory behind."""
        self._cleanup.close()


class CandidateEngine(Engine):
    """The deployment of one replica that holds the canary of whole weights, beside those that hold the current version.

    It loads the weights after its constructor: what goes wrong there is then told like any other failure, where Ray
    Serve would give the deployment up for good.
    """

    async def __init__(self, settings: EngineSettings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._begin(settings)
        self._settings = settings
        self._is_up = False
        self._failure: LoadFailure | None = None
        self._following = asyncio.create_task(self._live())

    async def _live(self) -> None:
        while (number := candidate_version(state := self._registry.state())) is None:
            await asyncio.sleep(STATUS_S)
        try:
            await self._start(self._settings, state, number, is_candidate=True)
        except Exception as error:  # of any kind: vLLM raises what its model code raises
            logger.exception("The candidate did not start")
            self._cleanup.close()
            self._failure = LoadFailure(number=number, reason=str(error)[:MAX_MESSAGE])
            return
        self._is_up = True
        await self._versions.follow()

    async def stay(self) -> AsyncIterator[Status]:
        """Keeps this replica for a while, and says what it holds."""
        for _ in range(int(STAY_S / STATUS_S)):
            yield self._status()
            await asyncio.sleep(STATUS_S)

    async def answer(
        self, route: Route, body: dict[str, Any], wanted: int | None, avoid: tuple[str, ...] = ()
    ) -> AsyncIterator[str | Reply | Redirect]:
        """As the others; before it has loaded anything it sends all away."""
        if not self._is_up:
            yield Redirect(replica=self._replica, moves_to=None)
            return
        async for part in super().answer(route, body, wanted, avoid):
            yield part

    def _status(self, error: str | None = None) -> Status:
        failure = self._versions.failure if self._is_up else self._failure
        return Status(
            replica=self._replica,
            version=self._versions.current if self._is_up else 0,
            loaded=self._versions.loaded_numbers if self._is_up else (),
            asked=self._asked,
            error=failure.reason if failure else None,
            failed=failure.number if failure else None,
        )

    async def check_health(self) -> None:
        """As the others; one that did not start is replaced when another version shall be tried."""
        if self._is_up:
            await super().check_health()
        elif self._failure is not None and candidate_version(self._registry.state()) != self._failure.number:
            raise PartialLoadError(f"the candidate did not start: {self._failure.reason}")


class Adapters:
    """LoRA adapters on their way into an engine, one beside the other."""

    holds_many = True

    def __init__(self, models: Any, registry: Registry) -> None:
        """`models`: vLLM's registry of the names that requests can give. Ray's own way to adapters wants them in a
        cloud bucket; this one takes a local folder."""
        self._models = models
        self._registry = registry

    async def load(self, number: int) -> None:
        """As the port says."""
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        folder = self._registry.folder_of(number)
        loaded = await self._models.load_lora_adapter(
            LoadLoRAAdapterRequest(lora_name=adapter_name(number), lora_path=str(folder))
        )
        if not isinstance(loaded, str):
            raise ServingError(f"The adapter {folder} cannot be loaded: {loaded.error.message}")

    async def unload(self, number: int) -> None:
        """As the port says."""
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=adapter_name(number)))


class WholeWeights:
    """All weights of a model on their way into an engine, in place of those before."""

    holds_many = False

    def __init__(self, client: AsyncLLM, registry: Registry) -> None:
        self._client = client
        self._registry = registry

    async def begin(self) -> None:
        """Prepares vLLM's weight transfer."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._client.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))

    async def load(self, number: int) -> None:
        """As the port says. Nothing may be in progress."""
        from alignment.rollout.vllm import wait_while_alive

        files = sorted(str(file) for file in self._registry.folder_of(number).glob("*.safetensors"))
        try:
            await wait_while_alive(self._client, self._replace(files, number))
        except Exception as error:  # of any kind: vLLM passes on what happened in its process
            raise PartialLoadError(f"version {number} got stuck half-way into the engine: {error}") from error

    async def _replace(self, files: list[str], number: int) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._client.pause_generation(mode="wait", clear_cache=True)
        await self._client.start_weight_update()
        await self._client.update_weights(WeightTransferUpdateRequest(update_info={"files": files}))
        await self._client.finish_weight_update(str(number))
        await self._client.resume_generation()

    async def unload(self, number: int) -> None:
        """Nothing to do: the next weights took its place."""


def _set_environment(settings: EngineSettings) -> None:
    """Set here and not by a `runtime_env`, for which Ray would start another worker process first."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if settings.device == "cpu":
        # Read by the engine's process when it starts. Ray allows one thread per reserved CPU, and vLLM by itself leaves
        # one core to the process that reads requests; all cores give up to twice the tokens per second.
        os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        if _is_eager(settings.config, cpu=True):
            # A helper that ranks log-probabilities would still be compiled, for 25 s, at the first request for some.
            os.environ["TORCH_COMPILE_DISABLE"] = "1"


def _is_eager(config: ServeConfig, *, cpu: bool) -> bool:
    return cpu if config.enforce_eager is None else config.enforce_eager


def _setting_names(settings: EngineSettings) -> SettingNames:
    cache = "kv_cache_gib" if settings.device == "cpu" else "gpu_memory_utilization"
    return SettingNames(cache=cache, length="max_model_len", gpus="tensor_parallel_size")


def _llm_config(settings: EngineSettings, served: ServedModel, log: StartLog) -> LLMConfig:
    from ray.serve.llm import LLMConfig

    config = LLMConfig(
        model_loading_config={"model_id": served.engine_name, "model_source": served.source},
        accelerator_config={"kind": "gpu" if settings.device == "cuda" else "cpu"},
        engine_kwargs=engine_arguments(settings, served) | {"logging_config": log.config()},
        experimental_configs={"stream_batching_interval_ms": 0},  # `serving.batching` does that
    )
    # vLLM finds folders and hub ids itself; Ray would do it first, in a process that imports vLLM once more (10 s).
    config.get_or_create_callback().ctx.run_init_node = False
    return config


def _engine_class(settings: EngineSettings) -> type[VLLMEngine]:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

    class OneProcessEngine(VLLMEngine):  # type: ignore[misc]
        """Runs the model in the engine's own process.

        On CPU, vLLM starts one process to schedule and one per shard of the model, only to set the number of threads
        of the latter. With one shard, `_set_environment` has done that, and the second start (10 s, 0.5 GB) is saved.
        """

        def _start_async_llm_engine(self, arguments: Any, config: Any, placement_group: Any) -> Any:
            config.parallel_config.distributed_executor_backend = "uni"
            return super()._start_async_llm_engine(arguments, config, placement_group)

    one_process = settings.device == "cpu" and settings.config.tensor_parallel_size == 1
    return OneProcessEngine if one_process else VLLMEngine


def engine_arguments(settings: EngineSettings, served: ServedModel) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`."""
    from vllm.config import StructuredOutputsConfig

    from alignment.rollout.weights import WORKER

    config, cpu = settings.config, settings.device == "cpu"
    arguments: dict[str, Any] = {
        "dtype": _dtype(config.dtype, settings.device),
        "max_num_seqs": config.max_num_seqs,
        "enforce_eager": _is_eager(config, cpu=cpu),
        "tensor_parallel_size": config.tensor_parallel_size,
        "worker_extension_cls": WORKER,
        # The one that forms are tried with. vLLM's "auto" would hand what this one refuses to others, untried.
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar"),
        "scheduler_cls": SCHEDULER,
        "max_logprobs": max(VLLMS_LOGPROBS, config.limits.max_logprobs),
        # What an answer gets that asks for no limit; vLLM takes less where the prompt leaves less of the window.
        "override_generation_config": {"max_new_tokens": config.limits.max_tokens},
    }
    if config.max_model_len is not None:
        arguments["max_model_len"] = config.max_model_len
    if served.revision is not None:
        arguments |= {"revision": served.revision, "tokenizer_revision": served.revision}
    if served.tool_call_parser is not None:
        arguments |= {"enable_auto_tool_choice": True, "tool_call_parser": served.tool_call_parser}
    if (reasoning_parser := _reasoning_parser(config, served)) is not None:
        arguments["reasoning_parser"] = reasoning_parser
    if (template := chat_template_of(config, served)) is not None:
        arguments["chat_template"] = template
    if cpu:
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
        # A prompt that is computed in two parts kills the engine if its request has a seed: vLLM turns the generator
        # back, which it can do on a GPU only.
        arguments["enable_chunked_prefill"] = False
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
    return arguments | (
        _adapter_arguments(served.adapter, served.lora_capacity)
        if served.adapter and served.lora_capacity
        else _transfer_arguments()
    )


def chat_template_of(config: ServeConfig, served: ServedModel) -> str | None:
    """Text of the template for chats that the configuration or an adapter sets; None leaves it to the model's own."""
    from alignment.data.chat import chat_template

    if config.chat_template is not None:
        return chat_template(config.chat_template)
    if served.adapter is not None and served.adapter.chat_template:
        return Path(served.adapter.chat_template).read_text(encoding="utf-8")
    return None


def _reasoning_parser(config: ServeConfig, served: ServedModel) -> str | None:
    """The configured parser of thoughts, or the one for a template whose prompt opens one."""
    if config.reasoning_parser != "auto" or not served.can_chat:
        return None if config.reasoning_parser == "auto" else config.reasoning_parser
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.source)
    template = chat_template_of(config, served) or tokenizer.chat_template
    if not isinstance(template, str) or OPENED not in template:
        return None
    chat = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(chat, chat_template=template, add_generation_prompt=True, tokenize=False)
    return reasoning_parser_of(template, str(prompt))


async def _warm_up(client: AsyncLLM) -> None:
    """Computes one token: an engine that dies with its first request must not be called ready."""
    from vllm import SamplingParams

    async for _ in client.generate({"prompt_token_ids": [0]}, SamplingParams(max_tokens=1), request_id="warm-up"):
        pass


def _tokenization(engine: VLLMEngine) -> ServingTokenization:
    """What renders chats and texts as they are answered. Ray Serve LLM looks for vLLM's own by an older name."""
    from vllm.entrypoints.serve.tokenize.serving import ServingTokenization

    renderer = engine._oai_serving_chat.online_renderer
    return ServingTokenization(
        engine._oai_models,
        renderer,
        chat_template=renderer.chat_template,
        chat_template_content_format=renderer.chat_template_content_format,
    )


def _tokenizer_info(client: AsyncLLM) -> str:
    """What xgrammar has to know of the tokenizer, serialised."""
    import xgrammar

    tokenizer, vocabulary = client.renderer.get_tokenizer(), client.model_config.get_vocab_size()
    return str(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary).serialize_json())


def _dtype(wanted: NumberFormat, device: Device) -> str:
    """As vLLM calls it; "auto" is the format that the weights are stored in."""
    from alignment.models.load import dtype_name

    computed = dtype_name(wanted, device)
    return "auto" if wanted == "auto" and computed == "bfloat16" else computed


def _transfer_arguments() -> dict[str, Any]:
    from vllm.config import WeightTransferConfig

    from alignment.rollout.weights import FILES

    return {"weight_transfer_config": WeightTransferConfig(backend=FILES)}


def _adapter_arguments(adapter: Adapter, room: LoraCapacity) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "enable_lora": True,
        # One more than are in use at a time. On CPU, vLLM 0.32 applies the last place to requests for the base model
        # when they share a batch with requests for an adapter, so the last place has to stay empty.
        "max_loras": ADAPTERS_AT_ONCE + 1,
        "max_lora_rank": room.rank,
    }
    if room.target_modules:
        # With the output head wrapped too, a batch of requests for prompt log-probabilities kills vLLM's CPU engine.
        arguments["lora_target_modules"] = list(room.target_modules)
    return arguments


def _parse(route: Route, body: dict[str, Any]) -> Any:
    from pydantic import ValidationError
    from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
    from vllm.entrypoints.serve.tokenize.protocol import (
        DetokenizeRequest,
        TokenizeChatRequest,
        TokenizeCompletionRequest,
    )
    from vllm.exceptions import VLLMClientError

    kinds: dict[Route, Any] = {
        "chat": ChatCompletionRequest,
        "completions": CompletionRequest,
        "tokenize": TokenizeChatRequest if "messages" in body else TokenizeCompletionRequest,
        "detokenize": DetokenizeRequest,
    }
    if route in TOKEN_ROUTES:
        body = body | {"model": None}  # all names have the same tokenizer, and vLLM does not know the client's
    try:
        return kinds[route].model_validate(body)
    except ValidationError as error:
        return validation_error_reply(error.errors(), body)
    except VLLMClientError as error:
        return error_reply(400, f"The request is not valid. {error}"[:MAX_MESSAGE])


@dataclass(frozen=True, kw_only=True)
class _Names:
    """What one request's model is called."""

    asked: str
    """By the client."""
    inside: str
    """By vLLM."""
    version: int | None = None
    """None for the base model of an adapter, which has no versions."""
    version_s: float = 0.0
    """Seconds that it took to find it."""
    form_s: float = 0.0
    """CPU seconds that it took to compile the form of its answer on trial."""

    @property
    def label(self) -> str:
        return "base" if self.version is None else str(self.version)

    def told(self, text: str) -> str:
        """One server-sent event with the client's name for the model, and the version.

        The key cannot be mistaken: in a text of the answer, its quotation marks would be escaped.
        """
        text = VLLMS_FINGERPRINT.sub("", text) if "system_fingerprint" in text else text
        return text.replace(*self._replaced, 1)

    @cached_property
    def _replaced(self) -> tuple[str, str]:
        asked = f'"model":{json.dumps(self.asked)},"system_fingerprint":"{self.label}"'
        return f'"model":{json.dumps(self.inside)}', asked


def _outgoing(batch: list[Any], names: _Names) -> str | Reply:
    """Ray Serve LLM's answers in ours: lists of events, one whole answer, or an error."""
    # Not the public class of that name, which is a subclass of the one that is used.
    from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse

    parts = [part for item in batch for part in (item if isinstance(item, list) else [item])]
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(_without_exceptions(names.told(part)))
        elif isinstance(part, ErrorResponse):
            return _refusal(part.error.code, part.error.message.replace(names.inside, names.asked))
        else:
            part.model, part.system_fingerprint = names.asked, names.label
            body = part.model_dump_json()
            return Reply(status=200, body=body, version=names.label, version_s=names.version_s, form_s=names.form_s)
    return "".join(texts)


def _without_exceptions(text: str) -> str:
    """One server-sent event; when the engine fails in the middle of a stream, vLLM's holds the exception's text."""
    if not text.startswith('data: {"error"'):
        return text
    error = json.loads(text.removeprefix("data: "))["error"]
    return event(_refusal(error["code"], error["message"]))


def _refusal(status: int, message: str) -> Reply:
    if status < 500:
        is_too_long = status == 400 and TOO_LONG.search(message) is not None
        return error_reply(status, message[:MAX_MESSAGE], code="context_length_exceeded" if is_too_long else None)
    logger.error("The engine answered with an error: %s", message)
    return error_reply(500, "The engine failed on this request.")
