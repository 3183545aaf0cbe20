"""Text to token ids: the border between prompt and completion, end tokens, truncation and chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers, pre_tokenizers, processors

from alignment.data.chat import GroupTokenizer
from alignment.data.chat_templates import CHAT_TEMPLATES, chat_template
from alignment.errors import ConfigError, DataError
from alignment.groups import Completion, Group, Message
from alignment.settings.data import DataConfig
from tests.conftest import CHATML, make_tokenizer

BOS, EOS = "<|endoftext|>", "<|im_end|>"
ASK = "What is the capital of France?"


@pytest.fixture(scope="module")
def tiny() -> Any:
    return make_tokenizer()


def special_tokenizer(single: str) -> Any:
    """The tiny tokenizer with a BOS token, and a post-processor that writes special tokens by itself."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = BOS
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def tokenize(tokenizer: Any, group: Group, **settings: Any) -> Group:
    data = DataConfig(path="none", **settings)
    return GroupTokenizer(tokenizer, data, frozenset({tokenizer.eos_token_id}))(group)


def plain(prompt: str, *answers: str) -> Group:
    return Group(id="test", prompt=prompt, completions=tuple(Completion(text=answer) for answer in answers))


def turns(*contents: str, first: str = "user") -> tuple[Message, ...]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return tuple(Message(role=roles[number % 2], content=content) for number, content in enumerate(contents))


ASKED = turns(ASK)


def chat(*answers: str, prompt: tuple[Message, ...] = ASKED) -> Group:
    return Group(id="test", prompt=prompt, completions=tuple(Completion(text=answer) for answer in answers))


def conversation(*contents: str) -> Group:
    prompt, answer, *following = turns(*contents)
    completion = Completion(text=answer.content, following=tuple(following))
    return Group(id="test", prompt=(prompt,), completions=(completion,))


def whole(group: Group, number: int = 0) -> list[int]:
    return [*group.prompt_tokens, *group.completions[number].tokens]


def learned_text(tokenizer: Any, group: Group, number: int = 0) -> str:
    completion = group.completions[number]
    return str(tokenizer.decode([i for i, yes in zip(completion.tokens, completion.loss_mask, strict=True) if yes]))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_prompt_and_completion_together_are_the_tokens_of_the_whole_text(tiny: Any) -> None:
    group = tokenize(tiny, plain("the quick", " brown fox", " lazy dog!"))
    assert list(group.prompt_tokens) == ids_of(tiny, "the quick")
    for number, text in enumerate(("the quick brown fox", "the quick lazy dog!")):
        assert whole(group, number) == [*ids_of(tiny, text), tiny.eos_token_id]
        assert all(group.completions[number].loss_mask)


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("what is the ", ["capital", "12", "capital of France", "Zebra"]),
        ("what is the cap", ["ital of France"]),
        ("t", ["he"]),
        ("t", ["he quick", "hat"]),
        ("Z\n", ["\n\nfox", "dog"]),
    ],
)
def test_a_prompt_has_the_tokens_that_it_has_alone_and_all_of_the_answer_is_learned(
    tiny: Any, prompt: str, answers: list[str]
) -> None:
    group = tokenize(tiny, plain(prompt, *answers))
    assert list(group.prompt_tokens) == ids_of(tiny, prompt)
    assert [learned_text(tiny, group, number) for number in range(len(answers))] == [f"{a}{EOS}" for a in answers]


def test_an_answer_that_would_merge_with_its_prompt_is_learned_as_it_is_generated(tiny: Any) -> None:
    whole_ids, prompt_ids = ids_of(tiny, "what is the capital"), ids_of(tiny, "what is the ")
    assert whole_ids[: len(prompt_ids)] != prompt_ids, "this prompt was chosen because its end merges"
    assert whole(tokenize(tiny, plain("what is the ", "capital"))) == [
        *prompt_ids,
        *ids_of(tiny, "capital"),
        tiny.eos_token_id,
    ]


