"""A reference is the model that training started from, by whichever way its log-probabilities are had."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.distributed.world import World
from alignment.errors import CheckpointError
from alignment.groups import Completion, Group
from alignment.models.roles import Roles
from alignment.reference import _attach, precompute
from alignment.run_folder import RunFolder, find_checkpoint
from alignment.settings.run import RunConfig
from alignment.step import annotate
from tests.alignment.test_packing import random_groups
from tests.alignment.test_train import run

Settings = dict[str, Any]
LORA = {"rank": 4, "alpha": 64}
WAYS = ("adapter_off", "copy", "precomputed")

pytestmark = pytest.mark.usefixtures("one_thread")


def shortness(prompts: list[str], completions: list[str]) -> list[float]:
    """A scorer of held-out answers, so that held-out prompts are answered."""
    return [-float(len(text)) for text in completions]


def built(settings: Settings, way: str) -> tuple[RunConfig, Roles]:
    config = RunConfig.model_validate({**settings, "algorithm": {"name": "dpo", "reference": way}})
    config.make_folder()
    return config, Roles.build(config, World())


def reference(config: RunConfig, roles: Roles, groups: list[Group]) -> torch.Tensor:
    """[L] log π_ref of all completion tokens, as the first step has it."""
    if roles.reference == "precomputed":
        groups = precompute(groups, roles, config, World(), progress=False)
    batch = annotate(roles, groups, config.optim, World())
    assert batch.reference_logprobs is not None
    return batch.reference_logprobs[batch.completion_index >= 0]


@pytest.fixture
def started(run_settings: Settings) -> Settings:
    """Settings of a run that goes on from an adapter, which says something else than its base."""
    model = {**run_settings["model"], "lora": LORA}
    start = run({**run_settings, "name": "start", "model": model}, steps=6, optim={"lr": 1e-2, "schedule": "constant"})
    return {**run_settings, "model": {**model, "lora": {**LORA, "start": str(start)}}}


def test_all_ways_to_the_reference_give_the_same_also_when_training_goes_on_from_an_adapter(
    started: Settings,
) -> None:
    """A6 of the review: precomputed ones were those of the started adapter."""
    groups = random_groups(6)
    found = {way: reference(*built({**started, "name": way}, way), groups) for way in WAYS}
    for way in WAYS[1:]:
        torch.testing.assert_close(found[way], found["adapter_off"], atol=1e-5, rtol=0)
    config, roles = built(started, "adapter_off")
    with torch.no_grad():
        batch = annotate(roles, groups, config.optim, World())
        actor = roles.outputs(batch).logprobs[batch.completion_index >= 0]
    assert (actor - found["adapter_off"]).abs().max() > 0.1, "the adapter does nothing, so this test proves nothing"


def test_all_ways_give_the_same_run(started: Settings) -> None:
    runs = {
        way: RunFolder(run({**started, "name": way, "algorithm": {"name": "dpo", "reference": way}})).read_metrics()
        for way in WAYS
    }
    for way in WAYS[1:]:
        for one, other in zip(runs["adapter_off"], runs[way], strict=True):
            names = [name for name in one if not name.startswith("perf/")]
            assert {n: other[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("lora", [None, LORA])
def test_texts_that_were_not_precomputed_are_never_held_against_the_actor_itself(
    lora: Settings | None, run_settings: Settings
) -> None:
    """A6.3: `eval/kl` was always 0."""
    settings = {
        **run_settings,
        "model": {**run_settings["model"], "lora": lora},
        "eval_rewards": [{"name": f"{__name__}:shortness"}],
        "rollout": {"engine": "local", "max_tokens": 6},
        "optim": {"lr": 1e-2, "schedule": "constant"},
    }
    kls = {}
    for way in ("auto", "precomputed"):
        folder = run({**settings, "name": way, "algorithm": {"name": "dpo", "reference": way}})
        kls[way] = RunFolder(folder).read_metrics()[-1].get("eval/kl")
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()] if lora else []
        assert all("kl" in row for row in rows)
    assert kls["auto"] is not None and kls["auto"] > 0.1
    if lora:
        assert kls["precomputed"] == pytest.approx(kls["auto"], rel=1e-3), "the base is in memory, below the adapter"
    else:
        assert kls["precomputed"] is None, "no reference is in memory, so nothing is known"


CHANGES: dict[str, Callable[[Settings, Path], Settings]] = {
    "max_length": lambda settings, _: {**settings, "data": {**settings["data"], "max_length": 80}},
    "dtype": lambda settings, _: {**settings, "model": {**settings["model"], "dtype": "bf16"}},
    "attention": lambda settings, _: {**settings, "model": {**settings["model"], "attention": "sdpa"}},
    "weights": lambda settings, folder: changed_weights(settings, folder),
    "settings": lambda settings, folder: changed_settings(settings, folder),
}


def copied(settings: Settings, folder: Path) -> tuple[Settings, Path]:
    model = Path(settings["model"]["path"])
    if model != folder:
        shutil.copytree(model, folder)
    return {**settings, "model": {**settings["model"], "path": str(folder)}}, folder


def changed_weights(settings: Settings, folder: Path) -> Settings:
    settings, model = copied(settings, folder)
    weights = {name: weight * 1.01 for name, weight in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return settings


def changed_settings(settings: Settings, folder: Path) -> Settings:
    settings, model = copied(settings, folder)
    kept = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(kept | {"rms_norm_eps": 1e-2}))
    return settings


@pytest.mark.parametrize("what", CHANGES)
def test_what_the_numbers_depend_on_is_in_the_name_of_their_file(
    what: str, run_settings: Settings, tmp_path: Path
) -> None:
    settings, _ = copied(run_settings, tmp_path / "model")
    files = []
    for change in (None, None, CHANGES[what]):
        changed = settings if change is None else change(settings, tmp_path / "model")
        config, roles = built(changed, "precomputed")
        precompute(random_groups(3), roles, config, World(), progress=False)
        files.append(len(list(config.folder.glob("reference-*"))))
    assert files == [1, 1, 2]


def test_which_tokens_are_learned_is_in_the_name_too(run_settings: Settings) -> None:
    """Where a token is not learned, nothing is computed."""
    config, roles = built(run_settings, "precomputed")
    tokens = tuple(range(5, 11))
    for loss_mask in ((True,) * 6, (True,) * 3 + (False,) * 3):
        answers = (Completion(text="", tokens=tokens, loss_mask=loss_mask),) * 2
        groups = [Group(id="1", prompt="", prompt_tokens=(3, 4), completions=answers)]
        (group,) = precompute(groups, roles, config, World(), progress=False)
        known = group.completions[1].reference_logprobs
        assert known is not None and [bool(value) for value in known] == list(loss_mask)
    assert len(list(config.folder.glob("reference-*"))) == 2


def test_another_starting_adapter_has_the_same_reference(started: Settings, run_settings: Settings) -> None:
    """A6.2: the second one silently learned against the first one's adapter; now neither plays a part."""
    fresh = {**started, "model": {**started["model"], "lora": LORA}}
    groups = random_groups(4)
    first, second = (reference(*built(settings, "precomputed"), groups) for settings in (started, fresh))
    assert torch.equal(first, second)


