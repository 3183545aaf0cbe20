"""A configuration is checked whole before anything heavy starts, and says where and what every problem is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from alignment.errors import ConfigError
from alignment.keys_elsewhere import KEYS_ELSEWHERE
from alignment.settings.load import check_config, load_config
from alignment.settings.plugins import algorithm_class, algorithm_names
from alignment.settings.run import RunConfig
from alignment.settings.schema import json_schema
from alignment.settings.section import sections_of
from cluster import launch
from cluster.config import ClusterRunConfig
from cluster.pipeline import PipelineConfig
from serving.config import ServeConfig
from serving.registry.gate import GateConfig
from tests.conftest import RECIPES

GOOD = {"name": "run", "steps": 3, "algorithm": {"name": "dpo"}, "data": {"path": "pairs.jsonl"}}

Load = Callable[..., ClusterRunConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads the good configuration with some top-level keys replaced, and with overrides."""

    def load_changed(*overrides: str, **changed: Any) -> ClusterRunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**GOOD, **changed}))
        return load_config(path, overrides, kind=ClusterRunConfig)

    return load_changed


def problems(load: Load, *overrides: str, **changed: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **changed)
    return str(caught.value).splitlines()[1:]  # the first line is the file


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads_and_fits_the_schema(recipe: Path) -> None:
    load_config(recipe, kind=ClusterRunConfig)
    jsonschema.validate(yaml.safe_load(recipe.read_text()), json_schema(ClusterRunConfig))


def test_the_schema_refuses_what_the_configuration_refuses() -> None:
    check = jsonschema.Draft202012Validator(json_schema(ClusterRunConfig))
    assert check.is_valid(GOOD)
    assert check.is_valid({**GOOD, "algorithm": {"name": "my.module:Mine", "strength": 2}})
    for wrong in (
        {**GOOD, "sedd": 1},
        {**GOOD, "optim": {"lr": "fast"}},
        {**GOOD, "algorithm": {"name": "dpo", "betta": 1}},
        {**GOOD, "algorithm": {"name": "dop"}},
        {**GOOD, "algorithm": {"beta": 0.1}},
    ):
        assert not check.is_valid(wrong), wrong


