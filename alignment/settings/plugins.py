"""Names in a configuration that stand for code: for something that comes with raylign, or for one's own."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from alignment.errors import ConfigError
from alignment.settings.explain import explain, nearest
from alignment.settings.section import Fp32Number, Positive, PositiveCount, Section, as_value_error

TRANSFER_METHODS = ("send", "clear", "sweep", "receive", "adapter_folder")
"""The methods of `alignment.rollout.transfer.WeightTransfer`, whose import needs torch."""
MODULE_FOLDERS: list[str] = []
"""Where modules are looked for beside what is installed: Ray's workers get the current folder by Ray, these by us."""


def search_for_modules(folder: Path) -> None:
    """Lets functions and classes that a configuration names be found in a folder, behind what is installed."""
    if (path := str(folder.resolve())) not in sys.path:
        sys.path.append(path)
    if path not in MODULE_FOLDERS:
        MODULE_FOLDERS.append(path)


def load_attribute(name: str, purpose: str) -> Any:
    """What a dotted `package.module:attribute` names.

    Args:
        purpose: what the name stands for, as `algorithm`; for the error.

    Raises:
        ConfigError: there is no such thing; if the module has an attribute of a similar name, the text says which.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        if not hasattr(module, attribute):
            hint = nearest(attribute, [key for key in vars(module) if not key.startswith("_")], only_match=True)
            raise AttributeError(f"module {module_name!r} has no attribute {attribute!r}{hint}")
        return getattr(module, attribute)
    except ModuleNotFoundError as error:
        folders = [folder for folder in sys.path if not folder.startswith((sys.prefix, sys.base_prefix))]
        raise ConfigError(
            f"{purpose} {name!r} cannot be imported: {error}. Modules are looked for in the current folder, in that of "
            f"the configuration, on PYTHONPATH ({', '.join(folders) or 'none'}), and among the installed packages"
        ) from error
    except Exception as error:  # anything may come: the module's code is run, and its name may be malformed
        kind = "" if isinstance(error, ImportError | AttributeError | TypeError | ValueError) else type(error).__name__
        raise ConfigError(f"{purpose} {name!r} cannot be imported: {kind}{': ' if kind else ''}{error}") from error


def hint_for(name: str, known_names: list[str]) -> str:
    """What an unknown name may have meant, as the end of a sentence."""
    module_name, dot, attribute = name.rpartition(".")
    if dot and all(map(str.isidentifier, name.split("."))):
        return f"; one's own is given as module:name, as {module_name}:{attribute}"
    return nearest(name, known_names) if known_names else "; one's own is given as package.module:function"


def load_plugin(name: str, builtin: Mapping[str, Any], purpose: str, *, callable_only: bool = False) -> Any:
    """Finds what a name in a configuration stands for.

    Args:
        name: one of `builtin`, or a dotted `package.module:attribute`.
        builtin: what comes with raylign, or the dotted name of it.
        purpose: what the name stands for, as `algorithm`; for the error.
        callable_only: whether only a function or a class will do.

    Raises:
        ConfigError: there is no such thing, and the text names the nearest one that there is; or it is of a wrong kind.
    """
    target: Any = name
    if ":" not in name:
        if name not in builtin:
            hint = hint_for(name, list(builtin))
            raise ConfigError(f"there is no {purpose} {name!r}{hint}")
        target = builtin[name]
    target = load_attribute(target, purpose) if isinstance(target, str) else target
    if callable_only and not callable(target):
        raise ConfigError(f"{purpose} {name!r} is a {type(target).__name__}, not a function")
    return target


class AlgorithmConfig(Section):
    """What to optimise."""

    head: ClassVar[Literal["language", "score"]] = "language"
    """What is trained: a language model, or a model that gives every completion a score."""
    is_online: ClassVar[bool] = False
    """True if it learns from the model's own answers to the prompts, as the run's scorers judge them."""
    min_completions: ClassVar[int] = 1
    """Fewest completions of a prompt that it can learn from."""

    name: str
    """A module of `alignment.algorithms`, or a dotted `package.module:Class` of one's own."""


