"""A loaded model: the network, its tokenizer, and the facts that the packed forward pass needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """The transform of the output head's logits that some models apply: cap · tanh(scale · logits / cap)."""

    scale: float = 1.0
    """Factor of the logits (Cohere, Granite, Falcon-H1)."""
    cap: float | None = None
    """Largest absolute value of a logit, which is approached smoothly (Gemma); None sets no limit."""

    def apply_(self, logits: Tensor) -> Tensor:
        """Transforms fp32 logits in place."""
        if self.cap is None:
            return logits if self.scale == 1 else logits.mul_(self.scale)
        return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)

    def slope(self, transformed_logits: Tensor) -> Tensor | float:
        """The derivative of the transform with respect to the head's logits, computed from the transformed logits."""
        if self.cap is None:
            return self.scale
        return (transformed_logits / self.cap).square_().neg_().add_(1).mul_(self.scale)


LINEAR = LogitTransform()


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A decoder with a head, and what training and generation need to know about it.

    The head is either that of a language model, or it gives one number per position: the score of a reward model, or
    the value of a critic.
    """

    module: Any
    """A transformers model, or a peft model around one."""
    tokenizer: PreTrainedTokenizerFast
    source: str
    """Folder or hub id of the full model that training starts from."""
    attention: str
    """The form in which the module applies the packed mask."""
    logit_transform: LogitTransform = LINEAR
    """The network's transform of its output head's logits."""
    generation_ends: frozenset[int] = frozenset()
    """Token ids at which generation stops according to the model's folder, even if the head does not generate."""

    @property
    def network(self) -> PreTrainedModel:
        """The transformers model, without peft around it."""
        return self.module if isinstance(self.module, PreTrainedModel) else self.module.get_base_model()

    @property
    def decoder(self) -> Any:
        """The network without its head."""
        decoder = self.network.get_decoder()
        # Some families call their output head `decoder`, and some return themselves (Llama 4).
        return self.network.model if decoder in (self.network, self.network.get_output_embeddings()) else decoder

    @property
    def has_adapter(self) -> bool:
        """True if only an adapter is trained and saved."""
        return not isinstance(self.module, PreTrainedModel)

    @property
    def num_embeddings(self) -> int:
        """Number of token ids with an embedding; the tokenizer may have more or fewer."""
        return int(self.network.get_input_embeddings().num_embeddings)

    @property
    def device(self) -> torch.device:
        """The device of the network's weights."""
        return torch.device(self.network.device)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end an answer: the tokenizer's end token, and those at which generation stops."""
        return self.generation_ends | ({self.tokenizer.eos_token_id} - {None})
