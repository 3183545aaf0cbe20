"""The JSON Schema of a run's YAML file, which editors use to complete and explain keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from alignment.optimizers import OPTIMIZERS
from alignment.settings.plugins import (
    AlgorithmConfig,
    ScorerConfig,
    algorithm_class,
    algorithm_names,
    builtin_attentions,
    builtin_weight_transfers,
    scorer_class,
    scorer_names,
)
from alignment.settings.run import RunConfig
from alignment.settings.section import Section
from alignment.trackers import TRACKERS


def json_schema(kind: type[RunConfig]) -> dict[str, Any]:
    """JSON Schema of a run's YAML file, with one alternative per algorithm and per scorer."""
    schema = kind.model_json_schema()
    algorithms = [algorithm_class(name) for name in algorithm_names()]
    scorers = [scorer_class(name) for name in scorer_names()]
    schema["properties"]["algorithm"] = {
        "anyOf": _alternatives(schema, AlgorithmConfig, algorithms),
        "description": RunConfig.model_fields["algorithm"].description,
    }
    schema["$defs"]["OptimConfig"]["properties"]["name"] |= _names(OPTIMIZERS)
    schema["$defs"]["ModelConfig"]["properties"]["attention"] |= _names(["auto", *builtin_attentions()])
    schema["$defs"]["RolloutConfig"]["properties"]["weight_transfer"] |= _names(builtin_weight_transfers())
    schema["properties"]["trackers"]["items"] |= _names(TRACKERS)
    for section in ("rewards", "eval_rewards"):
        schema["properties"][section]["items"] = {"anyOf": _alternatives(schema, ScorerConfig, scorers)}
    return schema


def _names(builtin: Iterable[str]) -> dict[str, Any]:
    """The schema of a name: one of those that come with raylign, or a dotted one."""
    return {"anyOf": [{"enum": list(builtin)}, {"pattern": ":"}]}


def _alternatives(
    schema: dict[str, Any], base: type[AlgorithmConfig | ScorerConfig], sections: Sequence[type[Section]]
) -> list[dict[str, Any]]:
    """One's own, by a dotted name, or one of those known; the sections that they use join the schema's `$defs`."""
    own_name = {"type": "string", "pattern": ":", "description": base.model_fields["name"].description}
    choices: list[dict[str, Any]] = [{"type": "object", "properties": {"name": own_name}, "required": ["name"]}]
    for section in sections:
        choice = section.model_json_schema()
        schema["$defs"].update(choice.pop("$defs", {}))
        choices.append({**choice, "required": ["name", *choice.get("required", [])]})
    return choices
