"""The same prompt and seed give the same tokens by every protocol."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from serving.bundle import open_bundle
from serving.clients.grpc_transport import GrpcTransport
from serving.clients.rest_transport import RestTransport
from serving.clients.tf_serving import TFServingClient
from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine
from serving.entrypoints.engine_loader import EngineLoader
from serving.server.registry import ModelRegistry, ServedModel, State
from serving.server.state import Server
from tests.closed_form import ClosedFormSlotBackend, byte_tokenizer, write_bundle
from tests.serving.protocols.open_inference.double_server import serving_both
from tests.serving.protocols.open_inference.test_infer import objects, tensors

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TEXT = "def ☃("
TOKENS = byte_tokenizer().encode(TEXT).ids
SEED = 2**40 + 299
COUNT = 12


def closed_form(folder: Path) -> tuple[Any, Any]:
    write_bundle(folder)
    engine = SlotEngine(ClosedFormSlotBackend(max_length=64), byte_tokenizer(), 256, EngineConfig(slots=4))
    return open_bundle(folder), engine


@pytest.fixture(params=["closed-form", "onnx"])
def addresses(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    if request.param == "closed-form":
        bundle, engine = closed_form(tmp_path / "tiny")
    else:
        bundle = open_bundle(request.getfixturevalue("real_bundle"))
        engine = EngineLoader(config=EngineConfig(slots=4, threads=1)).open(bundle, None)  # type: ignore[arg-type]
    registry = ModelRegistry()
    registry.add(ServedModel("tiny", 1, bundle, engine, 0, State.AVAILABLE))
    with serving_both(Server(registry)) as both:
        yield both
    engine.close()


def test_tokens_are_equal_by_every_protocol(addresses: tuple[str, str]) -> None:
    url, address = addresses
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": SEED, "max_tokens": COUNT}
    texts: dict[str, str] = {}
    ids: dict[str, list[int]] = {}
    with httpx.Client(base_url=url) as web:
        answer = web.post("/v1/completions", json={"model": "tiny", "prompt": TEXT, **options}).json()
        texts["openai"] = answer["choices"][0]["text"]
        made = web.post("/v2/models/tiny/generate", json={"text_input": TEXT, "parameters": options}).json()
        texts["generate"], ids["generate"] = made["text_output"], made["token_ids"]
        body = web.post("/v2/models/tiny/generate_stream", json={"text_input": TEXT, **options}).text
        events = [json.loads(event.removeprefix("data: ")) for event in body.split("\n\n")[:-1]]
        texts["generate_stream"] = "".join(event["text_output"] for event in events)
        ids["generate_stream"] = [token for event in events for token in event["token_ids"]]
    columns: dict[str, Any] = {"token_ids": np.array([TOKENS], np.int32), "lengths": np.array([len(TOKENS)], np.int32)}
    columns |= {"max_new_tokens": np.array([COUNT], np.int32), "temperature": np.array([0.8], np.float32)}
    columns |= {"top_k": np.array([50], np.int32), "top_p": np.array([0.95], np.float32), "seed": np.array([SEED])}
    for name, transport in (
        ("tf rest", RestTransport(url, "tiny", "row")),
        ("tf grpc", GrpcTransport(address, "tiny")),
    ):
        got = TFServingClient(transport).predict(columns)
        ids[name] = got["token_ids"][0, : got["lengths"][0]].tolist()
    asked: dict[str, Any] = {"text_input": objects(TEXT), "seed": np.array([SEED]), "top_k": np.array([50], np.int32)}
    asked |= {"max_tokens": np.array([COUNT], np.int32), "temperature": np.array([0.8], np.float32)}
    asked |= {"top_p": np.array([0.95], np.float32)}
    for kind, at in ((triton_http, url.removeprefix("http://")), (triton_grpc, address)):
        with kind.InferenceServerClient(at) as client:
            made = client.infer("tiny", tensors(kind, asked))
            texts[kind.__name__] = made.as_numpy("text_output")[0].decode()
            ids[kind.__name__] = made.as_numpy("token_ids")[0].tolist()
            parameters = {"signature_name": "serving_default"}
            got = client.infer("tiny", tensors(kind, columns), parameters=parameters)
            ids[f"{kind.__name__}, tokens"] = got.as_numpy("token_ids")[0, : got.as_numpy("lengths")[0]].tolist()
    came: queue.Queue[Any] = queue.Queue()
    with triton_grpc.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: came.put((result, error)))
        client.async_stream_infer("tiny", tensors(triton_grpc, asked))
        final, ids["stream"], texts["stream"] = False, [], ""
        while not final:
            result, error = came.get(timeout=20)
            assert error is None
            final = result.get_response().parameters["triton_final_response"].bool_param
            ids["stream"] += result.as_numpy("token_ids")[0].tolist()
            texts["stream"] += result.as_numpy("text_output")[0].decode()
        client.stop_stream()
    assert len(ids) == 9 and len(texts) == 6
    assert len(ids["generate"]) > 4
    assert all(tokens == ids["generate"] for tokens in ids.values()), ids
    assert set(texts.values()) == {byte_tokenizer().decode(ids["generate"])}
