"""A server of TensorFlow Serving's API, by gRPC or REST: its slots, token by token, or whole answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.suite.load.schedule import Planned
from benchmarks.suite.targets.base import Completion, Target, TargetError
from benchmarks.suite.targets.in_process import EngineTarget
from serving.bundle import Bundle
from serving.clients.slot_pool import SIGNATURES
from serving.clients.tf_serving import TFServingClient
from serving.clients.transport import Transport
from serving.engine.api import Engine
from serving.errors import GPT2BundleError, InputError, ServerError

# Requests that may wait for a slot, and calls that may wait for answers: the schedule says how many there are.
_WAITING, _CALLS = 1_000_000, 1024
_ASK_SECONDS, _CALL_SECONDS = 30.0, 600.0


def connect(kind: str, address: str, model: str) -> Transport:
    """Speak to the model `model` at `address` by "grpc" or "rest". Raises RuntimeMissingError and InputError."""
    if kind == "grpc":
        from serving.clients.grpc_transport import GrpcTransport

        return GrpcTransport(address, model)
    from serving.clients.rest_transport import RestTransport

    return RestTransport(address if "://" in address else f"http://{address}", model)


class TFServingTarget(Target):
    """The model of a bundle at a server. Over slots tokens come one by one; else each request is one call.

    Args:
        open_transport: reaches the server, in `start`.
        how: "gRPC" or "REST", for the label.
        whole: whether `serving_default` is called even where the server has slots.
        about: `precision`, `emulator` and `process` of `Target`.
    """

    def __init__(
        self,
        name: str,
        server: str,
        bundle: Bundle,
        open_transport: Callable[[], Transport],
        how: str,
        *,
        precision: str | None = "fp32",
        whole: bool = False,
        **about: Any,
    ) -> None:
        super().__init__(name, f"{server}, by {how}", precision, **about)
        self._bundle, self._open, self._whole = bundle, open_transport, whole
        self._inner: Target | None = None

    async def start(self) -> None:
        """Reach the server and see what it offers. Raises ServerError."""
        transport, signatures = await asyncio.to_thread(self._look)
        if signatures >= SIGNATURES and not self._whole:
            self.label += ", its slots"
            self._inner = EngineTarget(self.name, self.label, self.precision, lambda: self._engine(transport))
        elif "serving_default" in signatures:
            self.label += ", whole answers"
            self._inner = WholeAnswerTarget(self.name, self.label, transport, self._bundle.manifest.model.eos_token_id)
        else:
            raise InputError(f"{self.name}: the served model has neither slots nor serving_default; is it this bundle?")
        await self._inner.start()

    async def send(self, request: Planned) -> Completion:
        if self._inner is None:
            raise TargetError(f"{self.name} is not started")
        return await self._inner.send(request)

    async def stop(self) -> None:
        inner, self._inner = self._inner, None
        if inner is not None:
            await inner.stop()

    def _look(self) -> tuple[Transport, set[str]]:
        transport = self._open()
        try:
            return transport, set(TFServingClient(transport, timeout=_ASK_SECONDS, retries=0).metadata())
        except ServerError as error:
            raise ServerError(f"{self.name}: {error}", error.code) from None

    def _engine(self, transport: Transport) -> Engine:
        from serving.engine.savedmodel_engine import open_slot_engine

        return open_slot_engine(self._bundle, transport, max_waiting=_WAITING)


class WholeAnswerTarget(Target):
    """`serving_default`: one call makes a whole answer in the server, and all of its tokens come at its end.

    The graph ends at the end token; what is missing then is asked for by another call that continues from there.
    """

    def __init__(self, name: str, label: str, transport: Transport, eos_token_id: int) -> None:
        super().__init__(name, label)
        self._transport, self._eos = transport, eos_token_id
        self._threads: ThreadPoolExecutor | None = None

    async def start(self) -> None:
        # The loop's own threads are few, and requests would wait for one before they are sent.
        self._threads = ThreadPoolExecutor(_CALLS, self.name)

    async def send(self, request: Planned) -> Completion:
        tokens: list[int] = []
        times: list[float] = []
        try:
            while len(tokens) < request.new_tokens:
                prompt = (*request.prompt, *tokens)
                left = request.new_tokens - len(tokens)
                made, timestamp = await asyncio.get_running_loop().run_in_executor(
                    self._threads, self._call, prompt, left
                )
                tokens += made
                times += [timestamp] * len(made)
                if not made or (len(made) < left and made[-1] != self._eos):
                    break
        except GPT2BundleError as error:
            raise TargetError(str(error)) from None
        finished = times[-1] if times else time.monotonic()
        return Completion(tuple(times), finished, streamed=False, tokens=tuple(tokens))

    async def stop(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _call(self, prompt: tuple[int, ...], new_tokens: int) -> tuple[list[int], float]:
        """Token ids of one greedy answer, and the timestamp at which they were there."""
        inputs = greedy_inputs(np.array([prompt]), np.array([len(prompt)]), new_tokens)
        outputs = self._transport.predict("serving_default", inputs, _CALL_SECONDS)
        row = [int(token) for token in outputs["token_ids"][0][: int(outputs["lengths"][0])]]
        return row, time.monotonic()


def greedy_inputs(token_ids: Any, lengths: Any, new_tokens: int) -> dict[str, Any]:
    """Inputs of `serving_default` for greedy decoding: `token_ids` is [rows, longest], `lengths` is [rows]."""
    rows = len(lengths)
    return {
        "token_ids": token_ids.astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "max_new_tokens": np.full(rows, new_tokens, np.int32),
        "temperature": np.zeros(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "seed": np.zeros(rows, np.int64),
    }
