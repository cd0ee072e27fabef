"""The machine under a measurement: what it is, and how fast it can read memory, which bounds every decode step."""

from __future__ import annotations

import contextlib
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


class _Probe:
    """A rate of the machine; one probe is kept for a whole benchmark, so that samples lie between its runs."""

    def __init__(self) -> None:
        self.samples: list[float] = []

    def sample(self, passes: int = 10) -> float:
        """Return the best of a few passes in units a second, and keep it in `samples`."""
        # A runtime's threads go on spinning for a while after its last call, and would take a core from the probe.
        time.sleep(0.1)
        self.samples.append(max(self._rate() for _ in range(passes)))
        return self.samples[-1]

    def _rate(self) -> float:
        raise NotImplementedError


class BandwidthProbe(_Probe):
    """Bytes a second of reading memory.

    A pass reads 512 MiB once, split over the usable cores, by a dot product of each part with itself (one load for
    each 4 bytes, no store).
    """

    def __init__(self) -> None:
        super().__init__()
        self._parts = np.array_split(np.ones(_BYTES // 4, np.float32), usable_cores())

    def _rate(self) -> float:
        began = time.perf_counter()
        threads = [threading.Thread(target=np.dot, args=(part, part)) for part in self._parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return _BYTES / (time.perf_counter() - began)


class ComputeProbe(_Probe):
    """Float32 multiplications and additions a second of numpy's product of two matrices, on the cores it takes."""

    def __init__(self) -> None:
        super().__init__()
        self._matrices = np.random.default_rng(0).standard_normal((2, _SIDE, _SIDE), np.float32)

    def _rate(self) -> float:
        began = time.perf_counter()
        np.dot(*self._matrices)
        return 2 * _SIDE**3 / (time.perf_counter() - began)


def busy_seconds() -> float:
    """CPU seconds that all processes, and whoever else the host runs, have taken from this machine since it started.

    Zero where the system does not say (/proc/stat).
    """
    fields = _read(Path("/proc/stat")).split("\n", 1)[0].split()[1:9]
    if not fields:
        return 0.0
    user, nice, system, _idle, _waiting, *others = map(int, fields)
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def own_seconds(processes: Iterable[int] = ()) -> float:
    """CPU seconds of this process, of those that it has waited for, and of these others so far (Linux)."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return own + sum(map(cpu_seconds, processes))


def cpu_seconds(process: int) -> float:
    """CPU seconds of a process so far; zero if there is none."""
    # The name, in brackets, may hold anything; after it user and system time are fields 14 and 15 of all.
    fields = _read(Path(f"/proc/{process}/stat")).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def process_memory(process: int) -> dict[str, int]:
    """The memory fields of /proc/PID/status in bytes, such as VmRSS and VmHWM; none if the process has ended."""
    lines = (line.split() for line in _read(Path(f"/proc/{process}/status")).splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) << 10 for fields in lines if fields[-1:] == ["kB"]}


def process_tree(root: int) -> list[int]:
    """A process and all that it started, by number."""
    found = [root]
    for process in found:
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, _read(path).split())
    return found


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache that the first core sees, or None where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    texts = [_read(path).strip() for path in (_CORES / "cpu0/cache").glob("index*/size")]
    sizes = [int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units and text[:-1].isdigit()]
    return max(sizes, default=None)


def environment() -> dict[str, Any]:
    """Date, processor, cores, memory, clocks, load, and versions of what runs; GPUs are told by `Meters.describe`.

    `clock_mhz` is the lowest and highest clock of the cores now. What the system does not say is None.
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    memory: int | None = None
    with contextlib.suppress(ValueError, OSError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": memory,
        "last_level_cache_bytes": last_level_cache_bytes(),
        "kernel": platform.release(),
        "clock_mhz": [min(clocks), max(clocks)] if clocks else None,
        "governor": _read(_CORES / "cpu0/cpufreq/scaling_governor").strip() or None,
        "load_average": list(os.getloadavg()),
        "versions": versions,
    }


def _read(path: Path) -> str:
    """What a file of the system says; nothing where it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
