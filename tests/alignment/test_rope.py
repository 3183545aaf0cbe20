"""Rotary embeddings that depend on a sequence's length are decided once, by `data.max_length`, as vLLM does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignment.data.packing import pack
from alignment.errors import ModelError
from alignment.groups import Completion, Group
from alignment.models.forward import outputs
from alignment.models.language_model import LanguageModel
from alignment.models.load import load_model
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from tests.alignment.families import write_family

ORIGINAL = 32
"""Positions that the models here were first trained with."""
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def load(folder: Path, max_length: int) -> LanguageModel:
    config = ModelConfig(path=str(folder), dtype="fp32")
    return load_model(config, DataConfig(path="none", max_length=max_length), device=torch.device("cpu"), seed=0)


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def group(prompt: int, answer: int) -> Group:
    completion = Completion(text="", tokens=tokens(answer, 1), loss_mask=(True,) * answer)
    return Group(id="0", prompt="", prompt_tokens=tokens(prompt), completions=(completion,))


def logprobs(model: LanguageModel, *groups: Group) -> Tensor:
    """Of the first group's answer."""
    batch = pack(list(groups))
    return outputs(model, batch).logprobs[(batch.completion_index == 0)].detach()


def stock_logprobs(folder: Path, one: Group) -> Tensor:
    """The same by transformers' own model, which looks at the length of what it is given."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    answer = torch.tensor(one.completions[0].tokens)
    with torch.no_grad():
        logits = model(torch.tensor([*one.prompt_tokens, *answer.tolist()])[None]).logits[0]
    return logits[-len(answer) - 1 : -1].log_softmax(-1).gather(1, answer[:, None]).squeeze(1)


@pytest.fixture
def phi3(tmp_path: Path) -> Path:
    return write_family(tmp_path, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL)


def test_a_long_neighbour_changes_nothing(phi3: Path) -> None:
    model = load(phi3, 128)
    torch.testing.assert_close(
        logprobs(model, group(6, 9)), logprobs(model, group(6, 9), group(40, 50)), atol=2e-5, rtol=0
    )


def test_a_run_of_longer_sequences_takes_the_long_factors_for_all(phi3: Path) -> None:
    model = load(phi3, ORIGINAL + 1)
    torch.testing.assert_close(logprobs(model, group(20, 30)), stock_logprobs(phi3, group(20, 30)), atol=2e-5, rtol=0)
    assert (logprobs(model, group(6, 9)) - stock_logprobs(phi3, group(6, 9))).abs().max() > 0.01, "by then it is long"


def test_a_run_of_short_sequences_takes_the_short_factors(phi3: Path) -> None:
    model = load(phi3, ORIGINAL)
    torch.testing.assert_close(logprobs(model, group(6, 9)), stock_logprobs(phi3, group(6, 9)), atol=2e-5, rtol=0)


def test_factors_by_kind_of_layer_are_decided_too(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    folder = write_family(
        tmp_path, "gemma3_text", rope_parameters={"full_attention": LONGROPE, "sliding_attention": plain}
    )
    model = load(folder, 128)
    torch.testing.assert_close(
        logprobs(model, group(6, 9)), logprobs(model, group(6, 9), group(40, 50)), atol=2e-5, rtol=0
    )
    rotary = model.decoder.rotary_emb
    assert rotary.rope_type == {"full_attention": "fixed", "sliding_attention": "default"}


def test_dynamic_scaling_is_that_of_the_longest_sequence(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "llama", rope_parameters=DYNAMIC)
    model = load(folder, 256)
    torch.testing.assert_close(
        logprobs(model, group(100, 150)), stock_logprobs(folder, group(100, 150)), atol=5e-5, rtol=0
    )


def test_factors_that_a_family_decides_in_its_own_way_are_refused_where_they_would_change(tmp_path: Path) -> None:
    """Phi-3.5-MoE changes its scale with the longest sequence of a pass, in code of its own."""
    folder = write_family(tmp_path, "phimoe", rope_parameters={**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.3})
    load(folder, ORIGINAL)
    with pytest.raises(ModelError, match="differs by up to"):
        load(folder, ORIGINAL + 20)
