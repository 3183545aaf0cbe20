"""Rewards from a service over HTTP, and the schema of its requests and replies (`serving.reward_server` is one).

POST {"items": [{"id", "prompt" or "messages", "completion", "truncated"?, "columns"?}]}
  ─► {"items": [{"id", "reward"} or {"id", "error"}]}                    in any order; an item may fail by itself

With a reward of null the service abstains, because it does not rate items of this kind.
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
from alignment.rewards import BuildableScorer, Reward, UnreadableTexts
from alignment.rewards.functions import EventLoopThread, prompt_of
from alignment.settings.section import MAX_REWARD, Fp32Number, NonNegative, Positive, PositiveCount

if TYPE_CHECKING:
    import torch

    from alignment.groups import Group

MAX_PAUSE_S = 30.0
"""Longest pause (seconds) before another attempt."""
RETRYABLE_STATUSES = {408, 425, 429, 500, 502, 503, 504}
"""HTTP statuses after which the same request may succeed."""
ERROR_CODE = re.compile(r"[a-z0-9_.-]{1,64}")
"""Form of an error code, which cannot quote a text."""
UNREADABLE_CODES = frozenset({"too_long", "unreadable"})
"""Error codes of a service for a text that it cannot read at any attempt."""
NO_JSON = "its text cannot be written as JSON"


class WireModel(BaseModel):
    """Base of the models of the schema; it refuses fields that are not in the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ChatMessage(WireModel):
    """One turn of a conversation."""

    role: str
    content: str


class ScoreItem(WireModel):
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
    """The columns of the row that `data.keep` names."""

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("an item has either a prompt or messages")
        return self


class ScoreRequest(WireModel):
    """The body of a request: the completions to be rated."""

    items: tuple[ScoreItem, ...] = Field(min_length=1)

    @field_validator("items")
    @classmethod
    def _check_ids(cls, items: tuple[ScoreItem, ...]) -> tuple[ScoreItem, ...]:
        if len({item.id for item in items}) < len(items):
            raise ValueError("two items have the same id")
        return items


class ScoredItem(WireModel):
    """The result of one item: either a reward or an error."""

    model_config = ConfigDict(extra="ignore")

    id: str
    reward: float | None = None
    """Higher is better; null abstains."""
    error: str | None = None
    """A short code in lower case, which must not quote the item. `too_long` and `unreadable` say that no attempt can
    rate the text."""


class ScoreReply(WireModel):
    """The body of a reply: the results of the items, in any order."""

    model_config = ConfigDict(extra="ignore")

    items: tuple[ScoredItem, ...]


