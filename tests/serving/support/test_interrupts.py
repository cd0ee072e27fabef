"""Ctrl-C that Python itself drops is heard at the next step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from serving.support.interrupts import check_interrupt, remembered_interrupts


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    """Python's own handler, which is not there where the tests run in a shell's background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


class Swallows:
    """Python prints what a finaliser raises, and goes on."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_in_a_finaliser_is_raised_at_the_next_check() -> None:
    with remembered_interrupts():
        check_interrupt()
        Swallows()
        with pytest.raises(KeyboardInterrupt):
            check_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_next_command_starts_without_it() -> None:
    with remembered_interrupts(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with remembered_interrupts():
        check_interrupt()


def test_a_handler_of_others_stays() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with remembered_interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