def line_break_tokenizer() -> Any:
    """A tokenizer that reads two line breaks as one token, as those of Qwen and SmolLM2 do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["a\n\n\nb", "assistant", "user"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    fast.chat_template = CHATML
    assert len(ids_of(fast, "\n\n")) == 1
    return fast


@pytest.mark.parametrize("answers", [["\n\nGood", "bad"], ["\n\nGood"], ["bad", "\nGood"]])
def test_an_answer_that_begins_with_line_breaks_follows_the_prompt_of_generation(answers: list[str]) -> None:
    tokenizer = line_break_tokenizer()
    group = tokenize(tokenizer, chat(*answers))
    assert tokenizer.decode(group.prompt_tokens).endswith("<|im_start|>assistant\n")
    assert list(group.prompt_tokens) == list(tokenize(tokenizer, chat()).prompt_tokens)
    assert [learned_text(tokenizer, group, n) for n in range(len(answers))] == [f"{a}{EOS}" for a in answers]


def test_every_answer_of_a_conversation_follows_the_prompt_of_generation() -> None:
    tokenizer = line_break_tokenizer()
    contents = [ASK, "\n\nParis", "sure?", "\n\nYes", "\n\nand?", "\n\nfox"]
    group = tokenize(tokenizer, conversation(*contents))
    assert tokenizer.decode(whole(group)) == "".join(
        f"<|im_start|>{role}\n{content}{EOS}\n"
        for role, content in zip(["user", "assistant"] * 3, contents, strict=True)
    )
    assert learned_text(tokenizer, group) == f"\n\nParis{EOS}\n\nYes{EOS}\n\nfox{EOS}"
    header = ids_of(tokenizer, "<|im_start|>assistant\n")
    tokens, loss_mask = whole(group), [False] * len(group.prompt_tokens) + list(group.completions[0].loss_mask)
    starts = [n for n in range(1, len(tokens)) if loss_mask[n] and not loss_mask[n - 1]]
    assert len(starts) == 3 and all(tokens[start - len(header) : start] == header for start in starts)


def test_an_answer_that_has_no_tokens_of_its_own_after_its_prompt_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("t h", "th")
    with pytest.raises(DataError, match=r"reads the end of the prompt and the beginning of the answer 'he dog' as one"):
        tokenize(tokenizer, plain("quick t ", "he dog"))


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_tokenizer_that_writes_a_space_before_every_text_writes_none_before_an_answer(scheme: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=scheme == "always")
    group = tokenize(tokenizer, plain("what is the ", "capital"))
    assert list(group.prompt_tokens) == ids_of(tokenizer, "what is the ")
    assert learned_text(tokenizer, group) == f"capital{EOS}"


def test_messages_share_the_prompt_that_generation_would_start_from(tiny: Any) -> None:
    group = tokenize(tiny, chat("Paris!", "the lazy dog"))
    assert tiny.decode(group.prompt_tokens) == f"<|im_start|>user\n{ASK}{EOS}\n<|im_start|>assistant\n"
    assert [tiny.decode(c.tokens) for c in group.completions] == [f"Paris!{EOS}\n", f"the lazy dog{EOS}\n"]
    assert [learned_text(tiny, group, number) for number in (0, 1)] == [f"Paris!{EOS}", f"the lazy dog{EOS}"]
    assert not any(c.truncated for c in group.completions)


def test_a_prompt_alone_gets_no_end_token(tiny: Any) -> None:
    assert list(tokenize(tiny, plain("the quick")).prompt_tokens) == ids_of(tiny, "the quick")
    assert tiny.decode(tokenize(tiny, chat()).prompt_tokens).endswith("<|im_start|>assistant\n")


def test_a_template_that_changes_the_prompt_when_an_answer_follows_is_refused(tiny: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if add_generation_prompt %}{{ messages[0]['content'] }}{% else %}{{ messages[1]['content'] }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"the text of the prompt changes when an answer follows \(\d+ of its last"):
        tokenize(tokenizer, chat("42 = 30 + 12"))


@pytest.mark.parametrize("template", ["chatml", "zephyr", "{% for m in messages %}{{ m['content'] }} {% endfor %}"])
def test_every_answer_ends_with_exactly_one_end_token(template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template(template)
    group = tokenize(tokenizer, chat("Paris!", "12 dogs"))
    for completion in group.completions:
        assert completion.tokens.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(completion.tokens).rstrip().endswith(EOS)


def test_an_end_token_followed_by_several_tokens_of_white_space_is_not_doubled() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n\n \n")
    group = tokenize(tokenizer, chat("Paris!"))
    assert group.completions[0].tokens.count(tokenizer.eos_token_id) == 1


def test_an_end_token_inside_of_an_answer_does_not_end_it(tiny: Any) -> None:
    group = tokenize(tiny, plain("the", f" fox{EOS}!"))
    assert tiny.decode(group.completions[0].tokens) == f" fox{EOS}!{EOS}"


def test_an_answer_that_has_its_end_token_gets_no_second(tiny: Any) -> None:
    group = tokenize(tiny, plain("the", f" fox{EOS}"))
    assert tiny.decode(group.completions[0].tokens) == f" fox{EOS}"


@pytest.mark.parametrize("answer", [" fox", f" fox{EOS}"])
def test_an_end_token_written_by_the_tokenizer_itself_is_not_doubled(answer: str) -> None:
    tokenizer = special_tokenizer(f"{BOS} $A {EOS}")
    group = tokenize(tokenizer, plain("the quick", answer))
    assert tokenizer.decode(group.prompt_tokens) == f"{BOS}the quick"
    assert tokenizer.decode(group.completions[0].tokens) == f" fox{EOS}"


def test_the_beginning_token_is_written_once_for_plain_text() -> None:
    tokenizer = special_tokenizer(f"{BOS} $A")
    for prompt in ("the quick", f"{BOS}the quick"):
        group = tokenize(tokenizer, plain(prompt, " fox", " dog"))
        assert tokenizer.decode(group.prompt_tokens) == f"{BOS}the quick"


@pytest.mark.parametrize("start", ["{{ bos_token }}", ""])
def test_the_beginning_token_of_messages_is_the_templates_affair(start: str) -> None:
    tokenizer = special_tokenizer(f"{BOS} $A")
    tokenizer.chat_template = start + CHATML
    group = tokenize(tokenizer, chat("Paris!"))
    assert whole(group).count(tokenizer.bos_token_id) == (1 if start else 0)
    assert (whole(group)[0] == tokenizer.bos_token_id) == bool(start)


def test_a_cut_answer_has_no_end_token_and_is_marked(tiny: Any) -> None:
    full = tokenize(tiny, plain("the quick", " brown fox jumps", " dog"))
    window = len(full.prompt_tokens) + 3
    long, short = tokenize(tiny, plain("the quick", " brown fox jumps", " dog"), max_length=window).completions
    assert long.tokens == full.completions[0].tokens[:3]
    assert long.truncated and tiny.eos_token_id not in long.tokens
    assert len(long.loss_mask) == 3
    assert short == full.completions[1]
    assert not short.truncated


def test_an_answer_that_just_fits_is_not_marked_as_cut(tiny: Any) -> None:
    for group in (plain("the quick", " brown fox"), chat("brown fox")):
        full = tokenize(tiny, group)
        ends = full.completions[0].tokens.index(tiny.eos_token_id) + 1
        for room, truncated in ((ends, False), (ends - 1, True)):
            cut = tokenize(tiny, group, max_length=len(full.prompt_tokens) + room).completions[0]
            assert cut.truncated == truncated
            assert (tiny.eos_token_id in cut.tokens) != truncated
            assert len(cut.tokens) == len(cut.loss_mask) == room


@pytest.mark.parametrize("side", ["keep_end", "keep_start"])
def test_a_long_prompt_is_cut_as_configured(tiny: Any, side: str) -> None:
    prompt = "the quick brown fox jumps over the lazy dog"
    ids = ids_of(tiny, prompt)
    group = tokenize(tiny, plain(prompt, " and", " while"), max_prompt_length=4, truncate_prompt=side)
    assert list(group.prompt_tokens) == (ids[-4:] if side == "keep_end" else ids[:4])
    assert [tiny.decode(c.tokens) for c in group.completions] == [f" and{EOS}", f" while{EOS}"]


def test_a_prompt_of_just_the_longest_length_is_not_cut(tiny: Any) -> None:
    ids = ids_of(tiny, "the quick brown fox")
    group = tokenize(tiny, plain("the quick brown fox", " jumps"), max_prompt_length=len(ids))
    assert list(group.prompt_tokens) == ids


def test_a_prompt_that_fills_the_window_is_refused_with_figures(tiny: Any) -> None:
    length = len(ids_of(tiny, "the quick brown fox"))
    with pytest.raises(DataError) as caught:
        tokenize(tiny, plain("the quick brown fox", " jumps"), max_length=length)
    assert str(caught.value) == f"the prompt ({length} tokens) fills the window (data.max_length {length})"
    assert len(whole(tokenize(tiny, plain("the quick brown fox", " jumps"), max_length=length + 1))) == length + 1


def test_of_a_conversation_only_the_assistants_turns_are_learned(tiny: Any) -> None:
    group = tokenize(tiny, conversation(ASK, "Paris!", "and 12 + 30?", "42, what else", "the dog?", "lazy"))
    assert learned_text(tiny, group) == f"Paris!{EOS}42, what else{EOS}lazy{EOS}"
    assert whole(group) == ids_of(
        tiny,
        "".join(
            f"<|im_start|>{role}\n{content}{EOS}\n"
            for role, content in (
                ("user", ASK),
                ("assistant", "Paris!"),
                ("user", "and 12 + 30?"),
                ("assistant", "42, what else"),
                ("user", "the dog?"),
                ("assistant", "lazy"),
            )
        ),
    )


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("answer", [" the fox", "\n\nthe fox", "é fox", "fox \n", "\U0001f98a"])
def test_white_space_and_bytes_at_the_border_of_a_turn_are_attributed_exactly(trim_offsets: bool, answer: str) -> None:
    """Some tokenizers leave white space out of a token's span, and split one character into several tokens."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    group = tokenize(tokenizer, conversation(ASK, "Paris!", "sure?", answer, "and?", "dog"))
    assert learned_text(tokenizer, group) == f"Paris!{EOS}{answer}{EOS}dog{EOS}"


