"""How the completions of a group come about: by one answer each, or by a conversation with an environment.

Rollouter.complete(group, policy) ─► policy.generate(prompt) ─► Rollout
                                        ▲                        │ answer
                                        └── observation ◄── Environment.step ─► reward
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import math
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from alignment.errors import RewardError, RolloutError
from alignment.groups import Group, Message
from alignment.rewards import short_repr, to_number
from alignment.rollout import Policy, Prompt, Rollout, Sampling
from alignment.settings.plugins import MAX_REWARD

Result = TypeVar("Result")
MARK = "\u2042answer\u2042"
"""Stands for an answer in a rendered conversation, so that what the template prints behind it is found."""


class Rollouter(Protocol):
    """Makes the completions of a group."""

    async def complete(self, group: Group, policy: Policy, sampling: Sampling, seed: int) -> list[Rollout]:
        """Returns `sampling.num_completions` completions of the group's prompt.

        Args:
            seed: of all that is random here; the same seed and weights give the same completions.

        Raises:
            RolloutError: they could not be made.
            RewardError: an environment gave a reward that is no finite number.
        """


class SingleTurn:
    """The policy answers the prompt, and that is the completion."""

    async def complete(self, group: Group, policy: Policy, sampling: Sampling, seed: int) -> list[Rollout]:
        """Samples all completions of the prompt at once."""
        return await policy.generate(Prompt(tokens=group.prompt_tokens, seed=seed), sampling)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What an environment gives back for an answer."""

    messages: tuple[Message, ...] = ()
    """What the policy reads before its next answer, as `Message(role="user", content="…")`. It is not trained on."""
    reward: float = 0.0
    """Reward of the answer. Those of a conversation are added up, and the run's scorers' are added to them."""
    is_done: bool = False
    """True if the conversation ends here."""


class Environment(Protocol):
    """One conversation with the policy: a user, a tool, a game. Every completion has one of its own."""

    async def step(self, answer: str) -> Observation:
        """Takes the policy's answer, and returns what comes of it."""


class MultiTurn:
    """The policy and an environment take turns; a completion is the whole conversation behind the prompt."""

    def __init__(
        self,
        make_environment: Callable[[Group], Environment],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_turns: int,
    ) -> None:
        """Makes a rollouter.

        Args:
            make_environment: makes the environment of one completion of a group.
            max_turns: most answers of the policy in one conversation.
        """
        self.make_environment = make_environment
        self.tokenizer = tokenizer
        self.max_turns = max_turns

    async def complete(self, group: Group, policy: Policy, sampling: Sampling, seed: int) -> list[Rollout]:
        """Holds a conversation for each completion; all of them go on at the same time."""
        return await gather_all(
            self._converse(group, policy, dataclasses.replace(sampling, num_completions=1), f"{seed}/{index}")
            for index in range(sampling.num_completions)
        )

    async def _converse(self, group: Group, policy: Policy, sampling: Sampling, seed: str) -> Rollout:
        environment = self.make_environment(group)
        conversation = Rollout(tokens=(), logprobs=(), truncated=False, weight_version=0, reward=0.0)
        for turn in range(self.max_turns):
            prompt = Prompt(tokens=group.prompt_tokens + conversation.tokens, seed=_seed(f"{seed}/{turn}"))
            room = dataclasses.replace(sampling, max_tokens=sampling.max_tokens - len(conversation.tokens))
            (answer,) = await policy.generate(prompt, room)
            conversation = _extend(conversation, answer, is_first=turn == 0)
            if answer.truncated:
                break
            text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            observation = await environment.step(text)
            conversation = _add_reward(conversation, observation.reward, group, turn)
            if observation.is_done or turn + 1 == self.max_turns:
                break
            tokens = self._observation_tokens(group, observation.messages, sampling.end_tokens)
            num_tokens = len(conversation.tokens) + len(tokens)
            if num_tokens >= sampling.max_tokens or len(group.prompt_tokens) + num_tokens >= sampling.max_length:
                return dataclasses.replace(conversation, truncated=True)
            conversation = dataclasses.replace(
                conversation,
                tokens=conversation.tokens + tokens,
                logprobs=conversation.logprobs + (0.0,) * len(tokens),
                loss_mask=conversation.loss_mask + (False,) * len(tokens),
            )
        return conversation

    def _observation_tokens(
        self, group: Group, messages: tuple[Message, ...], end_tokens: frozenset[int]
    ) -> tuple[int, ...]:
        """Token ids behind an answer that ended by itself: the messages, up to where the next answer begins."""
        if isinstance(group.prompt, str):
            text = "".join(message.content for message in messages)
        else:
            turns = [*group.prompt, Message(role="assistant", content=MARK), *messages]
            conversation_text = self.tokenizer.apply_chat_template(
                [turn.template_fields() for turn in turns], tokenize=False, add_generation_prompt=True
            )
            _, mark, text = str(conversation_text).rpartition(MARK)
            if not mark:
                raise RolloutError("the chat template does not print an answer as it is, so nothing can follow it")
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return tuple(tokens[1:] if tokens and tokens[0] in end_tokens else tokens)


async def gather_all(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Runs coroutines together and returns their results in order; the first error ends all of them."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _extend(conversation: Rollout, answer: Rollout, *, is_first: bool) -> Rollout:
    """The conversation with one more answer of the policy, of which every token is trained on."""
    version = answer.weight_version
    return dataclasses.replace(
        conversation,
        tokens=conversation.tokens + answer.tokens,
        logprobs=conversation.logprobs + answer.logprobs,
        loss_mask=conversation.loss_mask + (True,) * len(answer.tokens),
        truncated=answer.truncated,
        weight_version=version if is_first else min(version, conversation.weight_version),
    )


def _add_reward(conversation: Rollout, reward: Any, group: Group, turn: int) -> Rollout:
    """The conversation with what an environment gave for its newest answer.

    Raises:
        RewardError: that is not a number, or the sum is too large for fp32.
    """
    number = to_number(reward)
    total = math.nan if number is None else (conversation.reward or 0.0) + number
    if not abs(total) <= MAX_REWARD:
        raise RewardError(
            f"group {group.id}, answer {turn + 1}: the reward of the environment is {short_repr(reward)}, which "
            f"makes no sum below {MAX_REWARD:g}"
        )
    return dataclasses.replace(conversation, reward=total)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % 2**31
