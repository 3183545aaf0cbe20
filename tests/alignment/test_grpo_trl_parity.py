"""Parity with TRL's GRPOTrainer: from completions that it drew itself, the same advantages, loss and gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.algorithms import Algorithm
from alignment.batch import Batch
from alignment.distributed.world import World
from alignment.groups import Completion, Group
from alignment.models.roles import Roles
from alignment.settings.run import RunConfig
from alignment.step import annotate

Settings = dict[str, Any]

PROMPTS = ["the quick brown", "what is the capital of", "12 + 30"]
COMPLETIONS = 4
MAX_TOKENS = 12
TEMPERATURE = 3.0  # the tiny model is so sure of itself that it would say one token again and again
BETA = 0.04
TOLERANCE = 1e-5

# TRL's loss_type and ours, which for plain k3 are the same in value and gradient.
KINDS = {
    "grpo": {"loss_aggregation": "completion"},
    "bnpo": {"loss_aggregation": "token"},
    "dapo": {"loss_aggregation": "token", "clip_high": 0.28},
    "dr_grpo": {"loss_aggregation": "constant", "tokens_per_completion": MAX_TOKENS, "divide_by_deviation": False},
}
pytestmark = pytest.mark.usefixtures("one_thread")


def moved(model: Any, seed: int, distance: float = 0.01) -> None:
    """Changes every weight a little, the same way for the same seed, as a few optimizer steps would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            weight.add_(distance * torch.randn(weight.shape, generator=generator))


class Peer:
    """TRL's trainer on the tiny model: it draws, rates and learns from one batch of completions."""

    def __init__(self, model: Path, folder: Path, loss_type: str, **settings: Any) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        self.rewards: list[float] = []

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            self.rewards = [float(sum(ids) % 7) for ids in completion_ids]
            return self.rewards

        config = GRPOConfig(
            output_dir=str(folder),
            loss_type=loss_type,
            per_device_train_batch_size=len(PROMPTS) * COMPLETIONS,
            num_generations=COMPLETIONS,
            max_completion_length=MAX_TOKENS,
            temperature=TEMPERATURE,
            beta=BETA,
            num_iterations=2,  # so that it keeps the old log-probabilities
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
            **settings,
        )
        self.trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        self.trainer.current_gradient_accumulation_steps = 1
        moved(self.trainer.model, seed=1)
        torch.manual_seed(0)
        rows = [{"prompt": prompt} for prompt in PROMPTS for _ in range(COMPLETIONS)]
        self.trainer.model.train()
        self.inputs = self.trainer._generate_and_score_completions(rows)
        # The tiny model hardly ever ends an answer, so the answers are cut here to have different lengths.
        lengths = torch.tensor([2 + 7 * number % 11 for number in range(len(rows))])
        mask = torch.arange(self.inputs["completion_mask"].shape[1]) < lengths[:, None]
        self.inputs["completion_mask"] *= mask
        self.inputs["num_items_in_batch"] = self.inputs["completion_mask"].sum()

    def groups(self) -> list[Group]:
        """What it drew, as we keep it."""
        answers = [
            (tuple(ids[mask.bool()].tolist()), tuple(prompt[seen.bool()].tolist()))
            for ids, mask, prompt, seen in zip(
                self.inputs["completion_ids"],
                self.inputs["completion_mask"],
                self.inputs["prompt_ids"],
                self.inputs["prompt_mask"],
                strict=True,
            )
        ]
        completions = [
            Completion(text="", tokens=ids, loss_mask=(True,) * len(ids), reward=reward)
            for (ids, _), reward in zip(answers, self.rewards, strict=True)
        ]
        starts = range(0, len(answers), COMPLETIONS)
        return [
            Group(
                id=str(at),
                prompt="?",
                prompt_tokens=answers[at][1],
                completions=tuple(completions[at : at + COMPLETIONS]),
            )
            for at in starts
        ]

    def loss(self) -> tuple[float, dict[str, Tensor]]:
        """Its loss and gradients with the weights as they are."""
        model = self.trainer.model
        model.zero_grad()
        loss = self.trainer._compute_loss(model, self.inputs)
        loss.backward()
        return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


