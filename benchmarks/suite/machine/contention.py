"""The machine of a run: its rates between the repeats, its meters, and the CPU share of other programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.common.hardware import BandwidthProbe, ComputeProbe, busy_seconds, own_seconds, usable_cores
from benchmarks.suite.machine.meters import Meters


@dataclass
class Machine:
    """The probes whose rates are measured between the repeats, the meters of each repeat, and the machine's price.

    Each may be left out.
    """

    bandwidth: BandwidthProbe | None = None
    compute: ComputeProbe | None = None
    meters: Meters = field(default_factory=Meters)
    price_per_hour: float | None = None

    def sample(self) -> None:
        """Measure the rates once more; the best of all samples counts."""
        if self.bandwidth is not None:
            self.bandwidth.sample(passes=3)
        if self.compute is not None:
            self.compute.sample(passes=1)

    def rates(self) -> tuple[float | None, float | None]:
        """Return bytes and float32 operations a second."""
        found = [max(probe.samples) if probe and probe.samples else None for probe in (self.bandwidth, self.compute)]
        return found[0], found[1]


class Others:
    """The CPU share of programs that do not belong to the run, since this object was made.

    `processes` are the run's own, apart from this one.
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