def test_a_reference_that_cannot_be_written_says_so_and_leaves_nothing(run_settings: Settings) -> None:
    from tests.alignment.test_saving import files_of_at_most

    config, roles = built(run_settings, "precomputed")
    with files_of_at_most(100), pytest.raises(CheckpointError, match=r"reference-.* cannot be written"):
        precompute(random_groups(3), roles, config, World(), progress=False)
    assert not list(config.folder.glob("reference-*"))


def test_after_a_roll_back_the_groups_that_come_next_have_their_reference_too(run_settings: Settings) -> None:
    settings = {
        **run_settings,
        "steps": 2,
        "algorithm": {"name": "dpo", "reference": "precomputed"},
        "data": {**run_settings["data"], "shuffle": False},
        "guards": {"action": "roll_back", "max_roll_backs": 2},
    }
    folder = run(settings)
    (file,) = folder.glob("reference-*")
    assert len(find_checkpoint(folder).name) > 0
    tokens = load_file(file)["logprobs"].numel()
    alone = run({**settings, "name": "alone", "guards": {"action": "warn"}})
    (file,) = alone.glob("reference-*")
    assert tokens > load_file(file)["logprobs"].numel()


def test_the_reference_of_a_large_data_set_is_never_turned_into_python_numbers() -> None:
    """B8: one Python number for every token held the interpreter for 70 s at 600 million tokens."""
    answers = tuple(Completion(text="", tokens=(7,) * 500_000, loss_mask=()) for _ in range(2))
    groups = [Group(id=str(number), prompt="", completions=answers) for number in range(10)]
    logprobs = torch.rand(sum(len(c.tokens) for g in groups for c in g.completions))
    started_at = time.thread_time()
    attached = _attach(groups, logprobs)
    seconds = time.thread_time() - started_at
    last = attached[-1].completions[-1].reference_logprobs
    assert last is not None and torch.equal(last, logprobs[-500_000:])
    assert last.untyped_storage().data_ptr() == logprobs.untyped_storage().data_ptr(), "a view"
    assert seconds < 0.1, "10 million tokens as Python numbers would take a second"
