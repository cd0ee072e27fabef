"""Targets: the same tokens however they run, and what is said where a server misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import pytest

from benchmarks.common.own_server import OwnServer
from benchmarks.suite.driver import play
from benchmarks.suite.load.clock import WallClock
from benchmarks.suite.load.events import differing, outputs_hash
from benchmarks.suite.load.schedule import Lengths, Planner
from benchmarks.suite.selfcheck.fake_server import FakeServer
from benchmarks.suite.targets.base import TargetError, share
from benchmarks.suite.targets.in_process import BatchTarget, EngineTarget
from benchmarks.suite.targets.open import open_target
from benchmarks.suite.targets.openai import OpenAITarget
from serving.backends.loader import load_backend
from serving.bundle import open_bundle
from serving.clients.session_transport import SessionTransport
from serving.engine.savedmodel_engine import open_slot_engine
from serving.errors import InputError, ServerError
from serving.generation import generate
from serving.sampling import SamplingParams
from tests.closed_form import ClosedFormBackend
from tests.serving.backends.test_prefill_graph import proof, write_pair
from tests.serving.raw_server import read_request


async def _play(schedule, target):
    await target.start()
    try:
        return await play(schedule, target, WallClock(), 60)
    finally:
        await target.stop()


def drive(schedule, target):
    return asyncio.run(_play(schedule, target))


def batch_target(backend, most=4):
    return BatchTarget("b", "closed form", "fp32", lambda: backend, most)


def test_a_batch_gives_the_tokens_of_generate_and_the_moment_of_each():
    backend = ClosedFormBackend()
    schedule = Planner(range(1, 10), backend.n_positions).offline(6, Lengths(2, 3, "uniform"), Lengths(2, 4, "uniform"))
    for response in drive(schedule, batch_target(backend)):
        request = schedule.requests[response.index]
        expected = generate(
            backend, [request.prompt], SamplingParams(max_new_tokens=request.new_tokens, ignore_eos=True), -1
        )
        assert response.tokens == expected[0].token_ids and response.error is None
        assert list(response.token_times) == sorted(response.token_times)
        assert response.sent <= response.started <= response.token_times[0]
        assert response.finished == response.token_times[-1]


def test_a_batch_is_no_larger_than_it_may_be():
    sizes = []

    class Counting(ClosedFormBackend):
        def prefill(self, prompts, capacity):
            sizes.append(len(prompts))
            return super().prefill(prompts, capacity)

    schedule = Planner(range(1, 10), Counting().n_positions).offline(9, Lengths(2, 2), Lengths(2, 2))
    drive(schedule, batch_target(Counting(), most=4))
    assert sum(sizes) == 9 and max(sizes) <= 4


def test_a_failure_of_the_runtime_is_the_requests_own():
    class Broken(ClosedFormBackend):
        def prefill(self, prompts, capacity):
            raise MemoryError("no room")

    schedule = Planner(range(1, 10), Broken().n_positions).single(2, Lengths(2, 2), Lengths(2, 2))
    assert [each.error for each in drive(schedule, batch_target(Broken()))] == ["MemoryError: no room"] * 2


def test_every_way_to_run_a_bundle_gives_the_same_tokens(real_bundle):
    bundle = open_bundle(real_bundle, check="sizes")
    schedule = Planner(range(1, 90), bundle.manifest.model.n_positions).concurrency(
        2, 4, Lengths(3, 5, "uniform"), Lengths(4, 4)
    )
    onnx = BatchTarget("ort/fp32", "ONNX Runtime", "fp32", lambda: load_backend(bundle, "onnx"), 4)
    slots = EngineTarget("slots", "slots", "fp32", lambda: open_slot_engine(bundle, SessionTransport(bundle)))
    left, right = drive(schedule, onnx), drive(schedule, slots)
    assert [each.error for each in [*left, *right]] == [None] * 8
    assert differing(left, right) == [] and outputs_hash(left) == outputs_hash(right)


def test_the_engine_and_our_own_server_give_the_same_text(real_bundle):
    bundle = open_bundle(real_bundle, check="sizes")
    schedule = Planner(range(1, 90), bundle.manifest.model.n_positions).concurrency(2, 4, Lengths(3, 5), Lengths(4, 4))
    plain, engine, server = (
        drive(schedule, open_target(bundle, name, batch=4))
        for name in ("ort/fp32", "engine=ort/fp32", "server=ort/fp32")
    )
    assert [each.error for each in [*engine, *server]] == [None] * 8
    assert differing(plain, engine) == [] and [each.text for each in server] == [each.text for each in engine]
    assert [each.tokens for each in server] == [each.tokens for each in plain] and all(each.counted for each in server)


def test_a_server_that_does_not_start_says_why(real_bundle):
    with pytest.raises(ServerError, match=r"ended before it was ready: error: .*no graph 'ort/none'"):
        OwnServer(real_bundle, "ort/none")


@contextlib.contextmanager
def fake(first=0.0, step=0.0):
    server = FakeServer(first, step)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_stream_is_read_token_by_token():
    schedule = Planner(range(1, 10), 48).concurrency(2, 4, Lengths(3, 3), Lengths(5, 5))
    with fake(step=0.02) as url:
        found = drive(schedule, OpenAITarget("fake", url))
    for response in found:
        # A client that is held up by others may find two tokens at once, but not all of them.
        assert response.error is None and response.counted and len(set(response.token_times)) > 1
        prompt = schedule.requests[response.index].prompt
        assert response.text == "".join(f" {prompt[index % 3]}" for index in range(5))


def test_tokens_that_came_together_share_moments():
    assert share([1.0, 2.0], 5, 9.0) == [1.0, 1.0, 1.0, 2.0, 2.0]
    assert share([1.0, 2.0, 3.0], 2, 9.0) == [1.0, 2.0]
    assert share([], 2, 9.0) == [9.0, 9.0]


@contextlib.contextmanager
def answering(data):
    """A server that reads some bytes, sends `data` and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as connection:
                        read_request(connection)
                        connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull", "HTTP 503: full"),
        (b"gibberish\r\n\r\n", "not HTTP"),
        (CHUNKED + b"5\r\ndata:\r\n", "not HTTP"),
        (CHUNKED + b"9\r\ndata: x\n\n\r\n0\r\n\r\n", "not JSON"),
        (CHUNKED + b'16\r\ndata: {"error":"no"}\n\n\r\n', '"no"'),
    ],
)
def test_a_server_that_misbehaves_fails_the_request_in_one_line(data, words):
    request = Planner(range(1, 10), 48).single(1, Lengths(3, 3), Lengths(5, 5)).requests[0]

    async def work(url):
        with pytest.raises(TargetError, match=words) as caught:
            await OpenAITarget("t", url, model="m").send(request)
        assert "\n" not in str(caught.value)

    with answering(data) as url:
        asyncio.run(work(url))


