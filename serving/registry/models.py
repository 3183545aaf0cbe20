"""The models of an endpoint: each has versions, replicas and settings of its own, and requests choose one by its name.

FOLDER/NAME/                the registry of the first model, and what the endpoint has once: lease, keys, feedback
FOLDER/NAME/models/MODEL/   the registry of a further model

An endpoint with one model has the first folder alone, as it always was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from alignment.errors import AlignmentError, ServingError
from serving.config import ServeConfig
from serving.feedback.audit import entries_folder
from serving.registry.model_id import ModelId
from serving.registry.served_model import Membership, ServedModel, model_id_of, publish, registry_of
from serving.registry.versions import Registry

MODELS = "models"
"""Folder of the further models' registries, inside the first model's."""


class UnknownModel(ServingError):
    """The endpoint has no model of a name."""

    def __init__(self, name: str, names: Sequence[str]) -> None:
        super().__init__(f"There is no model {name[:100]!r} here; there are {', '.join(names)}.")


class ModelNotNamed(ServingError):
    """No model is named, and the endpoint has several."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"There are several models here, so model has to name one of {', '.join(names)}.")


class HasNames(Protocol):
    """What has the names of a model."""

    @property
    def served_model(self) -> ServedModel:
        """The version that answered at the start."""
        ...


@dataclass(frozen=True, kw_only=True)
class EndpointModel:
    """One model of an endpoint."""

    config: ServeConfig
    """Its settings, as those of an endpoint that serves it alone."""
    served_model: ServedModel
    """The version that answers at the start."""
    registry: Registry

    @property
    def id(self) -> ModelId:
        """The name under which its versions answer."""
        return ModelId(self.served_model.name)


Model = TypeVar("Model", bound=HasNames)


class ServedModels(Mapping[ModelId, Model], Generic[Model]):
    """The models of an endpoint by their names, the first one first."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = {ModelId(model.served_model.name): model for model in models}

    def __getitem__(self, name: str) -> Model:
        return self._models[name]  # type: ignore[index]  # a ModelId is equal to its text

    def __iter__(self) -> Iterator[ModelId]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def first(self) -> Model:
        """The model that the endpoint is named after."""
        return next(iter(self._models.values()))

    @property
    def names(self) -> list[str]:
        """Every name that requests for answers may give: those of the models and those of their bases."""
        return list(dict.fromkeys(name for model in self.values() for name in model.served_model.names))

    def choose(self, name: str | None) -> Model:
        """The model of a name; without a name, the only one.

        Raises:
            UnknownModel: there is none of this name.
            ModelNotNamed: there are several.
        """
        if name is None:
            if len(self) > 1:
                raise ModelNotNamed(list(self))
            return self.first
        if name not in self._models:
            raise UnknownModel(name, list(self))
        return self[name]

    def answering(self, name: str) -> Model:
        """The model whose replicas answer requests for a name, which may be that of its base.

        Of several models on one base, the first answers for it.

        Raises:
            UnknownModel: none does.
        """
        if name in self._models:
            return self[name]
        for model in self.values():
            if name == model.served_model.base_name:
                return model
        raise UnknownModel(name, self.names)


@dataclass(frozen=True, kw_only=True)
class EndpointPublication:
    """The result of `publish_models`."""

    models: ServedModels[EndpointModel]
    notes: tuple[str, ...]
    """Lines for people about models of which another version than the configured checkpoint answers."""


def model_configs(config: ServeConfig) -> dict[ModelId, ServeConfig]:
    """The settings of every model of an endpoint, each as those of an endpoint that serves it alone.

    Raises:
        ServingError: two models would have one name, or one folder.
    """
    first = model_id_of(config)
    folder = str(registry_of(config).folder / MODELS)
    configs = {first: config.model_copy(update={"models": {}})}
    folder_names = {first.folder_name}
    for model_config in config.all_models[1:]:
        name = ModelId(model_config.name or "")
        if name.folder_name in folder_names:
            raise ServingError(
                f"models.{name}: another model of this endpoint has this name, or one that differs by / and -- alone; "
                "give it another"
            )
        folder_names.add(name.folder_name)
        configs[name] = model_config.model_copy(update={"folder": folder})
    return configs


def publish_models(config: ServeConfig, *, is_live: bool = False, may_promote: bool = True) -> EndpointPublication:
    """Registers the checkpoint of every model, and finds the versions to serve, as `publish` does for one.

    Args:
        is_live: as for `publish`.
        may_promote: whether `promote` counts; an endpoint without its registry's lease changes no versions.

    Raises:
        AlignmentError: as for `publish`; the message names the model.
        ServingError: two models would have one name.
    """
    models, notes = [], []
    configs, first = model_configs(config), model_id_of(config)
    audit_folder = entries_folder(registry_of(config).folder)
    for name, model_config in configs.items():
        allowed_config = model_config.model_copy(update={"promote": model_config.promote and may_promote})
        promote_setting = "--promote" if name == first else f"models.{name}.promote=true"
        membership = Membership(name=name, audit_folder=audit_folder, promote_setting=promote_setting)
        try:
            publication = publish(allowed_config, is_live=is_live, membership=membership if len(configs) > 1 else None)
        except AlignmentError as error:
            if name == first:
                raise
            raise type(error)(f"models.{name}: {error}") from error
        served_model, registry = publication.served_model, publication.registry
        models.append(EndpointModel(config=model_config, served_model=served_model, registry=registry))
        if publication.note:
            notes.append(publication.note)
    _check_bases(models)
    return EndpointPublication(models=ServedModels(models), notes=tuple(notes))


def _check_bases(models: Sequence[EndpointModel]) -> None:
    """Checks that no two base models would answer under one name.

    Raises:
        ServingError: two would.
    """
    sources: dict[str, str] = {}
    for model in models:
        base_name, source = model.served_model.base_name, model.served_model.source
        if base_name is not None and sources.setdefault(base_name, source) != source:
            raise ServingError(
                f"the base models {sources[base_name]} and {source} would both be called {base_name!r}, and requests "
                "choose between them by name; rename the folder of one of them"
            )
