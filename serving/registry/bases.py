"""Identifies the base model of an adapter, to notice when it is no longer the one that the adapter was registered with.

A base model that exists only in one of raylign's caches is copied into the registry. Other base models stay where they
are, in a folder or on a hub; for these the registry keeps a stamp.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from alignment.models.cache import is_bundled, is_merged

NUM_SAMPLES = 16
"""How many pieces of a weights file are read. The weights of two models differ nearly everywhere."""
SAMPLE_BYTES = 64 * 2**10
HEADER_BYTES = 2**20


def base_stamp(base: str) -> str | None:
    """A stamp that differs between a base model and another model in its place.

    For a folder it is a hash over samples of its weights, which takes less than a second for any size, and over its
    tokenizer. For a hub id it is the revision that this machine has. It is None for a model that raylign makes itself,
    and for a hub id that this machine does not have.
    """
    folder = Path(base)
    if is_merged(folder) or is_bundled(folder):
        return None
    return _folder_stamp(folder) if folder.is_dir() else local_revision(base)


def local_revision(hub_id: str) -> str | None:
    """The newest revision of a model in this machine's cache of the hub; None if the cache has none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    with suppress(OSError):
        return (Path(HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "refs" / "main").read_text().strip()
    return None


def _folder_stamp(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(HEADER_BYTES))
            for index in range(NUM_SAMPLES):
                stream.seek(max(0, size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1), os.SEEK_SET)
                digest.update(stream.read(SAMPLE_BYTES))
    tokenizer = folder / "tokenizer.json"
    digest.update(tokenizer.read_bytes() if tokenizer.is_file() else b"")
    return digest.hexdigest()
