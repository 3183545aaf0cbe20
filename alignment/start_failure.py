"""Why a vLLM engine did not start, from the process of vLLM's where it happened, in the words of our settings.

    vLLM's process: logger.exception ─► `FailureHandler` ─► file ─► `StartLog.reason` ─► the error of who started it

vLLM itself says "See root cause above", and above is the log of another process, on whichever machine that is.
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

NAME = "raylign_failures"
"""What logging knows the handler by."""
MAX_REASON = 600
"""Characters of a reason that nobody has foreseen."""
PREAMBLE = re.compile(
    r"^(?:Failed to create vLLM engine config: )?(?:\d+ validation errors? for \w+\s+)?(?:Value error, )?"
)
"""What Ray and pydantic put before a reason."""


@dataclass(frozen=True, kw_only=True)
class SettingNames:
    """What the settings that vLLM's reasons speak of are called where people set them."""

    cache: str
    """Of the memory for attention keys and values: GiB on a CPU, a fraction of the memory on GPUs."""
    length: str
    """Of the most tokens of prompt and answer together."""
    gpus: str
    """Of the number of GPUs that share the weights."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An exception that a process of vLLM's has logged."""

    kind: str
    text: str
    is_of_start: bool
    """Whether the process did not start for it."""


class FailureHandler(logging.Handler):
    """Writes the exceptions that vLLM logs into a file; `StartLog.config` puts it into each of its processes."""

    def __init__(self, file: str) -> None:
        super().__init__(logging.ERROR)
        self._file = Path(file)

    def emit(self, record: logging.LogRecord) -> None:
        """One line per exception. After the start, nobody reads them, and the folder is gone."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None or not self._file.parent.is_dir():
            return
        is_of_start = record.getMessage().endswith("failed to start.")
        failure = Failure(kind=type(error).__name__, text=str(error) or _place(error), is_of_start=is_of_start)
        try:
            with self._file.open("ab", buffering=0) as file:  # at once: several processes may fail together
                file.write((json.dumps(asdict(failure)) + "\n").encode())
        except OSError:
            self.handleError(record)


class StartLog:
    """What goes wrong in vLLM's processes while an engine starts; used as `with StartLog() as log`."""

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="vllm-start-"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def config(self) -> LoggingConfig:
        """vLLM's `logging_config`: its own, or what the environment says, and our handler beside."""
        from vllm import envs
        from vllm.config.logging import LoggingConfig
        from vllm.logger import DEFAULT_LOGGING_CONFIG

        settings: dict[str, Any] = {"version": 1, "disable_existing_loggers": False}
        if envs.VLLM_LOGGING_CONFIG_PATH:
            settings = json.loads(Path(envs.VLLM_LOGGING_CONFIG_PATH).read_text(encoding="utf-8"))
        elif envs.VLLM_CONFIGURE_LOGGING:
            settings = copy.deepcopy(DEFAULT_LOGGING_CONFIG)
            # As of now; vLLM's are as of when it was imported.
            settings["handlers"]["vllm"]["level"] = settings["loggers"]["vllm"]["level"] = envs.VLLM_LOGGING_LEVEL
        handler = {"()": f"{__name__}.FailureHandler", "file": str(self._folder / "failures")}
        settings.setdefault("handlers", {})[NAME] = handler
        logger = settings.setdefault("loggers", {}).setdefault("vllm", {})
        logger["handlers"] = [*logger.get("handlers", ()), NAME]
        file = self._folder / "logging.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        return LoggingConfig(configure_logging=True, pylogging_config_file=str(file))

    def reason(self, error: BaseException, names: SettingNames) -> str:
        """Why the engine did not start, and what to change if that is known.

        Args:
            error: what was raised here; counts where no process of vLLM's has said more.
        """
        failures = self._failures()
        here = Failure(kind=type(error).__name__, text=str(error) or _place(error), is_of_start=False)
        return reason_of(next((each for each in failures if each.is_of_start), (*failures, here)[0]), names)

    def _failures(self) -> list[Failure]:
        try:
            text = (self._folder / "failures").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        whole_lines = text.split("\n")[:-1]  # behind the last line break is what a process is just writing
        return [Failure(**json.loads(line)) for line in whole_lines]