class Ours:
    """The same, by our roles and algorithm."""

    def __init__(self, model: Path, groups: list[Group], algorithm: Settings) -> None:
        config = RunConfig.model_validate(
            {
                "name": "parity",
                "steps": 1,
                "algorithm": {"name": "grpo", "epochs_per_step": 2, "kl_coefficient": BETA, **algorithm},
                "model": {"path": str(model), "dtype": "fp32"},
                "data": {"path": "none", "max_length": 96},
                "rollout": {"temperature": TEMPERATURE, "completions": COMPLETIONS},
                "rewards": [{"name": "length", "target": 5}],
                "optim": {"micro_batch_tokens": 60},
            }
        )
        assert isinstance(config.algorithm, Algorithm)
        self.algorithm, self.roles = config.algorithm, Roles.build(config, World())
        moved(self.roles.actor.module, seed=1)
        batch = annotate(self.roles, groups, config.optim, World())
        batch = Batch(**{**vars(batch), "kl_coefficient": self.algorithm.init_kl_coef})
        self.batch = self.algorithm.prepare(batch)

    def loss(self) -> tuple[float, dict[str, Tensor]]:
        model = self.roles.actor.module
        terms = self.algorithm.loss(self.batch, self.roles.outputs(self.batch)).terms
        loss = torch.stack([term.values.sum() / self.batch.count(term.unit) for term in terms]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), {name: weight.grad for name, weight in model.named_parameters()}


def padded(batch: Batch, values: Tensor, peer: Tensor) -> Tensor:
    """Our [T] values in the shape of the peer's table, 0 beyond a completion."""
    rows = batch.rows(values)
    return torch.nn.functional.pad(rows, (0, peer.shape[1] - rows.shape[1]))


def both(kind: str, model: Path, folder: Path, *, estimator: str) -> tuple[Peer, Ours]:
    """The peer, whose completions were drawn and rated, and ours, which learns from the same."""
    settings: Settings = {"use_bias_correction_kl": estimator == "k3"}
    if kind == "dr_grpo":
        settings["scale_rewards"] = "none"
    if kind == "dapo":
        settings["epsilon_high"] = 0.28
    peer = Peer(model, folder, kind, **settings)
    return peer, Ours(model, peer.groups(), {**KINDS[kind], "kl_estimator": estimator})


def assert_same_loss_and_gradient(ours: Ours, peer: Peer) -> None:
    (loss, gradient), (their_loss, their_gradient) = ours.loss(), peer.loss()
    assert loss == pytest.approx(their_loss, rel=TOLERANCE, abs=1e-7)
    assert gradient.keys() == their_gradient.keys()
    mine, theirs = (
        torch.cat([found[name].flatten() for name in sorted(found)]) for found in (gradient, their_gradient)
    )
    distance = ((mine - theirs).norm() / theirs.norm()).item()
    print(f"loss {loss:.8f}, TRL's {their_loss:.8f}; gradients of norm {theirs.norm():.4f} differ by {distance:.1e}")
    assert distance < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_log_probabilities_loss_and_gradient_equal_trl(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    peer, ours = both(kind, tiny_model, tmp_path, estimator="k3_plain")
    batch, theirs = ours.batch, peer.inputs
    mask = theirs["completion_mask"]
    assert len(set(peer.rewards)) > 2 and mask.sum(1).unique().numel() > 2, "rewards and lengths differ"

    assert batch.advantages is not None and batch.old_logprobs is not None and batch.reference_logprobs is not None
    torch.testing.assert_close(
        padded(batch, batch.advantages, mask), theirs["advantages"][:, None] * mask, atol=1e-6, rtol=TOLERANCE
    )
    for values, name in (
        (batch.old_logprobs, "old_per_token_logps"),
        (batch.reference_logprobs, "ref_per_token_logps"),
    ):
        torch.testing.assert_close(padded(batch, values, mask), theirs[name] * mask, atol=1e-5, rtol=TOLERANCE)

    for model in (peer.trainer.model, ours.roles.actor.module):
        moved(model, seed=2)
    ratio = ours.algorithm.loss(batch, ours.roles.outputs(batch)).metrics["clip_ratio"]
    assert 0 < ratio.mean() < 1, "some tokens are clipped, and some are not"
    assert_same_loss_and_gradient(ours, peer)


@pytest.mark.parametrize("kind", ["grpo", "bnpo"])
def test_in_a_first_update_k3_is_the_divergence_that_trl_corrects_by_its_ratio(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    """TRL's default multiplies k3 by the ratio. Where that is 1, its gradient is then that of k2, as ours is."""
    peer, ours = both(kind, tiny_model, tmp_path, estimator="k3")
    assert_same_loss_and_gradient(ours, peer)
