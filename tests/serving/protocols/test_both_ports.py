"""HTTP and gRPC are two doors of one server: who comes by both is one caller, and the same limits hold behind both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import pytest

from serving.clients.grpc_transport import GrpcTransport
from serving.clients.tf_serving import TFServingClient
from serving.errors import ServerError
from serving.protobuf.tf_serving import MODEL_SERVICE
from serving.server.grpc_middleware import client_of
from serving.server.middleware import caller_address
from serving.server.settings import Settings
from serving.server.state import Server
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.protocols.open_inference.double_server import serving_both

KEYS = ("first-key", "second-key")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    engine = DoubleEngine()
    yield Server(registry_of(engine, tmp_path / "tiny"), Settings())
    engine.close()


@pytest.mark.parametrize("keys", [(), KEYS])
def test_who_comes_by_both_is_one_caller(server: Server, keys: tuple[str, ...]) -> None:
    limited = Server(server.registry, replace(server.settings, rate_limit=2, api_keys=keys))
    with serving_both(limited) as (url, address), grpc.insecure_channel(address) as channel:

        def by_http(key: str) -> int:
            return httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        def by_grpc(key: str) -> str:
            ask = channel.unary_unary(f"/{MODEL_SERVICE}/GetModelStatus")
            try:
                ask(b"\x0a\x06\x0a\x04tiny", metadata=[("authorization", f"Bearer {key}")], timeout=10)
            except grpc.RpcError as error:
                return str(error.code().name)
            return "OK"

        assert (by_http(KEYS[0]), by_grpc(KEYS[0])) == (200, "OK")
        assert (by_http(KEYS[0]), by_grpc(KEYS[0])) == (429, "RESOURCE_EXHAUSTED")
        assert by_grpc(KEYS[1]) == ("OK" if keys else "RESOURCE_EXHAUSTED")


def test_a_callers_address_is_written_alike() -> None:
    class Context:
        def __init__(self, peer: str) -> None:
            self.peer = lambda: peer

    for by_http, by_grpc, same in (
        ("127.0.0.1", "ipv4:127.0.0.1:59022", "127.0.0.1"),
        ("::ffff:10.0.0.7", "ipv4:10.0.0.7:1", "10.0.0.7"),
        ("::1", "ipv6:%5B::1%5D:51402", "::1"),
    ):
        assert caller_address({"client": (by_http, 5)}) == client_of(Context(by_grpc)) == same
    assert caller_address({}) == ""


def test_the_limit_of_a_prompt_holds_by_every_protocol(server: Server) -> None:
    limited = Server(server.registry, replace(server.settings, max_prompt_tokens=3))
    with serving_both(limited) as (url, address):

        def refused(path: str, body: dict[str, Any]) -> bool:
            answer = httpx.post(url + path, json=body)
            assert answer.status_code == 200 or (answer.status_code == 400 and "at most 3" in answer.text), answer.text
            return answer.status_code == 400

        for prompt in ("abc", "abcd"):
            long = len(prompt) > 3
            ids, few = list(prompt.encode()), {"max_tokens": 1}
            assert refused("/v1/completions", {"prompt": prompt, **few}) == long
            assert refused("/v2/models/tiny/generate", {"text_input": prompt, **few}) == long
            row = {"max_new_tokens": 1, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
            tokens = {"token_ids": [*ids, 0], "lengths": len(ids)}  # Padding does not count.
            for name, inputs in (
                ("serving_default", {**tokens, **row}),
                ("generate_text", {"text": prompt, **row}),
                ("score", tokens),
            ):
                body = {"signature_name": name, "instances": [inputs]}
                assert refused("/v1/models/tiny:predict", body) == long
            tensor = {"name": "token_ids", "datatype": "INT32", "shape": [1, len(ids)], "data": ids}
            lengths = {"name": "lengths", "datatype": "INT32", "shape": [1], "data": [len(ids)]}
            body = {"inputs": [tensor, lengths], "parameters": {"signature_name": "score"}}
            assert refused("/v2/models/tiny/infer", body) == long
            assert not refused("/v1/models/tiny:predict", {"signature_name": "tokenize", "instances": [prompt]})
            score = {"token_ids": [ids], "lengths": [len(ids)]}
            with pytest.raises(ServerError, match="at most 3") if long else contextlib.nullcontext():
                TFServingClient(GrpcTransport(address, "tiny")).predict(score, signature="score")
