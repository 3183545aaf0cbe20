"""Forms of calls and thoughts, told from published chat templates."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from alignment.data.chat_templates import with_kwargs
from serving.registry.parsers import TOOL_FORMS, reasoning_parser_of, tool_call_parser_of
from tests.alignment.chat_templates import published, tokenizer_for

TEMPLATES = published()


@pytest.mark.parametrize(
    ("name", "parser"),
    [
        ("qwen2_5", "hermes"),
        ("qwen3", "hermes"),
        ("qwen3_6", "qwen3_coder"),
        ("nemotron_3_nano", "qwen3_coder"),
        ("glm4moe", "glm45"),
        ("llama3_1", "llama3_json"),
        ("llama3_2", "llama3_json"),
        ("deepseekv3", "deepseek_v3"),
        ("gptoss", "openai"),
        ("lfm2_v2", "lfm2"),
        ("gemma4", "gemma4"),
        ("gemma3", None),
        ("phi3", None),
        ("llama3", None),
    ],
)
def test_the_form_of_calls_is_told_from_the_template(name: str, parser: str | None) -> None:
    assert tool_call_parser_of(TEMPLATES[name]) == parser


def test_every_form_has_a_parser_in_vllm() -> None:
    """By the text of its list of parsers: importing vLLM takes 10 s."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    for package, names in (
        ("tool_parsers", [name for _, name in TOOL_FORMS]),
        ("reasoning", ["qwen3", "deepseek_r1"]),
    ):
        text = (Path(spec.origin).parent / package / "__init__.py").read_text()
        assert [name for name in names if f'"{name}": (' not in text] == []


def parser_of_thoughts(template: str) -> str | None:
    chat = [{"role": "user", "content": "Hello"}]
    tokenizer = tokenizer_for(template)
    return reasoning_parser_of(
        template, str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    )


def test_thoughts_are_read_where_every_answer_begins_in_one() -> None:
    assert parser_of_thoughts(TEMPLATES["qwen3_5_think"]) == "qwen3"
    assert parser_of_thoughts(TEMPLATES["deepseek_r1_distill"]) == "deepseek_r1"
    assert parser_of_thoughts(with_kwargs(TEMPLATES["qwen3_5_think"], {"enable_thinking": False})) is None
    for name in ("qwen3", "qwen2_5", "llama3_1", "gemma3"):  # a plain answer would be taken for a thought
        assert parser_of_thoughts(TEMPLATES[name]) is None
