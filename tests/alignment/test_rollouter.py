"""Rollouters: one answer to a prompt, or a conversation with an environment, whose words are not trained on."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.errors import ConfigError, ConversationError
from alignment.groups import Group, Message
from alignment.models.load import load_tokenizer
from alignment.rollout import Policy, Prompt, Rollout, Sampling
from alignment.rollout.local import LocalGenerator
from alignment.rollout.rollouter import MultiTurn, Observation, SingleTurn, gather_all
from alignment.run_folder import RunFolder
from alignment.settings.load import check_config
from alignment.settings.model import ModelConfig
from alignment.settings.run import RunConfig
from tests.alignment.test_ppo_run import letters, named, rows_of
from tests.alignment.test_train import assert_same_run, run
from tests.conftest import TEXT

Settings = dict[str, Any]

SAMPLING = Sampling(num_completions=2, max_tokens=60, max_length=200, temperature=1.0)
QUESTION = (Message(role="user", content="the cat"),)

pytestmark = pytest.mark.usefixtures("one_thread")


class SecondQuestion:
    """Asks a second question in the middle, and gives a reward for each answer."""

    def __init__(self, group: Group, first_reward: float = 1.0) -> None:
        self.group = group
        self.first_reward = first_reward
        self.answers: list[str] = []

    async def step(self, answer: str) -> Observation:
        self.answers.append(answer)
        if len(self.answers) == 2:
            return Observation(reward=0.25, is_done=True)
        return Observation(messages=(Message(role="user", content="and the dog?"),), reward=self.first_reward)


class Endless:
    """Never ends the conversation."""

    def __init__(self, group: Group) -> None: ...

    async def step(self, answer: str) -> Observation:
        return Observation(messages=(Message(role="user", content="go on"),), reward=0.5)


class Cannot:
    """Looks at a column that is not kept."""

    def __init__(self, group: Group) -> None:
        self.number = group.columns["number"]

    async def step(self, answer: str) -> Observation:
        return Observation(is_done=True)


class WithoutArguments:
    async def step(self, answer: str) -> Observation:
        return Observation(is_done=True)


class WithoutStep:
    def __init__(self, group: Group) -> None: ...


class Synchronous:
    def __init__(self, group: Group) -> None: ...

    def step(self, answer: str) -> Observation:
        return Observation(is_done=True)


class Returns:
    """Gives back what it is told to."""

    def __init__(self, group: Group, what: Callable[[], Any]) -> None:
        self.what = what

    async def step(self, answer: str) -> Any:
        return self.what()


def three(group: Group) -> int:
    return 3


def unknown_role() -> Observation:
    return Observation(messages=(Message(role="robot", content="Sure?"),))


def divides() -> float:
    return 1 / 0


class ScriptedPolicy:
    """Answers from a list, the same to every completion, and keeps what it was asked."""

    def __init__(self, answers: list[tuple[int, ...]]) -> None:
        self.answers = answers
        self.prompts: list[Prompt] = []
        self.sampling: list[Sampling] = []

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        self.prompts.append(prompt)
        self.sampling.append(sampling)
        turn = sum(1 for other in self.prompts if len(other.tokens) < len(prompt.tokens)) and 1
        tokens = self.answers[turn][: sampling.max_tokens]
        rollout = Rollout(
            tokens=tokens,
            logprobs=(-1.0,) * len(tokens),
            truncated=len(tokens) < len(self.answers[turn]),
            weight_version=7 - turn,
        )
        return [rollout] * sampling.num_completions


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(ModelConfig(path=str(tiny_model)))


@pytest.fixture
def group(tokenizer: Any) -> Group:
    text = tokenizer.apply_chat_template(
        [turn.template_fields() for turn in QUESTION], tokenize=False, add_generation_prompt=True
    )
    return Group(id="row", prompt=QUESTION, prompt_tokens=tuple(tokenizer.encode(text, add_special_tokens=False)))


@pytest.fixture
def answers(tokenizer: Any) -> list[tuple[int, ...]]:
    """Two answers, each with the end token."""
    return [(*tokenizer.encode(text), tokenizer.eos_token_id) for text in ("sat on the mat", "ran away")]


def sampling_of(tokenizer: Any, **changes: Any) -> Sampling:
    return dataclasses.replace(SAMPLING, end_tokens=frozenset({tokenizer.eos_token_id}), **changes)


def test_a_single_turn_is_what_the_policy_generates(group: Group, answers: list[tuple[int, ...]]) -> None:
    policy = ScriptedPolicy(answers)
    rollouts = asyncio.run(SingleTurn().complete(group, policy, SAMPLING, 5))
    assert policy.prompts == [Prompt(tokens=group.prompt_tokens, seed=5)]
    assert [rollout.tokens for rollout in rollouts] == [answers[0]] * 2


def test_a_conversation_reads_as_the_chat_template_prints_it_and_only_answers_are_trained_on(
    group: Group, answers: list[tuple[int, ...]], tokenizer: Any
) -> None:
    policy = ScriptedPolicy(answers)
    rollouter = MultiTurn(SecondQuestion, tokenizer, max_turns=3)
    first, second = asyncio.run(rollouter.complete(group, policy, sampling_of(tokenizer), 5))
    assert first == second, "the policy says the same to both"
    assert len({prompt.seed for prompt in policy.prompts}) == 4, "every answer has a seed of its own"

    turns = [
        *QUESTION,
        Message(role="assistant", content="sat on the mat"),
        Message(role="user", content="and the dog?"),
    ]
    turns.append(Message(role="assistant", content="ran away"))
    printed = tokenizer.apply_chat_template([turn.template_fields() for turn in turns], tokenize=False)
    assert tokenizer.decode(group.prompt_tokens + first.tokens) == printed.removesuffix("\n")
    trained = [token for token, is_trained in zip(first.tokens, first.loss_mask, strict=True) if is_trained]
    assert trained == [*answers[0], *answers[1]]
    assert all(
        (logprob == -1) == is_trained for logprob, is_trained in zip(first.logprobs, first.loss_mask, strict=True)
    )
    assert first.reward == 1.25 and first.weight_version == 6 and not first.truncated


def test_a_conversation_ends_where_its_room_does(group: Group, answers: list[tuple[int, ...]], tokenizer: Any) -> None:
    length = len(answers[0])
    for room, tokens, is_truncated in (
        (length - 1, answers[0][:-1], True),  # in the first answer
        (length + 5, answers[0], True),  # in the second question
    ):
        policy = ScriptedPolicy(answers)
        rollouter = MultiTurn(SecondQuestion, tokenizer, max_turns=3)
        rollout, _ = asyncio.run(rollouter.complete(group, policy, sampling_of(tokenizer, max_tokens=room), 5))
        assert (rollout.tokens, rollout.truncated) == (tokens, is_truncated)


def test_a_conversation_has_no_more_turns_than_it_may(
    group: Group, answers: list[tuple[int, ...]], tokenizer: Any
) -> None:
    policy = ScriptedPolicy(answers)
    rollouter = MultiTurn(Endless, tokenizer, max_turns=2)
    rollout, _ = asyncio.run(rollouter.complete(group, policy, sampling_of(tokenizer), 5))
    assert len(policy.prompts) == 4 and rollout.reward == 1.0 and rollout.loss_mask[-1]


WRONG_ENVIRONMENTS: dict[str, tuple[Callable[..., Any], str]] = {
    "no arguments": (WithoutArguments, "making it raised TypeError: WithoutArguments() takes no arguments"),
    "no step": (
        WithoutStep,
        "it made a value of type WithoutStep, which has no method step; it needs `async def step(",
    ),
    "an int": (three, "it made a value of type int, which has no method step"),
    "not async": (Synchronous, "step is not async; it returned a value of type Observation. Write `async def step("),
    "a column": (Cannot, "making it raised KeyError: 'number' ("),
    "an error": (partial(Returns, what=divides), "step raised ZeroDivisionError: division by zero ("),
    "a dict": (partial(Returns, what=dict), "step returned a dict, must be an Observation"),
    "None": (partial(Returns, what=lambda: None), "step returned a NoneType, must be an Observation"),
    "text": (partial(Returns, what=str), "step returned a str, must be an Observation"),
    "no message": (
        partial(Returns, what=Observation),
        "step returned an Observation that is not done and has no messages",
    ),
    "a reward of text": (
        partial(Returns, what=lambda: Observation(reward="good")),  # type: ignore[arg-type]
        "step: Observation(reward='good'): must be a finite number",
    ),
}


@pytest.mark.parametrize("kind", WRONG_ENVIRONMENTS)
def test_an_environment_that_breaks_its_contract_is_named_with_the_row(
    kind: str, group: Group, answers: list[tuple[int, ...]], tokenizer: Any
) -> None:
    make_environment, problem = WRONG_ENVIRONMENTS[kind]
    rollouter = MultiTurn(make_environment, tokenizer, max_turns=3, name=f"{__name__}:Own")
    with pytest.raises(ConversationError) as caught:
        asyncio.run(rollouter.complete(group, ScriptedPolicy(answers), sampling_of(tokenizer), 5))
    text = str(caught.value)
    assert text.startswith(f"rollout.environment '{__name__}:Own', row row: {problem}") and "\n" not in text
    if kind == "a column":
        assert "add it to data.keep, as [number] (kept are: none)" in text
    if kind in ("a column", "an error"):
        assert re.search(rf"\({re.escape(__file__)}:\d+\)", text)


def test_messages_that_the_chat_template_refuses_or_leaves_out_are_named_by_their_role(
    group: Group, answers: list[tuple[int, ...]], tiny_model: Path
) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_model)))
    for otherwise, problem in (
        ("{{ raise_exception('Only user and assistant!') }}", "the chat template refuses messages of the role 'robot'"),
        ("", "the chat template prints nothing of messages of the role 'robot'"),
    ):
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}"
            f"{{% else %}}{otherwise}{{% endif %}}{{% endfor %}}"
        )
        rollouter = MultiTurn(partial(Returns, what=unknown_role), tokenizer, max_turns=3)
        with pytest.raises(ConversationError, match=f"row row: {re.escape(problem)}"):
            asyncio.run(rollouter.complete(group, ScriptedPolicy(answers), sampling_of(tokenizer), 5))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"reward": "good"}, "Observation(reward='good'): must be a finite number"),
        ({"reward": None}, "Observation(reward=None): must be a finite number"),
        ({"reward": math.nan}, "Observation(reward=nan): must be a finite number"),
        ({"messages": "Sure?"}, "Observation(messages='Sure?'): must be a tuple of messages"),
        ({"messages": None}, "Observation(messages=None): must be a tuple of messages"),
        ({"messages": ({"role": "user", "content": "Sure?"},)}, "is a dict, must be a Message("),
        ({"messages": ("Sure?",)}, "'Sure?' is a str, must be a Message("),
        ({"messages": (Message(role="user", content=3),)}, "the content 3 of a message must be text"),  # type: ignore[arg-type]
    ],
)
def test_an_observation_is_checked_where_it_is_made(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConversationError, match=re.escape(problem)):
        Observation(**fields)


def test_an_observation_takes_numbers_of_any_kind_and_a_list_of_messages() -> None:
    message = Message(role="user", content="Sure?")
    observation = Observation(messages=[message], reward=torch.tensor(0.5))  # type: ignore[arg-type]
    assert observation == Observation(messages=(message,), reward=0.5)


ENVIRONMENT_PROBLEMS = {
    "WithoutArguments": "WithoutArguments() cannot be called with the group and `arguments` (none): too many",
    "WithoutStep": "WithoutStep has no method step; write `async def step(",
    "Synchronous": "Synchronous.step is not async; write `async def step(",
    "Returns": "cannot be called with the group and `arguments` (none): missing a required argument: 'what'",
}


@pytest.mark.parametrize("environment", ENVIRONMENT_PROBLEMS)
def test_the_shape_of_an_environment_is_checked_with_the_configuration(
    environment: str, run_settings: Settings
) -> None:
    rollout = {"engine": "local", "environment": {"name": f"{__name__}:{environment}"}}
    with pytest.raises(ConfigError) as caught:
        check_config({**run_settings, "algorithm": {"name": "grpo"}, "rollout": rollout}, kind=RunConfig)
    (problem,) = str(caught.value).splitlines()
    assert problem.startswith(f"rollout.environment: {__name__}:") and ENVIRONMENT_PROBLEMS[environment] in problem


@pytest.fixture
def brief_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with so many end tokens that its answers are short."""
    folder = tmp_path / "brief-model"
    shutil.copytree(tiny_model, folder)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "eos_token_id": [settings["eos_token_id"], *range(100, 200)]}))
    return folder


