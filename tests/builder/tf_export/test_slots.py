"""Slots: whatever shares them, and however calls come, each stream is the tokens of `serving_default` alone."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.keras_backend import tf
from serving.clients.slot_pool import AHEAD, FINISHED, NO_FREE_SLOT, RUNNING, STALE
from tests.builder.tf_export.savedmodel_calls import Call, assert_refused, columns, padded, session_call
from tests.builder.tf_export.test_servable import END, LIMIT, expected, random_rows
from tests.oracles.fixtures import keras_model

SLOTS = 5
# Seconds for 40 texts of 8 clients, which take 2.
PATIENCE = 60.0
REQUESTS = itertools.count(1)


def save(folder: Path, **options: Any) -> Call:
    from builder.tf_export.servable import Servable

    Servable(keras_model("bytes"), **options).save(folder)
    return session_call(str(folder))


@pytest.fixture(scope="module")
def slots(tmp_path_factory: pytest.TempPathFactory) -> Call:
    return save(tmp_path_factory.mktemp("slots"), slots=SLOTS, slot_lease=3600.0)


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Two slots, which anyone may take as soon as nobody asks for them."""
    return save(tmp_path_factory.mktemp("impatient"), slots=2, slot_lease=0.0)


def prefill(call: Call, prompts: list[list[int]], rows: list[dict[str, Any]], ids: list[int]) -> dict[str, Any]:
    return call("prefill_slots", request_id=np.array(ids, np.int64), **padded(prompts), **columns(rows))


def start(call: Call, count: int, **row: Any) -> dict[str, Any]:
    """Prompts that go on for 30 tokens."""
    prompts = [[1, 2, 3 + number] for number in range(count)]
    rows = [{"max_new_tokens": 30, "temperature": 1.0, "seed": 4, **row}] * count
    return prefill(call, prompts, rows, [next(REQUESTS) for _ in prompts])


def decode(call: Call, held: dict[str, Any], received: Any, steps: Any) -> dict[str, Any]:
    size = len(held["slot"])
    counts = {"received": np.broadcast_to(np.int32(received), size), "steps": np.broadcast_to(np.int32(steps), size)}
    return call("decode_slots", slot=held["slot"], generation=held["generation"], **counts)


def release(call: Call, held: dict[str, Any]) -> Any:
    return call("release_slots", slot=held["slot"], generation=held["generation"])["status"].tolist()


def tokens(outputs: dict[str, Any]) -> list[list[int]]:
    for row, length in zip(outputs["token_ids"], outputs["lengths"], strict=True):
        assert (row[length:] == END).all()
    return [row[:length].tolist() for row, length in zip(outputs["token_ids"], outputs["lengths"], strict=True)]


def stream(call: Call, prompt: list[int], row: dict[str, Any], random: np.random.Generator) -> list[int]:
    """One client's whole text, with calls repeated as a network would and steps of any size."""
    request = next(REQUESTS)
    deadline = time.monotonic() + PATIENCE
    while (first := prefill(call, [prompt], [row], [request]))["status"][0] == NO_FREE_SLOT:
        assert time.monotonic() < deadline, "no slot came free"
        assert first["slot"].tolist() == [-1] and first["generation"].tolist() == [0] and tokens(first) == [[]]
    text, status = tokens(first)[0], int(first["status"][0])
    while status == RUNNING:
        assert len(text) <= LIMIT and time.monotonic() < deadline
        if random.random() < 0.2:
            again = prefill(call, [prompt], [row], [request])
            assert all(again[name].tolist() == first[name].tolist() for name in ("slot", "generation"))
        received = int(random.integers(0, len(text) + 1))
        answer = decode(call, first, received, int(random.integers(1, 12)))
        (new,) = tokens(answer)
        assert new, "an unfinished stream gets a token by every call"
        assert new[: len(text) - received] == text[received : received + len(new)]
        text[received : received + len(new)] = new
        status = int(answer["status"][0])
    assert status == FINISHED
    assert tokens(decode(call, first, 0, LIMIT)) == [text]
    assert release(call, first) == [FINISHED]
    return text


def at_once(clients: list[Callable[[], list[int]]]) -> list[list[int]]:
    """What clients in eight threads give. Fails if one has not ended in time: without the lock they wait for ever."""
    texts: dict[int, list[int]] = {}
    wanted: queue.SimpleQueue[tuple[int, Callable[[], list[int]]]] = queue.SimpleQueue()
    for task in enumerate(clients):
        wanted.put(task)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                number, client = wanted.get_nowait()
                texts[number] = client()

    # Daemons, which do not keep the tests from ending where they hang.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert len(texts) == len(clients), f"{len(clients) - len(texts)} clients failed or hung"
    return [texts[number] for number in range(len(clients))]


def test_clients_at_once_get_the_tokens_of_each_alone(slots: Call) -> None:
    random = np.random.default_rng(5)
    prompts, rows = random_rows(random, 40)
    prompts[0], rows[1] = list(range(LIMIT)), {"max_new_tokens": 10**6}
    texts = at_once(
        [
            partial(stream, slots, prompt, row, np.random.default_rng(number))
            for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]
    )
    assert texts == expected(prompts, rows)
    assert texts[0] == [] and sum(text[-1:] == [END] for text in texts) >= 3


