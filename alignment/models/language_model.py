"""A loaded model: the network, its tokenizer, and how the packed forward pass has to treat it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignment.models.attention import Attention


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a model does to the logits of its output head: cap · tanh(scale · logits / cap)."""

    scale: float = 1.0
    """Factor of the logits (Cohere, Granite, Falcon-H1)."""
    cap: float | None = None
    """Largest absolute value of a logit, approached smoothly (Gemma); None is no limit."""

    def apply_(self, logits: Tensor) -> Tensor:
        """Transforms fp32 logits in place."""
        if self.cap is None:
            return logits if self.scale == 1 else logits.mul_(self.scale)
        return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Derivative of the result by the head's logits, from the result."""
        if self.cap is None:
            return self.scale
        return (transformed / self.cap).square_().neg_().add_(1).mul_(self.scale)


LINEAR = LogitTransform()


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A decoder with a head, and what is needed to train it and to talk to it.

    The head is that of a language model, or one number per position: a reward model's score, a critic's value.
    """

    module: Any
    """A transformers model, or a peft model around one."""
    tokenizer: PreTrainedTokenizerFast
    source: str
    """Folder or hub id of the whole model that training starts from."""
    attention: Attention
    """In which form the module takes the packed mask."""
    logit_transform: LogitTransform = LINEAR
    """What the network does between its output head and its logits."""
    generation_ends: frozenset[int] = frozenset()
    """Ids that the model's folder says generation stops at, also where the head generates nothing."""

    @property
    def network(self) -> PreTrainedModel:
        """The transformers model, without peft around it."""
        return self.module if isinstance(self.module, PreTrainedModel) else self.module.get_base_model()

    @property
    def decoder(self) -> Any:
        """The network without its head."""
        decoder = self.network.get_decoder()
        # Some families name their output head `decoder`, and some say that they are their own (Llama 4).
        return self.network.model if decoder in (self.network, self.network.get_output_embeddings()) else decoder

    @property
    def has_adapter(self) -> bool:
        """True if only an adapter is trained, and saved."""
        return not isinstance(self.module, PreTrainedModel)

    @property
    def num_embeddings(self) -> int:
        """Ids that the network has embeddings for; its tokenizer may have more, or fewer."""
        return int(self.network.get_input_embeddings().num_embeddings)

    @property
    def device(self) -> torch.device:
        return torch.device(self.network.device)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's, and those that the model stops generating at."""
        return self.generation_ends | ({self.tokenizer.eos_token_id} - {None})
