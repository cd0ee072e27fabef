"""The GPU under a measurement: what it is, its memory in use, and its rates, which bound every step."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any, Self

from benchmarks.hardware import BandwidthProbe, ComputeProbe
from serving.manifest import Geometry

ITEM_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
_FIELDS = ("name", "driver_version", "memory.total", "compute_cap", "clocks.max.sm", "clocks.max.memory")
# Sums read each byte once; the buffer is far larger than a GPU's caches.
_TORCH_PROBE = """
import json, sys, torch
if not torch.cuda.is_available(): sys.exit("torch sees no GPU")
def best(call, amount):
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(); call(); end.record(); torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return amount / min(times[2:])
big = torch.randn(1 << 29, device="cuda")
found = {"read_bytes_per_second": best(big.sum, 4 << 29)}
del big
torch.backends.cuda.matmul.allow_tf32 = False
for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in "ab")
    found[f"{name}_flops_per_second"] = best(lambda: a @ b, 2 * 8192**3)
print(json.dumps(found | {"by": f"torch {torch.__version__}, CUDA {torch.version.cuda}"}))
"""


def measure_rates(device: str) -> dict[str, Any] | None:
    """Read bandwidth (bytes/s) and product rates (operations/s) of the device; None if nothing here measures them.

    A GPU's are measured by torch in a process of its own, the processor's by numpy.
    """
    if device == "cpu":
        compute = ComputeProbe().sample()
        return {"read_bytes_per_second": BandwidthProbe().sample(), "fp32_flops_per_second": compute, "by": "numpy"}
    try:
        done = subprocess.run([sys.executable, "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=90)
        rates: dict[str, Any] = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError):
        return None
    return rates


def floor_ms(
    geometry: Geometry, precision: str, rows: int, positions: float, rates: dict[str, Any] | None
) -> dict[str, Any]:
    """Bytes and operations that a decode step cannot do without, and the ms that they take at the measured rates.

    The weights are read once, without the position table, of which a row reads one line; each row reads the keys and
    values of `positions`. The roofline (Williams et al. 2009): the longer of reading and arithmetic.
    """
    width, layers = geometry.n_embd, geometry.n_layer
    matrices = 12 * layers * width**2 + geometry.vocab_size * width
    # Caches of int8 weights are float32; what CUDA's fp32 loop keeps in 16 bits is less, so this is no floor there.
    cache_item = 2 if precision == "fp16" else 4
    cache = 2 * layers * rows * positions * width * cache_item
    amount = matrices * ITEM_BYTES[precision] + cache
    flops = 2 * rows * matrices + 4 * layers * rows * positions * width
    found: dict[str, Any] = {"step_bytes": round(amount), "step_flops": round(flops), "floor_ms": None}
    if rates is not None:
        rate = rates.get(f"{precision}_flops_per_second")
        seconds = [amount / rates["read_bytes_per_second"], flops / rate if rate else 0.0]
        found["floor_ms"] = 1e3 * max(seconds)
    return found


def describe(device: str) -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU; None on the processor or where it says nothing."""
    if device == "cpu":
        return None
    values = _query(",".join(_FIELDS))
    return None if values is None else dict(zip(_FIELDS, values, strict=False))


class MemoryWatch:
    """Reads the first GPU's memory in use every quarter second in a `with` block; None where nvidia-smi is silent.

    Other programs' memory on that GPU counts too; `before` is what was in use at the beginning.
    """

    def __init__(self, device: str) -> None:
        self.before = self.peak = None if device == "cpu" else _memory_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self.before is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.25):
            self.peak = max(self.peak or 0, _memory_bytes() or 0)


def _memory_bytes() -> int | None:
    values = _query("memory.used")
    return int(values[0]) << 20 if values and values[0].isdigit() else None


def _query(fields: str) -> list[str] | None:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [value.strip() for value in done.stdout.split(",")] if done.returncode == 0 and done.stdout.strip() else None
