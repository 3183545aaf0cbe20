"""A reward model gives what transformers computes for each conversation alone, whatever is packed with it."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from alignment.errors import CheckpointError, ModelError, RewardError
from alignment.groups import Completion, Group, Message
from alignment.rewards import Rewards
from alignment.rewards.model import fit_to_window
from alignment.settings.plugins import scorer_class

TEMPLATE = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' </s>' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"  # noqa: E501
WORDS = "[user] [assistant] [system] what is the capital of france paris lyon it and or so very".split()  # noqa: SIM905


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Another kind of tokenizer than the actor's in the other tests: whole words."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random reward model with 64 positions."""
    return make_reward_model(tmp_path_factory.mktemp("reward_model"))


def make_reward_model(folder: Path) -> Path:
    """Writes a random reward model and its tokenizer into a folder."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.5,
        num_labels=1,
        pad_token_id=0,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rewards_of(path: Path | str, **settings: Any) -> Rewards:
    settings = {"name": "model", "path": str(path), "dtype": "fp32", **settings}
    return Rewards((scorer_class("model").model_validate(settings),), torch.device("cpu"))


def given(groups: list[Group]) -> list[list[float | None]]:
    return [[completion.reward for completion in group.completions] for group in groups]


def group(question: str, *answers: str, name: str = "rows:7") -> Group:
    return Group(
        id=name,
        prompt=(Message(role="user", content=question),),
        completions=tuple(Completion(text=answer, tokens=(9, 9), loss_mask=(True, True)) for answer in answers),
        prompt_tokens=(1, 2, 3),
    )


def reference(folder: Path, text: str) -> float:
    """What transformers gives a whole text, read at its last token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])


GROUPS = [
    group("what is the capital of france", "it is paris", "lyon and lyon or so"),
    group("is it", "very very", "so", "paris paris paris paris", name="rows:8"),
]


def test_the_rewards_are_those_of_transformers_for_each_conversation_alone(
    reward_model: Path, one_thread: None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    found = given(rewards_of(reward_model).score(GROUPS))
    for each, rewards in zip(GROUPS, found, strict=True):
        for completion, reward in zip(each.completions, rewards, strict=True):
            turns = [{"role": "user", "content": each.prompt[0].content}]  # type: ignore[union-attr]
            turns.append({"role": "assistant", "content": completion.text})
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            assert reward == pytest.approx(reference(reward_model, text), abs=1e-4)
    assert len({reward for rewards in found for reward in rewards}) == 5


def test_plain_text_is_rated_as_it_stands(reward_model: Path) -> None:
    plain = Group(id="1", prompt="what is", completions=(Completion(text=" the capital"),))
    ((reward,),) = given(rewards_of(reward_model).score([plain]))
    assert reward == pytest.approx(reference(reward_model, "what is the capital </s>"), abs=1e-4)


def test_neither_company_nor_micro_batches_change_a_reward(reward_model: Path, one_thread: None) -> None:
    together = given(rewards_of(reward_model).score(GROUPS))
    for tokens in (1, 20, 40):
        apart = given(rewards_of(reward_model, micro_batch_tokens=tokens).score(GROUPS[::-1]))[::-1]
        for one, other in zip(together, apart, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


def test_the_actors_tokens_are_left_as_they_are(reward_model: Path) -> None:
    (rated, *_) = rewards_of(reward_model).score(GROUPS)
    assert rated.prompt_tokens == (1, 2, 3)
    assert all(completion.tokens == (9, 9) for completion in rated.completions)
    assert all(completion.scores == {"model": completion.reward} for completion in rated.completions)


def test_a_long_prompt_loses_its_beginning_and_no_answer_its_end(
    reward_model: Path, caplog: pytest.LogCaptureFixture, one_thread: None
) -> None:
    long = group("is " * 60 + "paris", "so", "so " * 20)
    rewards = rewards_of(reward_model)
    with caplog.at_level(logging.WARNING):
        (found,) = given(rewards.score([long]))
    tokens = AutoTokenizer.from_pretrained(reward_model)
    for answer, reward in zip(("so", "so " * 20), found, strict=True):
        prompt = tokens.tokenize(tokens.apply_chat_template(
            [{"role": "user", "content": "is " * 60 + "paris"}], tokenize=False, add_generation_prompt=True
        ))  # fmt: skip
        tail = tokens.tokenize(answer + " </s>")
        assert reward == pytest.approx(reference(reward_model, " ".join((prompt + tail)[-64:])), abs=1e-4)
    assert rewards._entries[0].scorer.num_cut == 2  # type: ignore[attr-defined]
    assert [record.message for record in caplog.records] == [
        f"reward model {reward_model}: some conversations are longer than its 64 tokens; it does not see how they begin"
    ]


def test_an_answer_that_alone_is_too_long_gets_what_is_configured(
    reward_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = group("is it", "so", "so " * 20, "it is")
    (alone,) = given(rewards_of(reward_model, max_length=16).score([group("is it", "so", "it is")]))
    for settings, expected in (({}, -3), ({"on_unreadable": -0.5}, -0.5)):
        caplog.clear()
        (found,) = given(rewards_of(reward_model, max_length=16, **settings).score([long]))
        assert found == [pytest.approx(alone[0], abs=1e-4), expected, pytest.approx(alone[1], abs=1e-4)]
        (told,) = (record.message for record in caplog.records if record.levelname == "WARNING")
        assert "completion 2 of 3: its 60 characters do not fit into the 16 tokens" in told
    with pytest.raises(RewardError, match=r"scorer model: group rows:7, completion 2 of 3: its 60 characters do not"):
        rewards_of(reward_model, max_length=16, on_unreadable="fail").score([long])


def test_an_answer_that_the_template_refuses_is_no_end_of_the_run(reward_model: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if 'lyon' in m['content'] %}{{ raise_exception('no lyon') }}{% endif %}"
    template += TEMPLATE.removeprefix("{% for m in messages %}")
    rewards = rewards_of(reward_model, chat_template=template)
    (found,) = given(rewards.score([group("is it", "so", "lyon", "very very")]))
    (plain,) = given(rewards_of(reward_model).score([group("is it", "so", "lyon", "very very")]))
    assert found == [pytest.approx(plain[0], abs=1e-4), -3, pytest.approx(plain[2], abs=1e-4)]
    with pytest.raises(RewardError, match="group rows:7: the chat template refuses"):
        rewards.score([group("is lyon", "so")])


def test_a_cut_answer_is_rated_without_an_end_as_reward_training_has_it(reward_model: Path, one_thread: None) -> None:
    whole = group("what is the capital of france", "it is paris", "lyon and lyon or so")
    cut = dataclasses.replace(
        whole, completions=tuple(dataclasses.replace(c, truncated=True) for c in whole.completions)
    )
    (ended, stopped) = (given(rewards_of(reward_model).score([each]))[0] for each in (whole, cut))
    for text, reward in zip(("it is paris", "lyon and lyon or so"), stopped, strict=True):
        rendered = f"[user] what is the capital of france </s>[assistant] {text}".replace("</s>[", "</s> [")
        assert reward == pytest.approx(reference(reward_model, rendered), abs=1e-4)
    assert all(abs(one - other) > 1e-3 for one, other in zip(ended, stopped, strict=True))  # type: ignore[operator]


def test_every_completion_keeps_as_much_of_the_prompt_as_fits() -> None:
    answers = tuple(Completion(text="a", tokens=(9,) * n, loss_mask=(True,) * n) for n in (2, 5, 2, 8))
    whole = Group(id="1", prompt="p", prompt_tokens=(0, 1, 2, 3, 4, 5), completions=answers)
    parts = fit_to_window(whole, 3, max_length=9, bos=None)
    assert [(part.group.prompt_tokens, part.numbers, part.index) for part in parts] == [
        ((0, 1, 2, 3, 4, 5), [0, 2], 3),
        ((2, 3, 4, 5), [1], 3),
        ((5,), [3], 3),
    ]
    assert [part.group.prompt_tokens for part in fit_to_window(whole, 0, max_length=9, bos=0)][1:] == [
        (0, 3, 4, 5),
        (5,),
    ]


def test_rewards_are_normalised_by_what_the_model_keeps(reward_model: Path, tmp_path: Path) -> None:
    shutil.copytree(reward_model, tmp_path / "kept")
    file = tmp_path / "kept" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "raylign_reward_mean": 2.0, "raylign_reward_std": 0.5}))
    plain = given(rewards_of(reward_model).score(GROUPS))
    for settings, expected in (({}, [(r - 2) / 0.5 for r in plain[0]]), ({"normalise": False}, plain[0])):
        assert given(rewards_of(tmp_path / "kept", **settings).score(GROUPS))[0] == pytest.approx(expected, abs=1e-4)
    file.write_text(json.dumps({**json.loads(file.read_text()), "raylign_reward_std": 0.0}))
    with pytest.raises(ModelError, match="raylign_reward_std is 0"):
        rewards_of(tmp_path / "kept")


