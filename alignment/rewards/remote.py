"""Rewards from a service over HTTP, and the one schema that asker and answerer share (`serving.rewards` answers).

POST {"items": [{"id", "prompt" or "messages", "completion", "truncated"?, "columns"?}]}
  ─► {"items": [{"id", "reward"} or {"id", "error"}]}                    in any order; an item may fail by itself

A reward that is null abstains: the item is not the service's business.
"""

from __future__ import annotations

import asyncio
import operator
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticSerializationError

from alignment.errors import ConfigError, RewardError
from alignment.rewards import LARGEST, BuildableScorer, Reward, UnreadableTexts
from alignment.rewards.functions import Loop, prompt_of
from alignment.settings.section import NonNegative, Positive, PositiveCount

if TYPE_CHECKING:
    import torch

    from alignment.groups import Group

MAX_PAUSE_S = 30.0
PASSING = {408, 425, 429, 500, 502, 503, 504}
"""HTTP statuses after which the same request may succeed."""
ERROR_CODE = re.compile(r"[a-z0-9_.-]{1,64}")
UNREADABLE = frozenset({"too_long", "unreadable"})
"""Codes of a service about a text that it will not read at any attempt."""
NO_JSON = "its text cannot be written as JSON"


class Wire(BaseModel):
    """A part of the schema; what is not in it is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ChatMessage(Wire):
    """One turn of a conversation."""

    role: str
    content: str


class ScoreItem(Wire):
    """One completion to be rated."""

    id: str = Field(max_length=200)
    """Comes back with the reward; unique in its request."""
    prompt: str | None = None
    """The prompt, if it is plain text."""
    messages: tuple[ChatMessage, ...] | None = None
    """The prompt, if it is a conversation; the completion is the assistant's next turn."""
    completion: str
    truncated: bool = Field(default=False, exclude_if=operator.not_)
    """The completion was cut off for lack of room: it did not end by itself. Sent only if true."""
    columns: dict[str, Any] = Field(default_factory=dict)
    """What `data.keep` kept of the row."""

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("an item has either a prompt or messages")
        return self


class ScoreRequest(Wire):
    """What is asked."""

    items: tuple[ScoreItem, ...] = Field(min_length=1)

    @field_validator("items")
    @classmethod
    def _unique(cls, items: tuple[ScoreItem, ...]) -> tuple[ScoreItem, ...]:
        if len({item.id for item in items}) < len(items):
            raise ValueError("two items have the same id")
        return items


class ScoredItem(Wire):
    """What came of one item: exactly one of a reward and an error."""

    model_config = ConfigDict(extra="ignore")

    id: str
    reward: float | None = None
    """Higher is better; null abstains."""
    error: str | None = None
    """A short code in lower case. It must quote nothing of the item. `too_long` and `unreadable` say that the text
    cannot be rated, at no attempt."""


class ScoreReply(Wire):
    """What is answered."""

    model_config = ConfigDict(extra="ignore")

    items: tuple[ScoredItem, ...]


class RewardService(BuildableScorer):
    """A service that rates completions, as `raylign reward-server` does."""

    name: Literal["http"] = "http"
    """A reward service over HTTP."""
    url: str
    """Where to POST, as `http://reward:8100/score`; without a user, a password or a query, which would be logged."""
    key_env: str | None = None
    """Name of the environment variable, set for every training worker, that holds the bearer key. None sends none."""
    timeout_s: Positive = 60.0
    """Seconds from sending a request to having all of its answer."""
    attempts: PositiveCount = 6
    """Times that an item is asked about; only items without a sound reward are asked about again."""
    backoff_s: NonNegative = 1.0
    """Pause before the second attempt; doubled each time up to 30 s, and shortened by up to half at random."""
    batch_size: PositiveCount = 32
    """Most items in a request."""
    concurrency: PositiveCount = 4
    """Most requests at a time, of each training worker."""
    on_unreadable: Literal["fail"] | float = -3.0
    """Reward of an answer about which the service says `too_long` or `unreadable`, or that no JSON can hold; `fail`
    stops the run instead. Of a normalised reward, -3 is what one in a thousand answers gets."""

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        from urllib.parse import urlsplit

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError("must be http://HOST/PATH or https://HOST/PATH without a user, a password or a query")
        return url

    def check_row(self, columns: Mapping[str, Any]) -> None:
        item = ScoreItem(id="0", prompt="", completion="", columns=dict(columns))
        if not _is_json(item):
            raise RewardError(f"the kept columns ({', '.join(sorted(columns))}) cannot be written as JSON")

    def build(self, device: torch.device) -> ServiceScorer:
        return ServiceScorer(self)


