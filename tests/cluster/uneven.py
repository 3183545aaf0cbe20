"""An algorithm that finds a row less on the second worker, as a template, a cache or a copy may on another machine."""

from __future__ import annotations

import os

from alignment.algorithms.sft import SFT
from alignment.errors import NoPreference
from alignment.groups import Group


class Uneven(SFT):
    """Supervised fine-tuning but for the first row of the second worker."""

    name: str  # type: ignore[assignment]  # the dotted one

    def select(self, group: Group) -> Group:
        if os.environ.get("RANK") == "1" and group.id.endswith(":1"):
            raise NoPreference("is not on this machine")
        return super().select(group)
