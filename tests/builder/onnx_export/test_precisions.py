"""Variants in fewer bits: numbers against numpy, rows alone against rows in company, bytes and gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from builder.onnx_export.decode_loop_graph import write_loops
from builder.onnx_export.precisions import TOKEN_TABLE, write_variant
from builder.onnx_export.quantization import int4_by_block, int8_by_axis
from builder.onnx_export.trace import TracedGraph
from serving.backends.onnx import OnnxBackend
from serving.bundle import open_bundle
from serving.cli import run
from tests.oracles.fixtures import FOLDER, keras_model, read_cases
from tests.oracles.tiny_bundle import trace_optimized
from tests.tiny_build import Fails, TinyBuild
from tests.unpack import unpack_int4

INPUTS, OUTPUTS = 96, 80


def product_graph(
    folder: Path, precision: str, weight: np.ndarray, name: str, gelu: bool = False
) -> ort.InferenceSession:
    """One Gemm with a bias, or without and transposed if it is the head's, in another precision."""
    head = name == TOKEN_TABLE
    bias = np.linspace(-1, 1, OUTPUTS, dtype=np.float32)
    inputs = ["x", name] if head else ["activated" if gelu else "x", name, "bias"]
    nodes = [helper.make_node("FastGelu", ["x"], ["activated"], name="gelu", domain="com.microsoft")] if gelu else []
    node = helper.make_node("Gemm", inputs, ["y"], name="gemm", **({"transB": 1} if head else {}))
    values = [("x", ["rows", INPUTS]), (name, weight.shape), ("bias", [OUTPUTS])]
    graph = helper.make_graph(
        [*nodes, node], "one", [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in values],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUTPUTS])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    save_file({name: weight, "bias": bias}, folder / "weights.safetensors")
    path = folder / precision / "model.onnx"
    write_variant(TracedGraph(model, (name, "bias")), folder / "weights.safetensors", precision, path)
    return ort.InferenceSession(str(path))


def rows(count: int = 37) -> np.ndarray:
    values = np.random.default_rng(5).standard_normal((count, INPUTS)).astype(np.float32)
    values[3] = 0
    values[4] *= 1e-30
    values[5, 7] = 500
    return values


@pytest.mark.parametrize("name", ["some.weight", TOKEN_TABLE])
def test_int8_products_are_those_of_numpy(tmp_path: Path, name: str) -> None:
    head = name == TOKEN_TABLE
    weight = np.random.default_rng(6).standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    session = product_graph(tmp_path, "int8", np.ascontiguousarray(weight.T) if head else weight, name)
    x = rows()
    (got,) = session.run(None, {"x": x})
    quantized, by_column = int8_by_axis(weight, 0)
    by_row = np.abs(x).max(1, keepdims=True) / np.float32(127)
    left = np.rint(np.divide(x, by_row, out=np.zeros_like(x), where=by_row > 0)).astype(np.int64)
    wanted = (left @ quantized.astype(np.int64)).astype(np.float32) * by_column * by_row
    wanted += 0 if head else np.linspace(-1, 1, OUTPUTS, dtype=np.float32)
    # A value that lies between two steps but for a rounding may fall either way: one step of one product.
    step = by_row * np.abs(weight).max() * 1.01
    assert (np.abs(got - wanted) <= 1e-5 * np.abs(wanted) + step * 1e-5).mean() > 0.99
    assert (np.abs(got - wanted) <= 1e-5 * np.abs(wanted) + step).all()


def test_int8_products_behind_gelu_are_those_of_floats(tmp_path: Path) -> None:
    """Also where all of a row is negative, and the row's scale is GELU's depth and not its absmax."""
    weight = np.random.default_rng(6).standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    session = product_graph(tmp_path, "int8", weight, "some.weight", gelu=True)
    assert {node.op_type for node in onnx.load(tmp_path / "int8" / "model.onnx").graph.node}.isdisjoint({"Abs"})
    x = rows()
    x[6], x[7] = -np.abs(x[6]), -0.7525
    (got,) = session.run(None, {"x": x})
    activated = x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
    quantized, by_column = int8_by_axis(weight, 0)
    by_row = np.maximum(activated.max(1, keepdims=True), 0.1701) / 127
    wanted = activated @ (quantized * by_column) + np.linspace(-1, 1, OUTPUTS)
    # Each input is off by half a step at most.
    assert (np.abs(got - wanted) <= 0.51 * by_row * np.abs(quantized * by_column).sum(0) + 1e-4).all()
    assert np.abs(got - wanted)[6:8].max() < 0.05


