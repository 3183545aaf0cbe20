"""Reasons of vLLM's, as it gives them, and what they are told as."""

from __future__ import annotations

import json
import logging
import logging.config
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.start_failure import EngineFailure, FailureHandler, SettingNames, StartLog, reason_of

NAMES = SettingNames(cache="the_cache", length="the_length", gpus="the_gpus")
NO_REASON = "Engine core initialization failed. See root cause above. Failed core proc(s): "


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        (
            "ValueError",
            "To serve at least one request with the model's max seq len (32768), (4.00 GiB KV cache is needed, which "
            "is larger than the available KV cache memory (1.25 GiB). Based on the available memory, the estimated "
            "maximum model length is 10240. Try increasing `gpu_memory_utilization` (which also controls CPU memory on "
            "the CPU backend) or decreasing `max_model_len` when initializing the engine. See "
            "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details.",
            "one request of the_length = 32768 tokens needs 4.00 GiB of key-value cache, and there are 1.25 GiB. Raise "
            "the_cache, or lower the_length to 10240 at most",
        ),
        (
            "ValueError",
            "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the "
            "engine (this flag also controls CPU memory reservation on the CPU backend, despite its name).",
            "the weights leave no memory for the key-value cache. Raise the_cache, or share them between more GPUs "
            "(the_gpus)",
        ),
        (
            "ValueError",
            "Free memory on device cuda:0 (3.21/79.11 GiB) on startup is less than desired GPU memory utilization "
            "(0.9, 71.2 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
            "3.21 of the GPU's 79.11 GiB are free, and the_cache = 0.9 asks for 71.2 GiB. Lower it, or end the other "
            "processes on that GPU (nvidia-smi lists them)",
        ),
        (
            "OutOfMemoryError",
            "CUDA out of memory. Tried to allocate 1.96 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.07 GiB "
            "is free. Including non-PyTorch memory, this process has 78.03 GiB memory in use.",
            "GPU 1 is full: 1.96 GiB more were asked for, and 1.07 GiB of its 79.11 GiB are free. Share the weights "
            "between more GPUs (the_gpus), lower the_cache, or end other processes there (nvidia-smi lists them)",
        ),
        (
            "ValueError",
            "Available memory on node 0 (11.4/23.5 GiB) on kv cache allocation is less than requested memory for kv "
            "(40.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other "
            "processes.",
            "11.4 of the machine's 23.5 GiB of memory are free, and the key-value cache asks for 40.0 GiB. Lower "
            "the_cache",
        ),
        (
            "RuntimeError",
            "Failed to create vLLM engine config: 1 validation error for ModelConfig\n  Value error, User-specified "
            "max_model_len (4096) is greater than the derived max_model_len (max_position_embeddings=512.0 or "
            "model_max_length=None in model's config.json). [type=value_error, input_value=ArgsKwargs((), …",
            "the_length = 4096 is more than the model's 512 positions. Lower it",
        ),
        (
            "ValidationError",
            "1 validation error for ModelConfig\n  Value error, Model architectures ['FutureForCausalLM'] are not "
            "supported for now. Supported architectures: dict_keys(['AfmoeForCausalLM'])",
            "vLLM knows no model of the architecture FutureForCausalLM",
        ),
        (
            "SafetensorError",
            "Error while deserializing header: incomplete metadata, file not fully covered",
            "a file of the weights is damaged (Error while deserializing header: incomplete metadata, file not fully "
            "covered). Copy the model again",
        ),
        (
            "RuntimeError",
            NO_REASON + "{'EngineCore': -9}",
            "its process was killed (SIGKILL), as Linux does when memory runs out. Lower the_cache, or give the "
            "machine more memory",
        ),
        (
            "RuntimeError",
            NO_REASON + "{'EngineCore_DP0': -11}",
            "its process crashed (SIGSEGV). What it printed last is in the logs of its machine",
        ),
        (
            "RuntimeError",
            NO_REASON + "{}",
            "its process ended and did not say why. What it printed last is in the logs of its machine",
        ),
        (
            "OSError",
            "[Errno 98] Address already in use",
            "OSError: [Errno 98] Address already in use",
        ),
        (
            "ValidationError",
            "2 validation errors for VllmConfig\n  Value error, Nobody   has foreseen\nthis [type=value_error, input",
            "ValidationError: Nobody has foreseen this",
        ),
    ],
)
def test_a_reason_is_told_with_its_figures_and_in_the_words_of_the_settings(kind: str, text: str, told: str) -> None:
    assert reason_of(EngineFailure(kind=kind, text=text, is_of_start=True), NAMES) == told


def test_the_first_process_that_could_not_start_has_the_reason(tmp_path: Path) -> None:
    """Of several GPUs' processes one fails first, and the one above them only says that one did."""
    logger = logging.Logger("vllm")
    with StartLog() as log:
        assert log.reason(RuntimeError(NO_REASON + "{}"), NAMES).startswith("its process ended")
        logger.addHandler(FailureHandler(str(log._folder / "failures")))
        logger.error("Not an exception")
        for message, error in (
            ("A plugin was not loaded", ImportError("unrelated")),
            ("WorkerProc failed to start.", RuntimeError("the reason")),
            ("EngineCore failed to start.", Exception("WorkerProc initialization failed, see above")),
        ):
            try:
                raise error
            except Exception:
                logger.exception(message)
        assert log.reason(RuntimeError(NO_REASON + "{}"), NAMES) == "RuntimeError: the reason"
        folder = log._folder
    assert not folder.exists()
    logger.error("Nobody reads this any more", exc_info=ValueError("late"))
    assert not folder.exists()


def test_processes_that_fail_together_do_not_cut_each_others_reasons(tmp_path: Path) -> None:
    """As those of several GPUs do, with all names of the weights that they miss."""
    many = "layer " * 20_000
    program = (
        "import logging, sys\n"
        "from alignment.start_failure import FailureHandler\n"
        "logger = logging.Logger('vllm')\n"
        "logger.addHandler(FailureHandler(sys.argv[1]))\n"
        f"for _ in range(30): logger.error('x', exc_info=ValueError({many!r}))\n"
    )
    with StartLog() as log:
        file = log._folder / "failures"
        processes = [subprocess.Popen([sys.executable, "-c", program, str(file)]) for _ in range(3)]
        assert [process.wait() for process in processes] == [0, 0, 0]
        assert len(log._failures()) == 90
        with file.open("a") as being_written:
            being_written.write('{"kind": "Value')
        assert log.reason(RuntimeError(NO_REASON + "{}"), NAMES).startswith("ValueError: layer layer")


def test_an_exception_without_a_text_is_told_by_its_place() -> None:
    with StartLog() as log:
        try:
            assert [] == [1]
        except AssertionError as error:
            error.args = ()
            told = log.reason(error, NAMES)
    assert told.startswith("AssertionError: ") and f"{Path(__file__).name}:" in told and "assert [] == [1]" in told


def test_vllm_logs_as_before_and_into_the_file_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"version": 1, "handlers": {}, "loggers": {"mine": {"level": "INFO"}}}))
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", str(own))
    with StartLog() as log:
        config = log.config()
        settings = json.loads(Path(str(config.pylogging_config_file)).read_text())
        assert settings["loggers"]["mine"] == {"level": "INFO"}
        assert settings["loggers"]["vllm"]["handlers"] == ["raylign_failures"]
        monkeypatch.delenv("VLLM_LOGGING_CONFIG_PATH")
        settings = json.loads(Path(str(log.config().pylogging_config_file)).read_text())
        assert settings["loggers"]["vllm"]["handlers"] == ["vllm", "raylign_failures"]
