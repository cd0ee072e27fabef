"""Ray Serve's choice of a replica: the one whose KV cache has the prompt's prefix, unless it is overloaded."""

from __future__ import annotations

import random
import time
from collections import Counter

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serving.ray.prefix_routing import HashRing, preferred

# A replica that could not be reached is the last choice for this long; Ray removes it once it knows that it died.
_SUSPECT_SECONDS = 15.0


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Routes by `ForwardedRequest.prefix_key`; requests without one go to the less busy of two replicas.

    Loads are those of this router's own requests. Several ingresses choose alike without a shared state.
    """

    def initialize_state(self, spare: int = 8) -> None:
        """Ray calls it with `request_router_kwargs`; `spare` is as in `prefix_routing.preferred`."""
        self._spare = spare
        self._ring = HashRing(())
        self._in_flight: Counter[str] = Counter()
        self._suspects: dict[str, float] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Ray calls it with the replicas that now run."""
        names = {each.replica_id.unique_id for each in replicas}
        if names != self._ring.replicas:
            self._ring = HashRing(names)
            for gone in self._in_flight.keys() - names:
                del self._in_flight[gone]
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of candidates; Ray takes the first rank that has a free place."""
        if pending_request is not None:
            # Ray asks again at once, without a pause, unless this is set.
            pending_request.routing_context.should_backoff = True
        now = time.monotonic()
        suspects = {name for name, until in self._suspects.items() if until > now}
        replicas = {each.replica_id.unique_id: each for each in candidate_replicas}
        healthy = {name: each for name, each in replicas.items() if name not in suspects} or replicas
        request = pending_request.args[0] if pending_request is not None and pending_request.args else None
        key = getattr(request, "prefix_key", None)
        if key is None:
            first = [random.sample(list(healthy), min(2, len(healthy)))]
        else:
            order = preferred(self._ring, key, self._in_flight, self._in_flight.total(), self._spare)
            first = [[name] for name in order if name in healthy]
        ranks = [[healthy[name] for name in rank] for rank in first]
        taken = {name for rank in first for name in rank}
        rest = [each for name, each in healthy.items() if name not in taken]
        return [*ranks, rest, [each for name, each in replicas.items() if name not in healthy]]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Ray calls it for each request that it sends."""
        self._in_flight[replica_id.unique_id] += 1
        super().on_send_request(replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Ray calls it for each request that ended, however it did."""
        if self._in_flight[replica_id.unique_id] > 0:
            self._in_flight[replica_id.unique_id] -= 1

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Ray calls it for a replica that could not be reached."""
        self._suspects = {name: until for name, until in self._suspects.items() if until > time.monotonic()}
        self._suspects[replica_id.unique_id] = time.monotonic() + _SUSPECT_SECONDS
        super().on_replica_actor_unavailable(replica_id)


def class_path() -> str:
    """How a Serve configuration names the router."""
    return f"{PrefixRouter.__module__}:{PrefixRouter.__qualname__}"
