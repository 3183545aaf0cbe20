"""Chat templates as they are published, each with a small tokenizer that has the special tokens which it writes."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

from tests.conftest import make_tokenizer

MARK = re.compile(
    r"<[|｜][^<>'\"{}\n]{1,40}?[|｜]>|<(?:start|end)_of_\w+>|<\|?turn\|?>|<\|channel>|<channel\|>|</?think>|\[/?[A-Z_]{3,}\]"
)
"""What looks like a special token in a template."""
BOS, EOS = "<s>", "</s>"


def published() -> dict[str, str]:
    """The templates that TRL ships, by name."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))}


@functools.cache
def _plain_tokenizer() -> Any:
    return make_tokenizer()


def tokenizer_for(template: str) -> Any:
    """The tiny tokenizer with the template and every special token that it mentions."""
    tokenizer = copy.deepcopy(_plain_tokenizer())
    tokenizer.add_special_tokens(
        {"bos_token": BOS, "eos_token": EOS, "additional_special_tokens": sorted({*MARK.findall(template)})}
    )
    tokenizer.chat_template = template
    return tokenizer


def end_tokens(tokenizer: Any) -> frozenset[int]:
    """The tokenizer's end token, and what the template writes behind an answer: a model's own settings name both."""
    marks = [_behind_answer(tokenizer, parts, later) for later in (False, True) for parts in (False, True)]
    end = next((mark for mark in marks if mark is not None), EOS)
    return frozenset({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)})


def _behind_answer(tokenizer: Any, parts: bool, later: bool) -> str | None:
    """The last mark behind an answer: at the end, or before the next question."""
    texts = [("user", "Q1"), ("assistant", "ANSWER"), *([("user", "Q2"), ("assistant", "A2")] if later else [])]
    messages = [{"role": role, "content": [{"type": "text", "text": t}] if parts else t} for role, t in texts]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        return None
    _, found, tail = text.partition("ANSWER")
    marks = [mark for mark in MARK.findall(tail.partition("Q2")[0]) if mark != EOS]
    return (marks[0] if later else marks[-1]) if found and marks else None
