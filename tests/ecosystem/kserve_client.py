"""Asks a server by KServe's clients and prints their answers: python kserve_client.py URL GRPC MODEL."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

PROMPT, TOKENS = "ab cd", 6
ROW = {"text": PROMPT, "max_new_tokens": TOKENS, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}


def request(model: str, binary: bool, tokens: int = TOKENS, outputs: tuple[str, ...] = ()) -> InferRequest:
    """A greedy request by tensors: KServe's client has no floating-point parameters by gRPC."""
    values = {
        "text_input": (np.array([PROMPT.encode()], object), "BYTES"),
        "max_tokens": (np.array([tokens], np.int32), "INT32"),
        "temperature": (np.array([0], np.float32), "FP32"),
    }
    inputs = []
    for name, (value, kind) in values.items():
        inputs.append(InferInput(name, [1], kind))
        inputs[-1].set_data_from_numpy(value, binary_data=binary)
    asked = [RequestedOutput(name, {"binary_data": binary}) for name in outputs]
    return InferRequest(model, inputs, request_id="own", request_outputs=asked or None)


def plain(response: Any) -> list[Any]:
    """The id and the outputs, texts as str."""
    texts = {each.name: each.as_numpy().tolist() for each in response.outputs}
    decoded = {name: [v.decode() if isinstance(v, bytes) else v for v in values] for name, values in texts.items()}
    return [response.model_name, response.id, decoded]


async def error_of(call: Any) -> list[Any]:
    """The status and the sentence of the client's own error; [] without one."""
    try:
        await call
    except httpx.HTTPStatusError as error:
        return [error.response.status_code, str(error)]
    except grpc.aio.AioRpcError as error:
        return [error.code().name, error.details()]
    return []


async def by_v1(url: str, model: str) -> object:
    client = InferenceRESTClient(RESTConfig(protocol="v1", retries=1, timeout=30))
    answer = await client.infer(url, {"signature_name": "generate_text", "instances": [ROW]}, model_name=model)
    return {
        "ready": [await client.is_server_live(url), await client.is_model_ready(url, model)],
        "answer": answer["predictions"],
        "wrong": await error_of(client.infer(url, {"instances": [{"x": 1}]}, model_name=model)),
        "unknown": await error_of(client.is_model_ready(url, "none")),
    }


async def by_v2(url: str, model: str) -> object:
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=1, timeout=30))

    async def infer(binary: bool, **more: Any) -> Any:
        return plain(await client.infer(url, request(model, binary, **more), model_name=model))

    ready = [await client.is_server_live(url), await client.is_server_ready(url)]
    return {
        "ready": [*ready, await client.is_model_ready(url, model), not await client.is_model_ready(url, "none")],
        "answers": [await infer(False), await infer(True)],
        "chosen": [await infer(binary, outputs=("text_output", "lengths")) for binary in (False, True)],
        "overflow": await error_of(infer(False, tokens=100_000)),
        "unknown": await error_of(client.infer(url, request("none", False), model_name="none")),
    }


async def by_grpc(address: str, model: str) -> object:
    async with InferenceGRPCClient(address, retries=0) as client:

        async def infer(binary: bool, **more: Any) -> Any:
            return plain(await client.infer(request(model, binary, **more)))

        ready = [await client.is_server_live(), await client.is_server_ready(), await client.is_model_ready(model)]
        return {
            "ready": ready,
            "answers": [await infer(False), await infer(True)],
            "chosen": [await infer(binary, outputs=("text_output", "lengths")) for binary in (False, True)],
            "overflow": await error_of(infer(True, tokens=100_000)),
            "unknown": await error_of(client.is_model_ready("none")),
        }


async def main(url: str, address: str, model: str) -> None:
    answers = {"v1": await by_v1(url, model), "v2": await by_v2(url, model), "grpc": await by_grpc(address, model)}
    print(json.dumps(answers))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
