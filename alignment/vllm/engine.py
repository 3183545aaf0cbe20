"""Rollout by vLLM: an engine that takes token ids and returns token ids. `cluster.engines` runs it in Ray actors."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from alignment.errors import AlignmentError, CheckpointError, ConfigError, EngineLost, RolloutError
from alignment.models.adapter_kinds import LORA_RANKS, obstacles
from alignment.models.folders import model_source
from alignment.models.model_folder import ModelFolder
from alignment.rollout import Prompt, Rollout, Sampling
from alignment.rollout.transfer import WeightTransfer, WeightUpdate
from alignment.run_folder import checkpoint_or_path
from alignment.settings.model import LoraConfig, ModelConfig
from alignment.settings.plugins import MODULE_FOLDERS, load_weight_transfer, search_for_modules
from alignment.settings.run import RolloutConfig
from alignment.start_failure import SettingNames, StartLog
from alignment.vllm.arguments import (
    Device,
    adapter_arguments,
    engine_environment,
    forbid_usage_reports,
    load_vllm,
    shared_arguments,
    transfer_arguments,
    use_one_process,
)
from alignment.vllm.swap import prepare_transfer, replace_weights, swap

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

CPU_BLOCK_TOKENS = 32
"""Number of tokens in a block of the key-value cache on a CPU. Completions share full blocks of their prompt. With
vLLM's default of 128, most prompts would share nothing."""


@dataclass(frozen=True, kw_only=True)
class RolloutEngineSettings:
    """All settings of a rollout engine; they are sent to other processes."""

    model: ModelConfig
    """The model that training starts from. With an adapter, each update is an adapter; else it is all weights."""
    rollout: RolloutConfig
    """The section `rollout` of the run."""
    max_length: int
    """Most tokens of prompt and completion together."""
    device: Device
    """The kind of device that the engine runs on."""
    threads: int | None = None
    """Number of CPU threads; None is one for each core that the process may use."""
    module_folders: tuple[str, ...] = ()
    """Folders in which the process of an engine looks for modules too, as that of one's own weight transfer."""

    @classmethod
    def for_run(
        cls, model: ModelConfig, rollout: RolloutConfig, *, max_length: int, device: Device, threads: int | None = None
    ) -> Self:
        """Makes the settings of a run's engines. The model's path becomes absolute, as an engine may run elsewhere.

        Raises:
            ConfigError: vLLM does not support the adapter's rank, or the kind of adapter that it starts from.
        """
        if model.lora is not None:
            _check_adapter(model.lora)
        folder = Path(model.path).expanduser()
        if folder.is_dir():
            model = model.model_copy(update={"path": str(folder.resolve())})
        return cls(
            model=model,
            rollout=rollout,
            max_length=max_length,
            device=device,
            threads=threads,
            module_folders=tuple(MODULE_FOLDERS),
        )

    @property
    def dtype(self) -> str:
        """The number format of the engine on this machine, by vLLM's name."""
        from alignment.models.load import dtype_name

        return dtype_name(self.model.dtype if self.rollout.dtype == "auto" else self.rollout.dtype, self.device)

    @property
    def transfer_class(self) -> type[WeightTransfer]:
        """The class of what brings weights into the engine."""
        return load_weight_transfer(self.rollout.weight_transfer)


