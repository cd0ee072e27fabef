"""Which replica a request goes to, by the start of its prompt: consistent hashing with bounded loads.

Source: V. Mirrokni, M. Thorup, M. Zadimoghaddam, "Consistent Hashing with Bounded Loads", SODA 2018.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic_core import from_json

# Bytes of a body in which its prompt must begin. Reading a long body in full takes the ingress too long.
_HEAD_BYTES = 65_536
_POINTS = 64
"""Points of a replica on the ring: the largest share of 16 replicas is then about 1.3 times the mean."""
LOAD_FACTOR = 1.25
"""A replica may have this multiple of the mean load before a prefix goes elsewhere."""


def prefix_key(headers: Mapping[bytes, bytes], body: bytes, characters: int) -> bytes | None:
    """A digest of the first `characters` of the prompt in a JSON `body`, and of what separates prefix caches.

    The replicas keep the KV cache of a prefix for one API key and one `cache_salt`, so both are part of the key. None
    where no prompt is found: another kind of body, a compressed one, or a prompt that begins after 64 KiB.
    """
    if not body or b"content-encoding" in headers:
        return None
    try:
        fields = from_json(body[:_HEAD_BYTES], allow_partial="trailing-strings")
    except ValueError:
        return None
    text = _prompt_start(fields, characters) if isinstance(fields, dict) else ""
    if not text:
        return None
    parts = (headers.get(b"authorization", b"").decode("latin-1"), str(fields.get("cache_salt") or ""), text)
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=16).digest()


def _prompt_start(fields: Mapping[str, Any], characters: int) -> str:
    prompt = fields.get("prompt", fields.get("text_input"))
    while isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # All prompts of a request go to one replica.
    if isinstance(prompt, str):
        return prompt[:characters]
    if isinstance(prompt, list):  # Token ids; one stands for about four characters.
        return " ".join(map(str, prompt[: max(1, characters // 4)]))
    messages = fields.get("messages")
    text = ""
    for message in messages if isinstance(messages, list) else ():
        if len(text) >= characters or not isinstance(message, dict):
            break
        text += f"{message.get('role')}\n{message.get('content')}\n"
    return text[:characters]


class HashRing:
    """Replicas on a ring of hashes; a key belongs to the next replica. Adding or removing one moves only its share."""

    def __init__(self, replicas: Iterable[str]) -> None:
        self.replicas = frozenset(replicas)
        points = sorted((_hash(f"{each}#{index}".encode()), each) for each in self.replicas for index in range(_POINTS))
        self._hashes = [point for point, _ in points]
        self._owners = [owner for _, owner in points]

    def walk(self, key: bytes) -> Iterator[str]:
        """All replicas, each once, the owner of `key` first."""
        start, seen = bisect(self._hashes, _hash(key)), set[str]()
        for index in range(len(self._owners)):
            owner = self._owners[(start + index) % len(self._owners)]
            if owner not in seen:
                seen.add(owner)
                yield owner


def _hash(value: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest())


def preferred(ring: HashRing, key: bytes, loads: Mapping[str, int], total: int, spare: int, most: int = 3) -> list[str]:
    """Up to `most` replicas for `key`, best first: those on the ring that are not over the bound.

    `loads` has the requests in flight of each replica (0 if missing) and `total` their sum. A replica takes `spare`
    requests whatever the others have: where slots are free, a reused prefix is worth more than an even load.
    """
    bound = max(spare, math.ceil(LOAD_FACTOR * (total + 1) / max(1, len(ring.replicas))))
    found = []
    for replica in ring.walk(key):
        if loads.get(replica, 0) < bound:
            found.append(replica)
            if len(found) == most:
                break
    return found
