"""Samples from the live module with transformers: no engine, no copy of the weights; for samples and tiny models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from alignment.models.load import LanguageModel
from alignment.rollout import Prompt, Rollout, Rollouts, Sampling, Weights


@torch.no_grad()
def greedy(model: LanguageModel, prompts: list[tuple[int, ...]], *, max_tokens: int) -> list[list[int]]:
    """Answers prompts by the most probable token each time.

    Args:
        prompts: token ids of each prompt.
        max_tokens: most tokens of an answer.

    Returns:
        Token ids of each answer, up to and without the end token.
    """
    answers, _ = _generate(model, prompts, max_tokens=max_tokens, ends=model.end_tokens, do_sample=False)
    return [answer[: _until_end(answer, model.end_tokens)] for answer in answers]


class LocalGenerator:
    """The Generator port over the trained module itself: always of the newest weights."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.version = 0

    def submit(self, prompts: list[Prompt], sampling: Sampling) -> Callable[[], Rollouts]:
        """Draws at once; every prompt by itself, so that its answers do not depend on its neighbours."""
        drawn = [self._draw(prompt, sampling) for prompt in prompts]
        return lambda: drawn

    def load(self, weights: Weights) -> None:
        """The module has them already."""
        self.version = weights.version

    def close(self) -> None:
        """Nothing was started."""

    @torch.no_grad()
    def _draw(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        room = min(sampling.max_tokens, sampling.max_length - len(prompt.tokens))
        with torch.random.fork_rng():
            torch.manual_seed(prompt.seed)
            answers, scores = _generate(
                self.model,
                [prompt.tokens],
                max_tokens=room,
                ends=sampling.end_tokens,
                **_distribution(sampling),
                num_return_sequences=sampling.completions,
            )
        return [self._rollout(answer, scores[:, number], sampling) for number, answer in enumerate(answers)]

    def _rollout(self, answer: list[int], scores: Tensor, sampling: Sampling) -> Rollout:
        """`scores`: [L, V] logits of every step, as they were sampled from."""
        length = _until_end(answer, sampling.end_tokens)
        tokens = answer[: length + 1]
        drawn = torch.tensor(tokens, device=scores.device)
        logprobs = scores[: len(tokens)].float().log_softmax(1).gather(1, drawn[:, None]).squeeze(1)
        return Rollout(
            tokens=tuple(tokens),
            logprobs=tuple(logprobs.tolist()),
            truncated=length == len(answer),
            version=self.version,
        )


def _distribution(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }


def _generate(
    model: LanguageModel, prompts: list[tuple[int, ...]], *, max_tokens: int, ends: frozenset[int], **how: Any
) -> tuple[list[list[int]], Tensor]:
    """Token ids of each answer, as long as the longest, and the [L, answers, V] logits that they were chosen by."""
    width = max(map(len, prompts))
    device = model.network.device
    pad = model.tokenizer.eos_token_id
    tokens = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with _ready_to_generate(model):
        said = model.module.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
            return_dict_in_generate=True,
            output_scores=True,
            **how,
        )
    return said.sequences[:, width:].tolist(), torch.stack(said.scores)


@contextlib.contextmanager
def _ready_to_generate(model: LanguageModel) -> Iterator[None]:
    """Generation pads, so it needs an attention of transformers' own; and how it draws, only the caller says."""
    attention, training = model.network.config._attn_implementation, model.module.training
    own = model.network.generation_config
    model.module.eval()
    model.network.set_attn_implementation("sdpa")
    model.network.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.network.generation_config = own
        model.network.set_attn_implementation(attention)
        model.module.train(training)


def _until_end(tokens: list[int], ends: frozenset[int]) -> int:
    """Number of tokens before the first end token."""
    return next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
