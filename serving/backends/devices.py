"""Where a session runs, by name, and what ONNX Runtime's CUDA provider is told. Needs no runtime itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from serving.errors import InputError
from serving.support.suggestions import did_you_mean

DEVICES = ("cpu", "cuda")
# One captured graph serves all batches up to its size, the rest of its rows being padding.
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CAPACITY_STEP = 128


def parse_device(name: str) -> tuple[str, int]:
    """ "cpu", "cuda" or "cuda:N" as kind and number. Raises InputError for anything else."""
    kind, colon, number = name.partition(":")
    if kind not in DEVICES or (colon and (kind == "cpu" or not number.isdecimal())):
        hint = did_you_mean(kind, DEVICES)
        raise InputError(f"no device {name!r}{hint}; it is 'cpu', 'cuda' or 'cuda:' and the number of a GPU")
    return kind, int(number or 0)


def parse_devices(names: str | Iterable[str]) -> tuple[str, ...]:
    """Devices from one text or several, each a list with commas. Raises InputError as `parse_device` does."""
    texts = [names] if isinstance(names, str) else list(names)
    devices = tuple(name.strip() for text in texts for name in text.split(","))
    for device in devices:
        parse_device(device)
    return devices


def cuda_options(number: int, graphs: bool = False) -> dict[str, Any]:
    """Options of the CUDA provider for GPU `number`; with `graphs`, runs are captured and replayed.

    Products of float32 stay float32 (no TF32), memory is taken as asked for and not in powers of two, and all runs of a
    session are in one stream, so that steps which do not wait for each other on the host still come in order.
    """
    return {
        "device_id": str(number),
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "use_ep_level_unified_stream": "1",
        "enable_cuda_graph": "1" if graphs else "0",
    }


def batch_bucket(rows: int) -> int:
    """The smallest bucket that holds `rows`; more than the largest one are their own."""
    return next((size for size in BATCH_BUCKETS if size >= rows), rows)


def capacity_bucket(capacity: int, n_positions: int) -> int:
    """`capacity` rounded up to a multiple of 128, or to the whole context."""
    return min(n_positions, -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP)
