"""The engine over slots, in this process and through the stand-in: tokens of `generate`, one end for each text."""

from __future__ import annotations

import dataclasses
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.backends.loader import load_backend
from serving.bundle import open_bundle
from serving.clients.grpc_transport import GrpcTransport
from serving.clients.rest_transport import RestTransport
from serving.clients.session_transport import load_slot_transport
from serving.clients.transport import Transport
from serving.engine.api import (
    DrainingError,
    Event,
    FinishEvent,
    GenerationRequest,
    PromptEvent,
    QueueFullError,
    RequestRecord,
    StepRecord,
    TokenEvent,
)
from serving.engine.savedmodel_engine import SignatureEngine, open_slot_engine
from serving.errors import InputError, RuntimeMissingError, ServerError
from serving.generation import generate
from serving.sampling import SamplingParams
from tests.serving.tf_serving_emulator import serving

SLOTS = 8
PATIENCE = 60.0


class Blocking:
    """A transport that can be held up, can fail, and counts its calls and their rows."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.open, self.failures = inner, threading.Event(), list[str]()
        self.open.set()
        self.nonsense: list[dict[str, Any]] = []
        self.calls: list[tuple[str, int]] = []

    def predict(self, signature: str, inputs: Any, timeout: float) -> dict[str, Any]:
        assert self.open.wait(PATIENCE)
        self.calls.append((signature, len(next(iter(inputs.values())))))
        if self.failures and signature != "release_slots":
            raise ServerError("the server went away", self.failures.pop(0))
        if self.nonsense and signature == "prefill_slots":
            return self.nonsense.pop(0)
        outputs: dict[str, Any] = self.inner.predict(signature, inputs, timeout)
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Ends:
    """A listener that keeps its events and can wait for the last."""

    def __init__(self, count: int = 1) -> None:
        self.events: list[Event] = []
        self.left, self.done, self.begun = count, threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, TokenEvent):
            self.begun.set()
        if isinstance(event, FinishEvent):
            self.left -= 1
            if not self.left:
                self.done.set()

    def wait(self) -> list[FinishEvent]:
        assert self.done.wait(PATIENCE), "the request has not ended"
        return sorted((each for each in self.events if isinstance(each, FinishEvent)), key=lambda each: each.index)

    def tokens(self, index: int = 0) -> list[int]:
        return [each.token_id for each in self.events if isinstance(each, TokenEvent) and each.index == index]

    def text(self, index: int = 0) -> str:
        return "".join(
            each.text for each in self.events if isinstance(each, TokenEvent | FinishEvent) and each.index == index
        )


class Watch:
    def __init__(self) -> None:
        self.steps: queue.SimpleQueue[StepRecord] = queue.SimpleQueue()
        self.finished: list[RequestRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.put(record)

    def on_finish(self, record: RequestRecord) -> None:
        self.finished.append(record)


@pytest.fixture(scope="module")
def in_process(real_bundle: Path) -> Transport:
    return load_slot_transport(open_bundle(real_bundle))


@pytest.fixture
def transport(in_process: Transport) -> Blocking:
    return Blocking(in_process)


@pytest.fixture
def engine(real_bundle: Path, transport: Blocking) -> Iterator[SignatureEngine]:
    made = open_slot_engine(open_bundle(real_bundle), transport, max_waiting=3, retries=1, observer=Watch())
    yield made
    transport.open.set()
    made.close()
    assert made.stats().active_slots == 0
    free = open_slot_engine(open_bundle(real_bundle), transport, max_waiting=SLOTS)
    ends = [Ends() for _ in range(SLOTS)]
    for each in ends:
        free.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=2)), each)
    assert all(each.wait() for each in ends), "slots were not given back"
    free.close()


def test_more_slots_than_were_exported_are_refused(transport: Blocking, real_bundle: Path) -> None:
    bundle = open_bundle(real_bundle)
    provenance = dataclasses.replace(bundle.manifest.provenance, recipe={"export": {"slots": SLOTS}})
    bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, provenance=provenance))
    with pytest.raises(InputError, match="9 slots were asked for, and the model was exported with 8; ask for fewer"):
        open_slot_engine(bundle, transport, slots=SLOTS + 1)


def mixed() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            tuple(range(number + 1, 2 * number + 3)),
            SamplingParams(max_new_tokens=4 + 3 * number, temperature=number % 2, top_k=number, seed=number),
        )
        for number in range(12)
    ]


def reference(bundle: Path, requests: list[GenerationRequest]) -> list[list[int]]:
    opened = open_bundle(bundle)
    backend = load_backend(opened, "onnx")
    end = opened.manifest.model.eos_token_id
    return [list(generate(backend, [each.prompt], each.params, end)[0].token_ids) for each in requests]


def check_tokens(engine: SignatureEngine, bundle: Path) -> None:
    requests = mixed()
    ends = [Ends() for _ in requests]
    for request, listener in zip(requests, ends, strict=True):
        engine.submit(request, listener)
    for listener in ends:
        (finish,) = listener.wait()
        assert isinstance(listener.events[0], PromptEvent) and listener.events[-1] is finish
        assert finish.reason == ("length" if finish.stopped_by is None else "stop")
        ids = listener.tokens()
        assert listener.text() == engine.tokenizer.decode(ids, skip_special_tokens=True)
    assert [listener.tokens() for listener in ends] == reference(bundle, requests)


def test_in_process(real_bundle: Path, transport: Blocking) -> None:
    watch = Watch()
    engine = open_slot_engine(open_bundle(real_bundle), transport, observer=watch)
    check_tokens(engine, real_bundle)
    engine.close()
    steps = [watch.steps.get() for _ in range(watch.steps.qsize())]
    total = sum(record.generated_tokens for record in watch.finished)
    stats = engine.stats()
    assert stats.generated_tokens == total and stats.prompt_tokens == sum(len(each.prompt) for each in mixed())
    assert sum(len(step.inter_token) for step in steps) == total - len(watch.finished)
    # Streams share calls: one a step, whatever their number.
    decodes = [rows for signature, rows in transport.calls if signature == "decode_slots"]
    assert max(decodes) == SLOTS and len(decodes) == stats.steps < total / 2
    assert all(
        each.arrived <= (each.scheduled or 0) <= (each.first_token or 0) <= each.finished for each in watch.finished
    )


def test_through_the_stand_in(real_bundle: Path) -> None:
    with serving(real_bundle / "savedmodel/1", "bytes") as server:
        server.pad = 1
        for far in (RestTransport(server.url, "bytes"), GrpcTransport(server.address, "bytes")):
            engine = open_slot_engine(open_bundle(real_bundle), far, steps=3)
            server.lost = ["UNAVAILABLE", 0.0, "UNAVAILABLE"]
            check_tokens(engine, real_bundle)
            assert not server.lost
            engine.close()


def test_continuations_have_seeds_of_their_own(engine: SignatureEngine, real_bundle: Path) -> None:
    params = SamplingParams(max_new_tokens=6, temperature=1.0, seed=2**63 - 1)
    listener = Ends(3)
    request = GenerationRequest((5, 6), params, n=3)
    engine.submit(request, listener)
    listener.wait()
    alone = [
        GenerationRequest((5, 6), SamplingParams(max_new_tokens=6, temperature=1.0, seed=s)) for s in (2**63 - 1, 0, 1)
    ]
    assert [listener.tokens(index) for index in range(3)] == reference(real_bundle, alone)
    assert sum(isinstance(event, PromptEvent) for event in listener.events) == 1


def test_stop_texts_and_token_ids(engine: SignatureEngine, real_bundle: Path) -> None:
    (ids,) = reference(real_bundle, [GenerationRequest((1, 2), SamplingParams(max_new_tokens=12))])
    text = engine.tokenizer.decode(ids)
    listener = Ends()
    engine.submit(GenerationRequest((1, 2), SamplingParams(max_new_tokens=12, stop=(text[3:5], "no such"))), listener)
    (finish,) = listener.wait()
    assert (finish.reason, finish.stopped_by, listener.text()) == ("stop", text[3:5], text[: text.index(text[3:5])])
    listener = Ends()
    engine.submit(GenerationRequest((1, 2), SamplingParams(max_new_tokens=12, stop_token_ids=(ids[5],))), listener)
    (finish,) = listener.wait()
    assert (finish.reason, finish.stopped_by) == ("stop", ids[5])
    assert listener.tokens() == ids[: ids.index(ids[5]) + 1]


def test_cancelling_and_timeouts(engine: SignatureEngine, transport: Blocking) -> None:
    transport.open.clear()
    running, late, waiting = Ends(2), Ends(), Ends()
    handle = engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=40), n=2), running)
    engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=40), timeout=0.01), late)
    queued = engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=40)), waiting)
    queued.cancel()
    handle.cancel()
    handle.cancel()
    threading.Timer(0.05, transport.open.set).start()
    assert [finish.reason for finish in running.wait()] == ["cancelled"] * 2
    assert [finish.reason for finish in waiting.wait()] == ["cancelled"]
    (finish,) = late.wait()
    assert finish.reason == "timeout" and "0.01 s" in finish.message
    assert len(running.tokens()) < 40


def test_a_failing_server_ends_texts_with_its_words_and_not_the_engine(
    engine: SignatureEngine, transport: Blocking
) -> None:
    first = Ends()
    transport.failures = ["UNAVAILABLE"]
    engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=3)), first)
    assert first.wait()[0].reason in ("length", "stop"), "the second try succeeds"
    second = Ends()
    transport.failures = ["UNAVAILABLE"] * 2
    engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=3)), second)
    (finish,) = second.wait()
    assert finish.reason == "error" and "the server went away" in finish.message
    nonsense = Ends(2)
    transport.nonsense = [{"logits": 1}]
    engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=3), n=2), nonsense)
    assert [finish.reason for finish in nonsense.wait()] == ["error"] * 2
    assert "internal error: KeyError" in nonsense.wait()[0].message
    third = Ends()
    engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=3)), third)
    assert third.wait()[0].reason in ("length", "stop")


def test_a_prompt_that_the_server_refuses_ends_alone(
    engine: SignatureEngine, transport: Blocking, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = transport.inner.predict

    def refuses(signature: str, inputs: Any, timeout: float) -> dict[str, Any]:
        if signature == "prefill_slots" and (np.asarray(inputs["token_ids"]) == 200).any():
            raise ServerError("there is something about token 200", "INVALID_ARGUMENT")
        outputs: dict[str, Any] = original(signature, inputs, timeout)
        return outputs

    monkeypatch.setattr(transport.inner, "predict", refuses)
    transport.open.clear()
    listeners = [Ends() for _ in range(3)]
    for prompt, listener in zip((1, 200, 3), listeners, strict=True):
        engine.submit(GenerationRequest((prompt,), SamplingParams(max_new_tokens=3, ignore_eos=True)), listener)
    transport.open.set()
    ends = [listener.wait()[0] for listener in listeners]
    assert [end.reason for end in ends] == ["length", "error", "length"]
    assert "something about token 200" in ends[1].message
    assert max(rows for signature, rows in transport.calls if signature == "prefill_slots") > 1


def test_a_slot_that_is_lost(engine: SignatureEngine, transport: Blocking, monkeypatch: pytest.MonkeyPatch) -> None:
    original = transport.inner.predict

    def forgets(signature: str, inputs: Any, timeout: float) -> dict[str, Any]:
        if signature == "decode_slots":
            original("release_slots", {name: inputs[name] for name in ("slot", "generation")}, timeout)
        outputs: dict[str, Any] = original(signature, inputs, timeout)
        return outputs

    monkeypatch.setattr(transport.inner, "predict", forgets)
    listener = Ends()
    engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=9)), listener)
    (finish,) = listener.wait()
    assert finish.reason == "error" and "no longer has" in finish.message and len(listener.tokens()) == 1


def test_what_is_refused(engine: SignatureEngine, transport: Blocking) -> None:
    def refuse(sentence: str, **request: Any) -> None:
        given = {"prompt": (1,), "params": SamplingParams()} | request
        with pytest.raises(InputError, match=sentence):
            engine.submit(GenerationRequest(**given), Ends())

    refuse("logprobs is not done", logprobs=0)
    refuse("min_p is not done", params=SamplingParams(min_p=0.5))
    refuse("min_tokens is not done", params=SamplingParams(min_tokens=2))
    refuse("ignore_eos needs", params=SamplingParams(temperature=1, ignore_eos=True))
    refuse("n is 9, but there are 8 slots", n=9)
    refuse("48 tokens; it must have from 1 to 47", prompt=tuple(range(48)))
    refuse("outside the vocabulary", prompt=(engine.vocab_size,))
    assert {"logprobs", "min_p", "logit_bias"} <= engine.unsupported

    transport.open.clear()
    ends = [Ends() for _ in range(4)]
    engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=2)), ends[0])
    with pytest.raises(QueueFullError) as caught:
        for listener in ends[1:]:
            engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=2)), listener)
    assert caught.value.retry_after >= 1 and engine.stats().waiting_requests == 3
    transport.open.set()
    assert all(listener.wait() for listener in ends[:3])


def test_a_process_without_tensorflow(real_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "serving.backends.tensorflow", None)
    with pytest.raises(RuntimeMissingError, match=r"gpt2-bundle\[tensorflow\]"):
        load_slot_transport(open_bundle(real_bundle))


def test_the_transport_in_process_speaks_as_a_server(in_process: Transport, real_bundle: Path) -> None:
    with pytest.raises(ServerError, match=r"INVALID_ARGUMENT: .*slot must be from 0 to 7") as caught:
        in_process.predict("release_slots", {"slot": [9], "generation": [1]}, 10.0)
    assert caught.value.code == "INVALID_ARGUMENT"
    with pytest.raises(ServerError) as caught:
        long = {"token_ids": [[7] * 40] * 500, "lengths": [40] * 500}
        in_process.predict("score", long, 0.001)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    with pytest.raises(InputError, match="has no signature 'scores'"):
        in_process.predict("scores", {}, 10.0)
    with pytest.raises(InputError, match="score takes lengths, token_ids"):
        in_process.predict("score", {"text": ["a"]}, 10.0)
    assert in_process.metadata(1.0)["release_slots"]["inputs"]["generation"] == {"dtype": "DT_INT64", "shape": [-1]}
    assert in_process.status(1.0)[0]["state"] == "AVAILABLE"


def test_draining_and_closing(engine: SignatureEngine, transport: Blocking) -> None:
    first, second = Ends(), Ends()
    engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=5)), first)
    assert engine.drain(PATIENCE) and first.done.is_set()
    with pytest.raises(DrainingError):
        engine.submit(GenerationRequest((1,), SamplingParams()), second)


def test_draining_ends_what_takes_too_long(engine: SignatureEngine, transport: Blocking) -> None:
    transport.open.clear()
    listener = Ends()
    engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=40)), listener)
    threading.Timer(0.1, transport.open.set).start()
    assert engine.drain(0.01) is False
    assert listener.wait()[0].reason == "timeout"


def test_a_closed_engine_has_ended_everything(engine: SignatureEngine) -> None:
    listener = Ends()
    engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=46, temperature=1.0)), listener)
    engine.close()
    engine.close()
    assert listener.done.is_set() and listener.wait()[0].reason == "cancelled"
