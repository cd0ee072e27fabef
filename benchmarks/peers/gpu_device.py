"""The GPU under a measurement: what it is, its memory in use, and its rates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any, Self

from benchmarks.common.hardware import BandwidthProbe, ComputeProbe

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


def describe(device: str) -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU; None on the processor or where it says nothing."""
    if device == "cpu":
        return None
    values = _query("gpu", ",".join(_FIELDS))
    return dict(zip(_FIELDS, values[0], strict=False)) if values else None


class MemoryWatch:
    """Reads the GPU memory of a process and what it started every quarter second in a `with` block.

    `peak` is theirs in bytes where nvidia-smi tells which processes there are, `whole` False. In a container it often
    does not: then `peak` is what the whole GPU had in use beyond the beginning, other programs' too, and `whole` True.
    None where nvidia-smi is silent, and on the processor.
    """

    def __init__(self, device: str) -> None:
        self.peak: int | None = None
        self.whole = True
        self._before = None if device == "cpu" else _memory_bytes()
        self._leader = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def follow(self, leader: int) -> None:
        """Look at the process `leader` and those of its session; what was seen before does not count."""
        self._leader, self.peak = leader, None

    def __enter__(self) -> Self:
        if self._before is not None:
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
            own = _process_bytes(self._leader) if self._leader else None
            if own is not None:
                # A first reading of the process replaces those of the whole GPU.
                self.peak, self.whole = max(own, 0 if self.whole else self.peak or 0), False
            elif self.whole and (used := _memory_bytes()) is not None:
                self.peak = max(self.peak or 0, used - (self._before or 0))


def _memory_bytes() -> int | None:
    values = _query("gpu", "memory.used")
    return int(values[0][0]) << 20 if values and values[0][0].isdigit() else None


def _process_bytes(leader: int) -> int | None:
    """Bytes that the processes of `leader`'s session hold on the GPU; None if nvidia-smi names none of them."""
    found = []
    for row in _query("compute-apps", "pid,used_memory") or []:
        if len(row) == 2 and row[0].isdigit() and row[1].isdigit() and _session(int(row[0])) == leader:
            found.append(int(row[1]) << 20)
    return sum(found) if found else None


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _query(kind: str, fields: str) -> list[list[str]] | None:
    """Rows of values of the GPU that CUDA calls its first."""
    gpu = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    command = ["nvidia-smi", f"--query-{kind}={fields}", "--format=csv,noheader,nounits", f"--id={gpu}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return lines if done.returncode == 0 else None
