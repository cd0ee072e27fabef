"""A bundle without its weights, small enough to carry anywhere, and weights made up again where it arrives.

`strip` draws weights from a seed, keeps their hashes in the manifest and leaves them out; `fill` draws them again. The
fp16 graph's are the same values cast. Values say nothing but the geometry: deviation 0.02, gains 1, biases 0.
Needs numpy alone to fill, onnx to strip. The SavedModel and other precisions are left out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common.standalone import run
from serving.bundle import MANIFEST_NAME, open_bundle
from serving.errors import InputError

_RECIPE = "weights.json"
_SAFETENSORS = "model.safetensors"
# Files of the same bytes, and that of their casts.
_FP32 = frozenset({_SAFETENSORS, "onnx/model.onnx_data", "ort/fp32/model.onnx_data"})
_FP16 = "ort/fp16/model.onnx_data"
_LEFT_OUT = ("savedmodel/", "ort/int8/", "ort/int4/", "deploy/", "ort/fp32/genai", "ort/fp16/genai")


@click.group()
def main() -> None:
    """Carry a bundle's graphs without its weights."""


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def strip(bundle: Path, output: Path, seed: int) -> None:
    """Write BUNDLE's graphs and a recipe for weights to the new folder OUTPUT."""
    opened = open_bundle(bundle, check="sizes")
    if output.exists():
        raise InputError(f"{output} exists; name a new folder")
    manifest = json.loads((bundle / MANIFEST_NAME).read_text(encoding="utf-8"))
    manifest["artifacts"] = [each for each in manifest["artifacts"] if not each["path"].startswith(_LEFT_OUT)]
    manifest["graphs"] = {
        name: graph for name, graph in manifest["graphs"].items() if not graph["path"].startswith(_LEFT_OUT)
    }
    paths = {each["path"] for each in manifest["artifacts"]}
    with opened.path(_SAFETENSORS).open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = file.read(size).decode()
    recipe: dict[str, Any] = {"seed": seed, "header": header, "fp16": None}
    if _FP16 in paths:
        recipe["fp16"] = _cast_spans(opened.path("ort/fp16/model.onnx"), opened.path(_FP16), bundle, header)
    weights = {*_FP32, _FP16} & paths
    output.mkdir(parents=True)
    for path in paths - weights:
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / path, output / path)
    (output / _RECIPE).write_text(json.dumps(recipe), encoding="utf-8")
    for each in manifest["artifacts"]:
        if each["path"] in weights:
            parts = _fp16(recipe) if each["path"] == _FP16 else _fp32(recipe)
            digest, length = hashlib.sha256(), 0
            for part in parts:
                digest.update(part)
                length += len(part)
            each |= {"size": length, "sha256": digest.hexdigest()}
    (output / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def fill(folder: Path) -> None:
    """Make FOLDER, which strip wrote, a bundle; its hashes are checked."""
    try:
        recipe = json.loads((folder / _RECIPE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {_RECIPE}; it is not what strip wrote, or is filled") from None
    manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    for path in {each["path"] for each in manifest["artifacts"]} & {*_FP32, _FP16}:
        with (folder / path).open("wb") as file:
            for part in _fp16(recipe) if path == _FP16 else _fp32(recipe):
                file.write(part)
    (folder / _RECIPE).unlink()
    open_bundle(folder)


def _tensors(recipe: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and float32 arrays in the order of the file; each has a stream of its own (PCG64)."""
    header = json.loads(recipe["header"])
    header.pop("__metadata__", None)
    places = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    for index, (name, place) in enumerate(places):
        shape = place["shape"]
        if name.endswith("bias"):
            yield name, np.zeros(shape, np.float32)
        elif ".ln_" in name:
            yield name, np.ones(shape, np.float32)
        else:
            # Uniform, as exact products of random bits: the same on every processor. Deviation 0.02.
            random = np.random.Generator(np.random.PCG64([recipe["seed"], index]))
            yield name, (random.random(shape, np.float32) - np.float32(0.5)) * np.float32(0.02 * 12**0.5)


def _fp32(recipe: dict[str, Any]) -> Iterator[bytes]:
    """The bytes of the safetensors file, whose tensors lie without gaps."""
    header = recipe["header"].encode()
    yield struct.pack("<Q", len(header)) + header
    for _, array in _tensors(recipe):
        yield array.tobytes()


def _fp16(recipe: dict[str, Any]) -> Iterator[bytes]:
    """The bytes of the fp16 graph's data file: casts at their places, zeros between."""
    arrays = {name: array.astype(np.float16) for name, array in _tensors(recipe)}
    end = 0
    for offset, name, transposed in recipe["fp16"]["spans"]:
        yield bytes(offset - end)
        part = (arrays[name].T if transposed else arrays[name]).tobytes()
        yield part
        end = offset + len(part)
    yield bytes(recipe["fp16"]["size"] - end)


def _cast_spans(graph: Path, data: Path, bundle: Path, header: str) -> dict[str, Any]:
    """[offset, tensor, transposed] of each span of `data`, which must be the cast of a tensor of model.safetensors."""
    import onnx

    places = json.loads(header)
    start = 8 + len(header.encode())
    arrays = np.memmap(bundle / _SAFETENSORS, np.uint8, "r")
    halves = {}
    for name, place in places.items():
        if name != "__metadata__":
            begin, end = place["data_offsets"]
            array = arrays[start + begin : start + end].view("<f4").reshape(place["shape"]).astype(np.float16)
            halves[hashlib.sha256(array.tobytes()).hexdigest()] = (name, False)
            if array.ndim == 2:
                halves[hashlib.sha256(array.T.tobytes()).hexdigest()] = (name, True)
    content = np.memmap(data, np.uint8, "r")
    spans = []
    for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            offset, length = int(entries["offset"]), int(entries["length"])
            digest = hashlib.sha256(content[offset : offset + length].tobytes()).hexdigest()
            if digest not in halves:
                raise InputError(f"{graph}: {tensor.name} is no cast of a tensor of {_SAFETENSORS}")
            # Equal tensors, such as untrained biases, are of one kind and shape, so that any of their names will do.
            spans.append([offset, *halves[digest]])
    return {"spans": sorted(spans), "size": len(content)}


if __name__ == "__main__":
    run(main)
