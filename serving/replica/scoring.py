"""The scorer behind `POST /v1/rewards`. It has replicas of its own, so that no request for rewards can harm the engine.

groups ─► tokens ─► the packed forward pass of training, with the adapter and without ─► log π - log π_ref per token

An aligned model is its own reward model: β (log π - log π_ref) is the reward that it was aligned to (arXiv 2305.18290,
equation 5, up to a term of the prompt alone). One copy of the base weights serves for every adapter and for the
reference. A trained reward model may stand in its place.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve

from alignment.errors import AlignmentError, DataError, RewardError, ServingError
from alignment.groups import Completion, Group, Message
from alignment.models.folders import model_source
from alignment.rewards.remote import ChatMessage
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from serving.config import Device, ServeConfig
from serving.registry.served_model import reference_of, rewards_length
from serving.registry.versions import Registry, Version
from serving.schema import Reply, error_reply

if TYPE_CHECKING:  # torch takes seconds, and the ingress, which knows this module's types, has no use for it
    import torch

    from alignment.batch import Batch
    from alignment.models.load import LanguageModel
    from alignment.rewards.model import ModelScorer

logger = logging.getLogger("ray.serve")

SCORING_NAME = "scoring"
"""Name of the deployment; that of a further model has the model's name behind it."""
MAX_BATCH = 64
"""Most requests that are rated together."""
MAX_ADAPTERS = 4
"""Most adapters that stay loaded."""
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class ScoringItem:
    """One prompt and its completions."""

    prompt: str | tuple[ChatMessage, ...]
    completions: tuple[str, ...]

    def group(self) -> Group:
        """Returns the same as a Group."""
        completions = tuple(Completion(text=text) for text in self.completions)
        if isinstance(self.prompt, str):
            return Group(id="request", prompt=self.prompt, completions=completions)
        messages = tuple(Message(role=message.role, content=message.content) for message in self.prompt)
        return Group(id="request", prompt=messages, completions=completions)


@dataclass(frozen=True, kw_only=True)
class ScoringRequest:
    """The prompts of one request for rewards. It is sent between Ray's processes."""

    items: tuple[ScoringItem, ...]
    version: int | None
    """Number of the model version that rates; None is the current version."""


@dataclass(frozen=True, kw_only=True)
class LogRatios:
    """The log-ratios of one completion's tokens."""

    tokens: tuple[str, ...]
    """Texts of the tokens."""
    values: tuple[float, ...]
    """log π - log π_ref of each token, in nats."""

    @property
    def total(self) -> float:
        """log π - log π_ref of the whole completion, in nats."""
        return sum(self.values)


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """The answer to a request for rewards: log-ratios, or a reward model's rewards, per prompt and completion."""

    version: int
    log_ratios: tuple[tuple[LogRatios, ...], ...] = ()
    rewards: tuple[tuple[float, ...], ...] = ()


class Scoring:
    """The Ray Serve deployment that rates."""

    def __init__(self, config: ServeConfig, device: Device, registry: str) -> None:
        """Loads the reward model, or the reference of the versions. `registry`: folder of the versions."""
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))  # Ray allows one per reserved CPU
        torch_device = torch.device(device)
        self._registry = Registry(Path(registry))
        self._rewards = None if config.rewards.model is None else _reward_model(config, torch_device)
        self._policies: Policies | None = None
        self._missing_reference = ""
        if self._rewards is None:
            try:
                self._policies = _policies(config, self._registry, torch_device)
            except ServingError as error:  # the rest of the service works without it
                self._missing_reference = str(error)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
    async def score(self, requests: list[ScoringRequest]) -> list[ScoreResult | Reply]:
        """Rates completions. Requests that wait are rated together; one that cannot be rated is refused alone.

        Ray Serve makes the list: a caller sends one request, and gets one answer.
        """
        return await asyncio.to_thread(self._score_all, requests)

    def _score_all(self, requests: list[ScoringRequest]) -> list[ScoreResult | Reply]:
        """Rates version by version, so that whole weights are loaded once per version, and not once per request."""
        order = sorted(range(len(requests)), key=lambda index: requests[index].version or 0)
        results = {index: self._score_or_refuse(requests[index]) for index in order}
        return [results[index] for index in range(len(requests))]

    async def is_running(self) -> bool:
        """Returns True. It is called past the queue, so that only a replica that has loaded its model answers."""
        return True

    def _score_or_refuse(self, request: ScoringRequest) -> ScoreResult | Reply:
        """Rates one request; what goes wrong becomes an error reply."""
        try:
            return self._score(request)
        except (DataError, RewardError) as error:
            return error_reply(400, f"This cannot be rated: {error}")
        except AlignmentError as error:
            return error_reply(409, str(error))
        except Exception:  # for example, memory runs out: the replica must not end
            logger.exception("The scorer failed on %d prompts", len(request.items))
            return error_reply(500, "The scorer failed on this request.")

    def _score(self, request: ScoringRequest) -> ScoreResult:
        number = self._registry.state().current if request.version is None else request.version
        groups = [item.group() for item in request.items]
        if self._rewards is not None:
            return ScoreResult(version=number, rewards=tuple(map(tuple, self._rewards.score(groups))))
        if self._policies is None:
            raise ServingError(self._missing_reference)
        return ScoreResult(version=number, log_ratios=self._policies.log_ratios(groups, self._registry.version(number)))


