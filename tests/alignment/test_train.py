"""The loop alone: it learns, resumes bit for bit, keeps its files in order, and refuses what cannot go on."""

from __future__ import annotations

import json
import resource
import signal
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from pydantic import ValidationError
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event

from alignment.distributed.world import World
from alignment.errors import AlignmentError, CheckpointError, ConfigError
from alignment.metrics import FileReporter, NoteReporter, Silent
from alignment.models.model_folder import ModelFolder
from alignment.run import run_lock
from alignment.run_folder import RunFolder, find_checkpoint
from alignment.settings.run import OptimConfig, RunConfig
from alignment.train import rehearse, train
from tests.conftest import pair_rows
from tests.workers import fork_context

Settings = dict[str, Any]
LORA = {"rank": 4, "dropout": 0.1}  # dropout, so that the random states matter


def run(settings: Settings, **changed: Any) -> Path:
    config = RunConfig.model_validate({**settings, **changed})
    train(config, World(), FileReporter(config))
    return config.folder


def merged(settings: Settings, changed: Settings) -> Settings:
    """Settings with some keys of their sections changed."""
    both = {key: {**settings[key], **value} for key, value in changed.items() if isinstance(value, dict)}
    return {**settings, **changed, **both}


def measured(folder: Path) -> list[dict[str, float]]:
    """The metrics of every step but the times, which no run repeats."""
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in RunFolder(folder).read_metrics()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(folder) / "trainer" / "tensors.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert measured(one) == measured(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def tensorboard(folder: Path) -> Iterator[tuple[int, str, float]]:
    """Step, name and value of everything in a run's TensorBoard file, whose records are length, check, data, check."""
    (file,) = folder.glob("tensorboard/events*")
    data = file.read_bytes()
    while data:
        (length,) = struct.unpack_from("<Q", data)
        event = Event.FromString(data[12 : 12 + length])
        yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)
        data = data[16 + length :]


def test_dpo_learns_to_tell_its_pairs_apart(run_settings: Settings) -> None:
    folder = run(run_settings, steps=15, evaluate={"every": 5, "samples": 2, "sample_tokens": 4})
    metrics = RunFolder(folder).read_metrics()
    assert [line["step"] for line in metrics] == list(range(16))
    assert metrics[-1]["loss"] < 0.3 < metrics[1]["loss"]
    assert metrics[-1]["rewards/accuracies"] == 1
    assert [line["step"] for line in metrics if "eval/loss" in line] == [0, 5, 10, 15]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 15, 15]
    drawn = {(step, name): value for step, name, value in tensorboard(folder)}
    assert drawn[15, "loss"] == pytest.approx(metrics[-1]["loss"])
    assert len(drawn) == sum(len(line) - 1 for line in metrics)
    assert json.loads((folder / "summary.json").read_text())["groups_per_second"] > 0


class RunTracker:
    """A tracker of one's own, which remembers the metrics in a file of the run."""

    def __init__(self, config: RunConfig) -> None:
        self.file = config.folder / "tracked.jsonl"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def close(self) -> None:
        self.file.with_suffix(".closed").touch()


def test_a_tracker_of_ones_own_gets_every_metric(run_settings: Settings) -> None:
    folder = run(run_settings, steps=2, trackers=["tests.alignment.test_train:RunTracker"])
    rows = [json.loads(line) for line in (folder / "tracked.jsonl").read_text().splitlines()]
    assert rows == RunFolder(folder).read_metrics()
    assert (folder / "tracked.closed").exists()
    assert not (folder / "tensorboard").exists()


