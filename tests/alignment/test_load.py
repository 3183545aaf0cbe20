"""In which number format a model computes, where nobody has said."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from pydantic import ValidationError
from torch import nn

from alignment.models.attention.flex import limit_recompilations
from alignment.models.attention.sdpa import DENSE, dense_attention
from alignment.models.forward import outputs
from alignment.models.load import DTYPES, load_model, number_format
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from alignment.settings.plugins import load_attribute
from alignment.settings.run import RolloutConfig
from alignment.vllm.engine import RolloutEngineSettings
from tests.alignment.test_attention import random_batch


def seconds(dtype: torch.dtype) -> float:
    """Of this thread's own time, for a matrix product: what else the machine does is not counted."""
    left, right = torch.ones(256, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
    started = time.thread_time()
    left @ right
    return time.thread_time() - started


@pytest.mark.usefixtures("one_thread")
def test_auto_is_not_the_slow_format() -> None:
    chosen = number_format("auto", "cpu")
    other = {"bf16": "fp32", "fp32": "bf16"}[chosen]
    taken = [(seconds(DTYPES[chosen]), seconds(DTYPES[other])) for _ in range(20)]
    assert min(one for one, _ in taken) < 1.5 * min(two for _, two in taken)


def test_what_is_asked_for_is_obeyed_and_warned_of_where_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    assert number_format("fp32", "cpu") == "fp32"
    with caplog.at_level(logging.WARNING):
        assert number_format("bf16", "cpu") == "bf16"
    assert ("no bf16 arithmetic" in caplog.text) == (number_format("auto", "cpu") == "fp32")


@pytest.mark.parametrize(
    ("model", "rollout", "wanted"), [("auto", "auto", "auto"), ("fp32", "auto", "fp32"), ("fp32", "bf16", "bf16")]
)
def test_trainer_and_engine_agree_unless_told_otherwise(model: str, rollout: str, wanted: str) -> None:
    config = ModelConfig.model_validate({"dtype": model})
    settings = RolloutEngineSettings.for_run(
        config, RolloutConfig.model_validate({"dtype": rollout}), max_length=64, device="cpu", threads=1
    )
    assert f"torch.{settings.dtype}" == str(DTYPES[number_format(wanted, "cpu")])  # type: ignore[arg-type]


def test_flex_attention_may_compile_many_shapes_and_never_falls_back_in_silence() -> None:
    limit_recompilations()
    assert torch._dynamo.config.recompile_limit >= 64
    assert torch._dynamo.config.fail_on_recompile_limit_hit


LAYERS: list[str] = []
"""The layers that an attention of one's own was called for."""


def recording_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    LAYERS.append(type(module).__name__)
    return dense_attention(module, *args, **kwargs)


OWN = dataclasses.replace(DENSE, implementation="raylign_packed_recorded", attend=recording_attention)


def test_an_attention_of_ones_own_is_called(tiny_model: Path) -> None:
    layers = load_attribute("tests.alignment.test_load:LAYERS", "list")  # of the module that the name stands for
    config = ModelConfig(path=str(tiny_model), attention="tests.alignment.test_load:OWN")
    model = load_model(config, DataConfig(path="x", max_length=64), device=torch.device("cpu"), seed=0)
    assert model.attention == "tests.alignment.test_load:OWN"
    layers.clear()
    outputs(model, random_batch(random.Random(0), longest=5))
    assert layers == ["LlamaAttention"] * 2


def test_an_unknown_attention_is_refused() -> None:
    with pytest.raises(ValidationError, match="did you mean 'grouped'"):
        ModelConfig(attention="groupd")
