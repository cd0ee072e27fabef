"""The SavedModel's `serving_default`, which generates in the graph: in process, or by TensorFlow Serving over gRPC."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.peers.protocol import Clock, Job, Run, serve
from benchmarks.suite.targets.started_tf_serving import TFServingProcess, find_server
from serving.backends.base import pad_right
from serving.bundle import Bundle, open_bundle
from serving.errors import InputError


class Generates(Protocol):
    """What continues prompts greedily; rows may be shorter after the end token."""

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]: ...


class GenerateContestant:
    """A call of one token is the prefill; a step is what a call of many takes longer, over the tokens that it added."""

    def __init__(self, model: Generates, notes: Sequence[str] = ()) -> None:
        self.model = model
        self.notes = ["a step is (a whole call - a call of one token) / steps", *notes]

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        """See `Contestant.run`."""
        run, clock = Run(), Clock()
        self.model.generate(prompts, max_new_tokens=1)
        run.prefill = clock.lap()
        rows = self.model.generate(prompts, max_new_tokens=1 + new_tokens)
        whole = clock.lap()
        steps = max(map(len, rows)) - 1
        if steps:
            run.steps = [max(whole - run.prefill, 0.0) / steps] * steps
        run.tokens = [[row[step] if step < len(row) else -1 for row in rows] for step in range(1 + steps)]
        return run


class Served:
    """TensorFlow Serving, started for the bundle, or what stands for it; ends with `close`."""

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
        token_ids, lengths = pad_right(prompts)
        rows = len(prompts)
        inputs: dict[str, Any] = {
            "token_ids": token_ids.astype(np.int32),
            "lengths": lengths.astype(np.int32),
            "max_new_tokens": np.full(rows, max_new_tokens, np.int32),
            "temperature": np.zeros(rows, np.float32),
            "top_k": np.zeros(rows, np.int32),
            "top_p": np.ones(rows, np.float32),
            "seed": np.zeros(rows, np.int64),
        }
        outputs = self._transport.predict("serving_default", inputs, 300.0)
        return [row[:count].tolist() for row, count in zip(outputs["token_ids"], outputs["lengths"], strict=True)]

    def close(self) -> None:
        self._process.stop()


def _in_process(job: Job, device: str) -> GenerateContestant:
    import tensorflow as tf

    from serving.backends.tensorflow import TensorFlowBackend

    if device != "cpu" and not tf.config.list_physical_devices("GPU"):
        raise InputError("TensorFlow sees no GPU here")
    return GenerateContestant(TensorFlowBackend(open_bundle(Path(job.bundle), check="sizes")))


def main() -> None:
    """Answer the parent until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--served", action="store_true")
    given = parser.parse_args()
    started: list[Served] = []

    def load(job: Job) -> GenerateContestant:
        if not given.served:
            return _in_process(job, given.device)
        started.append(Served(open_bundle(Path(job.bundle), check="sizes"), given.device))
        found = started[0].found
        notes = [found.label, "the binary's own build decides whether it uses a GPU"]
        return GenerateContestant(started[0], [*(["STAND-IN, not TensorFlow Serving"] * found.stand_in), *notes])

    # The parent ends this process by a signal, which a container would outlive.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve(load, ("gpt2-bundle", "tensorflow", "tensorflow-serving-api", "numpy"))
    finally:
        for server in started:
            server.close()


if __name__ == "__main__":
    main()
