"""Over all published templates: what is learned is what the assistant said, behind the prompt that generation has."""

from __future__ import annotations

import pytest

from alignment.data.chat import GroupTokenizer
from alignment.data.chat_templates import TemplateInputs, with_kwargs
from alignment.errors import DataError
from alignment.groups import Group, Message
from tests.alignment.chat_templates import (
    ANSWERS,
    EOS,
    PAGE,
    calling,
    conversation,
    document,
    group_tokenizer,
    published,
)

TEMPLATES = published()
EMPTY_THOUGHT = ("<think>\n\n</think>\n\n", "\n<think></think>\n", "\n</think>\n\n")
WRAPPERS = ("", " ", "\n", "<|channel|>final<|message|>", " to=user<|message|>", *EMPTY_THOUGHT)
"""What templates write between the prompt that generation has and the answer."""


def turns_of(group: Group) -> list[Message]:
    """All turns of a conversation."""
    assert not isinstance(group.prompt, str)
    (completion,) = group.completions
    answer = Message(role="assistant", content=completion.text, fields=completion.fields)
    return [*group.prompt, answer, *completion.following]


def learned_parts(tokenize: GroupTokenizer, examples: list[Group]) -> list[tuple[str, str]]:
    """For every run of learned tokens: the text before it, and its own."""
    parts = []
    for example in examples:
        (completion,) = example.completions
        ids, loss_mask = [*example.prompt_tokens, *completion.tokens], [False] * len(example.prompt_tokens)
        loss_mask += completion.loss_mask
        starts = [i for i in range(1, len(ids)) if loss_mask[i] and not loss_mask[i - 1]]
        for start in starts:
            stop = next((i for i in range(start, len(ids)) if not loss_mask[i]), len(ids))
            parts.append((tokenize.tokenizer.decode(ids[:start]), tokenize.tokenizer.decode(ids[start:stop])))
    return parts


def check(tokenize: GroupTokenizer, group: Group, examples: list[Group]) -> None:
    """Every answer is learned once, with its end token and nothing else, behind the prompt of generation."""
    turns = turns_of(group)
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    parts = learned_parts(tokenize, examples)
    assert len(parts) == len(answers)
    ends = {tokenize.tokenizer.decode([index]) for index in tokenize.end_tokens}
    for index, (context, loss_mask) in zip(answers, parts, strict=True):
        assert context == tokenize.renderer.prompt(tuple(turns[:index]), inputs=TemplateInputs(tools=group.tools))
        wrapper, found, end = loss_mask.partition(turns[index].content)
        assert found and wrapper in WRAPPERS, loss_mask
        core = end.strip().removesuffix(EOS).removeprefix("<|END_RESPONSE|>")
        assert core in ends or (not core and end.strip() == EOS), loss_mask


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learned_is_each_answer_with_its_end_token_and_nothing_else(name: str) -> None:
    tokenize = group_tokenizer(TEMPLATES[name])
    for num_answers in (1, 2, 3):
        for system in (False, True):
            group = conversation(num_answers, system=system)
            try:
                examples = tokenize.examples(group)
            except DataError as error:
                refuses = system and "the chat template refuses these messages: System role not supported" in str(error)
                assert refuses or "the chat template's prompt opens a thought (<think>)" in str(error)
                continue
            check(tokenize, group, examples)


@pytest.mark.parametrize("name", [name for name, text in TEMPLATES.items() if "enable_thinking" in text])
def test_without_thinking_every_template_that_knows_it_takes_plain_answers(name: str) -> None:
    tokenize = group_tokenizer(with_kwargs(TEMPLATES[name], {"enable_thinking": False}))
    for num_answers in (1, 2, 3):
        group = conversation(num_answers)
        check(tokenize, group, tokenize.examples(group))


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answers_thought_is_learned_before_it_or_the_row_is_refused(name: str) -> None:
    tokenize = group_tokenizer(TEMPLATES[name])
    group = conversation(2, thoughts=True)
    try:
        examples = tokenize.examples(group)
    except DataError as error:
        assert any(text in str(error) for text in ("does not print the answer's reasoning", "prompt changes when an"))
        return
    parts = learned_parts(tokenize, examples)
    for answer, (_, loss_mask) in zip(ANSWERS, parts, strict=False):
        assert loss_mask.index(f"Let me see: {answer}") < loss_mask.rindex(answer)
    assert [context for context, _ in parts] == [
        tokenize.renderer.prompt(tuple(turns_of(group)[:index])) for index in (1, 3)
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_is_learned_or_the_row_is_refused(name: str) -> None:
    tokenize = group_tokenizer(TEMPLATES[name])
    try:
        examples = tokenize.examples(calling())
    except DataError as error:
        reasons = ("does not print tool", "refuses these messages", "prompt opens a thought")
        assert any(reason in str(error) for reason in reasons)
        return
    (first_context, call), (_, last) = learned_parts(tokenize, examples)
    assert "weather" in first_context and "weather" in call and "Bonn" in call
    assert "It is sunny." in last and "Bonn" not in last


def test_all_published_templates_are_tried() -> None:
    assert len(TEMPLATES) >= 68


def test_the_page_of_templates_says_what_is_so() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(), "run python -m tests.alignment.chat_templates"


def test_a_template_for_parts_gets_parts() -> None:
    tokenize = group_tokenizer(TEMPLATES["smolvlm"])
    (example,) = tokenize.examples(conversation(1))
    assert "User: What is the capital of France?" in tokenize.tokenizer.decode(example.prompt_tokens)
