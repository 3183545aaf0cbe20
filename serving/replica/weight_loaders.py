"""Loads versions into vLLM: LoRA adapters beside each other, or whole weights in place of the previous ones."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from alignment.errors import ServingError
from alignment.vllm.swap import prepare_transfer, replace_weights, swap
from serving.registry.served_model import adapter_name
from serving.registry.versions import Registry
from serving.replica.probe import OverflowingWeights, probe
from serving.replica.versions import PartialLoadError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class AdapterLoader:
    """Loads LoRA adapters into an engine, one beside the other. (Ray's own loader needs them in a cloud bucket.)"""

    holds_many = True

    def __init__(self, client: AsyncLLM, models: Any, registry: Registry) -> None:
        """
        Args:
            client: the engine.
            models: vLLM's registry of model names.
            registry: the versions.
        """
        self._client = client
        self._models = models
        self._registry = registry

    async def load(self, number: int) -> None:
        """Loads a version; see `Loader.load`."""
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        folder = self._registry.folder_of(number)
        result = await self._models.load_lora_adapter(
            LoadLoRAAdapterRequest(lora_name=adapter_name(number), lora_path=str(folder))
        )
        if not isinstance(result, str):
            raise ServingError(f"The adapter {folder} cannot be loaded: {result.error.message}")
        try:
            await probe(self._client, f"version {number}", self._models.lora_requests[adapter_name(number)])
        except BaseException:
            await self.unload(number)
            raise

    async def unload(self, number: int) -> None:
        """Frees a version's memory."""
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=adapter_name(number)))


class WholeWeightsLoader:
    """Loads all weights of a model into an engine, in place of the previous ones."""

    holds_many = False

    def __init__(self, client: AsyncLLM, registry: Registry, number: int) -> None:
        """
        Args:
            client: the engine.
            registry: the versions.
            number: number of the version with which the engine was started.
        """
        self._client = client
        self._registry = registry
        self._number = number

    async def begin(self) -> None:
        """Prepares vLLM's weight transfer."""
        await prepare_transfer(self._client, "files")

    async def load(self, number: int) -> None:
        """Loads a version; see `Loader.load`. No request may be in progress."""
        try:
            await self._replace(number)
            await probe(self._client, f"version {number}")
        except OverflowingWeights:
            await self._restore()
            raise
        except Exception as error:  # vLLM passes on any exception of its process
            raise PartialLoadError(f"version {number} got stuck half-way into the engine: {error}") from error
        self._number = number

    async def _restore(self) -> None:
        """Loads again the version that the engine had before.

        Raises:
            PartialLoadError: this failed.
        """
        try:
            await asyncio.to_thread(self._registry.verify, self._number)
            await self._replace(self._number)
        except Exception as error:  # vLLM passes on any exception of its process
            raise PartialLoadError(f"version {self._number} could not be loaded again: {error}") from error

    async def _replace(self, number: int) -> None:
        files = sorted(str(file) for file in self._registry.folder_of(number).glob("*.safetensors"))
        await swap(self._client, lambda: replace_weights(self._client, {"files": files}, number))

    async def unload(self, number: int) -> None:
        """Does nothing: the next weights have replaced these."""
