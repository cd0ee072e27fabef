"""int8 through the engine: a request says alone what it says while others come, are read in pieces, and go."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.bundle import Bundle, Provenance, TensorSpec, open_bundle, write_manifest
from serving.engine.api import GenerationRequest
from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine
from serving.sampling import SamplingParams
from tests.closed_form import byte_tokenizer
from tests.oracles.fixtures import FOLDER, keras_model, read_cases
from tests.oracles.tiny_bundle import graphs, trace_optimized
from tests.serving.engine.harness import EOS, TOKENIZER, Heard

SLOTS, CHUNK = 6, 8


@cache
def traced() -> Any:
    return trace_optimized(keras_model("bytes"))


def write_one_graph(folder: Path, precision: str) -> Bundle:
    """A bundle of the fixture "bytes" as one graph."""
    from builder.onnx_export.precisions import write_variant

    model = keras_model("bytes")
    folder.mkdir()
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str(), encoding="utf-8")
    path = f"ort/{precision}/model.onnx"
    write_variant(traced(), FOLDER / "bytes" / "model.safetensors", precision, folder / path)
    graph = replace(graphs(model.geometry)["ort/fp32"], path=path, precision=precision)
    if precision == "fp16":
        caches = {name: TensorSpec("float16", spec.shape) for name, spec in graph.inputs.items() if "past" in name}
        graph = replace(graph, inputs={**graph.inputs, **caches})
    write_manifest(
        folder,
        name="bytes",
        model=model.geometry,
        graphs={f"ort/{precision}": graph},
        provenance=Provenance(recipe={}, corpus_sha256="0" * 64, versions={}, seed=0),
        quality={},
        parity={},
    )
    return open_bundle(folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_one_graph(tmp_path_factory.mktemp("int8") / "bytes", "int8")


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_a_scored_chunk_gives_the_logits_of_each_token_in_every_precision(tmp_path: Path, precision: str) -> None:
    from serving.engine.onnx_slot_backend import OnnxSlotBackend

    backend = OnnxSlotBackend(
        write_one_graph(tmp_path / "bytes", precision), f"ort/{precision}", slots=3, max_length=48
    )
    tokens = read_cases("bytes")["full"].ids[0, :24].tolist()
    assert backend.scored_tokens == 48
    scored = np.concatenate([backend.score_chunk(2, tokens[start : start + 8], start).copy() for start in (0, 8, 16)])
    for end in range(2, 25):
        # A row among several is the same as alone but for the order of sums; fp16 rounds where these differ.
        plain = backend.prefill_chunk(0, tokens[:end], 0)
        np.testing.assert_allclose(scored[end - 1], plain, atol=2e-2 if precision == "fp16" else 2e-5)
    for slot in (0, 2):
        backend.prefill_chunk(slot, tokens[16:], 16)
    both = backend.decode(np.array([5, 5, 5]), np.array([24, 0, 24]))
    np.testing.assert_array_equal(both[0], both[2])
    backend.close()


@pytest.fixture(params=[CHUNK, None])
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[SlotEngine]:
    """One whose steps the test makes, and whose time it draws, so that a pace by time cuts prompts anywhere."""
    from serving.engine.onnx_slot_backend import OnnxSlotBackend

    length = bundle.manifest.model.n_positions
    backend = OnnxSlotBackend(bundle, "ort/int8", slots=SLOTS, max_length=length, threads=1)
    config = EngineConfig(slots=SLOTS, prefill_chunk=request.param, prefill_slowdown=1.75)
    seconds, time = random.Random(4), itertools.count()
    made = SlotEngine(backend, TOKENIZER, EOS, config, clock=lambda: next(time) + 0.5 * seconds.random(), start=False)
    yield made
    made.close()


def probes() -> list[GenerationRequest]:
    """Prompts of one piece and of several, greedy and drawn."""
    ids = read_cases("bytes")["full"].ids.tolist()
    made = []
    for number, (row, length, temperature) in enumerate([(0, 29, 0.0), (1, 3, 1.0), (0, 30, 1.3), (1, 17, 0.7)]):
        params = SamplingParams(
            max_new_tokens=16, temperature=temperature, top_k=30 * (number % 2), seed=100 + number, ignore_eos=True
        )
        made.append(GenerationRequest(tuple(ids[row][:length]), params, n=1 + number % 2))
    return made


def said(heard: Heard) -> list[list[int]]:
    assert [heard.ends[index].reason for index in range(heard.request.n)] == ["length"] * heard.request.n
    return [heard.ids(index) for index in range(heard.request.n)]


def test_alone_is_in_company(engine: SlotEngine) -> None:
    alone = []
    for request in probes():
        heard = Heard(request)
        engine.submit(request, heard)
        while engine.step():
            pass
        alone.append(said(heard))
    assert len({tuple(ids) for each in alone for ids in each}) == 6, "the probes do not differ"
    source, widths, pieces = random.Random(8), set[int](), 0
    for _ in range(6):
        waiting = [(request, Heard(request)) for request in probes()]
        order = [*waiting]
        for _ in range(14):
            prompt = tuple(source.randrange(256) for _ in range(source.randint(1, 40)))
            if source.random() < 0.4:  # Begins as a probe does, so that its cache is taken over.
                prompt = (*source.choice(waiting)[0].prompt[: source.randint(1, 24)], *prompt[:10])
            params = SamplingParams(max_new_tokens=source.randint(1, 12), temperature=1.0, seed=source.randrange(99))
            request = GenerationRequest(prompt, params, n=source.randint(1, 2))
            order.append((request, Heard(request)))
        source.shuffle(order)
        working = True
        while order or working:
            for _ in range(source.randint(0, 3)):
                if order:
                    engine.submit(*order.pop())
            working = engine.step()
            widths.add(engine.stats().active_slots)
        for (_, heard), wanted in zip(waiting, alone, strict=True):
            assert said(heard) == wanted
            pieces += heard.prompt is not None and heard.prompt.cached_tokens > 0
    assert widths >= set(range(1, SLOTS + 1)) and pieces, "there was no company"
