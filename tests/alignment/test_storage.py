"""Checkpoints in a storage are complete or absent, a run on a new machine goes on from them, and failures lose none."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from alignment import storage
from alignment.distributed.world import World
from alignment.errors import CheckpointError, ConfigError, StorageError
from alignment.metrics import FileReporter
from alignment.models.folders import model_source, with_checkpoints
from alignment.models.model_folder import COMMITTED, MANIFEST, ModelFolder
from alignment.run_folder import RunFolder, checkpoint_or_path, find_checkpoint
from alignment.settings.run import RunConfig
from alignment.storage import StoredFolders, is_url
from alignment.stored_run import StoredRun
from alignment.train import rehearse
from cluster import cli
from tests.alignment.dict_storage import DictStorage
from tests.alignment.test_train import measured, merged, run, weights
from tests.alignment.test_workers import train_with
from tests.workers import run_two

Settings = dict[str, Any]


OWN = {"name": "tests.alignment.dict_storage:DictStorage", "url": "dict:runs"}
CHECKPOINTS = "dict:runs/run/checkpoints"
"""Where `DictStorage` has the checkpoints of a run with these settings."""


@pytest.fixture(autouse=True)
def _empty_storages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import fsspec

    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(DictStorage, "files", {})
    monkeypatch.setattr(DictStorage, "refuses", staticmethod(lambda method, name: False))
    yield
    fsspec.filesystem("memory").store.clear()


def refuse(monkeypatch: pytest.MonkeyPatch, condition: Callable[[str, str], bool]) -> None:
    monkeypatch.setattr(DictStorage, "refuses", staticmethod(condition))


@pytest.fixture(params=["path", "file", "memory", "own"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> StoredFolders:
    """The same contract for a folder, for two of fsspec's file systems, and for one's own class."""
    if request.param == "own":
        return StoredFolders.open("dict:x", name=OWN["name"])
    scheme = {"path": "", "file": "file://", "memory": "memory://"}[request.param]
    return StoredFolders.open(f"{scheme}{tmp_path}/storage/run/checkpoints")


def checkpoint(folder: Path, **files: Any) -> Path:
    """A committed folder with a few files, which hold `files` as JSON."""
    (folder / "trainer").mkdir(parents=True)
    for name, content in {"config": {}, "trainer/state": {"step": 0}, "trainer/tensors": [1] * 500, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    ModelFolder(folder).commit()
    return folder


# ---------------------------------------------------------------------------------------------------- the contract


def test_what_is_stored_comes_back_as_it_was(stored: StoredFolders, tmp_path: Path) -> None:
    assert stored.checkpoints() == []
    for step in (4, 12, 8):
        stored.upload(checkpoint(tmp_path / f"step-{step:08d}", config={"step": step}))
    assert stored.checkpoints() == ["step-00000012", "step-00000008", "step-00000004"]
    copy = tmp_path / "copies" / "step-00000008"
    stored.fetch(copy.name, copy)
    ModelFolder(copy).verify()
    original = tmp_path / copy.name
    assert stored.commit_mark(copy.name) == ModelFolder(copy).commit_mark == ModelFolder(original).commit_mark
    assert {file.name for file in copy.rglob("*")} == {file.name for file in original.rglob("*")}
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_folder_replaces_an_older_one_of_its_name_with_all_its_files(stored: StoredFolders, tmp_path: Path) -> None:
    stored.upload(checkpoint(tmp_path / "old" / "step-00000004", more=1))
    stored.upload(checkpoint(tmp_path / "new" / "step-00000004", config={"new": 1}))
    stored.fetch("step-00000004", tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == {"new": 1}
    assert stored._files_by_folder()["step-00000004"].count("more.json") == 0


def test_what_is_deleted_is_gone_and_a_trial_leaves_nothing(stored: StoredFolders, tmp_path: Path) -> None:
    stored.upload(checkpoint(tmp_path / "step-00000004"))
    stored.delete("step-00000004")
    stored.delete("step-00000004")
    (tmp_path / "state.json").write_text("{}")
    stored.try_out(tmp_path / "state.json")
    assert stored.checkpoints() == [] and stored._files_by_folder() == {}
    assert stored.commit_mark("step-00000004") is None
    assert not (tmp_path / "state.json.downloaded").exists()


def test_the_newest_are_kept_and_what_is_incomplete_or_damaged_goes(stored: StoredFolders, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 9):
        stored.upload(checkpoint(tmp_path / f"step-{step:08d}"))
    stored.storage.delete(f"step-00000003/{COMMITTED}")
    stored.upload(checkpoint(tmp_path / "inputs"))
    stored.prune("step-00000004", keep=2)  # the run has not resumed from 9
    assert set(stored._files_by_folder()) == {"step-00000004", "step-00000002", "inputs"}


def test_an_upload_that_breaks_off_at_any_file_leaves_no_complete_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = StoredFolders.open("dict:x", name=OWN["name"])
    stored.upload(checkpoint(tmp_path / "step-00000004"))
    newer = checkpoint(tmp_path / "step-00000008")
    files = [*ModelFolder(newer).read_manifest(), MANIFEST, COMMITTED]
    assert len(files) == 5
    for file in files:
        refuse(monkeypatch, lambda method, name, file=file: (method, name) == ("upload", f"{newer.name}/{file}"))
        with pytest.raises(StorageError, match=f"the upload of {newer.name}/{file} failed 3 times: PermissionError"):
            stored.upload(newer)
        assert stored.checkpoints() == ["step-00000004"]
    refuse(monkeypatch, lambda method, name: False)
    stored.upload(newer)
    refuse(monkeypatch, lambda method, name: (method, name) == ("delete", f"{newer.name}/config.json"))
    with pytest.raises(StorageError, match="the deletion of"):
        stored.delete(newer.name)
    assert stored.checkpoints() == ["step-00000004"], "the commit mark goes first"


def test_what_fails_once_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def refuse_first_calls(method: str, name: str) -> bool:
        calls.append(f"{method} {name}")
        return calls.count(calls[-1]) == 1

    refuse(monkeypatch, refuse_first_calls)
    stored = StoredFolders.open("dict:x", name=OWN["name"])
    stored.upload(checkpoint(tmp_path / "step-00000004"))
    stored.fetch("step-00000004", tmp_path / "copy")
    ModelFolder(tmp_path / "copy").verify()
    assert "the upload of step-00000004/config.json failed, again in 0 s: PermissionError" in caplog.text


def test_a_place_that_does_not_exist_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As s3fs tells of a bucket."""

    def raise_not_found(*_: object) -> None:
        raise FileNotFoundError("the bucket does not exist")

    stored = StoredFolders.open("dict:x", name=OWN["name"])
    for method in ("list_files", "upload"):
        monkeypatch.setattr(DictStorage, method, raise_not_found)
    with pytest.raises(StorageError, match=r"dict:x: listing failed 3 times: .*the bucket does not exist"):
        stored.checkpoints()
    (tmp_path / "state.json").touch()
    with pytest.raises(StorageError, match="the bucket does not exist"):
        stored.try_out(tmp_path / "state.json")


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "another content": ("trainer/tensors.json", lambda content: content.replace(b"1", b"2"), "the content of {} has"),
    "a file cut off": ("trainer/tensors.json", lambda content: content[:-1], "{} has 1499 bytes instead of 1500"),
    "a file missing": ("config.json", lambda content: None, "{} is missing"),
    "another manifest": (MANIFEST, lambda content: content + b" ", "{} is not the one that was committed"),
    "no manifest": (MANIFEST, lambda content: None, "{} is missing"),
}


