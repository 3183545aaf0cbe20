"""Finds out, from vLLM's own processes, why an engine did not start, and says it by the names of our settings.

    vLLM's process: logger.exception ─► `FailureHandler` ─► file ─► `StartLog.reason` ─► our error

vLLM itself says only "See root cause above", which is in the log of another process, perhaps on another machine.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # takes 10 s
    from vllm.config.logging import LoggingConfig

HANDLER_NAME = "raylign_failures"
"""Name of the handler in the configuration of `logging`."""
MAX_REASON_LENGTH = 600
"""Most characters of a reason that `EXPLANATIONS` does not have."""
PREAMBLE = re.compile(
    r"^(?:Failed to create vLLM engine config: )?(?:\d+ validation errors? for \w+\s+)?(?:Value error, )?"
)
"""The text that Ray and pydantic put before a reason."""


@dataclass(frozen=True, kw_only=True)
class SettingNames:
    """The names of our settings for those that vLLM's reasons are about."""

    cache: str
    """The memory for attention keys and values: GiB on a CPU, a fraction of the memory on GPUs."""
    length: str
    """The largest number of tokens of prompt and answer together."""
    gpus: str
    """The number of GPUs that share the weights."""


@dataclass(frozen=True, kw_only=True)
class EngineFailure:
    """An exception that a process of vLLM has logged."""

    kind: str
    """Name of its class."""
    text: str
    """Its text, or where it was raised."""
    is_of_start: bool
    """True if the process did not start because of it."""


class FailureHandler(logging.Handler):
    """Writes the exceptions that vLLM logs into a file; `StartLog.config` adds it to each vLLM process."""

    def __init__(self, file: str) -> None:
        super().__init__(logging.ERROR)
        self._file = Path(file)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line per exception; after the start, when the folder is gone, it writes nothing."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None or not self._file.parent.is_dir():
            return
        is_of_start = record.getMessage().endswith("failed to start.")
        failure = EngineFailure(
            kind=type(error).__name__, text=str(error) or _raise_location(error), is_of_start=is_of_start
        )
        try:
            with self._file.open(
                "ab", buffering=0
            ) as file:  # unbuffered, because several processes may fail at the same time
                file.write((json.dumps(asdict(failure)) + "\n").encode())
        except OSError:
            self.handleError(record)


class StartLog:
    """Collects the exceptions of vLLM's processes while an engine starts; used as `with StartLog() as log`."""

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="vllm-start-"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def config(self) -> LoggingConfig:
        """Returns a `logging_config` for vLLM: its default, or that of the environment, with our handler added."""
        from vllm import envs
        from vllm.config.logging import LoggingConfig
        from vllm.logger import DEFAULT_LOGGING_CONFIG

        settings: dict[str, Any] = {"version": 1, "disable_existing_loggers": False}
        if envs.VLLM_LOGGING_CONFIG_PATH:
            settings = json.loads(Path(envs.VLLM_LOGGING_CONFIG_PATH).read_text(encoding="utf-8"))
        elif envs.VLLM_CONFIGURE_LOGGING:
            settings = copy.deepcopy(DEFAULT_LOGGING_CONFIG)
            # vLLM read this variable when it was imported; it may have changed since.
            settings["handlers"]["vllm"]["level"] = settings["loggers"]["vllm"]["level"] = envs.VLLM_LOGGING_LEVEL
        handler = {"()": f"{__name__}.FailureHandler", "file": str(self._folder / "failures")}
        settings.setdefault("handlers", {})[HANDLER_NAME] = handler
        logger = settings.setdefault("loggers", {}).setdefault("vllm", {})
        logger["handlers"] = [*logger.get("handlers", ()), HANDLER_NAME]
        file = self._folder / "logging.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        return LoggingConfig(configure_logging=True, pylogging_config_file=str(file))

    def reason(self, error: BaseException, names: SettingNames) -> str:
        """Returns why the engine did not start, and which setting to change if that is known.

        Args:
            error: the exception in this process; it is used if no process of vLLM has logged one.
            names: the names of our settings.
        """
        failures = self._failures()
        local_failure = EngineFailure(
            kind=type(error).__name__, text=str(error) or _raise_location(error), is_of_start=False
        )
        return reason_of(
            next((failure for failure in failures if failure.is_of_start), (*failures, local_failure)[0]), names
        )

    def _failures(self) -> list[EngineFailure]:
        try:
            text = (self._folder / "failures").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        whole_lines = text.split("\n")[:-1]  # after the last line break, a process may be writing now
        return [EngineFailure(**json.loads(line)) for line in whole_lines]