def test_every_field_of_every_section_is_described() -> None:
    schema = json_schema(ClusterRunConfig)
    sections = [schema, *schema["$defs"].values(), *schema["properties"]["algorithm"]["anyOf"]]
    undescribed, count = [], 0
    for section in sections:
        for name, field in section["properties"].items():
            # A field with the same words as its section is described by the section alone.
            described = {**schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {}), **field}
            count += 1
            if not described.get("description"):
                undescribed.append((section.get("title"), name))
    assert count > 70
    assert undescribed == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"stepps": 3}, "stepps: unknown key; did you mean 'steps'?"),
        ({"optim": {"learning": 1}}, "optim.learning: unknown key; known are name, lr, betas,"),
        ({"optim": {"learning_rate": 1}}, "optim.learning_rate: unknown key; it is called 'lr' here"),
        ({"optim": {"betass": [0, 0]}}, "optim.betass: unknown key; did you mean 'betas'?"),
        ({"model": {"lora": {"rang": 4}}}, "model.lora.rang: unknown key; did you mean 'rank'?"),
        ({"algorithm": {"name": "dpo", "betta": 1}}, "algorithm.betta: unknown key; did you mean 'beta'?"),
        ({"data": {"path": "x", "eval": {"pth": "y"}}}, "data.eval.pth: unknown key; did you mean 'path'?"),
        (
            {"data": {"mixture": [{"path": "x"}, {"path": "y", "wieght": 1}]}},
            "data.mixture.1.wieght: unknown key; did you mean 'weight'?",
        ),
        ({"cluster": {"worker": 2}}, "cluster.worker: unknown key; did you mean 'workers'?"),
        (
            {"data": {"path": "x", "columns": {"chosn": "a"}}},
            "data.columns: there is no field 'chosn'; did you mean 'chosen'?",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(load: Load, changed: dict[str, Any], expected: str) -> None:
    (problem,) = problems(load, **changed)
    assert problem.startswith(expected)


def test_every_problem_is_listed_with_its_place_and_value(load: Load) -> None:
    found = problems(
        load,
        steps=0,
        name="a b",
        seed=-1,
        algorithm={"name": "dpo", "beta": -1, "loss_type": "sgmoid"},
        model={"dtype": "fp16", "lora": {"dropout": 1.0, "target_modules": 5}},
        data={"mixture": [{"path": "x", "weight": 1.5}]},
        optim={"lr": "fast", "betas": [0.9, 2], "eps": float("nan")},
        colour="red",
    )
    for place, value in {
        "steps": "0",
        "name": "'a b'",
        "seed": "-1",
        "algorithm.beta": "-1",
        "algorithm.loss_type": "'sgmoid'",
        "model.dtype": "'fp16'",
        "model.lora.dropout": "1.0",
        "model.lora.target_modules": "5",
        "data.mixture.0.weight": "1.5",
        "optim.lr": "'fast'",
        "optim.betas.1": "2",
        "optim.eps": "nan",
    }.items():
        lines = [line for line in found if line.startswith(f"{place}: ")]
        assert lines and all(line.endswith(f"(given: {value})") for line in lines), (place, found)
    assert any(line.startswith("colour: unknown key") for line in found)


def test_a_missing_section_is_named(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text("name: run\nsteps: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, kind=RunConfig)
    assert str(caught.value).splitlines() == [
        f"{path}:",
        "algorithm: is required and missing",
        "data: is required and missing",
    ]


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"name": "dop"}, "algorithm: there is no algorithm 'dop'; did you mean 'dpo'?"),
        ({"name": "zzzzzz"}, f"algorithm: there is no algorithm 'zzzzzz'; known are {', '.join(algorithm_names())}"),
        ({"beta": 0.1}, "algorithm: needs a name: "),
        ({"name": 5}, "algorithm: needs a name: "),
        ({}, "algorithm: needs a name: "),
        ("dpo", "algorithm: Input should be a valid dictionary"),
        ({"name": "no.such:Thing"}, "algorithm: algorithm 'no.such:Thing' cannot be imported: No module named 'no'"),
        ({"name": ":Thing"}, "algorithm: algorithm ':Thing' cannot be imported: "),
        ({"name": ".relative:Thing"}, "algorithm: algorithm '.relative:Thing' cannot be imported: "),
        ({"name": "json:Nothing"}, "algorithm: algorithm 'json:Nothing' cannot be imported: "),
        ({"name": "json:JSONDecoder"}, "algorithm: algorithm 'json:JSONDecoder' is not a subclass of"),
    ],
)
def test_an_unknown_algorithm_is_refused(load: Load, algorithm: Any, expected: str) -> None:
    (problem,) = problems(load, algorithm=algorithm)
    assert problem.startswith(expected)