class RolloutEngine:
    """One vLLM engine, for use inside one event loop.

    The engine is stale from its start until the end of its first load, and during each later load. A stale engine
    refuses to generate.
    """

    def __init__(self, settings: RolloutEngineSettings) -> None:
        for folder in settings.module_folders:  # for a weight transfer of one's own; vLLM's process inherits them
            search_for_modules(Path(folder))
        self.settings = settings
        self.version: int | None = None
        """Number of optimizer steps behind the weights; None while the engine is stale."""
        self._llm: AsyncLLM | None = None
        self._adapter: LoRARequest | None = None
        self._request_numbers = itertools.count(1)
        self._generation_tasks: set[asyncio.Task[list[Rollout]]] = set()
        self._load_lock = asyncio.Lock()
        self._is_half_loaded = False

    async def start(self) -> None:
        """Starts the engine, which takes at least 10 s.

        Raises:
            ModelError: there is no model at `model.path`.
            RolloutError: vLLM does not start; the text contains its reason.
        """
        with StartLog() as log:
            try:
                with _environment(self.settings):
                    self._llm = _start_vllm(self.settings, log)
                if self.settings.model.lora is None:
                    await prepare_transfer(self._llm, self.settings.rollout.weight_transfer)
            except AlignmentError:
                raise
            except Exception as error:  # vLLM raises any error that its model code raises
                await self.stop()
                reason = log.reason(error, _setting_names(self.settings))
                raise RolloutError(f"vLLM does not start with {self.settings.model.path}: {reason}") from error

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        """Generates the completions of a prompt.

        Raises:
            EngineLost: the engine has died.
            RolloutError: the engine is stale, or the prompt leaves no room for a completion.
        """
        if self.version is None:
            raise RolloutError("the engine is stale: it has no whole version of the weights, so it draws nothing")
        if len(prompt.tokens) >= self.settings.max_length:
            limit = self.settings.max_length
            raise RolloutError(f"a prompt of {len(prompt.tokens)} tokens leaves no room within {limit}")
        task = asyncio.ensure_future(self._generate(prompt, sampling))
        self._generation_tasks.add(task)
        task.add_done_callback(self._generation_tasks.discard)
        return await task

    async def load(self, update: WeightUpdate) -> None:
        """Waits until nothing is being generated, and loads an update into the engine.

        Raises:
            EngineLost: the engine has died.
            RolloutError: the update could not be loaded. The engine must be restarted, as it may hold a part of it.
        """
        self.version = None
        async with self._load_lock:
            if self._generation_tasks:
                await asyncio.wait(self._generation_tasks)
            llm = self._live_engine()
            if self._is_half_loaded:
                raise RolloutError("an earlier update got stuck half-way, so the engine has to be restarted")
            self._is_half_loaded = True
            load = self._load_adapter if update.is_adapter else self._load_all
            try:
                await swap(llm, lambda: load(llm, update))
            except EngineLost as error:
                raise EngineLost(f"{error} while it loaded version {update.version} of the weights") from error
            except Exception as error:  # vLLM passes on any error of its process
                raise RolloutError(f"version {update.version} could not be loaded: {error}") from error
            self._is_half_loaded = False
            self.version = update.version

    async def reset(self) -> None:
        """Cancels all generation, and makes the engine stale."""
        self.version = None
        for task in list(self._generation_tasks):
            task.cancel()
        if self._generation_tasks:
            await asyncio.wait(self._generation_tasks)

    async def check(self) -> None:
        """Checks that the engine is alive.

        Raises:
            EngineLost: it has died.
        """
        self._live_engine()

    async def stop(self) -> None:
        """Ends the engine; it can be started again."""
        self.version = self._adapter = None
        self._is_half_loaded = False
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None

    def _live_engine(self) -> AsyncLLM:
        """vLLM's engine.

        Raises:
            EngineLost: it has died.
        """
        if self._llm is None or self._llm.errored:
            raise EngineLost("the vLLM engine has died")
        return self._llm

    async def _load_all(self, llm: AsyncLLM, update: WeightUpdate) -> None:
        """Loads all weights."""
        await replace_weights(llm, update.update_info, update.version)

    async def _load_adapter(self, llm: AsyncLLM, update: WeightUpdate) -> None:
        """Replaces the adapter."""
        from vllm.lora.request import LoRARequest

        if self._adapter is not None:
            await llm.remove_lora(self._adapter.lora_int_id)
        # Each adapter gets a new number and a new name. For a known name, vLLM would keep the adapter that it has.
        number = next(self._request_numbers)
        folder = self.settings.transfer_class.adapter_folder(update.update_info)
        self._adapter = LoRARequest(lora_name=str(number), lora_int_id=number, lora_path=str(folder))
        await llm.add_lora(self._adapter)
        await llm.update_weight_version(str(update.version))

    async def _generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        """Generates the completions of a prompt, each in a request of its own."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return list(
                await asyncio.gather(
                    *(self._complete(prompt, sampling, index) for index in range(sampling.num_completions))
                )
            )
        except EngineDeadError as error:
            raise EngineLost("the vLLM engine has died over what it was drawing") from error

    async def _complete(self, prompt: Prompt, sampling: Sampling, index: int) -> Rollout:
        """Generates one completion. Each has its own request and seed; the prompt's cache is shared nevertheless.

        Args:
            index: number of the completion among those of the prompt.
        """
        outputs = self._live_engine().generate(
            {"prompt_token_ids": list(prompt.tokens)},
            _parameters(prompt, sampling, index),
            request_id=str(next(self._request_numbers)),
            lora_request=self._adapter,
        )
        async for output in outputs:
            final_output = output
        return _rollout(final_output.outputs[0])


def seed_of(prompt: Prompt, index: int) -> int:
    """The seed of one completion: a hash of the prompt's seed and the completion's index.

    With sums instead of hashes, seeds would repeat: (prompt 1, completion 0) would equal (prompt 0, completion 1).
    """
    return int.from_bytes(hashlib.blake2b(f"{prompt.seed}/{index}".encode(), digest_size=7).digest(), "big")


def _parameters(prompt: Prompt, sampling: Sampling, index: int) -> SamplingParams:
    """vLLM's sampling parameters for one completion of a prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed_of(prompt, index),
        max_tokens=min(sampling.max_tokens, sampling.max_length - len(prompt.tokens)),
        stop_token_ids=sorted(sampling.end_tokens),
        ignore_eos=True,  # stop_token_ids decide instead
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _rollout(output: CompletionOutput) -> Rollout:
    """Converts vLLM's output to a Rollout."""
    assert output.logprobs is not None and output.weight_versions is not None, "both were asked for"
    tokens = tuple(output.token_ids)
    return Rollout(
        tokens=tokens,
        logprobs=tuple(by_id[token].logprob for by_id, token in zip(output.logprobs, tokens, strict=True)),
        truncated=output.finish_reason == "length",
        weight_version=min(int(span.version) for span in output.weight_versions),
    )


