"""A random model that always writes something, in letters and signs that anybody can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tests.conftest import make_tokenizer, tiny_config

POSITIONS = 4096
END = "Ġ42"  # " 42", as the tokenizer spells it
"""After this token, and no other, an answer ends; the first token of an answer is therefore never its end."""
LEVEL = 8.0
"""Value of two dimensions of the hidden states that no layer changes: of the first one always, of the second after
`END`. The output layer reads them, so that a token can be as good as excluded."""


def write_writer(folder: Path) -> None:
    """Writes two layers of a Llama in fp32, and a tokenizer of about 350 tokens with ChatML."""
    tokenizer = make_tokenizer()
    end_of_text = tokenizer.eos_token_id
    config = tiny_config(
        tokenizer,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.15,  # large enough that an answer depends on what was asked
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        inputs, outputs = model.model.embed_tokens.weight, model.lm_head.weight
        inputs.normal_()
        inputs[:, 0], inputs[:, 1] = LEVEL, 0
        inputs[tokenizer.convert_tokens_to_ids(END), 1] = LEVEL
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:2] = 0
            layer.mlp.down_proj.weight[:2] = 0
        outputs.normal_(std=0.5)
        outputs[:, :2] = 0
        outputs[[id for id in range(len(tokenizer)) if not is_legible(tokenizer, id)], 0] = -10
        outputs[end_of_text] = 0
        outputs[end_of_text, 0], outputs[end_of_text, 1] = -10, 15
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def is_legible(tokenizer: Any, id: int) -> bool:
    """Whether a token alone is a text that is not blank; half a character is not."""
    text = tokenizer.decode([id], skip_special_tokens=True)
    return bool(text.strip()) and text.isascii() and text.isprintable()
