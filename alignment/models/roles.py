"""The models of a run by their roles: actor, critic, and the reference that the actor is compared with."""

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
from alignment.distributed.backends import loading_device, wrap, wrap_frozen
from alignment.distributed.trainable import TrainableModule
from alignment.distributed.world import World
from alignment.errors import ConfigError
from alignment.models.forward import outputs, scores, values
from alignment.models.load import LanguageModel, load_model
from alignment.rewards.model import MEAN, STD, RewardModel
from alignment.settings.run import RunConfig

Reference = Literal["none", "adapter_off", "copy", "precomputed"]
"""Where log π_ref comes from; see `ReferencedAlgorithm.reference`."""


@dataclass(frozen=True, kw_only=True)
class Critic:
    """The value model of a run."""

    model: LanguageModel | None
    """A separate model with a score head; None if the critic is only a head on the actor's trunk."""
    head: nn.Module | None
    """[H] → [1], the head of a critic that shares the actor's trunk; None for a separate model."""
    backend: TrainableModule
    """The critic's trained weights and their optimizer."""
    offset: float = 0.0
    """A constant that is added to the head's output, in units of the rewards. It is not 0 if the critic starts from a
    reward model whose scores have another mean."""


@dataclass(frozen=True, kw_only=True)
class ActorWeights:
    """The actor's weights for the engines; implements the Weights port."""

    actor: LanguageModel
    """The model that the weights belong to."""
    backend: TrainableModule
    """The backend that trains them."""
    version: int
    """Number of optimizer steps behind the weights."""

    def save_adapter(self, folder: Path) -> bool:
        """Gathers and writes the adapter; false if the model has none."""
        if not self.actor.has_adapter:
            return False
        weights = self.backend.gather_weights(only_trained=True)
        self.actor.module.save_pretrained(folder, state_dict=weights)
        return True

    def participate(self) -> None:
        """Takes part in gathering the weights that the main worker writes."""
        for _ in self.backend.named_weights(only_trained=self.actor.has_adapter):
            pass

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights by name, gathered one by one."""
        return self.backend.named_weights()


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The models that a run holds in memory, and their trainable parts."""

    algorithm: Algorithm
    actor: LanguageModel
    """The model in training; a reward model if the algorithm trains one."""
    actor_backend: TrainableModule
    """The actor's trained weights and their optimizer."""
    reference: Reference
    """Where log π_ref comes from; `none` if the algorithm uses no reference."""
    reference_model: LanguageModel | None
    """The frozen starting model if `reference` is `copy`, else None."""
    critic: Critic | None
    """The critic; None if the algorithm has none."""
    temperature: float
    """The temperature at which log-probabilities are computed."""

    @classmethod
    def build(cls, config: RunConfig, world: World) -> Roles:
        """Loads all models that the run's algorithm needs.

        Raises:
            ConfigError: the configured reference does not fit the kind of training.
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
            wrap_frozen(reference_model.root, config.optim, world)
        return cls(
            algorithm=algorithm,
            actor=actor,
            actor_backend=wrap(actor.module, config.optim, world, root=actor.root),
            reference=reference,
            reference_model=reference_model,
            critic=_critic(config, actor, world) if algorithm.needs_critic else None,
            temperature=config.rollout.temperature if algorithm.uses_sampling_temperature else 1.0,
        )

    @property
    def backends_by_role(self) -> dict[Role, TrainableModule]:
        """The backend of each role that is trained."""
        critic: dict[Role, TrainableModule] = {} if self.critic is None else {"critic": self.critic.backend}
        return {"actor": self.actor_backend, **critic}

    @property
    def in_lockstep(self) -> bool:
        """True if every worker must run the same number of forward and backward passes."""
        return any(backend.needs_lockstep for backend in self.backends_by_role.values())

    def outputs(self, batch: Batch) -> Outputs:
        """Runs the models in training over a packed batch, with gradients if they are enabled."""
        if self.algorithm.head == "score":
            return Outputs(logprobs=torch.empty(0), scores=scores(self.actor, batch))
        critic = self.critic
        head = None if critic is None else critic.head
        actor_outputs = outputs(
            self.actor,
            batch,
            temperature=self.temperature,
            entropies=self.algorithm.needs_entropy,
            value_head=head,
        )
        if critic is None or critic.model is None:
            return actor_outputs
        critic_values = values(critic.model, batch) + critic.offset * batch.loss_mask
        return Outputs(logprobs=actor_outputs.logprobs, entropies=actor_outputs.entropies, values=critic_values)

    @torch.no_grad()
    def annotations(self, batch: Batch) -> dict[str, Tensor]:
        """The values that the algorithm needs of a batch before the first update: [T] each, by the Batch's field."""
        fields: dict[str, Tensor] = {}
        if self.has_reference and batch.reference_logprobs is None:
            fields |= self.reference_annotations(batch)
        if self.algorithm.needs_old_logprobs or self.critic is not None:
            with _eval_mode(self.actor.module):
                old_outputs = self.outputs(batch)
            if self.algorithm.needs_old_logprobs:
                fields["old_logprobs"] = old_outputs.logprobs
            if old_outputs.values is not None:
                fields["old_values"] = old_outputs.values
        return fields

    @property
    def has_reference(self) -> bool:
        """True if the reference can be run on any text, because it is a copy or the base of the trained adapter."""
        return self.reference_model is not None or (self.reference != "none" and self.actor.has_adapter)

    @torch.no_grad()
    def reference_annotations(self, batch: Batch) -> dict[str, Tensor]:
        """[T] log-probabilities (nats) under the reference, by the Batch's field.

        Without a copy and without an adapter, the actor itself is the reference. That holds only before the first step;
        see `precompute`.
        """
        module = self.actor.module
        # Dropout of the adapter and gradient checkpointing are for training only.
        with _eval_mode(module), module.disable_adapter() if self.actor.has_adapter else contextlib.nullcontext():
            reference_outputs = outputs(self.reference_model or self.actor, batch, temperature=self.temperature)
        return {"reference_logprobs": reference_outputs.logprobs}

    def weights(self, version: int) -> ActorWeights:
        """The actor's weights for the engines, with the number of optimizer steps behind them."""
        return ActorWeights(actor=self.actor, backend=self.actor_backend, version=version)

    def store_reward_statistics(self, metrics: dict[str, float]) -> None:
        """Stores mean and standard deviation of held-out scores in a reward model's configuration.

        A scorer can normalise its rewards by them. Nothing happens for a language model.
        """
        if self.algorithm.head == "score":
            mean, square = metrics["scores/mean"], metrics["scores/mean_square"]
            self.actor.network.config.update({MEAN: mean, STD: max(0.0, square - mean**2) ** 0.5})

    def train(self, mode: bool = True) -> None:
        """Switches the models in training to train mode, or to evaluation mode."""
        self.actor.module.train(mode)
        if self.critic is not None and self.critic.model is not None:
            self.critic.model.module.train(mode)