def test_a_dotted_name_loads_a_users_own_algorithm(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lab"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "contrast.py").write_text(
        "from alignment.algorithms import Algorithm\n"
        "class Contrast(Algorithm):\n"
        "    strength: float = 1.0\n"
        "    def select(self, group): return group\n"
        "    def loss(self, batch, outputs): raise NotImplementedError\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    algorithm = {"name": "lab.contrast:Contrast", "strength": 2}
    config = load(algorithm=algorithm)
    assert type(config.algorithm).__name__ == "Contrast"
    assert config.algorithm.model_dump() == algorithm
    (problem,) = problems(load, algorithm={**algorithm, "strenght": 1})
    assert problem == "algorithm.strenght: unknown key; did you mean 'strength'?"


@pytest.mark.parametrize(
    ("override", "place", "expected"),
    [
        ("optim.lr=1e-6", ("optim", "lr"), 1e-6),
        ("optim.lr=0.5", ("optim", "lr"), 0.5),
        ("model.lora.rank=4", ("model", "lora", "rank"), 4),
        ("model.lora={rank: 2, alpha: 8}", ("model", "lora", "alpha"), 8),
        ("data.eval.path=held_out.jsonl", ("data", "eval", "path"), "held_out.jsonl"),
        ("data.columns.chosen=better", ("data", "columns"), {"chosen": "better"}),
        ('data.prompt_template="Q: {q} = ?"', ("data", "prompt_template"), "Q: {q} = ?"),
        ("data.shuffle=false", ("data", "shuffle"), False),
        ("data.max_prompt_length=null", ("data", "max_prompt_length"), None),
        ("algorithm.beta=0.3", ("algorithm", "beta"), 0.3),
        ("optim.betas=[0.8, 0.9]", ("optim", "betas"), (0.8, 0.9)),
        ("cluster.workers=2", ("cluster", "workers"), 2),
    ],
)
def test_an_override_sets_its_place(load: Load, override: str, place: tuple[str, ...], expected: Any) -> None:
    value: Any = load(override)
    for name in place:
        value = getattr(value, name)
    assert value == expected


def test_an_override_reaches_into_a_list(load: Load) -> None:
    data = {"mixture": [{"path": "a"}, {"path": "b"}]}
    config = load("data.mixture.1.weight=0.25", "data.mixture.0={path: c}", data=data)
    assert [(source.path, source.weight) for source in config.data.sources] == [("c", 1.0), ("b", 0.25)]


@pytest.mark.parametrize("name", ["judges", "eval_rewards"])
@pytest.mark.parametrize("override", ["judges.0.weight=2", "eval_rewards.0.weight=2"])
def test_an_override_reaches_into_a_section_by_its_old_and_its_new_name(load: Load, name: str, override: str) -> None:
    config = load(override, **{name: [{"name": "length", "target": 9}]})
    assert [scorer.weight for scorer in config.eval_rewards] == [2]


def test_overrides_with_null_exchange_steps_for_epochs(load: Load) -> None:
    config = load("steps=null", "epochs=0.5")
    assert (config.steps, config.epochs) == (None, 0.5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "must have the form section.key=value"),
        ("=3", "must have the form section.key=value"),
        ("optim.=3", "must have the form section.key=value"),
        ("optim..lr=3", "must have the form section.key=value"),
        ("name.first=a", "name is a value, not a section"),
        ("data.mixture.2.path=x", "'2' is not an index below 2"),
        ("data.mixture.last.path=x", "'last' is not an index below 2"),
        ("data.mixture.²=x", "'²' is not an index below 2"),
        ("optim.betas.0.value=1", "0 is a value, not a section"),
        ("optim.lr=[1, 2", "the value is not valid YAML"),
        ("model.revision=2024-13-45", "the value is not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused_with_its_text(load: Load, override: str, expected: str) -> None:
    data = {"mixture": [{"path": "a"}, {"path": "b"}]}
    with pytest.raises(ConfigError) as caught:
        load(override, data=data, optim={"betas": [0.9, 0.99]})
    assert expected in str(caught.value)
    assert repr(override) in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"epochs": 1}, "the whole file: give exactly one of steps and epochs (override the other with null)"),
        ({"steps": None}, "the whole file: give exactly one of steps and epochs (override the other with null)"),
        (
            {"steps": None, "epochs": 1, "data": {"path": "x", "streaming": True}},
            "the whole file: a streaming source has no known length, so give steps instead of epochs",
        ),
        ({"data": {}}, "data: neither path nor mixture is given; say where the data is, e.g. data.path=pairs.jsonl"),
        (
            {"data": {"path": "x", "mixture": [{"path": "y"}]}},
            "data: path and mixture are both given; set one of them to null",
        ),
        (
            {"data": {"mixture": [{"path": "y"}], "prompt_as": "user_message"}},
            "data: prompt_as beside mixture is read by nothing; give it in the sources of mixture",
        ),
        (
            {"data": {"path": "x", "max_length": 64, "max_prompt_length": 64}},
            "data: max_prompt_length (64) must be smaller than max_length (64), or no token is left for the completion",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(load: Load, changed: dict[str, Any], expected: str) -> None:
    assert problems(load, **changed) == [expected]


@pytest.mark.parametrize("template", ["{question", "a } b", "{}", "{0}", "{a[0]}", "{a!z}", "{a:d}"])
def test_a_malformed_prompt_template_is_refused(load: Load, template: str) -> None:
    (problem,) = problems(load, data={"path": "x", "prompt_template": template})
    assert problem.startswith("data.prompt_template: braces must hold the name of a column")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"name: [1, 2", "is not valid YAML"),
        (b"name: \xff\xfe", "is not valid YAML"),
        (b"", "must be a mapping of sections, not NoneType"),
        (b"- name", "must be a mapping of sections, not list"),
    ],
)
def test_an_unreadable_file_is_refused_by_name(tmp_path: Path, text: bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, kind=RunConfig)
    assert str(caught.value).startswith(f"{path}: {expected}")


def test_a_missing_file_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_config("nowhere.yaml", kind=RunConfig)


