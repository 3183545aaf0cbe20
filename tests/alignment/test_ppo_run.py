"""Whole runs of PPO and its relatives on the tiny model: they learn, resume bit for bit, and keep their books."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.algorithms import Algorithm
from alignment.groups import Completion, Group
from alignment.models.model_folder import ModelFolder
from alignment.run_folder import RunFolder, find_checkpoint
from alignment.settings.plugins import algorithm_class
from tests.alignment.test_train import assert_same_run, run, weights
from tests.conftest import TEXT

Settings = dict[str, Any]

pytestmark = pytest.mark.usefixtures("one_thread")


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """Share of a text's characters that are letters: the rule that is learned here."""
    return [sum(character.isalpha() for character in text) / max(1, len(text)) for text in completions]


def shortness(prompts: list[str], completions: list[str]) -> list[float]:
    """A scorer of held-out answers that sees something else."""
    return [-float(len(text)) for text in completions]


def alike(prompts: list[str], completions: list[str]) -> list[float]:
    """Every answer is worth the same."""
    return [0.7] * len(completions)


def named(function: Callable[..., Any]) -> Settings:
    return {"name": f"{__name__}:{function.__name__}"}


@pytest.fixture
def sampling_run(run_settings: Settings, write_rows: Callable[..., Path]) -> Settings:
    """Settings of a run in which the tiny model answers prompts itself: 16 to learn from, 3 held out."""
    words = TEXT.split()
    prompts = [{"prompt": " ".join(words[i : i + 2 + i % 3])} for i in range(16)]
    return {
        **run_settings,
        "data": {
            "path": str(write_rows(prompts, "prompts.jsonl")),
            "eval": {"path": str(write_rows([{"prompt": f"held out {i}"} for i in range(3)], "eval.jsonl"))},
            "max_length": 64,
        },
        "algorithm": {"name": "grpo"},
        "rollout": {"engine": "local", "completions": 4, "max_tokens": 6},
        "rewards": [named(letters)],
        "eval_rewards": [named(shortness)],
        "optim": {"lr": 1e-3, "schedule": "constant"},
    }


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


