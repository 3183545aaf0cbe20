"""What one key has in progress. It is limited, so that no key takes all of an engine and of the queue before it."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from serving.config import LimitsConfig
from serving.feedback.keys import Role
from serving.schema import RequestError

BYTES_PER_TOKEN = 4
ACTIVE_S = 10.0
"""For so many seconds after an answer its key counts as one that asks."""
CHECK_S = 1.0
"""Seconds between two looks whether a request that waits may begin, since fewer keys ask now."""
RETRY_S = 1.0
"""After how many seconds a key that has enough in progress is told to ask again."""
WAIT_S = 60.0
"""Most seconds that a request waits for others of its key to end."""
ALONE_FACTOR = 4
"""A request that is alone may ask for so many times the answers that its key may have in progress."""
PAUSE_FACTOR = 9.0
"""A key waits so many times the time that reading its large body took before its next large body is read."""
MAX_PAUSE_S = 2.0
"""Most seconds of this pause: the time may be that of a slow network."""
REFUSAL_DELAY_S = 0.5
"""Seconds before the answer 429, for each request of the key that is being refused: a client that sends again at once
costs less time."""
MAX_REFUSAL_DELAY_S = 5.0
"""Most seconds before the answer 429."""
WORK_FIELDS = ("messages", "prompt", "items")
"""Fields of the requests that an engine or a scorer works on."""


@dataclass(frozen=True, kw_only=True)
class RequestSize:
    """What a request asks of an engine at most."""

    num_answers: int
    num_tokens: int
    """Tokens of the prompt, estimated by its bytes, and of all answers."""


def request_size(body: dict[str, Any], num_bytes: int, limits: LimitsConfig) -> RequestSize:
    """Returns the size of a request whose fields are not checked yet: a value that is no number counts as absent."""
    prompts = body.get("prompt")
    has_many_prompts = isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)
    num_answers = _count(body.get("n"), 1) * (len(prompts) if prompts and has_many_prompts else 1)
    max_tokens = _count(body.get("max_completion_tokens"), _count(body.get("max_tokens"), limits.max_tokens))
    num_answer_tokens = (
        num_answers * min(max_tokens, limits.max_tokens) if "messages" in body or "prompt" in body else 0
    )
    has_work = any(field in body for field in WORK_FIELDS)
    return RequestSize(
        num_answers=num_answers if has_work else 0, num_tokens=num_bytes // BYTES_PER_TOKEN + num_answer_tokens
    )


def _count(value: Any, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default


class Rate:
    """A bucket of requests that fills steadily: it allows so many per minute, and that many at once after a pause."""

    def __init__(self, per_minute: int) -> None:
        """`per_minute`: requests."""
        self._size = float(per_minute)
        self._level = self._size
        self._filled_at = 0.0

    def take(self, time_s: float) -> float:
        """Takes one request out of the bucket.

        Args:
            time_s: seconds of a clock that never goes back.

        Returns:
            The seconds to wait if the bucket is empty, else 0.
        """
        if self._filled_at:
            self._level = min(self._size, self._level + (time_s - self._filled_at) * self._size / 60)
        self._filled_at = time_s
        if self._level < 1:
            return (1 - self._level) * 60 / self._size
        self._level -= 1
        return 0.0


class FormSeconds:
    """A bucket of CPU seconds that fills steadily. One may take out more than there is, and then has to wait for it."""

    def __init__(self, per_minute: float) -> None:
        """`per_minute`: CPU seconds; 0 is no limit."""
        self._size = self._level = per_minute
        self._filled_at = 0.0

    def spend(self, seconds: float, time_s: float) -> None:
        """Takes CPU seconds out, also if there are fewer. `time_s`: seconds of a clock that never goes back."""
        self._fill(time_s)
        self._level -= seconds

    def wait_s(self, time_s: float) -> float:
        """Returns the seconds until the bucket is not empty any more; 0 if it is not."""
        self._fill(time_s)
        return max(0.0, -self._level * 60 / self._size) if self._size else 0.0

    def _fill(self, time_s: float) -> None:
        self._level = min(self._size, self._level + (time_s - self._filled_at) * self._size / 60)
        self._filled_at = time_s


class ActiveKeys:
    """The keys that ask for answers: those whose requests are here, or were within the last `ACTIVE_S` seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: returns seconds that never go back."""
        self._clock = clock
        self._num_requests: Counter[str] = Counter()
        self._ends: OrderedDict[str, float] = OrderedDict()
        """When the last request of a key ended that has none here."""

    @contextmanager
    def presence(self, name: str) -> Iterator[None]:
        """Counts a key as long as the block lasts, and some seconds longer."""
        self._num_requests[name] += 1
        self._ends.pop(name, None)
        try:
            yield
        finally:
            self._num_requests[name] -= 1
            if not self._num_requests[name]:
                del self._num_requests[name]
                self._ends[name] = self._clock()

    def count(self) -> int:
        """Returns how many keys there are."""
        while self._ends and next(iter(self._ends.values())) < self._clock() - ACTIVE_S:
            self._ends.popitem(last=False)
        return len(self._num_requests) + len(self._ends)


class KeyShare:
    """What one key has in progress at an ingress, and which of its requests wait for that to end."""

    def __init__(self, name: str, role: Role, limits: LimitsConfig, active_keys: ActiveKeys) -> None:
        """
        Args:
            name: name of the key.
            limits: `answers_in_progress` has to be a number (see `ServeConfig.limits_on`).
            active_keys: the keys that ask, among which the replicas' answers are divided.
        """
        self._name = name
        self.role = role
        is_admin = role == "admin"
        max_answers = limits.admin_answers_in_progress if is_admin else limits.answers_in_progress
        assert max_answers is not None
        self._max_answers = max_answers
        self._answers_at_once = 0 if is_admin else limits.answers_at_once or 0
        self._active_keys = active_keys
        self._max_tokens = limits.admin_tokens_in_progress if is_admin else limits.tokens_in_progress
        self._max_waiting = limits.requests_waiting
        self._num_requests = self._num_answers = self._num_tokens = self._num_refused = 0
        self._queue: deque[tuple[RequestSize, asyncio.Future[None]]] = deque()
        self._large_bodies = None if is_admin else asyncio.Lock()
        self.form_seconds = FormSeconds(0.0 if is_admin else limits.form_seconds_per_minute)

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait for others of the key to end."""
        return len(self._queue)

    @contextmanager
    def presence(self) -> Iterator[None]:
        """Counts a request as long as the block lasts, from its first byte to the end of its answer.

        Raises:
            RequestError: 429, the key has as many requests here as may be in progress and wait.
        """
        if self._max_answers and self._num_requests >= self._max_answers + self._max_waiting:
            limit = self._current_max_answers()
            raise _too_much(f"{self._num_requests} requests here, and may have {limit} answers in progress")
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    @asynccontextmanager
    async def slot(self, size: RequestSize, *, may_wait: bool = True) -> AsyncIterator[None]:
        """Waits until the key has room for a request, and counts what it asks for as long as the block lasts.

        Requests begin in the order in which they came. A request that asks for no answers does not wait.

        Args:
            may_wait: whether the request may wait for others of the key to end.

        Raises:
            RequestError: 400, it asks for more answers than a request may that is alone; 429, there is no room, and it
                may not wait, or too many requests wait already, or it has waited for `WAIT_S`.
        """
        max_answers = ALONE_FACTOR * self._max_answers
        if self._max_answers and size.num_answers > max_answers:
            raise RequestError(
                400,
                f"The request asks for {size.num_answers} answers, and one of this key may ask for "
                f"{max_answers}. Ask for fewer at a time.",
                code="integer_above_max_value",
            )
        with self._active_keys.presence(self._name) if size.num_answers else nullcontext():
            self._begin_next()  # there may be more room, since fewer keys ask
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
        """Lets one large body of the key be parsed at a time, with pauses between them; admins do not wait.

        So large bodies take about a tenth of the time of the ingress, and of Ray's proxy before it.

        Args:
            received_s: seconds that receiving the body took. The body is received before its turn comes: Ray Serve's
                queue would keep everything that a client sends and nobody takes out.
        """
        if self._large_bodies is None:
            yield
            return
        await self._large_bodies.acquire()
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            yield
        finally:
            pause_s = PAUSE_FACTOR * (received_s + loop.time() - start)
            loop.call_later(min(pause_s, MAX_PAUSE_S), self._large_bodies.release)

    async def delay_refusal(self) -> None:
        """Lets time pass before a request of the key is refused: more if others of it are being refused too."""
        self._num_refused += 1
        try:
            await asyncio.sleep(refusal_delay_s(self._num_refused))
        finally:
            self._num_refused -= 1

    def check_forms(self, time_s: float) -> None:
        """Checks that the key may have another form of answers compiled.

        Raises:
            RequestError: 429, the key has used up the CPU seconds that it may spend on forms.
        """
        if wait_s := self.form_seconds.wait_s(time_s):
            message = "This key has had too much time spent on compiling forms of answers. Try again later."
            raise RequestError(429, message, retry_after_s=wait_s)

    async def _wait(self, size: RequestSize) -> None:
        """Returns when the request's turn has come; it is counted from then on."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((size, turn))
        try:
            async with asyncio.timeout(WAIT_S):
                while not (await asyncio.wait({turn}, timeout=CHECK_S))[0]:
                    self._begin_next()
        except BaseException as error:  # the client is gone, or the request has waited too long
            if turn.done() and not turn.cancelled():  # its turn came at the same moment
                self._leave(size)
            else:
                with suppress(ValueError):  # `_begin_next` took it out, since another request ended at this moment
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
        return all(quota.has_room for quota in self._quotas(size))

    def _no_room(self, size: RequestSize) -> RequestError:
        quota = max(self._quotas(size), key=lambda quota: quota.load)
        return _too_much(
            f"{quota.num_in_progress} {quota.unit} in progress, and may have {quota.limit}; "
            f"this request asks for {quota.num_requested}"
        )

    def _current_max_answers(self) -> int:
        """Returns how many answers the key may have in progress beside the other keys that ask; 0 is no limit."""
        if not self._max_answers or not self._answers_at_once:
            return self._max_answers
        return min(self._max_answers, max(1, self._answers_at_once // max(1, self._active_keys.count())))

    def _quotas(self, size: RequestSize) -> tuple[_Quota, _Quota]:
        """Returns the key's two quotas with what a request would add to them."""
        return (
            _Quota("answers", self._num_answers, size.num_answers, self._current_max_answers()),
            _Quota("tokens", self._num_tokens, size.num_tokens, self._max_tokens),
        )


class _Quota(NamedTuple):
    """What a key has in progress of one thing, and what a request adds."""

    unit: str
    num_in_progress: int
    num_requested: int
    limit: int
    """0 is no limit."""

    @property
    def has_room(self) -> bool:
        """Whether the request may begin. A request that is alone always may."""
        return not (self.num_in_progress and self.limit and self.num_in_progress + self.num_requested > self.limit)

    @property
    def load(self) -> float:
        """Fraction of the limit that would be in progress."""
        return (self.num_in_progress + self.num_requested) / (self.limit or math.inf)


def refusal_delay_s(num_refused: int) -> float:
    """Returns the seconds before a request is refused. `num_refused`: its key's requests that are being refused."""
    return min(num_refused * REFUSAL_DELAY_S, MAX_REFUSAL_DELAY_S)


def _too_much(present: str) -> RequestError:
    return RequestError(429, f"This key has {present}. Try again later.", retry_after_s=RETRY_S)
