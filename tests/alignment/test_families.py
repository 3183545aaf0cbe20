"""docs/model-families.md says what loading says."""

from __future__ import annotations

import pytest

from tests.alignment.family_table import PAGE, ROWS, page, table_row

pytestmark = pytest.mark.usefixtures("one_thread")
STALE = "stale; run python -m tests.alignment.family_table"


def rows_of_page() -> list[str]:
    return PAGE.read_text(encoding="utf-8").rpartition("|---|\n")[2].splitlines()


def test_the_page_is_the_one_that_is_generated_with_all_its_rows() -> None:
    rows = rows_of_page()
    assert PAGE.read_text(encoding="utf-8") == page(rows), STALE
    named = [tuple(text.strip(" |").split(" | ")[:1]) for text in rows]
    assert named == [(f"`{entry.family}`",) for entry in ROWS], STALE
    assert len({entry.family for entry in ROWS}) >= 40


@pytest.mark.parametrize("index", range(3, len(ROWS), 9))
def test_a_sample_of_the_page_is_what_loading_says(index: int) -> None:
    assert table_row(ROWS[index]) == rows_of_page()[index], STALE


@pytest.mark.slow
def test_the_whole_page_is_what_loading_says() -> None:
    assert [table_row(entry) for entry in ROWS] == rows_of_page(), STALE
