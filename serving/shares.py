"""What one key has in progress, so that it cannot take all places of an engine and of those who wait for one."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from serving.config import LimitsConfig
from serving.keys import Role
from serving.schema import Refused

BYTES_PER_TOKEN = 4
RETRY_S = 1.0
"""What a key is told to wait that has enough in progress."""
WAIT_S = 60.0
"""For which a request waits at most for others of its key to end."""
ALONE = 4
"""How many times as many answers as its key may have in progress a request may ask for that is alone."""
PAUSES = 4.0
"""How many times as long as reading a large body took its key waits with the next one."""
MAX_PAUSE_S = 2.0
"""For which it waits at most: the time may be that of a slow network."""
WORK_FIELDS = ("messages", "prompt", "items")
"""Fields of requests that an engine or a scorer works on."""


@dataclass(frozen=True, kw_only=True)
class RequestSize:
    """What a request asks of an engine at most."""

    num_answers: int
    num_tokens: int
    """Of its prompt, by its bytes, and of all its answers."""


def request_size(body: dict[str, Any], num_bytes: int, limits: LimitsConfig) -> RequestSize:
    """The size of a request whose fields were not checked yet: what is no number counts as if it were not there."""
    prompts = body.get("prompt")
    several = isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)
    num_answers = _count(body.get("n"), 1) * (len(prompts) if several and prompts else 1)
    wanted = _count(body.get("max_completion_tokens"), _count(body.get("max_tokens"), limits.max_tokens))
    answered = num_answers * min(wanted, limits.max_tokens) if "messages" in body or "prompt" in body else 0
    has_work = any(field in body for field in WORK_FIELDS)
    return RequestSize(num_answers=num_answers if has_work else 0, num_tokens=num_bytes // BYTES_PER_TOKEN + answered)


def _count(value: Any, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default


class FormSeconds:
    """A bucket of CPU seconds that fills steadily, and from which more can be taken than there is, once."""

    def __init__(self, per_minute: float) -> None:
        """`per_minute`: seconds; 0 is no limit."""
        self._size = self._level = per_minute
        self._filled = 0.0

    def spend(self, seconds: float, now: float) -> None:
        """Takes seconds out, also if there are fewer."""
        self._fill(now)
        self._level -= seconds

    def wait_s(self, now: float) -> float:
        """Seconds until there are some again; 0 if there are."""
        self._fill(now)
        return max(0.0, -self._level * 60 / self._size) if self._size else 0.0

    def _fill(self, now: float) -> None:
        self._level = min(self._size, self._level + (now - self._filled) * self._size / 60)
        self._filled = now


class KeyShare:
    """What one key has in progress at an ingress, and which of its requests wait for that to end."""

    def __init__(self, role: Role, limits: LimitsConfig) -> None:
        """`limits.answers_in_progress` has to be a number: see `ServeConfig.limits_on`."""
        self.role = role
        is_admin = role == "admin"
        max_answers = limits.admin_answers_in_progress if is_admin else limits.answers_in_progress
        assert max_answers is not None
        self._max_answers = max_answers
        self._max_tokens = limits.admin_tokens_in_progress if is_admin else limits.tokens_in_progress
        self._max_waiting = limits.requests_waiting
        self._num_requests = self._num_answers = self._num_tokens = 0
        self._queue: deque[tuple[RequestSize, asyncio.Future[None]]] = deque()
        self._large_bodies = None if is_admin else asyncio.Lock()
        self.form_seconds = FormSeconds(0.0 if is_admin else limits.form_seconds_per_minute)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for others of the key to end."""
        return len(self._queue)

    @contextmanager
    def presence(self) -> Iterator[None]:
        """Counts a request as long as the block lasts, from its first byte to the end of its answer.

        Raises:
            Refused: 429, as many of the key are here as may be in progress and wait.
        """
        if self._max_answers and self._num_requests >= self._max_answers + self._max_waiting:
            raise _too_much(f"{self._num_requests} requests here, and may have {self._max_answers} in progress")
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    @asynccontextmanager
    async def place(self, size: RequestSize, *, may_wait: bool = True) -> AsyncIterator[None]:
        """Counts what a request asks for as long as the block lasts, which begins when the key has room for it.

        Requests begin in the order in which they came. One that asks for no answers does not wait.

        Args:
            may_wait: whether it may wait for the key's others to end.

        Raises:
            Refused: 400, it asks for more answers than it may even if it is alone; 429, there is no room, and it may
                not wait, or as many wait as may, or it has waited for `WAIT_S`.
        """
        if self._max_answers and size.num_answers > ALONE * self._max_answers:
            raise Refused(
                400,
                f"The request asks for {size.num_answers} answers, and one of this key may ask for "
                f"{ALONE * self._max_answers}. Ask for fewer at a time.",
                code="integer_above_max_value",
            )
        if size.num_answers and (self._queue or not self._has_room(size)):
            if not may_wait or len(self._queue) >= self._max_waiting:
                raise self._no_room(size)
            await self._wait(size)
        else:
            self._add(size)
        try:
            yield
        finally:
            self._leave(size)

    @asynccontextmanager
    async def large_body(self, received_s: float) -> AsyncIterator[None]:
        """The key's large bodies are read in such blocks: one at a time, and with pauses, but for admins.

        So they take a fifth of the time of the ingress, and of Ray's proxy before it, at most.

        Args:
            received_s: seconds that it took to come in. It has to be here before its turn comes: what is not taken out
                of Ray Serve's queue is kept there, however much a client sends.
        """
        if self._large_bodies is None:
            yield
            return
        await self._large_bodies.acquire()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            yield
        finally:
            pause_s = PAUSES * (received_s + loop.time() - begun)
            loop.call_later(min(pause_s, MAX_PAUSE_S), self._large_bodies.release)

    def check_forms(self, now: float) -> None:
        """Raises Refused (429) if the key has used up what it may spend on forms of answers."""
        if wait_s := self.form_seconds.wait_s(now):
            message = "This key has had too much time spent on compiling forms of answers. Try again later."
            raise Refused(429, message, retry_after_s=wait_s)

    async def _wait(self, size: RequestSize) -> None:
        """Returns when the request's turn has come; it is counted then."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((size, turn))
        try:
            async with asyncio.timeout(WAIT_S):
                await turn
        except BaseException as error:  # its client is gone, or it has waited too long
            if turn.done() and not turn.cancelled():  # its turn came at the same moment
                self._leave(size)
            else:
                with suppress(ValueError):  # `_begin_next` took it out, since another one ended at the same moment
                    self._queue.remove((size, turn))
                self._begin_next()
            if isinstance(error, TimeoutError):
                raise self._no_room(size) from error
            raise

    def _leave(self, size: RequestSize) -> None:
        self._num_answers -= size.num_answers
        self._num_tokens -= size.num_tokens
        self._begin_next()

    def _begin_next(self) -> None:
        while self._queue and self._has_room(self._queue[0][0]):
            size, turn = self._queue.popleft()
            if not turn.done():
                self._add(size)
                turn.set_result(None)

    def _add(self, size: RequestSize) -> None:
        self._num_answers += size.num_answers
        self._num_tokens += size.num_tokens

    def _has_room(self, size: RequestSize) -> bool:
        return not any(present and limit and present + more > limit for _, present, more, limit in self._sums(size))

    def _no_room(self, size: RequestSize) -> Refused:
        what, present, more, limit = max(self._sums(size), key=lambda sums: (sums[1] + sums[2]) / (sums[3] or math.inf))
        return _too_much(f"{present} {what} in progress, and may have {limit}; this request asks for {more}")

    def _sums(self, size: RequestSize) -> tuple[tuple[str, int, int, int], ...]:
        return (
            ("answers", self._num_answers, size.num_answers, self._max_answers),
            ("tokens", self._num_tokens, size.num_tokens, self._max_tokens),
        )


def _too_much(what: str) -> Refused:
    return Refused(429, f"This key has {what}. Try again later.", retry_after_s=RETRY_S)
