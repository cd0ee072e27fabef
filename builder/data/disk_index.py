"""A multimap of 64-bit numbers on the disk, for looking up many keys at once in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint64]

# Rows of 16 bytes: how many are kept in memory before they become a file, and how many are read at a time.
_ROWS = 1 << 18
_PAIRS = 1 << 20
_ROW_BYTES = 16


class DiskIndex:
    """Pairs of a key and a value, in files sorted by key: a log-structured merge tree (O'Neil and others, 1996).

    Every file is at least twice as long as the next, so a pair is rewritten a logarithmic number of times. A look-up
    reads the files from end to end. For thousands of keys at once, that is cheap compared with work on the texts.
    Memory holds some 20 MB however many pairs there are, the disk 16 bytes a pair (twice that during a merge).
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name, self._written = folder, name, 0
        self._recent: list[Numbers] = []
        self._runs: list[Path] = []

    def add(self, keys: Numbers, values: Numbers) -> None:
        """Add pairs, both uint64 [n]."""
        if len(keys) == 0:
            return
        self._recent.append(np.stack([keys, values], axis=1))
        if sum(map(len, self._recent)) < _ROWS:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._new_path()
        _sorted(self._recent).tofile(path)
        self._recent = []
        self._runs.append(path)
        while len(self._runs) > 1 and self._runs[-2].stat().st_size < 2 * self._runs[-1].stat().st_size:
            merged, pair = self._new_path(), self._runs[-2:]
            _merge(pair[0], pair[1], merged)
            self._runs[-2:] = [merged]
            for path in pair:
                path.unlink()

    def find(self, keys: Numbers) -> Iterator[tuple[NDArray[np.intp], Numbers]]:
        """Yield (positions in `keys`, values) of the pairs whose key is among `keys`, about a million at a time."""
        if len(keys) == 0:
            return
        order = np.argsort(keys, kind="stable")
        wanted = keys[order]
        if self._recent:
            self._recent = [_sorted(self._recent)]
        for rows in self._slices():
            begin = np.searchsorted(wanted, rows[0, 0], "left")
            end = np.searchsorted(wanted, rows[-1, 0], "right")
            stored = np.ascontiguousarray(rows[:, 0])
            low = np.searchsorted(stored, wanted[begin:end], "left")
            counts = np.searchsorted(stored, wanted[begin:end], "right") - low
            hits = np.flatnonzero(counts)
            # Many equal keys on both sides make far more pairs than rows.
            for part in np.split(hits, np.flatnonzero(np.diff(np.cumsum(counts[hits]) // _PAIRS)) + 1):
                if len(part):
                    places = np.concatenate([np.arange(low[hit], low[hit] + counts[hit]) for hit in part])
                    yield np.repeat(order[begin + part], counts[part]), rows[places, 1]

    def _slices(self) -> Iterator[Numbers]:
        for path in self._runs:
            yield from _read(path)
        yield from self._recent

    def _new_path(self) -> Path:
        self._written += 1
        return self._folder / f"{self._name}.{self._written}"


def _sorted(parts: list[Numbers]) -> Numbers:
    rows = np.concatenate(parts)
    return rows[np.argsort(rows[:, 0], kind="stable")]


def _read(path: Path) -> Iterator[Numbers]:
    """The rows of a file, some at a time; never an empty array."""
    for start in range(0, path.stat().st_size, _ROWS * _ROW_BYTES):
        yield np.fromfile(path, np.uint64, 2 * _ROWS, offset=start).reshape(-1, 2)


def _merge(first: Path, second: Path, target: Path) -> None:
    sources = [_read(first), _read(second)]
    parts: list[Numbers] = [next(source) for source in sources]
    more = [True, True]
    with target.open("wb") as file:
        while any(map(len, parts)):
            # Rows up to the first end of a part that continues can be written: none that comes later is smaller.
            ends = [part[-1, 0] for part, on in zip(parts, more, strict=True) if on and len(part)]
            cuts = [np.searchsorted(part[:, 0], min(ends), "right") if ends else len(part) for part in parts]
            _sorted([part[:cut] for part, cut in zip(parts, cuts, strict=True)]).tofile(file)
            parts = [part[cut:] for part, cut in zip(parts, cuts, strict=True)]
            for index, source in enumerate(sources):
                if more[index] and not len(parts[index]):
                    following = next(source, None)
                    more[index] = following is not None
                    parts[index] = parts[index] if following is None else following
