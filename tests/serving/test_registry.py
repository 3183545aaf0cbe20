"""A registry's versions are whole, its state is one answer, and no kill, crowd or damage changes that."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import CheckpointError, ServingError
from serving.registry import state as module
from serving.registry.compatibility import LoraCapacity
from serving.registry.state import ChangeUnderWay, State
from serving.registry.versions import Registry
from tests.serving.tiny import adapter, of_run, whole

CHANGES = ("os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir")
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def three(registry: Registry, tmp_path: Path) -> Registry:
    """A registry with versions 1 to 3, of which the first answers."""
    for number in (1, 2, 3):
        registry.add(adapter(tmp_path / f"adapter-{number}", seed=number))
    registry.promote(1)
    return registry


def in_child(do: Callable[[], object]) -> int:
    """Runs something in a process of its own; returns its exit status, negative for a signal."""
    child = FORK.Process(target=do)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def test_a_new_registry_is_empty_and_writes_nothing(registry: Registry) -> None:
    assert registry.versions() == []
    assert registry.state() == State(current=0, previous=None, canary=None, share=0.0, serial=0)
    assert registry.lora_capacity() is None
    assert not registry.folder.exists()


def test_a_version_knows_its_run(registry: Registry, tmp_path: Path) -> None:
    run = tmp_path / "polite"
    checkpoint = of_run(run, 20)
    (run / "config.json").write_text(json.dumps({"name": "polite"}))
    lines = [
        {"step": 0, "eval/loss": 0.7},
        {"step": 10, "loss": 0.4, "eval/loss": 0.3, "eval/reward": float("nan")},
        {"step": 15, "loss": 0.2},
        {"step": 30, "eval/loss": 0.1},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    version = registry.add(run, parent=7)
    assert registry.version(1) == version
    assert (version.number, version.name, version.kind, version.base) == (
        1,
        "polite-step-00000020",
        "adapter",
        "org/base",
    )
    assert (version.parent, version.data, version.config) == (7, "fingerprint", {"name": "polite"})
    assert version.metrics == {"step": 10, "eval/loss": 0.3}
    assert version.source == str(checkpoint)


def test_a_model_from_elsewhere_has_no_history(registry: Registry, tmp_path: Path) -> None:
    version = registry.add(whole(tmp_path / "model"))
    assert (version.name, version.kind, version.base, version.data, version.config) == (
        "model",
        "full",
        None,
        None,
        None,
    )
    assert version.metrics == {}


def test_a_run_without_evaluations_or_with_a_torn_config_is_registered_all_the_same(
    registry: Registry, tmp_path: Path
) -> None:
    of_run(tmp_path / "run", 1)
    (tmp_path / "run" / "config.json").write_text('{"name": "ru')
    version = registry.add(tmp_path / "run")
    assert (version.data, version.config, version.metrics) == ("fingerprint", None, {})


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x", "nul\0"], ids=["long", "user", "nul"])
def test_what_is_no_path_at_all_is_no_folder_either(registry: Registry, name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a folder here"):
        registry.add(Path(name))


def test_a_version_holds_what_is_served_and_nothing_else(registry: Registry, tmp_path: Path) -> None:
    registry.add(of_run(tmp_path / "run", 1))
    folder = registry.folder_of(1)
    assert folder.is_absolute()
    adapter_files = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {path.name for path in folder.iterdir()} == adapter_files | {"manifest.json", "COMMITTED"}
    model = whole(tmp_path / "model")
    for name in ("optimizer.pt", "modeling_x.py", "consolidated.safetensors"):
        shutil.copy(model / "model.safetensors", model / name)
    (model / "original").mkdir()
    registry.add(model)
    kept = {path.name for path in registry.folder_of(2).iterdir()}
    assert kept == {"config.json", "model.safetensors", "tokenizer.json", "manifest.json", "COMMITTED"}


def test_a_version_outlives_its_run(registry: Registry, tmp_path: Path) -> None:
    checkpoint = of_run(tmp_path / "run", 1)
    registry.add(checkpoint)
    assert all(file.stat().st_nlink == 1 for file in registry.folder_of(1).iterdir())
    shutil.rmtree(tmp_path / "run")
    registry.verify(1)


def test_writing_over_a_checkpoint_changes_no_version_and_a_version_is_not_written_over(
    registry: Registry, tmp_path: Path
) -> None:
    served, other = whole(tmp_path / "served", seed=1), whole(tmp_path / "other", seed=2)
    registry.add(served)
    shutil.copyfile(other / "model.safetensors", served / "model.safetensors")  # as `cp` does: into the same file
    registry.verify(1)
    assert {file.stat().st_mode & 0o777 for file in registry.folder_of(1).iterdir()} == {0o444}


def test_small_files_are_copies_so_that_editing_the_original_changes_no_version(
    registry: Registry, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "adapter")
    registry.add(folder)
    with (folder / "adapter_config.json").open("r+") as file:
        file.write("{{{")
    registry.verify(1)


@pytest.mark.parametrize("error", [errno.EXDEV, errno.ENOSYS])
def test_what_the_system_cannot_copy_by_itself_is_copied_all_the_same(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    calls = []

    def refused(*_: object) -> int:
        calls.append(1)
        raise OSError(error, "not here")

    monkeypatch.setattr(os, "copy_file_range", refused)
    registry.add(adapter(tmp_path / "adapter"))
    assert calls
    registry.verify(1)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no second file system here")
def test_a_checkpoint_on_another_file_system_is_copied(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm") / f"raylign-test-{os.getpid()}"
    try:
        registry = Registry(elsewhere)
        registry.add(adapter(tmp_path / "adapter"))
        registry.verify(1)
    finally:
        shutil.rmtree(elsewhere)


def test_a_folder_of_links_is_copied_by_what_they_lead_to(registry: Registry, tmp_path: Path) -> None:
    blobs = adapter(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    registry.add(snapshot)
    shutil.rmtree(blobs)
    registry.verify(1)


def test_the_same_files_are_the_same_version(registry: Registry, tmp_path: Path) -> None:
    first = registry.add(of_run(tmp_path / "run", 1))
    copied = shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000001", tmp_path / "copy")
    assert registry.add(copied).number == 1
    assert registry.add(adapter(tmp_path / "bare")).number == 1, "neither trainer state nor README make it another"
    assert registry.add(registry.folder_of(1)).number == 1
    assert registry.version(1).content == first.content
    assert registry.add(adapter(tmp_path / "other", seed=5)).number == 2
    assert [version.number for version in registry.versions()] == [1, 2]


def opened_while(do: Callable[[], object], name: str) -> int:
    """How often files of a name are opened for reading while something is done."""
    opened = 0
    is_on = True

    def hook(event: str, arguments: Any) -> None:
        nonlocal opened
        opened += bool(is_on and event == "open" and str(arguments[0]).endswith(name))

    sys.addaudithook(hook)
    do()
    is_on = False
    return opened


def test_a_start_with_nothing_new_reads_no_weights(registry: Registry, tmp_path: Path) -> None:
    of_run(tmp_path / "run", 1)
    first = registry.add(tmp_path / "run")
    assert opened_while(lambda: registry.add(tmp_path / "run"), "adapter_model.safetensors") == 0
    assert opened_while(lambda: registry.add(Path(first.source)), "adapter_model.safetensors") == 0
    of_run(tmp_path / "run", 2, seed=2)
    assert registry.add(tmp_path / "run").number == 2
    shutil.copyfile(tmp_path / "run/checkpoints/step-00000001/README.md", Path(first.source) / "tokenizer.json")
    with pytest.raises(CheckpointError, match="damaged"):
        registry.add(Path(first.source))


def test_a_process_reads_a_version_once_to_verify_it_until_a_file_changes(registry: Registry, tmp_path: Path) -> None:
    registry.add(adapter(tmp_path / "adapter"))
    name = "adapter_model.safetensors"
    assert opened_while(lambda: registry.verify(1), name) == 1
    assert opened_while(lambda: registry.verify(1), name) == 0
    file = registry.folder_of(1) / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.chmod(0o644)
    file.write_bytes(content)
    os.utime(file, ns=times)
    with pytest.raises(CheckpointError, match="has changed"):
        registry.verify(1)


def test_a_version_that_nobody_needs_is_deleted_and_its_number_never_comes_back(three: Registry) -> None:
    for number in (2, 3):
        three.promote(number)
    assert three.state().older == (1,)
    size = sum(file.stat().st_size for file in three.folder_of(1).iterdir())
    assert three.delete(1) == size
    assert three.state() == State(current=3, previous=2, serial=4)
    assert [version.number for version in three.versions()] == [2, 3]
    for number, why in ((3, "it answers"), (2, "rollback"), (1, "no version 1"), (9, "no version 9")):
        with pytest.raises(ServingError, match=why):
            three.delete(number)


def test_the_newest_version_s_number_is_not_given_to_another(three: Registry, tmp_path: Path) -> None:
    three.delete(3)
    assert three.add(adapter(tmp_path / "again", seed=3)).number == 4


def test_a_version_that_is_tried_or_about_to_answer_is_not_deleted(three: Registry) -> None:
    three.canary(2, 0.1)
    with pytest.raises(ServingError, match="being tried"):
        three.delete(2)
    three.end_canary()
    three.begin_change(3)
    with pytest.raises(ServingError, match="about to answer"):
        three.delete(3)


def test_whoever_is_killed_while_deleting_leaves_the_version_whole_or_gone(three: Registry, tmp_path: Path) -> None:
    for count in itertools.count(1):
        registry = Registry(tmp_path / "copy")
        shutil.copytree(three.folder, registry.folder)
        status = in_child(lambda: killed_before(count, lambda: registry.delete(2)))  # noqa: B023
        for version in registry.versions():
            registry.verify(version.number)
        assert registry.add(adapter(tmp_path / f"new-{count}", seed=9)).number == 4
        assert not list((registry.folder / "versions").glob(".*")), "what was left is cleared away"
        if status == 0:
            break
        shutil.rmtree(registry.folder)
    assert count > 5


def test_a_damaged_version_is_replaced_by_one_at_a_new_path(registry: Registry, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    registry.add(folder)
    (registry.folder_of(1) / "adapter_model.safetensors").write_bytes(b"")
    version = registry.add(folder)
    assert version.number == 2
    registry.verify(2)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "COMMITTED"])
def test_a_corrupt_checkpoint_leaves_nothing_behind(registry: Registry, tmp_path: Path, name: str) -> None:
    checkpoint = of_run(tmp_path / "run", 1)
    content = bytearray((checkpoint / name).read_bytes())
    content[-1] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        registry.add(checkpoint)
    assert registry.versions() == []
    assert not registry.folder.exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "trainer/tensors.safetensors", "manifest.json"])
def test_a_checkpoint_without_one_of_its_files_is_refused(registry: Registry, tmp_path: Path, name: str) -> None:
    checkpoint = of_run(tmp_path / "run", 1)
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        registry.add(checkpoint)


def test_a_run_with_a_damaged_checkpoint_gives_the_one_before(registry: Registry, tmp_path: Path) -> None:
    of_run(tmp_path / "run", 1)
    (of_run(tmp_path / "run", 2, seed=2) / "tokenizer.json").write_text("")
    assert registry.add(tmp_path / "run").name == "run-step-00000001"


def test_a_file_beside_a_checkpoint_s_own_is_left_out(registry: Registry, tmp_path: Path) -> None:
    checkpoint = of_run(tmp_path / "run", 1)
    (checkpoint / "generation_config.json").write_text("{}")
    registry.add(checkpoint)
    assert not (registry.folder_of(1) / "generation_config.json").exists()


@pytest.mark.parametrize("path", ["gone", "file", "empty"])
def test_what_holds_no_model_is_refused(registry: Registry, tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=path):
        registry.add(tmp_path / path)


def test_a_candidate_that_does_not_fit_is_not_kept(three: Registry, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="rank 64"):
        three.add(adapter(tmp_path / "large", rank=64), compatible_with=1)
    with pytest.raises(ServingError, match="rank is 600"):
        three.add(adapter(tmp_path / "too-large", rank=600))
    assert len(three.versions()) == 3
    assert three.add(adapter(tmp_path / "fine", rank=4), compatible_with=1).number == 4


def test_there_is_room_for_every_adapter_that_was_ever_added(three: Registry, tmp_path: Path) -> None:
    assert three.lora_capacity() == LoraCapacity(rank=8, target_modules=("q_proj", "v_proj"))
    three.add(adapter(tmp_path / "large", rank=20, modules=("k_proj",)))
    three.add(whole(tmp_path / "whole"))
    assert three.lora_capacity() == LoraCapacity(rank=32, target_modules=("k_proj", "q_proj", "v_proj"))


def test_verify_finds_a_change_and_names_the_file(three: Registry) -> None:
    three.verify(2)
    file = three.folder_of(2) / "tokenizer.json"
    file.write_text(file.read_text().replace("BPE", "bpe"))
    with pytest.raises(CheckpointError, match=r"the content of tokenizer\.json has changed"):
        three.verify(2)
    shutil.rmtree(three.folder_of(2))
    for asked in (three.verify, three.version, three.folder_of, three.promote):
        with pytest.raises(ServingError, match="there is no version 2; there are 1, 3"):
            asked(2)


def test_promotions_follow_each_other_and_are_counted(three: Registry) -> None:
    assert three.state() == State(current=1, serial=1)
    three.promote(2)
    assert three.promote(3) == three.state() == State(current=3, previous=2, older=(1,), serial=3)
    assert three.promote(3) == State(current=3, previous=2, older=(1,), serial=3), "nothing changed"


def test_rollbacks_go_further_and_further_back(three: Registry) -> None:
    three.promote(2)
    three.promote(3)
    assert three.rollback() == State(current=2, previous=1, serial=4)
    assert three.rollback() == State(current=1, serial=5)
    with pytest.raises(ServingError, match="nothing answered before version 1"):
        three.rollback()
    three.promote(3)
    assert three.rollback().current == 1, "a version that was taken back is no way back"


def test_a_rollback_ends_a_canary_first(three: Registry) -> None:
    three.promote(2)
    three.canary(3, 0.1)
    assert three.rollback() == State(current=2, previous=1, serial=4)
    assert three.rollback().current == 1


def test_a_canary_gets_its_share_until_it_is_promoted_or_ended(three: Registry) -> None:
    assert three.canary(2, 0.0) == State(current=1, canary=2, serial=2)
    assert three.canary(2, 0.25).share == 0.25
    assert three.promote(2) == State(current=2, previous=1, serial=4)
    three.canary(3, 0.5)
    assert three.end_canary() == State(current=2, previous=1, serial=6)
    assert three.end_canary().serial == 6
    three.canary(3, 0.5)
    assert three.promote(2) == State(current=2, previous=1, serial=8), "promoting the current one ends the trial"


def test_a_canary_that_makes_no_sense_is_refused(three: Registry) -> None:
    three.canary(2, 0.1)
    with pytest.raises(ServingError, match="version 2 is being tried already"):
        three.canary(3, 0.1)
    with pytest.raises(ServingError, match="version 1 answers already"):
        three.canary(1, 0.1)
    with pytest.raises(ServingError, match="there is no version 9"):
        three.canary(9, 0.1)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ServingError, match="from 0 to below 1"):
            three.canary(2, share)
    assert three.state() == State(current=1, canary=2, share=0.1, serial=2)


def test_a_change_that_is_under_way_changes_nothing_that_answers_until_it_is_committed(three: Registry) -> None:
    begun = three.begin_change(2, started_by="Anna")
    state = three.state()
    assert (state.current, state.serial, state.change()) == (1, 1, begun)
    assert three.commit_change(begun.token) == State(current=2, previous=1, serial=2)
    trial = three.begin_change(3, 0.25)
    assert three.commit_change(trial.token) == State(current=2, previous=1, canary=3, share=0.25, serial=3)
    three.end_canary()
    back = three.begin_rollback()
    assert (back.number, back.is_rollback) == (1, True)
    assert three.commit_change(back.token) == State(current=1, serial=5)
    with pytest.raises(ServingError, match="nothing answered before version 1"):
        three.begin_rollback()


def test_a_change_that_is_aborted_leaves_no_trace(three: Registry) -> None:
    begun = three.begin_change(2)
    assert three.abort_change(begun.token) == State(current=1, serial=1) == three.state()
    assert three.abort_change(begun.token) == three.state()
    with pytest.raises(ServingError, match="given up"):
        three.commit_change(begun.token)


def test_while_a_change_is_under_way_every_other_one_is_refused_and_told_why(three: Registry) -> None:
    begun = three.begin_change(2, started_by="Anna")
    others: list[Callable[[], object]] = [
        lambda: three.begin_change(3),
        lambda: three.begin_change(3, 0.1),
        lambda: three.promote(3),
        lambda: three.canary(3, 0.1),
        three.end_canary,
        three.rollback,
    ]
    for other in others:
        with pytest.raises(ChangeUnderWay, match="promotion of version 2, which Anna asked for, is under way since"):
            other()
    assert three.commit_change(begun.token).current == 2


def test_a_change_whose_process_died_is_over_after_a_while_and_cannot_be_committed(
    three: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = three.begin_change(2)
    assert three.state().change(dead.heartbeat + module.HEARTBEAT_TIMEOUT_S - 1) == dead
    assert three.state().change(dead.heartbeat + module.HEARTBEAT_TIMEOUT_S) is None
    now = dead.heartbeat + module.HEARTBEAT_TIMEOUT_S
    monkeypatch.setattr("time.time", lambda: now)
    second = three.begin_change(3)
    for late in (three.renew_change, three.commit_change):
        with pytest.raises(ServingError, match="was silent"):
            late(dead.token)
    three.abort_change(dead.token)
    now += module.HEARTBEAT_TIMEOUT_S - 1
    three.renew_change(second.token)
    now += module.HEARTBEAT_TIMEOUT_S - 1
    assert three.state().change(now) is not None, "it is renewed"
    assert three.commit_change(second.token).current == 3


def test_what_cannot_be_is_refused_before_replicas_are_asked(three: Registry) -> None:
    for number, share, why in ((9, None, "no version 9"), (1, 0.1, "answers already"), (2, 1.5, "below 1")):
        with pytest.raises(ServingError, match=why):
            three.begin_change(number, share)
    assert three.state() == State(current=1, serial=1)


def test_of_many_processes_that_begin_a_change_one_does(three: Registry, tmp_path: Path) -> None:
    def begin(number: int) -> None:
        with contextlib.suppress(ChangeUnderWay):
            (tmp_path / f"{number}.token").write_text(three.begin_change(2 + number % 2).token)

    children = [FORK.Process(target=begin, args=(number,)) for number in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    (token,) = [file.read_text() for file in tmp_path.glob("*.token")]
    assert three.commit_change(token).serial == 2


def test_damaged_files_of_the_registry_are_named(three: Registry) -> None:
    for damage in ("", "{}]", '{"current": "x"}'):
        (three.folder / "state.json").write_text(damage)
        with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
            three.state()
    told = three.folder / "versions" / "00002.json"
    told.write_text(told.read_text()[:-10])
    with pytest.raises(CheckpointError, match=r"00002\.json is damaged"):
        three.version(2)
    told.unlink()
    with pytest.raises(CheckpointError, match=r"00002\.json is missing"):
        three.version(2)


def test_whoever_is_killed_while_adding_leaves_a_registry_that_works(tmp_path: Path) -> None:
    """The child is killed before its first change to the file system, its second, and so on, until it gets through."""
    template = Registry(tmp_path / "template")
    template.add(adapter(tmp_path / "first"))
    template.promote(1)
    candidate = of_run(tmp_path / "run", 1, seed=2)
    for count in itertools.count(1):
        registry = Registry(tmp_path / "registry")
        shutil.copytree(template.folder, registry.folder)
        status = in_child(lambda: killed_before(count, lambda: registry.add(candidate)))  # noqa: B023
        assert_intact(registry)
        assert registry.add(candidate).number == 2
        assert_intact(registry)
        assert sorted(path.name for path in (registry.folder / "versions").iterdir() if path.is_dir()) == [
            "00001",
            "00002",
        ]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        shutil.rmtree(registry.folder)
    assert count > 20, "it was killed at many places"


def test_whoever_is_killed_while_promoting_leaves_the_old_state_or_the_new(three: Registry, tmp_path: Path) -> None:
    for count in itertools.count(1):
        registry = Registry(tmp_path / "copy")
        shutil.copytree(three.folder, registry.folder)
        status = in_child(lambda: killed_before(count, lambda: registry.promote(2)))  # noqa: B023
        assert registry.state() in (State(current=1, serial=1), State(current=2, previous=1, serial=2))
        assert registry.promote(2) == State(current=2, previous=1, serial=2)
        if status == 0:
            break
        shutil.rmtree(registry.folder)
    assert count > 4


def killed_before(count: int, do: Callable[[], object]) -> None:
    """Does something, and dies before its change to the file system of that number."""
    left = count

    def hook(event: str, arguments: Any) -> None:
        nonlocal left
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    do()


def assert_intact(registry: Registry) -> None:
    assert registry.state() == State(current=1, serial=1)
    for version in registry.versions():
        registry.verify(version.number)


def test_many_at_once_add_and_promote_as_if_one_after_the_other(registry: Registry, tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"adapter-{seed}", seed=seed) for seed in range(5)]

    def work(first: int) -> None:
        for place in range(5):
            number = registry.add(folders[(first + place) % 5]).number
            registry.promote(number)

    children = [FORK.Process(target=work, args=(first,)) for first in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert [version.number for version in registry.versions()] == [1, 2, 3, 4, 5]
    assert len({version.content for version in registry.versions()}) == 5
    state = registry.state()
    answered = [state.current, state.previous, *state.older]
    assert state.serial == len(answered), "every change is there, once"
    assert all(one != other for one, other in itertools.pairwise(answered))
    for version in registry.versions():
        registry.verify(version.number)


def test_a_full_disk_is_an_error_in_words_and_changes_nothing(three: Registry, tmp_path: Path) -> None:
    large = adapter(tmp_path / "large", seed=9)

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        with pytest.raises(CheckpointError, match=r"cannot be copied into .*File too large"):
            three.add(large)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 200))
        with pytest.raises(CheckpointError, match=r"state\.json cannot be written: .*File too large"):
            three.promote(2)

    assert in_child(fill) == 0
    assert three.state() == State(current=1, serial=1)
    assert three.add(large).number == 4
