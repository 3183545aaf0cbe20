"""A folder is one for several machines if all see a mark that one has left in it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from alignment.shared_folder import leave_mark, sees


def test_a_mark_is_seen_where_it_was_left_and_nowhere_else(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    with leave_mark(here) as mark, leave_mark(here) as other:
        assert mark != other
        assert sees(here, mark, wait_s=0) and sees(here, other, wait_s=0)
        assert not sees(elsewhere, mark, wait_s=0), "not even the folder is there"
        elsewhere.mkdir()
        assert not sees(elsewhere, mark, wait_s=0)
    assert list(here.iterdir()) == []


def test_a_mark_goes_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(ValueError), leave_mark(tmp_path):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_may_take_a_while_to_show_it(tmp_path: Path) -> None:
    def show_later() -> None:
        time.sleep(0.3)
        (tmp_path / "mark").touch()

    thread = threading.Thread(target=show_later)
    thread.start()
    assert sees(tmp_path, "mark", wait_s=60)
    thread.join()
