"""Energy, power and GPU use, from counters that a test has made up; and cost."""

from __future__ import annotations

import sys
import types

import pytest

from benchmarks.suite.figures.latency_metrics import Objectives
from benchmarks.suite.figures.record_rows import Repeat, figures
from benchmarks.suite.load.events import Response
from benchmarks.suite.machine.meters import (
    Meters,
    Nvml,
    Rapl,
    Reading,
    cost_per_million_tokens,
    energy_figures,
    open_nvml,
)


def write_zone(folder, name, label, joules, limit=1000.0):
    zone = folder / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "name").write_text(label + "\n")
    (zone / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (zone / "max_energy_range_uj").write_text(f"{round(limit * 1e6)}\n")


def test_packages_are_summed_over_their_wraparound_and_their_parts_are_not(tmp_path):
    write_zone(tmp_path, "intel-rapl:0", "package-0", 990)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 5)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 1)
    write_zone(tmp_path, "intel-rapl:2", "psys", 1)
    rapl = Rapl(tmp_path)
    before = rapl.read()
    write_zone(tmp_path, "intel-rapl:0", "package-0", 10)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 8)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 500)
    assert rapl.is_readable and rapl.joules(before, rapl.read()) == pytest.approx(20 + 3)


def test_a_counter_that_may_not_be_read_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml() is None
    meters = Meters(Rapl(tmp_path / "nowhere"))
    assert meters.sources == [] and meters.idle(60.0) is None
    assert meters.begin().end().cpu_joules is None
    assert set(energy_figures(None, 10).values()) == {None}


class FakeNvml(types.ModuleType):
    """Two GPUs: 50 and 150 W, 40 and 80 % busy, 1 and 3 GB in use; each window takes 30 J of each by the counter."""

    class NVMLError(Exception):
        pass

    def __init__(self, has_counter=True):
        super().__init__("pynvml")
        self.has_counter, self.millijoules = has_counter, 1000

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlSystemGetDriverVersion(self):
        return b"570.1"

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    NVML_CLOCK_SM = 1

    def nvmlDeviceGetClockInfo(self, device, kind):
        return 1500 + device if kind == self.NVML_CLOCK_SM else 0

    def nvmlDeviceGetName(self, device):
        return f"GPU {device}"

    def nvmlDeviceGetTotalEnergyConsumption(self, device):
        if not self.has_counter:
            raise self.NVMLError
        self.millijoules += 15_000
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, device):
        return (50_000, 150_000)[device]

    def nvmlDeviceGetUtilizationRates(self, device):
        return types.SimpleNamespace(gpu=(40, 80)[device])

    def nvmlDeviceGetMemoryInfo(self, device):
        return types.SimpleNamespace(used=(10**9, 3 * 10**9)[device])


def test_gpus_are_read_by_nvml(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    meters = Meters(Rapl(tmp_path))
    assert meters.describe() == {"sources": ["nvml"], "gpus": ["GPU 0", "GPU 1"], "driver": "570.1",
                                "gpu_clocks_mhz": [1500.0, 1501.0]}  # fmt: skip
    reading = meters.begin().end()
    # The counter goes up by 15 J with each of the two devices at each of the two readings.
    assert reading.gpu_joules == pytest.approx(60)
    assert reading.gpu_utilisation_percent == 60 and reading.peak_gpu_memory_bytes == 4 * 10**9
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert Nvml().names == ["GPU 1"]


def test_without_a_counter_energy_is_power_over_time(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(has_counter=False))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    reading = Meters(Rapl(tmp_path)).begin().end()
    assert reading.gpu_joules == pytest.approx(200 * reading.seconds) and reading.gpu_watts == pytest.approx(200)


def test_energy_and_cost_of_tokens():
    """100 tokens in 2 s, of two requests; a third one failed."""
    responses = [
        Response(0, 0.0, 0.0, 2.0, tuple(2.0 for _ in range(40)), 4),
        Response(1, 0.0, 0.0, 1.0, tuple(1.0 for _ in range(60)), 4),
        Response(2, 0.0, 0.0, 2.0, (), 4, error="no"),
    ]
    reading = Reading(4.0, cpu_joules=200.0, gpu_joules=400.0)
    found = figures(Repeat(responses, reading), Objectives(), price_per_hour=1.8)
    assert (found["joules_per_token"], found["cpu_joules_per_token"], found["gpu_joules_per_token"]) == (6, 2, 4)
    assert (found["cpu_watts"], found["gpu_watts"]) == (50, 100)
    # 50 tokens a second are 180,000 an hour, so a million take 5.56 hours.
    assert found["cost_per_million_tokens"] == pytest.approx(1e6 / 180_000 * 1.8)
    assert energy_figures(reading, 0)["joules_per_token"] is None
    assert energy_figures(Reading(4.0, gpu_joules=400.0), 100)["joules_per_token"] == 4
    assert cost_per_million_tokens(None, 50) is None and cost_per_million_tokens(1.0, 0.0) is None