def test_without_a_file_the_overrides_are_all_there_is() -> None:
    overrides = ["name=run", "steps=3", "algorithm.name=dpo", "data.path=pairs.jsonl"]
    assert load_config(None, overrides, kind=RunConfig) == check_config(GOOD, kind=RunConfig)
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*overrides, "sedd=1"], kind=RunConfig)
    assert str(caught.value) == "sedd: unknown key; did you mean 'seed'?"


def test_a_loaded_configuration_cannot_be_changed(load: Load) -> None:
    config = load()
    for section, name in ((config, "seed"), (config.optim, "lr"), (config.data, "path"), (config.algorithm, "name")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, None)


def test_a_configuration_survives_the_way_to_a_worker(load: Load) -> None:
    for data in ({"path": "x", "prompt_as": "user_message"}, {"mixture": [{"path": "x", "skip": 3}]}):
        config = load(data=data, algorithm={"name": "dpo", "beta": 0.3}, model={"lora": {"rank": 4}})
        assert ClusterRunConfig.model_validate_json(config.model_dump_json()) == config
        assert json.loads(config.model_dump_json())["algorithm"]["beta"] == 0.3


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("name: a\noptim: {lr: 1}\ndata: {path: x}\noptim: {schedule: cosine}\n", 4, "key 'optim' .* in line 2;"),
        ("data:\n  path: x\n  eval:\n    path: y\n    take: 3\n    path: z\n", 6, "key 'path' .* in line 4;"),
        ("rewards:\n- {name: length}\n- {name: regex, weight: 1, weight: 2}\n", 3, "key 'weight' .* in the same line;"),
    ],
)
def test_a_key_that_a_mapping_has_twice_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, expected: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    for kind in (RunConfig, PipelineConfig, ServeConfig, GateConfig):
        with pytest.raises(ConfigError, match=rf"run\.yaml:{line}: {expected}"):
            load_config(path, kind=kind)


def test_a_key_given_twice_in_an_override_is_refused(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"override 'model\.lora=.*': key 'rank' is given twice"):
        load("model.lora={rank: 2, alpha: 4, rank: 8}")


OLD_NUMBERS = {
    "seed: 010": "key 'seed': 010 would be read in base 8",
    "seed: -007": "key 'seed': -007 would be read in base 8",
    "seed: 0_10": "key 'seed': 0_10 would be read in base 8",
    "optim: {micro_batch_tokens: 1:30}": "key 'micro_batch_tokens': 1:30 would be read in base 60",
    "optim: {lr: 1:30.5}": "key 'lr': 1:30.5 would be read in base 60",
    "optim: {betas: [0.9, 010]}": "010 would be read in base 8",
    "010: 1": "010 would be read in base 8",
}


@pytest.mark.parametrize("text", OLD_NUMBERS)
def test_a_number_in_base_8_or_60_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: run\n{text}\n")
    for kind in (RunConfig, PipelineConfig, ServeConfig, GateConfig):
        with pytest.raises(ConfigError, match=rf"run\.yaml:2: {re.escape(OLD_NUMBERS[text])}"):
            load_config(path, kind=kind)


def test_a_number_in_base_8_or_60_is_refused_in_an_override(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"override 'seed=010': 010 would be read in base 8"):
        load("seed=010")
    with pytest.raises(ConfigError, match=r"override 'rollout={timeout_s: 1:30}': key 'timeout_s': 1:30 would be"):
        load("rollout={timeout_s: 1:30}")


@pytest.mark.parametrize(
    ("override", "seed"), [("seed=0", 0), ("seed=10", 10), ("seed=1_000", 1000), ("seed=0x10", 16), ("seed='010'", 10)]
)
def test_other_numbers_are_read_as_they_are_written(load: Load, override: str, seed: int) -> None:
    assert load(override).seed == seed
    assert load("optim.lr=0.5", "optim.eps=00.5").optim.eps == 0.5
    assert load("model.revision='1:30'").model.revision == "1:30"


def test_a_mapping_may_merge_another_and_replace_some_of_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: run\nsteps: 1\nalgorithm: {name: sft}\ndata:\n  mixture:\n  - &base {path: a, take: 3}\n"
        "  - {<<: *base, path: b}\n  - {path: c, <<: *base}\n"
    )
    config = load_config(path, kind=RunConfig)
    assert [(source.path, source.take) for source in config.data.mixture] == [("a", 3), ("b", 3), ("c", 3)]


