"""Loading proves that packed groups get what each sequence gets alone, and refuses what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignment.batch import Batch
from alignment.data.packing import pack
from alignment.errors import ModelError
from alignment.groups import Completion, Group
from alignment.models import check
from alignment.models.check import prove_packing
from alignment.models.forward import outputs, scores
from alignment.models.language_model import LanguageModel
from alignment.models.load import load_model
from alignment.models.logit_transform import LogitTransform
from alignment.rewards.model import longest_input
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from tests.alignment.families import write_family

pytestmark = pytest.mark.usefixtures("one_thread")


def load(folder: Path, *, head: Any = "language", max_length: int = 128, **settings: Any) -> LanguageModel:
    config = ModelConfig.model_validate({"path": str(folder), "dtype": "fp32", **settings})
    data = DataConfig(path="none", max_length=max_length)
    return load_model(config, data, device=torch.device("cpu"), seed=0, head=head)


def long_groups(prompt: int = 20, answers: tuple[int, ...] = (30, 9), count: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def draw(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 250, (size,), generator=generator).tolist())

    def completion(size: int) -> Completion:
        return Completion(text="", tokens=draw(size), loss_mask=(True,) * size)

    return pack(
        [
            Group(
                id=str(number),
                prompt="",
                prompt_tokens=draw(prompt),
                completions=tuple(completion(size) for size in answers),
            )
            for number in range(count)
        ]
    )


def alone(model: LanguageModel, batch: Batch) -> list[Tensor]:
    """Logits of transformers' own forward over every sequence, with its own attention and masks."""
    packed = model.network.config._attn_implementation
    model.network.set_attn_implementation("eager")
    results = []
    for branch in range(batch.num_completions):
        group = batch.group_of_completion[branch]
        mine = (batch.completion_index == branch) | ((batch.group_index == group) & (batch.completion_index == -1))
        results.append(model.network(input_ids=batch.tokens[mine][None], use_cache=False).logits[0])
    model.network.set_attn_implementation(packed)
    return results


def alone_logprobs(model: LanguageModel, batch: Batch) -> Tensor:
    results = []
    for branch, logits in enumerate(alone(model, batch)):
        answer = batch.tokens[batch.completion_index == branch]
        logprobs = logits[-len(answer) - 1 : -1].log_softmax(-1)
        results.append(logprobs.gather(1, answer[:, None]).squeeze(1))
    return torch.cat(results)


