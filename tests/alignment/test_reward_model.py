"""Reward models: the loss by brute force, what is learned and reported, and that others read a checkpoint as we do."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import checkpoint
from alignment.algorithms import Algorithm
from alignment.batch import Outputs
from alignment.data.packing import pack
from alignment.distributed.world import World
from alignment.errors import DataError
from alignment.groups import Completion, Group
from alignment.identity import Identity
from alignment.models.forward import scores
from alignment.models.load import LanguageModel, load_model
from alignment.models.roles import Roles
from alignment.run_folder import RunFolder, find_checkpoint
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from alignment.settings.plugins import algorithm_class
from alignment.settings.run import RunConfig
from alignment.step import evaluate
from tests.alignment.test_packing import group, random_groups
from tests.alignment.test_train import run

Settings = dict[str, Any]

pytestmark = pytest.mark.usefixtures("one_thread")


def reward_model(**settings: Any) -> Algorithm:
    algorithm = algorithm_class("reward_model").model_validate({"name": "reward_model", **settings})
    assert isinstance(algorithm, Algorithm)
    return algorithm


RANKED = [
    group([1, 2], [3] * 5, [4] * 2, rewards=(1.0, 0.0)),  # the longer one is better
    group([1], [5] * 2, [6] * 4, [7] * 3, rewards=(0.0, 2.0, 1.0)),  # a ranking of three: three pairs
    group([1], [8] * 2, [9] * 6, [10] * 2, rewards=(3.0, 3.0, 1.0)),  # a tie: two pairs
]
PAIRS = [(0, 1), (3, 2), (3, 4), (4, 2), (5, 7), (6, 7)]
"""(better, worse) by the number of the completion."""
LENGTHS = [5, 2, 2, 4, 3, 2, 6, 2]


@pytest.mark.parametrize("centre", [0.0, 0.1])
def test_the_loss_of_every_pair_equals_the_formula(centre: float) -> None:
    said = torch.tensor([0.3, -0.2, 1.0, 0.5, 2.0, -1.0, 0.0, 0.4], requires_grad=True)
    batch = pack(RANKED)
    loss = reward_model(centre=centre).loss(batch, Outputs(logprobs=torch.empty(0), scores=said))
    (term,) = loss.terms
    expected, slope = [], [0.0] * 8
    plain = said.tolist()
    for better, worse in PAIRS:
        gap, total = plain[better] - plain[worse], plain[better] + plain[worse]
        expected.append(math.log(1 + math.exp(-gap)) + centre * total**2)
        pull = -1 / (1 + math.exp(gap))
        slope[better] += pull + 2 * centre * total
        slope[worse] += -pull + 2 * centre * total
    assert term.unit == "pair" and batch.count("pair") == len(PAIRS)
    assert sorted(map(tuple, batch.pairs.tolist())) == sorted(PAIRS)
    assert sorted(term.values.tolist()) == pytest.approx(sorted(expected))
    (gradient,) = torch.autograd.grad(term.values.sum(), said)
    assert gradient.tolist() == pytest.approx(slope, abs=1e-6)


def test_accuracy_is_reported_whole_and_apart_by_which_answer_is_longer() -> None:
    """A model that only counts tokens is right on one side and wrong on the other."""
    batch = pack(RANKED)
    counting = torch.tensor([float(length) for length in LENGTHS])
    metrics = reward_model().loss(batch, Outputs(logprobs=torch.empty(0), scores=counting)).metrics
    means = {name: values.mean().item() for name, values in metrics.items() if len(values)}
    longer = [LENGTHS[better] > LENGTHS[worse] for better, worse in PAIRS if LENGTHS[better] != LENGTHS[worse]]
    assert means["rewards/accuracies_chosen_longer"] == 1 and "rewards/accuracies_chosen_shorter" not in means
    assert all(longer), "here no better answer is shorter"
    assert means["rewards/accuracies"] == pytest.approx((len(longer) + 0.5) / len(PAIRS)), "a tie is half right"
    margins = [LENGTHS[better] - LENGTHS[worse] for better, worse in PAIRS]
    assert means["rewards/margins"] == pytest.approx(statistics.fmean(margins))
    assert means["scores/mean"] == pytest.approx(statistics.fmean(LENGTHS))

    turned = [dataclasses.replace(g, completions=tuple(turn(c) for c in g.completions)) for g in RANKED]
    metrics = reward_model().loss(pack(turned), Outputs(logprobs=torch.empty(0), scores=counting)).metrics
    assert metrics["rewards/accuracies_chosen_shorter"].tolist() == [0.0] * len(longer)
    assert not len(metrics["rewards/accuracies_chosen_longer"])


def turn(completion: Completion) -> Completion:
    assert completion.reward is not None
    return dataclasses.replace(completion, reward=-completion.reward)


def test_a_group_without_a_preference_is_refused() -> None:
    with pytest.raises(DataError, match="two completions with different rewards"):
        reward_model().select(group([1], [2], [3], rewards=(1.0, 1.0)))


@pytest.fixture
def reward_settings(run_settings: Settings, write_rows: Callable[..., Path]) -> Settings:
    """Pairs in which the better answer has other words than the worse one, in answers of all lengths."""
    good, bad = "the lazy dog over the fox".split(), "12 + 30 = 42 capital".split()  # noqa: SIM905
    rows = [
        {
            "prompt": f"what is {i}",
            "chosen": " " + " ".join(good[i % 3 : i % 3 + 1 + i % 4]),
            "rejected": " " + " ".join(bad[i % 2 : i % 2 + 1 + (i * 3 + 1) % 5]),
        }
        for i in range(32)
    ]
    return {
        **run_settings,
        "algorithm": {"name": "reward_model"},
        "data": {"path": str(write_rows(rows, "pairs.jsonl")), "max_length": 96, "eval_groups": 8},
        "optim": {"lr": 1e-3, "schedule": "constant"},
        "steps": 12,
    }


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_separable_preference_is_learned_and_the_level_of_its_scores_is_kept(
    lora: Settings | None, reward_settings: Settings
) -> None:
    settings = {**reward_settings, "model": {**reward_settings["model"], "lora": lora}}
    settings["optim"] = {"lr": 1e-2 if lora else 1e-3, "schedule": "constant"}
    folder = run(settings)
    last = RunFolder(folder).read_metrics()[-1]
    assert last["eval/rewards/accuracies"] > 0.9 and last["eval/rewards/margins"] > 1
    assert {"eval/rewards/accuracies_chosen_longer", "eval/rewards/accuracies_chosen_shorter"} <= last.keys()
    if lora is None:
        kept = json.loads((find_checkpoint(folder) / "config.json").read_text())
        assert kept["raylign_reward_mean"] == pytest.approx(last["eval/scores/mean"])
        spread = (last["eval/scores/mean_square"] - last["eval/scores/mean"] ** 2) ** 0.5
        assert kept["raylign_reward_std"] == pytest.approx(spread)


def test_every_checkpoint_of_a_reward_model_has_the_figures_of_its_own_scores_also_after_a_resume(
    reward_settings: Settings, tmp_path: Path
) -> None:
    """D9: they were those of an older evaluation, and gone after a resume until the next one."""
    settings = {**reward_settings, "checkpoint": {"every": 1, "keep": 9}, "steps": 5}
    means = {
        line["step"]: line["eval/scores/mean"]
        for line in RunFolder(run({**settings, "name": "every", "evaluate": {"every": 1}})).read_metrics()
    }
    folder = run({**settings, "steps": 3, "optim": {**settings["optim"], "schedule": "constant"}})
    run({**settings, "optim": {**settings["optim"], "schedule": "constant"}})
    for step in range(1, 6):
        kept = json.loads((folder / f"checkpoints/step-{step:08d}/config.json").read_text())
        assert kept["raylign_reward_mean"] == pytest.approx(means[step], abs=1e-6), step
    assert len(set(means.values())) == 6


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.parametrize(
    "scorer", [{}, {"weight": 2.0}, {"normalise": False, "weight": 0.5}], ids=["plain", "weighted", "raw"]
)
def test_a_critic_that_was_a_reward_model_begins_with_the_rewards_that_it_gives(
    scorer: Settings, lora: Settings | None, reward_settings: Settings
) -> None:
    """D8: it began with raw scores, while rewards were normalised."""
    model = {**reward_settings["model"], "lora": None}
    folder = find_checkpoint(run({**reward_settings, "name": "reward", "model": model}))
    config = RunConfig.model_validate(
        {
            **reward_settings,
            "algorithm": {"name": "ppo"},
            "model": {**model, "lora": lora},
            "rewards": [{"name": "model", "path": str(folder), **scorer}],
            "critic": {"path": str(folder)},
        }
    )
    roles = Roles.build(config, World())
    assert roles.critic is not None and roles.critic.model is not None
    groups = random_groups(5)
    raw = torch.tensor(our_scores(opened(folder), groups))
    known = json.loads((folder / "config.json").read_text())
    mean, std = known["raylign_reward_mean"], known["raylign_reward_std"]
    rewards = raw if "normalise" in scorer else (raw - mean) / std
    worth = torch.tensor(our_scores(roles.critic.model, groups)) + roles.critic.offset
    torch.testing.assert_close(worth, scorer.get("weight", 1.0) * rewards, atol=1e-4, rtol=1e-4)
    batch = pack(groups)
    said = roles.outputs(batch).values
    assert said is not None and not said[~batch.loss_mask].any(), "nothing is said of what is not learned"


def test_micro_batches_do_not_change_the_loss_of_a_reward_model(reward_settings: Settings) -> None:
    config = RunConfig.model_validate(reward_settings)
    algorithm = config.algorithm
    assert isinstance(algorithm, Algorithm)
    roles, groups = Roles.build(config, World()), random_groups(9)[1:]
    groups = [g for g in groups if len(g.completions) > 1]
    whole = evaluate(roles, algorithm, groups, config.optim, World())
    small = config.optim.model_copy(update={"micro_batch_tokens": 1})
    assert evaluate(roles, algorithm, groups, small, World()) == pytest.approx(whole, rel=1e-4, abs=1e-5)


def opened(folder: Path) -> LanguageModel:
    """A checkpoint as our own scorer opens it."""
    config = ModelConfig(path=str(folder), dtype="fp32")
    model = load_model(config, DataConfig(path="none", max_length=96), device=torch.device("cpu"), seed=9, head="score")
    model.module.eval()
    return model


def our_scores(model: LanguageModel, groups: list[Group]) -> list[float]:
    with torch.no_grad():
        return scores(model, pack(groups)).tolist()


def ended(groups: list[Group], end: int) -> list[Group]:
    """Answers that end, as answers do: with the very token that some tokenizers pad with."""

    def one(completion: Completion) -> Completion:
        return dataclasses.replace(
            completion, tokens=(*completion.tokens, end), loss_mask=(*completion.loss_mask, True)
        )

    return [dataclasses.replace(g, completions=tuple(map(one, g.completions))) for g in groups]


def their_scores(module: Any, rows: list[list[int]], pad: int) -> list[float]:
    """Of one padded batch, in plain transformers."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        return module.eval()(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()  # type: ignore[no-any-return]


