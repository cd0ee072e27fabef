"""Freed memory is kept inside the block, and given back behind it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# In a process of its own: thresholds that glibc has once been told stay.
_SCRIPT = """
import resource
from builder.training.glibc_heap import kept_heap

def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(256 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

use()
start = resident()
outside = use()
with kept_heap():
    use()
    inside, held = use(), resident() - start
print(outside, inside, held, resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_memory_is_not_asked_for_twice_and_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    outside, inside, held, left = (int(number) for number in done.stdout.split())
    assert inside * 4 < outside, (inside, outside)
    assert held > 200 << 20
    assert left < 50 << 20
