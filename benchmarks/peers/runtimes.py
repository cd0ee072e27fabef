"""The runtimes under test, and the command of each one's process."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PRECISIONS = ("fp32", "int8", "int4")


@dataclass(frozen=True)
class Runtime:
    """A runtime at one precision: `module` speaks `benchmarks.common.static_batch` when it is run with `arguments`.

    `cache` is the precision of the KV cache, "" where it follows from the weights'. The process runs in the peer
    environment `environment`, or in this Python if that is empty. `note` goes into the record. `bounded` is False where
    the device's rates bound nothing: products that do not run on the GPU, or steps that give several tokens.
    """

    name: str
    module: str
    precision: str
    arguments: tuple[str, ...] = ()
    environment: str = ""
    cache: str = ""
    note: str = ""
    bounded: bool = True

    def command(self, device: str, environments: Path) -> list[str]:
        """Return the command that starts the process on `device`, "cpu" or "cuda"."""
        python = str(self._folder(environments) / "bin" / "python") if self.environment else sys.executable
        # Peers that run on the CPU only take no arguments.
        takes_device = self.module in ("onnx_peer", "savedmodel_peer", "torch_peer")
        device_option = ("--device", device) if takes_device else ()
        return [python, "-m", f"benchmarks.peers.{self.module}", *device_option, *self.arguments]

    def is_installed(self, environments: Path) -> bool:
        """Return whether its environment is in the folder `environments`."""
        return not self.environment or (self._folder(environments) / "installed").exists()

    def _folder(self, environments: Path) -> Path:
        return environments.absolute() / f".venv-peer-{self.environment}"


def _peer(name: str, *precisions: str) -> list[Runtime]:
    return [Runtime(f"{name}/{precision}", f"{name}_peer", precision, environment=name) for precision in precisions]


def _multi_step(precision: str, steps: int, graphs: bool, note: str = "") -> Runtime:
    name = f"ort-{precision}-multi-step{steps}{'-graphs' if graphs else ''}"
    arguments = ("--steps", str(steps), *(["--graphs"] if graphs else []))
    # The KV cache is 16-bit at both precisions, as CUDA's GroupQueryAttention supports no other.
    return Runtime(name, "onnx_peer", precision, arguments, cache="fp16", note=note)


_CAST = "weights and products of 32 bits; attention and KV cache of 16, as CUDA's GroupQueryAttention has no others"
_PORTABLE = "32 bits, standard operators; the KV cache grows by concatenation, and a step's logits are fetched"
_INT8 = "CUDA has no MatMulInteger for unsigned rows, nor 32-bit GroupQueryAttention: those run on the processor"
_SAVEDMODEL = Runtime("savedmodel/fp32", "savedmodel_peer", "fp32", note="serving_default in TensorFlow")

CPU = (
    *(Runtime(f"ort/{precision}", "onnx_peer", precision) for precision in PRECISIONS),
    _SAVEDMODEL,
    *_peer("torch", "fp32", "int8"),
    *_peer("openvino", *PRECISIONS),
    *_peer("ctranslate2", "fp32", "int8"),
    *_peer("genai", *PRECISIONS),
    *_peer("llama", *PRECISIONS),
    *_peer("keras_hub", "fp32"),
)
"""On the CPU, all of one precision take turns."""

SPECULATION = (
    *(each for each in CPU if each.name.split("/")[0] in ("ort", "openvino", "llama")),
    # A graph whose verify steps have other bits on this processor decodes plainly.
    *(
        Runtime(f"ort-speculative/{precision}", "onnx_peer", precision, ("--speculation",), bounded=False)
        for precision in PRECISIONS
    ),
    *(
        Runtime(f"{peer}-lookup/{precision}", f"{peer}_peer", precision, ("--lookup",), environment=peer, bounded=False)
        for peer in ("openvino", "llama")
        for precision in PRECISIONS
    ),
)
"""On the CPU at batch 1: the bundle's speculative decoding, peers' prompt lookup, and each without it."""

GPU = (
    _multi_step("fp16", 8, True),
    _SAVEDMODEL,
    Runtime("tf-serving/fp32", "savedmodel_peer", "fp32", ("--served",), note="one call by gRPC, no batching"),
    Runtime("torch-compiled/fp16", "torch_peer", "fp16", ("--compile",), note="static cache"),
    Runtime("torch/fp16", "torch_peer", "fp16", note="eager, the default cache"),
    Runtime("onnx/portable", "onnx_peer", "fp32", ("--portable",), note=_PORTABLE),
    _multi_step("fp32", 8, True, _CAST),
    Runtime("ort/fp16", "onnx_peer", "fp16", note="logits are fetched each step"),
    Runtime("torch/fp32", "torch_peer", "fp32", note="eager, the default cache, no TF32"),
    _multi_step("fp16", 1, True),
    _multi_step("fp16", 8, False),
    Runtime("ort/int8", "onnx_peer", "int8", cache="fp32", note=_INT8, bounded=False),
)
"""On a GPU, one runs after the other, in order of importance."""


def own(precision: str) -> str:
    """Return the name of the bundle's own CPU runtime at a precision."""
    return f"ort/{precision}"


def chosen(runtimes: Iterable[Runtime], names: Iterable[str]) -> list[Runtime]:
    """Return the runtimes that `names` mean: a whole name, or what comes before the precision; all for no name."""
    asked = set(names)
    return [each for each in runtimes if not asked or each.name in asked or each.name.split("/")[0] in asked]
