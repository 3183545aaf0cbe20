"""Writes the pages of `docs/reference` from the code: `make docs`, or `python -m docs.generate`.

`tests/test_references.py` compares the pages with what this makes.
"""

from __future__ import annotations

from pathlib import Path

from docs.generate.command_line import command_line_page
from docs.generate.configuration import configuration_page
from docs.generate.http import http_page
from docs.generate.metrics import metrics_page

FOLDER = Path(__file__).parents[1] / "reference"
PAGES = {
    "configuration.md": configuration_page,
    "command-line.md": command_line_page,
    "http.md": http_page,
    "metrics.md": metrics_page,
}
"""What makes each page, by the name of its file."""


def main() -> None:
    """Writes every page."""
    FOLDER.mkdir(exist_ok=True)
    for name, make_page in PAGES.items():
        (FOLDER / name).write_text(make_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
