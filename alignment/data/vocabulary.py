"""Refuses token ids without an embedding: somebody may add tokens to a tokenizer and not resize the model."""

from __future__ import annotations

from typing import Any

from alignment.data.chat import GroupTokenizer
from alignment.errors import DataError
from alignment.groups import Group


class BoundedGroupTokenizer(GroupTokenizer):
    """Refuses token ids without an embedding while rows are read, when an error can still name the row."""

    def __init__(self, *arguments: Any, num_embeddings: int, **options: Any) -> None:
        """Takes GroupTokenizer's arguments, and `num_embeddings`, the number of token ids that the model embeds."""
        super().__init__(*arguments, **options)
        self.num_embeddings = num_embeddings

    def examples(self, group: Group) -> list[Group]:
        """As `GroupTokenizer.examples`.

        Raises:
            DataError: as there, or a token id has no embedding in the model.
        """
        examples = super().examples(group)
        for example in examples:
            self._check_embeddings(example)
        return examples

    def _check_embeddings(self, group: Group) -> None:
        texts = (group.prompt_tokens, *(completion.tokens for completion in group.completions))
        largest = max((max(tokens) for tokens in texts if tokens), default=0)
        if largest >= self.num_embeddings:
            word = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"token {largest} ({word!r}) is beyond the model, which embeds {self.num_embeddings} ids; its "
                f"tokenizer has ids up to {len(self.tokenizer) - 1}. Resize the embeddings and save both, "
                "or take the tokenizer that the model was trained with"
            )