def names_in_folder(folder: str, attribute: str) -> dict[str, str]:
    """The dotted name of an attribute that each module of a folder of `alignment` has, by the name of the module.

    The modules are not imported, because that may need torch. A module that begins with an underscore has none.
    """
    stems = sorted(path.stem for path in (Path(__file__).parents[1] / folder).glob("[a-z]*.py"))
    return {stem: f"alignment.{folder.replace('/', '.')}.{stem}:{attribute}" for stem in stems}


def builtin_algorithms() -> dict[str, str]:
    """The algorithms that come with raylign, by name: the modules of `alignment.algorithms`."""
    names = names_in_folder("algorithms", "ALGORITHM")
    return {stem.replace("_plus_plus", "++"): target for stem, target in names.items()}


def builtin_attentions() -> dict[str, str]:
    """The attentions that come with raylign, by name: the modules of `alignment.models.attention`."""
    return names_in_folder("models/attention", "ATTENTION")


def builtin_weight_transfers() -> dict[str, str]:
    """The weight transfers that come with raylign, by name: the modules of `alignment.rollout.transfer`."""
    return names_in_folder("rollout/transfer", "TRANSFER")


def algorithm_names() -> list[str]:
    """Names of the algorithms that come with raylign."""
    return sorted(builtin_algorithms())


def algorithm_class(name: str) -> type[AlgorithmConfig]:
    """Finds the class behind an algorithm's name.

    Raises:
        ConfigError: no module of that name, or `package.module:Class` does not exist.
    """
    algorithm = load_plugin(name, builtin_algorithms(), "algorithm")
    if not (isinstance(algorithm, type) and issubclass(algorithm, AlgorithmConfig)):
        kind = "" if isinstance(algorithm, type) else f"a {type(algorithm).__name__}, "
        raise ConfigError(f"algorithm {name!r} is {kind}not a subclass of alignment.algorithms.Algorithm")
    return algorithm


def load_weight_transfer(name: str) -> type[Any]:
    """Finds the class behind the name of a weight transfer; `alignment.rollout.transfer` says what such a class does.

    Raises:
        ConfigError: there is no such class.
    """
    transfer = load_plugin(name, builtin_weight_transfers(), "weight transfer")
    if not isinstance(transfer, type):
        raise ConfigError(f"weight transfer {name!r} is a {type(transfer).__name__}, not a class")
    if missing_methods := [method for method in TRANSFER_METHODS if not callable(getattr(transfer, method, None))]:
        raise ConfigError(f"weight transfer {name!r} has no {', '.join(missing_methods)}")
    return transfer


def load_attention(name: str) -> Any:
    """Finds the `alignment.models.attention.PackedAttention` of a name. Its import needs torch.

    Raises:
        ConfigError: there is no such attention.
    """
    attention = load_plugin(name, builtin_attentions(), "attention")
    if not isinstance(attention, load_attribute("alignment.models.attention:PackedAttention", "attention")):
        raise ConfigError(f"attention {name!r} is a {type(attention).__name__}, not a PackedAttention")
    return attention


def load_function(name: str, purpose: str) -> Any:
    """Finds the function or class of one's own behind a dotted `package.module:attribute`.

    Args:
        purpose: what the name stands for, as `shape`; for the error.

    Raises:
        ConfigError: there is no such attribute, or it is neither a function nor a class.
    """
    return load_plugin(name, {}, purpose, callable_only=True)


class EnvironmentConfig(Section):
    """What the model talks with, so that a completion is a conversation of several turns."""

    name: Annotated[str, Field(json_schema_extra={"pattern": ":"})]
    """A dotted `package.module:function_or_class` of one's own. Called with the group (and `arguments`), it returns the
    environment of one completion: an object with `async def step(answer: str) -> Observation`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments that it is called with beside the group."""
    max_turns: PositiveCount = 4
    """Most answers of the model in one conversation; `rollout.max_tokens` bounds the whole of it."""

    @field_validator("name")
    @classmethod
    def _known_environment(cls, name: str) -> str:
        with as_value_error():
            load_function(name, "environment")
        return name

    @model_validator(mode="after")
    def _has_its_shape(self) -> Self:
        """Checks that it can be called with a group, and if it is a class, that its `step` is async."""
        environment = load_function(self.name, "environment")
        if signature := _signature_of(environment):
            try:
                signature.bind(None, **self.arguments)
            except TypeError as error:
                arguments = ", ".join(self.arguments) or "none"
                raise ValueError(
                    f"{self.name}{signature} cannot be called with the group and `arguments` ({arguments}): {error}"
                ) from error
        if not isinstance(environment, type):
            return self
        step = getattr(environment, "step", None)
        if not callable(step):
            raise ValueError(f"{self.name} has no method step; write `async def step(self, answer: str)`")
        step = inspect.unwrap(step)
        if inspect.isfunction(step) and not inspect.iscoroutinefunction(step):
            raise ValueError(f"{self.name}.step is not async; write `async def step(self, answer: str)`")
        return self


