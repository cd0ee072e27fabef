"""Calls that go on when their callers leave: every try is heard of once, by its caller or by `late`."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from serving.clients.outliving_calls import OutlivingCalls


def test_what_its_caller_waits_for_is_not_late() -> None:
    late: list[int | None] = []
    calls = OutlivingCalls(lambda: 7, late.append)
    calls.start()
    assert calls.wait(10) == 7
    calls.leave()
    assert not late

    def fails() -> int:
        raise OSError("away")

    calls = OutlivingCalls(fails, late.append)
    calls.start()
    with pytest.raises(OSError, match="away"):
        calls.wait(10)
    calls.leave()
    assert not late


@pytest.mark.parametrize("before", [True, False])
def test_a_try_that_ends_unheard_is_late(before: bool) -> None:
    """Before its caller leaves, though after it stopped waiting; or after."""
    go, heard, late = threading.Event(), threading.Event(), list[int | None]()

    def send() -> int:
        assert go.wait(10)
        return 7

    def take(value: int | None) -> None:
        late.append(value)
        heard.set()

    calls = OutlivingCalls(send, take)
    calls.start()
    with pytest.raises(TimeoutError):
        calls.wait(0.01)
    if before:
        go.set()
        time.sleep(0.1)
        calls.leave()
    else:
        calls.leave()
        go.set()
    assert heard.wait(10) and late == [7]


def test_a_program_that_ends_lets_its_calls_end() -> None:
    code = """
import time
from serving.clients.outliving_calls import OutlivingCalls
OutlivingCalls(lambda: (time.sleep(1), print("ended"))).start()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "ended\n" and not ran.stderr
