"""Loads versions into vLLM: LoRA adapters beside each other, or whole weights in place of the previous ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alignment.errors import ServingError
from alignment.vllm.swap import prepare_transfer, replace_weights, swap
from serving.registry.served_model import adapter_name
from serving.registry.versions import Registry
from serving.replica.versions import PartialLoadError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class AdapterLoader:
    """Loads LoRA adapters into an engine, one beside the other. (Ray's own loader needs them in a cloud bucket.)"""

    holds_many = True

    def __init__(self, models: Any, registry: Registry) -> None:
        """
        Args:
            models: vLLM's registry of model names.
            registry: the versions.
        """
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

    async def unload(self, number: int) -> None:
        """Frees a version's memory."""
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=adapter_name(number)))


class WholeWeightsLoader:
    """Loads all weights of a model into an engine, in place of the previous ones."""

    holds_many = False

    def __init__(self, client: AsyncLLM, registry: Registry) -> None:
        self._client = client
        self._registry = registry

    async def begin(self) -> None:
        """Prepares vLLM's weight transfer."""
        await prepare_transfer(self._client, "files")

    async def load(self, number: int) -> None:
        """Loads a version; see `Loader.load`. No request may be in progress."""
        files = sorted(str(file) for file in self._registry.folder_of(number).glob("*.safetensors"))
        try:
            await swap(self._client, lambda: replace_weights(self._client, {"files": files}, number))
        except Exception as error:  # vLLM passes on any exception of its process
            raise PartialLoadError(f"version {number} got stuck half-way into the engine: {error}") from error

    async def unload(self, number: int) -> None:
        """Does nothing: the next weights have replaced these."""
