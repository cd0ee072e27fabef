"""The SavedModel's `serving_default`, which generates in the graph: in process, or by TensorFlow Serving over gRPC."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.peers.protocol import Clock, Job, Run, serve
from serving.backends.base import pad_right
from serving.bundle import open_bundle
from serving.errors import InputError, ServerError

_START_SECONDS = 90


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
    """TensorFlow Serving, started on a free port of this machine for the bundle; ends with this process's `close`."""

    def __init__(self, binary: str, bundle: Path) -> None:
        from serving.clients.tf_serving_grpc import GrpcTransport

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = (bundle / "savedmodel").resolve()
        command = [binary, f"--port={port}", "--rest_api_port=0", "--model_name=gpt2", f"--model_base_path={folder}"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.transport = GrpcTransport(f"127.0.0.1:{port}", "gpt2")
        deadline = time.monotonic() + _START_SECONDS
        while not self._available():
            if self.process.poll() is not None:
                raise InputError(f"{binary} ended with {self.process.returncode}")
            if time.monotonic() > deadline:
                self.close()
                raise InputError(f"{binary} did not load the model within {_START_SECONDS} s")
            time.sleep(0.2)

    def _available(self) -> bool:
        try:
            return any(version["state"] == "AVAILABLE" for version in self.transport.status(2.0))
        except ServerError:
            return False

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
        outputs = self.transport.predict("serving_default", inputs, 300.0)
        return [row[:count].tolist() for row, count in zip(outputs["token_ids"], outputs["lengths"], strict=True)]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _in_process(job: Job, device: str) -> GenerateContestant:
    import tensorflow as tf

    from serving.backends.tensorflow import TensorFlowBackend

    if device != "cpu" and not tf.config.list_physical_devices("GPU"):
        raise InputError("TensorFlow sees no GPU here")
    return GenerateContestant(TensorFlowBackend(open_bundle(Path(job.bundle), check="sizes")))


def server_binary() -> str | None:
    """TensorFlow Serving's binary: $TENSORFLOW_MODEL_SERVER, or on the PATH, or None."""
    return shutil.which(os.environ.get("TENSORFLOW_MODEL_SERVER", "tensorflow_model_server"))


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
        binary = server_binary()
        if binary is None:
            raise InputError("no tensorflow_model_server on the PATH and TENSORFLOW_MODEL_SERVER names none")
        started.append(Served(binary, Path(job.bundle)))
        return GenerateContestant(started[0], ["the binary's own build decides whether it uses a GPU"])

    try:
        serve(load, ("gpt2-bundle", "tensorflow", "tensorflow-serving-api", "numpy"))
    finally:
        for server in started:
            server.close()


if __name__ == "__main__":
    main()
