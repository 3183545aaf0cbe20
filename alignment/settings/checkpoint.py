"""What is kept of a run, how often, and where."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from alignment.passwords import holds_password
from alignment.settings.section import Count, PositiveCount, Section, as_value_error
from alignment.storage import storage_class

SECRET = re.compile("key|secret|token|password|credential", re.IGNORECASE)
"""What the name of an argument holds whose value nobody else may read."""


class StorageConfig(Section):
    """A place besides `output` that keeps a run's checkpoints, such as an object store."""

    url: Annotated[str, Field(min_length=1)]
    """Folder of all runs there: `s3://bucket/runs`, `gs://…`, any address that fsspec opens, or a path. Checkpoints lie
    below it in `NAME/checkpoints`. `s3://` needs the package s3fs, `gs://` needs gcsfs (extras `s3` and `gcs`)."""
    name: str = "fsspec"
    """`fsspec`; or a dotted `package.module:Class` of one's own, which is called with the address of the run's
    checkpoints and with `arguments`, and has the methods of `alignment.storage.Storage`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for fsspec's file system, as `{endpoint_url: "https://minio:9000"}`, or for one's own class.
    Keys and passwords are refused. They come from where the store's own programs look, as `AWS_SECRET_ACCESS_KEY`."""

    @field_validator("name")
    @classmethod
    def _known_storage(cls, name: str) -> str:
        with as_value_error():
            storage_class(name)
        return name

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        secret_names = [key for key in _all_keys(self.arguments) if SECRET.search(key)]
        if holds_password(self.url) or secret_names:
            source = f"arguments ({', '.join(secret_names)})" if secret_names else "url"
            raise ValueError(f"{source} must hold no password or key: config.json would show it. The environment may")
        return self


def _all_keys(value: Any) -> Iterator[str]:
    """The keys of a mapping, and those of the mappings in it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _all_keys(item)


class CheckpointConfig(Section):
    """What is kept of a run, and how often."""

    every: Count = 0
    """Optimizer steps between checkpoints; 0 writes only the last, so that a run that breaks off begins again."""
    keep: PositiveCount = 2
    """Newest checkpoints to keep, ≥ 1; older ones are deleted."""
    storage: StorageConfig | None = None
    """Where checkpoints are kept besides the run's folder; None is nowhere else. They are uploaded while the loop goes
    on. A run that finds a newer checkpoint there than in its folder, as on a new machine, resumes from that one."""
