"""`POST /v1/rewards`: rewards of completions, by the served model itself or by a reward model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from alignment.rewards.remote import ChatMessage
from serving.feedback.keys import Key
from serving.http.routes import (
    VERSION_HEADER,
    Context,
    ModelContext,
    ParsedBodyRoute,
    ResponseModel,
    choose_model,
    key_of,
    requested_version,
)
from serving.registry.versions import Registry
from serving.replica.scoring import LogRatios, ScoreResult, ScoringItem, ScoringRequest
from serving.schema import RequestError

BETA = 0.1
"""β where neither the service nor the version's training names one."""

Text = Annotated[str, Field(min_length=1)]

router = APIRouter(route_class=ParsedBodyRoute)


class RewardTurn(ChatMessage):
    """One message of a prompt."""

    role: Literal["system", "user", "assistant"]


class RewardItem(BaseModel):
    """One prompt and its completions."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    prompt: Text | None = None
    """The prompt, if it is a text."""
    messages: Annotated[tuple[RewardTurn, ...], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    """The prompt, if it is a chat; each completion is the assistant's next message."""
    completions: Annotated[tuple[Text, ...], Field(min_length=1, fail_fast=True)]

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    @property
    def text_or_messages(self) -> str | tuple[ChatMessage, ...]:
        """The prompt in the form in which it came."""
        return self.prompt if self.messages is None else self.messages  # type: ignore[return-value]


class RewardsBody(BaseModel):
    """Body of `/v1/rewards`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: Annotated[str, Field(max_length=200)] | None = None
    """Name of the served model; needed where the endpoint has several."""
    version: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """The version that rates, for keys with the role labeller; without it, the current one."""
    items: Annotated[tuple[RewardItem, ...], Field(fail_fast=True)]
    beta: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Factor from log-ratios to rewards. Without it, the configuration's `rewards.beta` counts; without that, the β of
    the version's training; without that, 0.1."""
    per_token: bool = False
    """Whether to return the log-ratios of every token too."""


class TokenLogRatios(ResponseModel):
    """The log-ratios of one completion, token by token."""

    tokens: list[str]
    """Texts of the tokens."""
    logratios: list[float]
    """log π - log π_ref of each token, in nats."""


class ItemRewards(ResponseModel):
    """The rewards of one prompt's completions, in the order of the request."""

    rewards: list[float]
    winner: int | None
    """Index of the completion with the highest reward; null for a tie, and for a single completion."""
    logratios: list[float] | None = None
    """log π - log π_ref of each completion, in nats; absent where a reward model rates."""
    tokens: list[TokenLogRatios] | None = None
    """The same per token; present with `per_token`."""


class RewardList(ResponseModel):
    """Answer of `/v1/rewards`."""

    object: Literal["list"]
    model: str
    version: int
    kind: Literal["reward_model", "implicit"]
    beta: float | None = None
    """Factor from log-ratios to rewards; absent where a reward model rates."""
    items: list[ItemRewards]


@router.post("/v1/rewards", tags=["user"], response_model=RewardList)
async def rewards(request: Request, body: RewardsBody, context: Context) -> Response:
    """Returns the rewards of completions in the order of the request, and the best completion of each prompt."""
    if body.model is not None and body.model not in context.models:
        raise RequestError(404, f"Rewards are those of {' and '.join(context.models)}.")
    model = choose_model(body.model, request, context)
    num_completions = sum(len(item.completions) for item in body.items)
    limit = context.config.limits.max_completions
    if num_completions > limit:
        raise RequestError(400, f"A request may have {limit} completions at most, and this one has {num_completions}.")
    if not body.items:
        raise RequestError(400, "items is empty.")
    items = tuple(ScoringItem(prompt=item.text_or_messages, completions=item.completions) for item in body.items)
    version = requested_version(request) if body.version is None else body.version
    if version is not None:
        is_whole = model.served_model.base_name is None
        await asyncio.to_thread(check_choice, version, key_of(request), model.registry, is_whole)
    result = await model.backend.score(ScoringRequest(items=items, version=version))
    context.metrics.count_scored(result.version, num_completions, model=model.id)
    return JSONResponse(to_json(result, body, model), headers={VERSION_HEADER: str(result.version)})


def to_json(result: ScoreResult, body: RewardsBody, model: ModelContext) -> dict[str, Any]:
    """Returns the answer to a request as JSON has it."""
    common = {"object": "list", "model": model.id, "version": result.version}
    if result.rewards:
        items = [{"rewards": list(scores), "winner": winner(scores)} for scores in result.rewards]
        return {**common, "kind": "reward_model", "items": items}
    beta = body.beta or model.config.rewards.beta or trained_beta(result.version, model.registry)
    return {
        **common,
        "kind": "implicit",
        "beta": beta,
        "items": [_implicit_item(log_ratios, beta, body.per_token) for log_ratios in result.log_ratios],
    }


def _implicit_item(log_ratios: tuple[LogRatios, ...], beta: float, per_token: bool) -> dict[str, Any]:
    implicit_rewards = [beta * completion.total for completion in log_ratios]
    tokens = [{"tokens": list(completion.tokens), "logratios": list(completion.values)} for completion in log_ratios]
    return {
        "rewards": implicit_rewards,
        "logratios": [completion.total for completion in log_ratios],
        "winner": winner(implicit_rewards),
        **({"tokens": tokens} if per_token else {}),
    }


def trained_beta(version: int, registry: Registry) -> float:
    """Returns the β that a version was trained with; `BETA` if its run's configuration names none."""
    algorithm = (registry.version(version).config or {}).get("algorithm", {})
    return float(algorithm.get("beta") or BETA)


def check_choice(version: int, key: Key, registry: Registry, is_whole: bool) -> None:
    """Checks that a key may have a version score completions.

    One scorer holds whole weights once. A request for another version makes all others wait while the scorer loads
    that version, so only admins may send one.

    Raises:
        RequestError: 403, the key's role is not enough; 409, there is no such version, or it does not answer and the
            key is no admin's.
    """
    if not key.allows("labeller"):
        raise RequestError(403, "Choosing a version needs a key with the role labeller.")
    if key.allows("admin"):
        if version not in {entry.number for entry in registry.versions()}:
            raise RequestError(409, f"There is no version {version}.")
        return
    state = registry.state()
    if version not in (state.current, state.canary, state.previous):
        raise RequestError(409, f"Version {version} does not answer here.")
    if is_whole and version != state.current:
        message = f"Rewards of version {version} need a key with the role admin: the scorer has to load it."
        raise RequestError(403, message)


def winner(scores: Sequence[float]) -> int | None:
    """Returns the index of the highest reward; None for a tie, and where there is nothing to compare."""
    best = max(scores)
    indices = [index for index, score in enumerate(scores) if score == best]
    return indices[0] if len(scores) > 1 and len(indices) == 1 else None