def damage(kind: str, name: str = "step-00000004", folder: str = "dict:x") -> None:
    file, change, _ = DAMAGES[kind]
    key = f"{folder}/{name}/{file}"
    content = change(DictStorage.files.pop(key))
    if content is not None:
        DictStorage.files[key] = content


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused_with_its_name(kind: str, tmp_path: Path) -> None:
    stored = StoredFolders.open("dict:x", name=OWN["name"])
    stored.upload(checkpoint(tmp_path / "step-00000004"))
    damage(kind)
    file, _, text = DAMAGES[kind]
    with pytest.raises(CheckpointError, match="dict:x/step-00000004 is damaged: " + text.format(file)) as caught:
        stored.fetch("step-00000004", tmp_path / "copies" / "step-00000004")
    assert not isinstance(caught.value, StorageError), "the storage has answered"
    assert not list((tmp_path / "copies").iterdir())


def test_a_manifest_writes_nothing_outside_of_its_folder(tmp_path: Path) -> None:
    stored = StoredFolders.open("dict:x", name=OWN["name"])
    folder = checkpoint(tmp_path / "step-00000004")
    manifest = json.dumps({"../outside.json": {"sha256": "", "bytes": 1}})
    (folder / MANIFEST).write_text(manifest)
    (folder / COMMITTED).write_text(hashlib.sha256(manifest.encode()).hexdigest())
    for name in (MANIFEST, COMMITTED):
        stored.storage.upload(folder / name, f"{folder.name}/{name}")
    with pytest.raises(CheckpointError, match=r"names '\.\./outside\.json', which lies outside"):
        stored.fetch(folder.name, tmp_path / "copy" / folder.name)


