"""What completions are worth, behind `POST /v1/rewards`: a replica of its own, so that no question can hurt the engine.

groups ─► tokens ─► the packed forward pass of training, with the adapter and without ─► log π - log π_ref per token

An aligned model is its own reward model: β (log π - log π_ref) is the reward that it was aligned to (arXiv 2305.18290,
equation 5, up to a term of the prompt alone). One copy of the base weights answers for every adapter and for the
reference. A reward model that was trained as one may stand in its place.
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
from alignment.models.folders import model_source
from alignment.rewards.remote import ChatMessage
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from serving.config import Device, ServeConfig
from serving.registry import Registry, Version
from serving.schema import Reply, refusal
from serving.served import reference_of, rewards_length

if TYPE_CHECKING:  # torch takes seconds, and the ingress, which knows this module's types, has no use for it
    import torch

    from alignment.batch import Batch
    from alignment.groups import Group
    from alignment.models.load import LanguageModel
    from alignment.rewards.model import ModelScorer

logger = logging.getLogger("ray.serve")

SCORING_NAME = "scoring"
"""The deployment's name."""
MAX_BATCH = 64
"""Requests that are rated together."""
MAX_ADAPTERS = 4
"""Adapters that are kept at a time."""
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One prompt and what may follow it."""

    prompt: str | tuple[ChatMessage, ...]
    completions: tuple[str, ...]

    def group(self) -> Group:
        """The same as a Group, which needs torch."""
        from alignment.groups import Completion, Group, Message

        completions = tuple(Completion(text=text) for text in self.completions)
        if isinstance(self.prompt, str):
            return Group(id="request", prompt=self.prompt, completions=completions)
        turns = tuple(Message(role=turn.role, content=turn.content) for turn in self.prompt)
        return Group(id="request", prompt=turns, completions=completions)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one request asks. It crosses Ray's process borders."""

    items: tuple[Asked, ...]
    version: int | None
    """Number of the model version; None is the current one."""


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Of one completion: log π - log π_ref (nats) of its tokens."""

    tokens: tuple[str, ...]
    """Their texts."""
    values: tuple[float, ...]

    @property
    def total(self) -> float:
        """Nats of the whole completion."""
        return sum(self.values)


@dataclass(frozen=True, kw_only=True)
class Rated:
    """The answer to a job: either log-ratios or a reward model's rewards, per group and completion."""

    version: int
    ratios: tuple[tuple[Ratios, ...], ...] = ()
    rewards: tuple[tuple[float, ...], ...] = ()


class Scoring:
    """The Ray Serve deployment that rates."""

    def __init__(self, config: ServeConfig, device: Device, registry: str) -> None:
        """`registry`: folder of the versions."""
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))  # Ray allows one per reserved CPU
        where = torch.device(device)
        self._registry = Registry(Path(registry))
        self._rewards = None if config.rewards.model is None else _reward_model(config, where)
        self._policies: Policies | None = None
        self._lacks = ""
        if self._rewards is None:
            try:
                self._policies = _policies(config, self._registry, where)
            except ServingError as error:  # the rest of the service can do without
                self._lacks = str(error)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
    async def rate(self, jobs: list[Job]) -> list[Rated | Reply]:
        """Rates completions; what waits is rated together, and a job that cannot be rated is refused alone."""
        return await asyncio.to_thread(self._all, jobs)

    def _all(self, jobs: list[Job]) -> list[Rated | Reply]:
        """Version by version, however they came: whole weights are loaded once per version, not once per job."""
        order = sorted(range(len(jobs)), key=lambda index: jobs[index].version or 0)
        rated = {index: self._one(jobs[index]) for index in order}
        return [rated[index] for index in range(len(jobs))]

    async def is_running(self) -> bool:
        """True: said past the queue, by a replica that has loaded its model."""
        return True

    def _one(self, job: Job) -> Rated | Reply:
        try:
            return self._rated(job)
        except (DataError, RewardError) as error:
            return refusal(400, f"This cannot be rated: {error}")
        except AlignmentError as error:
            return refusal(409, str(error))
        except Exception:  # as when memory runs out: the replica has to live on
            logger.exception("The scorer failed on %d prompts", len(job.items))
            return refusal(500, "The scorer failed on this request.")

    def _rated(self, job: Job) -> Rated:
        number = self._registry.state().current if job.version is None else job.version
        groups = [item.group() for item in job.items]
        if self._rewards is not None:
            return Rated(version=number, rewards=tuple(map(tuple, self._rewards.score(groups))))
        if self._policies is None:
            raise ServingError(self._lacks)
        return Rated(version=number, ratios=self._policies.ratios(groups, self._registry.version(number)))


