"""TensorFlow, imported without the banners about devices that it prints into a user's terminal.

They are written to the standard error stream before any of its log levels is read, so the stream itself is set aside
for the time of the import, and shown after all if the import fails.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator

# What TensorFlow logs later; what fails is raised as an exception all the same.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Set the process's standard error stream aside; show what was written there if the block raises."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except Exception:  # Not for Ctrl-C, which has nothing to explain.
            aside.seek(0)
            os.write(kept, aside.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended: in the middle of a native import it turns into other errors."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)
    if pressed:
        raise KeyboardInterrupt


with deferred_interrupt(), quiet_stderr():
    import tensorflow as tf

tf.get_logger().setLevel("ERROR")

__all__ = ["deferred_interrupt", "quiet_stderr", "tf"]
