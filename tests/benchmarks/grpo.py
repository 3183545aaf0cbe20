"""Speed and memory of our GRPO step against TRL's GRPOTrainer: `python -m tests.benchmarks.grpo` from the project's root.

Both sides get the same prompts in the same order, the same reward (the shorter the better), the same model in bf16, all
of whose weights are trained, four prompts with eight completions of up to 64 tokens per step, a KL coefficient of 0.04,
temperature 1 and two threads. They take turns, each run in processes of its own.

What is timed is whole steps: drawing, scoring, the reference model's log-probabilities, forward, backward, clipping,
AdamW, and for us bringing the new weights into the engine; TRL draws from the module that it trains. Loading and
starting are not timed. The first step, in which both pay for what is set up once, is in the lists; ratios are of medians.
Ours, as a run with `cluster.workers: 0` does it, draws with a vLLM engine in a process beside the trainer; TRL as it
comes, with transformers. Memory of ours is the sum of the peaks of all its processes, at whatever time each was.

Not the same, because each library is used as it comes: how a loss weighs its tokens; fp32 master weights and moments of
ours, where TRL trains the bf16 weights themselves, under autocast. What is drawn differs too, but not in length:
`completion_tokens` shows it, and `prompt_tokens` that both see the same prompts.

`fraction_of_limit` says what part of the speed that this machine could have each phase of ours reaches. The limits are
of arithmetic alone (`limits`), with matrix products and memory as fast as they were measured before each round; the
fastest counts. With `--steps-ahead 1`, phases overlap, and only the step's time means something.

The last line is one JSON object; ratios are ours / TRL's: below 1 is better for both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.side_by_side import (
    alone,
    medians,
    parser,
    peak_memory_gb,
    ratio,
    rounded,
    set_threads,
    shuffled_rows,
    stopwatch,
    take_turns,
    versions,
)

if TYPE_CHECKING:
    from alignment.config import RunConfig
    from alignment.models.load import LanguageModel

PROMPTS_PER_STEP = 4
COMPLETIONS = 8
MAX_TOKENS = 64
KL_COEFFICIENT = 0.04
LR = 1e-6
PHASES = ("generation", "scoring", "update", "sync")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What both sides are asked to do."""

    rows: Path
    """JSON lines of {prompt}, each a message list."""
    model: str
    max_length: int
    """Most tokens of a prompt and one completion."""
    steps: int
    steps_ahead: int
    """Of ours only: TRL draws from the weights that it has just trained."""
    threads: int
    micro_batch_tokens: int
    """Tokens in one forward pass of ours."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What of a model decides the limits, in numbers of weights."""

    decoder: int
    """Without embedding and output head."""
    head: int
    """Vocabulary × hidden size."""

    @property
    def nbytes(self) -> int:
        """In bf16, the head tied to the embedding."""
        return 2 * (self.decoder + self.head)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of ours."""

    seconds: dict[str, float]
    """Of each phase."""
    prompt_tokens: int
    """Each prompt counted once."""
    lengths: list[int]
    """Tokens of each completion."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one side did."""

    seconds: list[float]
    """Of each step."""
    peaks_gb: list[float]
    """Most memory of each process, the trainer's first."""
    prompt_tokens: float
    """Mean per prompt."""
    completion_tokens: float
    """Mean per completion."""
    reward: float
    """Mean."""
    steps: list[Step]
    """Empty for TRL."""
    size: Size | None
    """None for TRL."""

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this machine can do, all threads together."""

    flops: float
    """bf16 operations per second in a product of large matrices; a multiplication and an addition are two."""
    bandwidth: float
    """Bytes read and written per second in a copy that no cache holds."""


def main() -> None:
    args = arguments()
    set_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            rows=Path(folder) / "rows.jsonl",
            model=args.model,
            max_length=args.max_length,
            steps=args.steps,
            steps_ahead=args.steps_ahead,
            threads=args.threads,
            micro_batch_tokens=args.micro_batch_tokens,
        )
        alone(write_rows, job, args.data)
        machines: list[Machine] = []
        sides = {"ours": ours, "trl": trl}
        runs: dict[str, list[Run]] = {}
        for _ in range(args.rounds):
            machines.append(alone(measured, job.threads))
            for name, of in take_turns(sides, job, rounds=1, only=args.only, told=told).items():
                runs.setdefault(name, []).extend(of)
    machine = Machine(flops=max(m.flops for m in machines), bandwidth=max(m.bandwidth for m in machines))
    print(json.dumps(figures(job, runs, machine)))