class RewardService(BuildableScorer):
    """A service that rates completions, as `raylign reward-server` does."""

    name: Literal["http"] = "http"
    """A reward service over HTTP."""
    url: str
    """URL of the requests, as `http://reward:8100/score`; without a user, password or query, which would be logged."""
    key_env: str | None = None
    """Environment variable with the bearer key; every training worker must have it. None sends no key."""
    timeout_s: Positive = 60.0
    """Seconds from sending a request to the end of its answer."""
    attempts: PositiveCount = 6
    """Largest number of attempts for an item; only items without a valid reward are sent again."""
    backoff_s: NonNegative = 1.0
    """Seconds before the second attempt; each pause is twice as long, up to 30 s, less up to half of it at random."""
    batch_size: PositiveCount = 32
    """Largest number of items in a request."""
    concurrency: PositiveCount = 4
    """Largest number of requests at the same time, for each training worker."""
    on_unreadable: Literal["fail"] | Fp32Number = -3.0
    """Reward of an answer about which the service says `too_long` or `unreadable`, or that JSON cannot hold; `fail`
    stops the run instead. Of normalised rewards, about one in a thousand is below -3."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        from urllib.parse import urlsplit

        url_parts = urlsplit(url)
        if url_parts.scheme not in ("http", "https") or not url_parts.hostname or url_parts.username or url_parts.query:
            raise ValueError("must be http://HOST/PATH or https://HOST/PATH without a user, a password or a query")
        return url

    def check_row(self, columns: Mapping[str, Any]) -> None:
        """Checks that the columns can be sent.

        Raises:
            RewardError: they cannot be written as JSON.
        """
        item = ScoreItem(id="0", prompt="", completion="", columns=dict(columns))
        if not _is_json(item):
            raise RewardError(f"the kept columns ({', '.join(sorted(columns))}) cannot be written as JSON")

    def build(self, device: torch.device) -> ServiceScorer:
        """Builds the scorer; the device is not used.

        Raises:
            ConfigError: the environment variable of the key is not set, or holds no key.
        """
        return ServiceScorer(self)


class ServiceScorer:
    """Asks a reward service for rewards, and again for the items that it did not rate."""

    def __init__(self, config: RewardService) -> None:
        """Makes the client; connections are opened later.

        Raises:
            ConfigError: the environment variable of the key is not set, or holds no key.
        """
        import httpx

        self.config = config
        headers = {"Content-Type": "application/json"}
        if config.key_env:
            headers["Authorization"] = f"Bearer {key_from(config.key_env)}"
        self.unreadable = UnreadableTexts(config)
        # `_request_scores` has a timeout for the whole request; httpx has timeouts for single packets.
        self._client = httpx.AsyncClient(headers=headers, timeout=None)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._rng = random.Random()  # not the run's generator: a pause must not change what is trained on
        self._loop = EventLoopThread("reward service")

    def score(self, groups: list[Group]) -> list[list[Reward]]:
        """Scores as `Scorer.score` says; this class itself asks again for single items.

        Raises:
            RewardError: the service refuses requests, or a completion has no reward after all attempts.
        """
        results = self._loop.run(self._score_items(items_of(groups)))
        result_iterator = iter(results)
        results_by_group = [[next(result_iterator) for _ in group.completions] for group in groups]
        for group, group_results in zip(groups, results_by_group, strict=True):
            for number, result in enumerate(group_results, start=1):
                if result.problem:
                    num_failed = sum(bool(result.problem) for result in results)
                    raise RewardError(
                        f"group {group.id}, completion {number} of {len(group_results)}: {result.problem} "
                        f"({num_failed} of {len(results)} completions are without a reward after "
                        f"{self.config.attempts} attempts)"
                    )
        return [
            [
                self.unreadable.reward(
                    f"group {group.id}, completion {number} of {len(group_results)}: {result.unreadable}"
                )
                if result.unreadable
                else result.reward
                for number, result in enumerate(group_results, start=1)
            ]
            for group, group_results in zip(groups, results_by_group, strict=True)
        ]

    def close(self) -> None:
        """Closes the connections."""
        self._loop.run(self._client.aclose())
        self._loop.close()

    async def _score_items(self, items: list[ScoreItem]) -> list[ItemResult]:
        """The results of all items, in their order, after as many attempts as needed and allowed."""
        results = [
            ItemResult(unreadable=NO_JSON)
            if _has_lone_surrogate(item.completion)
            else ItemResult(problem="it was not asked about")
            for item in items
        ]
        for attempt in range(self.config.attempts):
            pending_indices = [index for index, result in enumerate(results) if result.problem]
            if not pending_indices:
                break
            if attempt:
                await asyncio.sleep(self._pause(attempt))
            size = self.config.batch_size
            batches = [pending_indices[start : start + size] for start in range(0, len(pending_indices), size)]
            requests = [self._request_scores([items[index] for index in batch]) for batch in batches]
            # All requests end before an error of one is raised, so that none is left in the event loop.
            for batch, batch_results in zip(
                batches, await asyncio.gather(*requests, return_exceptions=True), strict=True
            ):
                if isinstance(batch_results, BaseException):
                    raise batch_results
                for index, result in zip(batch, batch_results, strict=True):
                    results[index] = result
        return results

    async def _request_scores(self, items: list[ScoreItem]) -> list[ItemResult]:
        try:
            async with self._slots, asyncio.timeout(self.config.timeout_s):
                replies = await self._post(ScoreRequest(items=tuple(items)))
        except TimeoutError:
            return [ItemResult(problem=f"there was no answer within {self.config.timeout_s:g} s")] * len(items)
        except _RetryableError as error:
            return [ItemResult(problem=str(error))] * len(items)
        by_id: dict[str, list[ScoredItem]] = {}
        for reply in replies.items:
            by_id.setdefault(reply.id, []).append(reply)
        return [ItemResult.from_replies(by_id.get(item.id, [])) for item in items]

    async def _post(self, request: ScoreRequest) -> ScoreReply:
        import httpx

        try:
            body = request.model_dump_json(exclude_none=True).encode()
        except (PydanticSerializationError, UnicodeEncodeError):  # these errors quote the text
            raise RewardError("a prompt or a kept column cannot be written as JSON") from None
        try:
            response = await self._client.post(self.config.url, content=body)
        except httpx.RequestError as error:
            raise _RetryableError(f"the connection failed ({type(error).__name__})") from error
        if response.status_code in RETRYABLE_STATUSES:
            raise _RetryableError(f"the service answered with HTTP status {response.status_code}")
        if response.status_code != 200:
            raise RewardError(f"the service refuses requests with HTTP status {response.status_code}")
        try:
            return ScoreReply.model_validate_json(response.content)
        except ValidationError as error:
            # Without the cause: it quotes the reply, and the reply may quote the request.
            raise _RetryableError(f"the answer is not in the schema ({error.error_count()} problems)") from None

    def _pause(self, attempt: int) -> float:
        longest = min(MAX_PAUSE_S, self.config.backoff_s * 2.0 ** (attempt - 1))
        return longest * self._rng.uniform(0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """The result of an item, after its reply was checked."""

    reward: Reward = None
    """The reward; None if the service abstains, or there is a problem."""
    problem: str = ""
    """Why there is no reward yet, in words that do not quote the item; empty without a problem."""
    unreadable: str = ""
    """Why no attempt can give a reward; empty if one may."""

    @classmethod
    def from_replies(cls, replies: list[ScoredItem]) -> ItemResult:
        """Checks the replies of a service to one item, of which there must be exactly one."""
        if len(replies) != 1:
            return cls(problem="the service left it out" if not replies else "the service answered it twice")
        (reply,) = replies
        if reply.error is not None:
            if reply.error in UNREADABLE_CODES:
                return cls(unreadable=f"the service says {reply.error}")
            is_code = ERROR_CODE.fullmatch(reply.error)
            return cls(problem=f"the service says {reply.error}" if is_code else "the service refused it")
        if reply.reward is None:
            return cls() if "reward" in reply.model_fields_set else cls(problem="the service left its reward out")
        if not abs(reply.reward) <= MAX_REWARD:
            return cls(problem=f"the reward is {reply.reward}, not a number")
        return cls(reward=reply.reward)


class _RetryableError(Exception):
    """A request failed for a reason that may pass."""


def items_of(groups: list[Group]) -> list[ScoreItem]:
    """All completions of all groups as items, numbered in order."""
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
    """Returns the bearer key in an environment variable.

    Raises:
        ConfigError: it is not set, or holds characters that no header can have; the text does not quote them.
    """
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(f"the environment variable {variable} must hold a key of visible ASCII characters")
    return key


def _has_lone_surrogate(text: str) -> bool:
    """True if the text has a lone surrogate, which JSON cannot hold."""
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


SCORERS: dict[str, type[BuildableScorer]] = {"http": RewardService}
"""The scorers of this module, by the names that configurations have for them."""
