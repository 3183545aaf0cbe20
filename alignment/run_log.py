"""The log of a run beside its metrics: sampled answers, and which prompts each step was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alignment.files import replace_atomically

SAMPLES = "samples.jsonl"
"""Held-out prompts and the model's answers, with reward, scores and divergence if they are known."""
PROVENANCE = "provenance.jsonl"
"""One row for each step: the prompts that it was trained on, the versions of the weights that answered them, and the
stream's position."""
OLD_PROVENANCE = "ledger.jsonl"
"""The file's name in runs of earlier releases."""


class RunLog:
    """Writes the log of a run. Only the main worker has one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def truncate_after(self, step: int) -> None:
        """Deletes the rows of later steps, which are done again; for step 0 all rows."""
        if (self.folder / OLD_PROVENANCE).exists() and not (self.folder / PROVENANCE).exists():
            (self.folder / OLD_PROVENANCE).rename(self.folder / PROVENANCE)
        for name in (SAMPLES, PROVENANCE):
            file = self.folder / name
            rows = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() and step else []
            complete_rows = [row for row in rows if row.endswith("\n")]  # if the process died, the last may be torn
            kept_text = "".join(row for row in complete_rows if json.loads(row)["step"] <= step)
            with replace_atomically(file) as partial_file:
                partial_file.write_text(kept_text, encoding="utf-8")

    def write_samples(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends sampled answers."""
        for row in rows:
            self._append(SAMPLES, row)

    def write_step(self, step: int, position: int, provenance: Mapping[str, Any]) -> None:
        """Appends the provenance of a step's groups."""
        self._append(PROVENANCE, {"step": step, "position": position, **provenance})

    def _append(self, name: str, row: dict[str, Any]) -> None:
        """Appends a row to a file."""
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
