"""How the completions of a group come about: by one answer each, or by a conversation with an environment.

Rollouter.complete(group, policy) ─► policy.generate(prompt) ─► Rollout
                                        ▲                        │ answer
                                        └── observation ◄── Environment.step ─► reward
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from alignment.groups import Group, Message
from alignment.rollout import Policy, Prompt, Rollout, Sampling
from alignment.rollout.conversation import CheckedEnvironment
from alignment.rollout.conversation import Environment as Environment
from alignment.rollout.conversation import Observation as Observation
from alignment.settings.section import MAX_REWARD

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
            ConversationError: an environment has failed, or does not keep its contract.
        """


class SingleTurn:
    """The policy answers the prompt, and that is the completion."""

    async def complete(self, group: Group, policy: Policy, sampling: Sampling, seed: int) -> list[Rollout]:
        """Samples all completions of the prompt at once."""
        return await policy.generate(Prompt(tokens=group.prompt_tokens, seed=seed), sampling)


class MultiTurn:
    """The policy and an environment take turns; a completion is the whole conversation behind the prompt."""

    def __init__(
        self,
        make_environment: Callable[[Group], Environment],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_turns: int,
        name: str = "",
    ) -> None:
        """Makes a rollouter.

        Args:
            make_environment: makes the environment of one completion of a group.
            max_turns: most answers of the policy in one conversation.
            name: dotted name of what makes the environment, for errors; empty is that of the function itself.
        """
        self.make_environment = make_environment
        self.tokenizer = tokenizer
        self.max_turns = max_turns
        self.name = name or getattr(make_environment, "__qualname__", repr(make_environment))

    async def complete(self, group: Group, policy: Policy, sampling: Sampling, seed: int) -> list[Rollout]:
        """Holds a conversation for each completion; all of them go on at the same time.

        Raises:
            ConversationError: an environment has failed, or does not keep its contract.
        """
        environments = [
            CheckedEnvironment(self.name, self.make_environment, group) for _ in range(sampling.num_completions)
        ]
        return await gather_all(
            self._converse(environment, policy, dataclasses.replace(sampling, num_completions=1), f"{seed}/{index}")
            for index, environment in enumerate(environments)
        )

    async def _converse(
        self, environment: CheckedEnvironment, policy: Policy, sampling: Sampling, seed: str
    ) -> Rollout:
        group = environment.group
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
            conversation = _add_reward(environment, conversation, observation.reward)
            if observation.is_done or turn + 1 == self.max_turns:
                break
            tokens = self._observation_tokens(environment, observation.messages, sampling.end_tokens)
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
        self, environment: CheckedEnvironment, messages: tuple[Message, ...], end_tokens: frozenset[int]
    ) -> tuple[int, ...]:
        """Token ids behind an answer that ended by itself: the messages, up to where the next answer begins."""
        if not messages:
            raise environment.error(
                "step returned an Observation that is not done and has no messages, so the model has nothing to "
                "answer; give it messages, or is_done=True"
            )
        if isinstance(environment.group.prompt, str):
            text = "".join(message.content for message in messages)
        else:
            text = self._rendered_messages(environment, environment.group.prompt, messages)
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return tuple(tokens[1:] if tokens and tokens[0] in end_tokens else tokens)

    def _rendered_messages(
        self, environment: CheckedEnvironment, prompt: tuple[Message, ...], messages: tuple[Message, ...]
    ) -> str:
        """What the chat template prints behind an answer: the messages, and the beginning of the next answer."""
        turns = [*prompt, Message(role="assistant", content=MARK), *messages]
        roles = ", ".join(repr(message.role) for message in messages)
        try:
            text = self._text_behind_mark(turns)
            contents = [content for message in messages if (content := message.content.strip())]
            is_unread = text is not None and bool(contents) and not any(content in text for content in contents)
            is_unread = is_unread and text == self._text_behind_mark(turns[: len(prompt) + 1])
        except Exception as error:  # a template raises what it likes of turns that it does not know
            raise environment.error(
                f"the chat template refuses messages of the role {roles} here: {type(error).__name__}: {error}"
            ) from error
        if text is None:
            raise environment.error("the chat template does not print an answer as it is, so nothing can follow it")
        if is_unread:
            raise environment.error(f"the chat template prints nothing of messages of the role {roles}")
        return text

    def _text_behind_mark(self, turns: list[Message]) -> str | None:
        """What the chat template prints behind MARK, for the next answer; None if it does not print MARK."""
        conversation_text = self.tokenizer.apply_chat_template(
            [turn.template_fields() for turn in turns], tokenize=False, add_generation_prompt=True
        )
        _, mark, text = str(conversation_text).rpartition(MARK)
        return text if mark else None


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


def _add_reward(environment: CheckedEnvironment, conversation: Rollout, reward: float) -> Rollout:
    """The conversation with what its environment gave for the newest answer.

    Raises:
        ConversationError: the sum is too large for fp32.
    """
    total = (conversation.reward or 0.0) + reward
    if not abs(total) <= MAX_REWARD:
        raise environment.error(f"its rewards add up to {total:g}, and fp32 ends at {MAX_REWARD:g}")
    return dataclasses.replace(conversation, reward=total)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % 2**31
