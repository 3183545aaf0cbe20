"""Answers on their way into the store: kept in files while the database is away, and stored when it is back.

answer ─► store ─► done
             └─ away, or full ─► UNSTORED/ID.json ─► again every few seconds, by whichever ingress lives
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from alignment.rewards.remote import ChatMessage
from serving.files import write_whole
from serving.store import Store
from serving.store.records import Issued, IssuedAnswer, StoreAway, StoreError, StoreFull

RETRY_S = 2.0
"""Seconds between attempts to store what has become a file."""
MAX_FILES = 50_000
"""Answers that wait in files; further ones are lost, which is logged and counted."""
SAY_EVERY_S = 60.0
"""Seconds between two lines in the log about the same."""
MAX_DELETED = 1000
"""Ids that were deleted lately, of which nothing is on its way any more."""
STORED_S = 30.0
"""Seconds after which an answer is in the store, or waits in a file."""

logger = logging.getLogger("ray.serve")


class Recorder:
    """Has answers stored, sooner or later, and never fails a request."""

    def __init__(self, store: Store, folder: Path, *, on_loss: Callable[[str], None] = lambda reason: None) -> None:
        """
        Args:
            folder: of the files; several ingresses share it.
            on_loss: is told why an answer was lost.
        """
        self._store = store
        self._folder = folder
        self._on_loss = on_loss
        self._next_line = 0.0
        self._deleted: deque[str] = deque(maxlen=MAX_DELETED)
        self.num_waiting = self._count()
        """Answers in files, as of a few seconds ago."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._retry, name="answers", daemon=True)
        self._thread.start()

    def record(self, issued: Issued) -> None:
        """Has an answer stored; nobody waits for it."""

        def settled(future: Future[None]) -> None:
            error = future.exception()
            if isinstance(error, StoreAway | StoreFull):
                self._keep(issued, error)
            elif error is not None:
                self._lose(f"the database refused it ({type(error).__name__})", "refused")

        self._store.record(issued).add_done_callback(settled)

    def forget(self, id: str) -> bool:
        """Deletes what waits of a group, so that it is not stored after it was deleted; True if something did."""
        self._deleted.append(id)
        file = self._file(id)
        if file is None or not file.is_file():
            return False
        file.unlink(missing_ok=True)
        return True

    def may_come(self, id: str, age_s: float) -> bool:
        """Whether an answer, or its group, that was issued so long ago may still be on its way into the store."""
        if any(id == deleted or id.startswith(f"{deleted}-") for deleted in self._deleted):
            return False
        return age_s < STORED_S or self._count() > 0

    def close(self) -> None:
        """Ends the retries; the store stays open, and what waits stays in its files."""
        self._done.set()
        self._thread.join()

    def _keep(self, issued: Issued, error: StoreError) -> None:
        file = self._file(issued.id)
        if file is None or self.num_waiting >= MAX_FILES:
            self._lose("too many wait already", "too many wait")
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(file, _as_json(issued))
        except OSError as problem:
            self._lose(f"it cannot be kept in {self._folder} ({problem.strerror})", "no file")
            return
        self.num_waiting += 1
        self._say(f"Answers are kept in {self._folder} until the feedback database takes them again: {error}")

    def _lose(self, why: str, reason: str) -> None:
        self._on_loss(reason)
        self._say(f"An answer was given and is not stored: {why}")

    def _say(self, line: str) -> None:
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SAY_EVERY_S
            logger.error("%s", line)

    def _retry(self) -> None:
        while not self._done.wait(RETRY_S):
            files = self._files()
            self.num_waiting = len(files)
            for file in files:
                if self._done.is_set() or not self._stored(file):
                    break

    def _stored(self, file: Path) -> bool:
        """Whether it makes sense to go on with the next file."""
        try:
            self._store.record(_issued(json.loads(file.read_text(encoding="utf-8")))).result(timeout=60)
        except FileNotFoundError:  # stored by another ingress, or deleted
            return True
        except (StoreAway, StoreFull, TimeoutError):
            return False
        except Exception as error:  # this one never goes in; the next ones may
            self._lose(f"{file} cannot be stored ({type(error).__name__})", "refused")
            file.rename(file.with_suffix(".refused"))
            return True
        file.unlink(missing_ok=True)
        return True

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.json"))

    def _count(self) -> int:
        return sum(1 for _ in self._folder.glob("*.json"))

    def _file(self, id: str) -> Path | None:
        """Where an answer waits; None for an id that is no name of a file, which are never ours."""
        return self._folder / f"{id}.json" if id.replace("-", "").isalnum() and len(id) < 100 else None


def _as_json(issued: Issued) -> bytes:
    turns = () if isinstance(issued.prompt, str) else issued.prompt
    prompt = issued.prompt if not turns else [{"role": turn.role, "content": turn.content} for turn in turns]
    return json.dumps(asdict(replace(issued, prompt="")) | {"prompt": prompt}).encode()


def _issued(values: dict[str, Any]) -> Issued:
    prompt = values["prompt"]
    if not isinstance(prompt, str):
        prompt = tuple(ChatMessage(role=turn["role"], content=turn["content"]) for turn in prompt)
    answers = tuple(IssuedAnswer(**answer) for answer in values["answers"])
    return Issued(**values | {"prompt": prompt, "answers": answers})
