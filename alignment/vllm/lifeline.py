"""The process of an engine ends with the process that started the engine, even if that was killed."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from pathlib import Path


def end_with_owner() -> None:
    """Ends this process as soon as the process that started the engine has ended, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    core, core_parent = parent.pid, _parent_of(parent.pid)

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    def watch_core() -> None:
        while _parent_of(core) == core_parent:
            time.sleep(1.0)
        os.kill(core, signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    if parent.name.startswith("EngineCore"):  # it belongs to an engine of several workers, and imports nothing of ours
        threading.Thread(target=watch_core, name="lifeline of EngineCore", daemon=True).start()


def _parent_of(process: int) -> int:
    """The id of a process's parent, read from Linux's /proc. It changes when the parent ends."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
