"""What ends an answer, for models that write and for models that only score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from alignment.groups import Completion, Group, Message
from alignment.rewards.model import RewardModel
from tests.alignment.families import write_family

TURNS = [{"role": "user", "content": "the quick brown fox?"}, {"role": "assistant", "content": "it jumps"}]


@pytest.fixture
def gemma_like(tmp_path: Path) -> Path:
    """A reward model whose template ends turns with a token that is not the tokenizer's end token."""
    folder = write_family(tmp_path / "model", "llama", head="score")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder


def score(folder: Path) -> float:
    scorer = RewardModel(path=str(folder), dtype="fp32").build(torch.device("cpu"))
    prompt = (Message(role="user", content=TURNS[0]["content"]),)
    ((reward,),) = scorer.score([Group(id="0", prompt=prompt, completions=(Completion(text=TURNS[1]["content"]),))])
    return float(reward)


def stock_score(folder: Path) -> float:
    """As transformers scores the conversation through the chat template."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(TURNS, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        return float(model(ids).logits[0, 0])


def test_a_reward_model_reads_the_text_that_transformers_reads_by_its_generation_settings(gemma_like: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma_like)
    plain = "{% for m in messages %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tokenizer.chat_template = plain
    tokenizer.save_pretrained(gemma_like)
    GenerationConfig(eos_token_id=ends).save_pretrained(gemma_like)
    assert score(gemma_like) == pytest.approx(stock_score(gemma_like), abs=1e-4)


def test_and_without_such_settings_by_its_chat_template(gemma_like: Path) -> None:
    assert not (gemma_like / "generation_config.json").exists()
    assert score(gemma_like) == pytest.approx(stock_score(gemma_like), abs=1e-4)
