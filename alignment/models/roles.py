"""The models of a run by the part they play: actor, critic, and the reference that the actor is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignment.algorithms import Algorithm, ReferencedAlgorithm
from alignment.batch import Batch, Outputs, Role
from alignment.errors import ConfigError
from alignment.models.forward import outputs, scores, values
from alignment.models.load import LanguageModel, load_model
from alignment.models.parallel import Trained, World, loading_device, shard, shard_frozen
from alignment.rewards.model import MEAN, STD, RewardModel
from alignment.settings.run import RunConfig

Reference = Literal["none", "adapter_off", "copy", "precomputed"]


@dataclass(frozen=True, kw_only=True)
class Critic:
    """Says what a state is worth."""

    model: LanguageModel | None
    """A model of its own with a score head; None if it is only a head on the actor's trunk."""
    head: nn.Module | None
    """[H] → [1], for a critic without a trunk of its own."""
    trained: Trained
    offset: float = 0.0
    """Added to what the head says, and not trained: where a reward model's scores begin, in units of the rewards."""


@dataclass(frozen=True, kw_only=True)
class ActorWeights:
    """The Weights port over the actor."""

    actor: LanguageModel
    trained: Trained
    version: int

    def save_adapter(self, folder: Path) -> bool:
        if not self.actor.has_adapter:
            return False
        weights = self.trained.gathered(only_trained=True)
        self.actor.module.save_pretrained(folder, state_dict=weights)
        return True

    def join(self) -> None:
        for _ in self.trained.full(only_trained=self.actor.has_adapter):
            pass

    def full(self) -> Iterator[tuple[str, Tensor]]:
        return self.trained.full()


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What a run holds in memory."""

    algorithm: Algorithm
    actor: LanguageModel
    """The model that is trained; a reward model, if the algorithm trains one."""
    trained: Trained
    """The actor's trained weights and their optimizer."""
    reference: Reference
    """Where log π_ref comes from; `none` if the algorithm does not compare."""
    copy: LanguageModel | None
    """The frozen starting model, for `copy`."""
    critic: Critic | None
    temperature: float
    """At which log-probabilities are taken."""

    @classmethod
    def build(cls, config: RunConfig, world: World) -> Roles:
        """Loads every model that the run's algorithm needs.

        Raises:
            ConfigError: the way to the reference does not go with the kind of training.
            ModelError: a model cannot be loaded.
        """
        algorithm = config.algorithm
        assert isinstance(algorithm, Algorithm)
        reference = reference_of(config)
        device = loading_device(config.optim, world)
        actor = load_model(config.model, config.data, device=device, seed=config.seed, head=algorithm.head)
        reference_model = None
        if reference == "copy":
            reference_config = config.model.model_copy(update={"lora": None, "gradient_checkpointing": False})
            reference_model = load_model(reference_config, config.data, device=device, seed=config.seed)
            shard_frozen(reference_model.module, config.optim, world)
        return cls(
            algorithm=algorithm,
            actor=actor,
            trained=shard(actor.module, config.optim, world),
            reference=reference,
            copy=reference_model,
            critic=_critic(config, actor, world) if algorithm.needs_critic else None,
            temperature=config.rollout.temperature if algorithm.tempered else 1.0,
        )

    @property
    def trained_by_role(self) -> dict[Role, Trained]:
        """Everything that is trained."""
        critic: dict[Role, Trained] = {} if self.critic is None else {"critic": self.critic.trained}
        return {"actor": self.trained, **critic}

    @property
    def in_lockstep(self) -> bool:
        """True if every worker must make as many passes as the others."""
        return any(backend.lockstep for backend in self.trained_by_role.values())

    def outputs(self, batch: Batch) -> Outputs:
        """What the trained models say about a batch, with gradients if they are enabled."""
        if self.algorithm.head == "score":
            return Outputs(logprobs=torch.empty(0), scores=scores(self.actor, batch))
        critic = self.critic
        head = None if critic is None else critic.head
        actor_outputs = outputs(
            self.actor,
            batch,
            temperature=self.temperature,
            entropies=self.algorithm.wants_entropy,
            value_head=head,
        )
        if critic is None or critic.model is None:
            return actor_outputs
        critic_values = values(critic.model, batch) + critic.offset * batch.learned
        return Outputs(logprobs=actor_outputs.logprobs, entropies=actor_outputs.entropies, values=critic_values)

    @torch.no_grad()
    def annotations(self, batch: Batch) -> dict[str, Tensor]:
        """What must be known of a batch before it is learned from, by the name of the Batch's field, each [T]."""
        fields: dict[str, Tensor] = {}
        if self.has_reference and batch.reference_logprobs is None:
            fields |= self.under_reference(batch)
        if self.algorithm.needs_old or self.critic is not None:
            with _eval_mode(self.actor.module):
                old_outputs = self.outputs(batch)
            if self.algorithm.needs_old:
                fields["old_logprobs"] = old_outputs.logprobs
            if old_outputs.values is not None:
                fields["old_values"] = old_outputs.values
        return fields

    @property
    def has_reference(self) -> bool:
        """True if the reference is in memory, for any text: as a copy, or below the adapter that is trained."""
        return self.copy is not None or (self.reference != "none" and self.actor.has_adapter)

    @torch.no_grad()
    def under_reference(self, batch: Batch) -> dict[str, Tensor]:
        """[T] log-probabilities (nats) under the reference, by the name of the Batch's field.

        Where it is in memory as the actor alone, that is only so before the first step: see `precompute`.
        """
        module = self.actor.module
        # The adapter's dropout, and gradient checkpointing, belong to training only.
        with _eval_mode(module), module.disable_adapter() if self.actor.has_adapter else contextlib.nullcontext():
            reference_outputs = outputs(self.copy or self.actor, batch, temperature=self.temperature)
        return {"reference_logprobs": reference_outputs.logprobs}

    def weights(self, version: int) -> ActorWeights:
        """The actor's weights, for the engines."""
        return ActorWeights(actor=self.actor, trained=self.trained, version=version)

    def remember(self, metrics: dict[str, float]) -> None:
        """Keeps the level and spread of held-out rewards with a reward model, for those who normalise by them."""
        if self.algorithm.head == "score":
            mean, square = metrics["scores/mean"], metrics["scores/mean_square"]
            self.actor.network.config.update({MEAN: mean, STD: max(0.0, square - mean**2) ** 0.5})

    def train(self, mode: bool = True) -> None:
        """Switches what is trained between learning and being measured."""
        self.actor.module.train(mode)
        if self.critic is not None and self.critic.model is not None:
            self.critic.model.module.train(mode)


