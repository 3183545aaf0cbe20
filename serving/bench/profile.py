"""What the processes of a server do: CPU time by group of processes, and a sampling profile by area of the source.

engine    the processes that compute tokens (vLLM's EngineCore, and its workers if it has any)
replica   the process that calls the engine and turns tokens into server-sent events
ingress   the process that checks requests and passes events on (in plain vLLM, the replica does all of it)
proxy     the process that listens (Ray Serve's)
ray       the other processes of Ray: raylet, controller, agents, and the command itself
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

SAMPLES_PER_S = 50
GROUPS = {
    "engine": r"VLLM::|multiprocessing\.spawn",
    "proxy": r"ProxyActor",
    "ingress": r"ServeReplica:[^:]*:(ingress|OpenAiIngress)",
    "replica": r"ServeReplica:|vllm\.entrypoints",
}
"""The groups by a pattern of the process's title; the first match counts. Every other process belongs to `ray`."""
PROFILED_GROUPS = ("replica", "ingress", "proxy")
AREAS = {
    "": r"^serving/.*",
    "vllm": r"^vllm/",
    "ray_serve_llm": r"^ray/llm/",
    "ray_serve": r"^ray/serve/",
    "ray": r"^ray/",
    "http": r"^(uvicorn|starlette|fastapi|httptools|anyio)/",
}
"""The areas of the source by a pattern of the file's path. The innermost function of a stack that belongs to an area
counts; a file of raylign's own is its own area. A stack without such a function belongs to `event_loop`."""


def cpu_s(root: int) -> dict[str, float]:
    """CPU seconds that each group of a server's processes has used so far.

    Args:
        root: id of the process that started all others.
    """
    seconds: dict[str, float] = {}
    for group, process in _processes(root):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        seconds[group] = seconds.get(group, 0.0) + times.user + times.system
    return seconds


@contextmanager
def profile(root: int) -> Iterator[dict[str, dict[str, float]]]:
    """Profiles a server's processes inside the `with` block.

    Yields a dictionary that is filled after the block: for each group, the fraction of its time that each area of the
    source takes. It stays empty if looking into other processes is forbidden.
    """
    shares: dict[str, dict[str, float]] = {}
    spy = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if spy is None:
        print("py-spy is not installed, so there is no share of each part", flush=True)
        yield shares
        return
    with TemporaryDirectory(prefix="raylign-looks-") as folder:
        profilers = {}
        for group, process in _processes(root):
            if group not in PROFILED_GROUPS:
                continue
            file = Path(folder) / f"{group}-{process.pid}"
            command = [spy, "record", "--pid", str(process.pid), "--rate", str(SAMPLES_PER_S)]
            command += ["--format", "raw", "--output", str(file)]
            profiler = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            profilers[file] = group, profiler
        try:
            yield shares
        finally:
            for _, profiler in profilers.values():
                profiler.send_signal(signal.SIGINT)  # makes it write its file
                profiler.wait()
        counts: dict[str, Counter[str]] = {}
        for file, (group, _) in profilers.items():
            if file.is_file():
                counts.setdefault(group, Counter()).update(count_areas(file.read_text(errors="replace")))
        for group, areas in counts.items():
            shares[group] = {area: round(count / areas.total(), 3) for area, count in areas.most_common()}


def count_areas(stacks: str) -> Counter[str]:
    """How many samples of a profile belong to each area.

    Args:
        stacks: lines of `outer (file:line);inner (file:line) COUNT`.
    """
    counts: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        if stack and count.isdigit():
            counts[_area(stack)] += int(count)
    return counts


def _area(stack: str) -> str:
    for call in reversed(stack.split(";")):
        file = call.rpartition("(")[2].partition("site-packages/")
        path = file[2] or file[0]
        for area, pattern in AREAS.items():
            if match := re.search(pattern, path):
                return area or match[0].partition(":")[0]
    return "event_loop"


def _processes(root: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server's processes, with their groups."""
    command = psutil.Process(root)
    for process in (command, *command.children(recursive=True)):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:  # the process has ended
            continue
        yield next((group for group, pattern in GROUPS.items() if re.search(pattern, title)), "ray"), process
