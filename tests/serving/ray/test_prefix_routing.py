"""Prefix routing: equal starts share a replica, loads stay bounded, and a change of replicas moves few keys."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from serving.ray.prefix_routing import LOAD_FACTOR, HashRing, preferred, prefix_key

REPLICAS = [f"replica-{index}" for index in range(16)]
KEYS = [index.to_bytes(4) for index in range(4000)]
SYSTEM = {"role": "system", "content": "You answer in one sentence. " * 20}


def key(fields: Any, headers: dict[bytes, bytes] | None = None, characters: int = 256) -> bytes | None:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return prefix_key(headers or {}, body, characters)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"prompt": "a" * 256 + "b"}, {"prompt": "a" * 256 + "c", "max_tokens": 3}),
        ({"prompt": ["a" * 300, "x"]}, {"prompt": "a" * 256}),
        ({"prompt": list(range(64))}, {"prompt": list(range(100)), "stream": True}),
        ({"prompt": [[5, 6], [7]]}, {"prompt": [5, 6]}),
        ({"messages": [SYSTEM, {"role": "user", "content": "1"}]}, {"messages": [SYSTEM], "model": "m"}),
        ({"text_input": "abc"}, {"prompt": "abc"}),
    ],
)
def test_equal_starts_have_equal_keys(first: Any, second: Any) -> None:
    assert key(first) == key(second) is not None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"prompt": "a" * 255 + "b"}, {"prompt": "a" * 255 + "c"}),
        ({"prompt": "abc"}, {"prompt": "abcd"}),
        ({"prompt": [1, 23]}, {"prompt": [12, 3]}),
        ({"prompt": "abc"}, {"prompt": "abc", "cache_salt": "s"}),
        ({"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "system", "content": "a"}]}),
    ],
)
def test_other_starts_have_other_keys(first: Any, second: Any) -> None:
    assert None not in (key(first), key(second))
    assert key(first) != key(second)


def test_api_keys_have_prefixes_of_their_own() -> None:
    bodies = [key({"prompt": "abc"}, {b"authorization": value}) for value in (b"Bearer one", b"Bearer two")]
    assert bodies[0] != bodies[1]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b"\xff", b'{"prompt": ""}', b'{"prompt": []}', b'{"prompt": 3}', b'{"messages": [3]}',
     b'{"instances": [1]}', b'{"prompt": {"a": 1}}', b'{"messages": "text"}', b"[" * 100_000, b'{"a":' * 50_000],
)  # fmt: skip
def test_a_body_without_a_prompt_has_no_key(body: bytes) -> None:
    assert key(body) is None


def test_a_long_body_is_read_at_its_start_alone() -> None:
    long = json.dumps({"prompt": "é" * 1_000_000, "n": 1}).encode()
    assert key(long) == key({"prompt": "é" * 256})
    assert key(json.dumps({"stop": "x" * 70_000, "prompt": "abc"}).encode()) is None
    assert key({"prompt": "abc"}, {b"content-encoding": b"gzip"}) is None


def test_lone_surrogates_do_no_harm() -> None:
    assert key(b'{"prompt": "abc", "cache_salt": "\\ud800"}') != key({"prompt": "abd"})


def test_a_ring_is_the_same_in_every_process_and_walks_each_replica_once() -> None:
    one, other = HashRing(REPLICAS), HashRing(reversed(REPLICAS))
    for each in KEYS[:200]:
        walked = list(one.walk(each))
        assert walked == list(other.walk(each))
        assert sorted(walked) == sorted(REPLICAS)
    assert list(HashRing(()).walk(b"k")) == []
    # Pinned: ingresses of two versions route alike.
    assert next(one.walk(b"pinned")) == "replica-3"


def test_keys_spread_evenly_and_few_move_with_a_replica() -> None:
    ring, fewer = HashRing(REPLICAS), HashRing(REPLICAS[:-1])
    owners = {each: next(ring.walk(each)) for each in KEYS}
    counts = Counter(owners.values())
    mean = len(KEYS) / len(REPLICAS)
    assert max(counts.values()) < 1.6 * mean and min(counts.values()) > 0.5 * mean
    moved = {each for each in KEYS if next(fewer.walk(each)) != owners[each]}
    assert moved == {each for each in KEYS if owners[each] == REPLICAS[-1]}


def test_one_hot_prefix_does_not_overload_its_replica() -> None:
    ring, loads = HashRing(REPLICAS), Counter[str]()
    for total in range(1600):
        loads[preferred(ring, b"hot", loads, total, spare=4)[0]] += 1
        assert max(loads.values()) <= max(4, -(-LOAD_FACTOR * (total + 1) // len(REPLICAS)))
    assert min(loads.values()) > 0.5 * 100


def test_a_prefix_stays_where_it_is_while_slots_are_free() -> None:
    ring, loads = HashRing(REPLICAS), Counter[str]()
    for total in range(8):
        loads[preferred(ring, b"warm", loads, total, spare=8)[0]] += 1
    assert list(loads.values()) == [8]


def test_there_is_always_a_replica() -> None:
    choose = random.Random(3)
    for _ in range(300):
        ring = HashRing(REPLICAS[: choose.randint(1, 16)])
        loads = {each: choose.randint(0, 50) for each in ring.replicas}
        found = preferred(ring, choose.randbytes(4), loads, sum(loads.values()), spare=1)
        assert found and len(set(found)) == len(found) <= 3
