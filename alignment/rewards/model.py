"""Rewards from a reward model on this device; its tokenizer and chat template may differ from the actor's.

groups ─► its own GroupTokenizer ─► cut to its window ─► pack ─► scores ─► (score - mean) / std
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from alignment.errors import DataError, ModelError, RewardError
from alignment.rewards import BuildableScorer, UnreadableTexts
from alignment.run_folder import checkpoint_or_path
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from alignment.settings.section import Fp32Number, NumberFormat, PositiveCount

if TYPE_CHECKING:  # a configuration with a reward model is checked by processes that need no torch
    import torch

    from alignment.groups import Group

logger = logging.getLogger(__name__)

MEAN, STD = "raylign_reward_mean", "raylign_reward_std"
"""Keys of a reward model's config.json: mean and standard deviation of its scores on its training data."""
UNLIMITED_LENGTH = 1 << 30
"""A maximum length (tokens) that no text reaches."""


class RewardModel(BuildableScorer):
    """A sequence classifier with one label, trained by `reward_model` or elsewhere."""

    name: Literal["model"] = "model"
    """A reward model on the training workers' devices."""
    path: str
    """Folder of a run or checkpoint of algorithm `reward_model`, of any sequence classifier with one label, or a hub
    id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None takes its default branch."""
    dtype: NumberFormat = "auto"
    """Number format of its weights and activations, as in `model.dtype`; its scores are fp32."""
    chat_template: str | None = None
    """Template for conversations, as in `model.chat_template`; None uses the one of its tokenizer."""
    max_length: PositiveCount | None = None
    """Largest number of tokens of prompt and answer together. If there are more, the beginning of the prompt is left
    out, never the answer. None is the number of positions of the model."""
    micro_batch_tokens: PositiveCount = 8192
    """Largest number of tokens in one forward pass; a prompt counts once."""
    normalise: bool = True
    """Subtract the mean and divide by the standard deviation in the model's config.json, if it has them."""
    on_unreadable: Literal["fail"] | Fp32Number = -3.0
    """Reward of an answer that is longer than the model reads, or that its chat template refuses; `fail` stops the run
    instead. Of normalised rewards, about one in a thousand is below -3."""

    def build(self, device: torch.device) -> ModelScorer:
        """Loads the model onto a device.

        Raises:
            ModelError: it cannot be loaded, or has no trained score head.
            CheckpointError: the checkpoint is damaged, or the run has none.
        """
        return ModelScorer(self, device)


class ModelScorer:
    """Scores groups by a reward model."""

    def __init__(self, config: RewardModel, device: torch.device) -> None:
        """Loads the model.

        Raises:
            ModelError: it cannot be loaded, or has no trained score head.
            CheckpointError: the checkpoint is damaged, or the run has none.
        """
        from alignment.data.vocabulary import BoundedGroupTokenizer

        self.config = config
        self.device = device
        self.num_cut = 0
        """Number of completions so far whose prompt was cut."""
        self.unreadable = UnreadableTexts(config)
        path = checkpoint_or_path(config.path)
        self.max_length = config.max_length or longest_input(path, config.revision)
        self.model = _load(config, path, self.max_length, device)
        data = DataConfig(path=path, max_length=UNLIMITED_LENGTH)  # `fit_to_window` cuts the prompts instead
        self.tokenise = BoundedGroupTokenizer(
            self.model.tokenizer,
            data,
            self.model.end_tokens,
            num_embeddings=self.model.num_embeddings,
            checks_answers=False,
        )
        config_values = self.model.network.config.to_dict()
        self.mean: float = config_values.get(MEAN, 0.0) if config.normalise else 0.0
        self.std: float = config_values.get(STD, 1.0) if config.normalise else 1.0
        if not self.std > 0:
            raise ModelError(f"{config.path}: {STD} is {self.std} in config.json, and must be above 0")

    def score(self, groups: list[Group]) -> list[list[float]]:
        """Scores as `Scorer.score` says. The tokens of the groups, which are the actor's, are not used.

        Raises:
            RewardError: a prompt cannot be rendered.
            Unreadable: an answer cannot be read, and the configuration asks for an error then.
        """
        from alignment.data.packing import micro_batches

        slices = [group_slice for index, group in enumerate(groups) for group_slice in self._slices(group, index)]
        rewards: list[list[float | None]] = [[None] * len(group.completions) for group in groups]
        lengths = [group_slice.group.num_tokens for group_slice in slices]
        for micro_batch in micro_batches(range(len(slices)), lengths, max_tokens=self.config.micro_batch_tokens):
            positions = [(slices[i].index, number) for i in micro_batch for number in slices[i].numbers]
            scores = self._scores([slices[i].group for i in micro_batch])
            for (index, number), score in zip(positions, scores, strict=True):
                rewards[index][number] = (score - self.mean) / self.std
        return [
            [
                self._unreadable_reward(group, number) if reward is None else reward
                for number, reward in enumerate(group_rewards, start=1)
            ]
            for group, group_rewards in zip(groups, rewards, strict=True)
        ]

    def close(self) -> None:
        """Frees the model."""
        del self.model

    def _unreadable_reward(self, group: Group, number: int) -> float:
        length = len(group.completions[number - 1].text)
        return self.unreadable.reward(
            f"group {group.id}, completion {number} of {len(group.completions)}: its {length} characters do not fit "
            f"into the {self.max_length} tokens that the reward model reads, or its chat template refuses them"
        )

    def _slices(self, group: Group, index: int) -> Iterator[GroupSlice]:
        for numbers, tokenised_group in self._tokenise_completions(group):
            bos = self.model.tokenizer.bos_token_id
            for group_slice in fit_to_window(tokenised_group, index, max_length=self.max_length, bos=bos):
                if group_slice.group.prompt_tokens != tokenised_group.prompt_tokens:
                    self._count_cut(len(group_slice.numbers))
                yield replace(group_slice, numbers=[numbers[number] for number in group_slice.numbers])

    def _tokenise_completions(self, group: Group) -> Iterator[tuple[list[int], Group]]:
        """Yields the group with this model's tokens, and the indices of its completions.

        If a completion cannot be rendered, it yields every other completion as a group of its own.

        Raises:
            RewardError: the prompt cannot be rendered.
        """
        numbers = list(range(len(group.completions)))
        try:
            yield numbers, self.tokenise(group)
            return
        except DataError as error:
            cause = error
        try:
            self.tokenise(replace(group, completions=()))
        except DataError as error:
            raise RewardError(f"group {group.id}: {error}") from error
        for number in numbers:
            single_group = replace(group, completions=group.completions[number : number + 1])
            try:
                yield [number], self.tokenise(single_group)
            except DataError:
                logger.debug("group %s, completion %d: %s", group.id, number + 1, cause)

    def _count_cut(self, count: int) -> None:
        if not self.num_cut:
            logger.warning(
                "reward model %s: some conversations are longer than its %d tokens; it does not see how they begin",
                self.config.path,
                self.max_length,
            )
        self.num_cut += count

    def _scores(self, groups: list[Group]) -> list[float]:
        import torch

        from alignment.data.packing import pack
        from alignment.models.forward import scores

        with torch.no_grad():
            result: list[float] = scores(self.model, pack(groups).to(self.device)).tolist()
        return result


