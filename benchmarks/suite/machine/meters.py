"""What a run drew from the machine: energy, power, GPU use and memory, from the counters of NVML and RAPL."""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POWERCAP = Path("/sys/class/powercap")
# NVML renews utilisation and power some ten times a second.
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Reading:
    """What was measured over `seconds`; None for what this machine does not tell.

    `cpu_joules` is that of the processor packages without memory, `gpu_joules` that of the whole boards. Utilisation
    is the mean of the samples over all GPUs, in percent; `peak_gpu_memory_bytes` is what was in use on them, by whom
    ever, at most.
    """

    seconds: float
    cpu_joules: float | None = None
    gpu_joules: float | None = None
    gpu_utilisation_percent: float | None = None
    peak_gpu_memory_bytes: int | None = None

    @property
    def cpu_watts(self) -> float | None:
        """Mean power of the packages."""
        return self.cpu_joules / self.seconds if self.cpu_joules is not None and self.seconds > 0 else None

    @property
    def gpu_watts(self) -> float | None:
        """Mean power of the boards."""
        return self.gpu_joules / self.seconds if self.gpu_joules is not None and self.seconds > 0 else None


class Rapl:
    """Energy of the processor packages by the kernel's powercap interface, where this user may read it.

    A counter is in microjoules and starts again at its `max_energy_range_uj`; a window during which it does that twice
    (minutes at hundreds of watts) is read too low.
    """

    def __init__(self, folder: Path = _POWERCAP) -> None:
        # intel-rapl:0 is a package; intel-rapl:0:1 a part of it, such as its cores, that is in it already. AMD's
        # processors have the same names.
        self._packages: list[tuple[Path, int]] = []
        for zone in sorted(folder.glob("intel-rapl:*")):
            try:
                if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                    self._packages.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
            except (OSError, ValueError):
                continue
        self.is_readable = self.read() is not None

    def read(self) -> list[int] | None:
        """Each package's counter, or None where there is none to read."""
        try:
            return [int(path.read_text()) for path, _ in self._packages] or None
        except (OSError, ValueError):
            return None

    def joules(self, before: list[int] | None, after: list[int] | None) -> float | None:
        """Energy between two readings."""
        if before is None or after is None:
            return None
        spans = zip(before, after, self._packages, strict=True)
        return sum((last - first) % limit if last < first else last - first for first, last, (_, limit) in spans) / 1e6


class Nvml:
    """GPUs by NVML, through the package nvidia-ml-py; those of CUDA_VISIBLE_DEVICES where it names numbers.

    Raises ImportError without the package, and what it raises itself without a driver or GPU.
    """

    def __init__(self) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        numbers = [int(part) for part in visible if part.strip().isdecimal()] or range(self._nvml.nvmlDeviceGetCount())
        self._devices = [self._nvml.nvmlDeviceGetHandleByIndex(number) for number in numbers]
        if not self._devices:
            raise RuntimeError("NVML sees no GPU")
        self.names = [_text(self._nvml.nvmlDeviceGetName(device)) for device in self._devices]
        self.driver = _text(self._nvml.nvmlSystemGetDriverVersion())

    def joules(self) -> float | None:
        """The boards' energy counters, which GPUs have since Volta; None where one has not."""
        try:
            return sum(float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(each)) for each in self._devices) / 1e3
        except self._nvml.NVMLError:
            return None

    def sample(self) -> tuple[float | None, float | None, int | None]:
        """Watts of all, mean utilisation in percent, bytes in use on all; None for what is not told."""
        watts = self._each(lambda device: self._nvml.nvmlDeviceGetPowerUsage(device) / 1e3)
        busy = self._each(lambda device: float(self._nvml.nvmlDeviceGetUtilizationRates(device).gpu))
        used = self._each(lambda device: float(self._nvml.nvmlDeviceGetMemoryInfo(device).used))
        return (
            sum(watts) if watts else None,
            sum(busy) / len(busy) if busy else None,
            int(sum(used)) if used else None,
        )

    def clocks_mhz(self) -> list[float] | None:
        """The multiprocessors' clock of each GPU now."""
        return self._each(lambda device: float(self._nvml.nvmlDeviceGetClockInfo(device, self._nvml.NVML_CLOCK_SM)))

    def _each(self, ask: Callable[[Any], float]) -> list[float] | None:
        try:
            return [ask(device) for device in self._devices]
        except self._nvml.NVMLError:
            return None