KINDS = {
    "grpo": {"algorithm": {"name": "grpo", "kl_target": 0.5, "kl_horizon": 100.0}},
    "ppo, separate critic": {
        "algorithm": {"name": "ppo", "epochs_per_step": 2, "minibatches_per_epoch": 2, "kl_target": 0.5},
        "critic": {"trunk": "separate", "lr": 2e-3, "warmup_steps": 1},
    },
    "ppo, shared trunk": {
        "algorithm": {"name": "ppo", "epochs_per_step": 2, "kl_target": 0.5},
        "critic": {"trunk": "shared", "warmup_steps": 1},
    },
    "reinforce++": {"algorithm": {"name": "reinforce++"}, "model": {"lora": {"rank": 4}}},
    "grpo, two steps ahead": {"rollout": {"steps_ahead": 2}},
    "grpo, ahead and with refills": {
        "algorithm": {"name": "grpo", "drop_equal_groups": True, "kl_target": 0.5, "kl_horizon": 100.0},
        "rollout": {"steps_ahead": 1, "max_tokens": 1},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_four_steps_and_four_more_are_eight_bit_for_bit(kind: str, sampling_run: Settings, tmp_path: Path) -> None:
    settings = {**sampling_run, **KINDS[kind], "evaluate": {"every": 2, "samples": 2}, "checkpoint": {"every": 4}}
    for section in ("model", "rollout"):
        settings[section] = {**sampling_run[section], **KINDS[kind].get(section, {})}
    whole = run(settings, steps=8)
    halves = {**settings, "output": str(tmp_path / "halves")}
    run(halves, steps=4)
    resumed = run(halves, steps=8)
    assert_same_run(whole, resumed)
    for name in ("provenance.jsonl", "samples.jsonl"):
        assert (whole / name).read_text() == (resumed / name).read_text(), name

    states = [
        json.loads((find_checkpoint(folder) / "trainer" / "state.json").read_text()) for folder in (whole, resumed)
    ]
    assert states[0] == states[1]
    coefficients = [line["kl_coefficient"] for line in RunFolder(whole).read_metrics() if line["step"]]
    if settings["algorithm"].get("kl_target"):
        assert len(set(coefficients)) > 4, "the price must move"
        assert states[0]["kl_coefficient"] not in coefficients, "and the next step's is kept"
    if "critic" in settings:
        kept = weights(resumed)
        assert any(name.startswith("critic.optimizer.exp_avg.") for name in kept)


def test_every_position_is_learned_from_exactly_once(sampling_run: Settings) -> None:
    folder = run(sampling_run, steps=8, checkpoint={"every": 3})
    provenance = rows_of(folder / "provenance.jsonl")
    assert [row["step"] for row in provenance] == list(range(1, 9))
    assert [row["position"] for row in provenance] == [4 * step for step in range(1, 9)]
    for epoch in (provenance[:4], provenance[4:]):
        seen = Counter(prompt for row in epoch for prompt in row["prompts"])
        assert len(seen) == 16 and set(seen.values()) == {1}
    assert [row["versions"] for row in provenance] == [[step] for step in range(8)], (
        "each step answers with its own weights"
    )


def test_ahead_by_one_step_the_answers_are_one_version_old(sampling_run: Settings) -> None:
    folder = run(sampling_run, steps=5, rollout={**sampling_run["rollout"], "steps_ahead": 1})
    provenance = rows_of(folder / "provenance.jsonl")
    assert [row["versions"] for row in provenance] == [[0], [0], [1], [2], [3]]
    assert [row["position"] for row in provenance] == [4, 8, 12, 16, 20]
    mismatch = [line["mismatch/mean_abs"] for line in RunFolder(folder).read_metrics() if line["step"]]
    assert mismatch[0] < 1e-5 < min(mismatch[1:]), "what is off the policy is measured, and corrected"


LEARNERS: dict[str, Settings] = {
    "grpo": {"algorithm": {"name": "grpo", "kl_placement": "none"}},
    "ppo": {"algorithm": {"name": "ppo", "kl_placement": "none"}},
    "online_dpo": {"algorithm": {"name": "online_dpo"}},
}


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_simple_rule_is_learned(kind: str, sampling_run: Settings) -> None:
    rollout = {**sampling_run["rollout"], "completions": 16, "max_tokens": 4}
    settings = {**sampling_run, **LEARNERS[kind], "rollout": rollout, "eval_rewards": []}
    folder = run(settings, steps=20, optim={"lr": 1e-2, "schedule": "constant"})
    rewards = [line["reward"] for line in RunFolder(folder).read_metrics() if line["step"]]
    first, last = (sum(part) / len(part) for part in (rewards[:3], rewards[-3:]))
    print(f"{kind}: {first:.3f} -> {last:.3f}")
    assert last > first + 0.15


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_while_the_critic_warms_up_the_actor_stands_still(trunk: str, sampling_run: Settings, tiny_model: Path) -> None:
    settings = {**sampling_run, "algorithm": {"name": "ppo"}, "critic": {"trunk": trunk, "warmup_steps": 2}}
    folder = run(settings, steps=3, checkpoint={"every": 2})
    start, end = load_file(tiny_model / "model.safetensors"), load_file(find_checkpoint(folder) / "model.safetensors")
    assert not all(torch.equal(end[name], start[name]) for name in start)

    warm = RunFolder(folder).checkpoints_folder / "step-00000002"
    end = load_file(warm / "model.safetensors")
    assert all(torch.equal(end[name], start[name]) for name in start)
    lines = [line for line in RunFolder(folder).read_metrics() if 1 <= line["step"] <= 2]
    assert all(line["lr"] == 0 and "grad_norm" not in line and line["grad_norm_critic"] > 0 for line in lines)
    assert lines[1]["value_loss"] != lines[0]["value_loss"]
    assert not any(name.startswith("optimizer.") for name in weights(warm)), "nor does it gather moments"


def test_actor_and_critic_learn_at_rates_of_their_own(sampling_run: Settings, tiny_model: Path) -> None:
    """The first step of AdamW moves a weight by the learning rate, whatever its gradient."""
    settings = {**sampling_run, "algorithm": {"name": "ppo", "epochs_per_step": 1}, "critic": {"lr": 4e-3}}
    kept, start = weights(run(settings, steps=1)), load_file(tiny_model / "model.safetensors")
    for prefix, lr in (("master.", 1e-3), ("critic.master.", 4e-3)):
        moves = [(kept[prefix + name] - start[name]).abs().max().item() for name in start]
        assert max(moves) == pytest.approx(lr, rel=1e-2)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_trained_and_sampled_log_probabilities_have_one_temperature(
    name: str, temperature: float, sampling_run: Settings
) -> None:
    rollout = {**sampling_run["rollout"], "temperature": temperature}
    algorithm = {"name": name, "epochs_per_step": 1}
    before, first = RunFolder(run(sampling_run, steps=1, rollout=rollout, algorithm=algorithm)).read_metrics()
    assert first["mismatch/mean_abs"] < 1e-4
    assert first["mismatch/ratio"] == pytest.approx(1, abs=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-3) and before["eval/kl"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("filtered", [{"top_p": 0.6}, {"top_k": 3}])
def test_a_filtered_sampler_keeps_to_its_filter_and_is_measured_against_the_whole_distribution(
    filtered: Settings, sampling_run: Settings
) -> None:
    settings = {**sampling_run, "algorithm": {"name": "ppo", "epochs_per_step": 1}}
    _, first = RunFolder(run(settings, steps=1, rollout={**sampling_run["rollout"], **filtered})).read_metrics()
    assert 0 < first["mismatch/ratio"] < 1, "every token was drawn from fewer, so with a larger probability"
    assert first["kl"] == pytest.approx(0, abs=1e-3), "the actor is still its own reference"


def test_top_k_of_one_is_greedy(sampling_run: Settings) -> None:
    folder = run(sampling_run, steps=1, rollout={**sampling_run["rollout"], "top_k": 1})
    first = RunFolder(folder).read_metrics()[-1]
    assert first["groups/equal_rewards"] == 1 and first["policy_loss"] == 0


@pytest.mark.parametrize(
    ("algorithm", "rollout"),
    [
        ("grpo", {"top_p": 0.6}),
        ("online_dpo", {"temperature": 0.7}),
        ("online_dpo", {"top_k": 3}),
        ("grpo", {"temperature": 0.7}),
        ("online_dpo", {}),
    ],
)
def test_before_the_first_update_the_divergence_is_zero(
    algorithm: str, rollout: Settings, sampling_run: Settings
) -> None:
    rollout = {**sampling_run["rollout"], **rollout}
    before, first = RunFolder(run(sampling_run, steps=1, rollout=rollout, algorithm={"name": algorithm})).read_metrics()
    assert first["kl"] == pytest.approx(0, abs=1e-3)
    assert before["eval/kl"] == pytest.approx(0, abs=1e-3)


def test_online_pairs_come_from_the_scores_and_ties_make_none(sampling_run: Settings) -> None:
    algorithm = algorithm_class("online_dpo").model_validate({"name": "online_dpo"})
    assert isinstance(algorithm, Algorithm)

    def group(*rewards: float) -> Group:
        return Group(id="", prompt="?", completions=tuple(Completion(text="", reward=r) for r in rewards))

    assert group(0.1, 0.9, 0.1).pairs == [(1, 0), (1, 2)]
    assert algorithm.is_informative(group(0.1, 0.9)) and not algorithm.is_informative(group(0.5, 0.5))
    _, first = RunFolder(run(sampling_run, algorithm={"name": "online_dpo"}, steps=1)).read_metrics()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5), "at first the actor is its own reference"


@pytest.mark.parametrize("algorithm", ["online_dpo", "grpo", "rloo"])
def test_a_run_in_which_all_is_worth_the_same_learns_nothing_and_stays_finite(
    algorithm: str, sampling_run: Settings, tiny_model: Path
) -> None:
    settings = {**sampling_run, "rewards": [named(alike)]}
    settings["algorithm"] = (
        {"name": algorithm} if algorithm == "online_dpo" else {"name": algorithm, "kl_placement": "none"}
    )
    folder = run(settings, steps=2)
    for line in (line for line in RunFolder(folder).read_metrics() if line["step"]):
        assert line["loss"] == 0 and line["grad_norm"] == 0 and line["groups/equal_rewards"] == 1
        assert all(math.isfinite(value) for value in line.values())
    start, end = load_file(tiny_model / "model.safetensors"), load_file(find_checkpoint(folder) / "model.safetensors")
    assert all(torch.equal(end[name], start[name]) for name in start)


def test_a_run_of_which_every_answer_is_masked_learns_nothing_and_stays_finite(
    sampling_run: Settings, tiny_model: Path
) -> None:
    """One token is too short for the tiny model to end in."""
    settings = {**sampling_run, "rollout": {**sampling_run["rollout"], "max_tokens": 1}}
    folder = run(settings, steps=1, algorithm={"name": "ppo", "truncated": "mask", "epochs_per_step": 1})
    line = RunFolder(folder).read_metrics()[-1]
    assert line["completions/truncated"] == 1 and line["loss"] == 0
    assert all(math.isfinite(value) for value in line.values())


def test_answers_that_were_drawn_ahead_of_a_changed_stream_are_drawn_anew(
    sampling_run: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would stand behind prompts that they do not answer."""
    settings = {**sampling_run, "rollout": {**sampling_run["rollout"], "steps_ahead": 1}}
    settings["data"] = {**settings["data"], "streaming": True, "shuffle": False}
    run(settings, steps=2)
    rows = Path(settings["data"]["path"])
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[::-1]))
    folder = run(settings, steps=3)
    assert "the stream gives other prompts than those that were answered ahead" in capsys.readouterr().out
    provenance = rows_of(folder / "provenance.jsonl")
    assert provenance[-1]["versions"] == [2] and provenance[-1]["position"] == 12


def test_a_checkpoint_without_answers_drawn_ahead_is_resumed_as_before(sampling_run: Settings) -> None:
    settings = {**sampling_run, "rollout": {**sampling_run["rollout"], "steps_ahead": 1}}
    folder = find_checkpoint(run(settings, steps=2))
    for name in ("trainer/rollouts.safetensors", "manifest.json", "COMMITTED"):
        (folder / name).unlink()
    ModelFolder(folder).commit()
    provenance = rows_of(run(settings, steps=4) / "provenance.jsonl")
    assert [row["versions"] for row in provenance] == [[0], [0], [2], [2]]


def test_uninformative_groups_are_replaced_by_new_prompts(sampling_run: Settings) -> None:
    algorithm = {"name": "grpo", "drop_equal_groups": True}
    folder = run(sampling_run, algorithm=algorithm, rollout={**sampling_run["rollout"], "max_tokens": 1}, steps=3)
    lines = [line for line in RunFolder(folder).read_metrics() if line["step"]]
    provenance = rows_of(folder / "provenance.jsonl")
    assert sum(line["rollout/refills"] for line in lines) > 0
    assert provenance[-1]["position"] == 12 + sum(line["rollout/refills"] for line in lines)
    assert all(len(row["prompts"]) == 4 for row in provenance)


def test_uninformative_groups_are_replaced_while_drawing_ahead_too(sampling_run: Settings, tmp_path: Path) -> None:
    """The groups after them move up: every step is whole, none is out of turn, and none is staler than allowed."""
    settings = {
        **sampling_run,
        "data": {**sampling_run["data"], "shuffle": False},
        "algorithm": {"name": "grpo", "drop_equal_groups": True},
        "rollout": {**sampling_run["rollout"], "max_tokens": 1, "steps_ahead": 1},
        "evaluate": {"every": 3},
    }
    rows = [f"prompts.jsonl:{line}" for line in range(1, 17)] * 8
    run(settings, steps=3)
    whole, resumed = run({**settings, "output": str(tmp_path / "whole")}, steps=6), run(settings, steps=6)
    assert_same_run(whole, resumed)
    for folder in (whole, resumed):
        provenance = rows_of(folder / "provenance.jsonl")
        refills = [line["rollout/refills"] for line in RunFolder(folder).read_metrics() if line["step"]]
        assert sum(refills) > 0
        assert [row["position"] for row in provenance] == [4 * n + sum(refills[:n]) for n in range(1, 7)]
        for before, row in zip([{"position": 0}, *provenance], provenance, strict=False):
            assert len(row["prompts"]) == 4
            assert row["versions"][0] >= row["step"] - 2
            in_turn = iter(rows[before["position"] : row["position"]])
            assert all(Path(prompt).name in in_turn for prompt in row["prompts"])
