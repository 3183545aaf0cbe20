"""The gate before a promotion: the current version and the candidate answer the same held-out prompts and are compared.

held-out rows ─┬─► greedy answers of both, over HTTP ─► scorers, in this process ─► reward, length ─┬─► margins
               └─► /v1/rewards for both ─────► accuracy on pairs, divergence of the answers ────────┘   ─► result

The endpoint has already loaded both versions, so the gate loads no model.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from alignment.errors import ConfigError, DataError, ServingError
from alignment.settings.data import SourceConfig
from alignment.settings.load import load_config
from alignment.settings.plugins import Scorers
from alignment.settings.section import Fraction, NonNegative, Positive, PositiveCount, Section
from serving.registry.client import EndpointClient, map_concurrently

if TYPE_CHECKING:
    from alignment.groups import Group
    from alignment.rewards import Rewards

Figures = dict[str, float]
"""The figures of a version: `accuracy`, `reward`, `eval_rewards/NAME`, `length`, `truncated` and `kl`, as far as they
are measured."""

TOLERANCE = 1e-9
"""Rounding error that a sum of floating-point numbers may have."""


class Margins(Section):
    """How much worse a candidate may be than the current version. A margin of None is not checked."""

    accuracy: Fraction | None = 0.02
    """Largest fall of the share of held-out pairs whose better answer has the larger implicit reward, 0 to 1. With n
    pairs, chance alone moves it by up to 0.5 / √n."""
    reward: NonNegative | None = 0.05
    """Largest fall of the mean reward, which is the weighted sum of the scorers, in their units."""
    eval_rewards: dict[str, NonNegative] = Field(default_factory=dict)
    """Largest fall of the mean of single scorers, by name, each in its own unit."""
    max_length_ratio: Positive | None = 1.5
    """Largest ratio of the candidate's mean answer length (tokens) to the current version's."""
    max_kl: Positive | None = None
    """Largest divergence of the candidate from its reference: mean log π/π_ref of its own answers, in nats per
    answer. It is estimated from greedy answers and cannot be compared with a run's, which samples its answers."""


class GateConfig(Section):
    """The held-out data of a gate, the scorers, and how much worse a candidate may be."""

    data: SourceConfig
    """Held-out prompts or preference pairs; `keep` names the columns that the scorers need."""
    num_prompts: PositiveCount = 64
    """How many rows are used, from the beginning of the data."""
    eval_rewards: Scorers = ()
    """Scorers of the answers, as in a run's `eval_rewards`. They run in this process and see only text."""
    max_tokens: PositiveCount = 256
    """Largest number of tokens of an answer. Answers are greedy, at temperature 0."""
    margins: Margins = Field(default_factory=Margins)
    """How much worse the candidate may be."""
    concurrency: PositiveCount = 8
    """Requests in progress at a time; the endpoint also answers other clients meanwhile."""
    timeout_s: Positive = 300.0
    """Seconds to wait for one answer."""


@dataclass(frozen=True, kw_only=True)
class FigureComparison:
    """One figure of both versions."""

    name: str
    current: float
    candidate: float
    limit: str
    """The values that pass, for example `≥ 0.93`; empty if no margin concerns the figure."""
    passes: bool


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """The result of a gate."""

    lines: tuple[FigureComparison, ...]

    @property
    def passes(self) -> bool:
        """True if no figure of the candidate is worse than its margin allows."""
        return all(line.passes for line in self.lines)

    def table(self, current: str, candidate: str) -> str:
        """A table of all figures for the terminal, under the names of the two versions."""
        rows = [("", current, candidate, "allowed", "")]
        for line in self.lines:
            mark = "" if not line.limit else "ok" if line.passes else "WORSE"
            rows.append((line.name, f"{line.current:.4g}", f"{line.candidate:.4g}", line.limit, mark))
        return format_table(rows)


def load_gate(path: Path) -> GateConfig:
    """Reads a gate's YAML file, as configs/serve/gate.yaml.

    Raises:
        ConfigError: it cannot be read, or a key or value is wrong; the text lists every problem.
    """
    config = load_config(path, kind=GateConfig)
    if config.data.path is None:
        raise ConfigError(f"{path}:\ndata.path: is required; it says where the held-out rows are")
    return config


