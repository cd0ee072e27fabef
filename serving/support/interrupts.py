"""Ctrl-C that is not lost: Python drops the exception where it cannot go on, in a finaliser or a native callback."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_pressed = False


@contextlib.contextmanager
def remembered_interrupts() -> Iterator[None]:
    """While the block runs, remember Ctrl-C and raise KeyboardInterrupt, so that `check_interrupt` can report it."""
    global _pressed
    _pressed = False
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # Whoever runs this as a library has said what Ctrl-C does.
        return

    def remember(number: int, frame: object) -> None:
        global _pressed
        _pressed = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed before; long work calls it between its steps."""
    if _pressed:
        raise KeyboardInterrupt
