"""Samples from the live module with transformers: no engine, no copy of the weights; for samples and tiny models."""

from __future__ import annotations

import torch

from alignment.models.load import LanguageModel


@torch.no_grad()
def greedy(model: LanguageModel, prompts: list[tuple[int, ...]], *, max_tokens: int) -> list[list[int]]:
    """Answers prompts by the most probable token each time.

    Args:
        prompts: token ids of each prompt.
        max_tokens: most tokens of an answer.

    Returns:
        Token ids of each answer, up to and without the end token.
    """
    width = max(map(len, prompts))
    device = model.causal.device
    pad = model.tokenizer.eos_token_id
    tokens = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    attention = model.causal.config._attn_implementation
    model.module.eval()
    model.causal.set_attn_implementation("sdpa")
    answers = model.module.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=sorted(model.end_tokens),
    )[:, width:]
    model.causal.set_attn_implementation(attention)
    return [_until_end(answer, model.end_tokens) for answer in answers.tolist()]


def _until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    length = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:length]
