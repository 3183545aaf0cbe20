"""Which rates answers faster, training's packed forward or the engine: `python -m tests.benchmarks.rewards`.

Implicit rewards of the same pairs under the same adapter on the bundled model, once as `POST /v1/rewards` has them (one
packed forward with the adapter and one without) and once from vLLM's log-probabilities of prompts (one request with the
adapter and one without). Both are asked twice, and the second time counts. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.side_by_side import dtype_of

if TYPE_CHECKING:
    from alignment.settings.section import NumberFormat

PAIRS = Path("configs/data/short_answers.train.jsonl")
MAX_LENGTH = 1024
Totals = list[float]
"""log π - log π_ref (nats) of every answer."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.rewards", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--pairs", type=int, default=32, help="pairs to rate")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="number format of both")
    args = parser.parse_args()
    dtype = dtype_of(args.dtype)
    with tempfile.TemporaryDirectory(prefix="raylign-rewards-") as folder:
        adapter = random_adapter(Path(folder) / "adapter")
        asked = groups(args.pairs)
        packed, packed_s = timed(ours(asked, adapter, Path(folder), dtype))
        engine, engine_s = timed(vllm(asked, adapter, dtype))
    apart = max(abs(one - other) for one, other in zip(packed, engine, strict=True))
    tokens = sum(len(sequence) for sequence, _ in sequences(asked))
    told = {"packed_s": packed_s, "engine_s": engine_s, "ratio": packed_s / engine_s, "largest_difference_nats": apart}
    print(
        json.dumps(
            {**{name: round(value, 4) for name, value in told.items()}, "answers": len(packed), "tokens": tokens}
        )
    )


def timed(rate: Callable[[], Totals]) -> tuple[Totals, float]:
    """The answer to the second question, and how long it took."""
    rate()
    started = time.perf_counter()
    found = rate()
    return found, time.perf_counter() - started


def random_adapter(folder: Path) -> Path:
    """An adapter that changes the model a little."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from alignment.models.folders import bundled

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(bundled())
    config = LoraConfig(r=8, lora_alpha=1, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def groups(count: int) -> list[Any]:
    """Pairs of answers, as texts."""
    from alignment.groups import Completion, Group, Message

    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()[:count]]
    return [
        Group(
            id=str(number),
            prompt=(Message(role="user", content=row["prompt"]),),
            completions=tuple(Completion(text=row[name]) for name in ("chosen", "rejected")),
        )
        for number, row in enumerate(rows)
    ]


def sequences(asked: list[Any]) -> list[tuple[list[int], int]]:
    """Of every answer the tokens with its prompt's, and the number of the latter."""
    from alignment.data.chat import GroupTokenizer
    from alignment.models.load import load_tokenizer
    from alignment.settings.data import DataConfig
    from alignment.settings.model import ModelConfig

    tokenizer = load_tokenizer(ModelConfig(path="smollm2-135m-instruct"))
    tokenise = GroupTokenizer(tokenizer, DataConfig(path="-", max_length=MAX_LENGTH), {tokenizer.eos_token_id})
    return [
        ([*group.prompt_tokens, *completion.tokens], len(group.prompt_tokens))
        for group in map(tokenise, asked)
        for completion in group.completions
    ]


def ours(asked: list[Any], adapter: Path, folder: Path, dtype: NumberFormat) -> Callable[[], Totals]:
    """As `serving.replica.scoring` does it."""
    import torch

    from alignment.settings.model import ModelConfig
    from serving.registry.versions import Registry
    from serving.replica.scoring import Policies

    registry = Registry(folder / "registry")
    version = registry.add(adapter)
    model = ModelConfig(path="smollm2-135m-instruct", dtype=dtype)
    policies = Policies(registry, model, max_length=MAX_LENGTH, device=torch.device("cpu"))
    return lambda: [each.total for group in policies.log_ratios(asked, version) for each in group]


def vllm(asked: list[Any], adapter: Path, dtype: NumberFormat) -> Callable[[], Totals]:
    """From the engine that answers."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from alignment.models.folders import bundled
    from alignment.models.load import dtype_name

    engine = LLM(
        str(bundled()),
        dtype=dtype_name(dtype, "cpu"),
        max_model_len=MAX_LENGTH,
        enable_lora=True,
        max_lora_rank=8,
        enforce_eager=True,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=2**29,
    )
    prompts = [({"prompt_token_ids": tokens}, start) for tokens, start in sequences(asked)]
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    policy = LoRARequest("policy", 1, str(adapter))

    def totals(lora: LoRARequest | None) -> Totals:
        found = engine.generate([prompt for prompt, _ in prompts], sampling, lora_request=lora, use_tqdm=False)  # type: ignore[arg-type]
        return [
            sum(
                told[token].logprob
                for token, told in zip(prompt["prompt_token_ids"][start:], each.prompt_logprobs[start:], strict=True)
            )
            for each, (prompt, start) in zip(found, prompts, strict=True)
        ]

    return lambda: [one - other for one, other in zip(totals(policy), totals(None), strict=True)]


if __name__ == "__main__":
    main()