def compare(current: Figures, candidate: Figures, margins: Margins) -> GateResult:
    """Compares two versions, figure by figure. A figure with a margin does not pass if it is missing or NaN."""
    falls = {"accuracy": margins.accuracy, "reward": margins.reward}
    falls |= {f"eval_rewards/{name}": fall for name, fall in margins.eval_rewards.items()}
    minima = {name: current[name] - fall for name, fall in falls.items() if fall is not None and name in current}
    maxima = {} if margins.max_kl is None else {"kl": margins.max_kl}
    if margins.max_length_ratio is not None and "length" in current:
        maxima["length"] = current["length"] * margins.max_length_ratio
    lines = []
    for name in {**current, **candidate}:
        values = current.get(name, math.nan), candidate.get(name, math.nan)
        lines.append(_compare_figure(name, *values, minimum=minima.get(name), maximum=maxima.get(name)))
    return GateResult(lines=tuple(lines))


def evaluate_versions(config: GateConfig, client: EndpointClient, versions: Sequence[int]) -> list[Figures]:
    """Asks versions that the endpoint has loaded the held-out prompts; returns their figures, in the same order.

    Raises:
        ConfigError: a margin names a scorer that does not exist.
        DataError: a held-out row cannot be used.
        RewardError: an answer could not be scored.
        ServingError: the endpoint did not answer.
    """
    import torch

    from alignment.rewards import Rewards

    groups = held_out(config)
    with closing(Rewards(config.eval_rewards, torch.device("cpu"))) as rewards:
        _check_margin_names(config.margins, rewards.names)
        evaluator = VersionEvaluator(config, client)
        tasks = [(version, group) for group in groups for version in versions]
        results = map_concurrently(
            lambda task: evaluator.evaluate(*task),
            tasks,
            concurrency=config.concurrency,
            description="held-out prompts",
        )
        by_version = {version: results[offset :: len(versions)] for offset, version in enumerate(versions)}
        return [figures_of(by_version[version], rewards) for version in versions]


def held_out(config: GateConfig) -> list[Group]:
    """The held-out rows as groups.

    Raises:
        DataError: there are no rows, or one cannot be used; the message names it.
    """
    from alignment.data.shapes import to_group
    from alignment.data.sources import read_rows

    groups = []
    for origin, row in itertools.islice(read_rows(config.data), config.num_prompts):
        try:
            if isinstance(row, DataError):
                raise row
            groups.append(to_group(row, origin, config.data))
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
    if not groups:
        raise DataError(f"{config.data.path} holds no rows, and a gate needs some")
    return groups


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The answer of one version to one prompt, and its scores."""

    group: Group
    """The prompt, with the version's answer as its only completion."""
    num_tokens: int
    """Length of the answer (tokens)."""
    pair_outcomes: tuple[float, ...]
    """For every held-out pair: 1 if the chosen answer has the larger implicit reward, 0.5 for a tie, else 0."""
    log_ratio: float | None
    """log π/π_ref of the answer (nats); None if no margin concerns it, or if the answer is empty."""


