"""The weights as Hugging Face's model.safetensors: written, and read one tensor at a time.

ONNX graphs use the same bytes as their external data (`builder/onnx_export/external_data.py`).
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.model.gpt2 import GPT2, named_variables

_FICLONE = 0x40049409  # linux/fs.h; other systems refuse it, and the bytes are copied.


def write_safetensors(model: GPT2, path: Path) -> None:
    """Write the weights under their Hugging Face names (float32; the tied head is not stored a second time).

    One tensor at a time: the library's own writer takes all of them at once, in a second copy.
    """
    named = sorted(named_variables(model), key=lambda pair: pair[0])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, variable in named:
        begin, end = end, end + 4 * math.prod(variable.shape)
        header[name] = {"dtype": "F32", "shape": list(variable.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, variable in named:
            file.write(np.ascontiguousarray(variable, np.float32).data)


class WeightFile:
    """Tensors of a file that `write_safetensors` wrote, read one at a time into memory of their own.

    A mapping of the file would count as the process's memory page by page, until all of the weights do.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            self._header: dict[str, Any] = json.loads(file.read(header_bytes))
        self._start = 8 + header_bytes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._header[name]["shape"])

    def byte_range(self, name: str) -> tuple[int, int]:
        """Return the absolute (offset, length) in bytes of a tensor."""
        begin, end = self._header[name]["data_offsets"]
        return self._start + begin, end - begin

    def get_tensor(self, name: str) -> NDArray[np.float32]:
        """Return a tensor, float32 of its shape."""
        offset, length = self.byte_range(name)
        return np.fromfile(self._path, np.float32, length // 4, offset=offset).reshape(self.shape(name))


def clone_or_copy(source: Path, destination: Path) -> None:
    """Copy a file's bytes to a new file at `destination`, sharing its blocks where the file system can."""
    # Never written through: what is there may be another bundle's file under a second name.
    destination.unlink(missing_ok=True)
    with source.open("rb") as reader, destination.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            shutil.copyfileobj(reader, writer, 2**20)
