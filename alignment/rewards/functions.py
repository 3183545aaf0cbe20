"""Rewards from a Python function of one's own, named in the configuration as `package.module:function`.

    def politeness(prompts, completions, answer, *, factor):
        return [factor * ("please" in text) for text in completions]

    rewards: [{name: "my.rewards:politeness", kwargs: {factor: 2}}]
    data: {keep: [answer], …}

The function is called with keyword arguments: once for all completions of a step (of this worker's share), in lists of
equal length, one entry per completion.

- `prompts`: the prompt as text, or, of a conversation, a list of `{"role", "content"}`.
- `completions`: the answer's text.
- every column that `data.keep` names, under its own name; None where a row has no such column. A nested one, as
  `reward_model.ground_truth`, goes to a parameter `ground_truth`, or under its whole name into `**kwargs`.
- what `kwargs` of the configuration holds, as it stands.

Columns that it has no parameter for are left out, unless it takes `**kwargs`. It returns one number per completion.
None abstains: the row is not its business, and the reward is that of the other scorers. NaN or an infinity mean that
the reward is missing: the group is asked about again, and after `attempts` times the run stops. So it is with what the
function raises; with a number in `on_unreadable`, completions for which it raises something, or gives NaN or an
infinity, get that number at once. It may be `async`, and then always runs in the same event loop, so that clients may
be kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsFloat, TypeVar

from pydantic import Field, model_validator

from alignment.errors import RewardError
from alignment.rewards import AskAgain, BuildableScorer, Reward, UnreadableTexts, callable_named
from alignment.settings.section import Positive

if TYPE_CHECKING:
    import torch

    from alignment.groups import Group

Result = TypeVar("Result")
OURS = ("prompts", "completions")
GRACE_S = 1.0
"""Seconds that an event loop gets beyond a deadline, to cancel what is late."""


class RewardFunction(BuildableScorer):
    """A function of one's own, called with lists of prompts, completions and kept columns."""

    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the function."""
    timeout_s: Positive = 300.0
    """Seconds after which one call counts as failed."""
    on_unreadable: Literal["fail"] | float = "fail"
    """Reward of a completion for which the function raises an error, or gives NaN or an infinity; `fail` asks again,
    `attempts` times, and then stops the run."""

    @model_validator(mode="after")
    def _takes_its_arguments(self) -> Self:
        signature = inspect.signature(callable_named(self.name))
        try:
            signature.bind_partial(**dict.fromkeys(OURS), **self.kwargs)
        except TypeError as error:
            raise ValueError(
                f"{self.name}{signature} cannot be called with prompts=, completions= and kwargs: {error}"
            ) from error
        return self

    def check_row(self, columns: Mapping[str, Any]) -> None:
        arguments = self.arguments(columns)
        try:
            self.signature.bind(**dict.fromkeys([*OURS, *arguments]), **self.kwargs)
        except TypeError as error:
            raise RewardError(
                f"{error}: the function gets prompts, completions, kwargs, and the columns that data.keep names "
                f"({', '.join(sorted(columns)) or 'none'})"
            ) from error

    @property
    def signature(self) -> inspect.Signature:
        """Parameters of the function."""
        return inspect.signature(callable_named(self.name))

    def arguments(self, columns: Iterable[str]) -> dict[str, str]:
        """The parameters that kept columns go to, each with its column.

        Raises:
            RewardError: one is taken already.
        """
        arguments: dict[str, str] = {}
        signature = self.signature
        for column in sorted(columns):
            last = column.rpartition(".")[2]
            name = last if column not in signature.parameters and last in signature.parameters else column
            if name in (*OURS, *self.kwargs, *arguments):
                raise RewardError(f"data.keep names the column {column!r}, which the function gets from elsewhere")
            if _takes(signature, name):
                arguments[name] = column
        return arguments

    def build(self, device: torch.device) -> FunctionScorer:
        return FunctionScorer(self)


class FunctionScorer:
    """Calls the function, in a thread beside this one, so that a late one cannot hold up the run for ever."""

    def __init__(self, config: RewardFunction) -> None:
        self.config = config
        self.function: Callable[..., Any] = callable_named(config.name)
        self.loop = Loop(f"{config.name} event loop")
        self.unreadable = UnreadableTexts(config)

    def score(self, groups: list[Group]) -> list[list[Reward]]:
        """As the port says; what the function raises is an attempt that failed."""
        if self.config.on_unreadable == "fail":
            return self._ask(groups)
        return self._ask_apart(groups)

    def _ask_apart(self, groups: list[Group]) -> list[list[Reward]]:
        """Asks about all at once; if that fails, group by group and then one by one, to find what is at fault."""
        try:
            rewards = self._ask(groups)
        except _FunctionError as error:
            if len(groups) > 1:
                return [rewards for group in groups for rewards in self._ask_apart([group])]
            (group,) = groups
            if len(group.completions) <= 1:
                return [[self.unreadable.reward(str(error)) for _ in group.completions]]
            apart = (dataclasses.replace(group, completions=(completion,)) for completion in group.completions)
            return [[reward for part in apart for (reward,) in self._ask_apart([part])]]
        return [[self._finite(reward) for reward in of_group] for of_group in rewards]

    def _finite(self, reward: Any) -> Reward:
        if isinstance(reward, SupportsFloat):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                if not math.isfinite(reward):
                    return self.unreadable.reward(f"it gives {reward!r:.40}")
        return reward  # type: ignore[no-any-return]  # what is no number is told by who asks

    def _ask(self, groups: list[Group]) -> list[list[Reward]]:
        counts = [len(group.completions) for group in groups]
        rewards = self._call(self._arguments(groups))
        if not isinstance(rewards, Collection) or isinstance(rewards, str | dict):
            raise AskAgain(f"it returned a {type(rewards).__name__} instead of a list of numbers")
        if len(rewards) != sum(counts):
            raise AskAgain(f"it returned {len(rewards)} rewards for {sum(counts)} completions")
        remaining = iter(rewards)
        return [[next(remaining) for _ in range(count)] for count in counts]

    def close(self) -> None:
        self.loop.close()

    def _arguments(self, groups: list[Group]) -> dict[str, Any]:
        """Lists with one entry per completion, and the configuration's own."""
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

    def _call(self, arguments: dict[str, Any]) -> Any:
        try:
            result = in_thread(lambda: self.function(**arguments), timeout_s=self.config.timeout_s)
            if inspect.isawaitable(result):
                result = self.loop.run(_awaited(result), timeout_s=self.config.timeout_s)
            return result
        except TimeoutError as error:
            raise AskAgain(f"it was not done after {self.config.timeout_s:g} s") from error
        except RewardError:
            raise
        except Exception as error:  # the function is not ours: anything may come, and the next attempt may be better
            raise _FunctionError(f"it raised {type(error).__name__}: {error!s:.200}") from error