def reason_of(failure: Failure, names: SettingNames) -> str:
    """A failure in one sentence with its figures and, where it is a known one, another that says what to change."""
    for pattern, tell in KNOWN.items():
        if found := re.search(pattern, failure.text, re.DOTALL):
            return tell(found, names)
    text = " ".join(PREAMBLE.sub("", failure.text).partition(" [type=")[0].split())
    return f"{failure.kind}: {text}"[:MAX_REASON]


def _place(error: BaseException) -> str:
    """Where an exception without a text was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{frame[0].filename}:{frame[0].lineno} {frame[0].line}" if frame else "no reason was given"


def _short_cache(found: re.Match[str], names: SettingNames) -> str:
    length, fitting = found[1], found[4]
    # vLLM rounds to hundredths.
    needed, present = ("less than 0.01" if float(size) == 0 else size for size in found.group(2, 3))
    shorter = f"lower {names.length} to {fitting} at most" if fitting else f"lower {names.length}"
    return (
        f"one request of {names.length} = {length} tokens needs {needed} GiB of key-value cache, and there are "
        f"{present} GiB. Raise {names.cache}, or {shorter}"
    )


def _no_cache(_: re.Match[str], names: SettingNames) -> str:
    return (
        f"the weights leave no memory for the key-value cache. Raise {names.cache}, or share them between more GPUs "
        f"({names.gpus})"
    )


def _occupied_gpu(found: re.Match[str], names: SettingNames) -> str:
    free, total, fraction, wanted = found.groups()
    return (
        f"{free} of the GPU's {total} GiB are free, and {names.cache} = {fraction} asks for {wanted} GiB. Lower it, or "
        "end the other processes on that GPU (nvidia-smi lists them)"
    )


def _full_gpu(found: re.Match[str], names: SettingNames) -> str:
    wanted, gpu, total, free = found.groups()
    return (
        f"GPU {gpu} is full: {wanted} more were asked for, and {free} of its {total} are free. Share the weights "
        f"between more GPUs ({names.gpus}), lower {names.cache}, or end other processes there (nvidia-smi lists them)"
    )


def _full_machine(found: re.Match[str], names: SettingNames) -> str:
    free, total, wanted = found.groups()
    return (
        f"{free} of the machine's {total} GiB of memory are free, and the key-value cache asks for {wanted} GiB. Lower "
        f"{names.cache}"
    )


def _long_window(found: re.Match[str], names: SettingNames) -> str:
    length, positions = found.groups()
    return f"{names.length} = {length} is more than the model's {positions} positions. Lower it"


def _unknown_architecture(found: re.Match[str], _: SettingNames) -> str:
    return f"vLLM knows no model of the architecture {found[1]}"


def _damaged_file(found: re.Match[str], _: SettingNames) -> str:
    return f"a file of the weights is damaged ({found[0].strip()}). Copy the model again"


def _killed(found: re.Match[str], names: SettingNames) -> str:
    number = int(found[1])
    if number == signal.SIGKILL:
        return (
            "its process was killed (SIGKILL), as Linux does when memory runs out. Lower "
            f"{names.cache}, or give the machine more memory"
        )
    return f"its process crashed ({signal.Signals(number).name}). What it printed last is in the logs of its machine"


def _silent(_: re.Match[str], __: SettingNames) -> str:
    return "its process ended and did not say why. What it printed last is in the logs of its machine"


KNOWN: dict[str, Callable[[re.Match[str], SettingNames], str]] = {
    r"model'?s max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed, .*?available KV cache memory "
    r"\(([\d.]+) GiB\)\.(?:.*?maximum model length is (\d+))?": _short_cache,
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
    r"Failed core proc\(s\): \{.*?: -(\d+)": _killed,
    "Engine core initialization failed": _silent,
}
"""Texts of vLLM 0.32, torch 2.13 and safetensors, and what they mean here."""
