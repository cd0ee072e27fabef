"""Freed memory, kept by the process for its next use.

A training step allocates and frees as much as all weights, optimizer states and logits take. glibc gives blocks of that
size back to the system at once, which hands them out again page by page, each cleared again.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = (1 << 31) - 1
# Where glibc lets its own thresholds grow to on 64 bits, and how many mappings it makes by default.
_MMAP_THRESHOLD, _MMAP_MAX = 32 << 20, 65536


@contextlib.contextmanager
def kept_heap() -> Iterator[None]:
    """Give no freed memory back to the system inside the block, and all that is free after it.

    Does nothing where the C library is not glibc.
    """
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _MMAP_THRESHOLD)
        library.malloc_trim(0)
