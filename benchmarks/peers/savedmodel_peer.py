"""The SavedModel's `serving_default`, which generates in the graph: in process, or by TensorFlow Serving over gRPC."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.static_batch import GenerateRunner, LoadRequest, serve
from benchmarks.suite.targets.started_tf_serving import TFServingProcess, find_server
from benchmarks.suite.targets.tf_serving import greedy_inputs
from serving.backends.base import pad_right
from serving.bundle import Bundle, open_bundle
from serving.errors import InputError

_CALL_SECONDS = 300.0


class Served:
    """TensorFlow Serving, or its emulator, started for the bundle; ends with `close`."""

    def __init__(self, bundle: Bundle, device: str) -> None:
        gpu = device != "cpu"
        self.found = find_server(gpu)
        self._process = TFServingProcess("tf-serving", bundle, self.found, "grpc", gpu=gpu, own_session=False)
        try:
            self._transport = self._process.connect(self._process.start())
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """Return the greedy tokens of each row."""
        token_ids, lengths = pad_right(prompts)
        inputs = greedy_inputs(token_ids, lengths, max_new_tokens)
        outputs = self._transport.predict("serving_default", inputs, _CALL_SECONDS)
        return [row[:count].tolist() for row, count in zip(outputs["token_ids"], outputs["lengths"], strict=True)]

    def close(self) -> None:
        """End the server."""
        self._process.stop()


def _in_process(request: LoadRequest, device: str) -> GenerateRunner:
    import tensorflow as tf

    from serving.backends.tensorflow import TensorFlowBackend

    if device != "cpu" and not tf.config.list_physical_devices("GPU"):
        raise InputError("TensorFlow sees no GPU here")
    return GenerateRunner(TensorFlowBackend(open_bundle(Path(request.bundle), check="sizes")))


def main() -> None:
    """Answer the parent until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--served", action="store_true")
    given = parser.parse_args()
    started: list[Served] = []

    def load(request: LoadRequest) -> GenerateRunner:
        if not given.served:
            return _in_process(request, given.device)
        started.append(Served(open_bundle(Path(request.bundle), check="sizes"), given.device))
        found = started[0].found
        notes = [found.label, "the binary's own build decides whether it uses a GPU"]
        return GenerateRunner(started[0], notes, found.emulator)

    # The parent ends this process by a signal, which a container would outlive.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve(load, ("gpt2-bundle", "tensorflow", "tensorflow-serving-api", "numpy"))
    finally:
        for server in started:
            server.close()


if __name__ == "__main__":
    main()
