"""Parity with TRL's DPOTrainer: from the same rows in the same order, every step reports the same numbers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from alignment.distributed.world import World
from alignment.metrics import Metrics, Silent
from alignment.settings.run import RunConfig
from alignment.train import train
from tests.conftest import pair_rows

Row = dict[str, Any]

STEPS = 6
PAIRS_PER_STEP = 4
MAX_LENGTH = 192  # nothing is cut: the two libraries cut differently
LR = 5e-4
BETA = 0.5
MAX_GRAD_NORM = 0.5
# AdamW divides a gradient by its own size + EPS, so that with the usual 1e-8 a gradient that is mere rounding moves a
# weight as far as a real one: two summation orders of one loss then differed by 4e-4 nats in logps.
EPS = 1e-5
TOLERANCE = 1e-4
COMPARED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_every_step_on_plain_text_equals_trl(loss_type: str, tiny_model: Path, write_rows: Callable[..., Path]) -> None:
    rows = pair_rows(STEPS * PAIRS_PER_STEP)
    ours = our_steps(write_rows(rows), tiny_model, loss_type)
    assert_same_steps(ours, trl_steps(rows, tiny_model, loss_type))
    if loss_type == "hinge":
        bends = [abs(step["loss"] - (1 - step["rewards/margins"])) for step in ours]
        assert max(bends) > 100 * TOLERANCE, "no pair ever kept its margin, so the hinge was never seen to bend"


def test_every_step_on_messages_equals_trl(tiny_model: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    """With a template that writes nothing behind an end token: TRL learns that too, which no model ever writes."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("<|im_end|>\n", "<|im_end|>"))
    assert template.count("<|im_end|>\n") == 1
    rows = [as_messages(row) for row in pair_rows(STEPS * PAIRS_PER_STEP)]
    ours = our_steps(write_rows(rows), model, "sigmoid")
    assert_same_steps(ours, trl_steps(rows, model, "sigmoid"))


def as_messages(row: Row) -> Row:
    """The same pair as message lists, which both sides send through the tokenizer's chat template."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {field: [{"role": role, "content": row[field].strip()}] for field, role in roles.items()}


def assert_same_steps(ours: list[Metrics], theirs: list[Metrics]) -> None:
    assert len(ours) == len(theirs) == STEPS
    for step, (mine, peer) in enumerate(zip(ours, theirs, strict=True), start=1):
        for name in COMPARED:
            assert mine[name] == pytest.approx(peer[name], rel=0, abs=TOLERANCE), f"{name} of step {step}"
        assert mine["grad_norm"] == pytest.approx(peer["grad_norm"], rel=TOLERANCE), f"grad_norm of step {step}"
    # The comparison is worth something only if training moves the numbers by far more than the tolerance.
    assert abs(ours[0]["rewards/chosen"]) < TOLERANCE, "before the first update, the actor is its own reference"
    for step, mine in enumerate(ours[1:], start=2):
        moved = max(abs(mine[name]) for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"))
        assert moved > 100 * TOLERANCE, f"step {step} has hardly moved from the reference"
    assert max(mine["grad_norm"] for mine in ours) > MAX_GRAD_NORM, "no gradient was ever clipped"


class Recorder(Silent):
    """Keeps what the loop reports of every step."""

    def __init__(self) -> None:
        self.steps: list[Metrics] = []

    def report(self, step: int, metrics: Metrics) -> None:
        if step:
            self.steps.append(metrics)


def our_steps(rows: Path, model: Path, loss_type: str) -> list[Metrics]:
    config = RunConfig.model_validate(
        {
            "name": "parity",
            "output": str(rows.parent / "runs"),
            "steps": STEPS,
            "groups_per_step": PAIRS_PER_STEP,
            "algorithm": {"name": "dpo", "loss_type": loss_type, "beta": BETA, "reference": "copy"},
            "model": {"path": str(model), "dtype": "fp32"},
            "data": {"path": str(rows), "max_length": MAX_LENGTH, "shuffle": False},
            # So few tokens in one pass that every step takes several, where TRL takes one.
            "optim": {
                "lr": LR,
                "eps": EPS,
                "schedule": "constant",
                "max_grad_norm": MAX_GRAD_NORM,
                "micro_batch_tokens": 128,
            },
        }
    )
    recorder = Recorder()
    train(config, World(), recorder)
    return recorder.steps


def trl_steps(rows: list[Row], model: Path, loss_type: str) -> list[Metrics]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class FileOrder(DPOTrainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(cast(Sized, self.train_dataset))

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=PAIRS_PER_STEP,
            max_length=MAX_LENGTH,
            loss_type=[loss_type],
            beta=BETA,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            adam_epsilon=EPS,
            weight_decay=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = FileOrder(
            fresh(),
            fresh(),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]
