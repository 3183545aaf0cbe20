"""An environment, and what holds it to its contract: whatever it does wrong is one error that names it and the row."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from alignment.errors import ConversationError
from alignment.groups import Group, Message
from alignment.rewards import short_repr, to_number
from alignment.settings.section import MAX_REWARD

CONTRACT = "`async def step(self, answer: str) -> Observation`"


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What an environment gives back for an answer."""

    messages: tuple[Message, ...] = ()
    """What the policy reads before its next answer, as `Message(role="user", content="…")`. It is not trained on."""
    reward: float = 0.0
    """Reward of the answer. Those of a conversation are added up, and the run's scorers' are added to them."""
    is_done: bool = False
    """True if the conversation ends here."""

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ConversationError: the messages are no messages, or the reward is not a finite number.
        """
        object.__setattr__(self, "messages", _checked_messages(self.messages))
        object.__setattr__(self, "reward", _finite_number(self.reward))


class Environment(Protocol):
    """One conversation with the policy: a user, a tool, a game. Every completion has one of its own."""

    async def step(self, answer: str) -> Observation:
        """Takes the policy's answer, and returns what comes of it."""


class CheckedEnvironment:
    """The environment of one completion, as `rollout.environment` names it."""

    def __init__(self, name: str, make_environment: Callable[[Group], Environment], group: Group) -> None:
        """Makes the environment of one completion of a group.

        Args:
            name: the dotted name in the configuration, for errors.

        Raises:
            ConversationError: it cannot be made, or has no method `step`.
        """
        self.name = name
        self.group = group
        try:
            self.environment = make_environment(group)
        except Exception as error:  # a class of one's own may raise anything
            raise self._failure("making it", error) from error
        if not callable(getattr(self.environment, "step", None)):
            kind = type(self.environment).__name__
            raise self.error(f"it made a value of type {kind}, which has no method step; it needs {CONTRACT}")

    async def step(self, answer: str) -> Observation:
        """Takes the policy's answer, and returns what comes of it.

        Raises:
            ConversationError: the environment raised an error, or returned something else than an Observation.
        """
        try:
            observation: Any = self.environment.step(answer)
            is_async = inspect.isawaitable(observation)
            if is_async:
                observation = await observation
        except Exception as error:  # a class of one's own may raise anything
            raise self._failure("step", error) from error
        if not is_async:
            raise self.error(
                f"step is not async; it returned a value of type {type(observation).__name__}. Write {CONTRACT}"
            )
        if not isinstance(observation, Observation):
            raise self.error(f"step returned a {type(observation).__name__}, must be an Observation")
        return observation

    def error(self, problem: str) -> ConversationError:
        """The error of a problem, which names the environment and the row."""
        return ConversationError(f"rollout.environment {self.name!r}, row {self.group.id}: {problem}")

    def _failure(self, action: str, error: Exception) -> ConversationError:
        """The error of an exception: where it was raised, and if it is a missing column, how to have it kept."""
        if isinstance(error, ConversationError):
            return self.error(f"{action}: {error}")
        text = " ".join(str(error).split())
        problem = f"{action} raised {type(error).__name__}: {text:.300}{self._line_of(error)}"
        column = error.args[0] if isinstance(error, KeyError) and error.args else None
        if isinstance(column, str) and column not in self.group.columns:
            kept_columns = ", ".join(sorted(self.group.columns)) or "none"
            problem += f"; if it is a column of the data, add it to data.keep, as [{column}] (kept are: {kept_columns})"
        return self.error(problem)

    def _line_of(self, error: Exception) -> str:
        """File and line, in brackets: the environment's own line that an exception came through, or else the last."""
        frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is the call in this file
        if not frames:
            return ""
        file = getattr(sys.modules.get(self.name.partition(":")[0]), "__file__", None)
        frame = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1])
        return f" ({frame.filename}:{frame.lineno})"


def _checked_messages(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ConversationError(
            f"Observation(messages={messages!r:.60}): must be a tuple of messages, as "
            '(Message(role="user", content="…"),)'
        )
    for message in messages:
        if not isinstance(message, Message):
            raise ConversationError(
                f"Observation(messages=…): {message!r:.60} is a {type(message).__name__}, must be a "
                'Message(role="user", content="…") of alignment.groups'
            )
        for key, value in (("role", message.role), ("content", message.content)):
            if not isinstance(value, str):
                raise ConversationError(f"Observation(messages=…): the {key} {value!r:.60} of a message must be text")
    return tuple(messages)


def _finite_number(reward: Any) -> float:
    number = to_number(reward)
    if number is None or not abs(number) <= MAX_REWARD:
        raise ConversationError(f"Observation(reward={short_repr(reward)}): must be a finite number within fp32")
    return number
