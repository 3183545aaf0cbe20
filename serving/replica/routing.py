"""Chooses the replica and the version that answer a request. All turns of a conversation go to the replica that has its
beginning in the prefix cache, and while there is a canary, all of them are answered by the same version.

A conversation's home replica is found by rendezvous hashing (Thaler and Ravishankar, 1998) of its key, which is its
beginning. So every ingress finds the same home without asking anybody, and a replica that comes or goes moves only its
own conversations.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serving.replica import queues

KEY_LENGTH = 1024
"""How many characters, or tokens, of a text belong to the conversation's key."""
MAX_LEAD = 0.25
"""How much longer the home replica's queue may be than the shortest one, as a fraction of the requests that a replica
answers at once."""


class ConversationRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """The request router of Ray Serve. It chooses the conversation's home replica, unless that replica is much busier
    than others."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        queues.QUEUES.add(self)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a replica. Ray's own `num_pending_requests` also counts some that have a replica."""
        return sum(not request.future.done() for request in list(self._pending_requests_to_fulfill))

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        """The request that a replica was chosen for. Two requests that one route sends at once, as for a comparison,
        have the same id; then `FIFOMixin` finds the other one, where `RequestRouter` alone would wait for ever."""
        return self._get_pending_request_matching_internal_request_id(request_metadata)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, in the order in which they are tried. Ray Serve takes the least busy replica of a
        group."""
        if pending_request is not None:
            # If no replica has a free place, Ray asks again after a pause. Its default is to ask again at once.
            pending_request.routing_context.should_backoff = True
            candidate_replicas = _without_avoided(candidate_replicas, pending_request.kwargs.get("avoid", ()))
        if len(candidate_replicas) < 2:
            return [candidate_replicas]
        random_pair = random.sample(candidate_replicas, 2)
        key = conversation_key(pending_request.args) if pending_request is not None else None
        if key is None:
            return [random_pair]
        names = [replica.replica_id.unique_id for replica in candidate_replicas]
        home = candidate_replicas[home_index(key, names)]
        return [random_pair] if self._is_busier(home, candidate_replicas) else [[home], random_pair]

    def _is_busier(self, replica: RunningReplica, replicas: Sequence[RunningReplica]) -> bool:
        """Whether a replica is so much busier than the idlest one that waiting costs more than its cache saves."""
        queue_lengths = [self.replica_queue_len_cache.get(candidate.replica_id) for candidate in replicas]
        length = self.replica_queue_len_cache.get(replica.replica_id)
        shortest = min((candidate for candidate in queue_lengths if candidate is not None), default=0)
        return length is not None and length - shortest > MAX_LEAD * replica.max_ongoing_requests


def _without_avoided(replicas: list[RunningReplica], avoid: Sequence[str]) -> list[RunningReplica]:
    """The replicas that have not sent the request elsewhere; if all of them have, the one that did so last."""
    remaining_replicas = [replica for replica in replicas if replica.replica_id.unique_id not in avoid]
    return remaining_replicas or sorted(replicas, key=lambda replica: avoid.index(replica.replica_id.unique_id))[-1:]


def canary_answers(key: str, canary: int, share: float) -> bool:
    """Whether the canary answers a conversation.

    Every ingress finds the same without asking anybody, and a conversation keeps its version. A larger share keeps the
    conversations of a smaller one and adds others. Another canary answers other conversations.

    Args:
        key: the conversation's key.
        canary: number of the version.
        share: fraction of the conversations, 0 to 1.
    """
    digest = blake2b(f"canary {canary} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def home_index(key: str, names: Sequence[str]) -> int:
    """Index of the replica, among `names`, that is the home of a conversation."""
    digests = [blake2b(f"{name} {key}".encode(), digest_size=8).digest() for name in names]
    return digests.index(max(digests))


def conversation_key(arguments: Sequence[Any]) -> str | None:
    """The text that all requests of a conversation begin with, from the arguments of `Engine.answer`; None if they
    hold no request.

    Of a chat it is the messages up to the user's first one; of other prompts, the first characters or tokens.
    """
    body = next((argument for argument in arguments if isinstance(argument, dict)), None)
    if body is None:
        return None
    if "messages" not in body:
        return str(body.get("prompt", "")[:KEY_LENGTH])
    turns = body["messages"]
    first_question = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), 0)
    return "".join(str(turn.get("content"))[:KEY_LENGTH] for turn in turns[: first_question + 1])
