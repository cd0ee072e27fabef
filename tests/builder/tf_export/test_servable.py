"""The SavedModel's signatures, through a Session as TensorFlow Serving calls them and through `tf.saved_model.load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.keras_backend import tf
from tests.builder.tf_export.savedmodel_calls import CACHE, VOCABULARY, Call, assert_refused, columns, padded
from tests.oracles import recompute
from tests.oracles.fixtures import keras_model, max_difference, read_cases

TOLERANCE = 1e-4
LIMIT = 48
END = 256
PROMPTS = [[1, 2, 3], [5], [0] * 6, list(range(40, 60)), [7, 256, 9, 100]]


@pytest.fixture(scope="module")
def meta_graph(real_bundle: Path) -> Any:
    from tensorflow.python.saved_model import loader_impl

    (meta_graph,) = loader_impl.parse_saved_model(str(real_bundle / "savedmodel/1")).meta_graphs
    return meta_graph


def generate(call: Call, prompts: list[list[int]], rows: list[dict[str, Any]], **padding: Any) -> list[list[int]]:
    outputs = call("serving_default", **padded(prompts, **padding), **columns(rows))
    ids, lengths = outputs["token_ids"], outputs["lengths"]
    assert ids.dtype == lengths.dtype == np.int32 and ids.shape == (len(prompts), lengths.max())
    for row, length in zip(ids, lengths, strict=True):
        assert (row[length:] == END).all()
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


def expected(prompts: list[list[int]], rows: list[dict[str, Any]]) -> list[list[int]]:
    return [
        recompute.generate("bytes", prompt, **{"max_new_tokens": 16, **row})
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def random_rows(random: np.random.Generator, count: int) -> tuple[list[list[int]], list[dict[str, Any]]]:
    prompts = [random.integers(0, VOCABULARY, random.integers(1, LIMIT)).tolist() for _ in range(count)]
    rows = [
        {
            "max_new_tokens": int(random.integers(1, 30)),
            "temperature": float(np.float32(random.choice([0.0, 0.5, 1.0, 2.0]))),
            "top_k": int(random.choice([0, 1, 5, 40, 1000])),
            "top_p": float(np.float32(random.choice([0.3, 0.9, 1.0]))),
            "seed": int(random.integers(0, 2**63)),
        }
        for _ in range(count)
    ]
    return prompts, rows


def test_signatures_have_names_types_and_a_free_batch(meta_graph: Any) -> None:
    cache = dict.fromkeys(CACHE, ("float32", [-1, 3, -1, 8]))
    prompt = {"token_ids": ("int32", [-1, -1]), "lengths": ("int32", [-1])}
    row = {"token_ids": ("int32", [-1]), "lengths": ("int32", [-1])}
    logits = {"logits": ("float32", [-1, 257])}
    text = {"text": ("string", [-1])}
    counts = {"lengths": ("int32", [-1]), "prompt_tokens": ("int32", [-1]), "finish_reason": ("string", [-1])}
    parameters = {name: (value.dtype.name, [-1]) for name, value in columns([{}]).items()}
    slot, status = {"slot": ("int32", [-1]), "generation": ("int64", [-1])}, {"status": ("int32", [-1])}
    wanted = {
        "serving_default": (prompt | parameters, prompt),
        "prefill": (prompt | {"capacity": ("int32", [-1])}, logits | cache),
        "decode": (row | cache, logits | cache),
        "score": (prompt, {"log_probs": ("float32", [-1, -1]), "total": ("float32", [-1])}),
        "generate_text": (text | parameters, text | counts),
        "tokenize": (text, prompt),
        "detokenize": (prompt, text),
        "prefill_slots": ({"request_id": ("int64", [-1])} | prompt | parameters, prompt | slot | status),
        "decode_slots": (slot | {"received": ("int32", [-1]), "steps": ("int32", [-1])}, prompt | status),
        "release_slots": (slot, status),
        "cancel_slots": ({"request_id": ("int64", [-1])}, status),
    }
    definitions = dict(meta_graph.signature_def)
    definitions.pop("__saved_model_init_op", None)
    assert set(definitions) == set(wanted)
    for name, (inputs, outputs) in wanted.items():
        assert described(definitions[name].inputs) == inputs, name
        found = described(definitions[name].outputs)
        assert set(found) == set(outputs)
        for key, (dtype, shape) in outputs.items():
            # An output's free sizes may be unknown, and its known ones left unsaid, but never contradicted.
            assert found[key][0] == dtype and len(found[key][1]) == len(shape), (name, key)
            assert found[key][1][0] == -1
            assert all(ours in (-1, size) for ours, size in zip(found[key][1], shape, strict=True)), (name, key)


def described(tensors: Any) -> dict[str, tuple[str, list[int]]]:
    return {
        key: (tf.as_dtype(info.dtype).name, [dim.size for dim in info.tensor_shape.dim])
        for key, info in tensors.items()
    }


def test_the_graph_needs_neither_python_nor_xla(meta_graph: Any) -> None:
    library = meta_graph.graph_def.library.function
    nodes = [*meta_graph.graph_def.node, *[node for function in library for node in function.node_def]]
    operations = {node.op for node in nodes}
    assert "MatMul" in operations and len(nodes) > 300
    assert not [op for op in operations if "PyFunc" in op or "Xla" in op or "Custom" in op or "Jit" in op]
    for node in [*nodes, *library]:
        assert not node.attr["_XlaMustCompile"].b


def test_weights_are_stored_once_and_outside_the_graph(real_bundle: Path, meta_graph: Any) -> None:
    weights = 4 * keras_model("bytes").geometry.parameters
    stored = sum(path.stat().st_size for path in (real_bundle / "savedmodel/1/variables").iterdir())
    # The tokenizer's tables are about 20,000 bytes of it, and the slots' state is another 20,000.
    assert weights <= stored < weights + 60_000
    constants = [node for node in meta_graph.graph_def.node if node.op == "Const"]
    # One holds the names under which the variables are stored, and grows with them.
    assert all(node.ByteSize() < 4000 or b"VARIABLE_VALUE" in node.SerializeToString() for node in constants)


def test_greedy_is_the_whole_text_again(call: Call) -> None:
    rows: list[dict[str, Any]] = [{"max_new_tokens": count} for count in (40, 7, 12, 1, 3)]
    tokens = generate(call, PROMPTS, rows)
    assert tokens == expected(PROMPTS, rows)
    assert tokens[0][-1] == END and len(tokens[0]) < 40, "a row must end before its limit to prove that it can"


def test_a_row_ends_where_the_context_does(call: Call) -> None:
    prompts = [list(range(LIMIT - 2)), list(range(LIMIT)), [3]]
    rows = [{"max_new_tokens": 1000, "seed": 4, "temperature": 1.0}] * 3
    tokens = generate(call, prompts, rows)
    assert tokens == expected(prompts, rows)
    assert [len(row) for row in tokens[:2]] == [2, 0]


def test_full_rows_alone_give_no_token(call: Call) -> None:
    prompts = [list(range(LIMIT)), [9] * LIMIT]
    assert generate(call, prompts, [{}, {"temperature": 1.0}]) == [[], []]


def test_sampled_tokens_are_the_hosts(call: Call) -> None:
    random = np.random.default_rng(11)
    prompts, rows = random_rows(random, 24)
    tokens = generate(call, prompts, rows)
    assert tokens == expected(prompts, rows)
    assert sum(row[-1:] == [END] for row in tokens) >= 3
    again = [{**row, "seed": row["seed"] ^ 1} for row in rows]
    assert generate(call, prompts, again) != tokens


@pytest.mark.parametrize("seed", range(4))
def test_rows_do_not_depend_on_their_batch_mates(call: Call, seed: int) -> None:
    random = np.random.default_rng(seed)
    prompts, rows = random_rows(random, 5)
    together = generate(call, prompts, rows, width=int(random.integers(1, LIMIT + 1)), garbage=random)
    for size in (1, 2):
        for start in range(0, 5, size):
            part = slice(start, start + size)
            assert generate(call, prompts[part], rows[part]) == together[part]


def test_prefill_and_decode_are_the_whole_text_again(call: Call) -> None:
    case = read_cases("bytes")["full"]
    text, rows = case.ids.astype(np.int32), np.arange(2)
    lengths = np.array([3, 7], np.int32)
    capacity = np.array([5, 20], np.int32)
    outputs = call("prefill", token_ids=text[:, :9], lengths=lengths, capacity=capacity)
    assert list(outputs["logits"].shape) == [2, 257]
    assert max_difference(outputs.pop("logits"), case.logits[rows, lengths - 1]) < TOLERANCE
    assert set(outputs) == set(CACHE)
    for tensor in outputs.values():
        assert tensor.shape == (2, 3, 20, 8) and (tensor[:, :, 9:] == 0).all() and (tensor[:, :, :9] != 0).all()
    while lengths.max() < 20:
        outputs = call("decode", token_ids=text[rows, lengths], lengths=lengths, **outputs)
        difference = max_difference(outputs.pop("logits"), case.logits[rows, lengths])
        assert difference < TOLERANCE, (difference, lengths)
        lengths = lengths + np.int32(1)
    assert_refused(
        call,
        "the cache is full; prefill with a larger capacity",
        "decode",
        dict(token_ids=text[:, 0], lengths=lengths, **outputs),
    )


def test_decode_may_start_from_nothing_and_fill_the_context(call: Call) -> None:
    case = read_cases("bytes")["full"]
    cache = {name: np.zeros((2, 3, LIMIT + 1, 8), np.float32) for name in CACHE}
    for position in range(LIMIT):
        outputs = call(
            "decode", token_ids=case.ids[:, position].astype(np.int32), lengths=np.full(2, position, np.int32), **cache
        )
        assert max_difference(outputs.pop("logits"), case.logits[:, position]) < TOLERANCE, position
        cache = outputs
    full = dict(token_ids=np.zeros(2, np.int32), lengths=np.full(2, LIMIT, np.int32), **cache)
    assert_refused(call, "the context is full", "decode", full)


@pytest.mark.parametrize("kind", ["full", "right"])
def test_score_is_log_softmax(call: Call, kind: str) -> None:
    case = read_cases("bytes")[kind]
    outputs = call("score", token_ids=case.ids.astype(np.int32), lengths=case.mask.sum(1).astype(np.int32))
    exact = case.logits.astype(np.float64)
    log_softmax = exact - exact.max(-1, keepdims=True)
    log_softmax -= np.log(np.exp(log_softmax).sum(-1, keepdims=True))
    wanted = np.zeros(case.ids.shape)
    wanted[:, 1:] = np.take_along_axis(log_softmax[:, :-1], case.ids[:, 1:, None], 2)[..., 0]
    wanted *= case.mask
    difference = max_difference(outputs["log_probs"], wanted)
    assert difference < TOLERANCE, difference
    assert max_difference(outputs["total"], wanted.sum(1)) < 1e-3
    one = call("score", token_ids=np.array([[5]], np.int32), lengths=np.array([1], np.int32))
    assert one["log_probs"].tolist() == [[0.0]] and one["total"].tolist() == [0.0]
