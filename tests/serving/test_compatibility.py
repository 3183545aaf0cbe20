"""What an engine may take and change to is decided before the engine is touched, and told in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from alignment.errors import CheckpointError, ModelError, ServingError
from serving.registry.compatibility import LoraCapacity, adapter_of, capacity_for, check_compatible, check_servable
from tests.serving.tiny import HIDDEN, SETTINGS, VOCABULARY, adapter, lora, numbers, whole


def test_a_sound_adapter_and_a_sound_model_may_be_served(tmp_path: Path) -> None:
    check_servable(adapter(tmp_path / "adapter"))
    check_servable(whole(tmp_path / "whole"))


def test_another_adapter_on_the_same_base_fits(tmp_path: Path) -> None:
    serving, candidate = adapter(tmp_path / "1"), adapter(tmp_path / "2", seed=5)
    check_compatible(candidate, serving)


def test_other_weights_of_the_same_model_fit(tmp_path: Path) -> None:
    settings = {"attention_dropout": 0.0, "transformers_version": "6", "use_cache": False, "_name_or_path": "x"}
    check_compatible(whole(tmp_path / "2", seed=5, **settings), whole(tmp_path / "1", attention_dropout=0.1))


def test_a_setting_that_only_one_config_names_is_no_difference(tmp_path: Path) -> None:
    check_compatible(whole(tmp_path / "2", rope_parameters={"theta": 1}), whole(tmp_path / "1", rope_theta=1))


def test_an_adapter_on_another_base_does_not_fit(tmp_path: Path) -> None:
    serving = adapter(tmp_path / "1")
    with pytest.raises(ServingError, match=r"an adapter on org/other, and this endpoint serves org/base"):
        check_compatible(adapter(tmp_path / "2", base_model_name_or_path="org/other"), serving)


def test_one_base_by_two_paths_is_one_base(tmp_path: Path) -> None:
    base = whole(tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    serving = adapter(tmp_path / "1", base_model_name_or_path=str(base))
    check_compatible(adapter(tmp_path / "2", base_model_name_or_path=str(tmp_path / "link")), serving)


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    with pytest.raises(ModelError, match=gone):
        check_servable(adapter(tmp_path / "1", base_model_name_or_path=gone))


@pytest.mark.parametrize(("serving", "candidate", "fits"), [(8, 8, True), (9, 16, True), (16, 9, True), (8, 9, False)])
def test_an_engine_takes_ranks_up_to_the_next_that_vllm_knows(
    tmp_path: Path, serving: int, candidate: int, fits: bool
) -> None:
    folders = adapter(tmp_path / "2", rank=candidate), adapter(tmp_path / "1", rank=serving)
    if fits:
        check_compatible(*folders)
    else:
        with pytest.raises(ServingError, match="rank 9, and the engines were started for ranks up to 8"):
            check_compatible(*folders)


def test_layers_that_engines_were_not_started_for_are_refused(tmp_path: Path) -> None:
    serving = adapter(tmp_path / "1", modules=("q_proj", "v_proj"))
    check_compatible(adapter(tmp_path / "2", modules=("q_proj",)), serving)
    with pytest.raises(ServingError, match=r"adapts o_proj, and the engines were started for q_proj, v_proj"):
        check_compatible(adapter(tmp_path / "3", modules=("q_proj", "o_proj")), serving)


def test_a_pattern_of_layers_leaves_room_for_all(tmp_path: Path) -> None:
    serving = adapter(tmp_path / "1", target_modules=".*_proj")
    check_compatible(adapter(tmp_path / "2", modules=("o_proj",)), serving)


def test_an_engine_with_room_for_several_adapters_can_go_back_to_the_largest(tmp_path: Path) -> None:
    large, small = adapter(tmp_path / "1", rank=16), adapter(tmp_path / "2", rank=4, modules=("k_proj",))
    with pytest.raises(ServingError, match="rank 16"):
        check_compatible(large, small)
    capacity = capacity_for(adapter_of(folder, folder.name) for folder in (large, small))
    assert capacity == LoraCapacity(rank=16, target_modules=("k_proj", "q_proj", "v_proj"))
    check_compatible(large, small, capacity=capacity)


def test_layers_that_an_adapter_names_by_whole_paths_are_known_by_their_last_names(tmp_path: Path) -> None:
    paths = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("v_proj", "q_proj")]
    named = adapter_of(adapter(tmp_path / "1", target_modules=paths), "aligned")
    assert named.target_modules == ("q_proj", "v_proj")


def test_an_adapter_of_other_shapes_does_not_fit(tmp_path: Path) -> None:
    wide = adapter(tmp_path / "2", modules=("q_proj",), tensors=lora("q_proj", rank=8, inputs=2 * HIDDEN))
    with pytest.raises(
        ServingError, match=r"q_proj is from 32 to 16 numbers, and the one that is served from 16 to 16"
    ):
        check_compatible(wide, adapter(tmp_path / "1"))


@pytest.mark.parametrize("order", ["adapter", "whole"])
def test_an_adapter_and_a_whole_model_do_not_fit(tmp_path: Path, order: str) -> None:
    folders = adapter(tmp_path / "adapter"), whole(tmp_path / "whole")
    with pytest.raises(ServingError, match=f"{order} is a"):
        check_compatible(*(folders if order == "adapter" else reversed(folders)))


def test_a_model_with_another_setting_is_another_model(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="num_attention_heads is 8, and in that of the one that is served 4"):
        check_compatible(whole(tmp_path / "2", num_attention_heads=8), whole(tmp_path / "1"))


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"model.norm.weight": np.ones(4)}, r"it lacks model\.embed_tokens\.weight, and has none besides"),
        ({"a": np.ones(4), "model.norm.weight": np.ones(4)}, r"and has a besides"),
        ({"model.embed_tokens.weight": numbers(64, 16, seed=0), "model.norm.weight": np.ones(16)}, r"shape \[64, 16\]"),
    ],
)
def test_other_tensors_are_another_model(tmp_path: Path, tensors: dict[str, Any], why: str) -> None:
    with pytest.raises(ServingError, match=why):
        check_compatible(whole(tmp_path / "2", tensors=tensors), whole(tmp_path / "1"))


def test_the_number_format_may_differ_for_the_engine_has_its_own(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": numbers(32, 16, seed=0, dtype="float16"), "model.norm.weight": np.ones(16)}
    check_compatible(whole(tmp_path / "2", tensors=tensors), whole(tmp_path / "1"))


def test_a_tied_output_head_may_be_stored_or_not(tmp_path: Path) -> None:
    embedding, norm = numbers(32, 16, seed=0), np.ones(16)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding, "model.norm.weight": norm}
    stored = whole(tmp_path / "1", tie_word_embeddings=True, tensors=tensors)
    check_compatible(whole(tmp_path / "2", tie_word_embeddings=True), stored)
    with pytest.raises(ServingError, match=r"it lacks lm_head\.weight"):
        check_compatible(whole(tmp_path / "4"), whole(tmp_path / "3", tensors=tensors))


@pytest.mark.parametrize("make", [adapter, whole])
def test_another_vocabulary_does_not_fit(tmp_path: Path, make: Any) -> None:
    serving, candidate = make(tmp_path / "1"), make(tmp_path / "2")
    (candidate / "tokenizer.json").write_text(json.dumps({**VOCABULARY, "padding": {"strategy": "BatchLongest"}}))
    check_compatible(candidate, serving)
    (candidate / "tokenizer.json").write_text(json.dumps({**VOCABULARY, "added_tokens": [{"id": 2, "content": "<x>"}]}))
    with pytest.raises(ServingError, match=r"another vocabulary .*tokenizer\.json"):
        check_compatible(candidate, serving)


@pytest.mark.parametrize("make", [adapter, whole])
def test_another_chat_template_does_not_fit_wherever_it_is_written(tmp_path: Path, make: Any) -> None:
    serving, candidate = make(tmp_path / "1"), make(tmp_path / "2")
    (serving / "chat_template.jinja").write_text("{{ messages }}")
    (candidate / "chat_template.jinja").unlink(missing_ok=True)
    settings = candidate / "tokenizer_config.json"
    settings.write_text("{}")
    check_compatible(candidate, serving)
    settings.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    check_compatible(candidate, serving)
    settings.write_text(json.dumps({"chat_template": "{{ messages[0] }}"}))
    with pytest.raises(ServingError, match="another chat template"):
        check_compatible(candidate, serving)


def test_an_adapter_without_a_tokenizer_is_held_against_its_base(tmp_path: Path) -> None:
    base = whole(tmp_path / "base")
    folders = [adapter(tmp_path / str(number), base_model_name_or_path=str(base)) for number in (1, 2)]
    (folders[0] / "tokenizer.json").unlink()
    check_compatible(folders[1], folders[0])
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(ServingError, match="another vocabulary"):
        check_compatible(folders[1], folders[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_found_in_any_format(tmp_path: Path, dtype: torch.dtype, wrong: float) -> None:
    weight = torch.full((32, 16), torch.finfo(dtype).max, dtype=dtype)
    folder = whole(tmp_path / "1")
    save_file({"fine": weight, "model.norm.weight": -weight}, folder / "model.safetensors")
    check_servable(folder)
    weight[31, 15] = wrong
    save_file({"a": torch.ones(3), "model.norm.weight": weight}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or an infinity"):
        check_servable(folder)


def test_whole_numbers_are_taken_as_they_are(tmp_path: Path) -> None:
    check_servable(whole(tmp_path / "1", tensors={"mask": np.full(4, -1, dtype="int16"), "none": np.ones((0, 4))}))


@pytest.mark.parametrize(
    "kind",
    [
        {"rank": 1000},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 4]]},
        {"modules_to_save": ["lm_head"]},
        {"peft_type": "IA3"},
    ],
)
def test_adapters_that_vllm_cannot_serve_are_refused(tmp_path: Path, kind: dict[str, Any]) -> None:
    with pytest.raises(ServingError, match="merge it"):
        check_servable(adapter(tmp_path / "1", **kind))


def test_reward_models_are_sent_elsewhere(tmp_path: Path) -> None:
    models = (
        adapter(tmp_path / "1", task_type="SEQ_CLS", modules_to_save=["score"]),
        whole(tmp_path / "2", architectures=["LlamaForSequenceClassification"]),
    )
    for model in models:
        with pytest.raises(ServingError, match="raylign reward-server"):
            check_servable(model)


@pytest.mark.parametrize(
    "tensors",
    [
        {"base_model.model.x.q_proj.lora_A.weight": np.ones((8, 16))},
        {**lora("q_proj", rank=8), "base_model.model.x.bias": np.ones(4)},
        {"x.q_proj.lora_A.weight": np.ones((8, 16)), "x.q_proj.lora_B.weight": np.ones((16, 4))},
        lora("q_proj", rank=4),
        {},
    ],
    ids=["half", "something else", "two ranks", "not the rank of the config", "nothing"],
)
def test_tensors_that_are_no_adapter_are_damage(tmp_path: Path, tensors: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        check_servable(adapter(tmp_path / "1", tensors=tensors))


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, length: int) -> None:
    folder = whole(tmp_path / "1")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or incomplete"):
        check_servable(folder)


def test_every_shard_has_to_be_there(tmp_path: Path) -> None:
    folder = whole(tmp_path / "1")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        check_servable(folder)
    places = {"model.embed_tokens.weight": "model-1.safetensors", "model.norm.weight": "model-1.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    check_servable(folder)
    check_compatible(folder, whole(tmp_path / "2"))
    index.write_text(json.dumps({"weight_map": {**places, "lm_head.weight": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        check_servable(folder)
    for damage in ("[]", "{", '{"weight_map": 1}', '{"weight_map": {"a": "../x.safetensors"}}'):
        index.write_text(damage)
        with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
            check_servable(folder)


@pytest.mark.parametrize("damage", ["", "[]", '{"r": "8"}', '{"r": 8}', '{"rank_pattern": 3, "r": 8}'])
def test_a_damaged_adapter_config_is_named(tmp_path: Path, damage: str) -> None:
    folder = adapter(tmp_path / "1")
    (folder / "adapter_config.json").write_text(damage)
    with pytest.raises((CheckpointError, ModelError), match=r"adapter_config\.json"):
        check_servable(folder)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    folder = whole(tmp_path / "1")
    (folder / "config.json").write_text(json.dumps(SETTINGS)[:-1])
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        check_servable(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        check_servable(folder)
