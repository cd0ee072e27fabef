"""The machine of a run: its rates beside the repeats, what it drew, and what others took of it meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.hardware import BandwidthProbe, ComputeProbe, busy_seconds, own_seconds, usable_cores
from benchmarks.suite.machine.meters import Meters, Reading


@dataclass
class Machine:
    """What is measured of the machine between and beside the repeats; each may be left out."""

    bandwidth: BandwidthProbe | None = None
    compute: ComputeProbe | None = None
    meters: Meters | None = None
    price_per_hour: float | None = None

    def sample(self) -> None:
        """Measure its rates once more; the best of all samples counts."""
        if self.bandwidth is not None:
            self.bandwidth.sample(passes=3)
        if self.compute is not None:
            self.compute.sample(passes=1)

    def rates(self) -> tuple[float | None, float | None]:
        """Bytes and float32 operations a second."""
        found = [max(probe.samples) if probe and probe.samples else None for probe in (self.bandwidth, self.compute)]
        return found[0], found[1]

    def energy(self, idle: Reading | None) -> dict[str, Any] | None:
        """What was read, and what the machine drew before anything was loaded; None where nothing is read."""
        if self.meters is None or not self.meters.sources or idle is None:
            return None
        drawn = {"idle_seconds": idle.seconds, "idle_cpu_watts": idle.cpu_watts, "idle_gpu_watts": idle.gpu_watts}
        return self.meters.describe() | drawn


class Others:
    """What part of the cores' time went to programs that are none of this run's, since it was made.

    `processes` are those of the run beside this one.
    """

    def __init__(self, processes: Sequence[int]) -> None:
        self._processes = processes
        self._before = self._now()

    def share(self) -> float | None:
        """From 0 to 1, or None where the system does not say."""
        wall, busy, own = (after - before for after, before in zip(self._now(), self._before, strict=True))
        return min(1.0, max(0.0, busy - own) / (wall * usable_cores())) if busy and wall else None

    def _now(self) -> tuple[float, float, float]:
        return time.monotonic(), busy_seconds(), own_seconds(self._processes)
