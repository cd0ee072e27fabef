"""Energy, power and GPU use during a run, from the counters of RAPL and NVML."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_POWERCAP = Path("/sys/class/powercap")
# NVML updates utilisation and power about ten times a second.
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Reading:
    """What was measured over `seconds`; None is not known.

    `cpu_joules` are those of the processor packages without memory, `gpu_joules` those of whole boards. Utilisation is
    the mean of all samples and GPUs, in percent. `peak_gpu_memory_bytes` is the maximum in use on all GPUs, by any
    program.
    """

    seconds: float = 0.0
    cpu_joules: float | None = None
    gpu_joules: float | None = None
    gpu_utilisation_percent: float | None = None
    peak_gpu_memory_bytes: int | None = None

    def figures(self, tokens: int) -> dict[str, float | None]:
        """Return the figures of a repeat that made `tokens` output tokens: joules a token, watts, and GPU use.

        The energy that the machine draws idle is in it.
        """
        known = [joules for joules in (self.cpu_joules, self.gpu_joules) if joules is not None]

        def over(joules: float | None, amount: float) -> float | None:
            return joules / amount if joules is not None and amount > 0 else None

        return {
            "joules_per_token": over(sum(known) if known else None, tokens),
            "cpu_joules_per_token": over(self.cpu_joules, tokens),
            "gpu_joules_per_token": over(self.gpu_joules, tokens),
            "cpu_watts": over(self.cpu_joules, self.seconds),
            "gpu_watts": over(self.gpu_joules, self.seconds),
            "gpu_utilisation_percent": self.gpu_utilisation_percent,
            "peak_gpu_memory_bytes": self.peak_gpu_memory_bytes,
        }


class Rapl:
    """Energy of the processor packages by the kernel's powercap interface, where this user may read it.

    A counter is in microjoules and wraps at its `max_energy_range_uj`. A window in which it wraps twice (many minutes
    at hundreds of watts) reads too low. Raises OSError or ValueError where nothing can be read.
    """

    def __init__(self, folder: Path = _POWERCAP) -> None:
        # intel-rapl:0 is a package, on AMD's processors too; intel-rapl:0:1 is a part that the package includes.
        zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        zones = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        self._packages = [(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())) for zone in zones]
        if self.read() is None:
            raise OSError("there are no RAPL counters that this user can read")

    def read(self) -> list[int] | None:
        """Return each package's counter in microjoules, or None where a counter cannot be read."""
        try:
            return [int(path.read_text()) for path, _ in self._packages] or None
        except (OSError, ValueError):
            return None

    def joules_since(self, before: list[int] | None) -> float | None:
        """Return the energy since the reading `before`."""
        after = self.read()
        if before is None or after is None:
            return None
        spans = zip(before, after, self._packages, strict=True)
        return sum((last - first) % limit if last < first else last - first for first, last, (_, limit) in spans) / 1e6


class Nvml:
    """The GPUs of CUDA_VISIBLE_DEVICES, or all, by NVML through the package nvidia-ml-py.

    Raises ImportError without the package, and errors of NVML's own without a driver or such a GPU.
    """

    def __init__(self) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            visible = ",".join(map(str, range(self._nvml.nvmlDeviceGetCount())))
        self._devices = [self._device(part.strip()) for part in visible.split(",")]
        self.names = [str(self._nvml.nvmlDeviceGetName(device)) for device in self._devices]
        self.driver = str(self._nvml.nvmlSystemGetDriverVersion())

    def _device(self, name: str) -> Any:
        by_number, by_uuid = self._nvml.nvmlDeviceGetHandleByIndex, self._nvml.nvmlDeviceGetHandleByUUID
        return by_uuid(name) if name.startswith("GPU-") else by_number(int(name))

    def joules(self) -> float | None:
        """Return the sum of the energy counters, which GPUs have since Volta; None if one has no counter."""
        each = self._each(lambda device: self._nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3)
        return sum(each) if each else None

    def sample(self) -> tuple[float | None, float | None, float | None]:
        """Return watts of all, mean utilisation in percent, and bytes in use on all; None is not known."""
        watts = self._each(lambda device: self._nvml.nvmlDeviceGetPowerUsage(device) / 1e3)
        busy = self._each(lambda device: float(self._nvml.nvmlDeviceGetUtilizationRates(device).gpu))
        used = self._each(lambda device: float(self._nvml.nvmlDeviceGetMemoryInfo(device).used))
        return sum(watts) if watts else None, sum(busy) / len(busy) if busy else None, sum(used) if used else None

    def clocks_mhz(self) -> list[float] | None:
        """Return the present clock of each GPU's multiprocessors."""
        return self._each(lambda device: float(self._nvml.nvmlDeviceGetClockInfo(device, self._nvml.NVML_CLOCK_SM)))

    def _each(self, ask: Callable[[Any], float]) -> list[float] | None:
        try:
            return [ask(device) for device in self._devices]
        except self._nvml.NVMLError:
            return None