class Policies:
    """Versions of a model beside their reference."""

    def __init__(self, registry: Registry, model: ModelConfig, *, max_length: int, device: torch.device) -> None:
        """
        Args:
            model: the reference; the base of adapters.
            max_length: most tokens of a prompt and one completion.
        """
        from alignment.data.vocabulary import BoundedGroupTokenizer

        self._registry = registry
        self._device = device
        self._dtype = model.dtype
        self._data = DataConfig(path="-", max_length=max_length)
        self._reference = self._load(model.path)
        self._whole: tuple[int, LanguageModel] | None = None
        self._adapted: Any = None
        self._adapters: list[int] = []
        self._tokenise = BoundedGroupTokenizer(
            self._reference.tokenizer,
            self._data,
            self._reference.end_tokens,
            num_embeddings=self._reference.num_embeddings,
            checks_answers=False,
        )

    def ratios(self, groups: list[Group], version: Version) -> tuple[tuple[Ratios, ...], ...]:
        """Log-ratios under one version, of every completion of every group.

        Raises:
            DataError: a group cannot be tokenised, or is longer than the model.
        """
        import torch

        from alignment.data.packing import micro_batches

        fitting = [self._fitting(group) for group in groups]
        lengths = [group.num_tokens for group in fitting]
        found: list[tuple[Ratios, ...]] = [()] * len(groups)
        with torch.no_grad():
            for chosen in micro_batches(range(len(groups)), lengths, max_tokens=MICRO_BATCH_TOKENS):
                for index, ratios in zip(chosen, self._of([fitting[index] for index in chosen], version), strict=True):
                    found[index] = ratios
        return tuple(found)

    def _fitting(self, group: Group) -> Group:
        found = self._tokenise(group)
        if any(completion.truncated for completion in found.completions):
            raise DataError(f"prompt and completion are longer than {self._data.max_length} tokens together")
        return found

    def _of(self, groups: list[Group], version: Version) -> Iterator[tuple[Ratios, ...]]:
        from alignment.data.packing import pack

        batch = pack(groups).to(self._device)
        ratios = (self._policy(batch, version) - self._logprobs(self._reference, batch)).tolist()
        texts = [self._reference.tokenizer.decode(token) for token in batch.tokens.tolist()]
        places: list[list[int]] = [[] for _ in range(batch.num_completions)]
        for place in batch.learned.nonzero().squeeze(1).tolist():
            places[int(batch.branches[place])].append(place)
        told = iter(
            [Ratios(tokens=tuple(texts[i] for i in own), values=tuple(ratios[i] for i in own)) for own in places]
        )
        return (tuple(itertools.islice(told, len(group.completions))) for group in groups)

    def _logprobs(self, model: LanguageModel, batch: Batch) -> torch.Tensor:
        from alignment.models.forward import outputs

        return outputs(model, batch).logprobs

    def _policy(self, batch: Batch, version: Version) -> torch.Tensor:
        """[T] log-probabilities (nats) under a version."""
        folder = self._registry.folder_of(version.number)
        if version.kind == "full":
            if self._whole is None or self._whole[0] != version.number:
                self._whole = None  # first, so that two never lie in memory
                self._whole = (version.number, self._load(str(folder)))
            return self._logprobs(self._whole[1], batch)
        self._adapt(version.number, folder)
        try:
            return self._logprobs(self._reference, batch)
        finally:
            self._adapted.base_model.disable_adapter_layers()

    def _adapt(self, number: int, folder: Path) -> None:
        """Puts a version's adapter onto the base weights, loading it if need be."""
        from peft import PeftModel

        name = f"v{number}"
        if number in self._adapters:
            self._adapters.remove(number)
        elif self._adapted is None:
            self._adapted = PeftModel.from_pretrained(
                self._reference.module, folder, adapter_name=name, autocast_adapter_dtype=False
            )
        else:
            self._adapted.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
        self._adapters.append(number)
        self._adapted.set_adapter(name)
        self._adapted.base_model.enable_adapter_layers()
        if len(self._adapters) > MAX_ADAPTERS:
            self._adapted.delete_adapter(f"v{self._adapters.pop(0)}")

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
    """Versions beside their reference.

    Raises:
        ServingError: nobody says what the reference of whole weights is, or it has too few positions.
    """
    path = reference_of(config, registry)
    if path is None:
        raise ServingError("Rewards of whole weights need their reference: set rewards.reference to its model.")
    max_length = rewards_length(config, model_source(path))
    return Policies(registry, ModelConfig(path=path, dtype=config.dtype), max_length=max_length, device=device)
