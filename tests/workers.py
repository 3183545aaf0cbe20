"""Two training workers as processes of plain torch.distributed, each of which may be given something else."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from alignment.distributed.world import World
from tests.conftest import free_port

PRELOAD = ["alignment.train", "transformers.models.llama.modeling_llama", "tests.workers"]
"""Modules that every worker uses, imported once for all."""
LIMIT_S = 90.0
"""Seconds after which a worker that has not ended counts as hanging."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a worker ended."""

    result: Any = None
    error: BaseException | None = None
    seconds: float


def fork_context() -> multiprocessing.context.ForkServerContext:
    """A context whose processes begin with `PRELOAD` imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_two(function: Callable[..., Any], *arguments: tuple[Any, ...], timeout_s: float = 60.0) -> list[Ended]:
    """Calls `function(world, *arguments[rank])` in two processes at once; returns what became of each, by rank.

    Args:
        timeout_s: of the process group's collectives.

    Raises:
        TimeoutError: one has not ended, so it hangs.
    """
    context = fork_context()
    port, pipes, processes = free_port(), [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, rank, port, timeout_s, function, arguments[rank]))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    deadline = time.monotonic() + LIMIT_S
    try:
        return [_received(pipe, rank, deadline) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _received(pipe: Connection, rank: int, deadline: float) -> Ended:
    if not pipe.poll(deadline - time.monotonic()):
        raise TimeoutError(f"worker {rank} has not ended after {LIMIT_S:g} s")
    ended: Ended = pipe.recv()
    return ended


def _work(
    pipe: Connection, rank: int, port: int, timeout_s: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    place = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=timedelta(seconds=timeout_s))
    started = time.monotonic()
    try:
        result = function(World(rank=rank, size=2), *arguments)
        pipe.send(Ended(result=result, seconds=time.monotonic() - started))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(Ended(error=error, seconds=time.monotonic() - started))
    time.sleep(LIMIT_S)  # a worker of Ray Train lives on too, so the others do not notice its end
