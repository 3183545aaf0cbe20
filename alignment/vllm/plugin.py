"""vLLM imports this module in the processes of our engines, and the import prepares those processes.

Our engines name `EngineWorker` as their `worker_extension_cls`, so vLLM imports this module in the process that holds
an engine's weights. A plugin by entry point would not do: it would also be loaded by engines that are not ours, and it
would need raylign to be installed, while this module only needs raylign's code.
"""

from __future__ import annotations

import atexit
import gc

import torch

from alignment.vllm import adapter_speed, block_zeroing
from alignment.vllm.arguments import BACKEND
from alignment.vllm.lifeline import end_with_owner
from alignment.vllm.reload import receiver_class


def install() -> None:
    """Prepares this process."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    end_with_owner()
    # At the end, Python would look through all objects of vLLM for garbage, several times, for seconds.
    atexit.register(gc.freeze)
    # Linux kills a process that uses AMX without a request for it. vLLM's attention uses AMX without one. A matrix
    # product makes the request, but may not do so for one or two tokens. On other machines this does nothing.
    torch.cpu._init_amx()
    adapter_speed.install()
    block_zeroing.install()
    WeightTransferEngineFactory.register_engine(BACKEND, receiver_class())


install()


class EngineWorker:
    """Adds no method to vLLM's worker; the import of its module is what matters."""
