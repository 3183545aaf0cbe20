"""Engines that die or stand still while they get weights, experts, and engines of code that nobody has installed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from alignment.errors import ConfigError, RolloutError
from alignment.rollout import Weights
from alignment.rollout.transfer import WeightUpdate
from alignment.rollout.transfer.files import FileWeightTransfer
from alignment.settings.model import LoraConfig, ModelConfig
from alignment.settings.run import RolloutConfig
from alignment.vllm.local import local_generator
from tests.alignment.test_vllm import (
    PROMPTS,
    REPOSITORY,
    Pair,
    Trainer,
    assert_equal_within_rounding,
    sampling,
    settings_of,
    write_model,
)
from tests.conftest import make_tokenizer
from tests.processes import engine_processes
from tests.rollouts import submit

NOTICED_S = 5.0
"""Seconds within which the death of an engine is noticed."""


def write_experts(folder: Path) -> Path:
    """A random Qwen3 of four experts, whose width vLLM pads before it packs them, and with a tied head."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = make_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        head_dim=32,
        intermediate_size=128,
        moe_intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        norm_topk_prob=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A trainer and an engine of a mixture of experts."""
    config = ModelConfig(path=str(write_experts(tmp_path_factory.mktemp("experts"))), dtype="fp32")
    with contextlib.closing(local_generator(settings_of(config))) as engine:
        started = Pair(Trainer.of(config), engine)
        started.sync()
        yield started


def assert_same(pair: Pair) -> None:
    drawn = submit(pair.engine, PROMPTS, sampling())()
    assert {rollout.weight_version for each in drawn for rollout in each} == {pair.trainer.version}
    assert_equal_within_rounding(pair.trainer.mismatch(drawn))


def test_after_every_sync_engine_and_trainer_have_the_same_experts(pair: Pair) -> None:
    assert_same(pair)
    for _ in range(10):
        pair.sync()
        assert_same(pair)


class Pipes(FileWeightTransfer):
    """Leaves a pipe in the last file's place, so that an engine stands still in the middle of an update."""

    def send(self, weights: Weights, *, adapter: bool) -> WeightUpdate:
        update = super().send(weights, adapter=adapter)
        self.pipe = Path(update.update_info["files"][-1])
        self.file = self.pipe.with_suffix(".whole")
        self.pipe.rename(self.file)
        os.mkfifo(self.pipe)
        return update

    def is_read(self) -> bool:
        """Whether an engine waits at the pipe's end."""
        try:
            os.close(os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    def repair(self) -> None:
        self.file.rename(self.pipe)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def kill_while_it_loads(pair: Pair, process: psutil.Process, is_there: Callable[[], bool]) -> float:
    """Kills the engine in a sync when that `is_there`; seconds until it is noticed. The sync ends by a restart."""
    sync = threading.Thread(target=pair.sync)
    sync.start()
    wait_until(is_there, 30)
    process.kill()
    killed = time.monotonic()
    (slot,) = pair.engine.slots
    wait_until(lambda: slot.restart_task is not None, 30)
    seconds = time.monotonic() - killed
    sync.join(timeout=200)
    assert not sync.is_alive()
    return seconds


def test_an_engine_that_dies_in_the_middle_of_an_update_is_noticed_and_replaced(pair: Pair) -> None:
    (process,) = engine_processes()
    good = pair.engine.transfer
    pipes = pair.engine.transfer = Pipes(good.name, good.directories)

    def stands_in_the_update() -> bool:
        if is_read := hasattr(pipes, "pipe") and pipes.is_read():
            pipes.repair()
        return is_read

    assert kill_while_it_loads(pair, process, stands_in_the_update) < NOTICED_S
    pair.engine.transfer = good
    assert_same(pair)
    assert process not in engine_processes()


@pytest.mark.slow
def test_an_engine_that_dies_while_it_is_paused_is_noticed_and_replaced(pair: Pair) -> None:
    (process,) = engine_processes()
    process.suspend()  # the pause is the first call that waits for it
    began = time.monotonic()
    assert kill_while_it_loads(pair, process, lambda: time.monotonic() - began > 2) < NOTICED_S
    assert_same(pair)


@pytest.mark.slow
def test_an_engine_that_died_between_two_syncs_is_replaced(pair: Pair) -> None:
    (process,) = engine_processes()
    process.kill()
    process.wait()
    pair.sync()
    assert_same(pair)


@pytest.mark.slow
@pytest.mark.alone
def test_an_engine_that_stands_still_in_a_load_is_replaced_in_bounded_time(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair.engine, "timeout_s", 60.0)
    (process,) = engine_processes()
    process.suspend()
    began = time.monotonic()
    pair.sync()
    assert time.monotonic() - began < 100
    assert_same(pair)
    assert process not in engine_processes()


@pytest.mark.slow
def test_an_engine_that_dies_while_it_starts_is_an_error_at_once(tmp_path: Path) -> None:
    config = ModelConfig(path=str(write_model(tmp_path, tied=True)), dtype="fp32")
    before, killed = set(engine_processes()), []

    def kill() -> None:
        wait_until(lambda: set(engine_processes()) > before, 60)
        for process in set(engine_processes()) - before:
            process.kill()
        killed.append(time.monotonic())

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RolloutError, match="vLLM does not start"):
        local_generator(settings_of(config))
    killer.join()
    assert time.monotonic() - killed[0] < 3 * NOTICED_S


