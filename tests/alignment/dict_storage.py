"""A second storage of checkpoints, in memory: what the port asks of one's own, and a way to have it refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar


class DictStorage:
    """Keeps files in a dict of its class, and refuses what a test has it refuse: a method called with a name."""

    files: ClassVar[dict[str, bytes]] = {}
    refuses: ClassVar[Callable[[str, str], bool]] = staticmethod(lambda method, name: False)

    def __init__(self, url: str, *, owner: str = "") -> None:
        self.url = f"{owner}{url}"

    def upload(self, file: Path, name: str) -> None:
        self._check("upload", name)
        self.files[f"{self.url}/{name}"] = file.read_bytes()

    def download(self, name: str, file: Path) -> None:
        self._check("download", name)
        if f"{self.url}/{name}" not in self.files:
            raise FileNotFoundError(name)
        file.write_bytes(self.files[f"{self.url}/{name}"])

    def list_files(self) -> list[str]:
        self._check("list_files", "")
        return [name.removeprefix(f"{self.url}/") for name in self.files if name.startswith(f"{self.url}/")]

    def delete(self, name: str) -> None:
        self._check("delete", name)
        if self.files.pop(f"{self.url}/{name}", None) is None:
            raise FileNotFoundError(name)

    def _check(self, method: str, name: str) -> None:
        if type(self).refuses(method, name):
            raise PermissionError(f"no {method} of {name}")
