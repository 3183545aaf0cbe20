"""The gate before a promotion: the served version and the candidate answer the same held-out prompts, and are compared.

held-out rows ─┬─► greedy answers of both, over HTTP ─► judges, in this process ─► reward, length ─┬─► margins
               └─► /v1/rewards for both ─────► accuracy on pairs, divergence of the answers ───────┘   ─► verdict

The endpoint holds both already, so no second copy of a model is loaded.
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
from serving.client import EndpointClient, map_concurrently

if TYPE_CHECKING:
    from alignment.groups import Group
    from alignment.rewards import Rewards

Figures = dict[str, float]
"""What a version is worth: `accuracy`, `reward`, `judges/NAME`, `length`, `truncated`, `kl`, as far as it is known."""

SLACK = 1e-9
"""What sums of floating-point numbers may be off."""


class Margins(Section):
    """How much worse a candidate may be than the version that answers now. None asks for nothing."""

    accuracy: Fraction | None = 0.02
    """Largest fall of the share of held-out pairs whose better answer has the larger implicit reward, 0 to 1. With n
    pairs, chance alone moves it by up to 0.5 / √n."""
    reward: NonNegative | None = 0.05
    """Largest fall of the mean reward, the weighted sum of the judges, in their units."""
    judges: dict[str, NonNegative] = Field(default_factory=dict)
    """Largest fall of the mean of single judges, by name, each in its own unit."""
    max_length_ratio: Positive | None = 1.5
    """Most times the present mean length of an answer (tokens)."""
    max_kl: Positive | None = None
    """Largest divergence of the candidate from its reference: mean log π/π_ref of its own answers, in nats per
    answer. It is an estimate from greedy answers, and not comparable with a run's, which are drawn at random."""


class GateConfig(Section):
    """What a candidate is examined on, and what it may not lose."""

    data: SourceConfig
    """Held-out prompts or preference pairs; `keep` names what the judges compare with."""
    prompts: PositiveCount = 64
    """Rows that are used, from the front."""
    judges: Scorers = ()
    """What the answers are worth: scorers as in a run's `judges`. They run in this process and see text alone."""
    max_tokens: PositiveCount = 256
    """Most tokens of an answer. Answers are greedy, at temperature 0."""
    margins: Margins = Field(default_factory=Margins)
    """What it may lose."""
    concurrency: PositiveCount = 8
    """Requests at a time; the endpoint answers others too."""
    timeout_s: Positive = 300.0
    """Seconds to wait for one answer."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure of both versions."""

    name: str
    current: float
    candidate: float
    allowed: str
    """What the candidate's has to be, as `≥ 0.93`; empty if nothing is asked of it."""
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a gate says."""

    lines: tuple[Line, ...]

    @property
    def passed(self) -> bool:
        """True if the candidate loses nowhere more than the margins allow."""
        return all(line.passed for line in self.lines)

    def table(self, current: str, candidate: str) -> str:
        """All figures for the terminal, under the names of the two versions."""
        rows = [("", current, candidate, "allowed", "")]
        for line in self.lines:
            mark = "" if not line.allowed else "ok" if line.passed else "WORSE"
            rows.append((line.name, f"{line.current:.4g}", f"{line.candidate:.4g}", line.allowed, mark))
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


def judge(current: Figures, candidate: Figures, margins: Margins) -> Verdict:
    """Compares two versions, figure by figure. A figure that is asked for and missing, or NaN, does not pass."""
    falls = {"accuracy": margins.accuracy, "reward": margins.reward}
    falls |= {f"judges/{name}": fall for name, fall in margins.judges.items()}
    least = {name: current[name] - fall for name, fall in falls.items() if fall is not None and name in current}
    most = {} if margins.max_kl is None else {"kl": margins.max_kl}
    if margins.max_length_ratio is not None and "length" in current:
        most["length"] = current["length"] * margins.max_length_ratio
    return Verdict(
        lines=tuple(
            _line(name, current.get(name, math.nan), candidate.get(name, math.nan), least.get(name), most.get(name))
            for name in {**current, **candidate}
        )
    )


def evaluate(config: GateConfig, service: EndpointClient, versions: Sequence[int]) -> list[Figures]:
    """Has versions that the endpoint has loaded answer the held-out prompts; figures in the order of the versions.

    Raises:
        ConfigError: a margin names a judge that there is not.
        DataError: a held-out row cannot be used.
        RewardError: an answer could not be judged.
        ServingError: the endpoint did not answer.
    """
    import torch

    from alignment.rewards import Rewards

    groups = held_out(config)
    with closing(Rewards(config.judges, torch.device("cpu"))) as judges:
        _check_names(config.margins, judges.names)
        examiner = Examiner(config, service)
        asked = [(version, group) for group in groups for version in versions]
        papers = map_concurrently(
            lambda each: examiner.sit(*each), asked, concurrency=config.concurrency, description="held-out prompts"
        )
        by_version = {version: papers[place :: len(versions)] for place, version in enumerate(versions)}
        return [figures_of(by_version[version], judges) for version in versions]


def held_out(config: GateConfig) -> list[Group]:
    """The rows that are used.

    Raises:
        DataError: there are none, or one cannot be used; the text names it.
    """
    from alignment.data.shapes import to_group
    from alignment.data.sources import read_rows

    groups = []
    for origin, row in itertools.islice(read_rows(config.data), config.prompts):
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
class Paper:
    """What one version made of one prompt."""

    group: Group
    """The prompt, with the version's answer as its only completion."""
    tokens: int
    """Length of the answer."""
    outcomes: tuple[float, ...]
    """For every held-out pair: 1 if the better answer has the larger implicit reward, 0.5 for a tie, else 0."""
    ratio: float | None
    """log π/π_ref of the answer (nats); None if nobody asked, or the answer is empty."""


