"""The reload of all weights in the process of an engine, with the repairs that vLLM 0.32 needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from alignment.settings.plugins import load_weight_transfer


@dataclass
class ReceiverInit:
    """The information that the receiver needs before the first update."""

    transfer: str
    """Name of the weight transfer, as in `rollout.weight_transfer`."""


def receiver_class() -> type[Any]:
    """Makes the class that receives weights within vLLM, in a function, because its base class needs vLLM."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class WeightReceiver(WeightTransferEngine):  # type: ignore[misc]
        init_info_cls = ReceiverInit
        update_info_cls = dict

        def init_transfer_engine(self, init_info: ReceiverInit) -> None:
            self.transfer = load_weight_transfer(init_info.transfer)

        def start_weight_update(self) -> None:
            self.missing_names = {name for name, _ in self.model.named_parameters()} - _tied_names(self.model)
            unpack_experts(self.model)
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: dict[str, Any]) -> None:
            # All weights are loaded in one call, because a layer may be spread over two files.
            weights = self.transfer.receive(update_info)
            self.missing_names -= self.model.load_weights(weights) or self.missing_names
            if self.missing_names:
                example = min(self.missing_names)
                raise ValueError(f"an update of all weights lacks {len(self.missing_names)}, such as {example}")

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            pack_again(self.model)

        def shutdown(self) -> None: ...

    return WeightReceiver


def _tied_names(model: torch.nn.Module) -> set[str]:
    """The weight names of output heads that are tied to the embedding."""
    return {f"{name}.weight" for name, _ in _tied_heads(model)}


def _tied_heads(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The output heads that are tied to the embedding, with their names."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    config: Any = model.config
    if not config.tie_word_embeddings:
        return []
    return [(name, submodule) for name, submodule in model.named_modules() if isinstance(submodule, ParallelLMHead)]


def pack_again(model: torch.nn.Module) -> None:
    """Packs again the weights that a layerwise reload of vLLM 0.32 does not pack, on a CPU.

    On a CPU, vLLM computes with packed copies of weights. The reload packs a layer when it gets a weight by the layer's
    own name. An output head that is tied to the embedding gets none, so its packed copy would stay old. Experts are
    packed only when they are loaded for the first time.
    """
    _tie_again(model)
    for layer in _packed_experts(model):
        layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def unpack_experts(model: torch.nn.Module) -> None:
    """Replaces the packed weights of experts, which may be padded, by empty tensors of the shapes to be loaded."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in _packed_experts(model):
        parameters, _ = get_layerwise_info(layer).restore_metadata
        for name, shape in parameters.items():
            layer.get_parameter(name).data = torch.empty_like(shape, device="cpu")


def _packed_experts(model: torch.nn.Module) -> list[Any]:
    """The layers of experts whose weights vLLM packs."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    layers: list[Any] = [submodule for submodule in model.modules() if isinstance(submodule, RoutedExperts)]
    return [layer for layer in layers if isinstance(layer.quant_method, UnquantizedFusedMoEMethod)]


def _tie_again(model: torch.nn.Module) -> None:
    """Gives tied output heads the new weights of the embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for _, head in _tied_heads(model):
        embedding = next(
            submodule
            for submodule in model.modules()
            if isinstance(submodule, VocabParallelEmbedding) and not isinstance(submodule, ParallelLMHead)
        )
        head.tie_weights(embedding)
        head.quant_method.process_weights_after_loading(head)
