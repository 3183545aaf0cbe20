"""What one key has in progress, so that it cannot take all places of an engine and of those who wait for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from serving.config import LimitsConfig
from serving.keys import Role
from serving.schema import Refused

BYTES_PER_TOKEN = 4
RETRY_S = 1.0
"""What a key is told to wait that has enough in progress."""


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
    generates = "messages" in body or "prompt" in body
    answered = num_answers * min(wanted, limits.max_tokens) if generates else 0
    return RequestSize(num_answers=num_answers, num_tokens=num_bytes // BYTES_PER_TOKEN + answered)


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
    """What one key has in progress at an ingress."""

    def __init__(self, role: Role, limits: LimitsConfig) -> None:
        self.role = role
        is_admin = role == "admin"
        self._max_answers = limits.admin_answers_in_progress if is_admin else limits.answers_in_progress
        self._max_tokens = limits.admin_tokens_in_progress if is_admin else limits.tokens_in_progress
        self._num_answers = self._num_tokens = 0
        self.form_seconds = FormSeconds(0.0 if is_admin else limits.form_seconds_per_minute)

    @contextmanager
    def hold(self) -> Iterator[Callable[[RequestSize], None]]:
        """Counts a request as long as the block lasts: as one answer, until what is yielded is told its size.

        Raises:
            Refused: 429, it would be too much beside what the key has in progress; also where its size is told.
        """
        held = RequestSize(num_answers=1, num_tokens=0)
        self._add(held)

        def grow(size: RequestSize) -> None:
            nonlocal held
            self._remove(held)
            held = RequestSize(num_answers=0, num_tokens=0)
            self._add(size)
            held = size

        try:
            yield grow
        finally:
            self._remove(held)

    def check_forms(self, now: float) -> None:
        """Raises Refused (429) if the key has used up what it may spend on forms of answers."""
        if wait_s := self.form_seconds.wait_s(now):
            message = "This key has had too much time spent on compiling forms of answers. Try again later."
            raise Refused(429, message, retry_after_s=wait_s)

    def _add(self, size: RequestSize) -> None:
        self._check("answers", self._num_answers, size.num_answers, self._max_answers)
        self._check("tokens", self._num_tokens, size.num_tokens, self._max_tokens)
        self._num_answers += size.num_answers
        self._num_tokens += size.num_tokens

    def _remove(self, size: RequestSize) -> None:
        self._num_answers -= size.num_answers
        self._num_tokens -= size.num_tokens

    def _check(self, what: str, present: int, more: int, limit: int) -> None:
        if present and limit and present + more > limit:
            message = f"This key has {present} {what} in progress, and may have {limit}; this request asks for {more}."
            raise Refused(429, message, retry_after_s=RETRY_S)
