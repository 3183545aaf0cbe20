"""Token ids that a model has embeddings for: a tokenizer may have been given more, and the model not been resized."""

from __future__ import annotations

from typing import Any

from alignment.data.chat import GroupTokenizer
from alignment.errors import DataError
from alignment.groups import Group


class BoundedGroupTokenizer(GroupTokenizer):
    """Refuses a group with an id that the model does not embed, while rows are read and can still be named."""

    def __init__(self, *arguments: Any, num_embeddings: int, **options: Any) -> None:
        """`num_embeddings`: of the model; ids are 0 to that minus 1. All else is as in GroupTokenizer."""
        super().__init__(*arguments, **options)
        self.num_embeddings = num_embeddings

    def examples(self, group: Group) -> list[Group]:
        """As GroupTokenizer.

        Raises:
            DataError: also for a token that the model has no embedding for.
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