class ServiceScorer:
    """Asks a reward service, and again about what it did not answer."""

    def __init__(self, config: RewardService) -> None:
        """Opens no connection yet.

        Raises:
            ConfigError: the key's environment variable is not set, or holds no key.
        """
        import httpx

        self.config = config
        headers = {"Content-Type": "application/json"}
        if config.key_env:
            headers["Authorization"] = f"Bearer {key_from(config.key_env)}"
        # The deadline is set around each whole request: httpx's own are for each packet.
        self.unreadable = UnreadableTexts(config)
        self._client = httpx.AsyncClient(headers=headers, timeout=None)
        self._places = asyncio.Semaphore(config.concurrency)
        self._chance = random.Random()  # not the run's: a pause must not change what is learned
        self._loop = Loop("reward service")

    def score(self, groups: list[Group]) -> list[list[Reward]]:
        """As the port says; an item is asked about again here, by itself."""
        answers = self._loop.run(self._ask(items_of(groups)))
        remaining = iter(answers)
        given = [[next(remaining) for _ in group.completions] for group in groups]
        for group, of_group in zip(groups, given, strict=True):
            for number, answer in enumerate(of_group, start=1):
                if answer.problem:
                    without = sum(bool(answer.problem) for answer in answers)
                    raise RewardError(
                        f"group {group.id}, completion {number} of {len(of_group)}: {answer.problem} ({without} of "
                        f"{len(answers)} completions are without a reward after {self.config.attempts} attempts)"
                    )
        return [
            [
                self.unreadable.reward(f"group {group.id}, completion {number} of {len(of_group)}: {answer.unreadable}")
                if answer.unreadable
                else answer.reward
                for number, answer in enumerate(of_group, start=1)
            ]
            for group, of_group in zip(groups, given, strict=True)
        ]

    def close(self) -> None:
        """Closes the connections."""
        self._loop.run(self._client.aclose())
        self._loop.close()

    async def _ask(self, items: list[ScoreItem]) -> list[Answer]:
        """What came of every item, in their order, after as many attempts as they took."""
        answers = [
            Answer(unreadable=NO_JSON) if _is_lone(item.completion) else Answer(problem="it was not asked about")
            for item in items
        ]
        for attempt in range(self.config.attempts):
            waiting = [index for index, answer in enumerate(answers) if answer.problem]
            if not waiting:
                break
            if attempt:
                await asyncio.sleep(self._pause(attempt))
            size = self.config.batch_size
            batches = [waiting[start : start + size] for start in range(0, len(waiting), size)]
            asked = [self._ask_once([items[index] for index in batch]) for batch in batches]
            # All come to an end before an error of one is raised, so that none is left behind in the loop.
            for batch, given in zip(batches, await asyncio.gather(*asked, return_exceptions=True), strict=True):
                if isinstance(given, BaseException):
                    raise given
                for index, answer in zip(batch, given, strict=True):
                    answers[index] = answer
        return answers

    async def _ask_once(self, items: list[ScoreItem]) -> list[Answer]:
        try:
            async with self._places, asyncio.timeout(self.config.timeout_s):
                replies = await self._post(ScoreRequest(items=tuple(items)))
        except TimeoutError:
            return [Answer(problem=f"there was no answer within {self.config.timeout_s:g} s")] * len(items)
        except _PassingError as error:
            return [Answer(problem=str(error))] * len(items)
        by_id: dict[str, list[ScoredItem]] = {}
        for reply in replies.items:
            by_id.setdefault(reply.id, []).append(reply)
        return [Answer.of(by_id.get(item.id, [])) for item in items]

    async def _post(self, request: ScoreRequest) -> ScoreReply:
        import httpx

        try:
            body = request.model_dump_json(exclude_none=True).encode()
        except (PydanticSerializationError, UnicodeEncodeError):  # which quote the text
            raise RewardError("a prompt or a kept column cannot be written as JSON") from None
        try:
            response = await self._client.post(self.config.url, content=body)
        except httpx.RequestError as error:
            raise _PassingError(f"the connection failed ({type(error).__name__})") from error
        if response.status_code in PASSING:
            raise _PassingError(f"the service answered with HTTP status {response.status_code}")
        if response.status_code != 200:
            raise RewardError(f"the service refuses requests with HTTP status {response.status_code}")
        try:
            return ScoreReply.model_validate_json(response.content)
        except ValidationError as error:
            # Without the cause: it quotes what came, and what came may quote what was asked.
            raise _PassingError(f"the answer is not in the schema ({error.error_count()} problems)") from None

    def _pause(self, attempt: int) -> float:
        longest = min(MAX_PAUSE_S, self.config.backoff_s * 2.0 ** (attempt - 1))
        return longest * self._chance.uniform(0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of an item."""

    reward: Reward = None
    problem: str = ""
    """Why there is no reward, in words that quote nothing of the item."""
    unreadable: str = ""
    """Why there will be none at any attempt."""

    @classmethod
    def of(cls, replies: list[ScoredItem]) -> Answer:
        """Judges what a service said about one item."""
        if len(replies) != 1:
            return cls(problem="the service left it out" if not replies else "the service answered it twice")
        (reply,) = replies
        if reply.error is not None:
            if reply.error in UNREADABLE:
                return cls(unreadable=f"the service says {reply.error}")
            known = ERROR_CODE.fullmatch(reply.error)
            return cls(problem=f"the service says {reply.error}" if known else "the service refused it")
        if reply.reward is None:
            return cls() if "reward" in reply.model_fields_set else cls(problem="the service left its reward out")
        if not abs(reply.reward) <= LARGEST:
            return cls(problem=f"the reward is {reply.reward}, not a number")
        return cls(reward=reply.reward)


class _PassingError(Exception):
    """A request that failed in a way that may pass."""


def items_of(groups: list[Group]) -> list[ScoreItem]:
    """All completions of all groups, numbered in order."""
    entries = [(group, completion) for group in groups for completion in group.completions]
    return [
        ScoreItem(
            id=str(number),
            completion=completion.text,
            truncated=completion.truncated,
            columns=dict(group.columns),
            **_prompt(group),
        )
        for number, (group, completion) in enumerate(entries)
    ]


def key_from(variable: str) -> str:
    """The bearer key in an environment variable.

    Raises:
        ConfigError: it is not set, or holds what no header can; the text does not quote it.
    """
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(f"the environment variable {variable} must hold a key of visible ASCII characters")
    return key


def _is_lone(text: str) -> bool:
    """True if half a character stands in the text alone, which no JSON can hold."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _is_json(item: ScoreItem) -> bool:
    try:
        item.model_dump_json().encode()
    except (PydanticSerializationError, UnicodeEncodeError):
        return False
    return True


def _prompt(group: Group) -> dict[str, Any]:
    prompt = prompt_of(group)
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
