"""The models of a run by the part they play: the actor that is trained and the reference that it is compared with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from alignment.algorithms import ReferencedAlgorithm
from alignment.config import RunConfig
from alignment.errors import ConfigError
from alignment.models.forward import outputs
from alignment.models.load import LanguageModel, freeze, load_model
from alignment.models.parallel import Trained, World, shard
from alignment.types import Batch

Reference = Literal["none", "adapter_off", "copy", "precomputed"]


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What a run holds in memory."""

    actor: LanguageModel
    trained: Trained
    """The actor's trained weights and their optimizer."""
    reference: Reference
    """Where log π_ref comes from; `none` if the algorithm does not compare."""
    copy: LanguageModel | None
    """The frozen starting model, for `copy`."""

    @classmethod
    def build(cls, config: RunConfig, world: World) -> Roles:
        """Loads every model that the run's algorithm needs.

        Raises:
            ConfigError: the way to the reference does not go with the kind of training.
            ModelError: a model cannot be loaded.
        """
        reference = reference_of(config)
        actor = load_model(config.model, config.data, device=world.device, seed=config.seed)
        copy = None
        if reference == "copy":
            plain = config.model.model_copy(update={"lora": None, "gradient_checkpointing": False})
            copy = load_model(plain, config.data, device=world.device, seed=config.seed)
            freeze(copy.module)
        return cls(actor=actor, trained=shard(actor.module, config.optim, world), reference=reference, copy=copy)

    def annotate(self, batch: Batch) -> Batch:
        """Adds the reference model's log-probabilities, if they are needed and not known yet."""
        if self.reference == "none" or batch.reference_logprobs is not None:
            return batch
        model = self.copy or self.actor
        with torch.no_grad(), _without_adapter(self.actor.module, self.reference):
            return dataclasses.replace(batch, reference_logprobs=outputs(model, batch).logprobs)


def reference_of(config: RunConfig) -> Reference:
    """Resolves `algorithm.reference`.

    Raises:
        ConfigError: `adapter_off` without LoRA, or `precomputed` from a stream.
    """
    if not isinstance(config.algorithm, ReferencedAlgorithm):
        return "none"
    wish = config.algorithm.reference
    if wish == "auto":
        return "adapter_off" if config.model.lora else "copy"
    if wish == "adapter_off" and config.model.lora is None:
        raise ConfigError(
            "algorithm.reference adapter_off needs model.lora: without an adapter nothing can be taken off"
        )
    if wish == "precomputed" and any(source.streaming for source in config.data.sources):
        raise ConfigError("algorithm.reference precomputed needs data that is read before training, not a stream")
    return wish


@contextlib.contextmanager
def _without_adapter(module: Any, reference: Reference) -> Iterator[None]:
    training = module.training
    module.eval()  # the adapter's dropout, and gradient checkpointing, belong to training only
    try:
        with module.disable_adapter() if reference == "adapter_off" else contextlib.nullcontext():
            yield
    finally:
        module.train(training)
