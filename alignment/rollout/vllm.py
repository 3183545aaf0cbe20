"""Rollout by vLLM: one engine, tokens in and tokens out. No Ray inside; `cluster.engines` puts it into actors.

vLLM is imported inside functions: it takes 10 s, and only processes that hold an engine need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from alignment.checkpoint import checkpoint_or_path
from alignment.errors import AlignmentError, ConfigError, RolloutError
from alignment.models.adapter_kinds import LORA_RANKS, obstacles
from alignment.models.folders import model_source
from alignment.rollout import Prompt, Rollout, Sampling
from alignment.rollout.pool import EngineLost, Pool
from alignment.rollout.weights import FILES, PREFIX, WORKER, Outbox, Update, local_places, sweep
from alignment.settings.model import LoraConfig, ModelConfig
from alignment.settings.run import RolloutConfig
from alignment.start_failure import SettingNames, StartLog

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

Device = Literal["cpu", "cuda"]
LOCAL = f"{PREFIX}local-"
"""What the names of weights for engines of the same process begin with; the process id follows."""
DEATH_POLL_S = 0.5
"""Seconds between two looks whether vLLM's process has died while a call to it goes on."""
CPU_BLOCK_TOKENS = 32
"""Tokens of a block of the key-value cache on a CPU. Completions share whole blocks of their prompt; by itself vLLM
takes 128, with which most prompts would share nothing."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """All that an engine needs to start; crosses process borders."""

    model: ModelConfig
    """What training starts from. With an adapter, every update is one; else all weights."""
    rollout: RolloutConfig
    max_length: int
    """Most tokens of prompt and completion together."""
    device: Device
    threads: int | None = None
    """CPU threads to compute with; None is one per core that the process may use."""

    @classmethod
    def of(
        cls, model: ModelConfig, rollout: RolloutConfig, *, max_length: int, device: Device, threads: int | None = None
    ) -> Self:
        """The settings of a run's engines, which may start in another folder.

        Raises:
            ConfigError: the adapter's rank is more than vLLM takes, or it goes on from a kind that vLLM does not take.
        """
        if model.lora is not None:
            _check_adapter(model.lora)
        folder = Path(model.path).expanduser()
        if folder.is_dir():
            model = model.model_copy(update={"path": str(folder.resolve())})
        return cls(model=model, rollout=rollout, max_length=max_length, device=device, threads=threads)

    @property
    def dtype(self) -> str:
        """Number format of the engine on this machine, as vLLM calls it."""
        from alignment.models.load import dtype_name

        wanted = self.model.dtype if self.rollout.dtype == "auto" else self.rollout.dtype
        return dtype_name(wanted, self.device)


class Engine:
    """One vLLM engine, for use inside one event loop.

    It is stale, and refuses to draw, from its start until a load has ended, and again from the beginning of each load.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.version: int | None = None
        """Optimizer steps behind the weights; None while stale."""
        self._llm: AsyncLLM | None = None
        self._adapter: LoRARequest | None = None
        self._numbers = itertools.count(1)
        self._drawing: set[asyncio.Task[list[Rollout]]] = set()
        self._loading = asyncio.Lock()
        self._half_loaded = False

    async def start(self) -> None:
        """Starts the engine, which takes 10 s and more.

        Raises:
            ModelError: there is no model where `model.path` says.
            RolloutError: vLLM does not start; the text holds its reason.
        """
        with StartLog() as log:
            try:
                with _environment(self.settings):
                    self._llm = _start(self.settings, log)
                if self.settings.model.lora is None:
                    await wait_while_alive(self._llm, self._prepare_transfer(self._llm))
            except AlignmentError:
                raise
            except Exception as error:  # of any kind: vLLM raises what its model code raises
                await self.stop()
                reason = log.reason(error, _setting_names(self.settings))
                raise RolloutError(f"vLLM does not start with {self.settings.model.path}: {reason}") from error

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        """Draws the completions of a prompt.

        Raises:
            EngineLost: the engine has died.
            RolloutError: it is stale, or the prompt leaves no room for a completion.
        """
        if self.version is None:
            raise RolloutError("the engine is stale: it has no whole version of the weights, so it draws nothing")
        if len(prompt.tokens) >= self.settings.max_length:
            limit = self.settings.max_length
            raise RolloutError(f"a prompt of {len(prompt.tokens)} tokens leaves no room within {limit}")
        drawing = asyncio.ensure_future(self._draw(prompt, sampling))
        self._drawing.add(drawing)
        drawing.add_done_callback(self._drawing.discard)
        return await drawing

    async def load(self, update: Update) -> None:
        """Brings an update into the engine when nothing is being drawn any more.

        Raises:
            EngineLost: the engine has died.
            RolloutError: the update could not be loaded. Only a restart helps then: part of it may be in.
        """
        self.version = None
        async with self._loading:
            if self._drawing:
                await asyncio.wait(self._drawing)
            llm = self._alive()
            if self._half_loaded:
                raise RolloutError("an earlier update got stuck half-way, so the engine has to be restarted")
            self._half_loaded = True
            load = self._load_all if update.adapter is None else self._load_adapter
            try:
                # Also forgets the cached prompts: they were computed by the old weights.
                await wait_while_alive(llm, llm.pause_generation(mode="wait", clear_cache=True))
                await wait_while_alive(llm, load(llm, update))
                await wait_while_alive(llm, llm.resume_generation())
            except EngineLost as error:
                raise EngineLost(f"{error} while it loaded version {update.version} of the weights") from error
            except Exception as error:  # of any kind: vLLM passes on what happened in its process
                raise RolloutError(f"version {update.version} could not be loaded: {error}") from error
            self._half_loaded = False
            self.version = update.version

    async def reset(self) -> None:
        """Drops what is being drawn, and makes the engine stale."""
        self.version = None
        for drawing in list(self._drawing):
            drawing.cancel()
        if self._drawing:
            await asyncio.wait(self._drawing)

    async def check(self) -> None:
        """Returns if the engine lives.

        Raises:
            EngineLost: it has died.
        """
        self._alive()

    async def stop(self) -> None:
        """Ends the engine; it can be started again."""
        self.version = self._adapter = None
        self._half_loaded = False
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None

    def _alive(self) -> AsyncLLM:
        if self._llm is None or self._llm.errored:
            raise EngineLost("the vLLM engine has died")
        return self._llm

    async def _prepare_transfer(self, llm: AsyncLLM) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))

    async def _load_all(self, llm: AsyncLLM, update: Update) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await llm.start_weight_update()
        await llm.update_weights(WeightTransferUpdateRequest(update_info={"files": list(update.files)}))
        await llm.finish_weight_update(str(update.version))

    async def _load_adapter(self, llm: AsyncLLM, update: Update) -> None:
        from vllm.lora.request import LoRARequest

        if self._adapter is not None:
            await llm.remove_lora(self._adapter.lora_int_id)
        # A new number and name each time: under a known one, vLLM goes on with the adapter that it has.
        number = next(self._numbers)
        self._adapter = LoRARequest(lora_name=str(number), lora_int_id=number, lora_path=update.adapter)
        await llm.add_lora(self._adapter)
        await llm.update_weight_version(str(update.version))

    async def _draw(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return list(
                await asyncio.gather(*(self._complete(prompt, sampling, k) for k in range(sampling.completions)))
            )
        except EngineDeadError as error:
            raise EngineLost("the vLLM engine has died over what it was drawing") from error

    async def _complete(self, prompt: Prompt, sampling: Sampling, k: int) -> Rollout:
        """Completion k of a prompt. One request for each gives each its own seed; the prompt is shared all the same."""
        outputs = self._alive().generate(
            {"prompt_token_ids": list(prompt.tokens)},
            _parameters(prompt, sampling, k),
            request_id=str(next(self._numbers)),
            lora_request=self._adapter,
        )
        async for output in outputs:
            last = output
        return _rollout(last.outputs[0])


class LocalSeat:
    """The place of an engine in this process."""

    def __init__(self, settings: EngineSettings) -> None:
        self.engine = Engine(settings)

    async def begin(self) -> None:
        await self.engine.start()

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        return await self.engine.generate(prompt, sampling)

    async def load(self, update: Update) -> None:
        await self.engine.load(update)

    async def check(self) -> None:
        await self.engine.check()

    async def restart(self) -> None:
        await self.engine.stop()
        await self.engine.start()

    async def stop(self) -> None:
        await self.engine.stop()


def local_generator(settings: EngineSettings) -> Pool:
    """A `Generator` with one engine, started from this process, for a run without Ray.

    Raises:
        RolloutError: the engine does not start.
    """
    sweep()
    outbox = Outbox(f"{LOCAL}{os.getpid()}", local_places())
    pool = Pool(
        [LocalSeat(settings)], outbox, adapter=settings.model.lora is not None, timeout_s=settings.rollout.timeout_s
    )
    try:
        pool.begin()
    except BaseException:
        pool.close()
        raise
    return pool


def seed_of(prompt: Prompt, k: int) -> int:
    """The seed of completion k. Hashed: sums would repeat, prompt 1's completion 0 being prompt 0's completion 1."""
    return int.from_bytes(hashlib.blake2b(f"{prompt.seed}/{k}".encode(), digest_size=7).digest(), "big")


async def wait_while_alive(llm: AsyncLLM, call: Coroutine[Any, Any, None]) -> None:
    """Waits for a call to vLLM's process for as long as that lives.

    When it dies, vLLM 0.32 fails the requests that are being answered, but nothing ends the futures of other calls
    (`utility_results` of its client): whoever waits for one of those alone waits for ever.

    Raises:
        EngineLost: it has died.
    """
    running = asyncio.ensure_future(call)
    running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # it may fail of the same death
    try:
        while not running.done():
            await asyncio.wait([running], timeout=DEATH_POLL_S)
            if llm.errored:
                raise EngineLost("the vLLM engine has died")
        await running
    finally:
        running.cancel()


def _parameters(prompt: Prompt, sampling: Sampling, k: int) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed_of(prompt, k),
        max_tokens=min(sampling.max_tokens, sampling.max_length - len(prompt.tokens)),
        stop_token_ids=sorted(sampling.end_tokens),
        ignore_eos=True,  # ours are the ones that count
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _rollout(output: CompletionOutput) -> Rollout:
    """What vLLM says of a completion, in our words."""
    assert output.logprobs is not None and output.weight_versions is not None, "both were asked for"
    tokens = tuple(output.token_ids)
    return Rollout(
        tokens=tokens,
        logprobs=tuple(known[token].logprob for known, token in zip(output.logprobs, tokens, strict=True)),
        truncated=output.finish_reason == "length",
        version=min(int(span.version) for span in output.weight_versions),
    )


@contextlib.contextmanager
def _environment(settings: EngineSettings) -> Iterator[None]:
    """What vLLM reads from the environment; what is meant for the engine's process alone, only while that starts."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # a dozen warnings about what we chose
    before = dict(os.environ)
    if settings.device == "cpu":
        # Ray allows a thread per reserved CPU, and vLLM by itself leaves one core to the process that sends requests;
        # all cores give up to twice the tokens per second.
        os.environ["OMP_NUM_THREADS"] = str(settings.threads or len(os.sched_getaffinity(0)))
        # Eager means the model. A helper that ranks log-probabilities would still be compiled, for 25 s.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    try:
        yield
    finally:
        for name in ("OMP_NUM_THREADS", "TORCH_COMPILE_DISABLE"):
            os.environ.pop(name, None)
            os.environ.update({name: before[name]} if name in before else {})


def _setting_names(settings: EngineSettings) -> SettingNames:
    cache = "rollout.cache_gb" if settings.device == "cpu" else "rollout.gpu_memory"
    return SettingNames(cache=cache, length="data.max_length", gpus="rollout.tensor_parallel")


def _start(settings: EngineSettings, log: StartLog) -> AsyncLLM:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    config = AsyncEngineArgs(**engine_arguments(settings), logging_config=log.config()).create_engine_config()
    if settings.device == "cpu":
        # On a CPU, vLLM starts a process that schedules and one that computes, only to set the number of threads of the
        # latter. `_environment` has done that, and the second start (10 s, 0.5 GB) is saved.
        config.parallel_config.distributed_executor_backend = "uni"
    return AsyncLLM.from_vllm_config(config, disable_log_stats=True)


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`."""
    cpu, rollout = settings.device == "cpu", settings.rollout
    arguments: dict[str, Any] = {
        "model": model_source(settings.model.path),
        "revision": settings.model.revision,
        "dtype": settings.dtype,
        "max_model_len": settings.max_length,
        "max_num_seqs": rollout.max_sequences,
        "skip_tokenizer_init": True,  # tokens in, tokens out
        "enable_prefix_caching": True,
        "enforce_eager": cpu,
        "logprobs_mode": "processed_logprobs",  # of the distribution drawn from, temperature and all
        "generation_config": "vllm",  # nothing of the model's own: a run says all
        "worker_extension_cls": WORKER,
    }
    if cpu:
        arguments |= {
            "kv_cache_memory_bytes": int(rollout.cache_gb * 2**30),
            "block_size": CPU_BLOCK_TOKENS,
            # A prompt that is computed in two parts ends the engine if its completion has a seed: vLLM turns the
            # generator back, which it can do on a GPU only.
            "enable_chunked_prefill": False,
        }
    else:
        arguments |= {
            "gpu_memory_utilization": rollout.gpu_memory,
            "tensor_parallel_size": rollout.tensor_parallel,
        }
    lora = settings.model.lora
    return arguments | (_transfer_arguments() if lora is None else _adapter_arguments(settings.model, lora))


def _transfer_arguments() -> dict[str, Any]:
    from vllm.config import WeightTransferConfig

    return {"weight_transfer_config": WeightTransferConfig(backend=FILES)}


def _adapter_arguments(model: ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    return {
        "enable_lora": True,
        # One place is enough although vLLM 0.32 on a CPU confuses the base model with the last place: every request is
        # for the adapter.
        "max_loras": 1,
        "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= lora.rank),
        "lora_target_modules": _target_modules(model, lora),
    }


def _check_adapter(lora: LoraConfig) -> None:
    """Refuses, before anything is started, what an engine would refuse when it gets the first weights."""
    if lora.rank > LORA_RANKS[-1]:
        raise ConfigError(f"model.lora.rank {lora.rank}: vLLM takes adapters of rank {LORA_RANKS[-1]} at most")
    if lora.start is None:
        return
    file = Path(checkpoint_or_path(lora.start)).expanduser() / "adapter_config.json"
    if not file.is_file():
        return  # the trainer says so
    try:
        reasons = obstacles(json.loads(file.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"model.lora.start {lora.start!r}: {file} is damaged: {error}") from error
    for reason in reasons:
        raise ConfigError(
            f"model.lora.start {lora.start!r} cannot be held by vLLM engines, since {reason}; as model.path it is "
            "merged into its base"
        )


def _target_modules(model: ModelConfig, lora: LoraConfig) -> list[str]:
    """Names of the layers to prepare for an adapter. By itself vLLM would take the output head too, at a cost."""
    if not isinstance(lora.target_modules, str):
        return list(lora.target_modules)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(model_source(model.path), revision=model.revision)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(settings)
    head = module.get_output_embeddings()
    linear = [path for path, part in module.named_modules() if isinstance(part, torch.nn.Linear) and part is not head]
    return sorted({path.rpartition(".")[2] for path in linear})
