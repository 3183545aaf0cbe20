"""What a run leaves to read beside its metrics: sampled answers, and a ledger of which prompts taught which step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SAMPLES = "samples.jsonl"
"""Held-out prompts and the model's answers, with reward, scores and divergence where they are known."""
LEDGER = "ledger.jsonl"
"""A row per step: the prompts that were answered and learned from, by which weights, and the stream's cursor."""


class Journal:
    """The journal of a run, kept by the main worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rewind(self, step: int) -> None:
        """Forgets what was written of later steps, which are done anew; of all, if no step is done."""
        for name in (SAMPLES, LEDGER):
            file = self.folder / name
            rows = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() and step else []
            whole = [row for row in rows if row.endswith("\n")]  # the last may be torn, if the process died
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text("".join(row for row in whole if json.loads(row)["step"] <= step), encoding="utf-8")
            unfinished.rename(file)

    def samples(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds answers."""
        for row in rows:
            self._append(SAMPLES, row)

    def step(self, step: int, position: int, provenance: Mapping[str, Any]) -> None:
        """Adds where the groups of a step came from."""
        self._append(LEDGER, {"step": step, "position": position, **provenance})

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
