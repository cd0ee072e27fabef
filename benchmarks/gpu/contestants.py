"""Who runs, in order of importance, and the command of each one's process."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Contestant:
    """A runtime with its options: `module` speaks `benchmarks.peers.protocol` when it is run with `arguments`.

    `precision` is of the weights as they are read in a step; `note` goes into the record beside the figures.
    """

    name: str
    module: str
    precision: str
    arguments: tuple[str, ...] = ()
    note: str = ""

    def command(self, device: str) -> list[str]:
        """The command that starts it on `device`, "cpu" or "cuda"."""
        return [sys.executable, "-m", f"benchmarks.gpu.{self.module}", "--device", device, *self.arguments]


def _ort(precision: str, steps: int, graphs: bool, note: str = "") -> Contestant:
    name = f"ort-{precision}-loop{steps}-{'graphs' if graphs else 'plain'}"
    arguments = ("--loop", "--steps", str(steps), *(["--graphs"] if graphs else []))
    return Contestant(name, "onnx_peer", precision, arguments, note)


_FP32 = (
    "on CUDA GroupQueryAttention is 16-bit only: this graph's attention runs on the processor step by step; "
    "its loop casts around it and keeps 16-bit caches"
)

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        _ort("fp16", 8, True),
        Contestant("torch-fp16-compiled", "torch_peer", "fp16", ("--compile",), "static cache"),
        Contestant("tensorflow", "generate_peer", "fp32", (), "TensorFlow finds its devices by itself"),
        Contestant("tf-serving", "generate_peer", "fp32", ("--served",), "gRPC to the server binary on this machine"),
        Contestant("torch-fp16", "torch_peer", "fp16", (), "eager, the default cache"),
        _ort("fp32", 8, True, _FP32),
        Contestant("ort-fp16-step", "onnx_peer", "fp16", (), "logits are fetched each step"),
        _ort("fp16", 1, True),
        _ort("fp16", 8, False),
        Contestant("ort-fp32-step", "onnx_peer", "fp32", (), _FP32),
        Contestant("ort-int8-step", "onnx_peer", "int8", (), "operators that CUDA lacks run on the processor"),
    )
}
