"""flex_attention with its block mask against SDPA with the dense one, on the first CUDA device it meets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment.data.packing import pack
from alignment.groups import Completion, Group
from alignment.models.attention import Layout
from alignment.models.attention.flex import block_mask
from alignment.models.attention.sdpa import dense_mask
from alignment.models.forward import outputs
from alignment.models.load import load_model
from alignment.models.output_head import linear_logprobs
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from tests.alignment.families import write_family

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")


def random_groups(count: int, *, length: int) -> list[Group]:
    generator = torch.Generator().manual_seed(0)

    def ids() -> tuple[int, ...]:
        size = int(torch.randint(1, length, (1,), generator=generator))
        return tuple(torch.randint(0, 300, (size,), generator=generator).tolist())

    def completion(reward: float) -> Completion:
        tokens = ids()
        return Completion(text="", tokens=tokens, loss_mask=(True,) * len(tokens), reward=reward)

    return [
        Group(id=str(number), prompt="", prompt_tokens=ids(), completions=(completion(1.0), completion(0.0)))
        for number in range(count)
    ]


def logprobs_and_gradients(folder: Path, attention: str, groups: list[Group]) -> tuple[Tensor, dict[str, Tensor]]:
    config = ModelConfig.model_validate({"path": str(folder), "dtype": "fp32", "attention": attention})
    model = load_model(config, DataConfig(path="none", max_length=256), device=CUDA, seed=0)
    batch = pack(groups).to(CUDA)
    values = outputs(model, batch).logprobs
    values.sum().backward()  # type: ignore[no-untyped-call]
    return values.detach(), {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}


def test_both_masks_let_the_same_tokens_see_each_other() -> None:
    batch = pack(random_groups(9, length=60)).to(CUDA)
    length = batch.tokens.shape[0]
    blocks = block_mask(Layout(batch=batch)).to_dense()[0, 0].bool()
    seen = dense_mask(batch)
    size = 128
    for row in range(0, length, size):
        for column in range(0, length, size):
            if seen[row : row + size, column : column + size].any():
                assert blocks[row // size, column // size], "a block that some token sees must not be skipped"


def test_flex_and_sdpa_agree_in_log_probabilities_and_gradients(tiny_model: Path) -> None:
    groups = random_groups(12, length=80)
    torch.backends.cuda.matmul.allow_tf32 = False
    flex, flex_gradients = logprobs_and_gradients(tiny_model, "flex", groups)
    dense, dense_gradients = logprobs_and_gradients(tiny_model, "sdpa", groups)
    torch.testing.assert_close(flex, dense, atol=1e-4, rtol=1e-4)
    for name, gradient in dense_gradients.items():
        torch.testing.assert_close(flex_gradients[name], gradient, atol=1e-3, rtol=1e-3)


def test_logits_of_bf16_weights_are_kept_in_fp32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 256, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(1000, 256, device=CUDA, dtype=torch.bfloat16) / 8
    targets = torch.randint(0, 1000, (64,), device=CUDA)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(linear_logprobs(hidden, weight, targets)[0].double(), exact, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_windows_caps_and_sinks_are_the_same_in_the_kernel(tmp_path: Path, family: str) -> None:
    """A window of 60 tokens, sequences of up to 250, two kinds of layers."""
    folder = write_family(tmp_path, family, sliding_window=60, head_dim=32)
    groups = random_groups(6, length=120)
    torch.backends.cuda.matmul.allow_tf32 = False
    flex, flex_gradients = logprobs_and_gradients(folder, "flex", groups)
    dense, dense_gradients = logprobs_and_gradients(folder, "sdpa", groups)
    torch.testing.assert_close(flex, dense, atol=1e-4, rtol=1e-4)
    for name, gradient in dense_gradients.items():
        torch.testing.assert_close(flex_gradients[name], gradient, atol=1e-3, rtol=1e-3)


def test_a_model_in_bf16_is_proved_in_its_own_kernel(tiny_model: Path) -> None:
    config = ModelConfig.model_validate({"path": str(tiny_model), "dtype": "bf16", "attention": "flex"})
    load_model(config, DataConfig(path="none", max_length=256), device=CUDA, seed=0)


def test_fifty_lengths_are_few_compilations_and_a_limit_is_never_passed_in_silence(tiny_model: Path) -> None:
    config = ModelConfig.model_validate({"path": str(tiny_model), "dtype": "bf16", "attention": "flex"})
    model = load_model(config, DataConfig(path="none", max_length=256), device=CUDA, seed=0)
    assert torch._dynamo.config.recompile_limit >= 64 and torch._dynamo.config.fail_on_recompile_limit_hit
    torch._dynamo.utils.counters.clear()
    for length in range(2, 52):
        outputs(model, pack(random_groups(3, length=3 * length)).to(CUDA)).logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


def test_the_block_mask_of_a_long_pass_takes_no_memory() -> None:
    """65,000 tokens: a mask of all pairs would be over 4 GB."""
    length = 2048
    tokens = Completion(text="", tokens=(5,) * length, loss_mask=(True,) * length)
    batch = pack([Group(id="0", prompt="", prompt_tokens=(7,) * length, completions=(tokens,) * 31)]).to(CUDA)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block_mask(Layout(batch=batch))
    assert torch.cuda.max_memory_allocated() - before < 64e6
