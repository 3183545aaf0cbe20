"""The models of an endpoint: their settings, their folders, their names, and which of them a request means."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import ConfigError, ModelError, ServingError
from alignment.settings.load import load_config
from serving.config import ServeConfig, load_serve_config
from serving.registry.model_id import ModelId
from serving.registry.models import (
    EndpointModel,
    ModelNotNamed,
    ServedModels,
    UnknownModel,
    model_configs,
    publish_models,
)
from serving.registry.served_model import ServedModel
from serving.registry.versions import Registry
from tests.serving.tiny import adapter, whole


def config_of(folder: Path, **models: Path) -> ServeConfig:
    """An endpoint of `assistant` and of further models."""
    further: Any = {name: {"checkpoint": str(checkpoint)} for name, checkpoint in models.items()}
    checkpoint = folder / "assistant"
    if not checkpoint.exists():
        whole(checkpoint)
    return ServeConfig(checkpoint=str(checkpoint), name="assistant", folder=str(folder / "serving"), models=further)


def served(name: str, base_name: str | None = None) -> EndpointModel:
    model = ServedModel(name=name, source="/model", base_name=base_name, adapter=None, lora_capacity=None)
    return EndpointModel(config=ServeConfig(checkpoint="x"), served_model=model, registry=Registry(Path("/nowhere")))


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_a_model_has_its_own_settings_and_the_endpoints_others() -> None:
    config = ServeConfig.model_validate(
        {
            "checkpoint": "runs/assistant",
            "max_model_len": 8192,
            "max_replicas": 3,
            "rewards": {"min_replicas": 1, "beta": 0.2},
            "models": {
                "coder": {"checkpoint": "runs/coder", "max_model_len": None, "rewards": {"beta": 0.5}},
                "tutor": {"checkpoint": "runs/tutor", "promote": True, "min_replicas": 3},
            },
        }
    )
    own, coder, tutor = config.all_models
    assert own is config
    assert (coder.checkpoint, coder.name, coder.max_model_len, coder.max_replicas) == ("runs/coder", "coder", None, 3)
    assert (coder.rewards.beta, coder.rewards.min_replicas, coder.promote) == (0.5, 1, False)
    assert (tutor.max_model_len, tutor.rewards, tutor.promote) == (8192, config.rewards, True)
    assert pickle.loads(pickle.dumps(config)).settings_of("coder") == coder


def test_what_a_model_cannot_have_is_refused_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "checkpoint: x\nmodels:\n  coder: {checkpoint: y, max_replica: 2, rewards: {bet: 1}}\n"
        "  'a b': {checkpoint: z}\n  lost: {dtype: bf16}\n"
    )
    with pytest.raises(ConfigError) as refused:
        load_config(file, kind=ServeConfig)
    text = str(refused.value)
    assert "models.coder.max_replica: unknown key; did you mean 'max_replicas'?" in text
    assert "models.coder.rewards.bet: unknown key" in text
    assert "models.lost.checkpoint: is required and missing" in text and "models.a b" in text
    models: Any = {"coder": {"checkpoint": "y", "min_replicas": 4}}
    with pytest.raises(ValueError, match=r"models.coder.min_replicas \(4\) is larger than models.coder.max_replicas"):
        ServeConfig(checkpoint="x", models=models)


def test_a_key_of_a_model_is_set_on_the_command_line_and_may_be_null(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("chat_template: chatml\nmodels:\n  coder: {checkpoint: y, chat_template: None}\n")
    config = load_serve_config("x", ["models.coder.max_replicas=2"], file)
    coder = config.settings_of("coder")
    assert (config.chat_template, coder.chat_template, coder.max_replicas) == ("chatml", None, 2)


def test_a_key_has_a_share_of_what_all_models_answer_at_once() -> None:
    models: Any = {"coder": {"checkpoint": "y", "max_num_seqs": 192, "min_replicas": 2, "max_replicas": 2}}
    config = ServeConfig(checkpoint="x", max_num_seqs=64, models=models)
    assert config.limits_on("cuda", num_cores=1).answers_in_progress == (64 + 2 * 192) // 8
    assert config.limits_on("cpu", num_cores=2).answers_in_progress == 2


def test_one_model_has_the_folder_that_it_always_had(tmp_path: Path) -> None:
    publication = publish_models(config_of(tmp_path))
    assert publication.models.first.registry.folder == (tmp_path / "serving" / "assistant").resolve()
    assert not (tmp_path / "serving" / "assistant" / "models").exists()
    before = files_of(tmp_path / "serving")
    again = publish_models(config_of(tmp_path, coder=whole(tmp_path / "coder", seed=1)))
    assert [model.registry.state().current for model in again.models.values()] == [1, 1]
    added = {file for file in files_of(tmp_path / "serving") - before if "/audit/" not in file}
    assert added and all(file.startswith("assistant/models/coder/") for file in added)
    assert not (tmp_path / "serving" / "assistant" / "models" / "coder" / "audit").exists(), "there is one trail"


def test_another_checkpoint_of_one_model_becomes_a_version_of_it_alone(tmp_path: Path) -> None:
    publish_models(config_of(tmp_path, coder=whole(tmp_path / "coder", seed=1)))
    config = config_of(tmp_path, coder=whole(tmp_path / "coder-2", seed=2))
    publication = publish_models(config)
    assert publication.notes == (
        f"{tmp_path}/coder-2 is version 2. Version 1 (coder) answers, as before. `raylign promote 2 --model coder` "
        "changes to version 2; so does a start with models.coder.promote=true.",
    )
    registries = [model.registry for model in publication.models.values()]
    assert [len(registry.versions()) for registry in registries] == [1, 2]
    models: Any = {"coder": {"checkpoint": f"{tmp_path}/coder-2", "promote": True}}
    promoted = ServeConfig(**{**config.model_dump(exclude={"models"}), "models": models})
    for may_promote, current in ((False, 1), (True, 2)):
        publication = publish_models(promoted, may_promote=may_promote)
        assert publication.models["coder"].registry.state().current == current
    assert publication.notes == ()


def test_the_model_that_cannot_be_served_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^models\.coder: model folder .*gone does not exist"):
        publish_models(config_of(tmp_path, coder=tmp_path / "gone"))


@pytest.mark.parametrize("name", ["assistant", "assistant--x"])
def test_two_models_cannot_have_one_name_or_one_folder(tmp_path: Path, name: str) -> None:
    models: Any = {name: {"checkpoint": "y"}, "assistant/x": {"checkpoint": "z"}}
    with pytest.raises(ServingError, match=r"another model of this endpoint has this name, or one that differs by / "):
        model_configs(ServeConfig(checkpoint=str(tmp_path), name="assistant", models=models))


def test_adapters_on_one_base_share_its_name_and_those_on_two_of_one_name_do_not(tmp_path: Path) -> None:
    bases = [whole(tmp_path / folder / "base", seed=seed) for seed, folder in enumerate("ab")]
    first, second, third = (
        adapter(tmp_path / f"adapter-{index}", seed=index, base_model_name_or_path=str(base))
        for index, base in enumerate((bases[0], bases[0], bases[1]))
    )
    models = publish_models(config_of(tmp_path, one=first, other=second)).models
    assert models.names == ["assistant", "one", "base", "other"]
    assert models.answering("base") is models["one"]
    with pytest.raises(ServingError, match="would both be called 'base'"):
        publish_models(config_of(tmp_path, one=first, third=third))


def test_a_name_chooses_a_model_and_no_name_the_only_one() -> None:
    only, two = ServedModels([served("a", "base")]), ServedModels([served("a", "base"), served("b")])
    assert only.choose(None) is only.first and two.choose("b") is two["b"] and two.first is two["a"]
    assert [two.answering(name).id for name in two.names] == ["a", "a", "b"]
    with pytest.raises(ModelNotNamed, match="has to name one of a, b"):
        two.choose(None)
    with pytest.raises(UnknownModel, match=r"There is no model 'base' here; there are a, b\."):
        two.choose("base")  # which has no versions
    with pytest.raises(UnknownModel, match=r"There is no model 'c' here; there are a, base, b\."):
        two.answering("c")


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "x" * 201])
def test_a_name_that_no_request_can_give_is_refused(name: str) -> None:
    with pytest.raises(ServingError, match="cannot be the name of a model"):
        ModelId(name)


def test_a_name_is_its_text_also_after_a_way_to_another_process() -> None:
    name = pickle.loads(pickle.dumps(ModelId("team/coder")))
    assert name == "team/coder" and name.folder_name == "team--coder" and {"team/coder": 1}[name] == 1
