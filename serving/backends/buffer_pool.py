"""A pool for large arrays: freed memory serves the next one.

New pages cost more than what is written to them: the caches of 16 rows of GPT-2 124M are 226 MB, which the system
clears before it gives them out, and a virtual machine may have to ask its host for them first.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Memory that exceeds the request by this factor is freed, so that a large batch's is not kept forever.
_LARGEST_EXCESS = 4


class SpareMemory:
    """Gives out arrays, and keeps the memory of the last one that nothing refers to any more.

    So it holds one array's memory at most that is not in use. Arrays that live at once never share memory.
    """

    def __init__(self) -> None:
        self._spare: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of this shape with anything in it: what was there before, or not-a-number."""
        size = int(np.prod(shape)) * dtype.itemsize
        try:
            # One step, so that of two threads only one gets it.
            memory: NDArray[np.uint8] | None = self._spare.pop()
        except IndexError:
            memory = None
        if memory is None or not size <= memory.size <= _LARGEST_EXCESS * size:
            memory = None  # Lets go of it before there is a second one.
            memory = np.empty(size, np.uint8)
        lease = _Lease(memory)
        weakref.finalize(lease, self._give, memory).atexit = False
        array: NDArray[Any] = np.asarray(lease)[:size].view(dtype).reshape(shape)
        return array

    def _give(self, memory: NDArray[np.uint8]) -> None:
        self._spare[:] = [memory]


class _Lease:
    """The base of the returned array and of all its views."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.__array_interface__ = memory.__array_interface__