def test_int4_products_are_those_of_numpy(tmp_path: Path) -> None:
    weight = np.random.default_rng(6).standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    session = product_graph(tmp_path, "int4", weight, "some.weight")
    x = rows()
    (got,) = session.run(None, {"x": x})
    bias = np.linspace(-1, 1, OUTPUTS, dtype=np.float32)
    wanted = x @ unpack_int4(*int4_by_block(weight), INPUTS) + bias
    # The kernel rounds its left side to 8 bits by block.
    allowed = np.abs(x).max(1, keepdims=True) / 127 * np.abs(weight).sum(0) / 2 + 1e-5
    assert (np.abs(got - wanted) <= allowed).all()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_row_alone_is_the_row_in_company_to_the_bit(tmp_path: Path, precision: str) -> None:
    weight = np.random.default_rng(6).standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    session = product_graph(tmp_path, precision, weight, "some.weight")
    x = rows()
    (together,) = session.run(None, {"x": x})
    for count in (1, 2, 3, 16, 36):
        (some,) = session.run(None, {"x": x[:count]})
        if count == 1 and precision == "int4" and not avx512():
            # ONNX Runtime's kernel of one row adds in another order there.
            np.testing.assert_allclose(some, together[:count], atol=1e-5 * np.abs(together).max())
        else:
            np.testing.assert_array_equal(some, together[:count])


def avx512() -> bool:
    """Whether this processor has AVX-512."""
    return "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_variant_of_a_bundle_is_whole_and_small(built: TinyBuild, precision: str) -> None:
    bundle = open_bundle(built.bundle)
    path = bundle.path(f"ort/{precision}/model.onnx")
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    described = bundle.graph(f"ort/{precision}")
    fp32 = bundle.graph("ort/fp32")
    for ours, theirs in ((described.inputs, fp32.inputs), (described.outputs, fp32.outputs)):
        assert {name: spec.shape for name, spec in ours.items()} == {name: spec.shape for name, spec in theirs.items()}
        assert {spec.dtype for name, spec in ours.items() if name.startswith(("past", "present"))} == {"int8"}
    assert described.precision == precision
    readers = {node.op_type for node in model.graph.node if f"{TOKEN_TABLE}_scale" in node.input}
    assert readers == {"int8": {"Gather", "QGemm"}, "int4": {"GatherBlockQuantized", "MatMulNBits"}}[precision]
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL}
    floats = {name for name, tensor in stored.items() if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1}
    assert {name for name in floats if not name.endswith("_scale")} == {"transformer.wpe.weight"}
    assert all(node.op_type != "Gemm" for node in model.graph.node)
    size = path.with_name("model.onnx_data").stat().st_size
    assert size == max(end for _, end in ranges(stored.values())), "something lies behind the last tensor"
    assert size < 0.5 * bundle.path("model.safetensors").stat().st_size


def ranges(tensors: Any) -> list[tuple[int, int]]:
    """Where the data file has each tensor, in bytes."""
    entries = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors]
    return sorted((int(one["offset"]), int(one["offset"]) + int(one["length"])) for one in entries)


def test_int4s_embedding_and_head_are_one_table(built: TinyBuild) -> None:
    graph = onnx.load(open_bundle(built.bundle).path("ort/int4/model.onnx"), load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL}
    table, rows = stored[f"{TOKEN_TABLE}_int4"], stored[f"{TOKEN_TABLE}_rows"]
    assert ranges([table]) == ranges([rows]) and np.prod(table.dims) == np.prod(rows.dims)
    assert not any(node.op_type in ("Reshape", "QGemm", "Gemm") for node in graph.node)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_prompt_alone_is_the_prompt_in_company(built: TinyBuild, precision: str) -> None:
    backend = OnnxBackend(open_bundle(built.bundle), f"ort/{precision}")
    prompts = [[5], [70, 71, 72], list(range(40, 60))]
    state, together = backend.prefill(prompts, 40)
    together = [together.copy(), backend.decode(state, np.array([9, 8, 7])).copy()]
    for row, prompt in enumerate(prompts):
        state, alone = backend.prefill([prompt], 40)
        assert alone[0].argmax() == together[0][row].argmax()
        np.testing.assert_allclose(alone[0], together[0][row], atol=1e-4)
        alone = backend.decode(state, np.array([9 - row]))
        np.testing.assert_allclose(alone[0], together[1][row], atol=1e-4)


