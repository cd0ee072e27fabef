"""What the two ONNX graphs hold, and that ONNX Runtime gets PyTorch's logits out of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from tests.oracles.fixtures import FOLDER, NAMES, keras_model, max_difference, read_cases

TOLERANCE = 1e-4
# GroupQueryAttention takes heads of a multiple of 8 only: those of "odd_heads", of 5, are padded.
OPTIMISED = NAMES
BOTH = [(name, "portable") for name in NAMES] + [(name, "optimized") for name in OPTIMISED]
GraphPath = Callable[[str, str], Path]


def read(path: Path) -> Any:
    return onnx.load(path, load_external_data=False)


class Runner:
    """A graph of a fixture in ONNX Runtime, its cache passed in and out by hand."""

    def __init__(self, name: str, path: Path) -> None:
        self.geometry = keras_model(name).geometry
        self.session = ort.InferenceSession(str(path))
        caches = {value.name: value.shape for value in self.session.get_inputs() if value.name.startswith("past")}
        self.past, self.head_dim = list(caches), next(iter(caches.values()))[3]

    def empty(self, rows: int, length: int, fill: float = 0.0) -> list[Any]:
        shape = (rows, self.geometry.n_head, length, self.head_dim)
        return [np.full(shape, fill, np.float32) for _ in self.past]

    def run(self, ids: Any, mask: Any, positions: Any, cache: list[Any]) -> tuple[Any, list[Any]]:
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {key: np.ascontiguousarray(value, np.int64) for key, value in feeds.items()}
        logits, *present = self.session.run(None, feeds | dict(zip(self.past, cache, strict=True)))
        return logits, present


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_checker_and_shape_inference_find_nothing(name: str, kind: str, graph_path: GraphPath) -> None:
    path = graph_path(name, kind)
    onnx.checker.check_model(str(path), full_check=kind == "portable")
    for model in (read(path), onnx.load(path)):
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        assert list(inferred.graph.output) == list(model.graph.output)


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_inputs_and_outputs(name: str, kind: str, graph_path: GraphPath) -> None:
    geometry = keras_model(name).geometry
    graph = read(graph_path(name, kind)).graph
    shared = kind == "optimized"
    past, present = ("max_sequence_length",) * 2 if shared else ("past_sequence_length", "total_sequence_length")
    inputs: dict[str, Any] = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
    }
    outputs: dict[str, Any] = {"logits": ["batch_size", 1 if shared else "sequence_length", geometry.vocab_size]}
    for layer in range(geometry.n_layer):
        for part in ("key", "value"):
            sizes, width = ["batch_size", geometry.n_head], geometry.padded_head_dim if shared else geometry.head_dim
            inputs[f"past_key_values.{layer}.{part}"] = [*sizes, past, width]
            outputs[f"present.{layer}.{part}"] = [*sizes, present, width]
    assert list(described(graph.input).items()) == list(inputs.items())
    assert list(described(graph.output).items()) == list(outputs.items())
    integers = {value.name for value in graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.INT64}
    assert integers == {"input_ids", "attention_mask", "position_ids"}
    others = {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]} - {onnx.TensorProto.INT64}
    assert others == {onnx.TensorProto.FLOAT}


def described(values: Any) -> dict[str, Any]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_weights_are_outside_and_are_the_checkpoint(name: str, kind: str, graph_path: GraphPath) -> None:
    path = graph_path(name, kind)
    stored = load_file(FOLDER / name / "model.safetensors")
    model = read(path)
    assert path.stat().st_size < 10_000 * (1 + keras_model(name).geometry.n_layer)
    outside = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_location == 1}
    assert set(outside) == set(stored)
    assert not any(tensor.raw_data or tensor.float_data for tensor in outside.values())
    inline = [tensor for tensor in model.graph.initializer if tensor.name not in stored]
    constants = [attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t")]
    assert all(np.prod(tensor.dims) <= 8 for tensor in [*inline, *constants])
    (folder,) = {
        entry.value for tensor in outside.values() for entry in tensor.external_data if entry.key == "location"
    }
    assert (path.parent / folder).read_bytes() == (FOLDER / name / "model.safetensors").read_bytes()
    loaded = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    for key, value in stored.items():
        np.testing.assert_array_equal(loaded[key], value, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_the_portable_graph_has_standard_operators_only(name: str, graph_path: GraphPath) -> None:
    model = read(graph_path(name, "portable"))
    assert {node.domain for node in model.graph.node} == {""}
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 18)}
    counts = Counter(node.op_type for node in model.graph.node)
    layers = keras_model(name).geometry.n_layer
    assert counts["LayerNormalization"] == 2 * layers + 1
    assert counts["Softmax"] == layers


@pytest.mark.parametrize("name", NAMES)
def test_the_optimised_graph_has_the_nodes_that_were_asked_for(name: str, graph_path: GraphPath) -> None:
    model = read(graph_path(name, "optimized"))
    layers = keras_model(name).geometry.n_layer
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["GroupQueryAttention"] == counts["FastGelu"] == layers
    assert counts["LayerNormalization"] == 2 * layers + 1
    assert counts["Gemm"] == 4 * layers + 1
    assert counts["Transpose"] == counts["MatMul"] == 0
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 18), ("com.microsoft", 1)}
    assert {node.op_type for node in model.graph.node if node.domain} == {"GroupQueryAttention", "FastGelu"}


@pytest.mark.parametrize("name", OPTIMISED)
def test_the_last_block_goes_on_with_each_rows_last_token_alone(name: str, graph_path: GraphPath) -> None:
    model = onnx.load(graph_path(name, "optimized"))
    widest = [node.output[0] for node in model.graph.node if node.op_type == "FastGelu"]
    model.graph.output.extend(helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in widest)
    session = ort.InferenceSession(model.SerializeToString())
    case = read_cases(name)["right"]
    feeds = {"input_ids": case.ids, "attention_mask": case.mask, "position_ids": case.positions}
    sizes = keras_model(name).geometry
    shape = (len(case.ids), sizes.n_head, case.ids.shape[1], sizes.padded_head_dim)
    cache = {value.name: np.zeros(shape, np.float32) for value in session.get_inputs() if "past" in value.name}
    rows = [len(each) for each in session.run(widest, feeds | cache)]
    assert rows == [case.ids.size] * (len(widest) - 1) + [len(case.ids)]


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_no_weight_is_transposed_or_copied(name: str, kind: str, graph_path: GraphPath) -> None:
    graph = read(graph_path(name, kind)).graph
    weights = {tensor.name for tensor in graph.initializer if tensor.data_location == 1}
    readers = {node.op_type for node in graph.node if weights & set(node.input)}
    assert readers <= {"Gather", "Gemm", "MatMul", "Add", "LayerNormalization"}
    assert Counter(name for node in graph.node for name in node.input)["transformer.wte.weight"] == 2


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_onnx_runtime_opens_it_without_a_warning(
    name: str, kind: str, graph_path: GraphPath, capfd: pytest.CaptureFixture[str]
) -> None:
    path = graph_path(name, kind)
    capfd.readouterr()
    options = ort.SessionOptions()
    options.log_severity_level = 2
    ort.InferenceSession(str(path), options)
    assert capfd.readouterr() == ("", "")


def test_tracing_says_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    from tests.oracles.tiny_bundle import trace_optimized

    trace_optimized(keras_model("one_block"))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["full", "left", "right"])
def test_portable_prompt(name: str, kind: str, graph_path: GraphPath) -> None:
    case = read_cases(name)[kind]
    runner = Runner(name, graph_path(name, "portable"))
    logits, present = runner.run(case.ids, case.mask, case.positions, runner.empty(len(case.ids), 0))
    difference = max_difference(logits, case.logits, case.mask)
    assert difference < TOLERANCE, difference
    assert {tensor.shape[2] for tensor in present} == {case.ids.shape[1]}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_portable_ragged_text_in_pieces(name: str, side: str, graph_path: GraphPath) -> None:
    """Prompts of 3 and 7 tokens padded on either side, then chunks of 1 to 3 tokens, until the longer row is full."""
    case = read_cases(name)["full"]
    runner = Runner(name, graph_path(name, "portable"))
    lengths = np.array([3, 7])
    slots = np.arange(7)
    mask = (slots < lengths[:, None]) if side == "right" else (slots >= 7 - lengths[:, None])
    mask = mask.astype(np.int64)
    positions = np.clip(np.cumsum(mask, 1) - 1, 0, None)
    ids = np.take_along_axis(case.ids, positions, 1) * mask
    cache = runner.empty(2, 0)
    rows = np.arange(2)[:, None]
    logits, cache = runner.run(ids, mask, positions, cache)
    assert max_difference(logits, case.logits[rows, positions], mask) < TOLERANCE
    count = 1
    while lengths.max() + count <= case.ids.shape[1]:
        positions = lengths[:, None] + np.arange(count)
        mask = np.concatenate([mask, np.ones_like(positions)], 1)
        logits, cache = runner.run(case.ids[rows, positions], mask, positions, cache)
        difference = max_difference(logits, case.logits[rows, positions])
        assert difference < TOLERANCE, (difference, lengths)
        lengths, count = lengths + count, count % 3 + 1


@pytest.mark.parametrize("name", OPTIMISED)
@pytest.mark.parametrize("kind", ["full", "right"])
def test_optimised_prompt(name: str, kind: str, graph_path: GraphPath) -> None:
    case = read_cases(name)[kind]
    runner = Runner(name, graph_path(name, "optimized"))
    # What lies in slots that were never written must not matter.
    cache = runner.empty(len(case.ids), runner.geometry.n_positions, fill=1e4)
    logits, present = runner.run(case.ids, case.mask, case.positions, cache)
    assert logits.shape == (len(case.ids), 1, runner.geometry.vocab_size)
    last = case.mask.sum(1) - 1
    difference = max_difference(logits[:, 0], case.logits[np.arange(len(last)), last])
    assert difference < TOLERANCE, difference
    assert {tensor.shape[2] for tensor in present} == {runner.geometry.n_positions}


@pytest.mark.parametrize("name", OPTIMISED)
def test_optimised_ragged_prompt_and_steps_equal_single_rows(name: str, graph_path: GraphPath) -> None:
    case = read_cases(name)["full"]
    runner = Runner(name, graph_path(name, "optimized"))
    length = case.ids.shape[1]
    together = teacher_forced(runner, case.ids, np.array([3, 7]))
    for row, start in ((0, 3), (1, 7)):
        alone = teacher_forced(runner, case.ids[[row]], np.array([start]))
        for step, logits in enumerate(together):
            assert max_difference(logits[row], alone[step][0]) < 2e-5
            difference = max_difference(logits[row], case.logits[row, start - 1 + step])
            assert difference < TOLERANCE, (difference, step)
    assert len(together) == length - 7 + 1


def teacher_forced(runner: Runner, text: Any, lengths: Any) -> list[Any]:
    """Logits [rows, vocab_size] after the prompts and after each further token, until the longest row is full."""
    rows, width = np.arange(len(text)), int(lengths.max())
    mask = np.zeros_like(text)
    mask[:, :width] = np.arange(width) < lengths[:, None]
    positions = np.broadcast_to(np.arange(width), (len(text), width))
    cache = runner.empty(len(text), text.shape[1])
    logits, cache = runner.run(text[:, :width], mask[:, :width], positions, cache)
    results = [logits[:, 0]]
    while lengths.max() < text.shape[1]:
        mask[rows, lengths] = 1
        total = int(lengths.max()) + 1
        logits, cache = runner.run(text[rows, lengths][:, None], mask[:, :total], lengths[:, None], cache)
        results.append(logits[:, 0])
        lengths = lengths + 1
    return results


@pytest.mark.parametrize("name", OPTIMISED)
@pytest.mark.parametrize("chunk", [2, 5])
def test_optimised_prompt_in_chunks_of_one_row(name: str, chunk: int, graph_path: GraphPath) -> None:
    case = read_cases(name)["full"]
    runner = Runner(name, graph_path(name, "optimized"))
    length = case.ids.shape[1]
    cache = runner.empty(1, length)
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        mask, positions = np.ones((1, end)), np.arange(start, end)[None]
        logits, cache = runner.run(case.ids[:1, start:end], mask, positions, cache)
        difference = max_difference(logits[0, 0], case.logits[0, end - 1])
        assert difference < TOLERANCE, (difference, end)


def test_optimised_cache_is_written_in_place(graph_path: GraphPath) -> None:
    case = read_cases("bytes")["full"]
    runner = Runner("bytes", graph_path("bytes", "optimized"))
    cache = runner.empty(2, 48, fill=7.0)
    feeds = {"input_ids": case.ids[:, :5], "attention_mask": case.mask[:, :5], "position_ids": case.positions[:, :5]}
    _, copied = runner.run(*feeds.values(), cache)
    binding = runner.session.io_binding()
    buffers = [ort.OrtValue.ortvalue_from_numpy(tensor.copy()) for tensor in cache]
    addresses = [buffer.data_ptr() for buffer in buffers]
    for key, value in feeds.items():
        binding.bind_cpu_input(key, np.ascontiguousarray(value))
    for past, buffer in zip(runner.past, buffers, strict=True):
        binding.bind_ortvalue_input(past, buffer)
        binding.bind_ortvalue_output(past.replace("past_key_values", "present"), buffer)
    binding.bind_output("logits")
    runner.session.run_with_iobinding(binding)
    assert [buffer.data_ptr() for buffer in buffers] == addresses
    for buffer, expected in zip(buffers, copied, strict=True):
        written = buffer.numpy()
        np.testing.assert_array_equal(written[:, :, :5], expected[:, :, :5])
        assert (written[:, :, :5] != 7).all() and (written[:, :, 5:] == 7).all()