class Meters:
    """All that this machine has of both; `sources` names them, and is empty where there is nothing."""

    def __init__(self, rapl: Rapl | None = None, nvml: Nvml | None = None) -> None:
        self._rapl = rapl if rapl is not None else Rapl()
        self._nvml = nvml if nvml is not None else open_nvml()
        self.sources = ["rapl"] if self._rapl.is_readable else []
        self.sources += ["nvml"] if self._nvml is not None else []

    def describe(self) -> dict[str, Any]:
        """What is read, for the record."""
        found: dict[str, Any] = {"sources": self.sources, "gpus": [], "driver": None, "gpu_clocks_mhz": None}
        if self._nvml is not None:
            clocks = self._nvml.clocks_mhz()
            found |= {"gpus": self._nvml.names, "driver": self._nvml.driver, "gpu_clocks_mhz": clocks}
        return found

    def begin(self) -> Window:
        """Start a window."""
        return Window(self._rapl, self._nvml)

    def idle(self, seconds: float) -> Reading | None:
        """What the machine draws while nothing of this suite runs; None where nothing can be read, at once."""
        if not self.sources:
            return None
        window = self.begin()
        time.sleep(seconds)
        return window.end()


class Window:
    """From `Meters.begin` to `end`; polls the GPUs meanwhile."""

    def __init__(self, rapl: Rapl, nvml: Nvml | None) -> None:
        self._rapl, self._nvml = rapl, nvml
        self._samples: list[tuple[float | None, float | None, int | None]] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if nvml is not None:
            self._thread = threading.Thread(target=self._poll, args=(nvml,), daemon=True)
        self._began = time.monotonic()
        self._cpu, self._gpu = rapl.read(), nvml.joules() if nvml is not None else None
        if self._thread is not None:
            self._thread.start()

    def end(self) -> Reading:
        """What was drawn since the beginning."""
        cpu = self._rapl.joules(self._cpu, self._rapl.read())
        gpu = self._nvml.joules() if self._nvml is not None else None
        seconds = time.monotonic() - self._began
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        watts, busy, used = ([value for value in column if value is not None] for column in self._columns())
        joules = gpu - self._gpu if gpu is not None and self._gpu is not None else None
        if joules is None and watts:
            joules = sum(watts) / len(watts) * seconds
        return Reading(
            seconds=seconds,
            cpu_joules=cpu,
            gpu_joules=joules,
            gpu_utilisation_percent=sum(busy) / len(busy) if busy else None,
            peak_gpu_memory_bytes=int(max(used)) if used else None,
        )

    def _columns(self) -> list[list[float | None]]:
        return [[sample[column] for sample in self._samples] for column in range(3)]

    def _poll(self, nvml: Nvml) -> None:
        self._samples.append(nvml.sample())
        while not self._ended.wait(_POLL_SECONDS):
            self._samples.append(nvml.sample())


def open_nvml() -> Nvml | None:
    """NVML, or None without nvidia-ml-py, a driver or a GPU."""
    try:
        return Nvml()
    except Exception:  # Its errors are classes of its own, and whichever comes, there is nothing to read.
        return None


def energy_figures(reading: Reading | None, tokens: int) -> dict[str, float | None]:
    """Figures of one repeat in which `tokens` output tokens were made; None for no reading or no tokens.

    Energy is all that the machine drew over the repeat: what it draws idle is not subtracted.
    """
    read = reading if reading is not None else Reading(0.0)
    known = [joules for joules in (read.cpu_joules, read.gpu_joules) if joules is not None]

    def per_token(joules: float | None) -> float | None:
        return joules / tokens if joules is not None and tokens else None

    return {
        "joules_per_token": per_token(sum(known) if known else None),
        "cpu_joules_per_token": per_token(read.cpu_joules),
        "gpu_joules_per_token": per_token(read.gpu_joules),
        "cpu_watts": read.cpu_watts,
        "gpu_watts": read.gpu_watts,
        "gpu_utilisation_percent": read.gpu_utilisation_percent,
        "peak_gpu_memory_bytes": read.peak_gpu_memory_bytes,
    }


def cost_per_million_tokens(price_per_hour: float | None, tokens_per_second: float | None) -> float | None:
    """Price of 1,000,000 output tokens at that throughput, in the price's currency: price / (3600 throughput) 1e6."""
    if price_per_hour is None or not tokens_per_second:
        return None
    return price_per_hour / (3600 * tokens_per_second) * 1e6


def _text(value: str | bytes) -> str:
    """Older versions of the package give bytes."""
    return value.decode() if isinstance(value, bytes) else value
