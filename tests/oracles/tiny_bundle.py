"""A whole bundle of the fixture "bytes": real graphs, real weights, and a byte tokenizer of the same vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving.bundle import Geometry, Graph, Manifest, Provenance, TensorSpec, write_manifest
from tests.closed_form import byte_tokenizer
from tests.oracles.fixtures import keras_model


def trace_portable(model: Any) -> Any:
    """The portable graph, named as in the bundle."""
    from builder.onnx_export.kernels import PortableKernels
    from builder.onnx_export.trace import trace

    logits = ["batch_size", "sequence_length", model.geometry.vocab_size]
    return trace(model, PortableKernels, logits, "past_sequence_length", "total_sequence_length")


def trace_optimized(model: Any) -> Any:
    """The optimized graph, past and present of one length."""
    from builder.onnx_export.kernels import OptimizedKernels
    from builder.onnx_export.trace import trace

    logits = ["batch_size", 1, model.geometry.vocab_size]
    return trace(model, OptimizedKernels, logits, "max_sequence_length", "max_sequence_length")


def write_real_bundle(folder: Path) -> Manifest:
    """Export the fixture "bytes" to every graph of a bundle in `folder`."""
    from builder.model.safetensors_file import write_safetensors
    from builder.onnx_export.decode_loop_graph import write_loops
    from builder.onnx_export.external_data import write_graph
    from builder.onnx_export.sampling_graph import write_sampling_graph
    from builder.progress import Reporter
    from builder.recipe import ExportRecipe
    from builder.stages.export import servable

    model = keras_model("bytes")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str(), encoding="utf-8")
    write_safetensors(model, folder / "model.safetensors")
    write_graph(trace_portable(model), folder / "model.safetensors", folder / "onnx/model.onnx")
    optimized = write_graph(trace_optimized(model), folder / "model.safetensors", folder / "ort/fp32/model.onnx")
    write_loops(optimized, folder / "ort/fp32", model.geometry.vocab_size)
    write_sampling_graph(model.geometry.vocab_size, folder / "ort/choose/model.onnx")
    servable(model, folder, ExportRecipe(), Reporter()).save(folder / "savedmodel/1")
    return write_manifest(
        folder,
        name="bytes",
        model=model.geometry,
        graphs=graphs(model.geometry),
        provenance=Provenance(recipe={}, corpus_sha256="0" * 64, versions={}, seed=0),
        quality={},
        parity={},
        created="2025-01-31T12:00:00Z",
    )


def graphs(geometry: Geometry) -> dict[str, Graph]:
    """The bundle's graphs as the manifest describes them."""

    def onnx(path: str, padding: Any, cache: Any, past: str, present: str) -> Graph:
        ids = TensorSpec("int64", ("batch_size", "sequence_length"))
        inputs = {
            "input_ids": ids,
            "attention_mask": TensorSpec("int64", ("batch_size", "total_sequence_length")),
            "position_ids": ids,
        }
        outputs = {"logits": TensorSpec("float32", ("batch_size", "sequence_length", geometry.vocab_size))}
        for layer in range(geometry.n_layer):
            for part in ("key", "value"):
                sizes = ("batch_size", geometry.n_head)
                inputs[f"past_key_values.{layer}.{part}"] = TensorSpec("float32", (*sizes, past, geometry.head_dim))
                outputs[f"present.{layer}.{part}"] = TensorSpec("float32", (*sizes, present, geometry.head_dim))
        return Graph("onnx", path, "fp32", padding, cache, inputs, outputs)

    def tensorflow(signature: str) -> Graph:
        tokens = {"token_ids": TensorSpec("int32", ("batch", "length")), "lengths": TensorSpec("int32", ("batch",))}
        path = "savedmodel/1/saved_model.pb"
        return Graph("tensorflow", path, "fp32", "right", "static", tokens, tokens, signature=signature)

    return {
        "onnx/portable": onnx("onnx/model.onnx", "any", "concatenated", "past", "total"),
        "ort/fp32": onnx("ort/fp32/model.onnx", "right", "shared-buffer", "buffer", "buffer"),
        "ort/choose": Graph(
            "onnx",
            "ort/choose/model.onnx",
            "fp32",
            "any",
            "none",
            {"logits": TensorSpec("float32", ("batch_size", 1, geometry.vocab_size))},
            {"token": TensorSpec("int64", ("batch_size", 1))},
        ),
        "savedmodel/serving_default": tensorflow("serving_default"),
        "savedmodel/prefill": tensorflow("prefill"),
        "savedmodel/decode": tensorflow("decode"),
        "savedmodel/score": tensorflow("score"),
    }