# ---------------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"url": "s3://bucket/runs", "name": "fsspek"}, "there is no storage 'fsspek'; did you mean 'fsspec'"),
        ({"url": "x", "name": "tests.alignment.test_storage:Nothing"}, "cannot be imported"),
        ({"url": "x", "name": "tests.alignment.test_storage:OWN"}, "is a dict, not a function"),
        ({"url": "x", "name": "pathlib:Path"}, "storage 'pathlib:Path' has no upload, download, list_files, delete"),
        ({"url": "s3://key:word@bucket/runs"}, "url must hold no password or key"),
        ({"url": "s3://b", "arguments": {"client_kwargs": {"aws_secret": "x"}}}, r"arguments \(aws_secret\) must hold"),
        ({}, "Field required"),
    ],
)
def test_a_storage_that_cannot_be_is_refused_with_the_file(
    section: Settings, message: str, run_settings: Settings
) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({**run_settings, "checkpoint": {"storage": section}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"url": "s3://bucket/runs"}, "Install s3fs"),
        ({"url": "gs://bucket/runs"}, "[Pp]lease install gcsfs|Install gcsfs"),
        ({"url": "s4://bucket/runs"}, "cannot be opened: Protocol not known: s4"),
        ({**OWN, "arguments": {"colour": "red"}}, r"DictStorage' of dict:runs/run/checkpoints cannot be opened: Type"),
    ],
)
def test_a_storage_that_cannot_be_opened_ends_a_run_before_it_loads_a_model(
    section: Settings, message: str, run_settings: Settings
) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(ConfigError, match=message):
        run({**run_settings, "model": {"path": "./none"}}, checkpoint={"storage": section})


@pytest.mark.parametrize("method", ["upload", "download", "list_files", "delete"])
def test_what_a_storage_does_not_allow_is_known_before_the_first_step(
    method: str, run_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, lambda called, name: called == method)
    with pytest.raises(CheckpointError, match=r"cannot be written, so no step is taken: dict:runs.*PermissionError"):
        run(run_settings, checkpoint={"storage": OWN})
    assert not RunFolder(Path(run_settings["output"]) / "run").read_metrics()


# ------------------------------------------------------------------------------------------------------------ runs