class VersionEvaluator:
    """Evaluates versions of an endpoint on single prompts."""

    def __init__(self, config: GateConfig, client: EndpointClient) -> None:
        self._config = config
        self._client = client
        # The aligned model is listed first.
        self._model = client.model or client.get("/v1/models", _Models).data[0].id

    def evaluate(self, version: int, group: Group) -> EvaluationResult:
        """Asks one version one prompt, and scores the answers."""
        from alignment.groups import Completion

        response = self._complete(version, group)
        (choice,) = response.choices
        text = (choice.text if choice.message is None else choice.message.content) or ""
        answer = Completion(text=text, truncated=choice.finish_reason == "length")
        pairs = group.pairs if self._config.margins.accuracy is not None else []
        needs_kl = bool(text) and self._config.margins.max_kl is not None
        texts = [completion.text for completion in group.completions] if pairs else []
        texts += [text] if needs_kl else []
        scores = self._score(version, group, texts) if texts else _ItemScores(rewards=[])
        rewards = scores.rewards
        return EvaluationResult(
            group=replace(group, completions=(answer,)),
            num_tokens=response.usage.completion_tokens,
            pair_outcomes=tuple(_pair_outcome(rewards[chosen], rewards[rejected]) for chosen, rejected in pairs),
            log_ratio=scores.logratios[-1] if needs_kl and scores.logratios else None,
        )

    def _complete(self, version: int, group: Group) -> _CompletionResponse:
        body = {**_prompt(group), "model": self._model, "max_tokens": self._config.max_tokens, "temperature": 0}
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        return self._client.post(path, body, _CompletionResponse, model_version=version, retry_when_busy=True)

    def _score(self, version: int, group: Group, texts: list[str]) -> _ItemScores:
        body = {"model": self._model, "version": version, "items": [{**_prompt(group), "completions": texts}]}
        (item,) = self._client.post("/v1/rewards", body, _ScoreResponse, retry_when_busy=True).items
        if self._config.margins.max_kl is not None and item.logratios is None:
            raise ServingError(
                f"{self._client.url} rates answers by a reward model, which knows of no divergence; set "
                "margins.max_kl to null"
            )
        if any(len(values) != len(texts) for values in (item.rewards, item.logratios) if values is not None):
            raise ServingError(f"{self._client.url} gave {len(item.rewards)} rewards for {len(texts)} answers")
        return item


def figures_of(results: Sequence[EvaluationResult], rewards: Rewards) -> Figures:
    """A version's figures: means over the prompts, and over the pairs for the accuracy.

    Raises:
        RewardError: an answer could not be scored.
    """
    answers = [group.completions[0] for group in rewards.score([result.group for result in results])]
    pair_outcomes = [outcome for result in results for outcome in result.pair_outcomes]
    log_ratios = [result.log_ratio for result in results if result.log_ratio is not None]
    return {
        **({"accuracy": statistics.fmean(pair_outcomes)} if pair_outcomes else {}),
        **({"reward": statistics.fmean(answer.reward or 0.0 for answer in answers)} if rewards.names else {}),
        **{
            f"eval_rewards/{name}": statistics.fmean(answer.scores[name] for answer in answers)
            for name in rewards.names
        },
        "length": statistics.fmean(result.num_tokens for result in results),
        "truncated": statistics.fmean(answer.truncated for answer in answers),
        **({"kl": statistics.fmean(log_ratios)} if log_ratios else {}),
    }


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model] = Field(min_length=1)


class _Message(BaseModel):
    content: str | None


class _Choice(BaseModel):
    finish_reason: str | None
    message: _Message | None = None
    text: str | None = None


class _Usage(BaseModel):
    completion_tokens: int


class _CompletionResponse(BaseModel):
    choices: list[_Choice] = Field(min_length=1, max_length=1)
    usage: _Usage


class _ItemScores(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    rewards: list[float]
    logratios: list[float] | None = None


class _ScoreResponse(BaseModel):
    items: list[_ItemScores] = Field(min_length=1, max_length=1)


def _compare_figure(
    name: str, current: float, candidate: float, *, minimum: float | None, maximum: float | None
) -> FigureComparison:
    limit, passes = "", True
    if minimum is not None:
        limit, passes = f"≥ {minimum:.4g}", candidate >= minimum - TOLERANCE
    elif maximum is not None:
        limit, passes = f"≤ {maximum:.4g}", candidate <= maximum + TOLERANCE
    return FigureComparison(name=name, current=current, candidate=candidate, limit=limit, passes=passes)


def _check_margin_names(margins: Margins, scorer_names: Sequence[str]) -> None:
    for name in margins.eval_rewards:
        if name not in scorer_names:
            names = ", ".join(scorer_names) or "none"
            raise ConfigError(f"margins.eval_rewards: there is no scorer {name!r}; there are {names}")


def _prompt(group: Group) -> dict[str, Any]:
    from alignment.rewards.functions import prompt_of

    prompt = prompt_of(group)
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}


def _pair_outcome(chosen: float, rejected: float) -> float:
    """1 if the chosen answer has the larger reward, 0.5 for a tie, else 0."""
    return 0.5 if chosen == rejected else float(chosen > rejected)