def test_merged_and_padded_calls_are_each_row_alone(call: Call) -> None:
    """Through the bundle, which has eight slots, in both ways to run it."""
    random = np.random.default_rng(6)
    prompts, rows = random_rows(random, 6)
    wanted = expected(prompts, rows)
    ids = [next(REQUESTS) for _ in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    held: dict[int, dict[str, Any]] = {}
    unfinished = list(range(6))
    while unfinished:
        batch = [int(row) for row in random.choice(unfinished, random.integers(1, 5))]
        if fresh := [row for row in batch if row not in held]:
            parts = [[some[row] for row in fresh] for some in (prompts, rows, ids)]
            answer = prefill(call, *parts)
            for place, row in enumerate(fresh):
                mine = {name: answer[name][place : place + 1] for name in ("slot", "generation")}
                assert held.setdefault(row, mine) == mine
            batch = fresh
        else:
            merged = {name: np.concatenate([held[row][name] for row in batch]) for name in ("slot", "generation")}
            answer = decode(call, merged, [len(texts[row]) for row in batch], random.integers(1, 9, len(batch)))
        before = [len(texts[row]) for row in batch]
        for row, start, new, status in zip(batch, before, tokens(answer), answer["status"], strict=True):
            # A row that is there twice may have asked for more in one place than in the other.
            texts[row][start : start + len(new)] = new
            if status == FINISHED and row in unfinished:
                assert texts[row] == wanted[row]
                unfinished.remove(row)
    assert texts == wanted
    for place_of in held.values():
        assert release(call, place_of) == [FINISHED]


def test_a_request_that_comes_again_takes_no_second_slot(slots: Call) -> None:
    prompts, rows = [[1, 2, 3], [1, 2, 3], [9, 9]], [{"max_new_tokens": 9}] * 3
    first = prefill(slots, prompts, rows, [901, 901, 902])
    assert first["slot"][0] == first["slot"][1] != first["slot"][2]
    assert first["generation"][0] == first["generation"][1] < first["generation"][2]
    again = prefill(slots, prompts[1:], rows[1:], [901, 902])
    assert all(again[name].tolist() == first[name][1:].tolist() for name in first)
    assert release(slots, {name: again[name] for name in ("slot", "generation")}) == [FINISHED] * 2


def test_what_finds_no_slot_says_so_and_takes_nothing_from_others(slots: Call) -> None:
    held = start(slots, SLOTS + 2)
    assert held["status"].tolist() == [RUNNING] * SLOTS + [NO_FREE_SLOT] * 2
    assert sorted(held["slot"].tolist()) == [-1, -1, 0, 1, 2, 3, 4]
    held = {name: held[name][:SLOTS] for name in ("slot", "generation")}
    assert start(slots, 1)["status"].tolist() == [NO_FREE_SLOT]
    assert release(slots, {name: value[2:3] for name, value in held.items()}) == [FINISHED]
    another = start(slots, 2)
    assert another["slot"].tolist() == [2, -1]
    assert release(slots, held) == [FINISHED, FINISHED, STALE, FINISHED, FINISHED]
    assert release(slots, {name: another[name][:1] for name in held}) == [FINISHED]


def test_a_stale_generation_gets_a_status_and_no_token(slots: Call) -> None:
    old = start(slots, 2)
    assert release(slots, old) == release(slots, old) == [FINISHED] * 2
    assert decode(slots, old, 1, 1)["status"].tolist() == [STALE] * 2
    new = start(slots, 1)
    assert new["slot"][0] == old["slot"][0] and new["generation"][0] > old["generation"].max()
    both = {name: np.concatenate([old[name][:1], new[name]]) for name in ("slot", "generation")}
    answer = decode(slots, both, 1, 3)
    assert answer["status"].tolist() == [STALE, RUNNING] and [len(row) for row in tokens(answer)] == [0, 3]
    assert release(slots, both) == [STALE, FINISHED]
    assert release(slots, both | {"generation": np.zeros(2, np.int64)}) == [STALE, STALE]


def test_a_client_cannot_have_more_than_was_made(slots: Call) -> None:
    held = start(slots, 1)
    for received in (2, 2**31 - 1):
        answer = decode(slots, {name: held[name].repeat(2) for name in ("slot", "generation")}, [received, 0], 1)
        assert answer["status"].tolist() == [AHEAD, RUNNING] and [len(row) for row in tokens(answer)] == [0, 1]
    assert len(tokens(decode(slots, held, 1, 1))[0]) == 1
    assert release(slots, held) == [FINISHED]


def test_one_call_advances_every_slot(slots: Call) -> None:
    held = start(slots, 3)
    names = ("slot", "generation")
    answer = decode(slots, {name: held[name][:1] for name in names}, 1, 4)
    assert [len(row) for row in tokens(answer)] == [4]
    # The others' are there: more than one step gives at a time, and nobody asked for them.
    waiting = decode(slots, {name: held[name][1:] for name in names}, 0, LIMIT)
    assert [len(row) for row in tokens(waiting)] == [5, 5]
    assert release(slots, {name: held[name] for name in names}) == [FINISHED] * 3


def test_slots_that_nobody_asks_for_stop_and_are_taken(impatient: Call) -> None:
    lost = start(impatient, 2)
    taken = start(impatient, 1)
    assert taken["slot"][0] in lost["slot"] and taken["status"].tolist() == [RUNNING]
    statuses = decode(impatient, lost, 1, 2)["status"].tolist()
    assert sorted(statuses) == [STALE, RUNNING]
    # Only the slot that is asked for goes on, and one that had stopped goes on where it was.
    kept = {name: lost[name][[statuses.index(RUNNING)]] for name in ("slot", "generation")}
    assert len(tokens(decode(impatient, kept, 0, LIMIT))[0]) == 3
    ready = tokens(decode(impatient, taken, 0, LIMIT))
    assert ready == tokens(taken)
    rest = tokens(decode(impatient, taken, 1, LIMIT))
    assert [[*ready[0], *rest[0]]] == expected([[1, 2, 3]], [{"max_new_tokens": 30, "temperature": 1.0, "seed": 4}])
    assert release(impatient, kept) == release(impatient, taken) == [FINISHED]


def test_a_finished_stream_can_be_fetched_again_until_it_is_released(slots: Call) -> None:
    held = start(slots, SLOTS, max_new_tokens=2)
    text = tokens(decode(slots, held, 0, LIMIT))
    assert [len(row) for row in text] == [1] * SLOTS, "the first was ready, so nothing was advanced"
    text = tokens(decode(slots, held, 1, 1))
    assert start(slots, 1)["status"].tolist() == [NO_FREE_SLOT]
    again = decode(slots, held, 1, 1)
    assert tokens(again) == text and again["status"].tolist() == [FINISHED] * SLOTS
    assert release(slots, held) == [FINISHED] * SLOTS


def test_a_call_that_is_broken_off_holds_up_no_other(slots: Call) -> None:
    row = {"max_new_tokens": 40, "temperature": 1.0, "seed": 4}
    wanted = expected([[1, 2, 3]], [row])
    broken = 0
    for limit in (1, 2, 3, 1, 2, 3, 1, 2):
        held = start(slots, 1, **row)
        try:
            decode(partial(slots, options=tf.compat.v1.RunOptions(timeout_in_ms=limit)), held, 1, LIMIT)
        except tf.errors.DeadlineExceededError:
            broken += 1
        text = tokens(held)[0]
        # Steps that were committed before the call was broken off are ready, and a call gives what is ready.
        while (answer := decode(slots, held, len(text), LIMIT))["status"][0] == RUNNING:
            text += tokens(answer)[0]
        assert [[*text, *tokens(answer)[0]]] == wanted
        assert release(slots, held) == [FINISHED]
    assert broken > 0


@pytest.mark.parametrize(
    ("signature", "changes", "sentence"),
    [
        ("prefill_slots", {"request_id": [7, 0]}, "request_id must not be 0: it names the request"),
        ("prefill_slots", {"request_id": [7]}, "request_id must have one value for each row of token_ids"),
        ("prefill_slots", {"lengths": [2, 0]}, "lengths must be at least 1: a prompt may not be empty"),
        ("prefill_slots", {"temperature": [0.0, np.nan]}, "temperature must be a finite number, 0 or more"),
        ("prefill_slots", {"max_new_tokens": [0, 1]}, "max_new_tokens must be at least 1"),
        ("decode_slots", {"slot": [0, SLOTS]}, f"slot must be from 0 to {SLOTS - 1}"),
        ("decode_slots", {"slot": [-1, 0]}, f"slot must be from 0 to {SLOTS - 1}"),
        ("decode_slots", {"received": [0, -1]}, "received must be 0 or more"),
        ("decode_slots", {"steps": [0, 1]}, "steps must be at least 1"),
        ("decode_slots", {"steps": [1]}, "steps must have one value for each row of slot"),
        ("release_slots", {"slot": [-1, 0]}, f"slot must be from 0 to {SLOTS - 1}"),
        ("release_slots", {"generation": [1]}, "generation must have one value for each row of slot"),
    ],
)
def test_bad_calls_are_refused_and_change_nothing(
    slots: Call, signature: str, changes: dict[str, Any], sentence: str
) -> None:
    held = {"slot": np.array([0, 1], np.int32), "generation": np.array([1, 1], np.int64)}
    counts = {"received": np.zeros(2, np.int32), "steps": np.ones(2, np.int32)}
    inputs: dict[str, Any] = {
        "prefill_slots": {"request_id": np.array([11, 12], np.int64)} | padded([[1, 2, 3], [4, 5]]) | columns([{}, {}]),
        "decode_slots": held | counts,
        "release_slots": held,
    }[signature]
    assert_refused(
        slots, sentence, signature, inputs | {key: np.array(value, inputs[key].dtype) for key, value in changes.items()}
    )
    free = start(slots, SLOTS)
    assert free["status"].tolist() == [RUNNING] * SLOTS, "a call that is refused must not keep a slot"
    assert release(slots, free) == [FINISHED] * SLOTS
