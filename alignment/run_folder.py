"""A run on disk: the names of its files, what is read back from them, and its checkpoints. It needs no torch.

OUTPUT/NAME/
    config.json                     the complete configuration
    metrics.jsonl, tensorboard/     the metrics of every step
    samples.jsonl                   held-out prompts and the model's answers to them
    provenance.jsonl                the prompts that each step was trained on
    bad_rows.jsonl                  rows of the data that were left out
    data/, date, reference-*        what a resumed run takes as it was: rows of live sources, day, log-probabilities
    checkpoints/step-00000100/      see `alignment.models.model_folder` and `alignment.checkpoint`
    quarantine/                     checkpoints that were found damaged
    summary.json                    the figures of a finished run
    failure.json                    the error that ended the run
    report.html, ray/               what `raylign report` and Ray Train write
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import CheckpointError
from alignment.files import replace_atomically
from alignment.models.model_folder import ModelFolder
from alignment.storage import CHECKPOINTS, STEP, download_model, is_url

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which need not exist yet."""

    path: Path

    @classmethod
    def at(cls, path: Path) -> RunFolder:
        """The run at a path, which may also be that of the folder with its checkpoints."""
        return cls(path.parent if path.name == CHECKPOINTS else path)

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> RunFolder | None:
        """The run that a checkpoint belongs to; None for a folder that lies in no run."""
        folder = checkpoint.parent
        return cls(folder.parent) if folder.name == CHECKPOINTS else None

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config_file(self) -> Path:
        """The complete configuration, as JSON."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        """The metrics of every reported step, a JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard_folder(self) -> Path:
        """The same metrics, for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def samples_file(self) -> Path:
        """Held-out prompts and the model's answers, with reward, scores and divergence if they are known."""
        return self.path / "samples.jsonl"

    @property
    def provenance_file(self) -> Path:
        """One row for each step: the prompts that it was trained on, the versions of the weights that answered them,
        and the stream's position."""
        return self.path / "provenance.jsonl"

    @property
    def old_provenance_file(self) -> Path:
        """The same file in runs of earlier releases."""
        return self.path / "ledger.jsonl"

    @property
    def bad_rows_file(self) -> Path:
        """Rows of the data that were left out, with the reasons."""
        return self.path / "bad_rows.jsonl"

    @property
    def summary_file(self) -> Path:
        """The figures of a finished run. A run that has not ended has no such file."""
        return self.path / "summary.json"

    @property
    def failure_file(self) -> Path:
        """Class and text of the error that ended the run; another attempt would not help."""
        return self.path / "failure.json"

    @property
    def report_file(self) -> Path:
        """The run as one page of HTML."""
        return self.path / "report.html"

    @property
    def date_file(self) -> Path:
        """The day on which the run began."""
        return self.path / "date"

    @property
    def lock_file(self) -> Path:
        """Its lock is held while a process trains the run."""
        return self.path / ".lock"

    @property
    def rows_folder(self) -> Path:
        """Rows of live sources, as they were when the run began."""
        return self.path / "data"

    @property
    def ray_folder(self) -> Path:
        """Ray Train's own files."""
        return self.path / "ray"

    @property
    def checkpoints_folder(self) -> Path:
        """The folder with the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def quarantine_folder(self) -> Path:
        """The folder with checkpoints that were found damaged."""
        return self.path / "quarantine"

    def reference_file(self, key: str) -> Path:
        """Log-probabilities of the data under the reference.

        Args:
            key: hash of all that the numbers depend on.
        """
        return self.path / f"reference-{key}.safetensors"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after a step, which may not exist."""
        return self.checkpoints_folder / f"{STEP}{step:08d}"

    def checkpoints(self) -> list[Path]:
        """The folders of the checkpoints, newest first. The newest may be damaged."""
        return sorted(self.checkpoints_folder.glob(f"{STEP}*"), reverse=True)

    def newest_intact(self, *, only_model: bool = False) -> Path | None:
        """The newest checkpoint that passes verification. Damaged newer ones are moved to the quarantine.

        Args:
            only_model: whether to verify the model alone; see `ModelFolder.verify`.
        """
        for folder in self.checkpoints():
            try:
                ModelFolder(folder).verify(only_model=only_model)
                return folder
            except CheckpointError as error:
                logger.warning("%s; %s, trying the one before", error, self._set_aside(folder))
        return None

    @property
    def is_run(self) -> bool:
        """True for the folder of a run, even before its first checkpoint; false for the folder of a model."""
        config = self.read_config() or {}
        if "model_type" in config:
            return False
        return {"algorithm", "data"} <= config.keys() or self.checkpoints_folder.is_dir()

    def read_config(self) -> dict[str, Any] | None:
        """The configuration; None if there is none, or none that can be read."""
        try:
            config = json.loads(self.config_file.read_bytes())
        except (OSError, ValueError):  # there is none, or the run starts again and is writing it
            return None
        return config if isinstance(config, dict) else None

    def read_summary(self) -> dict[str, float]:
        """The figures of a finished run.

        Raises:
            OSError: the run has not ended.
        """
        return dict(json.loads(self.summary_file.read_text(encoding="utf-8")))

    def write_summary(self, summary: Mapping[str, float]) -> None:
        """Writes the figures of a finished run, which ends it."""
        with replace_atomically(self.summary_file) as partial_file:
            partial_file.write_text(json.dumps(summary), encoding="utf-8")

    def read_metrics(self) -> list[dict[str, float]]:
        """The metrics of all reported steps, in order."""
        return read_rows(self.metrics_file)

    def read_samples(self) -> list[dict[str, Any]]:
        """The sampled answers, in order."""
        return read_rows(self.samples_file)

    def _set_aside(self, checkpoint: Path) -> str:
        """Moves a damaged checkpoint to the quarantine if possible; returns what was done, in words."""
        target = self.quarantine_folder / checkpoint.name
        try:
            self.quarantine_folder.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            checkpoint.rename(target)
        except OSError as error:
            return f"it cannot be moved to {target} ({error.strerror})"
        return f"moved to {target}"