def test_half_precision_runs_on_a_processor_too(tmp_path: Path) -> None:
    """ONNX Runtime puts casts around what it has no 16-bit kernel for; on a GPU there are none."""
    model = keras_model("bytes")
    path = tmp_path / "model.onnx"
    written = write_variant(trace_optimized(model), FOLDER / "bytes" / "model.safetensors", "fp16", path)
    onnx.checker.check_model(str(path))
    half = {value.name for value in written.graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    assert half == {value.name for value in written.graph.input if value.name.startswith("past")}
    case = read_cases("bytes")["full"]
    session = ort.InferenceSession(str(path))
    count, geometry = len(case.ids), model.geometry
    cache = np.zeros((count, geometry.n_head, geometry.n_positions, geometry.head_dim), np.float16)
    feeds: dict[str, Any] = {"input_ids": case.ids, "attention_mask": case.mask, "position_ids": case.positions}
    feeds = {key: np.ascontiguousarray(value, np.int64) for key, value in feeds.items()}
    logits, *present = session.run(None, feeds | dict.fromkeys(half, cache))
    assert logits.dtype == np.float32 and {tensor.dtype for tensor in present} == {np.dtype(np.float16)}
    np.testing.assert_allclose(logits[:, 0], case.logits[:, -1], atol=0.02)
    write_loops(written, tmp_path, geometry.vocab_size)
    session = ort.InferenceSession(str(tmp_path / "greedy.onnx"))
    zero, rows = np.zeros((count, 1), np.int64), np.arange(case.ids.shape[1])
    loop = {
        "newest": zero + len(rows) - 1,
        "start": zero + len(rows) - 1,
        "columns": rows,
        "slots": np.zeros(1, np.int64),
    }
    (token,) = session.run(["next_tokens"], feeds | loop | {"tokens": zero} | dict.fromkeys(half, cache))
    np.testing.assert_array_equal(token[:, 0], logits[:, 0].argmax(1))


def test_the_certificate_says_what_a_variant_costs(built: TinyBuild) -> None:
    bundle = open_bundle(built.bundle)
    certificate = json.loads(bundle.path("verification.json").read_text())
    card = bundle.path("README.md").read_text()
    assert set(certificate["variants"]) == {"ort/int8", "ort/int4"} and certificate["left_out"] == {}
    for name, table in certificate["variants"].items():
        assert abs(table["perplexity_relative"]) <= table["gate"] and table["tokens"] == 94
        assert 0 < table["kl_divergence"] < 0.1 and 0.5 < table["top1_agreement"] <= 1
        difference = table["logit_difference"]
        assert 0 < difference["p50"] <= difference["p90"] <= difference["p99"] <= difference["max"] * 1.01
        assert table["alone"] == {"equal": 18, "of": 18} and name in card
        assert f"{table['perplexity']:.4f}, " in card
        assert f" {table['first_divergence']['median']:.0f} of 6 tokens" in card
    assert card.count("| 18 of 18 |") == 2 and "perplexity over 94 of the held-out tokens" in card
    assert set(bundle.manifest.parity["variants"]) == set(certificate["variants"])


@pytest.mark.slow
def test_a_variant_that_misses_its_gate_is_left_out(tiny: TinyBuild, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tiny.build("verify.int8_perplexity=0")) == 0
    assert "ort/int8: LEFT OUT: its perplexity is" in capfd.readouterr().out
    bundle = open_bundle(tiny.bundle)
    assert "ort/int8" not in bundle.manifest.graphs and "ort/int4" in bundle.manifest.graphs
    assert not (bundle.folder / "ort" / "int8").exists()
    left_out = json.loads(bundle.path("verification.json").read_text())["left_out"]
    assert set(left_out) == {"ort/int8"} and bundle.manifest.parity["left_out"] == left_out
    assert f"ort/int8 was left out: {left_out['ort/int8']}." in bundle.path("README.md").read_text()


@pytest.mark.slow
def test_a_published_variant_is_verified_again(tiny: TinyBuild, fails: Fails) -> None:
    from tests.builder.verification.test_certificate import sign

    golden = tiny.bundle / "golden.json"
    golden.write_text(golden.read_text().replace('"ort/int4": 0.03', '"ort/int4": 0.0'))
    sign(tiny.bundle)
    fails(["verify", str(tiny.bundle)], 1, "parity failed in ort/int4: its perplexity is")


def test_a_variant_generates_by_name(built: TinyBuild, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("ort/int8", "ort/int4"):
        assert run(["generate", str(built.bundle), "Return the", "--graph", name, "--max-new-tokens", "4"]) == 0
    assert capfd.readouterr().err == ""
