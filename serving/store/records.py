"""What the service remembers of the circle's last stretch: the answers that it gave, and what people said about them.

group (issued) ─► answers ─► judgements ─► training rows, which `alignment.data` reads
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from alignment.errors import ServingError

if TYPE_CHECKING:
    from serving.keys import Role

Kind = Literal["choice", "thumb", "ranking", "correction"]


class StoreError(ServingError):
    """Something was not stored, or not found; the text quotes no prompt and no answer."""


class UnknownId(StoreError):
    """The service has issued nothing under this id, or it was deleted since."""


class Conflict(StoreError):
    """An idempotency key came again with another content, or the name of a key is taken."""


class BadVerdict(StoreError):
    """A verdict that does not fit its target, as a choice between three answers."""


class StoreFull(StoreError):
    """The database has no space left, and nothing of this was stored."""


class StoreAway(StoreError):
    """The database does not answer, or too much waits for it; whether this was stored is not known, so ask again."""


class Turn(Protocol):
    """One message of a conversation, as `alignment.types.Message` (which needs torch, and this does not)."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class IssuedAnswer:
    """One answer of the service."""

    id: str
    """`{id of the group}-{index}`, the index from 0."""
    text: str
    version: int
    """Number of the model version that gave it."""
    model: str
    """Name of the model, as clients know it."""
    finish_reason: str | None
    """OpenAI's: `stop`, `length` …"""


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A prompt and the answers that the service gave to it."""

    id: str
    kind: Literal["chat", "completion", "comparison"]
    prompt: str | tuple[Turn, ...]
    """Plain text, or the turns before the answer."""
    answers: tuple[IssuedAnswer, ...]
    """In the order of their indices."""
    asked_by: str
    """Name of the key."""
    created: float
    """UTC, Unix seconds."""
    recorded: bool
    """False keeps prompt and texts out of the database: ids and versions alone are stored."""
    reason: str | None = None
    """Why texts are not kept, in words for people; None if they are."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[!-~]{1,200}", self.id):
            raise ValueError(f"{self.id!r} is no id: it must be 1 to 200 visible ASCII characters")
        ids = [f"{self.id}-{index}" for index in range(max(1, len(self.answers)))]
        if [answer.id for answer in self.answers] != ids:
            raise ValueError(f"the answers of {self.id} must be one at least, called {self.id}-0, {self.id}-1 …")

    @property
    def size(self) -> int:
        """Characters of all its texts."""
        prompt = len(self.prompt) if isinstance(self.prompt, str) else sum(len(turn.content) for turn in self.prompt)
        return prompt + sum(len(answer.text) for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which of two answers is better."""

    kind: ClassVar[Kind] = "choice"
    winner: str
    """Id of an answer, `tie` or `both_bad`."""


@dataclass(frozen=True, kw_only=True)
class Thumb:
    """Whether one answer is good."""

    kind: ClassVar[Kind] = "thumb"
    up: bool


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """All answers of a group in order."""

    kind: ClassVar[Kind] = "ranking"
    order: tuple[str, ...]
    """Ids of all its answers, the best first."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What the answer should have been."""

    kind: ClassVar[Kind] = "correction"
    text: str


Verdict = Choice | Thumb | Ranking | Correction


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a person said."""

    target: str
    """Id of a group for a choice or a ranking; of an answer, or of a group with one answer, for the others."""
    verdict: Verdict
    labeller: str
    """Name of the key."""
    comment: str | None = None
    """Is not kept where the target's texts are not."""
    key: str | None = None
    """Idempotency key, 1 to 200 printable ASCII characters; belongs to the labeller."""

    def __post_init__(self) -> None:
        if self.key is not None and not re.fullmatch(r"[ -~]{1,200}", self.key):
            raise BadVerdict("an idempotency key must be 1 to 200 printable ASCII characters")

    @property
    def size(self) -> int:
        """Characters of its texts."""
        correction = len(self.verdict.text) if isinstance(self.verdict, Correction) else 0
        return correction + len(self.comment or "")


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Proof that a judgement is on the disk."""

    id: str
    """`jdg-…`"""
    kind: Kind
    target: str
    """Id of the group or answer that it is about."""
    created: float
    """UTC, Unix seconds, by the clock of the service."""
    replaces: str | None
    """Id of the same labeller's earlier verdict that it supersedes."""
    note: str | None = None
    """Why nothing can be learned from it, where the texts of its target are not kept."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Over all pairs of choices that two people made about the same comparison."""

    pairs: int
    agreed: int
    rate: float | None
    """agreed / pairs; None without a pair."""


@dataclass(frozen=True, kw_only=True)
class Wins:
    """Choices between a version and another one; `ties` are those for neither of them."""

    wins: int
    losses: int
    ties: int


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counts of what is stored; superseded judgements count nowhere."""

    answers: int
    comparisons: int
    judged: int
    """Comparisons with a choice at least."""
    by_kind: dict[str, int]
    by_labeller: dict[str, int]
    agreement: Agreement
    wins_by_version: dict[int, Wins]
    """Only comparisons of two different versions count."""


@dataclass(frozen=True, kw_only=True)
class StoredKey:
    """A bearer key as it is kept: without its secret."""

    id: str
    name: str
    role: Role
    digest: str
    """SHA-256 of the secret, in hex."""
    created: float
    """UTC, Unix seconds."""
    revoked: float | None = None
    """The same; None while it is valid."""
    expires: float | None = None
    """The same; None is never."""

    def is_valid(self, now: float) -> bool:
        """Whether it lets in at a time (UTC, Unix seconds)."""
        return self.revoked is None and (self.expires is None or now < self.expires)


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """Who did what to the service."""

    id: str = field(default_factory=lambda: f"aud-{uuid.uuid4().hex}")
    created: float = field(default_factory=time.time)
    """UTC, Unix seconds."""
    action: str
    """As `promote` or `create key`."""
    who: str
    """The name of a key; of a command, the operating system's user@host."""
    address: str | None = None
    """IP address that the request came from; None of a command."""
    detail: dict[str, Any] = field(default_factory=dict)
    """What it was done to, and what came of it; holds no text of a prompt or an answer, and no key."""


def operator() -> str:
    """Who runs this process: the operating system's user, and the machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