@pytest.fixture
def conversations(run_settings: Settings, write_rows: Callable[..., Path], brief_model: Path) -> Settings:
    """Settings of a run in which every prompt is a conversation of two questions."""
    words = TEXT.split()
    rows = [{"prompt": [{"role": "user", "content": " ".join(words[i : i + 2 + i % 3])}]} for i in range(8)]
    environment = {"name": f"{__name__}:SecondQuestion", "arguments": {"first_reward": 10.0}}
    return {
        **run_settings,
        "model": {"path": str(brief_model), "dtype": "fp32"},
        "data": {"path": str(write_rows(rows, "prompts.jsonl")), "max_length": 96},
        "algorithm": {"name": "grpo"},
        "rollout": {
            "engine": "local",
            "completions": 2,
            "max_tokens": 48,
            "environment": environment,
            "steps_ahead": 1,
        },
        "rewards": [named(letters)],
    }


def test_rewards_of_environment_and_scorers_add_up_and_a_run_resumes_bit_for_bit(
    conversations: Settings, tmp_path: Path
) -> None:
    whole = run(conversations, steps=4)
    halves = {**conversations, "output": str(tmp_path / "halves")}
    run(halves, steps=2)
    resumed = run(halves, steps=4)
    assert_same_run(whole, resumed)
    assert (whole / "provenance.jsonl").read_text() == (resumed / "provenance.jsonl").read_text()
    extras = [line["reward"] - line["scores/letters"] for line in RunFolder(whole).read_metrics()]
    assert max(extras) > 0 and all(-1e-9 <= extra <= 10.25 for extra in extras), extras
    assert len(rows_of(whole / "provenance.jsonl")) == 4


