"""What has to hold of a model so that it can be written: known when it is loaded, not after the last step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

from transformers import GenerationConfig, PreTrainedModel

from alignment.errors import ModelError

logger = logging.getLogger(__name__)

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Generation settings that transformers writes only with do_sample."""


def mend_generation_settings(network: PreTrainedModel, name: str) -> None:
    """Makes a model's generation_config.json one that transformers writes: it reads more than it writes.

    Settings of sampling imply do_sample, as their author meant. What is contradictory beyond that is left out, with a
    warning: none of it has a part in training.

    Args:
        name: of the model, for the warning.

    Raises:
        ModelError: not even its token ids can be written.
    """
    settings = network.generation_config if network.can_generate() else None
    problem = None if settings is None else _problem(settings)
    if settings is None or problem is None:
        return
    for change, candidate in _candidates(settings):
        worse = _problem(candidate)
        if worse is None:
            logger.warning("%s: generation_config.json cannot be saved as it is: %s. %s", name, problem, change)
            network.generation_config = candidate
            return
    raise ModelError(f"model {name!r}: its generation_config.json cannot be saved, so no checkpoint could: {worse}")


def _candidates(settings: GenerationConfig) -> Iterator[tuple[str, GenerationConfig]]:
    """What may be meant, and how it is said; the nearest first."""
    sampling = {key: value for key in SAMPLING if (value := getattr(settings, key, None)) is not None}
    ends = {key: getattr(settings, key) for key in ENDS}
    is_greedy = sampling.get("temperature") == 0 or settings.do_sample is False
    if sampling and not is_greedy:
        sampled = copy.deepcopy(settings)
        sampled.do_sample = True
        yield "Its sampling settings imply do_sample, which checkpoints say", sampled
    greedy = copy.deepcopy(settings)
    greedy.do_sample = False
    for key in sampling:
        setattr(greedy, key, None)
    yield "Checkpoints leave its sampling settings out, which greedy decoding ignores", greedy
    if sampling and not is_greedy:
        yield "Checkpoints keep its token ids and sampling alone", GenerationConfig(**ends, **sampling, do_sample=True)
    yield "Checkpoints keep its token ids alone", GenerationConfig(**ends)


def _problem(settings: GenerationConfig) -> str | None:
    """Why transformers would not write the settings; None if it would."""
    try:
        settings.validate(strict=True)
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())
    return None
