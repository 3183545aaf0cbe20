"""Makes a loaded model one that can be saved, so that a failure shows at the start and not after the last step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

from transformers import GenerationConfig, PreTrainedModel

from alignment.errors import ModelError

logger = logging.getLogger(__name__)

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Generation settings that hold token ids."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Generation settings that transformers writes only together with do_sample."""


def mend_generation_settings(network: PreTrainedModel, name: str) -> None:
    """Repairs generation settings that transformers reads but refuses to write.

    Settings for sampling are taken to imply do_sample. Other contradictory settings are left out, with a warning; none
    of them matters in training.

    Args:
        name: the model's name, for the warning.

    Raises:
        ModelError: not even the model's token ids can be written.
    """
    settings = network.generation_config if network.can_generate() else None
    problem = None if settings is None else _problem(settings)
    if settings is None or problem is None:
        return
    for change, candidate in _candidates(settings):
        candidate_problem = _problem(candidate)
        if candidate_problem is None:
            logger.warning("%s: generation_config.json cannot be saved as it is: %s. %s", name, problem, change)
            network.generation_config = candidate
            return
    raise ModelError(
        f"model {name!r}: its generation_config.json cannot be saved, so no checkpoint could: {candidate_problem}"
    )


def _candidates(settings: GenerationConfig) -> Iterator[tuple[str, GenerationConfig]]:
    """Yields repaired settings with a sentence that describes the change, beginning with the smallest change."""
    sampling = {key: value for key in SAMPLING if (value := getattr(settings, key, None)) is not None}
    token_ids = {key: getattr(settings, key) for key in TOKEN_IDS}
    is_greedy = sampling.get("temperature") == 0 or settings.do_sample is False
    if sampling and not is_greedy:
        sampling_settings = copy.deepcopy(settings)
        sampling_settings.do_sample = True
        yield "Its sampling settings imply do_sample, which checkpoints say", sampling_settings
    greedy_settings = copy.deepcopy(settings)
    greedy_settings.do_sample = False
    for key in sampling:
        setattr(greedy_settings, key, None)
    yield "Checkpoints leave its sampling settings out, which greedy decoding ignores", greedy_settings
    if sampling and not is_greedy:
        yield (
            "Checkpoints keep its token ids and sampling alone",
            GenerationConfig(**token_ids, **sampling, do_sample=True),
        )
    yield "Checkpoints keep its token ids alone", GenerationConfig(**token_ids)


def _problem(settings: GenerationConfig) -> str | None:
    """The reason why transformers would refuse to write the settings; None if it would write them."""
    try:
        settings.validate(strict=True)
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())
    return None