@pytest.mark.parametrize("reward", [math.nan, 10**400, 1e39, None, "3"], ids=lambda reward: type(reward).__name__)
def test_an_environment_whose_reward_is_no_finite_number_ends_the_run_in_words(
    group: Group, answers: list[tuple[int, ...]], tokenizer: Any, reward: Any
) -> None:
    rollouter = MultiTurn(lambda group: SecondQuestion(group, first_reward=reward), tokenizer, max_turns=3)
    with pytest.raises(ConversationError, match=r"row row: step: Observation.reward=.* must be a finite number"):
        asyncio.run(rollouter.complete(group, ScriptedPolicy(answers), sampling_of(tokenizer), 5))


def test_an_environment_can_be_all_that_gives_rewards(conversations: Settings) -> None:
    line = RunFolder(run({**conversations, "rewards": []}, steps=1)).read_metrics()[-1]
    assert 0 <= line["reward"] <= 10.25
    assert line["environment/reward"] == pytest.approx(line["reward"])


class CountingGenerator(LocalGenerator):
    """The local engine, with a count of what it has answered."""

    num_answers = 0

    def _sample(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        self.num_answers += 1
        return [Rollout(tokens=(5, 2), logprobs=(-1.0, -1.0), truncated=False, weight_version=0)]


def test_after_an_environment_has_failed_hardly_anything_more_is_sampled(group: Group, tokenizer: Any) -> None:
    generator = CountingGenerator(model=None)  # type: ignore[arg-type]
    rollouter = MultiTurn(partial(Returns, what=divides), tokenizer, max_turns=3)
    sampling = sampling_of(tokenizer, num_completions=16)

    async def complete_groups(policy: Policy) -> list[list[Rollout]]:
        return await gather_all(rollouter.complete(group, policy, sampling, seed) for seed in range(4))

    with pytest.raises(ConversationError):
        generator.start(complete_groups)
    assert generator.num_answers < 12, "of 64 completions"


def test_a_run_with_a_failing_environment_ends_with_one_sentence(conversations: Settings) -> None:
    rollout = {**conversations["rollout"], "environment": {"name": f"{__name__}:three"}}
    with pytest.raises(ConversationError, match=r"rollout\.environment '.*:three', row .*prompts\.jsonl:\d+: it made"):
        run({**conversations, "rollout": rollout}, steps=1)
