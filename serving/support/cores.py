"""How many cores this process may use."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

_SYSTEM = Path("/sys/devices/system/cpu")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return how many cores this process may use, which its CPU affinity may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """Return how many of the usable cores are separate: hardware threads of one core count once."""
    try:
        siblings = {
            (_SYSTEM / f"cpu{core}/topology/thread_siblings_list").read_text(encoding="ascii")
            for core in os.sched_getaffinity(0)
        }
    except (OSError, AttributeError, ValueError):
        return usable_cores()
    return len(siblings)


def core_quota() -> int | None:
    """Return how many cores' time the control group of this process may use, rounded up; None means no limit.

    Containers are limited by it: their affinity often still names all cores of the machine.
    """
    quotas = []
    try:
        lines = _OWN_GROUP.read_text(encoding="utf-8").splitlines()
        own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
        folder = _CONTROL_GROUPS / own
        for each in (folder, *folder.parents):
            if (each / "cpu.max").is_file():
                quotas.append((each / "cpu.max").read_text(encoding="ascii").split())
        first = _CONTROL_GROUPS / "cpu/cpu.cfs_quota_us"  # Version 1.
        if first.is_file():
            period = first.with_name("cpu.cfs_period_us")
            quotas.append([first.read_text(encoding="ascii").strip(), period.read_text(encoding="ascii").strip()])
        limits = [int(quota) / int(period) for quota, period in quotas if quota.isdigit()]
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return max(1, math.ceil(min(limits))) if limits else None


def thread_counts(replicas: int = 1) -> list[int]:
    """Return at most five thread counts that are worth a comparison for one of `replicas` engines.

    The usual one is first: a thread for each physical core, or fewer where a control group limits processor time.
    """
    usual = min(physical_cores(), core_quota() or physical_cores())
    halves = [usual >> shift for shift in range(1, usual.bit_length())]
    counts = dict.fromkeys(max(1, count // replicas) for count in (usual, usable_cores(), *halves))
    return list(counts)[:5]


def cpu_model() -> str:
    """The model's name with family and model numbers, since virtual machines often hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family, model = fields.get("cpu family"), fields.get("model")
    name = fields.get("model name", platform.machine())
    return f"{name} (family {family}, model {model})" if family and model else name