class Policies:
    """Versions of a model beside their reference."""

    def __init__(self, registry: Registry, model: ModelConfig, *, max_length: int, device: torch.device) -> None:
        """
        Args:
            model: the reference, which is the base model of adapters.
            max_length: most tokens of a prompt and one completion.
        """
        from alignment.data.vocabulary import BoundedGroupTokenizer

        self._registry = registry
        self._device = device
        self._dtype = model.dtype
        self._data = DataConfig(path="-", max_length=max_length)
        self._reference = self._load(model.path)
        self._full_model: tuple[int, LanguageModel] | None = None
        self._adapter_model: Any = None
        self._adapters: list[int] = []
        self._tokenise = BoundedGroupTokenizer(
            self._reference.tokenizer,
            self._data,
            self._reference.end_tokens,
            num_embeddings=self._reference.num_embeddings,
            checks_answers=False,
        )

    def log_ratios(self, groups: list[Group], version: Version) -> tuple[tuple[LogRatios, ...], ...]:
        """Returns the log-ratios of every completion of every group, under one version.

        Raises:
            DataError: a group cannot be tokenised, or is longer than the model allows.
        """
        import torch

        from alignment.data.packing import micro_batches

        tokenised_groups = [self._tokenise_whole(group) for group in groups]
        lengths = [group.num_tokens for group in tokenised_groups]
        results: list[tuple[LogRatios, ...]] = [()] * len(groups)
        with torch.no_grad():
            for indices in micro_batches(range(len(groups)), lengths, max_tokens=MICRO_BATCH_TOKENS):
                micro_batch = [tokenised_groups[index] for index in indices]
                log_ratios = self._micro_batch_log_ratios(micro_batch, version)
                for index, group_log_ratios in zip(indices, log_ratios, strict=True):
                    results[index] = group_log_ratios
        return tuple(results)

    def _tokenise_whole(self, group: Group) -> Group:
        """Returns a group with its tokens; raises DataError if it is too long."""
        tokenised_group = self._tokenise(group)
        if any(completion.truncated for completion in tokenised_group.completions):
            raise DataError(f"prompt and completion are longer than {self._data.max_length} tokens together")
        return tokenised_group

    def _micro_batch_log_ratios(self, groups: list[Group], version: Version) -> Iterator[tuple[LogRatios, ...]]:
        """Yields the log-ratios of each group's completions; all groups go through one forward pass."""
        from alignment.data.packing import pack

        batch = pack(groups).to(self._device)
        ratios = (self._policy(batch, version) - self._logprobs(self._reference, batch)).tolist()
        texts = [self._reference.tokenizer.decode(token) for token in batch.tokens.tolist()]
        token_indices: list[list[int]] = [[] for _ in range(batch.num_completions)]
        for token_index in batch.loss_mask.nonzero().squeeze(1).tolist():
            token_indices[int(batch.completion_index[token_index])].append(token_index)
        completions = iter(
            [
                LogRatios(tokens=tuple(texts[i] for i in indices), values=tuple(ratios[i] for i in indices))
                for indices in token_indices
            ]
        )
        return (tuple(itertools.islice(completions, len(group.completions))) for group in groups)

    def _logprobs(self, model: LanguageModel, batch: Batch) -> torch.Tensor:
        from alignment.models.forward import outputs

        return outputs(model, batch).logprobs

    def _policy(self, batch: Batch, version: Version) -> torch.Tensor:
        """Returns the log-probabilities under a version: [T], in nats."""
        folder = self._registry.folder_of(version.number)
        if version.kind == "full":
            if self._full_model is None or self._full_model[0] != version.number:
                self._full_model = None  # first, so that there are never two in memory
                self._full_model = (version.number, self._load(str(folder)))
            return self._logprobs(self._full_model[1], batch)
        self._enable_adapter(version.number, folder)
        try:
            return self._logprobs(self._reference, batch)
        finally:
            self._adapter_model.base_model.disable_adapter_layers()

    def _enable_adapter(self, number: int, folder: Path) -> None:
        """Puts a version's adapter onto the base weights, and loads it first if it is not loaded."""
        from peft import PeftModel

        name = f"v{number}"
        if number in self._adapters:
            self._adapters.remove(number)
        elif self._adapter_model is None:
            self._adapter_model = PeftModel.from_pretrained(
                self._reference.module, folder, adapter_name=name, autocast_adapter_dtype=False
            )
        else:
            self._adapter_model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
        self._adapters.append(number)
        self._adapter_model.set_adapter(name)
        self._adapter_model.base_model.enable_adapter_layers()
        if len(self._adapters) > MAX_ADAPTERS:
            self._adapter_model.delete_adapter(f"v{self._adapters.pop(0)}")

    def _load(self, path: str) -> LanguageModel:
        from alignment.models.load import freeze, load_model

        config = ModelConfig(path=path, dtype=self._dtype)
        model = load_model(config, self._data, device=self._device, seed=0)
        freeze(model.module)
        return model


def _reward_model(config: ServeConfig, device: torch.device) -> ModelScorer:
    from alignment.rewards.model import RewardModel

    assert config.rewards.model is not None
    return RewardModel(path=config.rewards.model, on_unreadable="fail").build(device)


def _policies(config: ServeConfig, registry: Registry, device: torch.device) -> Policies:
    """Loads the reference of the versions.

    Raises:
        ServingError: no setting names the reference of whole weights, or the reference has too few positions.
    """
    path = reference_of(config, registry)
    if path is None:
        raise ServingError("Rewards of whole weights need their reference: set rewards.reference to its model.")
    max_length = rewards_length(config, model_source(path))
    return Policies(registry, ModelConfig(path=path, dtype=config.dtype), max_length=max_length, device=device)