def reason_of(failure: EngineFailure, names: SettingNames) -> str:
    """Returns a failure as one sentence with its figures; for a known one, a second sentence says what to change."""
    for pattern, explain in EXPLANATIONS.items():
        if match := re.search(pattern, failure.text, re.DOTALL):
            return explain(match, names)
    text = " ".join(PREAMBLE.sub("", failure.text).partition(" [type=")[0].split())
    return f"{failure.kind}: {text}"[:MAX_REASON_LENGTH]


def _raise_location(error: BaseException) -> str:
    """File, line and code where an exception was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{frame[0].filename}:{frame[0].lineno} {frame[0].line}" if frame else "no reason was given"


def _small_cache(match: re.Match[str], names: SettingNames) -> str:
    length, fitting_length = match[1], match[4]
    # vLLM rounds to hundredths.
    needed_gib, available_gib = ("less than 0.01" if float(size) == 0 else size for size in match.group(2, 3))
    length_advice = f"lower {names.length} to {fitting_length} at most" if fitting_length else f"lower {names.length}"
    return (
        f"one request of {names.length} = {length} tokens needs {needed_gib} GiB of key-value cache, and there are "
        f"{available_gib} GiB. Raise {names.cache}, or {length_advice}"
    )


def _no_cache(_: re.Match[str], names: SettingNames) -> str:
    return (
        f"the weights leave no memory for the key-value cache. Raise {names.cache}, or share them between more GPUs "
        f"({names.gpus})"
    )


def _occupied_gpu(match: re.Match[str], names: SettingNames) -> str:
    free_gib, total_gib, fraction, requested_gib = match.groups()
    return (
        f"{free_gib} of the GPU's {total_gib} GiB are free, and {names.cache} = {fraction} asks for "
        f"{requested_gib} GiB. Lower it, or end the other processes on that GPU (nvidia-smi lists them)"
    )


def _full_gpu(match: re.Match[str], names: SettingNames) -> str:
    requested_size, gpu, total_size, free_size = match.groups()
    return (
        f"GPU {gpu} is full: {requested_size} more were asked for, and {free_size} of its {total_size} are free. "
        f"Share the weights between more GPUs ({names.gpus}), lower {names.cache}, or end other processes there "
        "(nvidia-smi lists them)"
    )


def _full_machine(match: re.Match[str], names: SettingNames) -> str:
    free_gib, total_gib, requested_gib = match.groups()
    return (
        f"{free_gib} of the machine's {total_gib} GiB of memory are free, and the key-value cache asks for "
        f"{requested_gib} GiB. Lower {names.cache}"
    )


def _long_window(match: re.Match[str], names: SettingNames) -> str:
    length, positions = match.groups()
    return f"{names.length} = {length} is more than the model's {positions} positions. Lower it"


def _unknown_architecture(match: re.Match[str], _: SettingNames) -> str:
    return f"vLLM knows no model of the architecture {match[1]}"


def _damaged_file(match: re.Match[str], _: SettingNames) -> str:
    return f"a file of the weights is damaged ({match[0].strip()}). Copy the model again"


def _ended_by_signal(match: re.Match[str], names: SettingNames) -> str:
    signal_number = int(match[1])
    if signal_number == signal.SIGKILL:
        return (
            "its process was killed (SIGKILL), as Linux does when memory runs out. Lower "
            f"{names.cache}, or give the machine more memory"
        )
    name = signal.Signals(signal_number).name
    return f"its process crashed ({name}). What it printed last is in the logs of its machine"


def _ended_without_reason(_: re.Match[str], __: SettingNames) -> str:
    return "its process ended and did not say why. What it printed last is in the logs of its machine"


EXPLANATIONS: dict[str, Callable[[re.Match[str], SettingNames], str]] = {
    r"model'?s max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed, .*?available KV cache memory "
    r"\(([\d.]+) GiB\)\.(?:.*?maximum model length is (\d+))?": _small_cache,
    "No available memory for the cache blocks": _no_cache,
    r"Free memory on device \S* ?\(([\d.]+)/([\d.]+) GiB\) on startup is less than [^(]*\(([\d.]+), ([\d.]+) GiB\)": (
        _occupied_gpu
    ),
    r"out of memory\. Tried to allocate ([\d.]+ \w+)\. GPU (\d+) has a total capacity of ([\d.]+ \w+) of which "
    r"([\d.]+ \w+) is free": _full_gpu,
    r"Available memory on node \d+ \(([\d.]+)/([\d.]+) GiB\) on kv cache allocation is less than requested memory for "
    r"kv \(([\d.]+) GiB": _full_machine,
    r"max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)": _long_window,
    r"Model architectures \['?(.*?)'?\] are not supported": _unknown_architecture,
    r"[Ee]rror while deserializing.*": _damaged_file,
    r"Failed core proc\(s\): \{.*?: -(\d+)": _ended_by_signal,
    "Engine core initialization failed": _ended_without_reason,
}
"""Patterns of error texts of vLLM 0.32, torch 2.13 and safetensors, each with a function that explains the match."""
