"""The contract of docs/slots.md, call by call in any order, against a model of it; and calls of surprising shapes."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tensorflow.core.protobuf.config_pb2 import CallableOptions
from tensorflow.python.saved_model import loader_impl

from builder.keras_backend import tf
from serving.clients.slot_pool import AHEAD, CANCELLED, FINISHED, NO_FREE_SLOT, RUNNING, STALE
from tests.builder.tf_export.savedmodel_calls import Call, columns, padded
from tests.builder.tf_export.test_servable import END, LIMIT, expected
from tests.builder.tf_export.test_slots import save
from tests.oracles.fixtures import keras_model

SLOTS = 3
REQUESTS = itertools.count(1)
JOBS: list[tuple[list[int], dict[str, Any]]] = [
    ([1, 2, 3], {"max_new_tokens": 9}),
    ([7] * 20, {"max_new_tokens": 4, "temperature": 1.0, "seed": 5}),
    ([5], {"max_new_tokens": 14, "temperature": 0.7, "top_k": 40, "seed": 2**62}),
    (list(range(LIMIT - 2)), {"max_new_tokens": 30}),
    (list(range(LIMIT)), {"max_new_tokens": 3}),
    ([9, 9], {"max_new_tokens": 1}),
]


@functools.cache
def texts() -> list[list[int]]:
    return expected([prompt for prompt, _ in JOBS], [row for _, row in JOBS])


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Call:
    return save(tmp_path_factory.mktemp("contract"), slots=SLOTS, slot_lease=3600.0)


@dataclass
class Held:
    """A generation that was given out, and whether it is still in its slot."""

    request: int
    job: int
    slot: int
    generation: int
    kept: bool = True


class SlotContract(RuleBasedStateMachine):
    """What one careful reader of the contract expects of each call."""

    call: Call

    @initialize()
    def begin(self) -> None:
        self.held: list[Held] = []
        self.cancelled: list[int] = []

    def teardown(self) -> None:
        if kept := [each for each in getattr(self, "held", []) if each.kept]:
            self.call("cancel_slots", request_id=np.array([each.request for each in kept], np.int64))

    def tenants(self) -> dict[int, Held]:
        return {each.slot: each for each in self.held if each.kept}

    @rule(jobs=st.lists(st.integers(0, len(JOBS) - 1), min_size=1, max_size=4))
    def prompts(self, jobs: list[int]) -> None:
        self.prefill([(next(REQUESTS), job) for job in jobs])

    @precondition(lambda self: self.tenants())
    @rule(data=st.data())
    def prompts_again(self, data: st.DataObject) -> None:
        again = data.draw(st.lists(st.sampled_from(list(self.tenants().values())), min_size=1, max_size=3))
        answer = self.prefill([(each.request, each.job) for each in again])
        for row, each in enumerate(again):
            assert (answer["slot"][row], answer["generation"][row]) == (each.slot, each.generation)

    def prefill(self, rows: list[tuple[int, int]]) -> dict[str, Any]:
        before = self.tenants()
        answer = self.call(
            "prefill_slots",
            request_id=np.array([request for request, _ in rows], np.int64),
            **padded([JOBS[job][0] for _, job in rows]),
            **columns([JOBS[job][1] for _, job in rows]),
        )
        known = {each.request for each in before.values()}
        new = [row for row, (request, _) in enumerate(rows) if request not in known]
        placed = [row for row in new if answer["status"][row] != NO_FREE_SLOT]
        assert len(placed) == min(len(new), SLOTS - len(before))
        for row, (request, job) in enumerate(rows):
            status, length = answer["status"][row], answer["lengths"][row]
            if status == NO_FREE_SLOT:
                assert (answer["slot"][row], answer["generation"][row], length) == (-1, 0, 0)
                continue
            text = texts()[job][:1]
            assert answer["token_ids"][row][:length].tolist() == text
            assert status == (FINISHED if text == texts()[job] else RUNNING)
            if row in placed:
                assert answer["slot"][row] not in self.tenants()
                self.held.append(Held(request, job, int(answer["slot"][row]), int(answer["generation"][row])))
        return answer

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def tokens(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.sampled_from(self.held), min_size=1, max_size=4))
        received = data.draw(st.lists(st.integers(0, 12), min_size=len(rows), max_size=len(rows)))
        steps = data.draw(st.lists(st.integers(1, 9), min_size=len(rows), max_size=len(rows)))
        answer = self.call(
            "decode_slots",
            slot=np.array([each.slot for each in rows], np.int32),
            generation=np.array([each.generation for each in rows], np.int64),
            received=np.array(received, np.int32),
            steps=np.array(steps, np.int32),
        )
        for row, each in enumerate(rows):
            status, length, text = answer["status"][row], answer["lengths"][row], texts()[each.job]
            new = answer["token_ids"][row]
            assert (new[length:] == END).all()
            if not each.kept:
                assert (status, length) == (STALE, 0)
            elif status == AHEAD:
                assert received[row] > 1 and length == 0
            else:
                assert received[row] <= len(text) and length <= steps[row]
                assert new[:length].tolist() == text[received[row] : received[row] + length]
                done = received[row] + length == len(text)
                assert status == (FINISHED if done else RUNNING) and (length > 0 or done)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.sampled_from(self.held), min_size=1, max_size=3))
        kept = [each.kept for each in rows]
        answer = self.call(
            "release_slots",
            slot=np.array([each.slot for each in rows], np.int32),
            generation=np.array([each.generation for each in rows], np.int64),
        )
        for row, each in enumerate(rows):
            # One that was given back may have been followed in its slot by a whole answer's.
            assert answer["status"][row] == FINISHED or (answer["status"][row] == STALE and not kept[row])
            each.kept = False

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.held))
        assert self.call("cancel_slots", request_id=np.array([each.request], np.int64))["status"].tolist() == [FINISHED]
        each.kept = False
        self.cancelled.append(each.request)

    @precondition(lambda self: self.cancelled)
    @rule(job=st.integers(0, len(JOBS) - 1))
    def prompt_of_a_cancelled_request(self, job: int) -> None:
        answer = self.call(
            "prefill_slots",
            request_id=np.array([self.cancelled[-1]], np.int64),
            **padded([JOBS[job][0]]),
            **columns([JOBS[job][1]]),
        )
        assert (answer["status"][0], answer["slot"][0], answer["lengths"][0]) == (CANCELLED, -1, 0)

    @precondition(lambda self: len(self.tenants()) < SLOTS)
    @rule(jobs=st.lists(st.integers(0, len(JOBS) - 1), min_size=1, max_size=6))
    def whole_answers(self, jobs: list[int]) -> None:
        prompts, rows = [JOBS[job][0] for job in jobs], [JOBS[job][1] for job in jobs]
        answer = self.call("serving_default", **padded(prompts), **columns(rows))
        made = [row[:length].tolist() for row, length in zip(answer["token_ids"], answer["lengths"], strict=True)]
        assert made == [texts()[job] for job in jobs]

    @invariant()
    def no_two_in_a_slot(self) -> None:
        assert len(self.tenants()) == len([each for each in getattr(self, "held", []) if each.kept])


def test_every_call_is_answered_as_the_contract_says(call: Call) -> None:
    machine = type("Contract", (SlotContract,), {"call": staticmethod(call)})
    limits = settings(
        max_examples=8, stateful_step_count=12, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=limits)


def test_a_cancelled_request_stays_so_when_others_are_cancelled(call: Call) -> None:
    """More than are remembered, one of them in the same place."""
    first = next(REQUESTS)

    def prompts(ids: list[int]) -> Any:
        rows = padded([[1]] * len(ids)) | columns([{}] * len(ids))
        return call("prefill_slots", request_id=np.array(ids, np.int64), **rows)["status"].tolist()

    assert prompts([first]) == [RUNNING]
    for ids in ([first], [first + 1024], [2048 + first]):
        call("cancel_slots", request_id=np.array(ids, np.int64))
    others = [10**9 + number for number in range(SLOTS)]
    assert prompts(others) == [RUNNING] * SLOTS
    call("cancel_slots", request_id=np.array(others, np.int64))


def rows_of(signature: str, count: int) -> dict[str, Any]:
    """Inputs of `signature` with `count` rows."""
    geometry = keras_model("bytes").geometry
    prompt = {"token_ids": np.full([count, 3], 7, np.int32), "lengths": np.full(count, 3, np.int32)}
    text, parameters = {"text": np.full(count, b"abc", np.object_)}, columns([{"max_new_tokens": 2}] * count)
    place = {"slot": np.zeros(count, np.int32), "generation": np.full(count, 5, np.int64)}
    asked = {"received": np.zeros(count, np.int32), "steps": np.ones(count, np.int32)}
    request = {"request_id": np.arange(count, dtype=np.int64) - 50}
    cache = {
        f"cache_{layer}_{part}": np.zeros([count, geometry.n_head, 5, geometry.head_dim], np.float32)
        for layer in range(geometry.n_layer)
        for part in ("key", "value")
    }
    step = {"token_ids": np.full(count, 7, np.int32), "lengths": np.full(count, 1, np.int32)}
    return {
        "serving_default": prompt | parameters,
        "generate_text": text | parameters,
        "tokenize": text,
        "detokenize": prompt,
        "score": prompt,
        "prefill": prompt | {"capacity": np.full(count, 4, np.int32)},
        "decode": step | cache,
        "prefill_slots": request | prompt | parameters,
        "decode_slots": place | asked,
        "release_slots": place,
        "cancel_slots": request,
    }[signature]


SIGNATURES = (
    "serving_default", "generate_text", "tokenize", "detokenize", "score", "prefill", "decode", "prefill_slots",
    "decode_slots", "release_slots", "cancel_slots",
)  # fmt: skip


@pytest.fixture(scope="module")
def graph_def(real_bundle: Path) -> Any:
    (meta_graph,) = loader_impl.parse_saved_model(str(real_bundle / "savedmodel/1")).meta_graphs
    return meta_graph.graph_def


@pytest.fixture(scope="module")
def fed(real_bundle: Path) -> Call:
    """Run a signature as a server does: without a look at the shapes that it declares."""
    session = tf.compat.v1.Session(graph=tf.Graph())
    with session.graph.as_default():
        loaded = tf.compat.v1.saved_model.load(session, ["serve"], str(real_bundle / "savedmodel/1"))

    @functools.cache
    def callable_of(signature: str) -> tuple[list[str], list[str], Any]:
        definition = loaded.signature_def[signature]
        inputs, outputs = sorted(definition.inputs), sorted(definition.outputs)
        options = CallableOptions(
            feed=[definition.inputs[name].name for name in inputs],
            fetch=[definition.outputs[name].name for name in outputs],
        )
        return inputs, outputs, session._make_callable_from_options(options)

    def run(signature: str, **inputs: Any) -> dict[str, Any]:
        names, outputs, run = callable_of(signature)
        return dict(zip(outputs, run(*[inputs[name] for name in names]), strict=True))

    return run


@pytest.mark.parametrize("signature", SIGNATURES)
def test_no_rows_are_answered_at_once(fed: Call, signature: str) -> None:
    outputs = fed(signature, **rows_of(signature, 0))
    assert all(len(value) == 0 for value in outputs.values())


@pytest.mark.parametrize("signature", SIGNATURES)
def test_a_wrong_number_of_axes_is_refused_in_a_sentence(fed: Call, signature: str) -> None:
    inputs = rows_of(signature, 2)
    fed(signature, **inputs)
    for name, value in inputs.items():
        for wrong in (value[0], value[..., None]):
            with pytest.raises(tf.errors.InvalidArgumentError) as caught:
                fed(signature, **inputs | {name: wrong})
            axes = "1 axis" if value.ndim == 1 else f"{value.ndim} axes"
            assert f"[{name} must have {axes}]" in str(caught.value)


def test_one_door_stands_before_the_slots_of_a_model(graph_def: Any) -> None:
    library = graph_def.library.function
    doors = [node for function in library for node in function.node_def if node.op == "BatchFunction"]
    assert {node.attr["num_batch_threads"].i for node in doors} == {1}
    assert len({node.attr["shared_name"].s for node in doors}) == 2, "one to the slots and one to wait"
    assert not [node for function in library for node in function.node_def if "Mutex" in node.op]