def find_checkpoint(path: Path, *, only_model: bool = False) -> Path:
    """Resolves a path to a verified checkpoint: the path itself, or the newest intact one of a run's folder.

    Args:
        only_model: whether to verify the model alone; see `ModelFolder.verify`.

    Raises:
        CheckpointError: there is none, or the path is a damaged checkpoint.
    """
    model, run_folder = ModelFolder(path), RunFolder(path)
    if model.is_checkpoint:
        model.verify(only_model=only_model)
        return path
    newest = run_folder.newest_intact(only_model=only_model)
    if newest is None:
        hint = ": this run has none (yet)" if run_folder.is_run else ""
        raise CheckpointError(f"{path} is neither a checkpoint nor the folder of a run with an intact one{hint}")
    return newest


def checkpoint_or_path(path: str) -> str:
    """Resolves the folder of one of our runs or checkpoints to a verified checkpoint; returns any other path unchanged.

    The address of a run or checkpoint in a storage, such as `s3://bucket/runs/demo`, becomes a folder of this machine's
    cache, to which the model is downloaded on first use.

    Raises:
        CheckpointError: the checkpoint is damaged, or the run has none.
    """
    if is_url(path):
        return str(download_model(path))
    folder = Path(path).expanduser()
    run_folder = RunFolder.at(folder)
    if run_folder.is_run:
        return str(find_checkpoint(run_folder.path, only_model=True))
    return str(find_checkpoint(folder, only_model=True)) if ModelFolder(folder).is_checkpoint else path


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object a line; none if there is no such file.

    A row that was cut off when a process died is left out.
    """
    return [json.loads(line) for line in _complete_lines(file)]


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Appends a row to a file with one JSON object a line."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def truncate_rows(file: Path, step: int) -> None:
    """Deletes the rows of later steps from a file, atomically; for step 0 all rows."""
    lines = [line for line in _complete_lines(file) if json.loads(line)["step"] <= step] if step else []
    with replace_atomically(file) as partial_file:
        partial_file.write_text("".join(lines), encoding="utf-8")


def _complete_lines(file: Path) -> list[str]:
    """The lines of a file that have an end, with that; none if there is no such file."""
    if not file.exists():
        return []
    *lines, _ = file.read_text(encoding="utf-8").split("\n")  # texts may hold what `splitlines` takes for an end
    return [f"{line}\n" for line in lines]