@dataclass(frozen=True)
class Meters:
    """The counters that a run reads; without any, every reading is empty."""

    rapl: Rapl | None = None
    nvml: Nvml | None = None

    def window(self) -> Window:
        """Return a window, whose `reading` is complete at the end of its `with` block."""
        return Window(self)

    def describe(self, idle_seconds: float = 5.0) -> dict[str, Any] | None:
        """Return a record's `energy`, with the power of the next `idle_seconds`; None at once without a counter."""
        if self.rapl is None and self.nvml is None:
            return None
        with self.window() as window:
            time.sleep(idle_seconds)
        idle, gpu = window.reading.figures(0), self.nvml
        return {
            "sources": [name for name, meter in (("rapl", self.rapl), ("nvml", gpu)) if meter is not None],
            "gpus": gpu.names if gpu is not None else [],
            "driver": gpu.driver if gpu is not None else None,
            "gpu_clocks_mhz": gpu.clocks_mhz() if gpu is not None else None,
            "idle_seconds": window.reading.seconds,
            "idle_cpu_watts": idle["cpu_watts"],
            "idle_gpu_watts": idle["gpu_watts"],
        }


class Window:
    """Reads `meters` over its `with` block into `reading`, and polls the GPUs meanwhile."""

    def __init__(self, meters: Meters) -> None:
        self._rapl, self._nvml, self.reading = meters.rapl, meters.nvml, Reading()
        self._samples: list[tuple[float | None, float | None, float | None]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Self:
        if self._nvml is not None:
            self._thread.start()
        self._gpu = self._nvml.joules() if self._nvml is not None else None
        self._cpu = self._rapl.read() if self._rapl is not None else None
        self._began = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        seconds = time.monotonic() - self._began
        cpu = self._rapl.joules_since(self._cpu) if self._rapl is not None else None
        gpu = self._nvml.joules() if self._nvml is not None else None
        self._ended.set()
        if self._nvml is not None:
            self._thread.join()
        columns = [[sample[place] for sample in self._samples] for place in range(3)]
        watts, busy, used = ([value for value in column if value is not None] for column in columns)
        drawn = gpu - self._gpu if gpu is not None and self._gpu is not None else None
        if drawn is None and watts:
            drawn = sum(watts) / len(watts) * seconds
        mean_busy = sum(busy) / len(busy) if busy else None
        self.reading = Reading(seconds, cpu, drawn, mean_busy, int(max(used)) if used else None)

    def _poll(self) -> None:
        assert self._nvml is not None
        self._samples.append(self._nvml.sample())
        while not self._ended.wait(_POLL_SECONDS):
            self._samples.append(self._nvml.sample())


def open_meters() -> Meters:
    """Return the counters that this user can read on this machine."""
    rapl, nvml = None, None
    with contextlib.suppress(OSError, ValueError):
        rapl = Rapl()
    # NVML's errors are classes of its own, and any of them means that there is nothing to read.
    with contextlib.suppress(Exception):
        nvml = Nvml()
    return Meters(rapl, nvml)


def cost_per_million_tokens(price_per_hour: float | None, tokens_per_second: float | None) -> float | None:
    """Return the price of 1,000,000 output tokens at a throughput, in the currency of `price_per_hour`."""
    if price_per_hour is None or not tokens_per_second:
        return None
    return price_per_hour / (3600 * tokens_per_second) * 1e6
