"""Energy, power and GPU use, by emulated counters: RAPL's files, and an NVML library below nvidia-ml-py."""

from __future__ import annotations

import ctypes

import pynvml
import pytest

from benchmarks.common.static_batch import BatchRun
from benchmarks.suite import static_batches
from benchmarks.suite.figures.latency_metrics import Objectives
from benchmarks.suite.figures.record_rows import Repeat, figures
from benchmarks.suite.load.events import Response
from benchmarks.suite.load.schedule import Planner
from benchmarks.suite.machine import meters as meters_module
from benchmarks.suite.machine.contention import Machine
from benchmarks.suite.machine.meters import Meters, Nvml, Rapl, Reading, cost_per_million_tokens, open_meters


def write_zone(folder, name, label, joules, limit=1000.0):
    zone = folder / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "name").write_text(label + "\n")
    (zone / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (zone / "max_energy_range_uj").write_text(f"{round(limit * 1e6)}\n")


class Library:
    """Functions of libnvidia-ml, as the package calls them: two GPUs of 50 and 150 W, 40 and 80 % busy, 1 and 3 GB in
    use; each reading of an energy counter finds 15 J more."""

    def __init__(self, has_counter=True):
        self.has_counter, self.millijoules = has_counter, [1000, 500_000]

    def nvmlInitWithFlags(self, flags):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        if not 0 <= index.value < 2:
            return pynvml.NVML_ERROR_INVALID_ARGUMENT
        # A handle is a pointer to what only the library knows; NULL is none.
        ctypes.memmove(handle, ctypes.byref(ctypes.c_size_t(index.value + 1)), ctypes.sizeof(ctypes.c_size_t))
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        return self.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(uuid.value.removeprefix(b"GPU-"))), handle)

    def nvmlDeviceGetName(self, handle, name, size):
        name.value = b"GPU %d" % self.number(handle)
        return 0

    def nvmlSystemGetDriverVersion(self, version, size):
        version.value = b"570.1"
        return 0

    def nvmlDeviceGetClockInfo(self, handle, kind, clock):
        clock._obj.value = 1500 + self.number(handle) if kind.value == pynvml.NVML_CLOCK_SM else 0
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, joules):
        if not self.has_counter:
            return pynvml.NVML_ERROR_NOT_SUPPORTED
        self.millijoules[self.number(handle)] += 15_000
        joules._obj.value = self.millijoules[self.number(handle)]
        return 0

    def nvmlDeviceGetPowerUsage(self, handle, milliwatts):
        milliwatts._obj.value = (50_000, 150_000)[self.number(handle)]
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle, rates):
        rates._obj.gpu = (40, 80)[self.number(handle)]
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.used = (10**9, 3 * 10**9)[self.number(handle)]
        return 0

    @staticmethod
    def number(handle):
        return ctypes.cast(handle, ctypes.c_void_p).value - 1


@pytest.fixture
def library(monkeypatch):
    """Return what puts an emulated library below the package; without a call the library is missing."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(meters_module, "_POLL_SECONDS", 0.001)

    def install(**how):
        monkeypatch.setattr(pynvml, "nvmlLib", Library(**how))

    return install


def test_packages_are_summed_over_their_wraparound_and_their_parts_are_not(tmp_path):
    write_zone(tmp_path, "intel-rapl:0", "package-0", 990)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 5)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 1)
    write_zone(tmp_path, "intel-rapl:2", "psys", 1)
    with Meters(Rapl(tmp_path)).window() as window:
        write_zone(tmp_path, "intel-rapl:0", "package-0", 10)
        write_zone(tmp_path, "intel-rapl:1", "package-1", 8)
        write_zone(tmp_path, "intel-rapl:0:0", "core", 500)
        write_zone(tmp_path, "intel-rapl:2", "psys", 900)
    assert window.reading.cpu_joules == pytest.approx(20 + 3) and window.reading.gpu_joules is None


def test_what_cannot_be_read_is_none(tmp_path, library, monkeypatch):
    for text in (None, "no number"):
        if text:
            write_zone(tmp_path, "intel-rapl:0", "package-0", 1)
            (tmp_path / "intel-rapl:0" / "energy_uj").write_text(text)
        with pytest.raises(OSError, match="no RAPL counters"):
            Rapl(tmp_path)
    monkeypatch.setattr(meters_module, "_POWERCAP", tmp_path)
    assert open_meters() == Meters() and Meters().describe(60.0) is None
    with Meters().window() as window:
        pass
    assert set(window.reading.figures(10).values()) == {None}
    # A counter that goes away during a run costs the reading and not the run.
    write_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    with Meters(Rapl(tmp_path)).window() as window:
        (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert window.reading.cpu_joules is None and window.reading.seconds > 0


def test_gpus_are_read_by_nvml(library, monkeypatch):
    library()
    meters = Meters(nvml=Nvml())
    assert open_meters().nvml.names == ["GPU 0", "GPU 1"]
    with meters.window() as window:
        pass
    # Each counter goes up by 15 J from the first reading to the second.
    reading = window.reading
    assert reading.gpu_joules == pytest.approx(30)
    assert reading.gpu_utilisation_percent == 60 and reading.peak_gpu_memory_bytes == 4 * 10**9
    told = meters.describe(0.01)
    assert told["sources"] == ["nvml"] and told["gpus"] == ["GPU 0", "GPU 1"] and told["driver"] == "570.1"
    assert told["gpu_clocks_mhz"] == [1500, 1501] and told["idle_cpu_watts"] is None
    assert told["idle_gpu_watts"] == pytest.approx(30 / told["idle_seconds"])


@pytest.mark.parametrize(
    ("visible", "names"), [("1", ["GPU 1"]), ("GPU-1,0", ["GPU 1", "GPU 0"]), ("", None), ("-1", None)]
)
def test_gpus_are_those_that_cuda_sees(library, monkeypatch, visible, names):
    library()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = open_meters().nvml
    assert (nvml and nvml.names) == names


def test_without_a_counter_energy_is_power_over_time(library):
    library(has_counter=False)
    with Meters(nvml=Nvml()).window() as window:
        pass
    reading = window.reading
    assert reading.gpu_joules == pytest.approx(200 * reading.seconds)
    assert reading.figures(1)["gpu_watts"] == pytest.approx(200)


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
    assert reading.figures(0)["joules_per_token"] is None
    assert Reading(4.0, gpu_joules=400.0).figures(100)["joules_per_token"] == 4
    assert cost_per_million_tokens(None, 50) is None and cost_per_million_tokens(1.0, 0.0) is None


def test_static_batches_are_metered_run_by_run(tmp_path, monkeypatch):
    """Each run takes 8 J for two rows of a prefill's token and three steps'."""
    monkeypatch.setattr(static_batches, "_PAUSE", 0.0)
    write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    drawn = [0]

    class Runner:
        name, precision, emulator = "a", "fp32", False

        def run(self, prompts, new_tokens):
            drawn[0] += 8
            write_zone(tmp_path, "intel-rapl:0", "package-0", drawn[0])
            return BatchRun(0.1, [0.1] * new_tokens, [[1, 1]] * (new_tokens + 1))

    schedule = Planner(range(10), 32).steps(2, 4, 3)
    for meters, expected in ((Meters(Rapl(tmp_path)), [1.0, 1.0]), (Meters(), None)):
        played = static_batches.play_batches({"a": Runner()}, schedule, 2, machine=Machine(meters=meters))
        (row,) = static_batches.steps_point(schedule, played, [Runner()])["rows"]
        assert row["figures"].get("joules_per_token") == expected and "gpu_watts" not in row["figures"]
