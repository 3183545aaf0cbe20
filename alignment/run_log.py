"""The log of a run beside its metrics: sampled answers, and which prompts each step was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from alignment.run_folder import RunFolder, append_row, truncate_rows


class RunLog:
    """Writes the log of a run. Only the main worker has one."""

    def __init__(self, run_folder: RunFolder) -> None:
        self.run_folder = run_folder

    def truncate_after(self, step: int) -> None:
        """Deletes the rows of later steps, which are done again; for step 0 all rows."""
        provenance_file, old_file = self.run_folder.provenance_file, self.run_folder.old_provenance_file
        if old_file.exists() and not provenance_file.exists():
            old_file.rename(provenance_file)
        for file in (self.run_folder.samples_file, provenance_file):
            truncate_rows(file, step)

    def write_samples(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends sampled answers."""
        for row in rows:
            append_row(self.run_folder.samples_file, row)

    def write_step(self, step: int, position: int, provenance: Mapping[str, Any]) -> None:
        """Appends the provenance of a step's groups."""
        append_row(self.run_folder.provenance_file, {"step": step, "position": position, **provenance})