@dataclass(frozen=True, kw_only=True)
class GroupSlice:
    """The completions of one group that have the same number of tokens of its prompt before them."""

    group: Group
    """The group with these completions, and with the prompt that fits."""
    index: int
    """Index of the whole group."""
    numbers: list[int]
    """Indices of these completions in the whole group."""


def fit_to_window(group: Group, index: int, *, max_length: int, bos: int | None) -> list[GroupSlice]:
    """Divides a tokenised group so that every completion is whole and has as much of the prompt as fits.

    A prompt loses tokens at its beginning, except for the beginning-of-sequence token `bos`. A completion that leaves
    no room for one token of the prompt is in no slice.

    Args:
        group: with tokens.
        index: index of the group, for `GroupSlice.index`.
        max_length: most tokens of prompt and completion together.
        bos: id of the beginning-of-sequence token; None if the tokenizer has none.
    """
    prompt, numbers_by_room = group.prompt_tokens, dict[int, list[int]]()
    for number, completion in enumerate(group.completions):
        room = min(len(prompt), max_length - len(completion.tokens))
        if room >= 1:
            numbers_by_room.setdefault(room, []).append(number)
    return [
        GroupSlice(
            group=replace(
                group,
                prompt_tokens=_cut_prompt(prompt, room, bos),
                completions=tuple(group.completions[number] for number in numbers),
            ),
            index=index,
            numbers=numbers,
        )
        for room, numbers in numbers_by_room.items()
    ]


def longest_input(path: str, revision: str | None) -> int:
    """Returns the number of tokens that a reward model has positions for, `UNLIMITED_LENGTH` if it does not say.

    Raises:
        ModelError: the configuration of the model cannot be read, or it has no trained score head.
    """
    from transformers import AutoConfig

    from alignment.models.folders import model_source
    from alignment.models.load import longest_positions

    try:
        settings: Any = AutoConfig.from_pretrained(model_source(path), revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"reward model {path!r} is neither a folder here nor a hub id that can be loaded: {error}"
        ) from error
    kinds = settings.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ModelError(
            f"reward model {path!r} is a {', '.join(kinds) or 'model'} without a trained score head, so its rewards "
            "would be random; train one with algorithm reward_model"
        )
    return longest_positions(settings) or UNLIMITED_LENGTH


def _load(config: RewardModel, path: str, max_length: int, device: torch.device) -> Any:
    import torch

    from alignment.models.load import freeze, load_model

    settings = ModelConfig(path=path, revision=config.revision, dtype=config.dtype, chat_template=config.chat_template)
    data = DataConfig(path=path, max_length=max_length)
    # Loading a model seeds the random numbers of the process; those belong to the run and must not change.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = load_model(settings, data, device=device, seed=0, head="score")
    freeze(model.module)
    return model


def _cut_prompt(prompt: tuple[int, ...], length: int, bos: int | None) -> tuple[int, ...]:
    if length < len(prompt) and length > 1 and prompt[0] == bos:
        return prompt[:1] + prompt[len(prompt) - length + 1 :]
    return prompt[len(prompt) - length :]


SCORERS: dict[str, type[BuildableScorer]] = {"model": RewardModel}
"""The scorers of this module, by the names that configurations have for them."""
