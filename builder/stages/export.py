"""The export stage: trained weights to a draft of the bundle, complete but for its certificate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from builder.data.tokenizer import load_tokenizer, tokenizer_folder_files
from builder.keras_backend import tf
from builder.model.gpt2 import GPT2
from builder.model.pretrained import load_model
from builder.model.safetensors_file import clone_or_copy
from builder.onnx_export.calibration import Calibration, calibration_texts
from builder.onnx_export.decode_loop_graph import write_loops
from builder.onnx_export.external_data import write_graph
from builder.onnx_export.genai_config import write_genai
from builder.onnx_export.kernels import OptimizedKernels, PortableKernels
from builder.onnx_export.precisions import write_variant
from builder.onnx_export.sampling_graph import write_sampling_graph
from builder.onnx_export.trace import trace
from builder.progress import Reporter
from builder.recipe import ExportRecipe, Recipe
from builder.tf_export.byte_pair_tables import problem
from builder.tf_export.fingerprint import settle_fingerprint
from builder.tf_export.graph_tokenizer import GraphTokenizer
from builder.tf_export.lint import Target, lint, refuse_errors
from builder.tf_export.servable import Servable
from builder.tf_export.warmup import write_warmup
from builder.verification.golden import GOLDEN, versions, write_golden
from serving.bundle import Bundle, Graph, Provenance, TensorSpec, open_bundle, write_manifest
from serving.deploy.tf_serving_config import config_files
from serving.errors import InputError
from serving.generation.ngram_table import NGRAM_FILE


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
    _write_config(trained / "config.json", draft / "config.json")
    weights = draft / "model.safetensors"
    clone_or_copy(trained / weights.name, weights)
    if (prepared / "tokens" / NGRAM_FILE).is_file():
        shutil.copyfile(prepared / "tokens" / NGRAM_FILE, draft / NGRAM_FILE)

    graphs: dict[str, Graph] = {}
    logits: list[str | int] = ["batch_size", "sequence_length", geometry.vocab_size]
    portable = trace(model, PortableKernels, logits, "past_sequence_length", "total_sequence_length")
    written = write_graph(portable, weights, draft / "onnx" / "model.onnx")
    graphs["onnx/portable"] = _onnx_graph(written, "onnx/model.onnx", "any", "concatenated")
    reporter.line("exported onnx/model.onnx (portable, fp32)")

    logits = ["batch_size", 1, geometry.vocab_size]
    optimized = trace(model, OptimizedKernels, logits, "max_sequence_length", "max_sequence_length")
    written = write_graph(optimized, weights, draft / "ort" / "fp32" / "model.onnx")
    write_genai(geometry, draft, draft / "ort" / "fp32")
    write_loops(written, draft / "ort" / "fp32", geometry.vocab_size)
    graphs["ort/fp32"] = _onnx_graph(written, "ort/fp32/model.onnx", "right", "shared-buffer")
    reporter.line("exported ort/fp32/model.onnx (GroupQueryAttention, shared cache buffer, fp32)")
    shard = prepared / "tokens" / "train.bin"
    for precision in recipe.export.variants:
        path = f"ort/{precision}/model.onnx"
        int8_kv_cache = precision in recipe.export.int8_kv_cache
        if int8_kv_cache and geometry.padded_head_dim != geometry.head_dim:
            raise InputError(
                f"export.int8_kv_cache: heads of {geometry.head_dim} have no int8 cache, only multiples of 8"
            )
        calibration = None
        if precision == "int4" or int8_kv_cache:
            calibration = Calibration(model, calibration_texts(shard, geometry.n_positions, recipe.seed))
        written = write_variant(optimized, weights, precision, draft / path, calibration, int8_kv_cache)
        write_genai(geometry, draft, (draft / path).parent)
        if precision == "fp16":  # The others' products have no kernels on CUDA.
            write_loops(written, (draft / path).parent, geometry.vocab_size)
        graphs[f"ort/{precision}"] = _onnx_graph(written, path, "right", "shared-buffer", precision)
        reporter.line(f"exported {path}")
    written = write_sampling_graph(geometry.vocab_size, draft / "ort" / "choose" / "model.onnx")
    graphs["ort/choose"] = _onnx_graph(written, "ort/choose/model.onnx", "any", "none")
    reporter.line("exported ort/choose/model.onnx (the choice of the next token)")

    version_folder = draft / "savedmodel" / "1"
    signatures = servable(model, draft, recipe.export, reporter).save(version_folder)
    settle_fingerprint(version_folder)
    requests = write_warmup(version_folder, recipe.name, geometry, tuple(signatures))
    refuse_errors(version_folder, lint(Target(version_folder, geometry)))
    for name, function in signatures.items():
        graphs[f"savedmodel/{name}"] = _savedmodel_graph(name, function)
    reporter.line(f"exported savedmodel/1 (signatures {', '.join(signatures)}; {requests} warm-up requests)")
    (draft / "deploy" / "tf_serving").mkdir(parents=True)
    for name, text in config_files(recipe.name).items():
        (draft / "deploy" / "tf_serving" / name).write_text(text, encoding="utf-8")

    held_out = prepared / "tokens" / "validation.bin"
    summary = json.loads((prepared / "prepare.json").read_text(encoding="utf-8"))
    examples = {key: summary.get(key, []) for key in ("examples", "example_messages")}
    write_golden(recipe.verify, held_out, geometry.n_positions, recipe.seed, draft / GOLDEN, examples)
    write_manifest(
        draft,
        name=recipe.name,
        model=geometry,
        graphs=graphs,
        provenance=Provenance(
            # A bundle is the same whoever watched its build.
            recipe={key: value for key, value in asdict(recipe).items() if key != "tracking"},
            corpus_sha256=summary["corpus_sha256"],
            versions=versions(),
            seed=recipe.seed,
        ),
        quality=quality,
        parity={"verified": False},
    )
    return open_bundle(draft, check="sizes")


def _write_config(trained: Path, path: Path) -> None:
    """Write config.json with what transformers.js must know in a page, where it neither lists nor guesses files."""
    config = json.loads(trained.read_text(encoding="utf-8"))
    config["transformers.js_config"] = {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
    cache: Any = "none" if name in ("score", "tokenize", "detokenize", "release_slots", "cancel_slots") else "static"
    return Graph("tensorflow", "savedmodel/1/saved_model.pb", "fp32", "right", cache, inputs, outputs, signature=name)


def _tf_spec(spec: Any) -> TensorSpec:
    """A TensorFlow spec with names for its free axes: the batch first, then the sequence or the cache's length."""
    free = {0: "batch_size", 1: "sequence_length", 2: "capacity"}
    dtype: Any = tf.as_dtype(spec.dtype).name
    return TensorSpec(dtype, tuple(free[axis] if size is None else size for axis, size in enumerate(spec.shape)))
