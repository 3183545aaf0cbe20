"""A loaded model: the network, its tokenizer, and the facts that the packed forward pass needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignment.models.logit_transform import LINEAR, LogitTransform
from alignment.models.packed_model import PackedModel


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

    @cached_property
    def root(self) -> PackedModel:
        """The module that packed passes call; it holds `module` and reads its head."""
        return PackedModel(self.module)

    @property
    def network(self) -> PreTrainedModel:
        """The transformers model, without peft around it."""
        return self.root.network

    @property
    def decoder(self) -> Any:
        """The network without its head."""
        return self.root.decoder

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
