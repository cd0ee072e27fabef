"""Write a bundle's weights, geometry and tokenizer to one GGUF file."""

from __future__ import annotations

import math
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from serving.bundle import Bundle, Geometry
from serving.bundle.plain_files import open_plain
from serving.bundle.publishing import sync_folder
from serving.bundle.strict_json import loads, refuse
from serving.errors import BundleError, InputError
from serving.gguf.encodings import ENCODINGS, Encoding
from serving.gguf.file_format import MAGIC, Tensor, Value, write
from serving.gguf.vocabulary import vocabulary

OUTTYPES = tuple(ENCODINGS)
_WEIGHTS = "model.safetensors"
_QUANTIZATION_VERSION = 2
_PART = 1 << 22
"""Weights that are read and encoded at once."""
# GGUF's name, and the number of widths of the output, for the layers of a block.
_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(bundle: Bundle, path: Path, outtype: str = "f32", tokenizer: Mapping[str, Value] | None = None) -> None:
    """Write `bundle` as the GGUF file `path`, in one rename, in place of an older GGUF file.

    `outtype` is the encoding of the matrices; vectors and positions stay in float32. `tokenizer` are the keys to write
    instead of `vocabulary(bundle)`. Raises InputError for a path that holds something else or lies in the bundle,
    and for sizes that the encoding cannot hold; BundleError for a model or tokenizer that llama.cpp cannot run.
    """
    encoding = ENCODINGS[outtype]
    model = bundle.manifest.model
    _check_path(bundle, path)
    if model.activation_function != "gelu_new":
        raise BundleError(
            f"{bundle.folder}: the activation function is {model.activation_function!r}, but llama.cpp's GPT-2 has "
            "'gelu_new' alone; use the ONNX graphs or the SavedModel"
        )
    if model.n_embd % encoding.block or model.n_inner % encoding.block:
        raise InputError(
            f"{outtype} needs widths that {encoding.block} divides, but {bundle.folder} has {model.n_embd} and "
            f"{model.n_inner}; choose f32 or f16"
        )
    metadata = {**_geometry(bundle, encoding), **(vocabulary(bundle) if tokenizer is None else tokenizer)}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with open_plain(bundle.path(_WEIGHTS)) as weights, draft.open("xb") as file:
            write(file, metadata, list(_tensors(bundle, weights, encoding)))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def _check_path(bundle: Bundle, path: Path) -> None:
    if path.resolve().is_relative_to(bundle.folder.resolve()):
        raise InputError(f"{path}: a bundle holds the files of its manifest alone; choose a place outside of it")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file, such as {bundle.manifest.name}.gguf")
    if path.exists():
        with open_plain(path) as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise InputError(f"{path}: holds something else than GGUF, which would be lost; choose another name")


def _geometry(bundle: Bundle, encoding: Encoding) -> dict[str, Value]:
    model = bundle.manifest.model
    return {
        "general.architecture": "gpt2",
        "general.name": bundle.manifest.name,
        "general.file_type": encoding.file_type,
        "general.quantization_version": _QUANTIZATION_VERSION,
        "gpt2.vocab_size": model.vocab_size,
        "gpt2.context_length": model.n_positions,
        "gpt2.embedding_length": model.n_embd,
        "gpt2.block_count": model.n_layer,
        "gpt2.feed_forward_length": model.n_inner,
        "gpt2.attention.head_count": model.n_head,
        "gpt2.attention.layer_norm_epsilon": model.layer_norm_epsilon,
    }


def _shapes(model: Geometry) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(Hugging Face's name, GGUF's name, the shape in model.safetensors) of each tensor."""
    width, inner = model.n_embd, model.n_inner
    outer = {"wte": ("token_embd", model.vocab_size), "wpe": ("position_embd", model.n_positions)}
    for name, (theirs, rows) in outer.items():
        yield f"transformer.{name}.weight", f"{theirs}.weight", (rows, width)
    sizes = {
        "ln_1": (width,),
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "ln_2": (width,),
        "mlp.c_fc": (width, inner),
        "mlp.c_proj": (inner, width),
    }
    for layer in range(model.n_layer):
        for name, shape in sizes.items():
            theirs = f"blk.{layer}.{_BLOCK[name]}"
            yield f"transformer.h.{layer}.{name}.weight", f"{theirs}.weight", shape
            yield f"transformer.h.{layer}.{name}.bias", f"{theirs}.bias", shape[-1:]
    for kind in ("weight", "bias"):
        yield f"transformer.ln_f.{kind}", f"output_norm.{kind}", (width,)


def _tensors(bundle: Bundle, weights: BinaryIO, encoding: Encoding) -> Iterator[Tensor]:
    """GGUF's tensors. The projections of a block are stored [in, out] and turned to GGUF's [out, in]."""
    header, start = _header(bundle, weights)
    size = os.fstat(weights.fileno()).st_size
    for name, theirs, shape in _shapes(bundle.manifest.model):
        entry = header.get(name)
        fields = (entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")) if isinstance(entry, dict) else ()
        match fields:
            case ("F32", list(stored), [int(begin), int(end)]) if (
                tuple(stored) == shape and begin >= 0 and end - begin == 4 * math.prod(shape) and start + end <= size
            ):
                pass
            case _:
                raise refuse(str(bundle.folder), f"{_WEIGHTS} has no {name} of float32 {list(shape)}")
        turned = theirs.startswith("blk.") and len(shape) == 2
        quantized = len(shape) == 2 and not theirs.startswith("position_embd")
        used = encoding if quantized else ENCODINGS["f32"]
        rows = _rows(weights, start + begin, shape, turned, used)
        yield Tensor(theirs, shape[::-1] if turned else shape, used, rows)


def _header(bundle: Bundle, weights: BinaryIO) -> tuple[dict[str, object], int]:
    """The table of a safetensors file and the place where its data begins."""
    where = str(bundle.folder / _WEIGHTS)
    head = weights.read(8)
    (length,) = struct.unpack("<Q", head) if len(head) == 8 else (0,)
    if not 0 < length <= os.fstat(weights.fileno()).st_size - 8:
        raise refuse(str(bundle.folder), f"{_WEIGHTS} is not a safetensors file")
    table = loads(weights.read(min(length, 1 << 25)), where)
    if not isinstance(table, dict):
        raise refuse(str(bundle.folder), f"{_WEIGHTS} is not a safetensors file")
    return table, 8 + length


def _rows(
    weights: BinaryIO, offset: int, shape: tuple[int, ...], turned: bool, encoding: Encoding
) -> Callable[[], Iterator[bytes]]:
    def rows() -> Iterator[bytes]:
        if turned:
            matrix = _read(weights, offset, math.prod(shape)).reshape(shape)
            yield encoding.encode(np.ascontiguousarray(matrix.T))
            return
        width = shape[-1]
        step = max(1, _PART // width) * width
        for place in range(0, math.prod(shape), step):
            yield encoding.encode(_read(weights, offset + 4 * place, min(step, math.prod(shape) - place)))

    return rows


def _read(weights: BinaryIO, offset: int, count: int) -> NDArray[np.float32]:
    values = np.empty(count, "<f4")
    weights.seek(offset)
    view = values.data.cast("B")
    place = 0
    while place < len(view):
        got = weights.readinto(view[place:])  # type: ignore[attr-defined]
        if not got:
            raise BundleError(f"{_WEIGHTS} became shorter while it was read; export it again")
        place += got
    return values