class FullTracker(RunTracker):
    """A tracker whose disk is full at step 1."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step:
            raise OSError("no room")


def test_a_tracker_that_fails_ends_the_run_in_words_and_is_closed(run_settings: Settings) -> None:
    with pytest.raises(
        ConfigError, match=r"tracker 'tests\.alignment\.test_train:FullTracker' has failed: OSError: no room"
    ):
        run(run_settings, trackers=["tests.alignment.test_train:FullTracker"])
    assert (Path(run_settings["output"]) / "run" / "tracked.closed").exists()


def test_a_run_that_is_refused_begins_no_tracker(run_settings: Settings) -> None:
    config = RunConfig.model_validate({**run_settings, "trackers": ["tests.alignment.test_train:RunTracker"]})
    with run_lock(config.make_folder()), pytest.raises(AlignmentError):
        train(config, World(), FileReporter(config))
    assert not (config.folder / "tracked.jsonl").exists() and not (config.folder / "tracked.closed").exists()


@pytest.mark.parametrize("name", ["tensorbord", "tests.alignment.test_train:NoTracker"])
def test_an_unknown_tracker_is_refused(run_settings: Settings, name: str) -> None:
    reason = "cannot be imported" if ":" in name else "did you mean 'tensorboard'"
    with pytest.raises(ValidationError, match=reason):
        RunConfig.model_validate({**run_settings, "trackers": [name]})


@pytest.mark.parametrize("model", [{}, {"lora": LORA}, {"dtype": "bf16"}, {"gradient_checkpointing": True}])
def test_ten_steps_and_ten_more_are_twenty_bit_for_bit(run_settings: Settings, model: Settings, tmp_path: Path) -> None:
    settings = {**run_settings, "model": {**run_settings["model"], **model}, "checkpoint": {"every": 5}}
    settings["evaluate"] = {"every": 5}
    settings["optim"] = {"lr": 1e-3, "schedule": "constant", "warmup_steps": 3}
    whole = run(settings, steps=20)
    halves = {**settings, "output": str(tmp_path / "halves")}
    run(halves, steps=10)
    assert_same_run(whole, run(halves, steps=20))


def heavy_ball(weights: list[torch.nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer of one's own, which remembers something of every weight."""
    return torch.optim.SGD(weights, lr=optim.lr, momentum=0.9)


def test_a_run_with_an_optimizer_of_ones_own_resumes_bit_for_bit(run_settings: Settings, tmp_path: Path) -> None:
    optim = {"name": "tests.alignment.test_train:heavy_ball", "lr": 0.1, "schedule": "constant"}
    settings = {**run_settings, "optim": optim, "checkpoint": {"every": 3}, "evaluate": {"every": 3}}
    whole = run(settings, steps=6)
    halves = {**settings, "output": str(tmp_path / "halves")}
    run(halves, steps=3)
    assert_same_run(whole, run(halves, steps=6))
    assert any(name.startswith("optimizer.momentum_buffer.") for name in weights(whole))


