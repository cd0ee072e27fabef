"""The bytes of a GGUF file, version 3: a header, typed metadata, the table of tensors, and their data.

Specification: `docs/gguf.md` of ggml. Everything is little-endian; the data of each tensor begins at a multiple of 32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from serving.gguf.encodings import Encoding

MAGIC = b"GGUF"
_VERSION, _ALIGNMENT = 3, 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
Value = str | bool | int | float | Sequence[str] | Sequence[int]
"""A whole number is written as uint32, a list of them as int32."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file; `rows` gives its encoded bytes in parts, in order."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    rows: Callable[[], Iterable[bytes]]

    @property
    def size(self) -> int:
        """Bytes of the encoded tensor."""
        return math.prod(self.shape) // self.encoding.block * self.encoding.block_bytes


def write(file: BinaryIO, metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> None:
    """Write the whole file; the data of one tensor is in memory at a time. Raises ValueError for a value of no type."""
    head = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_text(key), _typed(value)]
    offset = 0
    for tensor in tensors:
        # GGML counts dimensions from the innermost one.
        sizes = tensor.shape[::-1]
        head += [_text(tensor.name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        head.append(struct.pack("<IQ", tensor.encoding.ggml_type, offset))
        offset += tensor.size + _padding(tensor.size)
    data = b"".join(head)
    file.write(data + bytes(_padding(len(data))))
    for tensor in tensors:
        written = sum(file.write(part) for part in tensor.rows())
        assert written == tensor.size, (tensor.name, written, tensor.size)
        file.write(bytes(_padding(written)))


def _padding(size: int) -> int:
    return -size % _ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _typed(value: Value) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
        case str():
            return struct.pack("<I", _STRING) + _text(value)
    items = list(value)
    if all(isinstance(each, str) for each in items):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(items)) + b"".join(_text(str(each)) for each in items)
    if all(isinstance(each, int) for each in items):
        return struct.pack(f"<IIQ{len(items)}i", _ARRAY, _INT32, len(items), *items)
    raise ValueError(f"GGUF has no type here for {value!r}")
