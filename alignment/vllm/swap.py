"""The swap of weights in a running vLLM engine, as seen from the process that uses the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from alignment.errors import EngineLost

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

DEATH_POLL_S = 0.5
"""Seconds between two checks whether vLLM's process has died during a call to it."""


async def swap(llm: AsyncLLM, load: Callable[[], Awaitable[None]]) -> None:
    """Waits for the requests in progress, loads weights while no other request begins, and lets requests begin again.

    Args:
        load: loads the weights. If it fails, the engine stays paused, as it may hold a part of them.

    Raises:
        EngineLost: the engine has died.
    """

    async def steps() -> None:
        # This also clears the cache of prompts, which the old weights have computed.
        await llm.pause_generation(mode="wait", clear_cache=True)
        await load()
        await llm.resume_generation()

    await wait_while_alive(llm, steps())


async def prepare_transfer(llm: AsyncLLM, transfer: str) -> None:
    """Prepares vLLM's weight transfer; needed once before `replace_weights`.

    Args:
        transfer: name of the weight transfer, as in `rollout.weight_transfer`.

    Raises:
        EngineLost: the engine has died.
    """
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

    request = WeightTransferInitRequest(init_info={"transfer": transfer})
    await wait_while_alive(llm, llm.init_weight_transfer_engine(request))


async def replace_weights(llm: AsyncLLM, update_info: dict[str, Any], version: int) -> None:
    """Loads all weights in one session of vLLM's weight transfer; called within `swap`.

    Args:
        update_info: what the transfer's receiving side needs; see `WeightUpdate`.
        version: number of the version that the engine then has.
    """
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    await llm.start_weight_update()
    await llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))
    await llm.finish_weight_update(str(version))


async def wait_while_alive(llm: AsyncLLM, call: Coroutine[Any, Any, None]) -> None:
    """Waits for a call to vLLM's process as long as the process is alive.

    When the process dies, vLLM 0.32 fails the requests in progress, but the futures of other calls never end
    (`utility_results` of its client). Without this function, a caller would wait forever.

    Raises:
        EngineLost: the process has died.
    """
    task = asyncio.ensure_future(call)
    # The call may fail because of the same death. Reading its error here avoids asyncio's warning about it.
    task.add_done_callback(lambda future: future.cancelled() or future.exception())
    try:
        while not task.done():
            await asyncio.wait([task], timeout=DEATH_POLL_S)
            if llm.errored:
                raise EngineLost("the vLLM engine has died")
        await task
    finally:
        task.cancel()