HYBRIDS = {
    "lfm2": "conv",
    "qwen3_5": "linear_attention",
    "qwen3_next": "linear_attention",
    "nemotron_h": "linear_attention",
    "mamba": "linear_attention",
    "recurrent_gemma": "recurrent",
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_that_carry_a_state_are_refused_with_their_kind_and_the_figure(tmp_path: Path, family: str) -> None:
    with pytest.raises(ModelError, match=rf"{HYBRIDS[family]}.*differs by up to [0-9.]+ nats.*model-families"):
        load(write_family(tmp_path, family))


@pytest.mark.parametrize("settings", [{"dtype": "bf16"}, {"attention": "sdpa"}, {"lora": {"rank": 2}}])
def test_they_are_refused_in_every_format_and_form_and_with_an_adapter(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match="linear_attention"):
        load(write_family(tmp_path, "qwen3_5_text"), **settings)


def test_as_a_reward_model_or_a_critic_too(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="points of its score"):
        load(write_family(tmp_path, "qwen3_5_text", head="score"), head="score")


@pytest.mark.parametrize(
    ("family", "head", "reason"),
    [
        ("gptj", "language", "KeyError"),
        ("bloom", "language", "cannot be exchanged"),
        ("modernbert-decoder", "language", "bends its logits"),
        ("granite", "score", "cannot be loaded with AutoModelForSequenceClassification"),
        ("deepseek_v4", "language", "cannot be trained on packed groups"),
    ],
)
def test_a_family_that_cannot_be_run_packed_is_refused_in_a_sentence(
    tmp_path: Path, family: str, head: str, reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        load(write_family(tmp_path, family), head=head)


WINDOWED = ("mistral", "gemma2", "gemma3", "gemma3_text", "gpt_oss", "cohere2", "phi3", "olmo3", "llama4_text")


@pytest.mark.parametrize("attention", ["grouped", "sdpa"])
@pytest.mark.parametrize("family", WINDOWED)
def test_beyond_its_window_a_model_says_what_it_says_of_each_sequence(
    tmp_path: Path, family: str, attention: str
) -> None:
    """Windows of 8 tokens, sequences of 50; caps, sinks and chunks as the families have them."""
    folder = write_family(tmp_path, family, sliding_window=8, attention_chunk_size=8)
    model = load(folder, attention=attention)
    batch = long_groups()
    packed = outputs(model, batch).logprobs[batch.loss_mask]
    torch.testing.assert_close(packed, alone_logprobs(model, batch), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "cohere", "granite"])
def test_gradients_through_windows_caps_sinks_and_scales_are_those_of_each_sequence(
    tmp_path: Path, family: str
) -> None:
    special = {"logits_scaling": 3.0} if family == "granite" else {}
    model = load(write_family(tmp_path, family, sliding_window=8, **special))
    batch = long_groups(count=1)

    def gradients(logprobs: Tensor) -> dict[str, Tensor]:
        model.module.zero_grad()
        logprobs.sum().backward()  # type: ignore[no-untyped-call]
        return {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}

    packed = gradients(outputs(model, batch).logprobs[batch.loss_mask])
    for name, gradient in gradients(alone_logprobs(model, batch)).items():
        scale = gradient.abs().max() + 1e-6
        torch.testing.assert_close(packed[name] / scale, gradient / scale, atol=2e-4, rtol=0, msg=name)


def test_what_models_do_to_their_logits_is_measured(tmp_path: Path) -> None:
    def transform(family: str, **settings: Any) -> LogitTransform:
        return load(write_family(tmp_path / family / str(settings), family, **settings)).logit_transform

    assert transform("llama") == LogitTransform()
    assert transform("gemma2", final_logit_softcapping=7.5) == LogitTransform(cap=7.5)
    assert transform("gemma2", final_logit_softcapping=None) == LogitTransform()
    assert transform("cohere", logit_scale=0.3) == LogitTransform(scale=0.3)
    assert transform("granite", logits_scaling=8.0) == LogitTransform(scale=0.125)
    assert transform("gemma4", final_logit_softcapping=20.0) == LogitTransform(cap=20.0), "nested in text_config"


@pytest.mark.parametrize("family", ["opt", "seed_oss", "gpt2", "mixtral", "phimoe"])
def test_nothing_random_is_left_on_in_training(tmp_path: Path, family: str) -> None:
    rates = dict.fromkeys(("dropout", "attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop"), 0.1)
    jitters = dict.fromkeys(("router_jitter_noise", "input_jitter_noise"), 0.1)
    model = load(write_family(tmp_path, family, **rates, **jitters))
    batch = long_groups(prompt=5, answers=(6, 7))
    model.module.train()
    first, second = (outputs(model, batch).logprobs for _ in range(2))
    assert torch.equal(first, second)
    model.module.eval()
    torch.testing.assert_close(first[batch.loss_mask], alone_logprobs(model, batch), atol=2e-5, rtol=1e-5)


def first_layer(model: LanguageModel) -> nn.Module:
    return model.decoder.layers[0].mlp  # type: ignore[no-any-return]


def test_what_draws_at_random_in_training_is_refused(tiny_model: Path) -> None:
    model = load(tiny_model)
    first_layer(model).register_forward_hook(lambda part, _, out: out + part.training * 1e-2 * torch.randn_like(out))
    with pytest.raises(ModelError, match=r"two passes over one batch in train mode differ by .* nats"):
        prove_packing(model, max_length=96, path="tiny")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_the_least_leak_from_a_neighbour_is_refused_in_both_formats(tiny_model: Path, dtype: str, size: float) -> None:
    """A short convolution over the row, as hybrid models have it, that weighs a thousandth."""
    model = load(tiny_model, dtype=dtype)
    first_layer(model).register_forward_hook(lambda _, __, out: out + size * out.roll(1, dims=1))
    with pytest.raises(ModelError, match="differs by up to"):
        prove_packing(model, max_length=96, path="tiny")


def test_a_mask_that_forgets_the_window_is_refused(tmp_path: Path) -> None:
    model = load(write_family(tmp_path, "mistral", sliding_window=8))
    stock = model.network.model.config.sliding_window
    assert stock == 8, "it is narrowed for the proof only"

    def forget(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        packed = not isinstance(kwargs.get("attention_mask"), Tensor)
        return args, {**kwargs, "attention_mask": without_window(kwargs["attention_mask"]) if packed else
                      kwargs["attention_mask"]}  # fmt: skip

    def without_window(mask: Any) -> Any:
        from alignment.models.attention.grouped import grouped_mask

        return grouped_mask(mask.layout, None, torch.float32)

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(forget, with_kwargs=True)
    with pytest.raises(ModelError, match="differs by up to"):
        prove_packing(model, max_length=128, path="mistral")
    prove_packing(model, max_length=8, path="mistral")  # no sequence of this run is longer than the window


@pytest.mark.parametrize("widened", [1 << 30, 0])
def test_the_proof_leaves_everything_as_it_was(tiny_model: Path, widened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "FP32_AT_ONCE", widened)
    model = load(tiny_model, dtype="bf16", lora={"rank": 2, "dropout": 0.5})
    model.module.train()
    model.decoder.layers[0].eval()
    weights = {name: (w, w.data_ptr(), w.clone()) for name, w in model.module.named_parameters()}
    modes = [part.training for part in model.module.modules()]
    rates = [part.p for part in model.module.modules() if isinstance(part, nn.Dropout)]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    prove_packing(model, max_length=96, path="tiny")
    assert torch.equal(torch.rand(3), expected), "the process's random numbers belong to the run"
    for name, weight in model.module.named_parameters():
        same, address, values = weights[name]
        assert weight is same and weight.data_ptr() == address and torch.equal(weight, values)
    assert [part.training for part in model.module.modules()] == modes
    assert [part.p for part in model.module.modules() if isinstance(part, nn.Dropout)] == rates and 0.5 in rates
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.module.modules())
    assert "forward" not in vars(model.decoder)


def test_a_model_of_mixtures_in_bf16_is_accepted_whatever_rounding_does_to_its_experts(tmp_path: Path) -> None:
    for seed, family in enumerate(("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")):
        load(write_family(tmp_path / family, family), dtype="bf16", max_length=64 + seed)


def test_an_adapter_with_weights_and_dropout_is_proved_as_it_is(tmp_path: Path, tiny_model: Path) -> None:
    model = load(tiny_model, lora={"rank": 2, "alpha": 4.0})
    for name, weight in model.module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    model.module.save_pretrained(tmp_path / "adapter")
    started = load(tiny_model, lora={"rank": 2, "alpha": 4.0, "dropout": 0.3, "start": str(tmp_path / "adapter")})
    batch = long_groups()
    started.module.eval()
    packed = outputs(started, batch).logprobs[batch.loss_mask]
    torch.testing.assert_close(packed, alone_logprobs(started, batch), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("max_length", [2, 3, 9, 20])
def test_short_windows_of_a_run_are_proved_too(tmp_path: Path, max_length: int) -> None:
    load(write_family(tmp_path, "gpt2", n_positions=20), max_length=max_length)


def test_positions_stay_a_limit_also_where_they_are_nested_or_called_otherwise(tmp_path: Path) -> None:
    for family in ("gpt2", "gemma3"):
        with pytest.raises(ModelError, match=r"data.max_length \(257\) exceeds the 256 positions"):
            load(write_family(tmp_path / family, family), max_length=257)


def test_an_unused_window_is_no_limit(tmp_path: Path) -> None:
    """Qwen2-MoE writes 0 where it has none; Qwen2 writes one that it does not use."""
    load(write_family(tmp_path / "moe", "qwen2_moe", sliding_window=0), max_length=200)
    load(write_family(tmp_path / "dense", "qwen2", sliding_window=8, use_sliding_window=False), max_length=200)


def test_a_reward_model_reads_beyond_its_window_and_needs_no_cap_of_a_head_that_it_has_not(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "gemma2", head="score", sliding_window=8)
    assert longest_input(str(folder), None) == 256
    model = load(folder, head="score", max_length=200)
    batch = long_groups()
    expected = torch.stack([logits[0] for logits in alone(model, batch)])
    torch.testing.assert_close(scores(model, batch), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
def test_activations_that_are_computed_again_meet_the_same_masks(tmp_path: Path, family: str) -> None:
    folder = write_family(tmp_path, family, sliding_window=8)
    batch = long_groups()

    def gradients(again: bool) -> list[Tensor]:
        model = load(folder, gradient_checkpointing=again)
        model.module.train()
        outputs(model, batch).logprobs.sum().backward()  # type: ignore[no-untyped-call]
        return [weight.grad for weight in model.module.parameters() if weight.grad is not None]

    for kept, computed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(computed, kept, atol=1e-5, rtol=1e-4)


def test_a_packed_batch_is_never_run_with_an_attention_that_ignores_its_groups(tiny_model: Path) -> None:
    model = load(tiny_model)
    model.network.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="'sdpa' just now"):
        outputs(model, long_groups())
