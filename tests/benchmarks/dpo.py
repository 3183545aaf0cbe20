"""Speed and memory of our DPO step against TRL's DPOTrainer: `python -m tests.benchmarks.dpo` from the project's root.

Both sides get the same rows in the same order, the same model in one number format, four pairs per optimizer step and
two threads. They take turns (ours, TRL, ours, TRL …), each run in a process of its own, so that its peak memory is its
own and a machine that slows down slows both.

What is timed is whole optimizer steps: the reference model's log-probabilities, forward, backward, clipping, AdamW.
Loading and tokenising are not. No step is left out on either side: both pay in the first for memory and kernels that
are set up once.

Rows are taken only if the prompt and its shorter answer fit into `--max-length` tokens: then both sides see the same
tokens (a prompt is never cut, a long answer loses its end), which `parity` shows: the largest difference in any step's
logps/chosen. Rounding to bf16 alone makes about a nat of several hundred. A CPU without bf16 arithmetic is measured in
fp32 (`--dtype`).

Not the same, because each library is used as it comes: with bf16, we keep an fp32 master copy and fp32 moments of
every trained weight, TRL trains the bf16 weights themselves, under autocast.

The last line is one JSON object; ratios are ours / TRL's: above 1 is better for pairs_per_second_ratio, below 1 for
memory_ratio.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

PAIRS_PER_STEP = 4
BETA = 0.1
LR, LORA_LR = 1e-6, 1e-4
LORA_RANK, LORA_ALPHA = 16, 32


@dataclass(frozen=True, kw_only=True)
class Job:
    """What both sides are asked to do."""

    rows: Path
    """JSON lines of {prompt, chosen, rejected}, each a message list."""
    model: str
    max_length: int
    """Most tokens of prompt and one answer."""
    pairs: int
    pairs_per_step: int
    lora: bool
    threads: int
    dtype: Literal["bf16", "fp32"]
    trl_micro_batch: int
    """Pairs in one forward pass of TRL's; the rest of a step is accumulated."""
    micro_batch_tokens: int
    """Tokens in one forward pass of ours."""

    @property
    def lr(self) -> float:
        return LORA_LR if self.lora else LR


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one side did."""

    seconds: list[float]
    """Of each optimizer step."""
    logps_chosen: list[float]
    """Mean log-probability (nats) of the chosen answers, of each step."""
    peak_rss_gb: float
    pairs_per_second: float


def main() -> None:
    args = arguments()
    set_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            rows=Path(folder) / "rows.jsonl",
            model=args.model,
            max_length=args.max_length,
            pairs=args.pairs,
            pairs_per_step=min(args.pairs, PAIRS_PER_STEP),
            lora=args.lora,
            threads=args.threads,
            dtype=alone(dtype_of, args.dtype),
            trl_micro_batch=min(args.pairs, args.trl_micro_batch),
            micro_batch_tokens=args.micro_batch_tokens,
        )
        tokens = alone(write_rows, job, args.data)
        print(f"{job.pairs} pairs, about {tokens} tokens with each prompt counted once", flush=True)
        runs = take_turns({"ours": ours, "trl": trl}, job, rounds=args.rounds, only=args.only, told=told)
    print(json.dumps(figures(job, tokens, runs)))


def arguments() -> argparse.Namespace:
    options = parser("dpo", __doc__, columns="question, response_j, response_k")
    options.add_argument("--pairs", type=int, default=16, help="pairs of one run: fewer than 4, or a multiple of 4")
    options.add_argument("--lora", action="store_true", help="train adapters instead of all weights")
    options.add_argument("--trl-micro-batch", type=int, default=PAIRS_PER_STEP, help="pairs in a forward pass of TRL's")
    options.add_argument("--micro-batch-tokens", type=int, default=1024, help="tokens in a forward pass of ours")
    args = options.parse_args()
    if args.pairs > PAIRS_PER_STEP and args.pairs % PAIRS_PER_STEP:
        options.error(f"--pairs ({args.pairs}) must be a multiple of {PAIRS_PER_STEP}, so that every step is full")
    step, micro = min(args.pairs, PAIRS_PER_STEP), min(args.pairs, args.trl_micro_batch)
    if step % micro:
        options.error(f"--trl-micro-batch ({micro}) must divide the {step} pairs of a step")
    return args


def told(run: Run) -> str:
    return (
        f"{run.pairs_per_second:.4f} pairs/s  {run.peak_rss_gb:.2f} GB  "
        f"{sum(run.seconds):.1f} s in {len(run.seconds)} steps"
    )


def write_rows(job: Job, data: Path) -> int:
    """Writes the first pairs, in a fixed random order, that both sides treat alike.

    Returns their tokens, each prompt counted once and end tokens not.
    """
    from alignment.models.load import load_tokenizer
    from alignment.settings.model import ModelConfig

    tokenizer = load_tokenizer(ModelConfig(path=job.model))
    kept: list[str] = []
    tokens = 0
    for row in shuffled_rows(data):
        turns = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        size = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        answers = [len(tokenizer(row[key])["input_ids"]) for key in ("response_j", "response_k")]
        if len(kept) == job.pairs or size + min(answers) > job.max_length:
            continue
        tokens += size + sum(min(answer, job.max_length - size) for answer in answers)
        pair = {
            "prompt": turns,
            "chosen": [{"role": "assistant", "content": row["response_j"]}],
            "rejected": [{"role": "assistant", "content": row["response_k"]}],
        }
        kept.append(json.dumps(pair) + "\n")
    if len(kept) < job.pairs:
        raise SystemExit(f"{data} has only {len(kept)} pairs that fit into {job.max_length} tokens, not {job.pairs}")
    job.rows.write_text("".join(kept), encoding="utf-8")
    return tokens


def ours(job: Job) -> Run:
    """Our loop without its surroundings: no evaluation, no checkpoint, no report."""
    import torch

    from alignment.algorithms.dpo import DPO
    from alignment.data.chat import GroupTokenizer
    from alignment.data.reader import GroupReader
    from alignment.data.stream import load_data
    from alignment.distributed.world import World
    from alignment.models.roles import Roles
    from alignment.settings.run import RunConfig
    from alignment.step import StepSettings, train_step

    torch.set_num_threads(job.threads)
    algorithm = DPO(beta=BETA)
    lora = {"rank": LORA_RANK, "alpha": LORA_ALPHA} if job.lora else None
    config = RunConfig.model_validate(
        {
            "name": "benchmark",
            "steps": job.pairs // job.pairs_per_step,
            "groups_per_step": job.pairs_per_step,
            "algorithm": algorithm,
            "model": {"path": job.model, "dtype": job.dtype, "lora": lora},
            "data": {"path": str(job.rows), "max_length": job.max_length, "shuffle": False},
            "optim": {"lr": job.lr, "schedule": "constant", "micro_batch_tokens": job.micro_batch_tokens},
        }
    )
    world = World()
    roles = Roles.build(config, world)
    tokenizer = GroupTokenizer(roles.actor.tokenizer, config.data, roles.actor.end_tokens)
    stream = load_data(GroupReader(config.data, algorithm, tokenizer), seed=config.seed, progress=False).train
    seconds, logps = [], []
    for _ in range(job.pairs // job.pairs_per_step):
        groups = stream.take(job.pairs_per_step)
        start = time.perf_counter()
        metrics = train_step(roles, algorithm, groups, config.optim, world, StepSettings(lr={"actor": job.lr}))
        seconds.append(time.perf_counter() - start)
        logps.append(metrics["logps/chosen"])
    return finished(job, seconds, logps)


def trl(job: Job) -> Run:
    """TRL's trainer as a user would set it up, reading the rows in the file's order."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from alignment.models.folders import model_source
    from alignment.models.load import DTYPES

    torch.set_num_threads(job.threads)
    source = model_source(job.model)
    seconds: list[float] = []

    class FileOrder(DPOTrainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[job.dtype])

    adapter = None
    if job.lora:
        from peft import LoraConfig

        adapter = LoraConfig(
            r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    settings = DPOConfig(
        output_dir=str(job.rows.parent / "trl"),
        max_steps=job.pairs // job.pairs_per_step,
        per_device_train_batch_size=job.trl_micro_batch,
        gradient_accumulation_steps=job.pairs_per_step // job.trl_micro_batch,
        max_length=job.max_length,
        beta=BETA,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        bf16=job.dtype == "bf16",
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [json.loads(line) for line in job.rows.read_text(encoding="utf-8").splitlines()]
    trainer = FileOrder(
        fresh(),
        None if adapter else fresh(),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(source),
        peft_config=adapter,
        callbacks=[stopwatch(seconds)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return finished(job, seconds, [entry["logps/chosen"] for entry in trainer.state.log_history if "loss" in entry])


def finished(job: Job, seconds: list[float], logps_chosen: list[float]) -> Run:
    return Run(
        seconds=seconds,
        logps_chosen=logps_chosen,
        peak_rss_gb=sum(peak_memory_gb().values()),
        pairs_per_second=job.pairs / sum(seconds),
    )


def figures(job: Job, tokens: int, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """The last line: medians over the rounds, their ratios, and what they were made of."""
    speed = medians(runs, lambda run: run.pairs_per_second)
    memory = medians(runs, lambda run: run.peak_rss_gb)
    return {
        "pairs_per_second_ratio": ratio(speed),
        "memory_ratio": ratio(memory),
        "pairs_per_second": rounded(speed, 4),
        "peak_rss_gb": rounded(memory, 3),
        "rounds": [
            {
                name: {
                    "pairs_per_second": round(of[number].pairs_per_second, 4),
                    "peak_rss_gb": round(of[number].peak_rss_gb, 3),
                    "seconds_per_step": [round(value, 2) for value in of[number].seconds],
                }
                for name, of in runs.items()
            }
            for number in range(max(map(len, runs.values())))
        ],
        "parity": round(parity(runs["ours"], runs["trl"]), 4) if len(runs) == 2 else None,
        "logps_chosen": {name: [round(value, 2) for value in of[0].logps_chosen] for name, of in runs.items()},
        "rows": job.pairs,
        "tokens": tokens,
        "pairs_per_step": job.pairs_per_step,
        "max_length": job.max_length,
        "dtype": job.dtype,
        "lora": job.lora,
        "model": job.model,
        "threads": job.threads,
        "trl_micro_batch": job.trl_micro_batch,
        "micro_batch_tokens": job.micro_batch_tokens,
        "versions": versions("raylign", "trl", "torch", "transformers", "peft"),
    }


def parity(ours: list[Run], trl: list[Run]) -> float:
    """Largest difference (nats) of any step's logps/chosen between the two sides, over all rounds."""
    return max(
        abs(mine - peer)
        for left, right in zip(ours, trl, strict=True)
        for mine, peer in zip(left.logps_chosen, right.logps_chosen, strict=True)
    )


if __name__ == "__main__":
    main()
