"""`POST /v1/rewards`: what completions are worth, by the served model itself or by a reward model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from alignment.rewards.remote import ChatMessage
from serving.keys import Key
from serving.registry import Registry
from serving.routes import VERSION_HEADER, ReadRoute, Service, key_of, wanted_version
from serving.schema import Refused
from serving.scoring import Asked, Job, Rated, Ratios

BETA = 0.1
"""β where neither the service nor the version's training says one."""

Text = Annotated[str, Field(min_length=1)]


class RewardTurn(ChatMessage):
    """One message of a prompt."""

    role: Literal["system", "user", "assistant"]


class RewardItem(BaseModel):
    """One prompt and its completions."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text | None = None
    messages: Annotated[tuple[RewardTurn, ...], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    completions: Annotated[tuple[Text, ...], Field(min_length=1, fail_fast=True)]

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    @property
    def asked(self) -> str | tuple[ChatMessage, ...]:
        """Its prompt, in whichever form it came."""
        return self.prompt if self.messages is None else self.messages  # type: ignore[return-value]


class RewardsBody(BaseModel):
    """Body of `/v1/rewards`."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=200)] | None = None
    version: Annotated[int, Field(ge=1, le=10**9)] | None = None
    items: Annotated[tuple[RewardItem, ...], Field(fail_fast=True)]
    beta: Annotated[float, Field(gt=0, le=1e6)] | None = None
    per_token: bool = False


def routes(service: Service) -> APIRouter:
    """The router of this module."""
    router = APIRouter(route_class=ReadRoute)
    config = service.config
    is_whole = service.served.base_name is None

    @router.post("/v1/rewards", tags=["user"])
    async def rewards(request: Request, body: RewardsBody) -> Response:
        """Rewards of completions in the order given, and the best of each prompt's."""
        if body.model not in (None, service.served.name):
            raise Refused(404, f"Rewards are those of {service.served.name}.")
        count = sum(len(item.completions) for item in body.items)
        if count > config.limits.max_completions:
            limit = config.limits.max_completions
            raise Refused(400, f"A request may have {limit} completions at most, and this one has {count}.")
        if not body.items:
            raise Refused(400, "items is empty.")
        items = tuple(Asked(prompt=item.asked, completions=item.completions) for item in body.items)
        version = wanted_version(request) if body.version is None else body.version
        if version is not None:
            await asyncio.to_thread(check_choice, version, key_of(request), service.registry, is_whole)
        rated = await service.backend.rate(Job(items=items, version=version))
        service.meters.rated(rated.version, count)
        return JSONResponse(told(rated, body), headers={VERSION_HEADER: str(rated.version)})

    def told(rated: Rated, body: RewardsBody) -> dict[str, Any]:
        shared = {"object": "list", "model": service.served.name, "version": rated.version}
        if rated.rewards:
            items = [{"rewards": list(one), "winner": winner(one)} for one in rated.rewards]
            return {**shared, "kind": "reward_model", "items": items}
        beta = body.beta or config.rewards.beta or trained_beta(rated.version)
        return {
            **shared,
            "kind": "implicit",
            "beta": beta,
            "items": [item(one, beta, body.per_token) for one in rated.ratios],
        }

    def item(ratios: tuple[Ratios, ...], beta: float, per_token: bool) -> dict[str, Any]:
        found = [beta * one.total for one in ratios]
        tokens = [{"tokens": list(one.tokens), "logratios": list(one.values)} for one in ratios]
        return {
            "rewards": found,
            "logratios": [one.total for one in ratios],
            "winner": winner(found),
            **({"tokens": tokens} if per_token else {}),
        }

    def trained_beta(version: int) -> float:
        algorithm = (service.registry.version(version).config or {}).get("algorithm", {})
        return float(algorithm.get("beta") or BETA)

    return router


def check_choice(version: int, key: Key, registry: Registry, is_whole: bool) -> None:
    """Whether a key may have a version rate. One scorer holds whole weights once: who changes what it holds makes all
    others wait while it loads, so that only admins may.

    Raises:
        Refused: 403 the key's role is not enough, 409 there is no such version, or it does not answer and the key is
            no admin's.
    """
    if not key.may("labeller"):
        raise Refused(403, "Choosing a version needs a key with the role labeller.")
    if key.may("admin"):
        if version not in {known.number for known in registry.versions()}:
            raise Refused(409, f"There is no version {version}.")
        return
    state = registry.state()
    if version not in (state.current, state.canary, state.previous):
        raise Refused(409, f"Version {version} does not answer here.")
    if is_whole and version != state.current:
        raise Refused(403, f"Rewards of version {version} need a key with the role admin: the scorer has to load it.")


def winner(rewards: Sequence[float]) -> int | None:
    """Index of the highest reward; None for a tie, and where there is nothing to compare."""
    best = max(rewards)
    places = [index for index, reward in enumerate(rewards) if reward == best]
    return places[0] if len(rewards) > 1 and len(places) == 1 else None
