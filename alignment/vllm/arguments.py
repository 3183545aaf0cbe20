"""The arguments and the environment of vLLM that rollout engines and replicas share, each with its reason.

What only one of them needs is in `alignment.vllm.engine` and in `serving`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Device = Literal["cpu", "cuda"]
WORKER = "alignment.vllm.plugin.EngineWorker"
"""vLLM's `worker_extension_cls` of all our engines. A process that imports it registers `BACKEND`."""
BACKEND = "raylign"
"""The name by which vLLM knows our receiver of weights."""


def forbid_usage_reports() -> None:
    """Keeps vLLM from reporting its use to its makers."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"


def load_vllm() -> None:
    """Imports vLLM while no garbage is collected. The collections would take a third of the 12 s, and find nothing."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        import vllm.v1.engine.async_llm  # noqa: F401
    finally:
        if is_enabled:
            gc.enable()


def engine_environment(*, device: Device, eager: bool, threads: int | None = None) -> dict[str, str]:
    """The environment variables that vLLM's process of an engine reads when it starts.

    Args:
        device: the kind of device that the engine runs on.
        eager: whether the model runs without being compiled.
        threads: number of CPU threads; None is one for each core that this process may use.
    """
    if device != "cpu":
        return {}
    # Ray allows one thread for each reserved CPU, and vLLM leaves one core to the process that reads requests. With all
    # cores, an engine generates up to twice as many tokens per second.
    variables = {"OMP_NUM_THREADS": str(threads or len(os.sched_getaffinity(0)))}
    if eager:
        # Eager mode covers the model only. The first request for log-probabilities would still compile a function that
        # ranks them, for 25 s.
        variables["TORCH_COMPILE_DISABLE"] = "1"
    return variables


def shared_arguments(
    *, device: Device, eager: bool, max_num_seqs: int, kv_cache_gib: float, gpu_memory_utilization: float
) -> dict[str, Any]:
    """The arguments of vLLM's `AsyncEngineArgs` that every engine gets.

    Args:
        device: the kind of device that the engine runs on.
        eager: whether the model runs without being compiled.
        max_num_seqs: most completions that the engine works on at once.
        kv_cache_gib: GiB of the key-value cache on a CPU.
        gpu_memory_utilization: fraction of a GPU's memory that the engine takes.
    """
    arguments: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "enforce_eager": eager,
        "worker_extension_cls": WORKER,
    }
    if device != "cpu":
        return arguments | {"gpu_memory_utilization": gpu_memory_utilization}
    return arguments | {
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        # If a prompt is computed in two chunks and its request has a seed, the engine fails: vLLM resets the random
        # generator, which works on a GPU only.
        "enable_chunked_prefill": False,
    }


def transfer_arguments() -> dict[str, Any]:
    """The arguments for an engine whose weights are all replaced."""
    from vllm.config import WeightTransferConfig

    return {"weight_transfer_config": WeightTransferConfig(backend=BACKEND)}


def adapter_arguments(*, slots: int, rank: int, target_modules: Sequence[str] | None) -> dict[str, Any]:
    """The arguments for an engine that loads LoRA adapters.

    Args:
        slots: number of adapters that fit. On a CPU, vLLM 0.32 applies the last slot to requests for the base model
            that share a batch with requests for an adapter. Where both come, one slot must stay empty.
        rank: largest rank of an adapter.
        target_modules: names of the layers that may have an adapter; none means vLLM's default. That includes the
            output head, at a cost, and a batch of requests for prompt log-probabilities then ends an engine on a CPU.
    """
    arguments: dict[str, Any] = {"enable_lora": True, "max_loras": slots, "max_lora_rank": rank}
    return arguments | ({"lora_target_modules": list(target_modules)} if target_modules else {})


def use_one_process(config: VllmConfig) -> None:
    """Makes an engine of one worker run the model in its own process, on a CPU.

    vLLM would start one process that schedules and one that computes, only to set the second one's number of threads.
    `engine_environment` has set it already, so one process (10 s, 0.5 GB) is saved.
    """
    config.parallel_config.distributed_executor_backend = "uni"