def reference_of(config: RunConfig) -> Reference:
    """Resolves `algorithm.reference`; `none` for an algorithm without a reference.

    Raises:
        ConfigError: `adapter_off` without LoRA, or `precomputed` with a stream.
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
    """Makes the configured critic: a separate model, or a head on the actor's trunk."""
    optim = config.optim.model_copy(update={"lr": config.critic.lr or config.optim.lr})
    if config.critic.trunk == "separate":
        lora = config.model.lora
        if lora is not None:
            lora = lora.model_copy(update={"start": None})  # the adapter to start from is an actor's, not a critic's
        critic_config = config.model.model_copy(update={"path": config.critic.path or config.model.path, "lora": lora})
        device = loading_device(config.optim, world)
        model = load_model(critic_config, config.data, device=device, seed=config.seed + 1, head="score")
        offset = _scale_to_rewards(model, config)
        backend = wrap(model.module, optim, world, root=model.root)
        return Critic(model=model, head=None, backend=backend, offset=offset)
    size = actor.network.get_output_embeddings().weight.shape[1]
    torch.manual_seed(config.seed + 1)
    head = nn.Linear(size, 1, bias=False)
    nn.init.normal_(head.weight, std=(size + 1) ** -0.5)
    head = head.to(world.device)
    return Critic(model=None, head=head, backend=wrap(head, optim, world))


@torch.no_grad()
def _scale_to_rewards(model: LanguageModel, config: RunConfig) -> float:
    """Makes the first values of a critic that was a reward model equal to the rewards that it gives as a scorer.

    The rewards of a scorer are weight · (score - mean) / std. The factor is multiplied into the head's weights. The
    constant is returned, because the head has no bias.
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
    """Puts a module into evaluation mode inside this context."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