def reference_of(config: RunConfig) -> Reference:
    """Resolves `algorithm.reference`.

    Raises:
        ConfigError: `adapter_off` without LoRA, or `precomputed` from a stream.
    """
    if not isinstance(config.algorithm, ReferencedAlgorithm):
        return "none"
    setting: Any = config.algorithm.reference
    if setting == "auto":
        return "adapter_off" if config.model.lora else "copy"
    if setting == "adapter_off" and config.model.lora is None:
        raise ConfigError(
            "algorithm.reference adapter_off needs model.lora: without an adapter nothing can be taken off"
        )
    if setting == "precomputed" and any(source.streaming for source in config.data.sources):
        raise ConfigError("algorithm.reference precomputed needs data that is read before training, not a stream")
    return setting  # type: ignore[no-any-return]


def _critic(config: RunConfig, actor: LanguageModel, world: World) -> Critic:
    optim = config.optim.model_copy(update={"lr": config.critic.lr or config.optim.lr})
    if config.critic.trunk == "separate":
        lora = config.model.lora
        if lora is not None:
            lora = lora.model_copy(update={"start": None})  # an actor's adapter, which says nothing of values
        critic_config = config.model.model_copy(update={"path": config.critic.path or config.model.path, "lora": lora})
        device = loading_device(config.optim, world)
        model = load_model(critic_config, config.data, device=device, seed=config.seed + 1, head="score")
        offset = _scale_to_rewards(model, config)
        return Critic(model=model, head=None, trained=shard(model.module, optim, world), offset=offset)
    size = actor.network.get_output_embeddings().weight.shape[1]
    torch.manual_seed(config.seed + 1)
    head = nn.Linear(size, 1, bias=False)
    nn.init.normal_(head.weight, std=(size + 1) ** -0.5)
    head = head.to(world.device)
    return Critic(model=None, head=head, trained=shard(head, optim, world))


@torch.no_grad()
def _scale_to_rewards(model: LanguageModel, config: RunConfig) -> float:
    """Lets a critic that was a reward model begin with the rewards that it gives as a scorer, and not with raw scores.

    A scorer's rewards are weight · (score - mean) / std. The factor goes into the head's weights; returned is the rest,
    which the head, being without bias, cannot hold.
    """
    if config.critic.path is None:
        return 0.0
    settings = model.network.config.to_dict()
    mean, std = settings.get(MEAN, 0.0), settings.get(STD, 1.0)
    weight = 1.0
    for scorer in config.rewards:
        if isinstance(scorer, RewardModel) and scorer.path == config.critic.path:
            weight = scorer.weight
            mean, std = (mean, std) if scorer.normalise else (0.0, 1.0)
    if not std > 0:
        return 0.0
    for name, parameter in model.network.named_parameters():
        if name.startswith("score."):
            parameter *= weight / std
    return float(-mean * weight / std)


@contextlib.contextmanager
def _eval_mode(module: Any) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
