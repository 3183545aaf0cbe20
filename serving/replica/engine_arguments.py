"""The start of vLLM behind Ray Serve LLM: its environment, its arguments, and the class of its engine.

vLLM is imported inside functions: the ingress, which knows these types, must not import it (10 s of CPU time).

Names of Ray that are not public, each used in one place: `VLLMEngine` and its `_start_async_llm_engine`
(`engine_class`), and `LLMConfig.get_or_create_callback` (`llm_config`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.settings.section import NumberFormat
from alignment.start_failure import SettingNames, StartLog
from alignment.vllm.arguments import (
    adapter_arguments,
    engine_environment,
    forbid_usage_reports,
    shared_arguments,
    transfer_arguments,
    use_one_process,
)
from serving.config import Device, ServeConfig
from serving.registry.parsers import OPENED, reasoning_parser_of
from serving.registry.served_model import ServedModel
from serving.replica.scheduling import SCHEDULER

if TYPE_CHECKING:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from ray.serve.llm import LLMConfig

MAX_ADAPTERS = 3
"""How many adapters are in use at a time: the current version, the canary, and one that answers its last requests."""
VLLM_MAX_LOGPROBS = 20
"""vLLM's default for the largest number of alternatives per token whose log-probabilities a request may ask for."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The settings with which a replica starts."""

    config: ServeConfig
    registry: str
    """Folder of the registry."""
    device: Device


def set_environment(settings: EngineSettings) -> None:
    """Sets the environment of vLLM's process. A `runtime_env` would make Ray start another worker process first."""
    forbid_usage_reports()
    eager = _is_eager(settings.config, cpu=settings.device == "cpu")
    os.environ.update(engine_environment(device=settings.device, eager=eager))


def setting_names(settings: EngineSettings) -> SettingNames:
    """The settings that a message about a failed start names."""
    cache = "kv_cache_gib" if settings.device == "cpu" else "gpu_memory_utilization"
    return SettingNames(cache=cache, length="max_model_len", gpus="tensor_parallel_size")


def llm_config(settings: EngineSettings, served_model: ServedModel, log: StartLog) -> LLMConfig:
    """The configuration of Ray Serve LLM's server."""
    from ray.serve.llm import LLMConfig

    config = LLMConfig(
        model_loading_config={"model_id": served_model.engine_name, "model_source": served_model.source},
        accelerator_config={"kind": "gpu" if settings.device == "cuda" else "cpu"},
        engine_kwargs=engine_arguments(settings, served_model) | {"logging_config": log.config()},
        experimental_configs={"stream_batching_interval_ms": 0},  # `serving.replica.batching` does that
    )
    # vLLM finds folders and hub ids by itself. Ray would look first, in a process that imports vLLM again (10 s).
    config.get_or_create_callback().ctx.run_init_node = False
    return config


def engine_class(settings: EngineSettings) -> type[VLLMEngine]:
    """The class of the engine: Ray Serve LLM's own, or one that saves a process."""
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

    class OneProcessEngine(VLLMEngine):  # type: ignore[misc]
        """Runs the model in the engine's own process."""

        def _start_async_llm_engine(self, arguments: Any, config: Any, placement_group: Any) -> Any:
            use_one_process(config)
            return super()._start_async_llm_engine(arguments, config, placement_group)

    one_process = settings.device == "cpu" and settings.config.tensor_parallel_size == 1
    return OneProcessEngine if one_process else VLLMEngine


def engine_arguments(settings: EngineSettings, served_model: ServedModel) -> dict[str, Any]:
    """The arguments of vLLM's `AsyncEngineArgs`."""
    from vllm.config import StructuredOutputsConfig

    config, cpu = settings.config, settings.device == "cpu"
    arguments = shared_arguments(
        device=settings.device,
        eager=_is_eager(config, cpu=cpu),
        max_num_seqs=config.max_num_seqs,
        kv_cache_gib=config.kv_cache_gib,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )
    arguments |= {
        "dtype": _dtype(config.dtype, settings.device),
        "tensor_parallel_size": config.tensor_parallel_size,
        # The backend with which forms are tried. vLLM's "auto" would pass a form that it refuses to others, untried.
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar"),
        "scheduler_cls": SCHEDULER,
        "max_logprobs": max(VLLM_MAX_LOGPROBS, config.limits.max_logprobs),
        # The limit of a request that names none; vLLM lowers it if the prompt leaves less of the window.
        "override_generation_config": {"max_new_tokens": config.limits.max_tokens},
    }
    if config.max_model_len is not None:
        arguments["max_model_len"] = config.max_model_len
    if served_model.revision is not None:
        arguments |= {"revision": served_model.revision, "tokenizer_revision": served_model.revision}
    if served_model.tool_call_parser is not None:
        arguments |= {"enable_auto_tool_choice": True, "tool_call_parser": served_model.tool_call_parser}
    if (reasoning_parser := _reasoning_parser(config, served_model)) is not None:
        arguments["reasoning_parser"] = reasoning_parser
    if (template := chat_template_of(config, served_model)) is not None:
        arguments["chat_template"] = template
    capacity = served_model.lora_capacity
    if not served_model.adapter or not capacity:
        return arguments | transfer_arguments()
    # One slot stays empty, as requests for the base model come too.
    return arguments | adapter_arguments(
        slots=MAX_ADAPTERS + 1, rank=capacity.rank, target_modules=capacity.target_modules
    )


def chat_template_of(config: ServeConfig, served_model: ServedModel) -> str | None:
    """The text of the chat template that the configuration or the adapter sets; None for the model's own template."""
    from alignment.data.chat_templates import chat_template

    if config.chat_template is not None:
        return chat_template(config.chat_template)
    if served_model.adapter is not None and served_model.adapter.chat_template:
        return Path(served_model.adapter.chat_template).read_text(encoding="utf-8")
    return None


def _reasoning_parser(config: ServeConfig, served_model: ServedModel) -> str | None:
    """The configured reasoning parser; for `auto`, the one for a template whose prompt opens a thought."""
    if config.reasoning_parser != "auto" or not served_model.can_chat:
        return None if config.reasoning_parser == "auto" else config.reasoning_parser
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served_model.source)
    template = chat_template_of(config, served_model) or tokenizer.chat_template
    if not isinstance(template, str) or OPENED not in template:
        return None
    chat = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(chat, chat_template=template, add_generation_prompt=True, tokenize=False)
    return reasoning_parser_of(template, str(prompt))


def _is_eager(config: ServeConfig, *, cpu: bool) -> bool:
    return cpu if config.enforce_eager is None else config.enforce_eager


def _dtype(number_format: NumberFormat, device: Device) -> str:
    """vLLM's name of a number format. "auto" is the format in which the weights are stored."""
    from alignment.models.load import dtype_name

    dtype = dtype_name(number_format, device)
    return "auto" if number_format == "auto" and dtype == "bfloat16" else dtype
