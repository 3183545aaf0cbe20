"""vLLM's scheduler, in an engine's process, with forms of answers compiled at a lower priority than answers.

vLLM compiles what an answer has to look like in the engine's own process, with eight threads. `serving.trial` bounds
how long that takes, but for these seconds all answers would be slower where cores are few.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import TYPE_CHECKING, Any

from serving.trial_process import NICENESS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.interface import SchedulerInterface
    from vllm.v1.structured_output import StructuredOutputManager

SCHEDULER = f"{__name__}.scheduler"
"""What vLLM finds `scheduler` by."""
NUM_COMPILERS = 4
"""Forms that are compiled at once: of those that take long, `serving.trial` lets one at a time come here."""


def scheduler(
    *, vllm_config: VllmConfig, structured_output_manager: StructuredOutputManager, **more: Any
) -> SchedulerInterface:
    """Called by vLLM where it would make its own scheduler, which is what it gets."""
    # Threads have the priority of the thread that starts them; xgrammar's are started by the one that compiles.
    structured_output_manager.executor = ThreadPoolExecutor(NUM_COMPILERS, initializer=_give_way)
    settings = copy(vllm_config.scheduler_config)
    settings.scheduler_cls = None
    own: Callable[..., SchedulerInterface] = settings.get_scheduler_cls()
    return own(vllm_config=vllm_config, structured_output_manager=structured_output_manager, **more)


def _give_way() -> None:
    """Lowers the priority of this thread alone, which is what Linux does by a thread's id."""
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
