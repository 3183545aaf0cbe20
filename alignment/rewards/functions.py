"""Rewards from a user's Python function, named in the configuration as `package.module:function`.

    def politeness(prompts, completions, answer, *, factor):
        return [factor * ("please" in text) for text in completions]

    rewards: [{name: "my.rewards:politeness", kwargs: {factor: 2}}]
    data: {keep: [answer], …}

The function is called with keyword arguments, once for all completions of a step (of this worker's share). The first
three are lists of equal length, with one entry per completion:

- `prompts`: the prompt as text, or, for a conversation, as a list of `{"role", "content"}`.
- `completions`: the text of the answer.
- every column that `data.keep` names, under its own name; None if the row has no such column. A nested column, as
  `reward_model.ground_truth`, goes to a parameter `ground_truth`, or under its whole name into `**kwargs`.
- the entries of the configuration's `kwargs`, unchanged.

Columns without a parameter are left out, unless the function takes `**kwargs`. The function returns one number per
completion, in their order: a list, a tuple, an array or a tensor. With None it abstains, and the completion gets the
reward of the other scorers. NaN, the infinities and numbers beyond fp32 mean that the reward is missing: the group is
scored again, and after `attempts` times the run stops. The same is true if the function raises an exception. With a
number in `on_unreadable`, a completion for which the function raises an exception, or returns such a number, gets that
of `on_unreadable` at once. The function may be `async`; all calls then run in the same event loop, so that it may keep
its clients.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from alignment.errors import RewardError
from alignment.rewards import (
    AskAgain,
    BuildableScorer,
    Reward,
    UnreadableTexts,
    not_a_list,
    num_values,
    short_repr,
    to_number,
)
from alignment.settings.plugins import load_function
from alignment.settings.section import MAX_REWARD, Fp32Number, Positive

if TYPE_CHECKING:
    import torch

    from alignment.groups import Group

Result = TypeVar("Result")
STANDARD_ARGUMENTS = ("prompts", "completions")
"""Arguments that every function gets."""
GRACE_S = 1.0
"""Seconds that an event loop has after a deadline to cancel a late coroutine."""


class RewardFunction(BuildableScorer):
    """A user's function, called with lists of prompts, completions and kept columns."""

    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the function."""
    timeout_s: Positive = 300.0
    """Seconds after which one call counts as failed."""
    on_unreadable: Literal["fail"] | Fp32Number = "fail"
    """Reward of a completion for which the function raises an error, or gives NaN or a number that fp32 does not hold;
    `fail` asks again, `attempts` times, and then stops the run."""

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        signature = inspect.signature(load_function(self.name, "scorer"))
        try:
            signature.bind_partial(**dict.fromkeys(STANDARD_ARGUMENTS), **self.kwargs)
        except TypeError as error:
            raise ValueError(
                f"{self.name}{signature} cannot be called with prompts=, completions= and kwargs: {error}"
            ) from error
        return self

    def check_row(self, columns: Mapping[str, Any]) -> None:
        """Checks that the function can be called with these columns.

        Raises:
            RewardError: it has a parameter that nothing fills, or a column would fill one that is filled already.
        """
        values = dict.fromkeys([*STANDARD_ARGUMENTS, *self.arguments(columns)]) | self.kwargs
        try:
            self.signature.bind(**values)
        except TypeError as error:
            unfilled_names = [name for name in _required_parameters(self.signature) if name not in values]
            hint = f"; add it to data.keep, as [{unfilled_names[0]}], or to kwargs" if unfilled_names else ""
            raise RewardError(
                f"{error}{hint}: the function gets prompts, completions, kwargs, and the columns that data.keep names "
                f"({', '.join(sorted(columns)) or 'none'})"
            ) from error

    @property
    def signature(self) -> inspect.Signature:
        """The signature of the function."""
        return inspect.signature(load_function(self.name, "scorer"))

    def arguments(self, columns: Iterable[str]) -> dict[str, str]:
        """Returns the parameters that get kept columns, each with the name of its column.

        Raises:
            RewardError: a column would go to a parameter that gets its value from elsewhere.
        """
        arguments: dict[str, str] = {}
        signature = self.signature
        for column in sorted(columns):
            last_name = column.rpartition(".")[2]
            name = last_name if column not in signature.parameters and last_name in signature.parameters else column
            if name in (*STANDARD_ARGUMENTS, *self.kwargs, *arguments):
                raise RewardError(f"data.keep names the column {column!r}, which the function gets from elsewhere")
            if _accepts(signature, name):
                arguments[name] = column
        return arguments

    def build(self, device: torch.device) -> FunctionScorer:
        """Builds the scorer; the device is not used."""
        return FunctionScorer(self)


class FunctionScorer:
    """Calls the function in another thread, so that a late call cannot block the run for ever."""

    def __init__(self, config: RewardFunction) -> None:
        self.config = config
        self.function: Callable[..., Any] = load_function(config.name, "scorer")
        self.loop = EventLoopThread(f"{config.name} event loop")
        self.unreadable = UnreadableTexts(config)

    def score(self, groups: list[Group]) -> list[list[Reward]]:
        """Scores as `Scorer.score` says; an exception of the function is a failed attempt.

        Raises:
            AskAgain: the function failed, was late, or returned something else than one number per completion.
            RewardError: the columns do not fit the parameters of the function.
        """
        if self.config.on_unreadable == "fail":
            return self._score_together(groups)
        return self._score_separately(groups)

    def _score_separately(self, groups: list[Group]) -> list[list[Reward]]:
        """Scores all groups at once; if that fails, group by group and then one by one, to find the bad completion."""
        try:
            rewards = self._score_together(groups)
        except _FunctionError as error:
            if len(groups) > 1:
                return [rewards for group in groups for rewards in self._score_separately([group])]
            (group,) = groups
            if len(group.completions) <= 1:
                return [[self.unreadable.reward(str(error)) for _ in group.completions]]
            single_groups = (dataclasses.replace(group, completions=(completion,)) for completion in group.completions)
            return [[reward for single_group in single_groups for (reward,) in self._score_separately([single_group])]]
        return [[self._finite_reward(reward) for reward in group_rewards] for group_rewards in rewards]

    def _finite_reward(self, reward: Any) -> Reward:
        number = to_number(reward)
        if number is not None and not abs(number) <= MAX_REWARD:
            return self.unreadable.reward(f"it gives {short_repr(reward)}")
        return reward  # type: ignore[no-any-return]  # `Rewards` refuses what is not a number

    def _score_together(self, groups: list[Group]) -> list[list[Reward]]:
        counts = [len(group.completions) for group in groups]
        rewards = self._call_function(self._arguments(groups))
        num_rewards = num_values(rewards)
        if num_rewards is None:
            raise AskAgain(f"it returned {not_a_list(rewards, 'numbers')}")
        if num_rewards != sum(counts):
            raise AskAgain(f"it returned {num_rewards} rewards for {sum(counts)} completions")
        reward_iterator = iter(rewards)
        return [[next(reward_iterator) for _ in range(count)] for count in counts]

    def close(self) -> None:
        """Ends the event loop."""
        self.loop.close()

    def _arguments(self, groups: list[Group]) -> dict[str, Any]:
        """The keyword arguments of the function: lists with one entry per completion, and the configured `kwargs`."""
        entries = [(group, completion) for group in groups for completion in group.completions]
        arguments: dict[str, Any] = {
            "prompts": [prompt_of(group) for group, _ in entries],
            "completions": [completion.text for _, completion in entries],
        }
        columns = dict.fromkeys(column for group in groups for column in group.columns)
        self.config.check_row(columns)
        for name, column in self.config.arguments(columns).items():
            arguments[name] = [group.columns.get(column) for group, _ in entries]
        return {**arguments, **self.config.kwargs}

    def _call_function(self, arguments: dict[str, Any]) -> Any:
        try:
            result = run_in_thread(lambda: self.function(**arguments), timeout_s=self.config.timeout_s)
            if inspect.isawaitable(result):
                result = self.loop.run(_await_result(result), timeout_s=self.config.timeout_s)
            return result
        except TimeoutError as error:
            raise AskAgain(f"it was not done after {self.config.timeout_s:g} s") from error
        except RewardError:
            raise
        except Exception as error:  # a user's function may raise anything, and the next attempt may succeed
            raise _FunctionError(f"it raised {type(error).__name__}: {error!s:.200}") from error


class _FunctionError(AskAgain):
    """The function raised an exception."""


class EventLoopThread:
    """An event loop in a thread of its own, apart from any event loop of the caller."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)

    def run(self, coroutine: Coroutine[Any, Any, Result], *, timeout_s: float | None = None) -> Result:
        """Returns the result of the coroutine, which is cancelled after `timeout_s` seconds.

        Raises:
            TimeoutError: the coroutine took longer.
        """
        if not self._thread.is_alive():
            self._thread.start()
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, timeout_s), self._loop)
        # A coroutine that blocks the loop cannot be cancelled from inside it.
        return future.result(None if timeout_s is None else timeout_s + GRACE_S)

    def close(self) -> None:
        """Ends the thread and frees the loop; a blocked thread stays until the process ends."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(GRACE_S)
        if not self._thread.is_alive():
            self._loop.close()


def run_in_thread(function: Callable[[], Result], *, timeout_s: float) -> Result:
    """Calls a function in a new thread and returns its result. A thread cannot be stopped, so a late one goes on.

    Raises:
        TimeoutError: the function took longer than `timeout_s` seconds.
    """
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future.result(timeout_s)


def prompt_of(group: Group) -> str | list[dict[str, Any]]:
    """The prompt of a group as a text, or as a list of the turns of a conversation with all their fields."""
    if isinstance(group.prompt, str):
        return group.prompt
    return [turn.template_fields() for turn in group.prompt]


async def _await_result(result: Awaitable[Result]) -> Result:
    return await result


def _required_parameters(signature: inspect.Signature) -> list[str]:
    """Names of the parameters without a default."""
    catch_all = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in catch_all
    ]


def _accepts(signature: inspect.Signature, name: str) -> bool:
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    return name in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds
