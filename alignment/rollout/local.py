"""Generation with transformers by the module in training: no engine and no copy of the weights.

It serves for samples, and for tiny models.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from alignment.models.load import LanguageModel
from alignment.rollout import Policy, Prompt, Result, Rollout, Sampling, Weights


@torch.no_grad()
def greedy(model: LanguageModel, prompts: list[tuple[int, ...]], *, max_tokens: int) -> list[list[int]]:
    """Answers prompts by greedy decoding.

    Args:
        prompts: token ids of each prompt.
        max_tokens: most tokens of an answer.

    Returns:
        Token ids of each answer, without the end token.
    """
    answers, _ = _generate(model, prompts, max_tokens=max_tokens, ends=model.end_tokens, do_sample=False)
    return [answer[: _until_end(answer, model.end_tokens)] for answer in answers]


class LocalGenerator:
    """Implements the Generator port with the module in training, which always has the newest weights."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.version = 0
        self._turn = asyncio.Lock()

    def start(self, work: Callable[[Policy], Coroutine[Any, Any, Result]]) -> Callable[[], Result]:
        """Does the work at once: the module cannot be trained and sampled from at the same time."""
        self._turn = asyncio.Lock()  # each event loop needs one of its own
        result = asyncio.run(work(self))
        return lambda: result

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        """Generates for each prompt by itself, so that its completions do not depend on other prompts."""
        async with self._turn:
            await asyncio.sleep(0)  # so that work which has failed ends before the prompts that wait are answered
            return self._sample(prompt, sampling)

    def load(self, weights: Weights) -> None:
        """Notes the version; the module has the weights already."""
        self.version = weights.version

    def close(self) -> None:
        """Does nothing, as nothing was started."""

    @torch.no_grad()
    def _sample(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        """Samples the completions of one prompt."""
        max_tokens = min(sampling.max_tokens, sampling.max_length - len(prompt.tokens))
        with torch.random.fork_rng():
            torch.manual_seed(prompt.seed)
            answers, scores = _generate(
                self.model,
                [prompt.tokens],
                max_tokens=max_tokens,
                ends=sampling.end_tokens,
                **_distribution(sampling),
                num_return_sequences=sampling.num_completions,
            )
        return [self._rollout(answer, scores[:, index], sampling) for index, answer in enumerate(answers)]

    def _rollout(self, answer: list[int], scores: Tensor, sampling: Sampling) -> Rollout:
        """Makes a Rollout of generated token ids.

        Args:
            answer: token ids, perhaps with padding after the end token.
            scores: [L, V] logits that each token was sampled from.
        """
        length = _until_end(answer, sampling.end_tokens)
        tokens = answer[: length + 1]
        token_ids = torch.tensor(tokens, device=scores.device)
        logprobs = scores[: len(tokens)].float().log_softmax(1).gather(1, token_ids[:, None]).squeeze(1)
        return Rollout(
            tokens=tuple(tokens),
            logprobs=tuple(logprobs.tolist()),
            truncated=length == len(answer),
            weight_version=self.version,
        )


def _distribution(sampling: Sampling) -> dict[str, Any]:
    """The arguments of transformers' `generate` that decide the distribution."""
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }


def _generate(
    model: LanguageModel,
    prompts: list[tuple[int, ...]],
    *,
    max_tokens: int,
    ends: frozenset[int],
    **generation_kwargs: Any,
) -> tuple[list[list[int]], Tensor]:
    """Generates answers with transformers.

    Returns:
        Token ids of each answer, padded to the longest, and the [L, answers, V] logits that they were sampled from.
    """
    width = max(map(len, prompts))
    device = model.network.device
    pad = model.tokenizer.eos_token_id
    tokens = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with _ready_to_generate(model):
        generation = model.module.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
            return_dict_in_generate=True,
            output_scores=True,
            **generation_kwargs,
        )
    return generation.sequences[:, width:].tolist(), torch.stack(generation.scores)


@contextlib.contextmanager
def _ready_to_generate(model: LanguageModel) -> Iterator[None]:
    """Prepares a model for `generate` inside this context.

    Generation pads, so it needs one of transformers' own attentions. The model's own generation settings are ignored.
    """
    attention, training = model.network.config._attn_implementation, model.module.training
    generation_config = model.network.generation_config
    model.module.eval()
    model.network.set_attn_implementation("sdpa")
    model.network.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.network.generation_config = generation_config
        model.network.set_attn_implementation(attention)
        model.module.train(training)


def _until_end(tokens: list[int], ends: frozenset[int]) -> int:
    """The number of tokens before the first end token."""
    return next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
