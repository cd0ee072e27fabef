"""The workers of one training: who joins, who is alive, what the chief says, and sums over all of them.

Every worker keeps one connection to the chief. JSON messages travel over it, an empty one as the heartbeat. When a
process ends or falls silent, the chief tells the others, and the sums that they wait for fail.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.training.cluster import Cluster, listen
from builder.training.json_connection import JsonConnection
from builder.training.ring import Ring, greet, greeting
from serving.errors import InputError, TrainingError, cut, one_line

HEARTBEAT_S, SILENCE_S = 2.0, 60.0
# For a connection to say who it is, between two tries to reach the chief, for the ring to close, and for a last
# message to be read: a socket that is closed with unread bytes would take that message back.
_HELLO_S, _RETRY_S, _RING_S, _GOODBYE_S = 5.0, 0.5, 60.0, 1.0
_AGAIN = "run the same command on every machine, which resumes from the last checkpoint"


class Workers:
    """This process among the workers of a cluster; use it in a `with` block.

    An error that leaves the block ends the other workers too, with its message.

    Args:
        cluster: all workers, and which of them this is.
        identity: names and values that must be equal in every worker, such as the recipe's keys.
        timeout: seconds in which all workers must come.
        silence: seconds without a heartbeat after which a worker counts as lost.

    Attributes:
        failure: why training cannot continue; empty as long as it can.
    """

    def __init__(self, cluster: Cluster, identity: dict[str, Any], timeout: float, silence: float = SILENCE_S) -> None:
        self.cluster, self.rank, self.size = cluster, cluster.rank, cluster.size
        self._identity = json.loads(json.dumps(identity))
        self._timeout, self._silence = timeout, silence
        self._peers: dict[int, JsonConnection] = {}
        self._readers: list[threading.Thread] = []
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._ring: Ring | None = None
        self.failure = ""
        self._failed, self._ended = threading.Event(), threading.Event()
        self._lock = threading.Lock()

    @property
    def is_chief(self) -> bool:
        """Whether this worker writes the checkpoints and the bundle."""
        return self.rank == 0

    def __enter__(self) -> Workers:
        """Wait for all workers. Raises InputError for one that differs, TrainingError for one that does not come."""
        self._server = listen(self.cluster)
        try:
            if self.is_chief:
                self._admit_all()
            else:
                self._join()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        for rank, peer in self._peers.items():
            reader = threading.Thread(target=self._read, args=(rank, peer), daemon=True)
            self._readers.append(reader)
            reader.start()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            reason = one_line(error) if isinstance(error, Exception) else "it was interrupted"
            # A worker that ends because of another passes on that one's reason.
            self._tell({"stop": self.failure or f"{self.cluster.describe(self.rank)} failed: {reason}"})
        elif self.is_chief:
            self.finish()
        self._ended.set()
        for peer in self._peers.values():
            peer.end()
        for reader in self._readers:
            reader.join(_GOODBYE_S)
        for peer in self._peers.values():
            peer.close()
        if self._ring is not None:
            self._ring.close()
        self._server.close()

    def check(self) -> None:
        """Raise TrainingError when a worker has failed."""
        if self.failure:
            raise TrainingError(self.failure)

    def receive(self) -> dict[str, Any]:
        """Return the next message. Raises TrainingError when a worker has failed."""
        message = self._messages.get()
        self.check()
        return message

    def start_training(self, what: dict[str, Any]) -> None:
        """As the chief, send {"train": `what`} to every worker, and return when all have agreed."""
        self._tell({"train": what})
        for _ in self._peers:
            self.receive()
        self._tell({"begin": True})
        self._close_ring()

    def agree(self) -> None:
        """As another worker, tell the chief that training can begin, and return when all have."""
        self._tell({"ready": True})
        self.receive()
        self._close_ring()

    def finish(self) -> None:
        """As the chief, let the other workers end; from now on their end is not a failure."""
        if not self._ended.is_set():
            self._ended.set()
            self._tell({"done": True})

    def all_reduce(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the sum over all workers (see `Ring.all_reduce`). Raises TrainingError when a worker has failed."""
        assert self._ring is not None
        try:
            return self._ring.all_reduce(values)
        except (OSError, ValueError) as error:  # ValueError: `_fail` closed the sockets.
            # A neighbor sees only that a connection ended; the chief knows whose.
            self._failed.wait(2 * HEARTBEAT_S)
            self._fail(f"{self.cluster.describe(self.rank)} lost a connection to another worker ({error}); {_AGAIN}")
            raise TrainingError(self.failure) from None

    def from_chief(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the chief's `values`; the others pass an array of the same shape and type."""
        total = self.all_reduce(values if self.is_chief else np.zeros_like(values))
        return values if self.is_chief else total

    def _admit_all(self) -> None:
        """Take the workers' connections until all are here, and compare what they will train."""
        deadline = time.monotonic() + self._timeout
        while self._present() < self.size - 1:
            self._server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, place = self._server.accept()
            except TimeoutError:
                missing = [self.cluster.describe(rank) for rank in range(1, self.size) if rank not in self._peers]
                raise TrainingError(
                    f"{', '.join(missing[:8])} did not come within {self._timeout:g} s; start all workers, or raise "
                    "training.worker_timeout"
                ) from None
            peer = JsonConnection(connection, self._silence)
            try:
                hello = peer.receive(_HELLO_S)
                rank, addresses = int(hello["rank"]), hello["addresses"]
            except (OSError, ValueError, KeyError, TypeError):
                peer.close()  # Not one of ours, such as a probe of the port.
                continue
            self._refuse_difference(rank, addresses, hello.get("identity"), peer, str(place[0]))
            self._present()
            if rank in self._peers:
                _say(
                    peer,
                    {"stop": f"TF_CONFIG: {self.cluster.names[rank]} runs already; give each process its own index"},
                )
                peer.close()
                continue
            self._peers[rank] = peer
        self._tell({"joined": True})

    def _present(self) -> int:
        """Forget the workers that came and are gone; return how many are here."""
        for rank in [rank for rank, peer in self._peers.items() if peer.is_closed]:
            self._peers.pop(rank).close()
        return len(self._peers)

    def _refuse_difference(self, rank: int, addresses: Any, identity: Any, peer: JsonConnection, place: str) -> None:
        """Raise InputError, and tell the worker, if it was given another cluster, recipe or program."""
        line = ""
        if addresses != [list(address) for address in self.cluster.addresses] or not 0 < rank < self.size:
            line = f"TF_CONFIG: the worker at {place} was given another cluster than {self.cluster.names[0]}"
        elif identity != self._identity:
            theirs = identity if isinstance(identity, dict) else {}
            key = next(key for key in [*self._identity, *theirs, ""] if theirs.get(key) != self._identity.get(key))
            line = (
                f"{self.cluster.describe(rank)} has {cut(key)} = {cut(repr(theirs.get(key)))}, and "
                f"{self.cluster.names[0]} has {cut(repr(self._identity.get(key)))}"
            )
        if line:
            line += "; start every worker with the same command"
            _say(peer, {"stop": line})
            peer.close()
            raise InputError(line)

    def _join(self) -> None:
        """Connect to the chief, again and again until it is there, and wait until all workers are."""
        deadline = time.monotonic() + self._timeout
        hello = {"rank": self.rank, "addresses": self.cluster.addresses, "identity": self._identity}
        while True:
            try:
                connection = socket.create_connection(self.cluster.addresses[0], timeout=_HELLO_S)
                peer = JsonConnection(connection, self._silence)
                peer.send(hello)
                # The chief ends by its own timeout, which began at another time.
                answer = peer.receive(max(0.0, deadline - time.monotonic()) + self._timeout)
                break
            except (OSError, ValueError) as error:
                if time.monotonic() >= deadline:
                    raise TrainingError(
                        f"{self.cluster.describe(0)} cannot be reached after {self._timeout:g} s ({error}); start it, "
                        "or raise training.worker_timeout"
                    ) from None
                time.sleep(_RETRY_S)
        self._peers[0] = peer
        if "stop" in answer:
            self._fail(str(answer["stop"]))
            self.check()

    def _close_ring(self) -> None:
        """Connect to the next worker and take the connection of the one before."""
        deadline = time.monotonic() + _RING_S
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        try:
            right = socket.create_connection(self.cluster.addresses[after], timeout=_RING_S)
            greet(right, self.rank)
            while True:
                self._server.settimeout(max(0.001, deadline - time.monotonic()))
                left = self._server.accept()[0]
                left.settimeout(_HELLO_S)
                with contextlib.suppress(OSError):
                    if greeting(left) == before:
                        break
                left.close()
        except OSError as error:
            self._failed.wait(2 * HEARTBEAT_S)
            self.check()
            raise TrainingError(
                f"{self.cluster.describe(self.rank)} has no connection to {self.cluster.describe(before)} "
                f"and {self.cluster.describe(after)} ({error}); open these ports between the workers"
            ) from None
        self._ring = Ring(left, right, self.rank, self.size, self.check)

    def _read(self, rank: int, peer: JsonConnection) -> None:
        """Sort what a worker sends, until it ends."""
        name = self.cluster.describe(rank)
        try:
            for message in peer.messages():
                if "stop" in message:
                    self._fail(str(message["stop"]))
                    return
                if message:
                    if "done" in message:
                        self._ended.set()
                    self._messages.put(message)
        except TimeoutError:
            self._fail(f"{name} has not answered for {self._silence:g} s; {_AGAIN}")
        except (OSError, ValueError):
            self._fail(f"{name} ended; {_AGAIN}")

    def _beat(self) -> None:
        while not self._ended.wait(min(HEARTBEAT_S, self._silence / 4)):
            self._tell({})

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in self._peers.values():
            _say(peer, message)

    def _fail(self, line: str) -> None:
        """Let everything in this process that waits for a worker end with `line`, once."""
        with self._lock:
            if self.failure or self._ended.is_set():
                return
            self.failure = line
        if self.is_chief:
            self._tell({"stop": line})
        self._failed.set()
        self._messages.put({})


def _say(peer: JsonConnection, message: dict[str, Any]) -> None:
    """Send; that a worker is gone is found where it is read."""
    with contextlib.suppress(OSError):
        peer.send(message)
