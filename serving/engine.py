"""One replica: a vLLM engine behind Ray Serve LLM's server, which knows Ray, placement and OpenAI's protocol.

vLLM is imported by the replica alone. It costs 10 s of CPU time per process, which is why neither the launcher nor the
ingress may touch it, and why this module does so inside functions.

Names of Ray that are not public, each used in one place: `VLLMEngine` and its `_start_async_llm_engine`
(`_engine_class`), `_oai_models`, vLLM's model registry (`_load_adapter`), `_engine_client`, vLLM's AsyncLLM
(`Engine.__init__`), `LLMConfig.get_or_create_callback` (`_llm_config`), `ErrorResponse` (`_outgoing`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from alignment.errors import ServingError
from serving.config import ServeConfig
from serving.schema import Reply, Route, event, refusal
from serving.served import LORA_RANKS, Adapter, Served

if TYPE_CHECKING:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from ray.serve.llm import LLMConfig
    from ray.serve.llm.deployment import LLMServer

Device = Literal["cpu", "cuda"]

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """All that a replica needs to start."""

    config: ServeConfig
    served: Served
    device: Device


class Engine:
    """The Ray Serve deployment that holds the weights."""

    async def __init__(self, settings: EngineSettings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._cleanup = ExitStack()
        _set_environment(settings)
        from ray.serve.llm.deployment import LLMServer

        config = _llm_config(settings)
        self._server = LLMServer.sync_init(config)
        # In place of `server.start()`, which also reports the model to a telemetry actor, for 3 s.
        self._server.engine = _engine_class(settings)(config)
        await self._server.engine.start()
        self._cleanup.callback(self._server.engine._engine_client.shutdown)
        if settings.served.adapter:
            await _load_adapter(self._server, settings.served.adapter)

    async def answer(self, route: Route, body: dict[str, Any]) -> AsyncIterator[str | Reply]:
        """Answers one request: with server-sent events if it asks for a stream, else with one `Reply`."""
        try:
            request = _parse(route, body)
            if isinstance(request, Reply):
                yield request
                return
            method = self._server.chat if route == "chat" else self._server.completions
            async for part in await method(request):
                yield _outgoing(part)
        except Exception:  # the client must get an answer, and must not get the exception's text
            logger.exception("A request failed in the engine")
            failure = refusal(500, "The engine failed on this request.")
            yield event(failure) if body.get("stream") else failure

    async def is_ready(self) -> bool:
        """True when the engine can answer."""
        await self._server.check_health()
        return True

    async def check_health(self) -> None:
        """Asked by Ray Serve every 10 s; a replica whose engine died is replaced.

        Raises:
            EngineDeadError: the engine is gone.
        """
        await self._server.check_health()

    def __del__(self) -> None:
        """Called by Ray Serve when a replica stops: an engine that is killed leaves its shared memory behind."""
        self._cleanup.close()


def _set_environment(settings: EngineSettings) -> None:
    """Set here and not by a `runtime_env`, for which Ray would start another worker process first."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if settings.device == "cpu":
        # Read by the engine's process when it starts. Ray allows one thread per reserved CPU, and vLLM by itself leaves
        # one core to the process that reads requests; all cores give up to twice the tokens per second.
        os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))


def _llm_config(settings: EngineSettings) -> LLMConfig:
    from ray.serve.llm import LLMConfig

    config = LLMConfig(
        model_loading_config={"model_id": settings.served.name, "model_source": settings.served.source},
        accelerator_config={"kind": "gpu" if settings.device == "cuda" else "cpu"},
        engine_kwargs=engine_arguments(settings),
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


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`."""
    config, cpu = settings.config, settings.device == "cpu"
    arguments: dict[str, Any] = {
        "dtype": {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}[config.dtype],
        "max_num_seqs": config.max_num_seqs,
        "enforce_eager": cpu if config.enforce_eager is None else config.enforce_eager,
        "tensor_parallel_size": config.tensor_parallel_size,
    }
    if config.max_model_len is not None:
        arguments["max_model_len"] = config.max_model_len
    if cpu:
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
    return arguments | (_adapter_arguments(settings.served.adapter) if settings.served.adapter else {})


def _adapter_arguments(adapter: Adapter) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "enable_lora": True,
        # One more than there are adapters. On CPU, vLLM 0.32 applies the last place to requests for the base model when
        # they share a batch with requests for the adapter, so the last place has to stay empty.
        "max_loras": 2,
        "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= adapter.rank),
    }
    if adapter.target_modules:
        # With the output head wrapped too, a batch of requests for prompt log-probabilities kills vLLM's CPU engine.
        arguments["lora_target_modules"] = list(adapter.target_modules)
    if adapter.chat_template:
        arguments["chat_template"] = adapter.chat_template
    return arguments


async def _load_adapter(server: LLMServer, adapter: Adapter) -> None:
    """Ray's own way to adapters wants them in a cloud bucket; vLLM's model registry takes a local folder.

    Raises:
        ServingError: vLLM refuses the adapter.
    """
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

    loaded = await server.engine._oai_models.load_lora_adapter(
        LoadLoRAAdapterRequest(lora_name=adapter.name, lora_path=adapter.folder)
    )
    if not isinstance(loaded, str):
        raise ServingError(f"The adapter {adapter.folder} cannot be loaded: {loaded.error.message}")


def _parse(route: Route, body: dict[str, Any]) -> Any:
    from pydantic import ValidationError
    from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

    kind = ChatCompletionRequest if route == "chat" else CompletionRequest
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problems = [f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors()[:5]]
        return refusal(400, "The request is not valid. " + "; ".join(problems))


def _outgoing(part: Any) -> str | Reply:
    """Ray Serve LLM's answers in ours: a list of events, a whole answer, or an error."""
    # Not the public class of that name, which is a subclass of the one that is used.
    from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse

    if isinstance(part, list):
        errors = [each for each in part if isinstance(each, ErrorResponse)]
        return _outgoing(errors[0]) if errors else "".join(_without_exceptions(each) for each in part)
    if not isinstance(part, ErrorResponse):
        return Reply(status=200, body=part.model_dump_json())
    return _refusal(part.error.code, part.error.message)


def _without_exceptions(text: str) -> str:
    """One server-sent event; when the engine fails in the middle of a stream, vLLM's holds the exception's text."""
    if not text.startswith('data: {"error"'):
        return text
    error = json.loads(text.removeprefix("data: "))["error"]
    return event(_refusal(error["code"], error["message"]))


def _refusal(status: int, message: str) -> Reply:
    if status < 500:
        return refusal(status, message)
    logger.error("The engine answered with an error: %s", message)
    return refusal(500, "The engine failed on this request.")
