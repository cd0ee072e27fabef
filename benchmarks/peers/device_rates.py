"""The rates of the device under a measurement, which bound every step."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.common.hardware import BandwidthProbe, ComputeProbe

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
found["gpu"] = torch.cuda.get_device_name()
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
