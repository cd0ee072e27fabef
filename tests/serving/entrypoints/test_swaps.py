"""A call of any protocol that meets a version on its way out goes to the one that took over."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.bundle import Bundle
from serving.clients.grpc_transport import GrpcTransport
from serving.engine.api import Engine, GenerationRequest, Observer
from serving.entrypoints.grpc_server import start_grpc
from serving.entrypoints.http_app import build_app
from serving.entrypoints.model_manager import ModelManager
from serving.protocols.open_inference import http as open_inference_http
from serving.protocols.tf_serving import rest as tf_rest
from serving.server.registry import ModelRegistry, ServedModel, State
from serving.server.settings import Settings
from tests.closed_form import greedy, write_bundle
from tests.serving.double_engine import DoubleEngine, bundle_of
from tests.serving.live_server import running

PROMPT = [7, 8, 9]
WANTED = greedy(PROMPT, 6, 257)
COLUMNS: dict[str, Any] = {
    "token_ids": [PROMPT, PROMPT],
    "lengths": [3, 3],
    "max_new_tokens": [6, 6],
    "temperature": [0.0, 0.0],
    "top_k": [0, 0],
    "top_p": [1.0, 1.0],
    "seed": [0, 0],
}
SCORED = {name: COLUMNS[name] for name in ("token_ids", "lengths")}
V2_TYPES = {"temperature": "FP32", "top_p": "FP32", "seed": "INT64"}
TYPES: dict[str, Any] = {"temperature": np.float32, "top_p": np.float32, "seed": np.int64}


class Interrupted(DoubleEngine):
    """Has its version swapped after a call has chosen it and before the engine has the call, `rows` rows of it in."""

    def __init__(self, observer: Observer) -> None:
        super().__init__(slots=64, queue=512, observer=observer)
        self.rows, self.then = 0, lambda: None

    def submit(self, request: GenerationRequest, listener: Any) -> Any:
        if self.rows == 0:
            then, self.then = self.then, lambda: None
            then()
        self.rows -= 1
        return super().submit(request, listener)


class Loader:
    """Opens doubles."""

    def __init__(self) -> None:
        self.engines: list[Interrupted] = []

    def estimate(self, bundle: Bundle) -> int:
        return 1

    def open(self, bundle: Bundle, observer: Observer) -> Engine:
        self.engines.append(Interrupted(observer))
        return self.engines[-1]


@dataclass
class Served:
    """A server of all protocols over a folder of versions; its calls, by name, raise unless their answer is right."""

    folder: Path
    loader: Loader
    versions: ModelManager
    url: str
    grpc: str

    def put(self, version: int) -> None:
        write_bundle(self.folder / str(version), "tiny")

    def calls(self) -> dict[str, Callable[[], None]]:
        far = GrpcTransport(self.grpc, "tiny")

        def rest(path: str, body: dict[str, Any]) -> Any:
            data = json.dumps(body).encode()
            request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read().decode()
                return text if text.startswith("data:") else json.loads(text)

        def predict(signature: str, columns: dict[str, Any]) -> Any:
            arrays = {name: np.array(value, TYPES.get(name, np.int32)) for name, value in columns.items()}
            return far.predict(signature, arrays, 30)

        completion = {"prompt": [PROMPT, PROMPT], "max_tokens": 6, "temperature": 0, "ignore_eos": True}

        def openai() -> None:
            assert rest("/v1/completions", completion)["usage"]["completion_tokens"] == 12

        def openai_stream() -> None:
            text = rest("/v1/completions", {**completion, "stream": True})
            assert text.endswith("data: [DONE]\n\n") and '"error"' not in text and text.count('"length"') == 2

        def tf_rest() -> None:
            body = {"inputs": COLUMNS}
            assert rest("/v1/models/tiny:predict", body)["outputs"]["token_ids"] == [WANTED] * 2

        def tf_rest_score() -> None:
            body = {"inputs": SCORED, "signature_name": "score"}
            assert len(rest("/v1/models/tiny:predict", body)["outputs"]["total"]) == 2

        def tf_grpc() -> None:
            assert predict("serving_default", COLUMNS)["token_ids"].tolist() == [WANTED] * 2

        def tf_grpc_score() -> None:
            assert predict("score", SCORED)["total"].shape == (2,)

        def v2_generate() -> None:
            answer = rest("/v2/models/tiny/generate", {"text_input": "A", "temperature": 0, "max_tokens": 6})
            assert answer["model_name"] == "tiny" and answer["text_output"]

        def v2_stream() -> None:
            text = rest("/v2/models/tiny/generate_stream", {"text_input": "A", "temperature": 0, "max_tokens": 6})
            assert '"error"' not in text and '"text_output"' in text

        def v2_infer() -> None:
            columns = [
                {"name": name, "shape": [2, 3] if name == "token_ids" else [2], "datatype": V2_TYPES.get(name, "INT32"),
                 "data": values}
                for name, values in COLUMNS.items()
            ]  # fmt: skip
            body = {"inputs": columns, "parameters": {"signature_name": "serving_default"}}
            outputs = {each["name"]: each["data"] for each in rest("/v2/models/tiny/infer", body)["outputs"]}
            assert outputs["token_ids"] == WANTED * 2

        made = (openai, openai_stream, tf_rest, tf_rest_score, tf_grpc, tf_grpc_score, v2_generate, v2_stream, v2_infer)
        return {call.__name__: call for call in made}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    folder, loader = tmp_path / "models", Loader()
    write_bundle(folder / "1", "tiny")
    registry, settings = ModelRegistry(), Settings()
    app = build_app(registry, settings, [*tf_rest.routes(registry, settings), *open_inference_http.routes()])
    versions = ModelManager(folder, app.state.server, loader, None, None)
    versions.start()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(20)

    server = run(start_grpc(app.state.server, "127.0.0.1", 0))
    with running(app) as url:
        yield Served(folder, loader, versions, url, f"127.0.0.1:{server.port}")
    run(server.stop(1))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    versions.close()


def test_a_call_between_two_versions_goes_to_the_new_one(served: Served) -> None:
    version = 1
    for name, call in served.calls().items():
        # Before its first row is taken, and between the first and the second, where it has two.
        for rows in (0,) if name in ("v2_generate", "v2_stream") else (0, 1):
            version += 1
            served.put(version)
            old = served.loader.engines[-1]

            def swap(old: Interrupted = old) -> None:
                served.versions.poll()
                deadline = time.monotonic() + 10
                while not old._draining and time.monotonic() < deadline:
                    time.sleep(0.001)

            old.rows, old.then = rows, swap
            call()
            assert old._draining and len(served.loader.engines) == version, (name, rows)


def test_calls_while_versions_come_and_go_are_all_answered(served: Served) -> None:
    done, failures, counts = threading.Event(), list[str](), dict[str, int]()

    def client(name: str, call: Callable[[], None]) -> None:
        while not done.wait(0.005):
            try:
                call()
            except Exception as error:
                failures.append(f"{name}: {error!r}")
            counts[name] = counts.get(name, 0) + 1

    threads = [threading.Thread(target=client, args=each) for each in served.calls().items()]
    for thread in threads:
        thread.start()
    chance, last = random.Random(6), 1
    for _ in range(24):
        if last > 1 and chance.random() < 0.4:
            shutil.rmtree(served.folder / str(last))
            last -= 1
        else:
            last += 1
            served.put(last)
        served.versions.poll()
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join(30)
    assert not failures, failures[:5]
    assert len(counts) == 9 and min(counts.values()) >= 3
    assert len(served.loader.engines) > 12, "there were few swaps"


def test_one_version_is_there_at_any_moment_of_a_swap(tmp_path: Path) -> None:
    registry, bundle = ModelRegistry(), bundle_of(tmp_path / "tiny", "tiny")
    engine: Any = None
    models = [ServedModel("tiny", version, bundle, engine, 0) for version in (1, 2)]
    for model in models:
        registry.add(model)
    registry.take_over(models[0], None)
    done = threading.Event()

    def swap() -> None:
        for turn in range(20_000):
            registry.take_over(models[1 - turn % 2], models[turn % 2])
        done.set()

    swapping = threading.Thread(target=swap)
    swapping.start()
    while not done.is_set():
        assert registry.get("tiny").state in (State.AVAILABLE, State.UNLOADING)
    swapping.join()


def test_a_model_without_versions_is_not_known(tmp_path: Path) -> None:
    registry = ModelRegistry()
    registry.add(ServedModel("tiny", 1, bundle_of(tmp_path / "tiny", "tiny"), DoubleEngine(), 0))
    registry.remove("tiny", 1)
    assert registry.names() == []