def rows_of(groups: list[Group]) -> list[list[int]]:
    return [[*g.prompt_tokens, *c.tokens] for g in groups for c in g.completions]


def with_special(model: Path, folder: Path) -> Path:
    """The tiny model with a tokenizer that names another special token beside the end token, as most do."""
    from transformers import AutoTokenizer

    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("padding", ["the model's", "the tokenizer's"])
def test_transformers_reads_the_scores_that_we_do_from_a_checkpoint(
    special: bool, padding: str, reward_settings: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    """In a padded batch, of answers that end with the end token: it must not be taken for padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = with_special(tiny_model, tmp_path / "special") if special else tiny_model
    folder = find_checkpoint(run(reward_settings, steps=2, model={"path": str(path), "dtype": "fp32"}))
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    groups = ended(random_groups(6), tokenizer.eos_token_id)
    pad = theirs.config.pad_token_id if padding == "the model's" else tokenizer.pad_token_id
    expected = our_scores(opened(folder), groups)
    assert their_scores(theirs, rows_of(groups), pad) == pytest.approx(expected, abs=1e-5)


def test_peft_reads_the_scores_that_we_do_from_an_adapter(reward_settings: Settings, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = {**reward_settings["model"], "lora": {"rank": 4}}
    config = RunConfig.model_validate({**reward_settings, "model": model, "steps": 2})
    folder = find_checkpoint(run(reward_settings, model=model, steps=2))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder)
    theirs.config.pad_token_id = base.config.pad_token_id = 0

    roles = Roles.build(config, World())
    kept = json.loads((folder / "trainer" / "state.json").read_text())
    same = Identity(fixed_settings=kept["identity"], adjustable_settings=kept["adjustable"])
    checkpoint.restore(config, roles, identity=same, world=World())
    roles.train(False)
    groups = random_groups(6)
    assert their_scores(theirs, rows_of(groups), 0) == pytest.approx(our_scores(roles.actor, groups), abs=1e-5)


def test_an_adapter_of_a_reward_model_can_be_opened_as_the_reward_model_that_it_is(
    reward_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    model = {**reward_settings["model"], "lora": {"rank": 4}}
    folder = run(reward_settings, model=model, optim={"lr": 1e-2, "schedule": "constant"})
    merged = opened(find_checkpoint(folder))
    known = merged.network.config.to_dict()
    assert known["raylign_reward_mean"] == pytest.approx(RunFolder(folder).read_metrics()[-1]["eval/scores/mean"])
    rows = [json.loads(line) for line in Path(reward_settings["data"]["path"]).read_text().splitlines()]

    def pair(row: dict[str, str]) -> Group:
        ids = merged.tokenizer(row["prompt"])["input_ids"]
        answers = [merged.tokenizer(row[side])["input_ids"] + [merged.tokenizer.eos_token_id] for side in row][1:]
        return group(ids, *answers, rewards=(1.0, 0.0))

    better = our_scores(merged, [pair(row) for row in rows])
    assert statistics.fmean(a > b for a, b in zip(better[::2], better[1::2], strict=True)) > 0.9
