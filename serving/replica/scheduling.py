"""vLLM's scheduler with one change: grammars of structured outputs are compiled at a lower priority than answers.

vLLM compiles the grammar of an answer in the engine's own process, with eight threads. `serving.replica.trial` limits
how long that takes, but meanwhile all answers would be slower on a machine with few cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import TYPE_CHECKING, Any

from alignment.vllm import block_zeroing
from serving.replica.trial_process import NICENESS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.interface import SchedulerInterface
    from vllm.v1.structured_output import StructuredOutputManager

SCHEDULER = f"{__name__}.scheduler"
"""The name by which vLLM imports `scheduler`."""
NUM_COMPILERS = 4
"""How many grammars are compiled at once. Of the slow ones, `serving.replica.trial` lets one at a time come here."""


def scheduler(
    *, vllm_config: VllmConfig, structured_output_manager: StructuredOutputManager, **arguments: Any
) -> SchedulerInterface:
    """Makes vLLM's own scheduler, with threads of low priority for grammars. vLLM calls this in place of the class."""
    block_zeroing.install()  # with several workers, this process imports nothing else of ours
    # A thread has the priority of the thread that starts it; the compiling thread starts xgrammar's threads.
    structured_output_manager.executor = ThreadPoolExecutor(NUM_COMPILERS, initializer=_lower_priority)
    settings = copy(vllm_config.scheduler_config)
    settings.scheduler_cls = None
    scheduler_class: Callable[..., SchedulerInterface] = settings.get_scheduler_cls()
    return scheduler_class(vllm_config=vllm_config, structured_output_manager=structured_output_manager, **arguments)


def _lower_priority() -> None:
    """Lowers the priority of this thread alone: Linux takes the id 0 for the calling thread."""
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
