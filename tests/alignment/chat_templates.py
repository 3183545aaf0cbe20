"""Chat templates as they are published, each with a small tokenizer that has the special tokens which it writes.

`python -m tests.alignment.chat_templates` writes the table of docs/chat-templates.md.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import re
from pathlib import Path
from typing import Any

from alignment.data.chat import GroupTokenizer
from alignment.data.chat_templates import with_kwargs
from alignment.errors import ConfigError, DataError
from alignment.groups import Completion, Group, Message
from alignment.settings.data import DataConfig
from tests.conftest import make_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "chat-templates.md"
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"

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


QUESTIONS = ("What is the capital of France?", "And of Italy, please?", "And 12 + 30?")
ANSWERS = ("Paris.", "Rome, that is.", "42")
SYSTEM = Message(role="system", content="Be brief.")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
ONE, EACH = "one example", "one per answer"


def conversation(num_answers: int, *, system: bool = False, thoughts: bool = False) -> Group:
    """Questions and answers, as a row of messages has them."""
    turns = [SYSTEM] if system else []
    for question, answer in zip(QUESTIONS[:num_answers], ANSWERS, strict=False):
        fields = {"reasoning_content": f"Let me see: {answer}"} if thoughts else {}
        turns += [Message(role="user", content=question), Message(role="assistant", content=answer, fields=fields)]
    return _as_group(turns, 1 + system)


def calling() -> Group:
    """A question that is answered by a call, its result, and an answer."""
    turns = [
        Message(role="user", content="How is the weather?"),
        Message(role="assistant", content="", fields={"tool_calls": [CALL]}),
        Message(role="tool", content="sunny", fields={"tool_call_id": "call12345", "name": "weather"}),
        Message(role="assistant", content="It is sunny."),
    ]
    return dataclasses.replace(_as_group(turns, 1), tools=(TOOL,))


def _as_group(turns: list[Message], first: int) -> Group:
    answer = turns[first]
    completion = Completion(text=answer.content, fields=answer.fields, following=tuple(turns[first + 1 :]))
    return Group(id="test", prompt=tuple(turns[:first]), completions=(completion,))


def group_tokenizer(template: str) -> GroupTokenizer:
    """A tokenizer of groups with a template, in a window that everything fits into."""
    tokenizer = tokenizer_for(template)
    data = DataConfig(path="none", max_length=4096)
    return GroupTokenizer(tokenizer, data, end_tokens(tokenizer), date=datetime.date(2026, 11, 27))


def kind_of(tokenize: GroupTokenizer, group: Group) -> str:
    """What becomes of a conversation: the words of the table."""
    try:
        examples = tokenize.examples(group)
    except DataError as error:
        words = {
            "opens a thought": "refused: opens a thought",
            "does not print the answer's reasoning": "refused: drops thoughts",
            "does not print tool": "refused: drops calls",
            "the text of the prompt changes": "refused: the prompt changes",
            "refuses these messages": "refused by the template",
        }
        return next(word for part, word in words.items() if part in str(error))
    return ONE if len(examples) == 1 else EACH


def table() -> str:
    """The table of docs/chat-templates.md."""
    rows = [
        "| template | answers | system turn | thoughts | `enable_thinking: false` | calls |",
        "|---|---|---|---|---|---|",
    ]
    for name, template in published().items():
        tokenize = group_tokenizer(template)
        try:
            without = kind_of(group_tokenizer(with_kwargs(template, {"enable_thinking": False})), conversation(3))
        except ConfigError:
            without = "–"
        cells = [
            kind_of(tokenize, conversation(3)),
            kind_of(tokenize, conversation(3, system=True)),
            kind_of(tokenize, conversation(3, thoughts=True)),
            without,
            kind_of(tokenize, calling()),
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def document() -> str:
    """The whole page, with its table made anew."""
    before, _, after = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}{END}{after.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
