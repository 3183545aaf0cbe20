"""The root module of a packed forward pass: the decoder and its head, called as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.batch import Batch
from alignment.errors import ModelError
from alignment.models.attention import REGISTERED, packed_layout
from alignment.models.logit_transform import LINEAR, LogitTransform
from alignment.models.output_head import OutputHead


class PackedModel(nn.Module):
    """Runs a network over packed batches.

    Every packed pass calls this module, and this module calls the decoder and the head. So whatever acts on modules
    that are called, such as a backend that shards weights and gathers them layer by layer, sees the whole pass.
    """

    head: OutputHead | None
    """The head of a language model; None if the network has a score head, which is a layer of its own."""

    def __init__(self, module: nn.Module) -> None:
        """Args:
        module: a transformers model, or a peft model around one.
        """
        super().__init__()
        self.module = module
        linear = self.network.get_output_embeddings()
        self.head = None if linear is None else OutputHead(linear)

    @property
    def network(self) -> PreTrainedModel:
        """The transformers model, without peft around it."""
        module: Any = self.module
        return module if isinstance(module, PreTrainedModel) else module.get_base_model()

    @property
    def decoder(self) -> Any:
        """The network without its head."""
        decoder = self.network.get_decoder()
        # Some families call their output head `decoder`, and some return themselves (Llama 4).
        return self.network.model if decoder in (self.network, self.network.get_output_embeddings()) else decoder

    def forward(
        self,
        *,
        batch: Batch,
        positions: Tensor,
        targets: Tensor | None = None,
        value_head: nn.Module | None = None,
        temperature: float = 1.0,
        transform: LogitTransform = LINEAR,
        entropies: bool = False,
    ) -> tuple[Tensor, ...]:
        """Runs the decoder over a packed batch, and its head on the states at some positions.

        The arguments have names only: what wraps modules looks for tensors in arguments without a name.

        Args:
            positions: [n] indices of packed tokens.
            targets: [n] token ids for the output head; None for a score head.
            value_head: [H] → [1], the head of a critic that shares the trunk.
            temperature: divides the logits; > 0.
            transform: the model's transform of its logits.
            entropies: whether to compute the entropies; they are zeros otherwise.

        Returns:
            With targets, [n] log-probabilities (nats), [n] entropies (nats) and, with a value head, [n] values; without
            targets, [n] scores. All are fp32.
        """
        states = self._hidden_states(batch)[positions]
        if targets is None:
            return (_number_per_state(self.network.score, states),)
        assert self.head is not None
        results = self.head(states, targets, temperature=temperature, transform=transform, entropies=entropies)
        return results if value_head is None else (*results, _number_per_state(value_head, states))

    def _hidden_states(self, batch: Batch) -> Tensor:
        """[T, H] last hidden states of the decoder for a packed batch.

        Raises:
            ModelError: the network has another attention at this time, which does not handle groups.
        """
        attention = self.network.config._attn_implementation
        if attention not in REGISTERED:
            raise ModelError(f"a packed batch needs a packed attention, and the network's is {attention!r} just now")
        with packed_layout(batch):
            return self.decoder(  # type: ignore[no-any-return]
                input_ids=batch.tokens[None],
                # Ones mean that nothing is padding. Without them, transformers derives sequences from the positions.
                attention_mask=torch.ones_like(batch.tokens[None]),
                position_ids=batch.positions[None],
                use_cache=False,
            ).last_hidden_state[0]


def _number_per_state(head: nn.Module, states: Tensor) -> Tensor:
    """[n] fp32 output of a head with one number per state, for [n, H] states."""
    return head(states.float()).squeeze(1)  # type: ignore[no-any-return]
