"""Finds vLLM's parsers for a model's calls of tools and for its thoughts, by its chat template.

A parser of calls changes nothing in answers to requests without tools, so a wrong guess costs nothing. A parser of
thoughts takes an answer without marks for one long thought, so it is chosen only where the prompt opens a thought.
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
"""Texts that the template has to contain, all of them, and vLLM's name of the parser. The first that fits is taken."""
OPENED = "<think>"
CLOSED = "</think>"


def tool_call_parser_of(template: str | None) -> str | None:
    """Returns the name of vLLM's parser for the calls that a template teaches; None if none of the forms fits."""
    if template is None:
        return None
    return next((name for marks, name in TOOL_FORMS if all(mark in template for mark in marks)), None)


def reasoning_parser_of(template: str | None, prompt: str) -> str | None:
    """Returns the name of vLLM's parser for a model whose answers begin inside a thought; None for other models.

    Args:
        prompt: a chat as the template renders it, up to the beginning of the answer.
    """
    if template is None or not prompt.rstrip().endswith(OPENED):
        return None
    return "qwen3" if "enable_thinking" in template else "deepseek_r1"
