"""Tensors of the Open Inference Protocol: their types, and their forms in JSON and as raw bytes.

Raw bytes are little-endian, row by row; an element of BYTES has its length before it in four bytes (Triton's
extension_binary_data.md).
"""

from __future__ import annotations

import math
import reprlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError
from serving.protocols.json_requests import number_array
from serving.server.request_bodies import MAX_VALUES

TYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
"""numpy's types by the protocol's names; an element of BYTES is a `bytes`."""
MAX_AXES = 8
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a signature takes or gives: its type, its number of axes, and whether it may be left out."""

    datatype: str
    rank: int = 1
    optional: bool = False


def checked_size(name: str, datatype: str, shape: Sequence[int]) -> int:
    """How many elements a tensor of `shape` has. Raises InputError for what no tensor can be."""
    if datatype not in TYPES:
        raise InputError(f"{name} has the datatype {datatype[:40]!r}; there are {', '.join(TYPES)}")
    if len(shape) > MAX_AXES or any(size < 0 for size in shape):
        raise InputError(f"{name} has no shape that a tensor can have")
    size = math.prod(shape)
    if datatype == "BYTES" and size > MAX_VALUES:
        raise InputError(f"{name} has {size} elements; a tensor of BYTES may have {MAX_VALUES}")
    return size


def _shaped(name: str, array: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    try:
        return array.reshape(tuple(shape))
    except (ValueError, OverflowError):  # Too many values for numpy, though one of its axes is empty.
        raise InputError(f"{name} has no shape that a tensor can have") from None


def from_values(name: str, datatype: str, shape: Sequence[int], data: Any) -> NDArray[Any]:
    """A tensor from JSON's values, in one list or in lists nested as `shape` is. Raises InputError."""
    size = checked_size(name, datatype, shape)
    values = data
    while isinstance(values, list) and any(isinstance(each, list) for each in values):
        if not all(isinstance(each, list) for each in values):
            raise InputError(f"{name} has lists and values side by side")
        values = [element for row in values for element in row]
    if not isinstance(values, list):
        raise InputError(f"data of {name} must be a list")
    if len(values) != size:
        raise InputError(f"{name} has {len(values)} values, and its shape {list(shape)} needs {size}")
    kind = TYPES[datatype]
    numbers = number_array(values, kind) if issubclass(kind, np.number) else None
    if numbers is not None:
        return _shaped(name, numbers, shape)
    array = np.empty(size, kind)
    array[:] = [_element(name, datatype, value) for value in values]
    return _shaped(name, array, shape)


def _element(name: str, datatype: str, value: Any) -> Any:
    kind = TYPES[datatype]
    if datatype == "BYTES":
        if isinstance(value, str):
            return value.encode("utf-8", "replace")
        raise InputError(f"{name} must hold text, and has {reprlib.repr(value)}")
    if datatype == "BOOL":
        if isinstance(value, bool):
            return value
        raise InputError(f"{name} must hold true and false, and has {reprlib.repr(value)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must hold numbers, and has {reprlib.repr(value)}")
    if issubclass(kind, np.floating):
        return _float(kind, value)
    limits = np.iinfo(kind)
    if not isinstance(value, int) or not limits.min <= value <= limits.max:
        raise InputError(f"{name} must hold integers of {datatype}, and has {reprlib.repr(value)}")
    return value


def _float(kind: Any, value: int | float) -> Any:
    """What is beyond `kind` becomes infinite, which the receiver refuses."""
    try:
        with np.errstate(over="ignore"):
            return kind(value)
    except OverflowError:
        return kind(np.inf)


def from_raw(name: str, datatype: str, shape: Sequence[int], data: bytes) -> NDArray[Any]:
    """A tensor from its raw bytes. Raises InputError."""
    size = checked_size(name, datatype, shape)
    if datatype == "BYTES":
        return _shaped(name, _strings(name, size, data), shape)
    kind = np.dtype(TYPES[datatype])
    if len(data) != size * kind.itemsize:
        raise InputError(f"{name} has {len(data)} bytes, and its shape and type need {size * kind.itemsize}")
    if datatype == "BOOL":  # Another byte than 0 and 1 is not a bool of numpy's.
        return _shaped(name, np.frombuffer(data, np.uint8) != 0, shape)
    return _shaped(name, np.frombuffer(data, kind.newbyteorder("<")), shape)


def _strings(name: str, size: int, data: bytes) -> NDArray[Any]:
    values: list[bytes] = []
    at = 0
    while at < len(data) and len(values) <= size:
        begin = at + _LENGTH.size
        at = begin + (_LENGTH.unpack_from(data, at)[0] if begin <= len(data) else 0)
        if at > len(data) or begin > len(data):
            raise InputError(f"{name} ends inside an element: each is its length in 4 bytes and then its bytes")
        values.append(data[begin:at])
    if len(values) != size:
        many = f"more than {size}" if len(values) > size else str(len(values))
        raise InputError(f"{name} has {many} elements, and its shape needs {size}")
    array = np.empty(size, np.object_)
    array[:] = values
    return array


def to_raw(array: NDArray[Any]) -> bytes:
    """The raw bytes of a tensor."""
    if array.dtype == np.object_:
        return b"".join(_LENGTH.pack(len(each)) + each for each in array.reshape(-1).tolist())
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()


def to_values(array: NDArray[Any]) -> list[Any]:
    """The values for JSON in one list, row by row; bytes that are not UTF-8 become replacement characters."""
    return [plain(each) for each in array.reshape(-1).tolist()]


def plain(value: Any) -> Any:
    """`value`, bytes as text, in lists too."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