def _signature_of(function: Any) -> inspect.Signature | None:
    """The signature of a function or class; None if it tells none, as some that are not written in Python."""
    try:
        return inspect.signature(function)
    except ValueError:
        return None


class ScorerConfig(Section):
    """One source of rewards."""

    name: str
    """A ready-made rule, `model`, `http`, or a dotted `package.module:function` of one's own."""
    weight: Fp32Number = 1.0
    """Factor of this reward in the sum; may be negative."""
    clip: Positive | None = None
    """Rewards are cut to -clip … clip before the weight; None never cuts."""
    attempts: PositiveCount = 3
    """Times that a reward is asked for which is missing, late or not a finite number, before the run stops."""
    on_unreadable: Literal["fail"] | Fp32Number = 0.0
    """Reward of a text that the scorer cannot read, such as one that is too long for it, which a policy may write at
    any time; `fail` stops the run instead. The first such text is told. What is wrong with a row is an error in either
    case."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it compares with, which `data.keep` must name."""
        return ()


@functools.cache
def builtin_scorers() -> dict[str, type[ScorerConfig]]:
    """The scorers that come with raylign, by name: the entries of `SCORERS` in the modules of `alignment.rewards`."""
    scorers: dict[str, type[ScorerConfig]] = {}
    for path in sorted((Path(__file__).parents[1] / "rewards").glob("[a-z]*.py")):
        scorers |= vars(importlib.import_module(f"alignment.rewards.{path.stem}")).get("SCORERS", {})
    return dict(sorted(scorers.items()))


def scorer_names() -> list[str]:
    """Names of the built-in scorers."""
    return list(builtin_scorers())


def scorer_class(name: str) -> type[ScorerConfig]:
    """Returns the configuration class of a scorer.

    Args:
        name: a name of `scorer_names`; or `package.module:function` (`alignment.rewards.functions` says what such a
            function gets and returns); or `package.module:Class` with a subclass of `BuildableScorer`.

    Raises:
        ConfigError: there is no such scorer; the text names the nearest known one.
    """
    builtin = {} if ":" in name else builtin_scorers()  # one's own needs none of their modules
    scorer = load_plugin(name, builtin, "scorer", callable_only=True)
    if isinstance(scorer, type):
        if not issubclass(scorer, ScorerConfig):
            raise ConfigError(
                f"scorer {name!r} is neither a function nor a subclass of alignment.rewards.BuildableScorer"
            )
        return scorer
    return cast(type[ScorerConfig], load_attribute("alignment.rewards.functions:RewardFunction", "scorer"))


def load_scorers(value: Any) -> Any:
    """The settings of several scorers, each as its own class."""
    if isinstance(value, str):
        raise ValueError(f"a list of sections is wanted: write [{{name: {_quoted(value)}}}]")
    return tuple(_load_scorer(item) for item in value) if isinstance(value, list | tuple) else value


Scorers = Annotated[tuple[SerializeAsAny[ScorerConfig], ...], BeforeValidator(load_scorers)]
"""Each with the settings of its own class, which its name decides."""


def _quoted(name: str) -> str:
    """A name as it is written in YAML's flow style: a dotted one in quotes."""
    return f'"{name}"' if ":" in name else name


def _load_scorer(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(f"a section is wanted: write {{name: {_quoted(value)}}}")
    if not isinstance(value, dict):
        return value
    if not isinstance(value.get("name"), str):
        raise ValueError("needs a name: that of a rule, model, http, or your own package.module:function")
    with as_value_error():
        kind = scorer_class(value["name"])
        try:
            return kind.model_validate(value)
        except ValidationError as error:  # pydantic would name the key, but not which of the scorers it belongs to
            problems = (problem.removeprefix("the whole file: ") for problem in explain(error, kind, value))
            raise ValueError(f"{value['name']}: {'; '.join(problems)}") from error