def test_an_answer_that_would_merge_with_the_header_of_its_turn_is_encoded_apart_in_every_turn() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    group = tokenize(tokenizer, conversation(ASK, "Paris", "sure?", "the fox", "and?", "12 dogs"))
    assert learned_text(tokenizer, group) == f"Paris{EOS}the fox{EOS}12 dogs{EOS}"


def test_a_long_conversation_is_cut_where_the_window_ends(tiny: Any) -> None:
    full = tokenize(tiny, conversation(ASK, "Paris!", "sure?", "42"))
    window = len(full.prompt_tokens) + 4
    cut = tokenize(tiny, conversation(ASK, "Paris!", "sure?", "42"), max_length=window).completions[0]
    assert cut.truncated and cut.tokens == full.completions[0].tokens[:4]


def test_train_on_prompt_learns_everything_but_the_first_token(tiny: Any) -> None:
    group = tokenize(tiny, plain("the quick", " brown fox"), train_on_prompt=True)
    assert whole(group) == [*ids_of(tiny, "the quick brown fox"), tiny.eos_token_id]
    assert len(group.prompt_tokens) == 1
    assert all(group.completions[0].loss_mask)


def test_train_on_prompt_learns_all_turns_of_a_conversation(tiny: Any) -> None:
    group = tokenize(tiny, conversation(ASK, "Paris!", "sure?", "42"), train_on_prompt=True)
    assert all(group.completions[0].loss_mask) and len(group.prompt_tokens) == 1
    assert f"sure?{EOS}" in learned_text(tiny, group)


