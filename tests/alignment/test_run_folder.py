"""What is asked of a run, a model or a file on disk."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import CheckpointError
from alignment.files import replace_atomically, write_durably
from alignment.models.model_folder import COMMITTED, MANIFEST, ModelFolder
from alignment.run_folder import RunFolder, append_row, checkpoint_or_path, find_checkpoint, truncate_rows

ROOT = Path(__file__).parents[2]
LINE_ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\rg\x1ch\n"
"""Characters at which `str.splitlines` breaks a line."""


def write_model(folder: Path, **files: Any) -> ModelFolder:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return ModelFolder(folder)


def test_a_sampled_answer_may_hold_any_character(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rows = [{"step": step, "answer": LINE_ENDS} for step in (0, 1, 2)]
    for row in rows:
        append_row(run.samples_file, row)
    assert run.read_samples() == rows
    truncate_rows(run.samples_file, 1)
    assert run.read_samples() == rows[:2]


def test_a_row_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    append_row(run.metrics_file, {"step": 1, "loss": 0.5})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.read_metrics() == [{"step": 1, "loss": 0.5}]
    truncate_rows(run.metrics_file, 0)
    assert run.read_metrics() == [] and run.metrics_file.exists()


def test_a_file_stays_as_it_was_if_its_new_content_fails(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    write_durably(file, b"old", mode=0o600)
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(KeyError), replace_atomically(file) as partial_file:
        partial_file.write_bytes(b"ne")
        raise KeyError
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_a_run_is_told_from_a_model(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert not run.is_run and run.read_config() is None and run.checkpoints() == []
    write_model(run.path, config={"algorithm": {}, "data": {}})
    model = write_model(tmp_path / "model", config={"model_type": "llama"})
    assert run.is_run and not RunFolder(model.path).is_run
    assert checkpoint_or_path(str(model.path)) == str(model.path)
    with pytest.raises(CheckpointError, match=r"this run has none \(yet\)"):
        checkpoint_or_path(str(run.path))


def test_a_run_gives_its_newest_intact_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    for step in (2, 10, 12):
        write_model(run.checkpoint(step), config={"step": step}).commit()
    (run.checkpoint(12) / "config.json").write_text("{}")
    assert [folder.name for folder in run.checkpoints()] == ["step-00000012", "step-00000010", "step-00000002"]
    assert RunFolder.of_checkpoint(run.checkpoint(10)) == RunFolder.at(run.checkpoints_folder) == run
    assert RunFolder.of_checkpoint(run.path) is None and RunFolder.at(run.path) == run
    assert find_checkpoint(run.path) == run.checkpoint(10)
    assert (run.quarantine_folder / "step-00000012").is_dir()


def test_a_committed_folder_knows_its_files(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", config={})
    assert not model.is_checkpoint and model.commit_mark is None and model.read_manifest() == {}
    mark = model.commit()
    assert model.is_checkpoint and model.commit_mark == mark and set(model.read_manifest()) == {"config.json"}
    model.verify()
    (model.path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"the content of config\.json has changed"):
        model.verify(only_model=True)


@pytest.mark.parametrize(
    ("files", "kind", "gives_scores"),
    [
        ({"config": {"architectures": ["LlamaForCausalLM"]}}, "full", False),
        ({"config": {"architectures": ["LlamaForSequenceClassification"]}}, "full", True),
        ({"adapter_config": {"task_type": "CAUSAL_LM"}}, "adapter", False),
        ({"adapter_config": {"task_type": "SEQ_CLS"}}, "adapter", True),
    ],
)
def test_a_model_says_what_it_is(tmp_path: Path, files: dict[str, Any], kind: str, gives_scores: bool) -> None:
    model = write_model(tmp_path, **files)
    assert (model.kind, model.is_reward_model) == (kind, gives_scores)
    assert model.weight_files() == ["adapter_model.safetensors" if kind == "adapter" else "model.safetensors"]
    assert not model.has_tokenizer and model.read_chat_template() is None


def test_both_are_asked_without_torch() -> None:
    code = "import sys, alignment.run_folder, alignment.models.folders; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_name_of_a_file_is_written_down_once() -> None:
    properties = {name for name in vars(RunFolder) if name.endswith(("_file", "_folder")) and name != "reference_file"}
    names = {getattr(RunFolder(Path()), name).name for name in properties} | {MANIFEST, COMMITTED}
    names -= {
        "config.json",
        ".lock",
        "data",
        "date",
        "ray",
        "report.html",
        "tensorboard",
    }  # other things are called so too
    constants = [
        node.value
        for package in ("alignment", "cluster", "serving")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
    ]
    assert {name: constants.count(name) for name in names} == dict.fromkeys(names, 1)
