"""The probe of a version before its first request: weights that overflow are not served.

The numbers of such weights may all be finite, so that the registry takes them, while the model's outputs are not. The
engine would answer with empty texts, and say that all is well.
"""

from __future__ import annotations

import math
import uuid
from typing import TYPE_CHECKING

from alignment.errors import ServingError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

PROMPT_TOKENS = 8
"""Number of tokens of the prompt, which come from all parts of the vocabulary."""


class OverflowingWeights(ServingError):
    """Weights whose log-probabilities are not finite."""


async def probe(client: AsyncLLM, weights: str, adapter: LoRARequest | None = None) -> None:
    """Generates two tokens: one after a prompt, and one after an answer that has begun.

    Args:
        client: the engine.
        weights: the weights in the message of an error, as "version 3".
        adapter: the adapter to generate with; None for the engine's own weights.

    Raises:
        OverflowingWeights: a log-probability is not finite.
    """
    from vllm import SamplingParams

    vocabulary = client.model_config.get_vocab_size()
    prompt = [index * vocabulary // PROMPT_TOKENS for index in range(PROMPT_TOKENS)]
    parameters = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.0, logprobs=0, detokenize=False)
    outputs = client.generate(
        {"prompt_token_ids": prompt}, parameters, request_id=f"probe-{uuid.uuid4().hex}", lora_request=adapter
    )
    async for output in outputs:
        final_output = output
    logprobs = [entry.logprob for by_id in final_output.outputs[0].logprobs or () for entry in by_id.values()]
    if not logprobs or not all(map(math.isfinite, logprobs)):
        raise OverflowingWeights(
            f"{weights} cannot be served: its log-probabilities are not finite ({logprobs}). Its weights overflow when "
            "the model computes with them; their training has diverged, or they were converted wrongly"
        )