class Examiner:
    """Asks an endpoint one prompt after the other."""

    def __init__(self, config: GateConfig, service: EndpointClient) -> None:
        self._config = config
        self._service = service
        self._model = service.get("/v1/models", _Models).data[0].id  # the aligned one stands first

    def sit(self, version: int, group: Group) -> Paper:
        """One prompt of one version's examination."""
        from alignment.groups import Completion

        completed = self._completed(version, group)
        (choice,) = completed.choices
        text = (choice.text if choice.message is None else choice.message.content) or ""
        answer = Completion(text=text, truncated=choice.finish_reason == "length")
        pairs = group.pairs if self._config.margins.accuracy is not None else []
        known = [completion.text for completion in group.completions] if pairs else []
        own = [text] if text and self._config.margins.max_kl is not None else []
        rated = self._rated(version, group, known + own) if known + own else _Item(rewards=[])
        return Paper(
            group=replace(group, completions=(answer,)),
            tokens=completed.usage.completion_tokens,
            outcomes=tuple(_outcome(rated.rewards[better], rated.rewards[worse]) for better, worse in pairs),
            ratio=rated.logratios[-1] if own and rated.logratios else None,
        )

    def _completed(self, version: int, group: Group) -> _Completed:
        body = {**_prompt(group), "model": self._model, "max_tokens": self._config.max_tokens, "temperature": 0}
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        return self._service.post(path, body, _Completed, model_version=version, retry_when_busy=True)

    def _rated(self, version: int, group: Group, texts: list[str]) -> _Item:
        body = {"model": self._model, "version": version, "items": [{**_prompt(group), "completions": texts}]}
        (item,) = self._service.post("/v1/rewards", body, _Rated, retry_when_busy=True).items
        if self._config.margins.max_kl is not None and item.logratios is None:
            raise ServingError(
                f"{self._service.url} rates answers by a reward model, which knows of no divergence; set "
                "margins.max_kl to null"
            )
        if any(len(given) != len(texts) for given in (item.rewards, item.logratios) if given is not None):
            raise ServingError(f"{self._service.url} gave {len(item.rewards)} rewards for {len(texts)} answers")
        return item


def figures_of(papers: Sequence[Paper], judges: Rewards) -> Figures:
    """A version's figures: means over the prompts, and over the pairs for the accuracy.

    Raises:
        RewardError: an answer could not be judged.
    """
    answers = [group.completions[0] for group in judges.score([paper.group for paper in papers])]
    outcomes = [outcome for paper in papers for outcome in paper.outcomes]
    ratios = [paper.ratio for paper in papers if paper.ratio is not None]
    return {
        **({"accuracy": statistics.fmean(outcomes)} if outcomes else {}),
        **({"reward": statistics.fmean(answer.reward or 0.0 for answer in answers)} if judges.names else {}),
        **{f"judges/{name}": statistics.fmean(answer.scores[name] for answer in answers) for name in judges.names},
        "length": statistics.fmean(paper.tokens for paper in papers),
        "truncated": statistics.fmean(answer.truncated for answer in answers),
        **({"kl": statistics.fmean(ratios)} if ratios else {}),
    }


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
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


class _Completed(BaseModel):
    choices: list[_Choice] = Field(min_length=1, max_length=1)
    usage: _Usage


class _Item(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    rewards: list[float]
    logratios: list[float] | None = None


class _Rated(BaseModel):
    items: list[_Item] = Field(min_length=1, max_length=1)


def _line(name: str, current: float, candidate: float, least: float | None, most: float | None) -> Line:
    allowed, passed = "", True
    if least is not None:
        allowed, passed = f"≥ {least:.4g}", candidate >= least - SLACK
    elif most is not None:
        allowed, passed = f"≤ {most:.4g}", candidate <= most + SLACK
    return Line(name=name, current=current, candidate=candidate, allowed=allowed, passed=passed)


def _check_names(margins: Margins, judges: Sequence[str]) -> None:
    for name in margins.judges:
        if name not in judges:
            raise ConfigError(f"margins.judges: there is no judge {name!r}; there are {', '.join(judges) or 'none'}")


def _prompt(group: Group) -> dict[str, Any]:
    from alignment.rewards.functions import prompt_of

    prompt = prompt_of(group)
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}


def _outcome(better: float, worse: float) -> float:
    return 0.5 if better == worse else float(better > worse)