def test_train_on_prompt_refuses_messages_of_no_weight(tiny: Any) -> None:
    prompt = (*turns(ASK), Message(role="assistant", content="Paris!", trained=False), *turns("sure?"))
    with pytest.raises(DataError, match=r"a message has a weight of 0, and data\.train_on_prompt learns every token"):
        tokenize(tiny, chat("42", prompt=prompt), train_on_prompt=True)
    assert learned_text(tiny, tokenize(tiny, chat("42", prompt=prompt))) == f"42{EOS}"


def test_train_on_prompt_refuses_a_pair(tiny: Any) -> None:
    with pytest.raises(DataError, match="needs exactly one completion"):
        tokenize(tiny, plain("the quick", " fox", " dog"), train_on_prompt=True)


@pytest.mark.parametrize("text", ["the quick brown fox", "a", "Z"])
@pytest.mark.parametrize("train_on_prompt", [True, False])
def test_plain_text_without_a_prompt_is_learned_from_its_second_token_on(
    tiny: Any, text: str, train_on_prompt: bool
) -> None:
    group = tokenize(tiny, plain("", text), train_on_prompt=train_on_prompt)
    assert whole(group) == [*ids_of(tiny, text), tiny.eos_token_id]
    assert len(group.prompt_tokens) == 1
    assert group.completions[0].loss_mask == (True,) * len(group.completions[0].tokens)