@pytest.mark.parametrize("word", ["None", "none", "null", "~", ""])
def test_the_word_none_is_null_where_a_key_may_be_null(load: Load, word: str) -> None:
    overrides = [f"model.revision={word}", f"model.lora.start={word}", f"data.eval={word}", f"data.take={word}"]
    config = load(*overrides, model={"lora": {"rank": 2}})
    assert config.model.lora is not None
    assert (config.model.revision, config.model.lora.start, config.data.eval, config.data.take) == (None,) * 4
    lora = load(f"model.lora={word}", model={"lora": {"rank": 2}}).model.lora
    assert lora is None, "a section can be switched off"


def test_the_word_none_is_refused_where_a_text_is_wanted_and_kept_where_it_means_something(load: Load) -> None:
    assert problems(load, "data.split=None") == ["data.split: Input should be a valid string (given: None)"]
    assert problems(load, model={"path": "None"}) == ["model.path: Input should be a valid string (given: None)"]
    grpo = {"name": "grpo", "kl_placement": "none", "reference": "none"}
    config = load(algorithm=grpo, rewards=[{"name": "length", "target": 9}], rollout={"completions": 2})
    assert config.algorithm.model_dump()["kl_placement"] == "none"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"learning_rate": 1e-6}, "learning_rate: unknown key; here it is optim.lr"),
        ({"lora_r": 8}, "lora_r: unknown key; here it is model.lora.rank"),
        ({"model": {"lora": {"r": 8}}}, "model.lora.r: unknown key; it is called 'rank' here"),
        ({"rollout": {"max_length": 9}}, "rollout.max_length: unknown key; here it is data.max_length"),
        ({"sample_packing": True}, "sample_packing: unknown key; there is no key: sequences are always packed"),
        ({"output_dir": "x"}, "output_dir: unknown key; here it is output and name: everything goes to OUTPUT/NAME"),
        ({"lr": 1e-6}, "lr: unknown key; here it is optim.lr"),
        ({"model": {"rank": 8}}, "model.rank: unknown key; here it is model.lora.rank"),
        ({"every": 5}, "every: unknown key; here it is evaluate.every or checkpoint.every"),
        ({"optim": {"stage": 3}}, "optim.stage: unknown key; here it is optim.zero.stage"),
        ({"optim.lr": 1e-6}, "optim.lr: unknown key; dots are for the command line, a file has sections: `optim: {lr:"),
        ({"optim": "adamw_torch"}, "optim: Input should be a valid dictionary, a section, as optim: {name: "),
        ({"data": "rows.jsonl"}, "data: Input should be a valid dictionary, a section, as data: {path: rows.jsonl}"),
        ({"data": {"path": "x", "keep": "answer, id"}}, "data.keep: a list is wanted, as [answer, id]"),
        (
            {"model": {"lora": {"target_modules": "q_proj,v_proj"}}},
            "model.lora.target_modules: a list is wanted, as [q_proj, v_proj]; or Input should be 'all-linear'",
        ),
    ],
)  # fmt: skip
def test_what_people_write_elsewhere_is_answered_with_its_place_here(
    load: Load, changed: dict[str, Any], expected: str
) -> None:
    (problem,) = problems(load, **changed)
    assert problem.startswith(expected)


def test_the_places_that_are_named_exist() -> None:
    algorithms = [algorithm_class(name) for name in algorithm_names()]
    elsewhere = {name: place for name, place in KEYS_ELSEWHERE.items() if not place.startswith(("no key: ", "the "))}
    assert len(elsewhere) > 120
    for name, place in elsewhere.items():
        for key in re.findall(r"(?:^|and |or )([a-z_]+(?:\.[a-z_]+)*)", re.split("[,:(]", place)[0]):
            kinds: list[Any] = [ClusterRunConfig]
            for part in key.split("."):
                fields = [kind.model_fields[part] for kind in kinds if part in kind.model_fields]
                assert fields, (name, key)
                kinds = algorithms if part == "algorithm" else sections_of(fields[0].annotation)


@pytest.mark.parametrize(
    "override",
    ["optim.lr=yes", "optim.max_grad_norm=off", "optim.warmup_steps=true", "seed=on", "data.max_prompt_length=false"],
)
def test_yes_and_no_are_refused_where_a_number_is_wanted(load: Load, override: str) -> None:
    with pytest.raises(ConfigError, match="should be a number; on, off, yes, no"):
        load(override)