ENGINE_OF_BARE_CODE = """
import importlib.metadata, json, sys
from pathlib import Path
import psutil

if __name__ == "__main__":
    assert not [each for each in importlib.metadata.distributions() if each.metadata["Name"] == "raylign"]
    from alignment.settings.model import ModelConfig
    from alignment.settings.run import RolloutConfig
    from alignment.rollout import Prompt, Sampling
    from alignment.vllm.engine import RolloutEngineSettings
    from alignment.vllm.local import local_generator

    class Whole:
        version = 7
        def named_weights(self):
            from safetensors.torch import load_file
            for name, weight in load_file(Path(sys.argv[1]) / "model.safetensors").items():
                yield name, weight.bfloat16()

    model, rollout = ModelConfig(path=sys.argv[1], dtype="bf16"), RolloutConfig(kv_cache_gib=0.05)
    settings = RolloutEngineSettings.for_run(model, rollout, max_length=96, device="cpu", threads=1)
    pool = local_generator(settings)
    pool.load(Whole())
    before = [each.pid for each in psutil.Process().children()]
    sampling = Sampling(num_completions=2, max_tokens=12, max_length=96, temperature=1.0)
    rollouts = pool.start(lambda policy: policy.generate(Prompt(tokens=(20,), seed=1), sampling))()
    lost = [pid for pid in before if not psutil.pid_exists(pid)], pool.slots[0].generation
    print("DRAWN", json.dumps({"versions": [each.weight_version for each in rollouts], "lost": lost}))
    pool.close()
"""


