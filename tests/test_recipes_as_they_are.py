"""Every recipe starts with the paths that it has: what it names lies in the working directory, tiny and of its kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alignment.distributed.world import World
from alignment.errors import ModelError
from alignment.metrics import Silent
from alignment.models.folders import BUNDLED
from alignment.run_folder import find_checkpoint
from alignment.settings.run import RunConfig
from alignment.train import train
from cluster.config import ClusterRunConfig, load_run
from cluster.launch import rehearse
from cluster.launch import train as train_command
from cluster.pipeline import PipelineConfig, check, load_config, settings_of
from tests.conftest import ALIGN, RECIPES, make_tokenizer, pair_rows

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
FAMILIES: dict[str, tuple[Any, Any]] = {
    "meta-llama/Llama-2-7b-hf": (LlamaConfig, LlamaForCausalLM),
    "mistralai/Mistral-7B-v0.1": (MistralConfig, MistralForCausalLM),
    "alignment-handbook/zephyr-7b-sft-full": (MistralConfig, MistralForCausalLM),
    "Qwen/Qwen3-8B": (Qwen3Config, Qwen3ForCausalLM),
}
"""What stands on the hub under the names that recipes have."""
NO_THOUGHT = (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
"""How the templates of thinking models end a prompt that is to be answered without a thought."""

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------- rows as the sets on the hub have


def turns(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]


def ultrachat(pair: Row) -> Row:
    messages = turns(pair["prompt"], pair["chosen"]) + turns("and then?", pair["rejected"])
    return {"prompt": pair["prompt"], "prompt_id": "1", "messages": messages}


def ultrafeedback(pair: Row) -> Row:
    chosen, rejected = (turns(pair["prompt"], pair[field]) for field in ("chosen", "rejected"))
    scores = {"score_chosen": 8.0, "score_rejected": 3.0}
    return {
        "prompt": pair["prompt"],
        "prompt_id": "1",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
    } | scores


def stack_exchange(pair: Row) -> Row:
    places = {"date": "2010/05/19", "metadata": ["https://example.org/questions/1"]}
    return {"qid": 1, "question": pair["prompt"], "response_j": pair["chosen"], "response_k": pair["rejected"]} | places


def hh(pair: Row) -> Row:
    return {side: f"\n\nHuman: {pair['prompt']}\n\nAssistant:{pair[side]}" for side in ("chosen", "rejected")}


def gsm8k(pair: Row) -> Row:
    return {"question": pair["prompt"], "answer": "12 + 30 = <<12+30=42>>42\n#### 42"}


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """A data set, with as many rows as its recipes hold out or skip."""

    row: Callable[[Row], Row]
    files: dict[str, int]
    """Number of rows in each file."""
    splits: dict[str, str] | None = None
    """File of each split, as the set's README says it; None if the files' names do."""


SETS = {
    "HuggingFaceH4/ultrachat_200k": HubSet(
        row=ultrachat,
        files={"data/a.jsonl": 1030, "data/b.jsonl": 10},
        splits={"train_sft": "data/a.jsonl", "test_sft": "data/b.jsonl"},
    ),
    "HuggingFaceH4/ultrafeedback_binarized": HubSet(
        row=ultrafeedback,
        files={"data/a.jsonl": 2030, "data/b.jsonl": 10, "data/c.jsonl": 10},
        splits={"train_prefs": "data/a.jsonl", "test_prefs": "data/b.jsonl", "train_gen": "data/c.jsonl"},
    ),
    "lvwerra/stack-exchange-paired": HubSet(
        row=stack_exchange,
        files={f"data/{part}/train.jsonl": 40 for part in ("rl", "reward", "evaluation")}
        | {"data/finetune/train.jsonl": 4020},
    ),
    "Anthropic/hh-rlhf": HubSet(row=hh, files={"harmless-base/train.jsonl": 330}),
    "openai/gsm8k": HubSet(row=gsm8k, files={"main/train.jsonl": 20, "main/test.jsonl": 20}),
}


def put_set(name: str, folder: Path) -> None:
    kind, number = SETS[name], 0
    for file, count in kind.files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        pairs = [{**pair, "prompt": f"{pair['prompt']} {number + at}?"} for at, pair in enumerate(pair_rows(count))]
        number += count
        (folder / file).write_text("".join(json.dumps(kind.row(pair)) + "\n" for pair in pairs))
    if kind.splits:
        parts = [{"split": split, "path": file} for split, file in kind.splits.items()]
        head = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": parts}]})
        (folder / "README.md").write_text(f"---\n{head}---\n")


# -------------------------------------------------------------------------------------------------- models, and runs


def put_model(folder: Path, family: tuple[Any, Any]) -> None:
    settings, network = family
    tokenizer = make_tokenizer()
    if network is Qwen3ForCausalLM:
        tokenizer.chat_template += NO_THOUGHT
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.eos_token_id}
    network(settings(vocab_size=len(tokenizer), **sizes, **heads, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind that recipes start from: fine-tuned as a whole, by an adapter, and a reward model."""
    folder = tmp_path_factory.mktemp("before")
    put_model(folder / "model", (LlamaConfig, LlamaForCausalLM))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(8)))
    kinds: dict[str, Row] = {
        "whole": {"algorithm": {"name": "sft"}},
        "adapter": {"algorithm": {"name": "sft"}, "model": {"lora": {"rank": 2}}},
        "reward": {"algorithm": {"name": "reward_model"}},
    }
    made = {}
    for name, kind in kinds.items():
        settings = {"name": name, "output": str(folder / "runs"), "steps": 1, "groups_per_step": 2, **kind}
        settings["model"] = {"path": str(folder / "model"), "dtype": "fp32", **kind.get("model", {})}
        config = RunConfig.model_validate({**settings, "data": {"path": str(rows), "eval_groups": 2}})
        train(config, World(), Silent())
        made[name] = config.folder
    return made


