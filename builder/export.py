"""The export stage: trained weights to a draft of the bundle, complete but for its certificate."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from builder.base import load_weights, read_geometry
from builder.byte_pair_tables import problem
from builder.calibrate import Calibration, calibration_texts
from builder.choose_graph import write_choose
from builder.frameworks import tf
from builder.genai import write_genai
from builder.gpt2 import GPT2
from builder.lint import Target, lint, refuse_errors
from builder.loop_graph import write_loops
from builder.onnx_kernels import OptimisedKernels, PortableKernels
from builder.progress import Reporter
from builder.recipe import ExportRecipe, Recipe, VerifyRecipe
from builder.savedmodel import Servable
from builder.tf_tokenizer import GraphTokenizer
from builder.tokenizer import load_tokenizer, tokenizer_folder_files
from builder.tracing import trace
from builder.variants import PRECISIONS, write_variant
from builder.warmup import write_warmup
from builder.weights import clone_or_copy, write_graph
from serving.bundle import Bundle, Graph, Provenance, TensorSpec, open_bundle, write_manifest
from serving.tf_serving_config import config_files

GOLDEN = "golden.json"
_PACKAGES = ("tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "numpy", "tokenizers", "safetensors")


def load_model(folder: Path) -> GPT2:
    """Return the Keras model of a folder with config.json and model.safetensors."""
    model = GPT2.create(read_geometry(folder))
    load_weights(model, folder)
    return model


def export(
    recipe: Recipe, prepared: Path, trained: Path, draft: Path, quality: Mapping[str, float], reporter: Reporter
) -> Bundle:
    """Write every graph of the model in `trained` into `draft`, with a manifest that says parity is not verified.

    `draft` must be an empty folder. Returns it opened as a bundle.
    """
    model = load_model(trained)
    geometry = model.geometry
    for file in tokenizer_folder_files(prepared / "tokenizer"):
        shutil.copyfile(file, draft / file.name)
    shutil.copyfile(trained / "config.json", draft / "config.json")
    weights = draft / "model.safetensors"
    clone_or_copy(trained / weights.name, weights)

    graphs: dict[str, Graph] = {}
    logits: list[str | int] = ["batch_size", "sequence_length", geometry.vocab_size]
    portable = trace(model, PortableKernels, logits, "past_sequence_length", "total_sequence_length")
    written = write_graph(portable, weights, draft / "onnx" / "model.onnx")
    graphs["onnx/portable"] = _onnx_graph(written, "onnx/model.onnx", "any", "concatenated")
    reporter.line("exported onnx/model.onnx (portable, fp32)")

    logits = ["batch_size", 1, geometry.vocab_size]
    optimised = trace(model, OptimisedKernels, logits, "max_sequence_length", "max_sequence_length")
    written = write_graph(optimised, weights, draft / "ort" / "fp32" / "model.onnx")
    write_genai(geometry, draft, draft / "ort" / "fp32")
    write_loops(written, draft / "ort" / "fp32", geometry.vocab_size)
    graphs["ort/fp32"] = _onnx_graph(written, "ort/fp32/model.onnx", "right", "shared-buffer")
    reporter.line("exported ort/fp32/model.onnx (GroupQueryAttention, shared cache buffer, fp32)")
    shard = prepared / "tokens" / "train.bin"
    for precision in recipe.export.variants:
        path = f"ort/{precision}/model.onnx"
        int8_caches = precision in recipe.export.int8_caches
        calibration = None
        if precision == "int4" or int8_caches:
            calibration = Calibration(model, calibration_texts(shard, geometry.n_positions, recipe.seed))
        written = write_variant(optimised, weights, precision, draft / path, calibration, int8_caches)
        write_genai(geometry, draft, (draft / path).parent)
        if precision == "fp16":  # The others' products have no kernels on CUDA.
            write_loops(written, (draft / path).parent, geometry.vocab_size)
        graphs[f"ort/{precision}"] = _onnx_graph(written, path, "right", "shared-buffer", precision)
        reporter.line(f"exported {path}")
    written = write_choose(geometry.vocab_size, draft / "ort" / "choose" / "model.onnx")
    graphs["ort/choose"] = _onnx_graph(written, "ort/choose/model.onnx", "any", "none")
    reporter.line("exported ort/choose/model.onnx (the choice of the next token)")

    version_folder = draft / "savedmodel" / "1"
    signatures = servable(model, draft, recipe.export, reporter).save(version_folder)
    requests = write_warmup(version_folder, recipe.name, geometry, tuple(signatures))
    refuse_errors(version_folder, lint(Target(version_folder, geometry)))
    for name, function in signatures.items():
        graphs[f"savedmodel/{name}"] = _savedmodel_graph(name, function)
    reporter.line(f"exported savedmodel/1 (signatures {', '.join(signatures)}; {requests} warm-up requests)")
    (draft / "deploy" / "tf_serving").mkdir(parents=True)
    for name, text in config_files(recipe.name).items():
        (draft / "deploy" / "tf_serving" / name).write_text(text, encoding="utf-8")

    held_out = prepared / "tokens" / "validation.bin"
    write_golden(recipe.verify, held_out, geometry.n_positions, recipe.seed, draft / GOLDEN)
    summary = json.loads((prepared / "prepare.json").read_text(encoding="utf-8"))
    write_manifest(
        draft,
        name=recipe.name,
        model=geometry,
        graphs=graphs,
        provenance=Provenance(
            recipe=asdict(recipe), corpus_sha256=summary["corpus_sha256"], versions=versions(), seed=recipe.seed
        ),
        quality=quality,
        parity={"verified": False},
    )
    return open_bundle(draft, check="sizes")


def servable(model: GPT2, folder: Path, recipe: ExportRecipe, reporter: Reporter) -> Servable:
    """The model with the tokenizer in `folder`; without signatures for text if the graph cannot do its work."""
    tokenizer = load_tokenizer(folder)
    options: dict[str, Any] = {
        "slots": recipe.slots, "slot_lease": recipe.slot_lease, "matmul_parts": recipe.matmul_parts
    }  # fmt: skip
    reason = problem(tokenizer)
    if reason is not None:
        reporter.line(f"left generate_text out of the SavedModel: no graph code for its tokenizer ({reason})")
        return Servable(model, **options)
    graph_tokenizer = GraphTokenizer(tokenizer, model.geometry.vocab_size)
    return Servable(model, graph_tokenizer, **options)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a bundle's graphs are."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def write_golden(recipe: VerifyRecipe, held_out: Path, n_positions: int, seed: int, path: Path) -> None:
    """Choose what the certificate runs on: ragged prompts and a stretch of text, as ids, from the held-out tokens.

    They travel in the bundle, so that anyone can repeat the verification on the same input. `expected` is filled in
    by the verification.
    """
    from builder.tokens import open_tokens

    tokens = open_tokens(held_out)
    random = np.random.default_rng(seed)
    new_tokens = min(recipe.new_tokens, n_positions // 2)
    longest = max(1, min(n_positions - new_tokens, len(tokens) - 1, 128))
    lengths = random.integers(1, longest + 1, recipe.prompts)
    starts = [int(random.integers(0, len(tokens) - length)) for length in lengths]
    golden = {
        "new_tokens": new_tokens,
        "prompts": [_ids(tokens[start : start + length]) for start, length in zip(starts, lengths, strict=True)],
        "expected": [],
        "text": _ids(tokens[: recipe.perplexity_tokens]),
        "tolerances": {"max_abs": recipe.max_abs, "perplexity_relative": recipe.perplexity_relative},
        "gates": {f"ort/{precision}": getattr(recipe, f"{precision}_perplexity") for precision in PRECISIONS},
    }
    path.write_text(json.dumps(golden) + "\n", encoding="utf-8")


def _ids(tokens: NDArray[Any]) -> list[int]:
    return [int(token) for token in tokens]


def _onnx_graph(model: onnx.ModelProto, path: str, padding: Any, cache: Any, precision: Any = "fp32") -> Graph:
    inputs = {value.name: _onnx_spec(value) for value in model.graph.input}
    outputs = {value.name: _onnx_spec(value) for value in model.graph.output}
    return Graph("onnx", path, precision, padding, cache, inputs, outputs)


def _onnx_spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype: Any = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    return TensorSpec(dtype, tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim))


def _savedmodel_graph(name: str, function: Any) -> Graph:
    positional, keywords = function.structured_input_signature
    inputs = {spec.name: _tf_spec(spec) for spec in (*positional, *keywords.values())}
    outputs = {key: _tf_spec(spec) for key, spec in sorted(function.structured_outputs.items())}
    cache: Any = "none" if name in ("score", "tokenize", "detokenize", "release_slots") else "static"
    return Graph("tensorflow", "savedmodel/1/saved_model.pb", "fp32", "right", cache, inputs, outputs, signature=name)


def _tf_spec(spec: Any) -> TensorSpec:
    """A TensorFlow spec with names for its free axes: the batch first, then the sequence or the cache's length."""
    free = {0: "batch_size", 1: "sequence_length", 2: "capacity"}
    dtype: Any = tf.as_dtype(spec.dtype).name
    return TensorSpec(dtype, tuple(free[axis] if size is None else size for axis, size in enumerate(spec.shape)))