@pytest.fixture(scope="module")
def drawn_by_bare_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an engine in bf16 drew, as where `ray job submit --working-dir .` brought the code to such a machine."""
    folder = tmp_path_factory.mktemp("bare")
    code, packages, model = folder / "code", folder / "packages", write_model(folder / "model", tied=True)
    shutil.copytree(REPOSITORY / "alignment", code / "alignment", ignore=shutil.ignore_patterns("__pycache__"))
    (code / "engine.py").write_text(ENGINE_OF_BARE_CODE)
    packages.mkdir()
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if "raylign" not in installed.name:
            (packages / installed.name).symlink_to(installed)
    # Without `site`, Python reads no folder of packages by itself.
    environment = {**os.environ, "PYTHONPATH": f"{code}:{packages}"}
    command = [sys.executable, "-S", str(code / "engine.py"), str(model)]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=200, check=False
    )
    assert "DRAWN" in ended.stdout, ended.stderr[-3000:]
    drawn: dict[str, Any] = json.loads(ended.stdout.partition("DRAWN")[2])
    return drawn


def test_an_engine_needs_only_the_code_not_its_installation(drawn_by_bare_code: dict[str, Any]) -> None:
    assert drawn_by_bare_code["versions"] == [7, 7]


def test_the_first_thing_an_engine_draws_in_bf16_may_follow_a_single_token(drawn_by_bare_code: dict[str, Any]) -> None:
    """A processor with AMX kills a process that multiplies tiles unasked, as vLLM's attention does."""
    assert drawn_by_bare_code["lost"] == [[], 0], "the engine was replaced"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"bias": "all"}, "it has biases"),
        ({"modules_to_save": ["lm_head"]}, "it replaces whole modules"),
        ({"rank_pattern": {"q_proj": 1024}}, "its rank is 1024, above 512"),
        ({"init_lora_weights": "pissa"}, "it began as pissa"),
        ({"peft_type": "LOHA"}, "it is of the kind LOHA"),
    ],
)
def test_an_adapter_that_no_engine_takes_is_refused_when_the_run_is_planned(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, **settings}))
    with pytest.raises(ConfigError, match=rf"model\.lora\.start .*, since {reason}"):
        settings_of(ModelConfig(lora=LoraConfig(start=str(tmp_path))))


def test_an_adapter_that_engines_take_may_be_gone_on_from(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "bias": "none"}))
    settings_of(ModelConfig(lora=LoraConfig(start=str(tmp_path))))


def test_a_window_that_is_longer_than_the_models_ends_the_start_with_both_figures(tmp_path: Path) -> None:
    settings = settings_of(ModelConfig(path=str(write_model(tmp_path, tied=True)), dtype="fp32"))
    with pytest.raises(RolloutError, match=r"(?s)vLLM does not start.*4096.*512"):
        local_generator(dataclasses.replace(settings, max_length=4096))


@pytest.mark.slow
def test_a_start_that_fails_in_vllms_own_process_says_why_there(tmp_path: Path) -> None:
    config = ModelConfig(path=str(write_model(tmp_path, tied=True)), dtype="fp32")
    small = dataclasses.replace(settings_of(config), rollout=RolloutConfig(kv_cache_gib=0.00002), max_length=512)
    with pytest.raises(RolloutError) as raised:
        local_generator(small)
    print(raised.value)
    assert re.search(
        r"one request of data\.max_length = 512 tokens needs [\w. ]+ GiB of key-value cache, and there are "
        r"[\w. ]+ GiB\. Raise rollout\.kv_cache_gib, or lower data\.max_length",
        str(raised.value),
    )
    assert "See root cause" not in str(raised.value)


def test_other_peoples_vllm_loads_nothing_of_ours() -> None:
    """A plugin would be called in every process of vLLM, whoever started it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert "vllm.general_plugins" not in project.get("entry-points", {})


LIFELINE = """
import multiprocessing, os, sys, time

def worker():
    from alignment.vllm.lifeline import end_with_owner
    end_with_owner()
    print("worker", os.getpid(), flush=True)
    time.sleep(600)

def core(workers):
    print("core", os.getpid(), flush=True)
    if workers:
        multiprocessing.get_context("spawn").Process(target=worker, name="VllmWorker-0").start()
        time.sleep(600)
    else:
        worker()

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=core, args=(int(sys.argv[1]),), name="EngineCore").start()
    time.sleep(600)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_every_process_of_an_engine_ends_with_its_owner(tmp_path: Path, workers: int) -> None:
    """Also vLLM's own one between the owner and the workers of an engine on several GPUs."""
    script = tmp_path / "owner.py"
    script.write_text(LIFELINE)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    owner = subprocess.Popen(
        [sys.executable, str(script), str(workers)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    processes = [psutil.Process(int(owner.stdout.readline().split()[1])) for _ in ("core", "worker")]
    owner.kill()
    owner.wait()
    _, alive = psutil.wait_procs(set(processes), timeout=10)
    assert not alive
