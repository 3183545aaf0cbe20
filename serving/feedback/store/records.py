"""The records of the feedback database: the answers that the service gave, and what people said about them.

group (a prompt and its answers) ─► feedback ─► training rows, which `alignment.data` reads
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
    from serving.feedback.keys import Role

FeedbackKind = Literal["choice", "thumb", "ranking", "correction"]


class StoreError(ServingError):
    """The store could not store or find something. The text quotes no prompt and no answer."""


class UnknownId(StoreError):
    """The service has issued nothing under this id, or it was deleted later."""


class UnknownIndex(UnknownId):
    """The service has issued the group of answers, and no answer with this index in it."""


class Conflict(StoreError):
    """An idempotency key came a second time with another content, or there is already a key of this name."""


class BadVerdict(StoreError):
    """A verdict that does not fit its target, as a choice between three answers."""


class StoreFull(StoreError):
    """The database has no space left, and nothing of this was stored."""


class StoreAway(StoreError):
    """The database does not answer, or too much waits for it. Nobody knows whether this was stored: send it again."""


class MessageLike(Protocol):
    """One message of a conversation, of whichever class: `alignment.groups.Message`, or a request's own."""

    @property
    def role(self) -> str:
        """Who wrote the message: `system`, `user` or `assistant`."""
        ...

    @property
    def content(self) -> str:
        """The text of the message."""
        ...


@dataclass(frozen=True, kw_only=True)
class RecordedAnswer:
    """One answer of the service, as it is stored."""

    id: str
    """`{id of the group}-{index}`; the index begins at 0."""
    text: str
    version: int
    """Number of the model version that gave the answer."""
    model: str
    """Name of the model, as clients know it."""
    finish_reason: str | None
    """OpenAI's: `stop`, `length` …"""


@dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """A prompt and the answers that the service gave to it: a group."""

    id: str
    kind: Literal["chat", "completion", "comparison"]
    prompt: str | tuple[MessageLike, ...]
    """Plain text, or the messages before the answer."""
    answers: tuple[RecordedAnswer, ...]
    """In the order of their indices."""
    asked_by: str
    """Name of the key that the request came with."""
    created: float
    """UTC, Unix seconds."""
    recorded: bool
    """False keeps prompt and texts out of the database: only ids and versions are stored."""
    reason: str | None = None
    """Why texts are not kept, as a sentence for people; None if they are kept."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[!-~]{1,200}", self.id):
            raise ValueError(f"{self.id!r} is no id: it must be 1 to 200 visible ASCII characters")
        ids = [f"{self.id}-{index}" for index in range(max(1, len(self.answers)))]
        if [answer.id for answer in self.answers] != ids:
            raise ValueError(f"the answers of {self.id} must be one at least, called {self.id}-0, {self.id}-1 …")

    @property
    def size(self) -> int:
        """Number of characters of all its texts."""
        prompt = len(self.prompt) if isinstance(self.prompt, str) else sum(len(turn.content) for turn in self.prompt)
        return prompt + sum(len(answer.text) for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Says which of two answers is better."""

    kind: ClassVar[FeedbackKind] = "choice"
    winner: str
    """Id of an answer, `tie` or `both_bad`."""


@dataclass(frozen=True, kw_only=True)
class Thumb:
    """Says whether one answer is good."""

    kind: ClassVar[FeedbackKind] = "thumb"
    up: bool


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Puts all answers of a group in order."""

    kind: ClassVar[FeedbackKind] = "ranking"
    order: tuple[str, ...]
    """Ids of all its answers, the best first."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Says what the answer should have been."""

    kind: ClassVar[FeedbackKind] = "correction"
    text: str


Verdict = Choice | Thumb | Ranking | Correction


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What a person said about an answer, or about the answers of a group."""

    target: str
    """Id of a group for a choice or a ranking; for the others, id of an answer or of a group with one answer."""
    verdict: Verdict
    labeller: str
    """Name of the key that the person used."""
    comment: str | None = None
    """Is not kept where the target's texts are not kept."""
    key: str | None = None
    """Idempotency key of the labeller: 1 to 200 printable ASCII characters."""

    def __post_init__(self) -> None:
        if self.key is not None and not re.fullmatch(r"[ -~]{1,200}", self.key):
            raise BadVerdict("an idempotency key must be 1 to 200 printable ASCII characters")

    @property
    def size(self) -> int:
        """Number of characters of its texts."""
        correction = len(self.verdict.text) if isinstance(self.verdict, Correction) else 0
        return correction + len(self.comment or "")


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Proof that feedback is on the disk."""

    id: str
    """`jdg-` and a number."""
    kind: FeedbackKind
    target: str
    """Id of the group or answer that it is about."""
    created: float
    """UTC, Unix seconds, by the clock of the service."""
    replaces: str | None
    """Id of the same labeller's earlier feedback that it supersedes."""
    note: str | None = None
    """Why nothing can be learned from it, where the target's texts are not kept."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far people agree: over all pairs of choices that two people made about the same comparison."""

    pairs: int
    agreed: int
    """Pairs whose two choices are the same."""
    rate: float | None
    """agreed / pairs; None without a pair."""


@dataclass(frozen=True, kw_only=True)
class Wins:
    """Choices between a version and other versions; `ties` are choices for neither answer."""

    wins: int
    losses: int
    ties: int


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counts of what is stored. Superseded feedback is not counted."""

    answers: int
    comparisons: int
    judged: int
    """Comparisons with at least one choice."""
    by_kind: dict[str, int]
    by_labeller: dict[str, int]
    agreement: Agreement
    wins_by_version: dict[int, Wins]
    """Only comparisons of two different versions are counted."""


@dataclass(frozen=True, kw_only=True)
class StoredKey:
    """A bearer key as it is stored, without its secret."""

    id: str
    name: str
    role: Role
    digest: str
    """SHA-256 of the secret, in hex."""
    created: float
    """UTC, Unix seconds."""
    revoked: float | None = None
    """UTC, Unix seconds; None while it is not revoked."""
    expires: float | None = None
    """UTC, Unix seconds; None if it never expires."""

    def is_valid(self, timestamp: float) -> bool:
        """Returns whether the key is valid at a time (UTC, Unix seconds)."""
        return self.revoked is None and (self.expires is None or timestamp < self.expires)


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """An entry of the audit trail: who did what to the service."""

    id: str = field(default_factory=lambda: f"aud-{uuid.uuid4().hex}")
    created: float = field(default_factory=time.time)
    """UTC, Unix seconds."""
    action: str
    """For example `promote` or `create key`."""
    who: str
    """The name of a key; for a command, the operating system's user@host."""
    address: str | None = None
    """IP address that the request came from; None for a command."""
    detail: dict[str, Any] = field(default_factory=dict)
    """What was changed, and the result. It holds no text of a prompt or an answer, and no key."""


def operator() -> str:
    """Returns who runs this process: the operating system's user, and the machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
