"""The machine under a measurement: what it is, and how fast it can read memory, which bounds every decode step."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from serving.support.cores import cpu_model
from serving.support.cores import usable_cores as usable_cores

_PACKAGES = ("gpt2-bundle", "onnxruntime", "onnxruntime-gpu", "tensorflow", "numpy", "tokenizers", "rensa")
_CORES = Path("/sys/devices/system/cpu")
# Far larger than any cache, so that every pass comes from memory.
_BYTES = 512 << 20
# Large enough that a product is arithmetic and not reading.
_SIDE = 2048


class BandwidthProbe:
    """Measures read bandwidth; one probe is kept for a whole benchmark, so that samples lie between its runs.

    A pass reads 512 MiB once, split over the usable cores, by a dot product of each part with itself (one load for
    each 4 bytes, no store).
    """

    def __init__(self) -> None:
        self.cores = usable_cores()
        self._parts = np.array_split(np.ones(_BYTES // 4, np.float32), self.cores)
        self.samples: list[float] = []

    def sample(self, passes: int = 10) -> float:
        """Return the bandwidth of the best of a few passes in bytes/s, and keep it in `samples`."""
        # A runtime's threads go on spinning for a while after its last call, and would take a core from the probe.
        time.sleep(0.1)
        best = 0.0
        for _ in range(passes):
            began = time.perf_counter()
            threads = [threading.Thread(target=np.dot, args=(part, part)) for part in self._parts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            best = max(best, _BYTES / (time.perf_counter() - began))
        self.samples.append(best)
        return best


class ComputeProbe:
    """Measures float32 arithmetic by numpy's product of two square matrices, on as many cores as its library takes."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._matrices = random.standard_normal((2, _SIDE, _SIDE), np.float32)
        self.samples: list[float] = []

    def sample(self, passes: int = 5) -> float:
        """Return the multiplications and additions a second of the best of a few passes, and keep it in `samples`."""
        time.sleep(0.1)
        left, right = self._matrices
        best = 0.0
        for _ in range(passes):
            began = time.perf_counter()
            np.dot(left, right)
            best = max(best, 2 * _SIDE**3 / (time.perf_counter() - began))
        self.samples.append(best)
        return best


def busy_seconds() -> float:
    """CPU seconds that all processes, and whoever else the host runs, have taken from this machine since it started.

    Zero where the system does not say (/proc/stat).
    """
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, *others = (int(field) for field in fields[:8])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def own_seconds(processes: Iterable[int] = ()) -> float:
    """CPU seconds of this process, of those that it has waited for, and of these others so far (Linux)."""
    times = os.times()
    found = times.user + times.system + times.children_user + times.children_system
    for process in processes:
        try:
            # The name, in brackets, may hold anything; after it user and system time are fields 14 and 15 of all.
            fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache that the first core sees, or None where the system does not say."""
    sizes = []
    for path in (_CORES / "cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:])
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=None)


def environment() -> dict[str, Any]:
    """Date, processor, cores, memory, clocks, load, and versions of what runs; GPUs are told by `Meters.describe`."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": _memory_bytes(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "kernel": platform.release(),
        "clock_mhz": _clock_mhz(),
        "governor": _governor(),
        "load_average": list(os.getloadavg()),
        "versions": versions,
    }


def _clock_mhz() -> list[float] | None:
    """Lowest and highest clock of the cores now, in MHz, or None where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return [min(clocks), max(clocks)] if clocks else None


def _governor() -> str | None:
    """What decides on the first core's clock; None where that is not told, as in most virtual machines."""
    try:
        return (_CORES / "cpu0/cpufreq/scaling_governor").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
