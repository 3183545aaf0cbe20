"""What people name as a model: runs, checkpoints, adapters of every kind, classifiers. Each starts, or says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from alignment.distributed.world import World
from alignment.errors import AlignmentError, CheckpointError, DataError, ModelError
from alignment.models.folders import model_source, with_checkpoints
from alignment.models.load import LanguageModel, load_model
from alignment.models.roles import Roles
from alignment.run_folder import checkpoint_or_path, find_checkpoint
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from alignment.settings.run import RunConfig
from cluster.config import ClusterRunConfig
from cluster.launch import run as launch
from tests.alignment.test_train import damage, run
from tests.conftest import make_tokenizer, pair_rows

Settings = dict[str, Any]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))


def loaded(path: Path | str, head: Any = "language", **settings: Any) -> LanguageModel:
    config = ModelConfig.model_validate({"path": str(path), "dtype": "fp32", **settings})
    return load_model(config, DataConfig(path="none", max_length=96), device=torch.device("cpu"), seed=0, head=head)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(20)[None]).logits
    return result


def adapter_of(base: Path, folder: Path, *, words: int = 0, tokenizer: bool = True, **settings: Any) -> Path:
    """An adapter that changes what the model says; with `words` more than the base, if any."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    names = AutoTokenizer.from_pretrained(base)
    if words:
        names.add_special_tokens({"additional_special_tokens": [f"<|{number}|>" for number in range(words)]})
        model.resize_token_embeddings(len(names))
    adapted = get_peft_model(
        model, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})
    )
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    adapted.save_pretrained(folder)
    if tokenizer:
        names.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------- runs


def test_the_folder_of_a_run_is_its_newest_intact_checkpoint(run_settings: Settings, tmp_path: Path) -> None:
    """As `raylign train` leaves it, with the run's own config.json, which is not a model's."""
    first = ClusterRunConfig.model_validate({**run_settings, "name": "first", "checkpoint": {"every": 2}})
    launch(first)
    newest = find_checkpoint(first.folder)
    for path in (first.folder, first.run_folder.checkpoints_folder, newest):
        assert Path(model_source(str(path))) == newest.resolve()
    damage("a flipped byte", newest / "model.safetensors")
    second = ClusterRunConfig.model_validate({**run_settings, "model": {"path": str(first.folder), "dtype": "fp32"}})
    launch(second)
    state = json.loads((find_checkpoint(second.folder) / "trainer" / "state.json").read_text())
    assert state["identity"]["model.path"] == str(first.run_folder.checkpoints_folder / "step-00000002"), (
        "not 'the newest'"
    )


def test_a_run_without_a_checkpoint_says_so(run_settings: Settings) -> None:
    folder = Path(run_settings["output"]) / "empty"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(RunConfig.model_validate({**run_settings, "name": "empty"}).model_dump_json())
    with pytest.raises(CheckpointError, match=r"this run has none \(yet\)"):
        loaded(folder)


def test_a_model_s_folder_with_other_things_in_it_is_a_model(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "checkpoints").mkdir()
    assert checkpoint_or_path(str(folder)) == str(folder)
    assert model_source(str(folder)) == str(folder)


def test_every_place_that_names_a_model_may_name_a_run(run_settings: Settings) -> None:
    folder = run(run_settings)
    named = RunConfig.model_validate(
        {
            **run_settings,
            "algorithm": {"name": "ppo"},
            "model": {"path": str(folder), "lora": {"start": str(folder)}},
            "critic": {"path": str(folder)},
            "rewards": [{"name": "model", "path": str(folder)}, {"name": "sentiment"}],
            "eval_rewards": [{"name": "model", "path": str(folder)}],
        }
    )
    pinned = with_checkpoints(named)
    places = [pinned.model.path, pinned.model.lora and pinned.model.lora.start, pinned.critic.path]
    places += [getattr(scorer, "path", None) for scorer in (pinned.rewards[0], pinned.eval_rewards[0])]
    assert places == [str(find_checkpoint(folder))] * 5
    assert with_checkpoints(pinned) == pinned


