"""Servers of the Open Inference Protocol by gRPC: a text in pieces by ModelStreamInfer, as Triton's clients ask."""

from __future__ import annotations

import struct
import time
from typing import Any

from benchmarks.suite.load.schedule import Planned
from benchmarks.suite.targets.base import Completion, Pieces, Target, TargetError
from benchmarks.suite.targets.generate import sent_text
from benchmarks.suite.targets.http import shorten
from serving.bundle import Bundle
from serving.errors import GPT2BundleError, RuntimeMissingError, ServerError
from serving.sampling.detokenizer import load_tokenizer

_ASK_SECONDS = 30.0


class OpenInferenceGrpcTarget(Target):
    """`address` is such as 127.0.0.1:8001; the names of tensors and parameters are those of the generate extension.

    One connection for all requests, a stream for each. Tokens are counted as `GenerateTarget` does.

    Args:
        model: its name at the server.
        about: `precision`, `emulator` and `process` of `Target`.
    """

    def __init__(self, name: str, server: str, address: str, bundle: Bundle, *, model: str, **about: Any) -> None:
        super().__init__(name, f"{server} at {address}, by ModelStreamInfer", **about)
        self._address, self._bundle, self._model = address, bundle, model
        self._channel: Any = None

    async def start(self) -> None:
        try:
            import grpc

            from serving.protobuf.open_inference import INFERENCE_SERVICE, MESSAGES
        except ImportError as error:
            raise RuntimeMissingError(
                f"gRPC needs {error.name}, which is not installed; pip install 'gpt2-bundle[client]'"
            ) from None
        self._grpc, self._messages, self._tokenizer = grpc, MESSAGES, load_tokenizer(self._bundle)
        self._channel = grpc.aio.insecure_channel(self._address, [("grpc.max_receive_message_length", -1)])
        self._stream = self._channel.stream_stream(
            f"/{INFERENCE_SERVICE}/ModelStreamInfer",
            request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelStreamInferResponse"].FromString,
        )
        ready = self._channel.unary_unary(
            f"/{INFERENCE_SERVICE}/ModelReady",
            request_serializer=MESSAGES["ModelReadyRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelReadyResponse"].FromString,
        )
        try:
            answer = await ready(MESSAGES["ModelReadyRequest"](name=self._model), timeout=_ASK_SECONDS)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            raise ServerError(f"{self.name}: {code}: {shorten(error.details() or '')}", code) from None
        if not answer.ready:
            raise ServerError(f"{self.name}: the model {self._model} is not ready", "UNAVAILABLE")

    async def send(self, request: Planned) -> Completion:
        if self._channel is None:
            raise TargetError(f"{self.name} is not started")
        try:
            return await self._send(request)
        except self._grpc.aio.AioRpcError as error:
            raise TargetError(f"{error.code().name}: {shorten(error.details() or '')}") from None
        except GPT2BundleError as error:
            raise TargetError(str(error)) from None

    async def stop(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _send(self, request: Planned) -> Completion:
        pieces, reason = Pieces(), None
        call = self._stream()
        await call.write(self._request(request))
        await call.done_writing()
        async for response in call:
            timestamp = time.monotonic()
            if response.error_message:
                raise TargetError(shorten(response.error_message))
            outputs = _outputs(response.infer_response)
            text = b"".join(outputs.get("text_output", ())).decode("utf-8", "replace")
            number = int(outputs["lengths"].sum()) if "lengths" in outputs else None
            reason = b"".join(outputs.get("finish_reason", ())).decode() or reason
            tokens = outputs["token_ids"].reshape(-1).tolist() if "token_ids" in outputs else []
            pieces.add(timestamp, text, number, tokens)
        return pieces.completion(reason, request.new_tokens, time.monotonic())

    def _request(self, request: Planned) -> Any:
        message = self._messages["ModelInferRequest"](model_name=self._model)
        text = sent_text(self._tokenizer, request).encode("utf-8")
        message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        message.raw_input_contents.append(struct.pack("<I", len(text)) + text)
        message.parameters["max_tokens"].int64_param = request.new_tokens
        message.parameters["temperature"].double_param = 0.0
        for name in ("ignore_eos", "stream"):
            message.parameters[name].bool_param = True
        return message


def _outputs(response: Any) -> dict[str, Any]:
    """The outputs that came as raw bytes, as arrays by name."""
    from serving.protocols.open_inference.tensors import from_raw

    pairs = zip(response.outputs, response.raw_output_contents, strict=False)
    return {tensor.name: from_raw(tensor.name, tensor.datatype, list(tensor.shape), data) for tensor, data in pairs}