def test_plain_text_without_a_prompt_is_learned_behind_the_beginning_token() -> None:
    tokenizer = special_tokenizer(f"{BOS} $A")
    group = tokenize(tokenizer, plain("", "the quick"))
    assert list(group.prompt_tokens) == [tokenizer.bos_token_id]
    assert tokenizer.decode(group.completions[0].tokens) == f"the quick{EOS}"


def test_a_pair_without_a_prompt_is_refused_where_nothing_could_predict_it(tiny: Any) -> None:
    with pytest.raises(DataError, match="an empty prompt, or train_on_prompt, needs exactly one completion"):
        tokenize(tiny, plain("", "the fox", "the dog"))
    tokenizer = special_tokenizer(f"{BOS} $A")
    assert list(tokenize(tokenizer, plain("", "the fox", "a dog")).prompt_tokens) == [tokenizer.bos_token_id]


def test_messages_without_a_chat_template_say_what_to_set() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template; set model\.chat_template, e\.g\. to chatml"):
        tokenize(tokenizer, chat("Paris!"))


def test_messages_that_the_template_refuses_are_a_bad_row(tiny: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="the chat template refuses these messages: roles must alternate"):
        tokenize(tokenizer, chat("Paris!"))


def test_a_slow_tokenizer_is_refused() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(DataError, match="ByT5Tokenizer is not a fast tokenizer"):
        GroupTokenizer(ByT5Tokenizer(), DataConfig(path="none"), frozenset())


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "Ho<|im_end|>\n",
        ),
        ("zephyr", f"<|system|>\nBe brief.{EOS}\n<|user|>\nHi{EOS}\n<|assistant|>\n", f"Ho{EOS}\n"),
    ],
)
def test_the_named_templates_render_as_their_models_expect(name: str, prompt: str, answer: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template(name)
    tokenized = GroupTokenizer(tokenizer, DataConfig(path="none"), frozenset())
    asked = (Message(role="system", content="Be brief."), Message(role="user", content="Hi"))
    assert tokenized.render(asked, answer_next=True) == prompt
    assert tokenized.render((*asked, Message(role="assistant", content="Ho")), answer_next=False) == prompt + answer


def test_a_template_is_found_by_name_or_file_or_given_as_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert chat_template(None) is None
    assert chat_template("chatml") == CHAT_TEMPLATES["chatml"]
    assert chat_template(str(file)) == chat_template("{{ messages }}") == "{{ messages }}"
    with pytest.raises(ConfigError, match=r"model\.chat_template 'chatlm' is neither a known name \(chatml, zephyr\)"):
        chat_template("chatlm")