@contextlib.contextmanager
def _environment(settings: RolloutEngineSettings) -> Iterator[None]:
    """Sets vLLM's environment variables; those for the engine's process alone only inside this context."""
    forbid_usage_reports()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it would warn of a dozen settings that are intended
    previous = dict(os.environ)
    variables = engine_environment(device=settings.device, eager=True, threads=settings.threads)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
            os.environ.update({name: previous[name]} if name in previous else {})


def _setting_names(settings: RolloutEngineSettings) -> SettingNames:
    """The names of the settings that an error message may advise to change."""
    cache = "rollout.kv_cache_gib" if settings.device == "cpu" else "rollout.gpu_memory_utilization"
    return SettingNames(cache=cache, length="data.max_length", gpus="rollout.tensor_parallel_size")


def _start_vllm(settings: RolloutEngineSettings, log: StartLog) -> AsyncLLM:
    """Starts vLLM's engine."""
    load_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    config = AsyncEngineArgs(**engine_arguments(settings), logging_config=log.config()).create_engine_config()
    if settings.device == "cpu":
        use_one_process(config)
    return AsyncLLM.from_vllm_config(config, disable_log_stats=True)


def engine_arguments(settings: RolloutEngineSettings) -> dict[str, Any]:
    """The arguments of vLLM's `AsyncEngineArgs`."""
    cpu, rollout = settings.device == "cpu", settings.rollout
    arguments = shared_arguments(
        device=settings.device,
        eager=cpu,
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_gib=rollout.kv_cache_gib,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
    )
    arguments |= {
        "model": model_source(settings.model.path),
        "revision": settings.model.revision,
        "dtype": settings.dtype,
        "max_model_len": settings.max_length,
        "skip_tokenizer_init": True,  # tokens in, tokens out
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # of the sampled distribution, including the temperature
        "generation_config": "vllm",  # ignore the model's own: the run has all settings
    }
    arguments |= {"block_size": CPU_BLOCK_TOKENS} if cpu else {"tensor_parallel_size": rollout.tensor_parallel_size}
    lora = settings.model.lora
    if lora is None:
        return arguments | transfer_arguments()
    rank = next(rank for rank in LORA_RANKS if rank >= lora.rank)
    # One slot is enough, as all requests are for the adapter.
    return arguments | adapter_arguments(slots=1, rank=rank, target_modules=_target_modules(settings.model, lora))


def _check_adapter(lora: LoraConfig) -> None:
    """Refuses an adapter that engines would refuse with the first weights, before anything is started.

    Raises:
        ConfigError: vLLM does not support the adapter, or its settings are damaged.
    """
    if lora.rank > LORA_RANKS[-1]:
        raise ConfigError(f"model.lora.rank {lora.rank}: vLLM takes adapters of rank {LORA_RANKS[-1]} at most")
    if lora.start is None:
        return
    adapter = ModelFolder(Path(checkpoint_or_path(lora.start)).expanduser())
    if not adapter.is_adapter:
        return  # the trainer reports it
    try:
        reasons = obstacles(adapter.read_adapter_config())
    except (CheckpointError, TypeError, AttributeError) as error:
        raise ConfigError(f"model.lora.start {lora.start!r}: its settings are damaged: {error}") from error
    for reason in reasons:
        raise ConfigError(
            f"model.lora.start {lora.start!r} cannot be held by vLLM engines, since {reason}; as model.path it is "
            "merged into its base"
        )


def _target_modules(model: ModelConfig, lora: LoraConfig) -> list[str]:
    """The names of the layers with an adapter. vLLM's default would include the output head, at a cost."""
    if not isinstance(lora.target_modules, str):
        return list(lora.target_modules)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(model_source(model.path), revision=model.revision)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(settings)
    head = module.get_output_embeddings()
    linear = [
        path
        for path, submodule in module.named_modules()
        if isinstance(submodule, torch.nn.Linear) and submodule is not head
    ]
    return sorted({path.rpartition(".")[2] for path in linear})