def test_a_server_that_is_not_there_is_said_at_the_start():
    with pytest.raises(ServerError, match="no connection"):
        asyncio.run(OpenAITarget("t", "http://127.0.0.1:1").start())
    with pytest.raises(InputError, match="http://HOST:PORT"):
        OpenAITarget("t", "ftp://a")


def test_a_target_says_which_graph_prefills(tmp_path):
    bundle = write_pair(tmp_path / "pair", ("int8", "int4"), ("int8", "int4"), proof("verified"))
    labels = {
        name: open_target(bundle, name, batch=2).label
        for kind in ("", "engine=", "server=")
        for name in (f"{kind}ort/int4", f"{kind}ort/int4+same", f"{kind}ort/int8")
    }
    assert {name for name, label in labels.items() if ", prefill by ort/int8" in label} == {
        "ort/int4", "engine=ort/int4", "server=ort/int4"
    }  # fmt: skip
    target = open_target(bundle, "ort/int4+same", batch=2)
    assert target.name == "ort/int4+same" and target.precision == "int4"
    for name, words in [
        ("ort/int4+", "names no prefill graph after the"),
        ("engine=ort/int4+ort/int9", "no graph 'ort/int9'"),
        ("server=ort/int8+ort/int4", "the certificate does not prove 'ort/int4'"),
        ("ort/int9+same", "no target 'ort/int9"),
    ]:
        with pytest.raises(InputError, match=words):
            open_target(bundle, name, batch=2)