def test_bf16_gives_nearly_the_same(reward_model: Path) -> None:
    exact, rounded = (given(rewards_of(reward_model, dtype=dtype).score(GROUPS)) for dtype in ("fp32", "bf16"))
    for one, other in zip(exact, rounded, strict=True):
        assert one == pytest.approx(other, abs=0.3)


def test_loading_does_not_touch_the_runs_random_numbers(reward_model: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    rewards_of(reward_model)
    assert torch.equal(before, torch.get_rng_state())


def test_the_model_needs_no_gradient(reward_model: Path) -> None:
    scorer: Any = rewards_of(reward_model)._entries[0].scorer
    assert not any(weight.requires_grad for weight in scorer.model.module.parameters())
    assert not scorer.model.module.training


def test_a_language_model_is_refused_because_its_rewards_would_be_random(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM without a trained score head"):
        rewards_of(tiny_model)


def test_a_folder_without_a_model_or_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        rewards_of(tmp_path / "nothing")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="nor the folder of a run with an intact one"):
        rewards_of(tmp_path)


def test_messages_without_a_template_are_an_error_that_names_the_group(reward_model: Path, tmp_path: Path) -> None:
    shutil.copytree(reward_model, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(RewardError, match="scorer model: group rows:7: the rows are messages, but the tok"):
        rewards_of(tmp_path / "bare").score(GROUPS)
    assert given(rewards_of(tmp_path / "bare", chat_template=TEMPLATE).score(GROUPS)) == [
        pytest.approx(each, abs=1e-4) for each in given(rewards_of(reward_model).score(GROUPS))
    ]


def test_a_model_that_gives_nan_is_an_error_that_names_the_completion(reward_model: Path) -> None:
    rewards = rewards_of(reward_model)
    scorer: Any = rewards._entries[0].scorer
    scorer.model.module.score.weight.data.fill_(float("nan"))
    with pytest.raises(RewardError, match="scorer model: group rows:7, completion 1 of 2: the reward is nan"):
        rewards.score(GROUPS)


def test_groups_keep_their_order_when_some_have_no_completions(reward_model: Path) -> None:
    empty = dataclasses.replace(GROUPS[0], id="empty", completions=())
    found = given(rewards_of(reward_model).score([GROUPS[0], empty, GROUPS[1]]))
    alone = given(rewards_of(reward_model).score(GROUPS))
    assert [len(each) for each in found] == [2, 0, 3]
    assert found[2] == pytest.approx(alone[1], abs=1e-4)
