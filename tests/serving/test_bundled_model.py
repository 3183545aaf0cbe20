"""The bundled model, served as docs/serving.md begins: with its own tokenizer, chat template and language."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.models.folders import BUNDLED, bundled
from tests.serving.conftest import started

TURNS: list[Any] = [{"role": "user", "content": "What is the capital of France, and what is it known for?"}]
TEXT = "The capital of France is"
TOKENS = 16


def expected_answer() -> str:
    """What transformers answers, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(bundled())
    model = AutoModelForCausalLM.from_pretrained(bundled(), dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.slow  # an endpoint of its own
def test_the_bundled_model_answers_as_in_transformers_and_continues_a_text(tmp_path: Path) -> None:
    with started(BUNDLED, tmp_path, "dtype=fp32", "max_model_len=512") as endpoint:
        assert [model.id for model in endpoint.client.models.list()] == [BUNDLED]
        chat = endpoint.client.chat.completions.create(
            model=BUNDLED, messages=TURNS, temperature=0, max_completion_tokens=TOKENS
        )
        assert chat.choices[0].message.content == expected_answer()
        text = endpoint.client.completions.create(
            model=BUNDLED, prompt=TEXT, temperature=0, max_tokens=4, logprobs=1, echo=True
        )
        assert text.choices[0].text.startswith(f"{TEXT} Paris") and text.choices[0].logprobs is not None