def test_a_damaged_checkpoint_of_somebody_else_s_run_is_passed_over_where_it_cannot_be_moved(
    run_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run(run_settings, checkpoint={"every": 2})
    damage("a flipped byte", folder / "checkpoints" / "step-00000004" / "model.safetensors")
    (folder / "quarantine").write_text("a file in the way, as nothing can be made in a read-only folder")
    assert checkpoint_or_path(str(folder)).endswith("step-00000002")
    assert "cannot be moved" in caplog.text


def test_who_wants_the_model_alone_does_not_read_the_trainer_s_state(run_settings: Settings) -> None:
    folder = run(run_settings)
    damage("a flipped byte", find_checkpoint(folder) / "trainer" / "tensors.safetensors")
    assert checkpoint_or_path(str(folder)).endswith("step-00000004")


def test_a_reward_model_is_no_actor_and_an_actor_no_reward_model(run_settings: Settings) -> None:
    reward = run({**run_settings, "name": "reward"}, algorithm={"name": "reward_model"})
    with pytest.raises(ModelError, match="a reward model, which writes no text"):
        run(run_settings, model={"path": str(reward)})
    adapted = {**run_settings["model"], "lora": {"rank": 2}}
    reward = run({**run_settings, "name": "adapter", "model": adapted}, algorithm={"name": "reward_model"})
    with pytest.raises(ModelError, match="a reward model, which writes no text"):
        run(run_settings, model={"path": str(reward)})
    actor = run({**run_settings, "name": "actor"})
    scorer = {"algorithm": {"name": "grpo"}, "rewards": [{"name": "model", "path": str(actor)}]}
    rollout = {"engine": "local", "completions": 2, "max_tokens": 4}
    with pytest.raises(ModelError, match="without a trained score head"):
        run(run_settings, **scorer, rollout=rollout)


def test_a_model_whose_files_lack_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "torn")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 of its weights, such as .*up_proj.weight, which would be random"):
        loaded(folder)


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("modules", [["embed_tokens", "lm_head"], ["embed_tokens"]])
def test_an_adapter_with_more_words_than_its_base_is_merged_with_them(
    modules: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny_model, tmp_path / "adapter", words=2, modules_to_save=modules)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    size = base.config.vocab_size + 2
    base.resize_token_embeddings(size)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    model = loaded(adapter)
    assert model.network.get_input_embeddings().num_embeddings == size == len(model.tokenizer)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(model.source)), expected, atol=1e-4, rtol=1e-4
    )


def test_an_adapter_on_the_embeddings_of_a_resized_base_is_merged_with_them(tiny_model: Path, tmp_path: Path) -> None:
    targets = ["q_proj", "embed_tokens"]
    adapter = adapter_of(tiny_model, tmp_path / "adapter", words=2, target_modules=targets)
    assert loaded(adapter).network.get_input_embeddings().num_embeddings == len(make_tokenizer()) + 2


def test_an_adapter_that_lacks_the_embeddings_it_was_trained_with_is_refused_with_both_sizes(
    tiny_model: Path, tmp_path: Path
) -> None:
    targets = ["q_proj", "embed_tokens"]
    adapter = adapter_of(tiny_model, tmp_path / "adapter", words=2, target_modules=targets)
    file = adapter / "adapter_model.safetensors"
    kept = {name: weight for name, weight in load_file(file).items() if "base_layer" not in name}
    save_file({name: weight for name, weight in kept.items() if "lora" in name}, file)
    size = len(make_tokenizer())
    with pytest.raises(ModelError, match=rf"vocabulary of {size + 2} tokens, its base .* has {size}"):
        loaded(adapter)


def test_an_adapter_without_a_tokenizer_has_its_base_s(tiny_model: Path, tmp_path: Path) -> None:
    model = loaded(adapter_of(tiny_model, tmp_path / "adapter", tokenizer=False))
    assert len(model.tokenizer) == len(make_tokenizer())
    assert model.tokenizer.chat_template


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"bias": "lora_only"}, {"use_rslora": True}])
def test_an_adapter_of_another_kind_is_merged_as_peft_reads_it(
    kind: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny_model, tmp_path / "adapter", **kind)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter))
    merged = AutoModelForCausalLM.from_pretrained(model_source(str(adapter)))
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ({"use_rslora": True}, "use_rslora is True in it and not there here"),
        ({"use_dora": True}, r"lora_magnitude_vector is \[128\] in it and not there here"),
        ({"words": 2, "modules_to_save": ["embed_tokens"]}, r"lm_head.weight is \[\d+, 64\] in it and not there here"),
        ({"r": 3}, r"is \[3, 64\] in it and \[2, 64\] here"),
    ],
)
def test_an_adapter_that_training_cannot_go_on_from_is_refused_with_what_differs(
    kind: Settings, named: str, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny_model, tmp_path / "adapter", lora_alpha=8, **kind)
    lora = {"rank": 2, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "start": str(adapter)}
    with pytest.raises(ModelError, match=named):
        loaded(tiny_model, lora=lora)


