"""Rewards from a reward model on this device, which may have another tokenizer and template than the actor.

groups ─► its own GroupTokenizer ─► cut to its window ─► pack ─► scores ─► (score - mean) / std
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from alignment.checkpoint import checkpoint_or_path
from alignment.errors import DataError, ModelError, RewardError
from alignment.rewards import BuildableScorer, UnreadableTexts
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig
from alignment.settings.section import NumberFormat, PositiveCount

if TYPE_CHECKING:  # a configuration with a reward model is checked by processes that need no torch
    import torch

    from alignment.groups import Group

logger = logging.getLogger(__name__)

MEAN, STD = "raylign_reward_mean", "raylign_reward_std"
"""Keys of a reward model's config.json: its scores on the data it was trained on."""
UNLIMITED = 1 << 30


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
    """Number format of its weights and activations, as `model.dtype`; its scores are fp32."""
    chat_template: str | None = None
    """Template for conversations, as `model.chat_template`; None uses its tokenizer's own."""
    max_length: PositiveCount | None = None
    """Most tokens that it reads of prompt and answer together. Of more, the beginning of the prompt is left out, never
    the answer. None is as many as it has positions for."""
    micro_batch_tokens: PositiveCount = 8192
    """Most tokens in one forward pass, prompts counted once."""
    normalise: bool = True
    """Subtract the mean and divide by the standard deviation that the model's config.json keeps, if it does."""
    on_unreadable: Literal["fail"] | float = -3.0
    """Reward of an answer that is longer than the model reads, or that its chat template refuses; `fail` stops the run
    instead. Of a normalised reward, -3 is what one in a thousand answers gets."""

    def build(self, device: torch.device) -> ModelScorer:
        return ModelScorer(self, device)


class ModelScorer:
    """Holds a reward model and asks it."""

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
        self.unreadable = UnreadableTexts(config)
        path = checkpoint_or_path(config.path)
        self.max_length = config.max_length or longest_input(path, config.revision)
        self.model = _load(config, path, self.max_length, device)
        data = DataConfig(path=path, max_length=UNLIMITED)  # the cutting is done here, by another rule
        self.tokenise = BoundedGroupTokenizer(
            self.model.tokenizer,
            data,
            self.model.end_tokens,
            num_embeddings=self.model.num_embeddings,
            checks_answers=False,
        )
        known = self.model.network.config.to_dict()
        self.mean: float = known.get(MEAN, 0.0) if config.normalise else 0.0
        self.std: float = known.get(STD, 1.0) if config.normalise else 1.0
        if not self.std > 0:
            raise ModelError(f"{config.path}: {STD} is {self.std} in config.json, and must be above 0")

    def score(self, groups: list[Group]) -> list[list[float]]:
        """As the port says; the groups' own tokens, which are the actor's, are not looked at."""
        from alignment.data.packing import micro_batches

        parts = [part for index, group in enumerate(groups) for part in self._parts(group, index)]
        rewards: list[list[float | None]] = [[None] * len(group.completions) for group in groups]
        lengths = [part.group.num_tokens for part in parts]
        for chosen in micro_batches(range(len(parts)), lengths, max_tokens=self.config.micro_batch_tokens):
            places = [(parts[i].index, number) for i in chosen for number in parts[i].numbers]
            scores = self._scores([parts[i].group for i in chosen])
            for (index, number), score in zip(places, scores, strict=True):
                rewards[index][number] = (score - self.mean) / self.std
        return [
            [
                self._unread(group, number) if reward is None else reward
                for number, reward in enumerate(of_group, start=1)
            ]
            for group, of_group in zip(groups, rewards, strict=True)
        ]

    def close(self) -> None:
        """Lets go of the model."""
        del self.model

    def _unread(self, group: Group, number: int) -> float:
        length = len(group.completions[number - 1].text)
        return self.unreadable.reward(
            f"group {group.id}, completion {number} of {len(group.completions)}: its {length} characters do not fit "
            f"into the {self.max_length} tokens that the reward model reads, or its chat template refuses them"
        )

    def _parts(self, group: Group, index: int) -> Iterator[Part]:
        for numbers, tokenised in self._tokenised(group):
            bos = self.model.tokenizer.bos_token_id
            for part in fitted(tokenised, index, max_length=self.max_length, bos=bos):
                if part.group.prompt_tokens != tokenised.prompt_tokens:
                    self._count_cut(len(part.numbers))
                yield replace(part, numbers=[numbers[number] for number in part.numbers])

    def _tokenised(self, group: Group) -> Iterator[tuple[list[int], Group]]:
        """The group in this model's tokens, and the numbers of its completions; in parts if one cannot be rendered.

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
            alone = replace(group, completions=group.completions[number : number + 1])
            try:
                yield [number], self.tokenise(alone)
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
class Part:
    """Completions of one group that see equally much of its prompt."""

    group: Group
    index: int
    """Index of the whole group."""
    numbers: list[int]
    """Which of its completions these are."""


def fitted(group: Group, index: int, *, max_length: int, bos: int | None) -> list[Part]:
    """Divides a tokenised group so that every completion is whole, and no prompt is cut for another's sake.

    A prompt loses tokens at its beginning, except for a beginning-of-text token `bos`. A completion that leaves no room
    for even one token of the prompt is in no part.
    """
    prompt, by_room = group.prompt_tokens, dict[int, list[int]]()
    for number, completion in enumerate(group.completions):
        room = min(len(prompt), max_length - len(completion.tokens))
        if room >= 1:
            by_room.setdefault(room, []).append(number)
    return [
        Part(
            group=replace(
                group,
                prompt_tokens=_end_of(prompt, room, bos),
                completions=tuple(group.completions[number] for number in numbers),
            ),
            index=index,
            numbers=numbers,
        )
        for room, numbers in by_room.items()
    ]


def longest_input(path: str, revision: str | None) -> int:
    """Tokens that a reward model has positions for, `UNLIMITED` if it does not say.

    Raises:
        ModelError: it cannot be read, or is no model with a trained score head.
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
    return longest_positions(settings) or UNLIMITED


def _load(config: RewardModel, path: str, max_length: int, device: torch.device) -> Any:
    import torch

    from alignment.models.load import freeze, load_model

    settings = ModelConfig(path=path, revision=config.revision, dtype=config.dtype, chat_template=config.chat_template)
    data = DataConfig(path=path, max_length=max_length)
    # Loading seeds the process's random numbers, which belong to the run.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = load_model(settings, data, device=device, seed=0, head="score")
    freeze(model.module)
    return model


def _end_of(prompt: tuple[int, ...], length: int, bos: int | None) -> tuple[int, ...]:
    if length < len(prompt) and length > 1 and prompt[0] == bos:
        return prompt[:1] + prompt[len(prompt) - length + 1 :]
    return prompt[len(prompt) - length :]