def refused_descent(weights: list[torch.nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=optim.lr, momentum=-1)


def misread_descent(weights: list[torch.nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=optim.momentum)  # type: ignore[attr-defined]


def no_descent(weights: list[torch.nn.Parameter], optim: OptimConfig) -> Any:
    return None


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (refused_descent, "cannot be made with the settings of optim: ValueError: Invalid momentum value: -1"),
        (misread_descent, "cannot be made with the settings of optim: AttributeError: .*'momentum'"),
        (no_descent, "returns a NoneType, not a torch.optim.Optimizer"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_named(
    run_settings: Settings, function: Callable[..., Any], problem: str
) -> None:
    name = f"tests.alignment.test_train:{function.__name__}"
    with pytest.raises(ConfigError, match=f"optim.name '{name}'.* {problem}"):
        run(run_settings, optim={**run_settings["optim"], "name": name})


class CountedDescent(torch.optim.SGD):
    """An optimizer that counts its steps where no checkpoint looks."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
        return super().step(closure)


def counted_descent(weights: list[torch.nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    return CountedDescent(weights, lr=optim.lr)


def stamped_descent(weights: list[torch.nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(weights, lr=optim.lr)
    optimizer.register_step_post_hook(lambda *_: [optimizer.state[weight].update(count=1) for weight in weights])
    return optimizer


@pytest.mark.parametrize(("name", "memory"), [("counted", "a setting of its groups"), ("stamped", "remembers count")])
def test_an_optimizer_that_no_checkpoint_can_store_ends_the_run_at_its_first_step(
    run_settings: Settings, name: str, memory: str
) -> None:
    optim = {**run_settings["optim"], "name": f"tests.alignment.test_train:{name}_descent"}
    with pytest.raises(ConfigError, match=memory):
        run(run_settings, optim=optim)


def test_a_stream_resumes_where_it_was(run_settings: Settings, tmp_path: Path) -> None:
    data = {**run_settings["data"], "streaming": True, "eval_groups": 0, "shuffle_buffer": 7}
    settings = {**run_settings, "data": data, "checkpoint": {"every": 5}}
    whole = run(settings, steps=12)
    halves = {**settings, "output": str(tmp_path / "halves")}
    run(halves, steps=5)
    assert_same_run(whole, run(halves, steps=12))


def test_gradient_checkpointing_changes_memory_and_not_the_result(run_settings: Settings, tmp_path: Path) -> None:
    plain = run(run_settings)
    model = {**run_settings["model"], "gradient_checkpointing": True}
    saving = run(run_settings, model=model, output=str(tmp_path / "saving"))
    for one, other in zip(measured(plain), measured(saving), strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("model", [{}, {"lora": LORA | {"dropout": 0.0}}])
def test_a_precomputed_reference_gives_the_same_run_as_a_live_one(
    run_settings: Settings, model: Settings, tmp_path: Path
) -> None:
    settings = {**run_settings, "model": {**run_settings["model"], **model}}
    live = run(settings)
    stored = run(
        settings, algorithm={"name": "dpo", "reference": "precomputed"}, output=str(tmp_path / "b"), epochs=None
    )
    assert len(list(stored.glob("reference-*.safetensors"))) == 1
    for one, other in zip(measured(live), measured(stored), strict=True):
        # Before the first step all margins are 0 but for rounding, which then decides what counts as accurate.
        one, other = ({k: v for k, v in line.items() if "accuracies" not in k} for line in (one, other))
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_a_precomputed_reference_is_computed_once(run_settings: Settings) -> None:
    algorithm = {"name": "dpo", "reference": "precomputed"}
    folder = run(run_settings, algorithm=algorithm, steps=2)
    (stored,) = folder.glob("reference-*.safetensors")
    written = stored.stat().st_mtime_ns
    run(run_settings, algorithm=algorithm, steps=2)
    assert stored.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"evaluate": {"every": 1, "samples": 5}}, "evaluate.every, evaluate.samples"),
        ({"eval_rewards": [{"name": "length", "target": 3}], "rollout": {"engine": "local"}}, "eval_rewards"),
        ({"guards": {"hacking_window": 3}}, "guards.hacking_window"),
    ],
)
def test_a_dry_run_says_which_settings_do_nothing_because_nothing_is_held_out(
    run_settings: Settings, capsys: pytest.CaptureFixture[str], changed: Settings, names: str
) -> None:
    for data, settings, is_warned in (
        ({"eval_groups": 0}, changed, True),
        ({"eval_groups": 4}, changed, False),
        ({"eval_groups": 0}, {}, False),
    ):
        config = RunConfig.model_validate({**run_settings, "data": {**run_settings["data"], **data}, **settings})
        rehearse(config, World(), NoteReporter())
        output = capsys.readouterr().out
        assert (f"WARNING: nothing is held out, so {names} will do nothing" in output) == is_warned, output
        assert "dry run: nothing is wrong" in output


def test_epochs_become_steps_rounded_up(run_settings: Settings) -> None:
    folder = run(run_settings, steps=None, epochs=1.5)
    assert RunFolder(folder).read_metrics()[-1]["step"] == 8, "1.5 × 20 groups in steps of 4 are 7.5 steps"


def test_a_finished_run_is_left_as_it_is(run_settings: Settings) -> None:
    folder = run(run_settings)
    before = (folder / "metrics.jsonl").read_text()
    run(run_settings)
    assert (folder / "metrics.jsonl").read_text() == before


def test_only_the_newest_checkpoints_are_kept(run_settings: Settings) -> None:
    folder = run(run_settings, steps=6, checkpoint={"every": 2, "keep": 2})
    kept = sorted(path.name for path in RunFolder(folder).checkpoints_folder.iterdir())
    assert kept == ["step-00000004", "step-00000006"]


def test_two_processes_cannot_train_one_run(run_settings: Settings) -> None:
    folder = Path(run_settings["output"]) / "run"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"), pytest.raises(ConfigError, match="another process is training"):
        run(run_settings)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"algorithm": {"name": "dpo", "beta": 0.2}}, r"algorithm\.beta was 0\.1 and is 0\.2"),
        ({"model": {"revision": "main"}}, "model.revision was None and is 'main'"),
        ({"optim": {"name": "rmsprop"}}, "optim.name was 'adamw' and is 'rmsprop'"),
        ({"data": {"shuffle": False}}, "data.shuffle was True and is False"),
        ({"groups_per_step": 8}, "groups_per_step was 4 and is 8"),
    ],
)
def test_a_run_does_not_go_on_as_another_one(run_settings: Settings, changed: Settings, field: str) -> None:
    run(run_settings)
    with pytest.raises(CheckpointError, match=field):
        run(merged(run_settings, changed), steps=6)


def test_a_run_does_not_go_on_with_other_data(run_settings: Settings) -> None:
    run(run_settings)
    path = Path(run_settings["data"]["path"])
    path.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(30)))
    with pytest.raises(CheckpointError, match=r"data was 20 groups \(.*\) and is 26 groups .* data\.take"):
        run(run_settings, steps=6)


def test_what_may_change_on_a_resume_is_told_with_old_and_new_values(
    run_settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four steps of a linear schedule end at a rate of nearly 0; with eight, the rate goes up again."""
    settings = merged(run_settings, {"optim": {"lr": 1e-3, "schedule": "linear"}})
    run(settings)
    capsys.readouterr()
    run(merged(settings, {"optim": {"lr": 8e-4}}), steps=8)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "resuming" in line)
    assert "resuming after step 4, with changed settings: steps 4 → 8, optim.lr 0.001 → 0.0008" in line
    assert "was 0.00025 in step 4 and is 0.0004 in step 5 (linear over 8 steps)" in line
    run(merged(settings, {"optim": {"lr": 8e-4, "micro_batch_tokens": 64}}), steps=9)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "resuming" in line)
    assert "steps 8 → 9" in line and "micro_batch" not in line, "what does not change results is not told"


def test_a_checkpoint_without_the_settings_that_may_change_is_resumed_all_the_same(
    run_settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those that were written before these were kept, and before `optim.name` was compared."""
    folder = find_checkpoint(run(run_settings))
    state = json.loads((folder / "trainer" / "state.json").read_text())
    del state["adjustable"], state["identity"]["optim"], state["identity"]["algorithm"]["beta"]
    (folder / "trainer" / "state.json").write_text(json.dumps(state))
    for mark in ("manifest.json", "COMMITTED"):
        (folder / mark).unlink()
    ModelFolder(folder).commit()
    capsys.readouterr()
    run(merged(run_settings, {"optim": {"lr": 5e-4}}), steps=6)
    assert "resuming after step 4\n" in capsys.readouterr().out


def test_a_run_is_not_shortened(run_settings: Settings) -> None:
    run(run_settings)
    with pytest.raises(ConfigError, match="already has 4 steps"):
        run(run_settings, steps=2)


def test_transformers_and_peft_open_a_checkpoint_as_it_is(run_settings: Settings, tiny_model: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    full = find_checkpoint(run(run_settings))
    trained = load_file(full / "trainer" / "tensors.safetensors")
    loaded = dict(AutoModelForCausalLM.from_pretrained(full).named_parameters())
    for name, weight in loaded.items():
        assert torch.equal(weight, trained[f"master.{name}"]), name
    assert AutoTokenizer.from_pretrained(full).chat_template

    lora = {**run_settings, "name": "lora", "model": {**run_settings["model"], "lora": {"rank": 2}}}
    adapter = find_checkpoint(run(lora))
    assert AutoPeftModelForCausalLM.from_pretrained(adapter).get_base_model().config.hidden_size == 64


def test_an_adapter_is_continued_from_its_merged_weights(
    run_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    lora = {**run_settings["model"], "lora": {"rank": 4}}
    first = run(run_settings, name="first", model=lora, steps=6)
    adapter = find_checkpoint(first)
    second = run(run_settings, name="second", model={**lora, "path": str(adapter)})
    loss_mask, continued = RunFolder(first).read_metrics()[-1], RunFolder(second).read_metrics()[0]
    assert continued["eval/rewards/margins"] == pytest.approx(0, abs=1e-4), "the merged start is the new reference"
    assert continued["eval/logps/chosen"] == pytest.approx(loss_mask["eval/logps/chosen"], abs=1e-2)


# What may happen to a checkpoint's files, and what the message must name.
DAMAGES = {
    "a flipped byte": ("model.safetensors", "the content of model.safetensors has changed"),
    "a cut file": ("trainer/tensors.safetensors", r"trainer/tensors.safetensors has \d+ bytes instead of \d+"),
    "a missing file": ("config.json", "config.json is missing"),
    "an empty manifest": ("manifest.json", "manifest.json is not the one that was committed"),
    "no commit mark": ("COMMITTED", "COMMITTED is missing"),
}


def damage(how: str, file: Path) -> None:
    content = bytearray(file.read_bytes())
    if how == "a flipped byte":
        content[-1] ^= 1
        file.write_bytes(content)
    elif how == "a cut file":
        file.write_bytes(content[:-10])
    elif how == "an empty manifest":
        file.write_bytes(b"{}")
    else:
        file.unlink()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    how: str, run_settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**run_settings, "checkpoint": {"every": 2}}
    folder = run(settings)
    name, message = DAMAGES[how]
    damage(how, folder / "checkpoints" / "step-00000004" / name)
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(folder / "checkpoints" / "step-00000004")
    undisturbed = run({**settings, "output": str(tmp_path / "undisturbed")})
    assert_same_run(undisturbed, run(settings))
    assert (folder / "quarantine" / "step-00000004").is_dir()
    assert "moved to" in caplog.text


def test_an_unfinished_checkpoint_is_never_chosen(run_settings: Settings) -> None:
    folder = run(run_settings)
    (RunFolder(folder).checkpoints_folder / ".step-00000009.unfinished").mkdir()
    newest = RunFolder(folder).newest_intact()
    assert newest is not None and newest.name == "step-00000004"


def test_a_folder_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint nor the folder of a run"):
        find_checkpoint(tmp_path)


def train_on_a_full_disk(settings: Settings) -> None:
    """A run in a process of its own, whose files the system lets grow to 40 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))
    train(RunConfig.model_validate(settings), World(), Silent())


def test_a_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint(run_settings: Settings) -> None:
    folder = run(run_settings)
    intact = find_checkpoint(folder)
    settings = {**run_settings, "steps": 6}
    with (
        ProcessPoolExecutor(1, mp_context=fork_context()) as pool,
        pytest.raises(CheckpointError, match="cannot be written"),
    ):
        pool.submit(train_on_a_full_disk, settings).result()
    assert find_checkpoint(folder) == intact
    assert not list(RunFolder(folder).checkpoints_folder.glob(".*"))


def test_errors_are_of_one_family() -> None:
    assert issubclass(CheckpointError, AlignmentError)
