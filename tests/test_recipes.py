"""Every recipe in configs/align loads, and runs two steps when a user overrides model, data and sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.run_folder import find_checkpoint
from alignment.settings.run import RunConfig
from cluster.config import load_run
from cluster.launch import run
from tests.conftest import DATA, RECIPES, pair_rows

Row = dict[str, Any]
Launch = Callable[..., RunConfig]

ROOT = Path(__file__).parents[1]
SAMPLED = ["rollout.engine=local", "rollout.completions=2", "rollout.max_tokens=8", "rollout.steps_ahead=0"]
"""What makes a recipe that learns from the model's own answers small."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def launch(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """`launch("demo", "data.max_length=96")`: two steps of a recipe on the tiny model, in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))

    def start(recipe: str, *overrides: str) -> RunConfig:
        small = [f"model.path={tiny_model}", f"output={tmp_path / 'runs'}", "cluster.workers=0"]
        small += ["steps=2", "epochs=null", "groups_per_step=4", "optim.warmup_steps=0"]
        config = load_run(ROOT / "configs" / "align" / f"{recipe}.yaml", [*small, *overrides])
        run(config)
        return config

    return start


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_under_its_own_name(recipe: Path) -> None:
    assert load_run(recipe, []).name == recipe.stem


def test_the_readme_explains_the_demo_s_recipe_as_it_is() -> None:
    shown = (ROOT / "README.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / "configs/align/demo.yaml").read_text(encoding="utf-8"))


def test_the_stack_llama_2_recipes_run_one_after_the_other(launch: Launch, write_rows: Callable[..., Path]) -> None:
    too_long = {**stack_exchange_row(pair_rows(1)[0]), "question": "brown fox " * 200}
    rows = write_rows([too_long, *map(stack_exchange_row, pair_rows(24))])
    held_out = write_rows([stack_exchange_row(row) for row in pair_rows(6)], "held_out.jsonl")
    files = [f"data.path={rows}", f"data.eval.path={held_out}", "data.max_length=96"]

    sft = launch("stack_llama_2_sft", *files, "data.skip=2")
    assert_two_steps(sft)
    started_from = find_checkpoint(sft.folder)
    assert targets(started_from) == {"q_proj", "v_proj"}

    dpo = launch("stack_llama_2_dpo", *files, f"model.path={started_from}", "data.max_prompt_length=48")
    assert_two_steps(dpo)
    assert targets(find_checkpoint(dpo.folder)) == {"q_proj", "k_proj", "v_proj"}, "the other four names match nothing"
    assert not (dpo.folder / "bad_rows.jsonl").exists(), "a row that is too long by max_characters is not a bad one"


def test_the_zephyr_sft_recipe_runs(launch: Launch, write_rows: Callable[..., Path]) -> None:
    parts = [write_rows([conversation(row) for row in pair_rows(12)], f"{name}.jsonl") for name in ("train", "test")]
    config = launch("zephyr_7b_sft_full", *mixture(parts), "data.max_length=256", "data.eval_groups=4")
    assert_two_steps(config)
    assert "<|assistant|>" in chat_template(config)


def test_the_zephyr_dpo_recipe_runs(launch: Launch, write_rows: Callable[..., Path]) -> None:
    rows = [preference(row) for row in pair_rows(24)]
    parts = [write_rows(rows[:16], "train.jsonl"), write_rows(rows[16:], "test.jsonl")]
    sizes = ["data.max_length=256", "data.max_prompt_length=128", "data.eval_groups=4"]
    config = launch("zephyr_7b_dpo_full", *mixture(parts), *sizes)
    assert_two_steps(config)
    assert "<|assistant|>" in chat_template(config)
    assert list(config.folder.glob("reference-*.safetensors")), "the reference was to be computed beforehand"


@pytest.mark.parametrize("recipe", ["demo", "sft_smollm2"])
def test_a_recipe_with_its_own_data_runs(recipe: str, launch: Launch) -> None:
    assert_two_steps(launch(recipe, "evaluate.sample_tokens=8", "data.eval_groups=8"))


@pytest.mark.parametrize(
    ("recipe", "rows", "sizes"),
    [
        ("dpo_stack_exchange", "stack_exchange_paired", []),
        ("dpo_hh", "hh_harmless", ["data.eval_groups=4", "data.bad_row_budget=0.1"]),
    ],
)
def test_a_recipe_runs_on_real_rows(recipe: str, rows: str, sizes: list[str], launch: Launch) -> None:
    # The tiny tokenizer makes several times as many tokens of a text as a real one.
    lengths = ["data.max_length=192", "data.max_prompt_length=128"]
    assert_two_steps(launch(recipe, f"data.path={DATA / rows}.jsonl", *lengths, *sizes))


def assert_two_steps(config: RunConfig) -> None:
    metrics = config.run_folder.read_metrics()
    evaluated = config.data.eval is not None or config.data.eval_groups > 0
    # Step 0 is the untrained model's evaluation.
    assert [entry["step"] for entry in metrics] == ([0, 1, 2] if evaluated else [1, 2])
    for entry in metrics[-2:]:
        assert math.isfinite(entry["loss"]) and entry["grad_norm"] > 0
    assert evaluated == ("eval/loss" in metrics[0]) == ("eval/loss" in metrics[-1])
    assert find_checkpoint(config.folder).name == "step-00000002"


def targets(adapter: Path) -> set[str]:
    """Modules that have an adapter."""
    return set(json.loads((adapter / "adapter_config.json").read_text())["target_modules"])


def chat_template(config: RunConfig) -> str:
    """The template that a served model would use."""
    return (find_checkpoint(config.folder) / "chat_template.jinja").read_text()


def mixture(parts: list[Path]) -> list[str]:
    """The overrides that put local files in the place of a recipe's two hub sets."""
    places = [f"data.mixture.{index}.path={part}" for index, part in enumerate(parts)]
    return places + [f"data.mixture.{index}.split={part.stem}" for index, part in enumerate(parts)]


def stack_exchange_row(pair: Row) -> Row:
    """A row as `lvwerra/stack-exchange-paired` has it."""
    return {
        "qid": 1,
        "question": pair["prompt"],
        "date": "2010/05/19",
        "metadata": ["https://example.org/questions/1"],
        "response_j": pair["chosen"].strip(),
        "response_k": pair["rejected"].strip(),
    }


def conversation(pair: Row) -> Row:
    """A row as `HuggingFaceH4/ultrachat_200k` has it: two questions and two answers."""
    turns = turns_of(pair["prompt"], pair["chosen"]) + turns_of(pair["prompt"] + " again", pair["rejected"])
    return {"prompt": pair["prompt"], "prompt_id": "1", "messages": turns}


def preference(pair: Row) -> Row:
    """A row as `HuggingFaceH4/ultrafeedback_binarized` has it."""
    chosen, rejected = (turns_of(pair["prompt"], pair[field]) for field in ("chosen", "rejected"))
    scores = {"score_chosen": 8.0, "score_rejected": 3.0}
    return {"prompt": pair["prompt"], "chosen": chosen, "rejected": rejected, "messages": chosen, **scores}


def turns_of(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]


@pytest.mark.parametrize("recipe", ["grpo_smollm2", "rloo_smollm2", "online_dpo_smollm2"])
def test_the_recipes_that_learn_from_rules_run(launch: Launch, recipe: str) -> None:
    config = launch(recipe, *SAMPLED, "model.dtype=fp32", "data.eval_groups=4")
    assert [line["step"] for line in config.run_folder.read_metrics()] == [0, 1, 2]
    assert "eval/eval_rewards/keywords" in config.run_folder.read_metrics()[-1]


def test_the_ppo_recipe_runs_against_the_reward_model_of_its_own_recipe(launch: Launch) -> None:
    reward = launch("reward_smollm2", "data.eval_groups=4")
    assert reward.run_folder.read_metrics()[-1]["eval/rewards/accuracies"] >= 0
    config = launch("ppo_smollm2", *SAMPLED, f"rewards.0.path={reward.folder}", "data.eval_groups=4")
    assert {"value_loss", "kl", "eval/eval_rewards/keywords"} <= config.run_folder.read_metrics()[-1].keys()


def test_the_hh_reward_recipe_runs(launch: Launch, write_rows: Callable[..., Path]) -> None:
    rows = [
        {side: f"\n\nHuman: {row['prompt']}\n\nAssistant:{row[side]}" for side in ("chosen", "rejected")}
        for row in pair_rows(24)
    ]
    config = launch("reward_hh", f"data.path={write_rows(rows)}", "data.data_dir=null", "data.eval_groups=4")
    assert_two_steps(config)


def test_the_stack_llama_recipes_run_one_after_the_other(launch: Launch, write_rows: Callable[..., Path]) -> None:
    rows = write_rows([stack_exchange_row(row) for row in pair_rows(24)])
    files = [f"data.path={rows}", "data.data_dir=null", "data.max_length=128", "data.max_prompt_length=64"]
    reward = launch("reward_stack_llama", *files, f"data.eval.path={rows}", "data.eval.data_dir=null")
    config = launch("stack_llama_ppo", *SAMPLED, *files, f"rewards.0.path={reward.folder}")
    assert next(line["kl_coefficient"] for line in config.run_folder.read_metrics() if line["step"]) == 0.2


@pytest.mark.parametrize("recipe", ["grpo_8b", "ppo_8b"])
def test_the_recipes_for_a_gpu_cluster_run_small(launch: Launch, write_rows: Callable[..., Path], recipe: str) -> None:
    rows = write_rows([{"question": row["prompt"], "prompt": row["prompt"], "answer": "42"} for row in pair_rows(24)])
    places = [
        f"data.path={rows}",
        "data.name=null",
        "optim.zero.stage=0",
        "critic.warmup_steps=0",
        "data.max_length=128",
        "data.split=train",
    ]
    changes = {
        "grpo_8b": [
            f"data.eval.path={rows}",
            "data.eval.name=null",
            "data.eval_groups=4",
            "data.eval.split=train",
            "model.chat_template_kwargs={}",  # the tiny model's template opens no thoughts
        ],
        "ppo_8b": ["critic.path=null", "data.max_prompt_length=64", "rewards=[{name: sentiment}]"],
    }
    config = launch(recipe, *SAMPLED, *places, *changes[recipe])
    assert config.run_folder.read_metrics()[-1]["step"] == 2
