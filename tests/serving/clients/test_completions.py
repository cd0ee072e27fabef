"""`gpt2-bundle client` before the project's own server: streams, whole answers, keys, refusals."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.cli import run
from serving.clients.completions import Completions
from serving.clients.grpc_transport import GrpcTransport
from serving.clients.rest_transport import RestTransport
from serving.clients.tf_serving import TFServingClient
from serving.entrypoints.http_app import build_app
from serving.errors import InputError, ServerError
from serving.protocols.tf_serving import rest as tf_rest
from serving.sampling import SamplingParams
from serving.server.settings import Settings
from tests.closed_form import byte_tokenizer, greedy
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running
from tests.tiny_build import Fails

KEY = "a-key-for-tests"
FEW = SamplingParams(max_new_tokens=6, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[DoubleEngine]:
    engine = DoubleEngine(queue=2)
    yield engine
    engine.close()


@pytest.fixture
def url(engine: DoubleEngine, tmp_path: Path) -> Iterator[str]:
    registry, settings = registry_of(engine, tmp_path / "tiny"), Settings(api_keys=(KEY,))
    with running(build_app(registry, settings, tf_rest.routes(registry, settings))) as address:
        yield address


def expected(prompt: str, count: int = 6) -> str:
    tokenizer = byte_tokenizer()
    return tokenizer.decode(greedy(tokenizer.encode(prompt, add_special_tokens=False).ids, count, 257))


def completions(url: str, retries: int = 0) -> Completions:
    client = TFServingClient(RestTransport(url, "tiny", api_key=KEY), retries=retries)
    return Completions(client, url, "tiny", KEY)


def test_the_command_streams_stops_and_prints_json(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    common = ["client", "generate", "A", "Bé", "--url", url, "--model", "tiny", "--api-key", KEY]
    common += ["--max-new-tokens", "6", "--ignore-eos"]
    assert run([*common, "--stream"]) == 0
    assert capfd.readouterr().out == f"{expected('A')}\n{expected('Bé')}\n"
    stop = expected("A")[3:5]
    assert run([*common, "--json", "--stop", stop]) == 0
    first, second = map(json.loads, capfd.readouterr().out.splitlines())
    assert (first["text"], first["finish_reason"]) == (expected("A")[:3], "stop")
    assert second == {"text": expected("Bé"), "tokens": 6, "finish_reason": "length"}


def test_a_key_comes_from_the_variable_and_is_named_where_it_is_missing(
    url: str, fails: Fails, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["client", "status", "--url", url, "--model", "tiny"]
    fails(arguments, 1, "UNAUTHENTICATED", "Authorization: Bearer KEY")
    fails([*arguments, "--api-key", "a\nb"], 2, "printable ASCII")
    monkeypatch.setenv("GPT2_BUNDLE_API_KEY", KEY)
    assert run(arguments) == 0 and capfd.readouterr().out == "version 1: AVAILABLE\n"


def test_a_refused_stream_and_one_that_fails_are_one_line(url: str, engine: DoubleEngine, fails: Fails) -> None:
    arguments = ["client", "generate", "A", "--url", url, "--model", "tiny", "--api-key", KEY, "--stream"]
    fails([*arguments, "--max-new-tokens", "5000"], 1, "INVALID_ARGUMENT", "context")
    engine.pace = 0.005
    pieces = completions(url).stream(["A"], SamplingParams(max_new_tokens=900, ignore_eos=True))
    next(pieces)
    engine.broken = "no logits"
    with pytest.raises(ServerError, match="internal error; the server's log has it"):
        list(pieces)


def test_many_prompts_come_in_order_and_a_full_queue_is_waited_for(url: str, engine: DoubleEngine) -> None:
    prompts = [chr(33 + index % 90) for index in range(130)]
    engine.queue = 200
    texts = [""] * len(prompts)
    for piece in completions(url).stream(prompts, FEW):
        texts[piece.index] += piece.text
    assert texts == [expected(prompt) for prompt in prompts]
    engine.queue = 2
    engine.paused.set()
    # The prompts of one call may all wait where nobody else does, however short the queue is.
    other = threading.Thread(target=lambda: list(completions(url).stream(["A"], FEW)))
    other.start()
    deadline = time.monotonic() + 10
    while not engine.stats().waiting_requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(ServerError, match="RESOURCE_EXHAUSTED"):
        list(completions(url).stream(prompts[:20], FEW))
    threading.Thread(target=lambda: (time.sleep(0.2), engine.paused.clear())).start()
    made = completions(url, retries=20).generate(prompts[:20], FEW)
    assert [each.text for each in made] == texts[:20]
    other.join(10)
    assert not other.is_alive()


def test_a_stream_that_is_left_frees_its_slot(url: str, engine: DoubleEngine) -> None:
    engine.pace = 0.005
    pieces = completions(url).stream(["A"], SamplingParams(max_new_tokens=900, ignore_eos=True))
    next(pieces)
    assert engine.stats().active_slots == 1
    pieces.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while engine.stats().active_slots:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("address", ["", "127.0.0.1", ":8500", "127.0.0.1:0", "127.0.0.1:x", "dns:///"])
def test_what_is_no_grpc_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="is not an address of a gRPC server; write it as"):
        GrpcTransport(address, "tiny")