def test_an_adapter_whose_base_is_missing_names_both(tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=f"{base} does not exist"):
        loaded(adapter)


def test_a_base_that_has_changed_is_merged_anew(tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    before = model_source(str(adapter))
    weights = {name: weight * 2 for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert model_source(str(adapter)) != before


def test_a_critic_does_not_go_on_from_the_actor_s_adapter(run_settings: Settings) -> None:
    """B7 of the review: an adapter of a language model has no score head to go on from."""
    lora = {"rank": 2}
    start = run({**run_settings, "name": "start", "model": {**run_settings["model"], "lora": lora}})
    settings = {**run_settings, "algorithm": {"name": "ppo"}, "rewards": [{"name": "sentiment"}]}
    settings["model"] = {**run_settings["model"], "lora": {**lora, "start": str(start)}}
    roles = Roles.build(RunConfig.model_validate(settings), World())
    assert roles.critic is not None and roles.critic.model is not None
    heads = {name.rpartition(".")[2] for name, _ in roles.critic.model.module.named_parameters()}
    assert heads, "a critic with an adapter and a head of its own"


# --------------------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("place", ["reward", "critic", "trained"])
def test_a_classifier_with_several_labels_is_no_reward_model(
    place: str, labels: int, run_settings: Settings, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    folder = tmp_path / "classifier"
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=512, num_labels=labels, pad_token_id=0,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    sampled = {
        "algorithm": {"name": "ppo"},
        "rollout": {"engine": "local", "completions": 2, "max_tokens": 4},
        "rewards": [{"name": "sentiment"}],
    }
    settings: dict[str, Settings] = {
        "reward": {**sampled, "rewards": [{"name": "model", "path": str(folder)}]},
        "critic": {**sampled, "critic": {"path": str(folder)}},
        "trained": {"algorithm": {"name": "reward_model"}, "model": {"path": str(folder)}},
    }
    with pytest.raises(ModelError, match=f"the classifier has {labels} labels, a reward model has one"):
        run(run_settings, **settings[place])


# ------------------------------------------------------------------------------------------------- generation settings

UNSAVEABLE: dict[str, Settings] = {
    "Vicuna": {"temperature": 0.9, "top_p": 0.6},
    "Llama 2 chat": {"temperature": 0.9, "top_p": 0.6, "do_sample": False},
    "typical": {"typical_p": 0.9},
    "min_p": {"min_p": 0.05, "top_k": 20},
    "beams": {"num_beams": 1, "length_penalty": 2.0},
    "beams and sampling": {"num_beams": 1, "early_stopping": True, "temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "scores": {"output_scores": True},
}


@pytest.mark.parametrize("kind", UNSAVEABLE)
def test_generation_settings_that_transformers_does_not_write_are_mended_when_a_model_is_loaded(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = unsaveable(kind, tiny_model, tmp_path)
    with pytest.raises(ValueError, match=r"."):
        GenerationConfig.from_pretrained(folder).save_pretrained(tmp_path / "refused")
    loaded(folder).network.generation_config.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert saved.eos_token_id == make_tokenizer().eos_token_id
    if kind in ("Vicuna", "typical", "min_p", "beams and sampling"):
        assert saved.do_sample, "sampling settings mean sampling"
        assert {key: value for key, value in UNSAVEABLE[kind].items() if "_p" in key}.items() <= saved.to_dict().items()


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_the_checkpoint_of_a_model_with_such_settings_can_be_trained_again(
    lora: Settings | None, run_settings: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    folder = unsaveable("Vicuna", tiny_model, tmp_path)
    end = run(run_settings, model={"path": str(folder), "dtype": "fp32", "lora": lora}, steps=1)
    assert loaded(end).network.generation_config.temperature == 0.9


def unsaveable(kind: str, model: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | UNSAVEABLE[kind]))
    return folder


@pytest.mark.parametrize(
    ("targets", "head", "largest"),
    [("all-linear", "language", 64), (["q_proj", "down_proj"], "language", 64), ("all-linear", "score", 64)],
)
def test_an_adapter_whose_rank_is_above_that_of_every_layer_is_refused(
    tiny_model: Path, targets: Any, head: Any, largest: int
) -> None:
    assert loaded(tiny_model, head, lora={"rank": largest, "target_modules": targets}).has_adapter
    for rank in (largest + 1, 10**9):
        with pytest.raises(ModelError, match=rf"model\.lora\.rank \({rank}\) is above .* to {largest} at most"):
            loaded(tiny_model, head, lora={"rank": rank, "target_modules": targets})


def test_errors_about_models_are_ours(run_settings: Settings, tmp_path: Path, write: Callable[..., Path]) -> None:
    for path in (write("not a model at all"), tmp_path):
        with pytest.raises(AlignmentError):
            run(run_settings, model={"path": str(path)})


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A folder whose config.json is the text."""

    def make(text: str) -> Path:
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "config.json").write_text(text)
        return folder

    return make


# ------------------------------------------------------------------------------------------------------ vocabularies


@pytest.fixture
def unresized(tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer was given two tokens, without the embeddings for them."""
    folder = shutil.copytree(tiny_model, tmp_path / "unresized")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("where", ["prompt", "chosen"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_token_that_the_model_does_not_embed_is_refused_with_its_row_and_both_figures(
    where: str, streaming: bool, run_settings: Settings, unresized: Path, write_rows: Callable[..., Path]
) -> None:
    rows = pair_rows(6)
    rows[4][where] += " <tool>"
    size = len(make_tokenizer())
    data = {"path": str(write_rows(rows)), "max_length": 96, "streaming": streaming, "shuffle": False}
    settings = {**run_settings, "data": data, "model": {"path": str(unresized), "dtype": "fp32"}}
    said = rf"rows.jsonl:5: token {size} \('<tool>'\) is beyond the model, which embeds {size} ids; .* up to {size + 1}"
    with pytest.raises(DataError, match=said):
        run(settings)


def test_ids_that_no_row_has_are_harmless(run_settings: Settings, unresized: Path) -> None:
    run(run_settings, model={"path": str(unresized), "dtype": "fp32"}, steps=1)


def test_rows_with_such_tokens_are_left_out_where_bad_rows_are(
    run_settings: Settings, unresized: Path, write_rows: Callable[..., Path]
) -> None:
    rows = pair_rows(12)
    rows[4]["chosen"] += " <tool>"
    data = {"path": str(write_rows(rows)), "max_length": 96, "on_bad_row": "skip", "bad_row_budget": 0.2}
    folder = run(run_settings, data=data, model={"path": str(unresized), "dtype": "fp32"}, steps=1)
    assert len((folder / "bad_rows.jsonl").read_text().splitlines()) == 1


def test_a_reward_model_s_padding_is_among_its_embeddings(unresized: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(unresized)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<beyond>"]})
    tokenizer.save_pretrained(unresized)
    model = loaded(unresized, head="score")
    assert model.network.config.pad_token_id < model.num_embeddings


def test_more_embeddings_than_ids_are_fine(run_settings: Settings, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "padded"
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    network.resize_token_embeddings(len(make_tokenizer()), pad_to_multiple_of=64)
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    run(run_settings, model={"path": str(folder), "dtype": "fp32"}, steps=1)


def test_a_reward_model_s_adapter_as_peft_alone_saves_it_gives_rewards(
    tiny_model: Path, run_settings: Settings, tmp_path: Path
) -> None:
    """Without config.json and tokenizer, which ours have beside the adapter."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    adapted.save_pretrained(tmp_path / "adapter")
    model = loaded(tmp_path / "adapter", head="score")
    assert torch.equal(model.network.score.weight, adapted.base_model.model.score.modules_to_save["default"].weight)
    rollout = {"engine": "local", "completions": 2, "max_tokens": 4}
    rewards = [{"name": "model", "path": str(tmp_path / "adapter")}]
    run(run_settings, algorithm={"name": "grpo"}, rewards=rewards, rollout=rollout, steps=1)
