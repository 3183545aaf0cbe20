"""Answers in conversations: found by their text, behind the prompt of generation, with all that their rows say."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import pytest

from alignment.algorithms.sft import SFT
from alignment.data.chat import GroupTokenizer
from alignment.data.chat_templates import run_date, with_kwargs
from alignment.data.reader import GroupReader
from alignment.data.shapes import to_group
from alignment.data.stream import Data, ListStream
from alignment.errors import ConfigError, DataError
from alignment.groups import Completion, Group, Message
from alignment.models.load import load_tokenizer
from alignment.run_folder import RunFolder
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from tests.alignment.chat_templates import published, tokenizer_for
from tests.alignment.conftest import lines_of, load
from tests.conftest import CHATML, make_tokenizer

EOS = "<|im_end|>"
TURN = "<|im_start|>{}\n{}<|im_end|>\n"
THINKING = (  # an empty thought stands before the answer of the last turn only
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENED = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
MOVED = (  # the system's text stands in front of the last question
    "{%- set first = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}"
    "{%- set turns = messages[1:] if first else messages -%}"
    "{%- set questions = turns | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- for m in turns -%}{%- if m['role'] == 'user' -%}"
    "{{ '[Q] ' }}{% if first and m == questions[-1] %}{{ first + '\n\n' }}{% endif %}{{ m['content'] + ' [/Q]' }}"
    "{%- else -%}{{ ' ' + m['content'] + eos_token }}{%- endif -%}{%- endfor -%}"
)
LAST = MOVED.replace("m == questions[-1]", "loop.last")  # and nowhere once an answer follows, as Mistral's v0.3
CALLING = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ '{' + c['function']['name'] + c['function']['arguments'] | tojson + '}' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str, **more: Any) -> Message:
    plain = {name: more.pop(name) for name in ("trained", "truncated") if name in more}
    return Message(role="assistant", content=content, fields=more, **plain)


def row(*turns: Message, prompt: int = 1, tools: tuple[Any, ...] = ()) -> Group:
    """A conversation of which the turns from `prompt` on are the answer and what follows."""
    answer = turns[prompt]
    completion = Completion(
        text=answer.content, fields=answer.fields, truncated=answer.truncated, following=turns[prompt + 1 :]
    )
    return Group(id="rows.jsonl:1", prompt=turns[:prompt], completions=(completion,), tools=tools)


def tokenizer_with(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def tokenize(template: str = CHATML, **settings: Any) -> GroupTokenizer:
    tokenizer = tokenizer_with(template)
    return GroupTokenizer(tokenizer, DataConfig(path="none", **settings), frozenset({tokenizer.eos_token_id}))


def train_groups(data: Data) -> list[Group]:
    assert isinstance(data.train, ListStream)
    return data.train.groups


def shown(tokenizer: GroupTokenizer, group: Group, number: int = 0) -> str:
    """The text of a completion with what is learned in «»."""
    completion, text, was = group.completions[number], "", False
    for token, loss_mask in zip(completion.tokens, completion.loss_mask, strict=True):
        text += ("«" if loss_mask and not was else "") + ("»" if was and not loss_mask else "")
        text += tokenizer.tokenizer.decode([token])
        was = loss_mask
    return text + ("»" if was else "")


def prompt_of(tokenizer: GroupTokenizer, group: Group) -> str:
    return str(tokenizer.tokenizer.decode(group.prompt_tokens))


def test_an_empty_thought_before_the_last_answer_alone_moves_no_border() -> None:
    tok = tokenize(THINKING)
    group = tok(row(user("France?"), assistant("Paris."), user("And Italy?"), assistant("Rome.")))
    following = TURN.format("user", "And Italy?") + "<|im_start|>assistant\n"
    assert shown(tok, group) == f"«Paris.{EOS}»\n{following}«<think>\n\n</think>\n\nRome.{EOS}»\n"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Paris. or Rome.?", "Paris."),  # the question holds the answer
        ("user", "user"),  # so does a header
        ("assistant", "assistant"),
        ("Say: im_end", "im_end"),
        ("What?", "  indented\n"),
        ("Was?", "Größe: 5 \U0001f98a"),
        ("And?", "Rome. Rome. And Italy?"),  # the answer holds other turns
        ("?", "\n"),
    ],
)
@pytest.mark.parametrize("trimmed", [False, True])
def test_answers_are_found_wherever_else_their_text_stands(question: str, answer: str, trimmed: bool) -> None:
    tok = tokenize(THINKING.replace("m['content']", "m['content'] | trim") if trimmed else THINKING)
    group = tok(row(user(question), assistant(answer), user(answer), assistant(answer), prompt=1))
    form = answer.strip() if trimmed else answer
    asked = TURN.format("user", form) + "<|im_start|>assistant\n"
    loss_mask = f"{form}{EOS}"
    ids = group.completions[0]
    text = tok.tokenizer.decode(ids.tokens)
    assert text == f"{loss_mask}\n{asked}<think>\n\n</think>\n\n{loss_mask}\n"
    parts = [t for t, yes in zip(ids.tokens, ids.loss_mask, strict=True) if yes]
    assert tok.tokenizer.decode(parts) == f"{loss_mask}<think>\n\n</think>\n\n{loss_mask}"


def test_a_system_text_that_moves_gives_one_example_per_answer() -> None:
    tok = tokenize(MOVED)
    turns = (Message(role="system", content="Brief!"), user("France?"), assistant("Paris."), user("Italy?"))
    with pytest.raises(DataError, match="needs 2 examples, one per answer"):
        tok(row(*turns, assistant("Rome."), prompt=2))
    first, second = tok.examples(row(*turns, assistant("Rome."), prompt=2))
    assert prompt_of(tok, first) + shown(tok, first) == f"[Q] Brief!\n\nFrance? [/Q]« Paris.{EOS}»"
    assert prompt_of(tok, second) + shown(tok, second) == (
        f"[Q] France? [/Q] Paris.{EOS}[Q] Brief!\n\nItaly? [/Q]« Rome.{EOS}»"
    )
    assert (first.id, second.prompt) == ("rows.jsonl:1", turns)
    assert tok.summary() == "2 conversations learned as one example per answer"


def test_examples_beyond_the_window_are_left_out_as_the_end_of_a_long_conversation_is() -> None:
    turns = (Message(role="system", content="Brief!"), user("France?"), assistant("Paris."), user("Italy?"))
    whole = tokenize(MOVED).examples(row(*turns, assistant("Rome."), prompt=2))
    tok = tokenize(MOVED, max_length=len(whole[1].prompt_tokens))
    assert tok.examples(row(*turns, assistant("Rome."), prompt=2)) == whole[:1]
    with pytest.raises(DataError, match="fills the window"):
        tokenize(MOVED, max_length=5).examples(row(*turns, assistant("Rome."), prompt=2))


def test_a_template_without_end_tokens_gets_one_for_every_answer() -> None:
    tok = tokenize(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    examples = tok.examples(row(user("France?"), assistant("Paris."), user("Italy?"), assistant("Rome.")))
    assert [shown(tok, example).strip("«»").strip() for example in examples] == [f"Paris.\n{EOS}", f"Rome.\n{EOS}"]


def test_what_follows_the_end_token_of_an_answer_is_not_learned() -> None:
    """Phi-3's template writes the tokenizer's end token behind the end of the last turn."""
    tokenizer = tokenizer_for(published()["phi3"])
    ends = frozenset(tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "<|end|>"]))
    tok = GroupTokenizer(tokenizer, DataConfig(path="none"), ends)
    group = tok(row(user("France?"), assistant("Paris."), user("Italy?"), assistant("Rome.")))
    assert shown(tok, group) == "«Paris.<|end|>»\n<|user|>\nItaly?<|end|>\n<|assistant|>\n«Rome.<|end|>»\n"


def test_an_opened_thought_needs_an_answer_with_one() -> None:
    with pytest.raises(
        DataError, match=r"opens a thought \(<think>\), and the answer has none.*enable_thinking: false"
    ):
        tokenize(OPENED)(row(user("France?"), assistant("Paris.")))
    with pytest.raises(DataError, match="opens a thought"):
        tokenize(OPENED)(row(user("France?"), assistant("<think>\n\n</think>\n\nParis.")))


@pytest.mark.parametrize(
    "answer",
    [
        assistant("Paris.", reasoning_content="Easy."),
        assistant("Paris.", reasoning="Easy."),
        assistant("Paris.", thinking="Easy."),
        assistant("<think>\nEasy.\n</think>\n\nParis."),
        assistant("Easy.\n</think>\n\nParis."),
    ],
)
def test_a_thought_that_the_prompt_opens_is_learned_as_a_model_goes_on(answer: Message) -> None:
    tok = tokenize(OPENED)
    group = tok(row(user("France?"), answer))
    assert prompt_of(tok, group).endswith("<|im_start|>assistant\n<think>\n")
    assert shown(tok, group) == f"«Easy.\n</think>\n\nParis.{EOS}»\n"


def test_a_thought_that_was_cut_off_needs_no_end() -> None:
    tok = tokenize(
        OPENED.replace("m['content'] +", "('<think>\n' if m['role'] == 'assistant' else '') + m['content'] +")
    )
    group = tok(row(user("France?"), assistant("Well, let me", truncated=True)))
    assert shown(tok, group) == "«Well, let me»" and group.completions[0].truncated


def test_reasoning_that_a_template_drops_is_refused() -> None:
    with pytest.raises(DataError, match=r"does not print the answer's reasoning \('Easy.'\).*learn not to think"):
        tokenize()(row(user("France?"), assistant("Paris.", reasoning_content="Easy.")))
    assert tokenize()(
        row(user("Hi"), assistant("Ho", reasoning_content="Easy."), user("France?"), assistant("P"), prompt=3)
    )


def test_a_prompt_that_changes_when_an_answer_follows_is_refused_with_both_texts() -> None:
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n(aloud)\n'")
    with pytest.raises(DataError, match=r"\(8 of its last characters differ: generation has '\(aloud\)\\n', a given"):
        tokenize(template)(row(user("France?"), assistant("Paris.")))


def test_what_the_template_is_told_is_a_part_of_it(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = OPENED.replace("<think>\n'", "' + ('<think>\n' if style != 'no \"thoughts\" \U0001f98a' else '')")
    kwargs = {"style": 'no "thoughts" \U0001f98a', "unused_list": [1, None, {"a": True}]}
    with pytest.raises(ConfigError, match="knows no 'unused_list', so it would do nothing"):
        with_kwargs(template, kwargs)
    config = ModelConfig(path=str(tiny_model), chat_template=template, chat_template_kwargs={"style": kwargs["style"]})
    tokenizer = load_tokenizer(config)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        asked = [{"role": "user", "content": "Hi"}]
        plain = loaded.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert plain.endswith("assistant\n")
        own = loaded.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, style="mine")
        assert own.endswith("<think>\n")
    assert with_kwargs("{{ a }}{{ b.c }}", {"a": [1, None], "b": {"c": True}}) == (
        "{%- if a is not defined %}{%- set a = [1, none] %}{%- endif %}"
        '{%- if b is not defined %}{%- set b = {"c": true} %}{%- endif %}{{ a }}{{ b.c }}'
    )


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "enable-thinking"])
def test_what_is_no_variable_of_a_template_cannot_be_told_to_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot be told to a chat template"):
        ModelConfig(chat_template_kwargs={name: True})


def test_one_of_several_templates_is_taken_by_its_name(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML)
    tokenizer.chat_template = {"rag": CHATML.replace("\n", " "), "tool_use": CHATML}
    tok = GroupTokenizer(tokenizer, DataConfig(path="none"), frozenset({tokenizer.eos_token_id}))
    with pytest.raises(DataError, match=r"several chat templates \(rag, tool_use\) and none is the default; set model"):
        tok(row(user("Hi"), assistant("Ho")))
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelConfig(path=str(tmp_path), chat_template="tool_use")).chat_template == CHATML
    assert isinstance(load_tokenizer(ModelConfig(path=str(tmp_path))).chat_template, dict)


def test_a_template_that_is_no_jinja_is_refused_when_it_is_loaded(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="chat_template: line 2 is not Jinja"):
        load_tokenizer(ModelConfig(path=str(tiny_model), chat_template="{{ messages }}\n{% for %}"))


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", "{{ messages[0].x.y }}"])
def test_a_template_that_fails_in_any_way_is_a_bad_row(template: str) -> None:
    with pytest.raises(DataError, match=r"the chat template (fails on|refuses) these messages"):
        tokenize(template)(row(user("Hi"), assistant("Ho")))


def test_calls_and_tools_reach_the_template() -> None:
    tok = tokenize(CALLING)
    result = Message(role="tool", content="sunny", fields={"tool_call_id": "1"})
    turns = (user("Weather?"), assistant("Let me look.", tool_calls=[CALL]), result, assistant("It is sunny."))
    group = tok(row(*turns, tools=(TOOL,)))
    assert '"name": "weather"' in prompt_of(tok, group)
    header = TURN.format("tool", "sunny") + "<|im_start|>assistant\n"
    call = '{weather{"city": "Bonn"}}'
    assert shown(tok, group) == f"«Let me look.{call}{EOS}»\n{header}«It is sunny.{EOS}»\n"
    assert tok.summary() == "fields that the chat template does not read: tool_call_id"
    as_context = tok(row(*turns, prompt=3, tools=(TOOL,)))
    assert call in prompt_of(tok, as_context)


@pytest.mark.parametrize(
    ("group", "what"),
    [
        (row(user("W?"), assistant("Look.", tool_calls=[CALL])), "tool_calls"),
        (row(user("W?"), assistant("", tool_calls=[CALL]), user("So?"), assistant("Sunny."), prompt=3), "tool_calls"),
        (row(user("W?"), assistant("Sunny."), tools=(TOOL,)), "tools"),
        (row(user("weather?"), assistant("weather", function_call=CALL["function"])), "tool_calls"),
    ],
)
def test_calls_or_tools_that_the_template_drops_are_refused(group: Group, what: str) -> None:
    with pytest.raises(DataError, match=f"the chat template does not print {what}"):
        tokenize()(group)


NESTED = {"function": {"name": "book", "arguments": {"city": "Bonn", "days": [1, {"n": 2}], "late": False, "by": {}}}}
ARGUMENTS = "c['function']['arguments'] | tojson"


@pytest.mark.parametrize("is_context", [True, False])
@pytest.mark.parametrize(
    ("printed", "lost"),
    [
        ("''", "city"),
        ("c['function']['arguments'] | length", "city"),
        ("c['function']['arguments'] | list | join(', ')", "city"),
        ("c['function']['arguments']['city']", "days"),
        ("c['function']['arguments'] | string | truncate(36, true, '')", "days"),
        ("c['function']['arguments']['city'] ~ c['function']['arguments']['days'] | tojson", "late"),
    ],
)
def test_a_template_that_leaves_out_a_part_of_the_arguments_is_refused(
    printed: str, lost: str, is_context: bool
) -> None:
    turns = (user("W?"), assistant("", tool_calls=[NESTED]), user("Bonn 1 2 false?"), assistant("Done."))
    group = row(*turns, prompt=3) if is_context else row(*turns[:2])
    with pytest.raises(DataError, match=f"does not print the argument '{lost}' of a tool call, so the model would"):
        tokenize(CALLING.replace(ARGUMENTS, f"({printed}) | string"))(group)
    for whole in (CALLING, CALLING.replace(ARGUMENTS, "c['function']['arguments'] | string")):
        tokenize(whole)(group)


@pytest.mark.parametrize(
    ("printed", "lost"), [("tools | length", "book"), ("tools | map(attribute='function.name') | join", "city")]
)
def test_a_template_that_leaves_out_names_of_the_tools_is_refused(printed: str, lost: str) -> None:
    tool = {
        "type": "function",
        "function": {"name": "book", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    group = row(user("book a city?"), assistant("Done."), tools=(tool,))
    with pytest.raises(DataError, match=f"does not print '{lost}' of the tools, so the model would not learn"):
        tokenize(CALLING.replace("tools | tojson", f"({printed}) | string"))(group)
    assert '"city"' in prompt_of(tokenize(CALLING), tokenize(CALLING)(group))


def test_arguments_are_handed_over_as_the_template_takes_them() -> None:
    joined = CALLING.replace("c['function']['arguments'] | tojson", "c['function']['arguments']")
    tok = tokenize(joined)
    group = tok(row(user("W?"), assistant("", tool_calls=[CALL])))
    assert shown(tok, group) == f'«{{weather{{"city": "Bonn"}}}}{EOS}»\n'
    broken = {"function": {"name": "weather", "arguments": "{city"}}
    with pytest.raises(DataError, match=r"arguments of a tool call are a text that is not JSON: '\{city'"):
        tokenize(CALLING)(row(user("W?"), assistant("", tool_calls=[broken])))
    twice = {"function": {"name": "weather", "arguments": '{"city": "Bonn", "city": "Rome"}'}}
    with pytest.raises(DataError, match="in the arguments of a tool call, an object has the key 'city' twice"):
        tokenize(CALLING)(row(user("W?"), assistant("", tool_calls=[twice])))


@pytest.mark.parametrize("text", ["d", "Hello.", "system"])
def test_a_turn_that_is_left_out_is_refused_where_its_text_stands_elsewhere_by_chance(text: str) -> None:
    only = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'developer' %}")
    turns = (Message(role="developer", content=text), Message(role="system", content="Good."), user("Hello. Who?"))
    with pytest.raises(DataError, match="leaves out what role 'developer' says"):
        tokenize(only)(row(*turns, assistant("I.")))
    tokenize()(row(*turns, assistant("I.")))


def test_a_system_text_that_is_gone_once_an_answer_follows_stays_in_the_prompt() -> None:
    tok = tokenize(LAST)
    turns = (Message(role="system", content="Be brief."), user("2 + 3?"), assistant("5"), user("3?"), assistant("3?"))
    first, second = tok.examples(row(*turns, prompt=2))
    assert tok.tokenizer.decode(first.prompt_tokens) == "[Q] Be brief.\n\n2 + 3? [/Q]"
    assert tok.tokenizer.decode(second.prompt_tokens) == f"[Q] 2 + 3? [/Q] 5{EOS}[Q] Be brief.\n\n3? [/Q]"
    assert [shown(tok, example) for example in (first, second)] == [f"« 5{EOS}»", f"« 3?{EOS}»"]


def test_a_prompt_that_ends_otherwise_once_an_answer_follows_is_refused() -> None:
    other = LAST.replace("m['content'] + ' [/Q]'", "m['content'] + (' [/Q]' if loop.last else ' [Q]')")
    with pytest.raises(DataError, match="the text of the prompt changes when an answer follows"):
        tokenize(other)(row(user("2 + 3?"), assistant("5")))


def test_a_long_turn_that_is_left_out_is_refused_where_another_says_the_same() -> None:
    first = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    text = "It is sunny in Bonn today, and it will rain tomorrow."
    turns = (user(text), assistant("Is it?"), Message(role="tool", content=text))
    with pytest.raises(DataError, match="leaves out what role 'tool' says"):
        tokenize(first)(row(*turns, assistant("So.")))


def test_a_turn_that_the_template_leaves_out_is_refused() -> None:
    only = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    with pytest.raises(DataError, match=r"leaves out what role 'tool' says \('sunny'\)"):
        tokenize(only)(row(user("W?"), Message(role="tool", content="sunny"), assistant("Sunny."), prompt=2))


@pytest.mark.parametrize("begun", ["Gladly: ", "Gladly", "\n"])
def test_an_answer_begun_at_the_prompts_end_is_gone_on_with(begun: str) -> None:
    tok = tokenize()
    prompt = (user("A city?"), assistant(begun))
    texts = ("Lisbon.", " Seven.")
    group = tok(Group(id="x", prompt=prompt, completions=tuple(Completion(text=text) for text in texts)))
    header = TURN.format("user", "A city?") + "<|im_start|>assistant\n"
    for number, text in enumerate(texts):
        whole = [*group.prompt_tokens, *group.completions[number].tokens]
        assert whole == tok.control.encode(f"{header}{begun}{text}{EOS}\n").ids
    assert tok.tokenizer.decode(tok(Group(id="x", prompt=prompt)).prompt_tokens) == header + begun


def test_an_answer_of_no_weight_at_the_prompts_end_is_over() -> None:
    tok = tokenize()
    group = tok(row(user("2 + 2?"), assistant("5", trained=False), assistant("No, 4."), prompt=2))
    assert prompt_of(tok, group).endswith(f"assistant\n5{EOS}\n<|im_start|>assistant\n")


def test_an_answer_of_no_weight_is_context_in_a_conversation() -> None:
    tok = tokenize()
    turns = (user("2 + 2?"), assistant("4"), user("Sure?"), assistant("5", trained=False), user("Hm?"), assistant("4!"))
    group = tok(row(*turns))
    context = TURN.format("user", "Sure?") + TURN.format("assistant", "5") + TURN.format("user", "Hm?")
    assert shown(tok, group) == f"«4{EOS}»\n{context}<|im_start|>assistant\n«4!{EOS}»\n"


def test_a_cut_answer_gets_no_end_token() -> None:
    tok = tokenize()
    group = tok(row(user("A story?"), assistant("Once upon a", truncated=True)))
    assert shown(tok, group) == "«Once upon a»" and group.completions[0].truncated
    last = tok(row(user("A story?"), assistant("No."), user("Please!"), assistant("Once upon a", truncated=True)))
    assert shown(tok, last).endswith("«Once upon a»") and last.completions[0].truncated
    first = tok(row(user("A story?"), assistant("Once upon a", truncated=True), user("Go on!"), assistant("time.")))
    assert shown(tok, first).startswith(f"«Once upon a»{EOS}\n<|im_start|>user") and not first.completions[0].truncated
    plain = tok(Group(id="x", prompt="Once", completions=(Completion(text=" upon a", truncated=True),)))
    assert shown(tok, plain) == "« upon a»" and plain.completions[0].truncated


def test_a_models_own_text_is_scored_as_it_stands_whatever_the_template_makes_of_it() -> None:
    tokenizer = tokenizer_with(OPENED)
    ends = frozenset({tokenizer.eos_token_id})
    tok = GroupTokenizer(tokenizer, DataConfig(path="none"), ends, checks_answers=False)
    answers = tuple(Completion(text=text) for text in ("Paris.", "Hm</think>Paris.</think>", ""))
    group = tok(Group(id="x", prompt=(user("France?"),), completions=answers))
    assert [shown(tok, group, number) for number in range(3)] == [
        f"«Paris.{EOS}»\n",
        f"«Hm</think>Paris.</think>{EOS}»\n",
        f"«{EOS}»\n",
    ]


DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML


def test_a_template_prints_one_date_per_run(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(DATED)
    day = datetime.date(2024, 2, 29)
    tok = GroupTokenizer(tokenizer, DataConfig(path="none"), frozenset({tokenizer.eos_token_id}), date=day)
    assert "Today is 29 Feb 2024" in prompt_of(tok, tok(row(user("Hi"), assistant("Ho"))))
    assert run_date(RunFolder(tmp_path)) == datetime.date.today()
    (tmp_path / "date").write_text("2024-02-29\n")
    assert run_date(RunFolder(tmp_path)) == day


def test_a_default_date_of_a_template_stays_its_own() -> None:
    template = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}"
    tok = tokenize(template + CHATML)
    assert prompt_of(tok, tok(row(user("Hi"), assistant("Ho")))).startswith("26 Jul 2024")


@pytest.mark.parametrize("side", ["keep_end", "keep_start"])
def test_a_long_prompt_of_messages_is_cut_inside_of_what_the_user_says(side: str) -> None:
    turns = (
        Message(role="system", content="the lazy dog"),
        user("one two three four five six seven"),
        assistant("well then"),
        user("red green blue"),
    )
    group = row(*turns, assistant("Paris!"), prompt=4)
    whole = tokenize()(group)
    for excess in (1, 5):
        limit = len(whole.prompt_tokens) - excess
        tok = tokenize(max_prompt_length=limit, truncate_prompt=side)
        cut = tok(group)
        assert len(cut.prompt_tokens) == limit and cut.completions == whole.completions
        text = prompt_of(tok, cut)
        before, after = TURN.format("system", "the lazy dog"), TURN.format("assistant", "well then")
        assert text.startswith(before + "<|im_start|>user\n") and after + "<|im_start|>user\n" in text
        assert text.endswith(f"{EOS}\n<|im_start|>assistant\n")
        kept = "red green blue" if side == "keep_end" else "one two three four five six seven"
        assert kept in text and text.count(EOS) == 4
    with pytest.raises(DataError, match=r"longer than data.max_prompt_length \(20\), and only \d+ of its tokens are a"):
        tokenize(max_prompt_length=20)(group)


def test_a_long_prompt_of_text_keeps_its_beginning_token() -> None:
    tokenizer = tokenizer_with(CHATML)
    tokenizer.bos_token = "<|endoftext|>"
    tok = GroupTokenizer(tokenizer, DataConfig(path="none", max_prompt_length=4), frozenset({tokenizer.eos_token_id}))
    group = tok(
        Group(id="x", prompt="<|endoftext|>the quick brown fox jumps over", completions=(Completion(text=" a"),))
    )
    plain = tok.control.encode("the quick brown fox jumps over").ids
    assert list(group.prompt_tokens) == [tokenizer.bos_token_id, *plain[-3:]]


def test_answers_that_would_be_one_token_with_their_prompt_are_encoded_apart() -> None:
    tokenizer = tokenizer_with(CHATML)
    assert len(tokenizer("the")["input_ids"]) == 1
    tok = GroupTokenizer(tokenizer, DataConfig(path="none"), frozenset({tokenizer.eos_token_id}))
    group = tok(Group(id="x", prompt="t", completions=(Completion(text="he"), Completion(text="hat"))))
    assert tokenizer.decode(group.prompt_tokens) == "t"
    assert [tokenizer.decode(completion.tokens) for completion in group.completions] == [f"he{EOS}", f"hat{EOS}"]


def test_fields_that_the_template_does_not_read_are_named() -> None:
    tok = tokenize()
    tok(row(Message(role="user", content="Hi", fields={"timestamp": 5}), assistant("Ho", language="en")))
    assert tok.summary() == "fields that the chat template does not read: language, timestamp"


def test_pairs_that_are_equal_within_the_window_are_counted_like_ties(reader: Any, write_rows: Any) -> None:
    rows = [
        {"prompt": "the quick", "chosen": " brown fox jumps over a dog", "rejected": " brown fox jumps over a cat"},
        {"prompt": "the quick", "chosen": " brown", "rejected": " dog"},
    ]
    path = str(write_rows(rows))
    whole = load(reader(path=path, shuffle=False))
    border = len(train_groups(whole)[0].prompt_tokens)
    data = load(reader(path=path, shuffle=False, max_length=border + 3))
    assert lines_of(train_groups(data)) == [2]
    assert "1 that prefer no answer left out" in data.report
    ranked = Group(
        id="x",
        prompt="p",
        completions=tuple(
            Completion(text=str(i), reward=float(i), tokens=tokens) for i, tokens in enumerate(((1,), (1,), (2,)))
        ),
    )
    assert ranked.pairs == [(2, 0), (2, 1)]


def test_the_data_of_a_run_is_the_same_on_another_day(tokenizer: Any, write_rows: Any) -> None:
    dated = tokenizer_with(DATED)
    path = str(write_rows([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]))
    data = DataConfig(path=path)
    day = datetime.date(2024, 2, 29)
    prints = []
    for date in (day, day, datetime.date(2024, 3, 1)):
        tok = GroupTokenizer(dated, data, frozenset({dated.eos_token_id}), date=date)
        prints.append(load(GroupReader(data, SFT(), tok)).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_the_answers_of_one_conversation_are_held_out_together(write_rows: Any) -> None:
    turns = [{"role": "user", "content": "France?"}, {"role": "assistant", "content": "Paris."}]
    more = [{"role": "user", "content": "Italy?"}, {"role": "assistant", "content": "Rome."}]
    system = [{"role": "system", "content": "Brief"}]
    rows = [{"messages": [*system, {"role": "user", "content": str(i)}, turns[1], *more]} for i in range(8)]
    data = DataConfig(path=str(write_rows(rows)), eval_groups=4)
    loaded = load(GroupReader(data, SFT(), tokenize(MOVED)))
    held_out = {group.id for group in loaded.eval}
    assert len(loaded.eval) == 4 and len(held_out) == 2
    assert not held_out & {group.id for group in train_groups(loaded)}


def test_a_row_tells_its_template_what_its_chat_template_kwargs_say(write_rows: Any) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    kinds = [
        {"enable_thinking": False, "tools_as": None},
        '{"enable_thinking": false}',
        {"enable_thinking": True, "x": 1},
    ]
    rows = [{"messages": turns, "chat_template_kwargs": kwargs} for kwargs in kinds]
    data = DataConfig(path=str(write_rows(rows)), shuffle=False, on_bad_row="skip", bad_row_budget=1)
    template = CHATML.replace(
        "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n' + ('<think>\n' if enable_thinking else '')"
    )
    tokenizer = tokenizer_with(template)
    tok = GroupTokenizer(tokenizer, data, frozenset({tokenizer.eos_token_id}))
    loaded = load(GroupReader(data, SFT(), tok))
    assert lines_of(train_groups(loaded)) == [1, 2]
    assert "1 bad ones skipped" in loaded.report and "opens a thought" in loaded.report
    assert "fields that the chat template does not read: chat_template_kwargs.x" in loaded.report
    with pytest.raises(DataError, match="chat_template_kwargs must be a mapping of a chat template's variables"):
        to_group({"messages": turns, "chat_template_kwargs": {"tokenize": True}}, "x", data)


def test_consecutive_turns_of_the_assistant_are_turns_of_their_own() -> None:
    tok = tokenize(CALLING)
    result = Message(role="tool", content="sunny")
    group = tok(
        row(user("W?"), assistant("Let me look."), assistant("", tool_calls=[CALL]), result, assistant("Sunny."))
    )
    header = "<|im_start|>assistant\n"
    assert shown(tok, group) == (
        f'«Let me look.{EOS}»\n{header}«{{weather{{"city": "Bonn"}}}}{EOS}»\n'
        f"{TURN.format('tool', 'sunny')}{header}«Sunny.{EOS}»\n"
    )


def test_an_end_token_that_the_tokenizer_has_not_changes_nothing() -> None:
    tokenizer = tokenizer_with(CHATML)
    plain = row(user("France?"), assistant("Paris."), user("Italy?"), assistant("Rome."))
    ends = frozenset({tokenizer.eos_token_id})
    groups = [
        GroupTokenizer(tokenizer, DataConfig(path="none"), all_ends)(plain) for all_ends in (ends, ends | {99999})
    ]
    assert groups[0] == groups[1]


def test_what_a_template_prints_behind_a_turn_may_be_of_the_conversation() -> None:
    counted = CHATML.replace("'<|im_end|>\n' }}", "'<|im_end|>\n(' + loop.index | string + ')\n' }}")
    tok = tokenize(counted)
    for number in range(20):
        turns = [user("Hi"), assistant(f"Ho {number}.")] * (number + 1)
        groups = tok.examples(row(*turns))
        assert len(groups) in (1, number + 1)
        assert tok.tokenizer.decode(groups[0].completions[0].tokens).startswith(f"Ho {number}.{EOS}")
