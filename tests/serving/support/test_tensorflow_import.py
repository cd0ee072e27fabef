"""Importing a large native library without noise, and without an interrupt tearing it."""

from __future__ import annotations

import os
import signal

import pytest

from serving.support.tensorflow_import import deferred_interrupt, quiet_stderr


def test_an_interrupt_waits_for_the_end_of_the_block():
    before = signal.getsignal(signal.SIGINT)
    reached = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("end")
    assert reached == ["end"]
    assert signal.getsignal(signal.SIGINT) is before


def test_without_an_interrupt_nothing_is_raised():
    with deferred_interrupt():
        pass


def test_what_was_written_is_shown_only_if_the_block_fails(capfd):
    with quiet_stderr():
        os.write(2, b"banner\n")
    assert capfd.readouterr().err == ""
    with pytest.raises(OSError, match="broken"), quiet_stderr():
        os.write(2, b"the reason\n")
        raise OSError("broken")
    assert capfd.readouterr().err == "the reason\n"
