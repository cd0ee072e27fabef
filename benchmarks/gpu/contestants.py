"""Who runs, in order of importance, and the command of each one's process."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Contestant:
    """A runtime with its options: `module` speaks `benchmarks.peers.protocol` when it is run with `arguments`.

    `precision` is of the weights as they are read in a step, `cache` of the keys and values; `note` goes into the
    record beside the figures. Where products do not run on the GPU, its rates are no floor: `bounded` is False.
    """

    name: str
    module: str
    precision: str
    cache: str
    arguments: tuple[str, ...] = ()
    note: str = ""
    bounded: bool = True

    def command(self, device: str) -> list[str]:
        """The command that starts it on `device`, "cpu" or "cuda"."""
        return [sys.executable, "-m", f"benchmarks.gpu.{self.module}", "--device", device, *self.arguments]


def _loop(precision: str, steps: int, graphs: bool, note: str = "") -> Contestant:
    name = f"ort-{precision}-loop{steps}-{'graphs' if graphs else 'plain'}"
    arguments = ("--loop", "--steps", str(steps), *(["--graphs"] if graphs else []))
    # The loop's caches are 16-bit at both precisions, as CUDA's GroupQueryAttention takes no others.
    return Contestant(name, "onnx_peer", precision, "fp16", arguments, note)


_CAST = "weights and products of 32 bits; attention and caches of 16, as CUDA's GroupQueryAttention takes no others"
_PORTABLE = (
    "onnx/portable, 32 bits throughout, by standard operators: the cache grows by concatenation, and the prefill's "
    "logits are of every position of the prompt, all but the last left on the device; a step's are fetched"
)
_INT8 = "CUDA has no MatMulInteger for unsigned rows, nor 32-bit GroupQueryAttention: those run on the processor"

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        _loop("fp16", 8, True),
        Contestant("tensorflow", "generate_peer", "fp32", "fp32", (), "TensorFlow finds its devices by itself"),
        Contestant("tf-serving", "generate_peer", "fp32", "fp32", ("--served",), "one call by gRPC, no batching"),
        Contestant("torch-fp16-compiled", "torch_peer", "fp16", "fp16", ("--compile",), "static cache"),
        Contestant("torch-fp16", "torch_peer", "fp16", "fp16", (), "eager, the default cache"),
        Contestant("ort-fp32-portable", "onnx_peer", "fp32", "fp32", ("--portable",), _PORTABLE),
        _loop("fp32", 8, True, _CAST),
        Contestant("ort-fp16-step", "onnx_peer", "fp16", "fp16", (), "logits are fetched each step"),
        Contestant("torch-fp32", "torch_peer", "fp32", "fp32", (), "eager, the default cache, no TF32"),
        _loop("fp16", 1, True),
        _loop("fp16", 8, False),
        Contestant("ort-int8-step", "onnx_peer", "int8", "fp32", (), _INT8, bounded=False),
    )
}