def put_run(path: str, runs: dict[str, Path]) -> None:
    """What an earlier run has left where a recipe names it: the run's folder, or one of its checkpoints."""
    kind = "reward" if "reward" in path else "adapter" if "stack_llama" in path else "whole"
    place = Path(path)
    if place.exists():
        return
    if place.parent.name == "checkpoints":
        shutil.copytree(find_checkpoint(runs[kind]), place)
    else:
        shutil.copytree(runs[kind], place)


def names_of_models(config: RunConfig) -> Iterable[str]:
    yield config.model.path
    if config.critic.path:
        yield config.critic.path
    yield from (str(getattr(scorer, "path")) for scorer in config.rewards if scorer.name == "model")  # noqa: B009


def put_everything(config: RunConfig, runs: dict[str, Path], cache: Path) -> None:
    """Puts what a recipe names into the working directory, where its paths and hub ids are looked for first."""
    for name in names_of_models(config):
        if name == BUNDLED:
            if not (place := cache / "models" / f"{BUNDLED}-1").exists():
                put_model(place, (LlamaConfig, LlamaForCausalLM))
        elif name in FAMILIES:
            put_model(Path(name), FAMILIES[name])
        else:
            put_run(name, runs)
    held_out = [config.data.eval] if config.data.eval else []
    for source in (*config.data.sources, *held_out):
        assert source.path is not None
        if not Path(source.path).exists():
            put_set(source.path, Path(source.path))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with nothing but `configs`, and an empty cache."""
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("configs").symlink_to(ROOT / "configs")
    return tmp_path / "cache"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_starts_with_the_paths_that_it_has(
    recipe: Path, cache: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_run(recipe, [])
    put_everything(config, runs, cache)
    rehearse(config)
    assert "dry run: nothing is wrong" in capsys.readouterr().out
    assert not config.folder.exists(), "it leaves nothing behind"


@pytest.mark.parametrize("recipe", sorted(set(ALIGN.glob("*.yaml")) - set(RECIPES)), ids=lambda path: path.stem)
def test_every_stage_of_a_chain_starts_with_what_those_before_it_leave(
    recipe: Path, cache: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    chain = load_config(recipe, [], kind=PipelineConfig)
    check(chain, recipe.parent)
    places = {"sft": str(find_checkpoint(runs["whole"])), "reward": str(find_checkpoint(runs["reward"]))}
    for stage in chain.stages:
        config = load_run(recipe.parent / stage.config, settings_of(stage, chain, places))
        put_everything(config, runs, cache)
        rehearse(config)
    assert capsys.readouterr().out.count("nothing is wrong") == len(chain.stages)


def test_a_dry_run_finds_what_would_fail_and_leaves_a_run_as_it_was(
    run_settings: Row, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ClusterRunConfig.model_validate(run_settings)
    file = Path(run_settings["data"]["path"]).with_name("run.yaml")
    file.write_text(yaml.safe_dump(run_settings))
    train_command(file, [], dry_run=True)
    with pytest.raises(ModelError, match="no/model"):
        train_command(file, ["model.path=./no/model"], dry_run=True)
    assert not Path(run_settings["output"]).exists()
    assert "4 steps are to be done, after 0" in capsys.readouterr().out
    train(config, World(), Silent())
    before = {file: file.stat().st_mtime_ns for file in config.folder.rglob("*") if file.is_file()}
    rehearse(ClusterRunConfig.model_validate({**run_settings, "steps": 6}))
    assert "2 steps are to be done, after 4" in capsys.readouterr().out
    after = {file: file.stat().st_mtime_ns for file in config.folder.rglob("*") if file.is_file()}
    assert {file: time for file, time in after.items() if file.name != ".lock"} == {
        file: time for file, time in before.items() if file.name != ".lock"
    }


def test_no_text_in_configs_says_what_is_no_longer_so() -> None:
    texts = {file: file.read_text(encoding="utf-8").lower() for file in (ROOT / "configs").rglob("*.yaml")}
    stale = ("zero-3, which is not supported", "every worker holds the whole model", "has none and ignores it")
    assert not [file.name for file, text in texts.items() if any(words in text for words in stale)]
