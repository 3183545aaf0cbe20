"""How a model writes calls of tools and thoughts, told from its chat template: vLLM's names for the forms.

A parser of calls does nothing to answers of requests without tools, so a guess costs nothing. A parser of thoughts
takes an answer without marks for one long thought, so one is chosen only where the prompt itself opens a thought.
"""

from __future__ import annotations

TOOL_FORMS = (
    (("<|channel|>commentary",), "openai"),
    (("<|tool_call>",), "gemma4"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("tool▁calls▁begin",), "deepseek_v3"),
    (("<|tool_call_start|>",), "lfm2"),
    (("<tool_call>", "<arg_key>"), "glm45"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|python_tag|>",), "llama3_json"),
    (("Environment: ipython",), "llama3_json"),
    (("functools[",), "phi4_mini_json"),
)
"""What stands in the template, all of it, and the form; the first that fits counts."""
OPENED = "<think>"
CLOSED = "</think>"


def tool_call_parser_of(template: str | None) -> str | None:
    """vLLM's parser for the calls that a template teaches; None if it knows none of the forms."""
    if template is None:
        return None
    return next((name for marks, name in TOOL_FORMS if all(mark in template for mark in marks)), None)


def reasoning_parser_of(template: str | None, prompt: str) -> str | None:
    """vLLM's parser for the thoughts of a model whose answers begin inside of one; None for all others.

    Args:
        prompt: a chat as the template renders it, up to where the answer begins.
    """
    if template is None or not prompt.rstrip().endswith(OPENED):
        return None
    return "qwen3" if "enable_thinking" in template else "deepseek_r1"
