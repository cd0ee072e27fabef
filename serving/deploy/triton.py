"""A model repository of NVIDIA's Triton: the portable ONNX graph and the SavedModel, each for its backend."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from serving.bundle import Bundle, Graph, TensorSpec
from serving.errors import InputError

ONNX_GRAPH = "onnx/portable"
# The first that the bundle has; generate_text takes and gives text.
SIGNATURES = ("generate_text", "serving_default")
# Names of model_config.proto; INT8 and so on are prefixed.
_TYPES = {
    "bool": "BOOL",
    "string": "STRING",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "float64": "FP64",
}


def repository(bundle: Bundle) -> tuple[dict[str, str], dict[str, str]]:
    """(path to text, path to the bundle's file that is copied there), both below the repository.

    Raises InputError for a bundle that has neither graph.
    """
    graphs, name = bundle.manifest.graphs, bundle.manifest.name
    texts: dict[str, str] = {}
    copies: dict[str, str] = {}
    if (graph := graphs.get(ONNX_GRAPH)) is not None:
        texts[f"{name}_onnx/config.pbtxt"] = _config(f"{name}_onnx", "onnxruntime_onnx", graph)
        copies |= _copies(bundle, graph.path.rpartition("/")[0], f"{name}_onnx/1")
    graph = next((graphs[key] for each in SIGNATURES if (key := f"savedmodel/{each}") in graphs), None)
    if graph is not None:
        texts[f"{name}/config.pbtxt"] = _config(name, "tensorflow_savedmodel", graph)
        copies |= _copies(bundle, graph.path.rpartition("/")[0], f"{name}/1/model.savedmodel")
    if not texts:
        raise InputError(
            f"{bundle.folder}: has neither {ONNX_GRAPH} nor a SavedModel, which Triton could run; deploy another bundle"
        )
    return texts, copies


def _copies(bundle: Bundle, folder: str, target: str) -> dict[str, str]:
    found = [item.path for item in bundle.manifest.artifacts if item.path.startswith(folder + "/")]
    return {target + path.removeprefix(folder): path for path in found}


def _config(name: str, platform: str, graph: Graph) -> str:
    """A ModelConfig in protobuf's text format; without Triton's batching, so each shape is a whole one."""
    lines = [f"name: {json.dumps(name)}", f'platform: "{platform}"', "max_batch_size: 0"]
    lines += _tensors("input", graph.inputs)
    lines += _tensors("output", graph.outputs)
    # Triton does not keep the KV cache; the caller sends it. So any instance may take any call.
    lines += ["instance_group [ { count: 1 kind: KIND_AUTO } ]"]
    if graph.signature:
        value = f"{{ string_value: {json.dumps(graph.signature)} }}"
        lines.append(f'parameters {{ key: "TF_SIGNATURE_DEF" value: {value} }}')
    return "\n".join(lines) + "\n"


def _tensors(kind: str, specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    for name, spec in specs.items():
        dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in spec.shape)
        data_type = f"TYPE_{_TYPES.get(spec.dtype, spec.dtype.upper())}"
        yield f"{kind} [ {{ name: {json.dumps(name)} data_type: {data_type} dims: [ {dims} ] }} ]"
