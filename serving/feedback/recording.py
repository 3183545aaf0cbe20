"""Records answers in the store. While the database is away, answers wait in files, and are stored when it is back.

answer ─► store ─► done
             └─ away, or full ─► UNSTORED/ID.json ─► again every few seconds, by any ingress that runs
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from alignment.files import write_durably
from alignment.rewards.remote import ChatMessage
from serving.feedback.store import Store
from serving.feedback.store.records import GenerationRecord, RecordedAnswer, StoreAway, StoreError, StoreFull

RETRY_S = 2.0
"""Seconds between attempts to store the answers in files."""
MAX_FILES = 50_000
"""Most answers that wait in files. Further answers are lost, which is logged and counted."""
LOG_INTERVAL_S = 60.0
"""Fewest seconds between two lines in the log."""
MAX_DELETED = 1000
"""How many of the newest deleted ids are remembered, so that nothing of them counts as pending."""
MAX_CUT = 10_000
"""How many of the newest answers that were cut off are remembered."""
STORED_S = 30.0
"""Seconds after which an answer is in the store or in a file."""

logger = logging.getLogger("ray.serve")


class Recorder:
    """Stores answers, sooner or later. It never makes a request fail."""

    def __init__(self, store: Store, folder: Path, *, on_loss: Callable[[str], None] = lambda reason: None) -> None:
        """Starts a thread that stores the answers in files.

        Args:
            folder: folder of the files; several ingresses share it.
            on_loss: is called with the reason whenever an answer is lost.
        """
        self._store = store
        self._folder = folder
        self._on_loss = on_loss
        self._next_line = 0.0
        self._deleted_ids: deque[str] = deque(maxlen=MAX_DELETED)
        self._cut_ids: OrderedDict[str, None] = OrderedDict()
        self.num_waiting = self._count()
        """Number of answers in files, as of a few seconds ago."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._retry_files, name="answers", daemon=True)
        self._thread.start()

    def record(self, group: GenerationRecord) -> None:
        """Has answers stored, and returns at once."""

        def on_done(future: Future[None]) -> None:
            error = future.exception()
            if isinstance(error, StoreAway | StoreFull):
                self._write_file(group, error)
            elif error is not None:
                self._report_loss(f"the database refused it ({type(error).__name__})", "refused")

        self._store.record(group).add_done_callback(on_done)

    def discard(self, id: str) -> bool:
        """Deletes the file of a group, so that the group is not stored after it was deleted.

        Returns:
            Whether there was a file.
        """
        self._deleted_ids.append(id)
        file = self._file(id)
        if file is None or not file.is_file():
            return False
        file.unlink(missing_ok=True)
        return True

    def cut_off(self, id: str) -> None:
        """Remembers that a group of answers was cut off before its end, so that it is never stored."""
        self._cut_ids[id] = None
        if len(self._cut_ids) > MAX_CUT:
            self._cut_ids.popitem(last=False)

    def was_cut_off(self, id: str) -> bool:
        """Returns whether an answer, or a group of answers, was cut off before its end, as far as it is remembered."""
        return id in self._cut_ids or id.rpartition("-")[0] in self._cut_ids

    def is_pending(self, id: str, age_s: float) -> bool:
        """Returns whether an answer or a group of this age may still be on its way into the store."""
        if any(id == deleted_id or id.startswith(f"{deleted_id}-") for deleted_id in self._deleted_ids):
            return False
        return age_s < STORED_S or self._count() > 0

    def close(self) -> None:
        """Ends the thread. The store stays open, and the files stay."""
        self._stop.set()
        self._thread.join()

    def _write_file(self, group: GenerationRecord, error: StoreError) -> None:
        file = self._file(group.id)
        if file is None or self.num_waiting >= MAX_FILES:
            self._report_loss("too many wait already", "too many wait")
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_durably(file, _to_json(group), mode=0o600)
        except OSError as problem:
            self._report_loss(f"it cannot be kept in {self._folder} ({problem.strerror})", "no file")
            return
        self.num_waiting += 1
        self._log(f"Answers are kept in {self._folder} until the feedback database takes them again: {error}")

    def _report_loss(self, explanation: str, reason: str) -> None:
        self._on_loss(reason)
        self._log(f"An answer was given and is not stored: {explanation}")

    def _log(self, line: str) -> None:
        """Logs a line, unless another one was logged less than `LOG_INTERVAL_S` ago."""
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LOG_INTERVAL_S
            logger.error("%s", line)

    def _retry_files(self) -> None:
        while not self._stop.wait(RETRY_S):
            files = self._files()
            self.num_waiting = len(files)
            for file in files:
                if self._stop.is_set() or not self._store_file(file):
                    break

    def _store_file(self, file: Path) -> bool:
        """Stores the answers in a file; returns whether it makes sense to continue with the next file."""
        try:
            self._store.record(_from_json(json.loads(file.read_text(encoding="utf-8")))).result(timeout=60)
        except FileNotFoundError:  # stored by another ingress, or deleted
            return True
        except (StoreAway, StoreFull, TimeoutError):
            return False
        except Exception as error:  # this file can never be stored; the next files may be
            self._report_loss(f"{file} cannot be stored ({type(error).__name__})", "refused")
            file.rename(file.with_suffix(".refused"))
            return True
        file.unlink(missing_ok=True)
        return True

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.json"))

    def _count(self) -> int:
        return sum(1 for _ in self._folder.glob("*.json"))

    def _file(self, id: str) -> Path | None:
        """Returns the file of a group; None for an id that no group has, since no file can be called so."""
        return self._folder / f"{id}.json" if id.replace("-", "").isalnum() and len(id) < 100 else None


def _to_json(group: GenerationRecord) -> bytes:
    messages = () if isinstance(group.prompt, str) else group.prompt
    json_messages = [{"role": message.role, "content": message.content} for message in messages]
    prompt = json_messages if messages else group.prompt
    return json.dumps(asdict(replace(group, prompt="")) | {"prompt": prompt}).encode()


def _from_json(values: dict[str, Any]) -> GenerationRecord:
    prompt = values["prompt"]
    if not isinstance(prompt, str):
        prompt = tuple(ChatMessage(role=message["role"], content=message["content"]) for message in prompt)
    answers = tuple(RecordedAnswer(**answer) for answer in values["answers"])
    return GenerationRecord(**values | {"prompt": prompt, "answers": answers})