def train_by_command(file: Path, *overrides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`raylign train`, in this process, which has loaded torch already."""
    on_terminate = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["raylign", "train", str(file), *overrides])
    try:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, on_terminate)


def test_a_run_goes_on_bit_for_bit_on_a_machine_that_has_only_the_storage(
    run_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run({**run_settings, "output": str(tmp_path / "whole")}, steps=8, evaluate={"every": 4})
    keeping = {"checkpoint": {"every": 4, "storage": {"url": f"file://{tmp_path}/storage"}}, "evaluate": {"every": 4}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**run_settings, **keeping}))
    folder = Path(run_settings["output"]) / "run"
    folder.mkdir(parents=True)
    (folder / "date").write_text("2020-02-02\n")  # the run began on that day
    train_by_command(file, "steps=4", monkeypatch=monkeypatch)
    stored_names = {
        path.name for path in (tmp_path / "storage" / "run" / "checkpoints").iterdir() if any(path.iterdir())
    }
    assert stored_names == {"step-00000004", "inputs"}
    assert RunFolder(folder).read_summary()["failed_uploads"] == 0
    shutil.rmtree(folder)
    train_by_command(file, "steps=8", monkeypatch=monkeypatch)
    assert measured(folder) == [line for line in measured(whole) if line["step"] > 4]
    assert (folder / "date").read_text() == "2020-02-02\n"
    resumed, uninterrupted = weights(folder), weights(whole)
    assert all((resumed[name] == tensor).all() for name, tensor in uninterrupted.items())
    assert [path.name for path in RunFolder(folder).checkpoints()] == ["step-00000008", "step-00000004"]


def stored_steps() -> list[int]:
    return [int(name[-8:]) for name in StoredFolders.open(CHECKPOINTS, name=OWN["name"]).checkpoints()]


def test_the_storage_keeps_as_many_checkpoints_as_the_folder(run_settings: Settings) -> None:
    folder = run(run_settings, steps=5, checkpoint={"every": 1, "keep": 2, "storage": OWN})
    assert stored_steps() == [5, 4]
    assert [path.name for path in RunFolder(folder).checkpoints()] == ["step-00000005", "step-00000004"]
    assert {name.removeprefix(f"{CHECKPOINTS}/").partition("/")[0] for name in DictStorage.files} == {
        "inputs",
        "step-00000004",
        "step-00000005",
    }


def test_what_the_folder_has_newer_is_taken_and_completes_the_storage(run_settings: Settings) -> None:
    settings = {**run_settings, "checkpoint": {"every": 2}}
    folder = run(settings)
    assert not DictStorage.files
    with_storage = merged(settings, {"checkpoint": {"storage": OWN}})
    run(with_storage)  # is finished, and is uploaded all the same
    assert stored_steps() == [4]
    (folder / "checkpoints" / "step-00000004" / "config.json").write_text("{}")
    run(with_storage, steps=6)
    assert (folder / "quarantine" / "step-00000004").is_dir(), "which was taken from the storage again"
    assert find_checkpoint(folder).name == "step-00000006" and stored_steps() == [6, 4]


@pytest.mark.parametrize("kind", ["another content", "a file missing"])
def test_a_damaged_checkpoint_of_the_storage_is_left_for_the_one_before(
    kind: str, run_settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**run_settings, "checkpoint": {"every": 2, "keep": 1, "storage": OWN}}
    undisturbed = run({**settings, "output": str(tmp_path / "whole"), "checkpoint": {"every": 2}}, steps=6)
    folder = run(merged(settings, {"checkpoint": {"keep": 2}}))
    key = f"{CHECKPOINTS}/step-00000004/config.json"
    if kind == "a file missing":
        del DictStorage.files[key]
    else:
        DictStorage.files[key] = DictStorage.files[key].replace(b"llama", b"LLAMA")
    shutil.rmtree(folder)
    run(settings, steps=6)
    assert "step-00000004 is damaged" in caplog.text and "config.json" in caplog.text
    assert "trying the one before" in caplog.text
    assert [line["step"] for line in RunFolder(folder).read_metrics()] == [3, 4, 5, 6]
    assert all((weights(folder)[name] == tensor).all() for name, tensor in weights(undisturbed).items())
    assert stored_steps() == [6]


def test_a_storage_that_does_not_answer_is_no_reason_to_begin_again(
    run_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**run_settings, "checkpoint": {"every": 2, "storage": OWN}}
    folder = run(settings)
    shutil.rmtree(folder)
    refuse(monkeypatch, lambda method, name: method == "download" and name.startswith("step-"))
    with pytest.raises(StorageError, match=r"the download of step-00000004/COMMITTED failed 3 times"):
        run(settings, steps=6)
    assert not RunFolder(folder).read_metrics()


def test_a_failed_upload_is_counted_and_only_the_last_one_ends_the_run(
    run_settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**run_settings, "checkpoint": {"every": 1, "storage": OWN}}
    refuse(monkeypatch, lambda method, name: method == "upload" and name.startswith("step-00000002"))
    folder = run(settings)
    assert RunFolder(folder).read_summary()["failed_uploads"] == 1
    assert "was not uploaded (failed uploads: 1)" in caplog.text
    assert stored_steps() == [4, 3]
    refuse(monkeypatch, lambda method, name: method == "upload" and name.startswith("step-00000006"))
    with pytest.raises(StorageError, match=r"the last checkpoint is complete in .*/checkpoints, and not in dict:runs"):
        run(settings, steps=6)
    assert stored_steps() == [5, 4] and find_checkpoint(folder).name == "step-00000006"
    refuse(monkeypatch, lambda method, name: False)
    run(settings, steps=6)
    assert stored_steps() == [6, 5]


def test_the_loop_does_not_wait_for_an_upload(run_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first checkpoint's upload ends only when step 3 was reported."""
    folder = RunFolder(Path(run_settings["output"]) / "run")
    steps: list[float] = []

    def wait_for_step_3(method: str, name: str) -> bool:
        if (method, name) == ("upload", f"step-00000002/{COMMITTED}"):
            deadline = time.monotonic() + 60
            while (step := folder.read_metrics()[-1]["step"]) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            steps.append(step)
        return False

    refuse(monkeypatch, wait_for_step_3)
    run(run_settings, checkpoint={"every": 2, "keep": 1, "storage": OWN})
    assert steps in ([3], [4])
    assert stored_steps() == [4]


def test_an_error_of_the_run_waits_for_its_upload(run_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def upload_slowly(method: str, name: str) -> bool:
        if name == f"step-00000002/{COMMITTED}":
            time.sleep(0.5)
        return False

    refuse(monkeypatch, upload_slowly)
    checkpoints = {"every": 2, "storage": OWN}
    tracker = "tests.alignment.test_storage:LateTracker"
    with pytest.raises(ConfigError, match="has failed"):
        run(run_settings, checkpoint=checkpoints, trackers=[tracker])
    assert stored_steps() == [2]


def test_who_interrupts_a_run_does_not_wait_for_its_upload(
    run_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.model_validate({**run_settings, "checkpoint": {"storage": OWN}})
    folder = checkpoint(config.run_folder.checkpoint(4))
    is_over = threading.Event()

    def wait_until_over(method: str, name: str) -> bool:
        return method == "upload" and not is_over.wait(60)

    refuse(monkeypatch, wait_until_over)
    with pytest.raises(KeyboardInterrupt), StoredRun(config, is_main=True) as stored_run:
        stored_run.upload(folder)
        raise KeyboardInterrupt
    assert not is_over.is_set() and stored_steps() == []
    is_over.set()
    stored_run.finish()
    assert stored_steps() == [4]


def test_a_checkpoint_that_was_written_again_is_uploaded_again(
    run_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a roll-back, from which the run goes on with other prompts."""
    config = RunConfig.model_validate({**run_settings, "checkpoint": {"storage": OWN}})
    for number in (1, 2):
        shutil.rmtree(config.folder, ignore_errors=True)
        folder = checkpoint(config.run_folder.checkpoint(4), number=number)
        with StoredRun(config, is_main=True) as stored_run:
            stored_run.complete(folder)
        assert json.loads(DictStorage.files[f"{CHECKPOINTS}/step-00000004/number.json"]) == number
    refuse(monkeypatch, lambda method, name: method == "upload")
    with StoredRun(config, is_main=True) as stored_run:
        stored_run.complete(folder)
    stored_run.finish()  # nothing was uploaded


class LateTracker:
    """A tracker that fails at step 3."""

    def __init__(self, config: RunConfig) -> None:
        pass

    def log(self, step: int, metrics: object) -> None:
        if step == 3:
            raise OSError("no room")

    def close(self) -> None:
        pass


def test_rows_and_day_of_a_run_come_back_from_the_storage(run_settings: Settings) -> None:
    config = RunConfig.model_validate({**run_settings, "checkpoint": {"storage": OWN}})
    folder = config.make_folder()
    folder.date_file.write_text("2020-02-02\n")
    folder.rows_folder.mkdir()
    (folder.rows_folder / "rows-1.jsonl").write_text("{}\n")
    StoredRun(config, is_main=True).store_inputs()
    shutil.rmtree(folder.path)
    config.make_folder()
    StoredRun(config, is_main=True).fetch_inputs()
    assert folder.date_file.read_text() == "2020-02-02\n"
    assert (folder.rows_folder / "rows-1.jsonl").read_text() == "{}\n"
    folder.date_file.write_text("2021-01-01\n")
    StoredRun(config, is_main=True).fetch_inputs()
    assert folder.date_file.read_text() == "2021-01-01\n", "a run's own folder comes first"
    assert sorted(path.name for path in folder.path.iterdir()) == ["data", "date"]


def test_a_dry_run_tries_the_storage_and_leaves_nothing_there(run_settings: Settings) -> None:
    config = RunConfig.model_validate({**run_settings, "checkpoint": {"storage": OWN}})
    rehearse(config, World(), FileReporter(config))
    assert not DictStorage.files


def test_one_of_two_workers_uploads_and_both_resume_from_the_storage(run_settings: Settings, tmp_path: Path) -> None:
    settings = {**run_settings, "checkpoint": {"every": 2, "storage": {"url": str(tmp_path / "storage")}}}
    whole = {**run_settings, "output": str(tmp_path / "whole"), "steps": 6}
    for each in run_two(train_with, (whole,), (whole,)):
        assert each.error is None
    folder = Path(settings["output"]) / "run"
    for steps in (4, 6):
        shutil.rmtree(folder, ignore_errors=True)
        for each in run_two(train_with, *[({**settings, "steps": steps},)] * 2):
            assert each.error is None
    assert [line["step"] for line in RunFolder(folder).read_metrics()] == [5, 6]
    for name, tensor in weights(tmp_path / "whole" / "run").items():
        assert (weights(folder)[name] == tensor).all()


# -------------------------------------------------------------------------------------------- models to start from


def test_an_address_of_a_run_or_checkpoint_is_its_model(
    run_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    url = f"file://{tmp_path}/storage"
    folder = run(run_settings, checkpoint={"every": 2, "storage": {"url": url}})
    older, newest = (f"{url}/run/checkpoints/step-0000000{step}" for step in (2, 4))
    copy = Path(checkpoint_or_path(f"{url}/run"))
    ModelFolder(copy).verify()
    assert copy.name == "step-00000004" and (copy / "trainer" / "state.json").is_file()
    assert not list(copy.rglob("tensors.safetensors")), "the trainer's tensors are not downloaded"
    original = find_checkpoint(folder)
    assert (copy / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
    assert checkpoint_or_path(newest) == checkpoint_or_path(f"{url}/run/checkpoints") == model_source(f"{url}/run")
    config = RunConfig.model_validate(merged(run_settings, {"name": "next", "model": {"path": f"{url}/run"}}))
    pinned = with_checkpoints(config)
    assert pinned.model.path == newest, "the same on every machine"
    assert Path(model_source(older)).name == "step-00000002"
    again = run(merged(run_settings, {"name": "next", "steps": 1, "model": {"path": older}}))
    assert [line["step"] for line in RunFolder(again).read_metrics()] == [0, 1]
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run with a complete one"):
        checkpoint_or_path(f"{url}/walk")
    with pytest.raises(CheckpointError, match="is no complete checkpoint"):
        checkpoint_or_path(f"{url}/run/checkpoints/step-00000003")


def test_a_new_checkpoint_of_the_same_address_is_downloaded_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    stored = StoredFolders.open("memory://bucket/runs/demo/checkpoints")
    for number in (1, 2):
        stored.upload(checkpoint(tmp_path / f"{number}" / "step-00000004", config={"number": number}))
        folder = Path(checkpoint_or_path("memory://bucket/runs/demo"))
        assert json.loads((folder / "config.json").read_text()) == {"number": number}


@pytest.mark.parametrize("text", ["s3://bucket/runs", "gs://b", "file:///tmp/runs", "abfs://c@account/x", "memory://x"])
def test_addresses_of_storages(text: str) -> None:
    assert is_url(text)


@pytest.mark.parametrize(
    "text", ["runs/demo", "/runs", "org/model", "https://host/x", "zip::s3://b", "s3://b::file://x"]
)
def test_what_is_no_address_of_a_storage(text: str) -> None:
    assert not is_url(text)
