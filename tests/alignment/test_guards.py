"""Run guards: what each limit notices, how patient it is, and what a run does then, on runs with scripted answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Container, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.distributed.world import World
from alignment.errors import GuardError
from alignment.guards import LIMITS, RunGuards
from alignment.metrics import FileReporter
from alignment.rollout import Policy, Prompt, Result, Rollout, Sampling, Weights
from alignment.run_folder import RunFolder, find_checkpoint
from alignment.settings.run import GuardsConfig, RunConfig
from alignment.train import train

Settings = dict[str, Any]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("metric", "key", "side", "meaning"), LIMITS)
def test_a_limit_is_broken_on_its_own_side_only(metric: str, key: str, side: str, meaning: str) -> None:
    guards = RunGuards(GuardsConfig.model_validate({key: 0.5, "patience": 1}))
    broken, kept = (0.6, 0.4) if side == "above" else (0.4, 0.6)
    assert guards.watch({metric: kept}) == []
    assert guards.watch({metric: 0.5}) == [], "the limit itself is allowed"
    (text,) = guards.watch({metric: broken})
    assert meaning in text and f"guards.{key} is 0.5" in text and f"{broken:g}" in text
    assert guards.watch({metric: float("nan")}), "what is no number is not within a limit"
    assert guards.watch({}) == [], "nothing is said of what was not measured"


@pytest.mark.parametrize(("metric", "key", "side", "_"), LIMITS)
def test_a_limit_of_zero_never_triggers(metric: str, key: str, side: str, _: str) -> None:
    guards = RunGuards(GuardsConfig(patience=1))
    assert guards.watch({metric: 1e9}) == [] and guards.watch({metric: -1e9}) == []


def test_patience_counts_steps_in_a_row() -> None:
    guards = RunGuards(GuardsConfig(max_kl=5.0, patience=3))
    heard = [bool(guards.watch({"kl": kl})) for kl in (6, 6, 4, 6, 6, 6, 6, 4, 6)]
    assert heard == [False, False, False, False, False, True, True, False, False]
    guards.reset()
    assert not guards.watch({"kl": 6}) and not guards.watch({"kl": 6}) and guards.watch({"kl": 6})


def test_rising_rewards_with_a_falling_eval_reward_are_told_of() -> None:
    guards = RunGuards(GuardsConfig(hacking_window=2), eval_rewards=["taste", "length"])

    def seen(reward: float, taste: float, length: float = 1.0) -> list[str]:
        return guards.watch(
            {"eval/reward": reward, "eval/eval_rewards/taste": taste, "eval/eval_rewards/length": length}
        )

    assert seen(0.1, 0.9) == [] and seen(0.5, 0.2) == [], "two evaluations are no window of two"
    (text,) = seen(0.6, 0.7)
    assert "rose by 0.5" in text and "'taste' fell from 0.9 to 0.7" in text
    assert seen(0.7, 0.8) == [], "over the last two the evaluation reward rose as well"
    assert seen(0.5, 0.1) == [], "the reward fell too"
    assert guards.watch({"kl": 3.0}) == [], "a step without an evaluation says nothing about it"


class Scripted:
    """Engines that answer with random tokens, and leave the answers of some calls without an end.

    They keep every version of the weights that they are given.
    """

    def __init__(self, endless: Container[int]) -> None:
        """`endless`: numbers of the calls, from 1, whose answers do not end."""
        self.endless = endless
        self.calls = 0
        self.is_new_call = False
        self.loaded: list[tuple[int, dict[str, Tensor]]] = []

    def start(self, work: Callable[[Policy], Coroutine[Any, Any, Result]]) -> Callable[[], Result]:
        self.is_new_call = True
        result = asyncio.run(work(self))
        return lambda: result

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        if sampling.num_completions > 1 and self.is_new_call:  # evaluations do not count
            self.calls += 1
            self.is_new_call = False
        return [self._answer(prompt.seed + k) for k in range(sampling.num_completions)]

    def load(self, weights: Weights) -> None:
        self.loaded.append((weights.version, {name: weight.clone() for name, weight in weights.named_weights()}))

    def close(self) -> None:
        pass

    def _answer(self, seed: int) -> Rollout:
        tokens = torch.randint(3, 300, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
        return Rollout(
            tokens=tuple(tokens),
            logprobs=(-5.0,) * 4,
            truncated=self.calls in self.endless,
            weight_version=self.loaded[-1][0],
        )


@pytest.fixture
def guarded(run_settings: Settings, write_rows: Callable[..., Path]) -> Settings:
    prompts = write_rows([{"prompt": f"the quick {i}"} for i in range(40)], "prompts.jsonl")
    held_out = write_rows([{"prompt": "what is"}], "eval.jsonl")
    return {
        **run_settings,
        "algorithm": {"name": "grpo"},
        "data": {"path": str(prompts), "eval": {"path": str(held_out)}, "max_length": 64},
        "rollout": {"engine": "local", "completions": 2, "max_tokens": 4},
        "rewards": [{"name": "length", "target": 3, "unit": "characters"}],
        "evaluate": {"samples": 1},
        "checkpoint": {"every": 1, "keep": 9},
        "guards": {"action": "roll_back", "max_truncated": 0.5, "patience": 1},
    }


def run(settings: Settings, engines: Scripted, **changed: Any) -> Path:
    config = RunConfig.model_validate({**settings, **changed})
    train(config, World(), FileReporter(config), engines)
    return config.folder


def positions(folder: Path) -> list[int]:
    return [json.loads(line)["position"] for line in (folder / "provenance.jsonl").read_text().splitlines()]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_roll_back_restores_the_weights_bit_for_bit_and_goes_on_with_later_prompts(
    guarded: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = Scripted(endless={3})
    folder = run(guarded, engines)
    assert [version for version, _ in engines.loaded] == [0, 1, 2, 3, 2, 3, 4]
    weights = [weights for _, weights in engines.loaded]
    assert same(weights[4], weights[2]) and not same(weights[4], weights[3])
    assert not same(weights[5], weights[3]), "other prompts teach something else"
    assert positions(folder) == [4, 8, 16, 20], "the prompts of the step that was taken back are not used again"
    assert [line["step"] for line in RunFolder(folder).read_metrics()] == [0, 1, 2, 3, 4]
    assert "Rolling back to step 2" in capsys.readouterr().out


def test_without_a_checkpoint_so_far_a_roll_back_goes_to_the_beginning(guarded: Settings) -> None:
    engines = Scripted(endless={1})
    folder = run(guarded, engines, steps=2, checkpoint={"every": 0})
    assert [version for version, _ in engines.loaded] == [0, 1, 0, 1, 2]
    assert same(engines.loaded[2][1], engines.loaded[0][1])
    assert positions(folder) == [8, 12]


def test_a_roll_back_to_the_beginning_keeps_what_was_measured_there(guarded: Settings) -> None:
    folder = run(guarded, Scripted(endless={1}), steps=2, checkpoint={"every": 0})
    samples = [json.loads(line)["step"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in RunFolder(folder).read_metrics()] == [0, 1, 2] and samples == [0, 2]


def test_after_too_many_roll_backs_the_run_stops(guarded: Settings) -> None:
    engines = Scripted(endless=range(3, 100))
    with pytest.raises(GuardError, match=r"step 3: 1 of the completions do not end.*after 2 roll-backs"):
        run(guarded, engines)
    assert [version for version, _ in engines.loaded] == [0, 1, 2, 3, 2, 3, 2, 3]
    assert find_checkpoint(Path(guarded["output"]) / "run").name == "step-00000002"


def test_a_run_that_is_stopped_has_not_kept_the_step_and_can_go_on(guarded: Settings) -> None:
    stopping = {**guarded, "guards": {**guarded["guards"], "action": "stop"}}
    with pytest.raises(GuardError, match=r"step 3: .*guards\.max_truncated is 0\.5"):
        run(stopping, Scripted(endless={3}))
    folder = Path(guarded["output"]) / "run"
    assert find_checkpoint(folder).name == "step-00000002"
    run(stopping, Scripted(endless=()))
    assert positions(folder) == [4, 8, 12, 16]


def test_a_warning_changes_nothing(guarded: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Scripted(endless=())
    run(guarded, quiet)
    warned = Scripted(endless={2, 3})
    warning = {**guarded["guards"], "action": "warn"}
    folder = run(guarded, warned, guards=warning, output=str(tmp_path / "warned"))
    assert same(warned.loaded[-1][1], quiet.loaded[-1][1])
    assert positions(folder) == [4, 8, 12, 16]
    said = capsys.readouterr().out
    assert "WARNING, step 2: 1 of the completions do not end" in said and "WARNING, step 3" in said
    assert "WARNING, step 4" not in said


def test_patience_holds_over_the_steps_of_a_run(guarded: Settings) -> None:
    patient = {**guarded["guards"], "action": "stop", "patience": 2}
    folder = run(guarded, Scripted(endless={1, 3}), guards=patient)
    assert len(RunFolder(folder).read_metrics()) == 5, "never twice in a row"
    with pytest.raises(GuardError, match=r"step 3: .* for 2 steps"):
        run(guarded, Scripted(endless={2, 3}), guards=patient, name="other")
