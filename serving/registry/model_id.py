"""The name of a model of an endpoint."""

from __future__ import annotations

from typing import Self

from alignment.errors import ServingError

MAX_LENGTH = 200
"""Most characters of a name: requests cannot give longer ones."""


class ModelId(str):
    """The name under which a model's versions answer, and under which the endpoint keeps them."""

    __slots__ = ()

    def __new__(cls, name: str) -> Self:
        """Checks a name.

        Raises:
            ServingError: no request could give it.
        """
        if not name.strip() or not name.isprintable() or len(name) > MAX_LENGTH:
            raise ServingError(f"{name[:MAX_LENGTH]!r} cannot be the name of a model; give it another with name=...")
        return super().__new__(cls, name)

    @property
    def folder_name(self) -> str:
        """The name as that of a folder, or as a part of the name of something in Ray Serve."""
        return self.replace("/", "--")