class _FunctionError(AskAgain):
    """What the function raised."""


class Loop:
    """An event loop in a thread of its own, for coroutines that must not meet the caller's."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)

    def run(self, coroutine: Coroutine[Any, Any, Result], *, timeout_s: float | None = None) -> Result:
        """The coroutine's result; it is cancelled if it takes too long.

        Raises:
            TimeoutError: it did.
        """
        if not self._thread.is_alive():
            self._thread.start()
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, timeout_s), self._loop)
        # A coroutine that blocks the loop cannot be cancelled from inside it.
        return future.result(None if timeout_s is None else timeout_s + GRACE_S)

    def close(self) -> None:
        """Ends the thread and frees the loop; a blocked one is left to the end of the process."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(GRACE_S)
        if not self._thread.is_alive():
            self._loop.close()


def in_thread(function: Callable[[], Result], *, timeout_s: float) -> Result:
    """The function's result, from a new thread that is left alone if it takes too long: threads cannot be stopped.

    Raises:
        TimeoutError: it did.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout_s)


def prompt_of(group: Group) -> str | list[dict[str, Any]]:
    """A group's prompt as plain Python: text, or the turns of a conversation with all their fields."""
    if isinstance(group.prompt, str):
        return group.prompt
    return [turn.template_fields() for turn in group.prompt]


async def _awaited(result: Awaitable[Result]) -> Result:
    return await result


def _takes(signature: inspect.Signature, name: str) -> bool:
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    return name in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds
