"""Which replica and which version answer: the turns of one conversation go where its beginning is still in the prefix
cache, and stay with one version of a canary.

A conversation's home is found by rendezvous hashing (Thaler and Ravishankar, 1998) of its beginning over the replicas.
So every ingress finds the same one without asking anybody, and a replica that comes or goes moves only its own share.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serving import queues

BEGINNING = 1024
"""Characters, or tokens, of a text that tell one conversation from another."""
AHEAD = 0.25
"""How much more a home may have to do than the idlest replica, as a part of what it can do at once."""


class ByConversation(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Ray Serve's choice of a replica: a conversation's home, unless it is much busier than the others."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        queues.QUEUES.add(self)

    @property
    def num_waiting(self) -> int:
        """Requests without a replica. In Ray's own `num_pending_requests` are some that have found one, too."""
        return sum(not pending.future.done() for pending in list(self._pending_requests_to_fulfill))

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        """The request that a replica was chosen for. Two that one route sends at once, as for a comparison, have one id
        between them: then the other one is found by `FIFOMixin`, where `RequestRouter` alone would wait for ever."""
        return self._get_pending_request_matching_internal_request_id(request_metadata)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, in the order in which they are tried; of each, the one with the least to do is taken."""
        if pending_request is not None:
            # If none has room they are asked again after a pause. Ray's default is at once, for ever.
            pending_request.routing_context.should_backoff = True
            candidate_replicas = _without(candidate_replicas, pending_request.kwargs.get("avoid", ()))
        if len(candidate_replicas) < 2:
            return [candidate_replicas]
        any_two = random.sample(candidate_replicas, 2)
        begun = beginning(pending_request.args) if pending_request is not None else None
        if begun is None:
            return [any_two]
        at_home = candidate_replicas[home(begun, [one.replica_id.unique_id for one in candidate_replicas])]
        return [any_two] if self._is_busier(at_home, candidate_replicas) else [[at_home], any_two]

    def _is_busier(self, one: RunningReplica, others: Sequence[RunningReplica]) -> bool:
        """Whether a replica is so much busier than the idlest that waiting costs more than its cache saves."""
        lengths = {other.replica_id: self.replica_queue_len_cache.get(other.replica_id) for other in others}
        own, least = lengths[one.replica_id], min((known for known in lengths.values() if known is not None), default=0)
        return own is not None and own - least > AHEAD * one.max_ongoing_requests


def _without(replicas: list[RunningReplica], avoided: Sequence[str]) -> list[RunningReplica]:
    """The replicas that did not send a request elsewhere; if each did, the one that did so last."""
    others = [one for one in replicas if one.replica_id.unique_id not in avoided]
    return others or sorted(replicas, key=lambda one: avoided.index(one.replica_id.unique_id))[-1:]


def canary_answers(begun: str, canary: int, share: float) -> bool:
    """Whether a conversation is among those that a canary answers.

    Every ingress finds the same without asking anybody, a conversation keeps its version, and a larger share adds
    conversations to those of a smaller one. Another canary gets others.

    Args:
        begun: the conversation's beginning.
        canary: number of the version.
        share: fraction of the conversations, 0 to 1.
    """
    digest = blake2b(f"canary {canary} {begun}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def home(begun: str, names: Sequence[str]) -> int:
    """Place of the name that a beginning belongs to."""
    return max(range(len(names)), key=lambda place: blake2b(f"{names[place]} {begun}".encode(), digest_size=8).digest())


def beginning(arguments: Sequence[Any]) -> str | None:
    """What all requests of a conversation have in common, from the arguments of `Engine.answer`; None if nothing.

    Of a chat these are the messages up to the first of the user, of other texts the first characters.
    """
    bodies = [each for each in arguments if isinstance(each, dict)]
    if not bodies:
        return None
    body = bodies[0]
    if "messages" not in body:
        return str(body.get("prompt", "")[:BEGINNING])
    turns = body["messages"]
    asked = next((place for place, turn in enumerate(turns) if turn["role"] == "user"), 0)
    return "".join(str(turn.get("content"))[:BEGINNING] for turn in turns[: asked + 1])
