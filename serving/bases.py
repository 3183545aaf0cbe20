"""Whether the base model of an adapter is still the one that it was registered with.

A base that lies only in a cache of raylign's is kept in the registry. Others stay where they are, as a shared folder or
on a hub: of these it is remembered which they were.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from alignment.models.folders import bundled_folder, is_merged

SAMPLES = 16
"""Places of a file of weights that are looked at; other weights differ nearly everywhere."""
SAMPLE_BYTES = 64 * 2**10
HEADER_BYTES = 2**20


def base_stamp(base: str) -> str | None:
    """What tells a base model from another one in its place.

    Of a folder a hash over a sample of its weights, which takes less than a second whatever their size, and over its
    tokenizer; of a hub id the revision that this machine has. None for what raylign makes itself, and for a hub id that
    this machine does not have.
    """
    folder = Path(base)
    if is_merged(folder) or folder.name == bundled_folder().name:
        return None
    return _folder_stamp(folder) if folder.is_dir() else revision_here(base)


def revision_here(hub_id: str) -> str | None:
    """The revision of a model that this machine's cache of the hub has as the newest; None if it has none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    with suppress(OSError):
        return (Path(HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "refs" / "main").read_text().strip()
    return None


def _folder_stamp(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(HEADER_BYTES))
            for place in range(SAMPLES):
                opened.seek(max(0, size - SAMPLE_BYTES) * place // (SAMPLES - 1), os.SEEK_SET)
                digest.update(opened.read(SAMPLE_BYTES))
    tokenizer = folder / "tokenizer.json"
    digest.update(tokenizer.read_bytes() if tokenizer.is_file() else b"")
    return digest.hexdigest()