def test_yes_and_no_are_read_where_they_are_wanted(load: Load) -> None:
    assert load("data.shuffle=off", "model.gradient_checkpointing=on").model.gradient_checkpointing


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("betas.0", [1, 1], "less than 1"),
        ("betas.1", [0.9, 1], "less than 1"),
        ("betas.0", [-0.1, 0.9], "greater than or equal to 0"),
        ("lr", 0, "greater than 0"),
        ("lr", float("inf"), "finite number"),
        ("eps", 0, "greater than 0"),
        ("eps", float("inf"), "finite number"),
        ("weight_decay", -1, "greater than or equal to 0"),
        ("weight_decay", float("inf"), "finite number"),
        ("max_grad_norm", float("nan"), "finite number"),
    ],
)
def test_what_torch_s_optimizers_refuse_is_refused_with_its_key(load: Load, key: str, value: Any, bound: str) -> None:
    texts = problems(load, optim={key.partition(".")[0]: value})
    assert any(text.startswith(f"optim.{key}: Input should be ") and bound in text for text in texts), texts


def test_a_warm_up_longer_than_the_run_is_refused(load: Load) -> None:
    assert load(steps=3, optim={"warmup_steps": 3}).optim.warmup_steps == 3
    (problem,) = problems(load, steps=3, optim={"warmup_steps": 4})
    assert "optim.warmup_steps (4) is more than the 3 steps of the run" in problem
    (problem,) = problems(load, steps=3, critic={"warmup_steps": 3})
    assert "critic.warmup_steps (3) leaves none of the 3 steps" in problem
    by_epochs = load(steps=None, epochs=1, optim={"warmup_steps": 100})
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps \(100\) is more than the 99 steps"):
        by_epochs.check_warmup(99)


def test_an_output_that_cannot_be_written_is_one_line(load: Load, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").touch()
    for output, why in (("file", "Not a directory"), ("runs", "File exists")):
        with pytest.raises(ConfigError) as caught:
            launch.run(load(output=str(tmp_path / output)))
        folder = tmp_path / output / "run"
        assert str(caught.value) == (
            f"output {str(tmp_path / output)!r}: the run's folder {folder} cannot be written: {why}"
        )
    with pytest.raises(ConfigError, match="cannot be written"):
        load(output="/proc/x").make_folder()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"mixture": [{"path": "x", "streaming": True, "weight": 0}] * 2}, "data: every weight of mixture is 0"),
        ({"path": "x", "eval": {"take": 5}}, "data: eval has no path; give it one, or a split of data.path"),
        ({"mixture": [{"path": "x"}, {"split": "test"}]}, "data: a source of mixture has no path"),
        ({"path": "x", "weight": 0.5, "fraction": 0.5}, "data: weight 0.5 means nothing without a streaming mixture"),
        ({"path": "x", "streaming": True, "weight": 3}, "data: weight 3 means nothing without a streaming mixture"),
        ({"mixture": [{"path": "x"}, {"path": "y", "weight": 3}]}, "data.mixture.1.weight: above 1 it says how often"),
        (
            {"mixture": [{"path": "x"}, {"path": "y", "prompt_as": "user_message"}], "eval": {"path": "z"}},
            "data: the sources of mixture differ in prompt_as, so eval must say which is its own",
        ),
    ],
)
def test_weights_and_held_out_rows_that_could_mean_two_things_are_refused(
    load: Load, data: dict[str, Any], expected: str
) -> None:
    (problem,) = problems(load, data=data)
    assert problem.startswith(expected)


def test_what_held_out_rows_inherit_survives_the_way_to_a_worker(load: Load) -> None:
    config = load(data={"path": "x", "prompt_as": "user_message", "keep": ["answer"], "eval": {"path": "y"}})
    assert config.data.eval is not None
    assert (config.data.eval.prompt_as, config.data.eval.keep) == ("user_message", ("answer",))
    assert ClusterRunConfig.model_validate_json(config.model_dump_json()) == config
    same = config.data.model_copy(update={"eval": config.data.eval.model_copy(update={"keep": ()})})
    assert ClusterRunConfig.model_validate({**config.model_dump(), "data": same.model_dump()}).data == same
