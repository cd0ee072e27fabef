"""A graph that prefills for another one: with real graphs, by the certificate, and where it must be refused."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.backends import autotune, tuning_cache
from serving.backends import onnx as onnx_backend
from serving.backends.autotune import Autotuner, Setting, autotuner
from serving.backends.loader import load_backend
from serving.backends.onnx import OnnxBackend
from serving.backends.prefill_graph import find_prefill_graph
from serving.bundle import Bundle, Provenance, TensorSpec, open_bundle, write_manifest
from serving.bundle.certificate import CERTIFICATE
from serving.cli import run
from serving.engine.api import GenerationRequest
from serving.engine.config import EngineConfig, estimate_memory
from serving.engine.engine import SlotEngine, open_engine
from serving.engine.onnx_slot_backend import OnnxSlotBackend
from serving.entrypoints.engine_loader import EngineLoader
from serving.errors import InputError
from serving.generation import generate
from serving.sampling import SamplingParams
from tests.closed_form import byte_tokenizer
from tests.oracles.fixtures import FOLDER, keras_model, read_cases
from tests.oracles.tiny_bundle import graphs
from tests.serving.engine.harness import EOS, TOKENIZER, Heard
from tests.serving.engine.test_int8 import traced
from tests.tiny_build import Fails

WEIGHTS = FOLDER / "bytes" / "model.safetensors"
PROMPTS = [[5, 9, 200, 31, 7, 77, 140], [7], [40 + place % 7 for place in range(21)]]
GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)
# The graph that decodes, the one that prefills, and whether the KV cache is in int8.
PAIRS = {"int8 after fp32": ("int8", "fp32", False), "int4 after int8": ("int4", "int8", True)}


def write_pair(folder: Path, precisions: Sequence[str], int8_kv_cache: Sequence[str], proof: Any = None) -> Bundle:
    """A bundle of the fixture "bytes" as several graphs, with a certificate that has `proof` of each."""
    from builder.onnx_export.calibration import Calibration
    from builder.onnx_export.external_data import write_graph
    from builder.onnx_export.precisions import write_variant

    model = keras_model("bytes")
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str(), encoding="utf-8")
    described = {}
    for precision in precisions:
        path, int8 = f"ort/{precision}/model.onnx", precision in int8_kv_cache
        if precision == "fp32":
            write_graph(traced(), WEIGHTS, folder / path)
        else:
            texts = np.random.default_rng(11).integers(0, 257, (3, 38)).astype(np.int32)
            calibration = Calibration(model, texts) if int8 else None
            write_variant(traced(), WEIGHTS, precision, folder / path, calibration, int8)
        graph = replace(graphs(model.geometry)["ort/fp32"], path=path, precision=precision)
        if int8:
            caches = {name: TensorSpec("int8", spec.shape) for name, spec in graph.inputs.items() if "past" in name}
            graph = replace(graph, inputs={**graph.inputs, **caches})
        described[f"ort/{precision}"] = graph
    if proof is not None:
        (folder / CERTIFICATE).write_text(json.dumps({"variants": proof}), encoding="utf-8")
    write_manifest(
        folder,
        name="bytes",
        model=model.geometry,
        graphs=described,
        provenance=Provenance(recipe={}, corpus_sha256="0" * 64, versions={}, seed=0),
        quality={},
        parity={},
    )
    return open_bundle(folder)


def proof(status: str, graph: Any = "ort/int8") -> dict[str, Any]:
    return {"ort/int4": {"status": "verified", "prefill_graph": {"graph": graph, "status": status}}, "ort/int8": {}}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("pairs")
    return {
        name: write_pair(folder / str(number), pair[:2], pair[:2] if pair[2] else (), proof("verified"))
        for number, (name, pair) in enumerate(PAIRS.items())
    }


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, bundles: dict[str, Bundle]) -> tuple[Bundle, str, str]:
    decode, prefill, _ = PAIRS[request.param]
    return bundles[request.param], f"ort/{decode}", f"ort/{prefill}"


def caches(state: Any, row: int, length: int) -> list[Any]:
    return [value.numpy()[row, :, :length].copy() for value in state.cache]


def test_prompts_are_the_one_graphs_and_steps_the_others(pair: tuple[Bundle, str, str]) -> None:
    bundle, decode, prefill = pair
    mixed = OnnxBackend(bundle, decode, prefill_graph=prefill)
    plain, reader = OnnxBackend(bundle, decode), OnnxBackend(bundle, prefill)
    state, logits = mixed.prefill(PROMPTS, 40)
    theirs, wanted = reader.prefill(PROMPTS, 40)
    own, others = plain.prefill(PROMPTS, 40)
    np.testing.assert_array_equal(logits, wanted)
    assert np.abs(logits - others).max() > 1e-5, "the graphs do not differ"
    for row, prompt in enumerate(PROMPTS):
        assert all(map(np.array_equal, caches(state, row, len(prompt)), caches(theirs, row, len(prompt))))
    # On the KV cache of the one graph, the other one's steps.
    for value, written in zip(own.cache, theirs.cache, strict=True):
        value.numpy()[:] = written.numpy()
    for token in (3, 90, 91):
        tokens = np.full(len(PROMPTS), token)
        stepped = mixed.decode(state, tokens).copy()
        np.testing.assert_array_equal(stepped, plain.decode(own, tokens))
        assert np.abs(stepped - reader.decode(theirs, tokens)).max() > 1e-5


def test_a_large_prefill_in_parts(pair: tuple[Bundle, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, decode, prefill = pair
    mixed = OnnxBackend(bundle, decode, prefill_graph=prefill)
    whole = mixed.prefill(PROMPTS, 40)[1].copy()
    monkeypatch.setattr(onnx_backend, "PREFILL_TOKENS", 21)
    np.testing.assert_array_equal(mixed.prefill(PROMPTS, 40)[1], whole)


def test_slots_do_what_batches_do(pair: tuple[Bundle, str, str]) -> None:
    bundle, decode, prefill = pair
    mixed = OnnxBackend(bundle, decode, prefill_graph=prefill)
    slots = OnnxSlotBackend(bundle, decode, slots=3, max_length=40, prefill_graph=prefill)
    state, logits = mixed.prefill(PROMPTS, 40)
    for slot, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(slots.prefill_chunk(slot, prompt, 0), logits[slot])
        scored = slots.score_chunk(slot, prompt, 0)
        np.testing.assert_allclose(scored[-1], logits[slot], atol=2e-5)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    for step in range(5):
        tokens = np.array([3, 90, 200]) + step
        np.testing.assert_array_equal(slots.decode(tokens, lengths + step), mixed.decode(state, tokens))
    slots.close()


def has_equal_bits(bundle: Bundle, graph: str) -> bool:
    """Whether a step of one row has the bits of a step of several; int4 has not on every processor."""
    backend = OnnxBackend(bundle, graph)
    several, _ = backend.prefill(PROMPTS, 40)
    alone = [backend.prefill([prompt], 40)[0] for prompt in PROMPTS]
    together = backend.decode(several, np.array([3, 90, 200])).copy()
    return all(
        np.array_equal(backend.decode(state, np.array([token]))[0], together[row])
        for row, (state, token) in enumerate(zip(alone, (3, 90, 200), strict=True))
    )


@pytest.mark.parametrize("chunk", [8, None])
def test_alone_is_in_company(pair: tuple[Bundle, str, str], chunk: int | None) -> None:
    """Cache hits and misses, chunks of any size, several sequences: the tokens are those of a request alone."""
    bundle, decode, prefill = pair
    if not has_equal_bits(bundle, decode):
        pytest.skip(f"{decode} has other bits for a row alone on this processor")
    ids = read_cases("bytes")["full"].ids.tolist()
    probes = [(ids[0][:29], 0.0), (ids[1][:3], 1.0), (ids[0][:30], 1.3), (ids[1][:17], 0.7), (ids[1][:1], 0.0)]
    requests = [
        GenerationRequest(
            tuple(prompt), SamplingParams(max_new_tokens=16, temperature=heat, seed=number, ignore_eos=True), n=1
        )
        for number, (prompt, heat) in enumerate(probes)
    ]
    mixed = OnnxBackend(bundle, decode, prefill_graph=prefill)
    wanted = [list(generate(mixed, [each.prompt], each.params, EOS)[0].token_ids) for each in requests]
    own = OnnxBackend(bundle, decode)
    assert wanted != [list(generate(own, [each.prompt], each.params, EOS)[0].token_ids) for each in requests]
    backend = OnnxSlotBackend(bundle, decode, slots=4, max_length=48, threads=1, prefill_graph=prefill)
    seconds, time = random.Random(4), itertools.count()
    engine = SlotEngine(
        backend, TOKENIZER, EOS, EngineConfig(slots=4, prefill_chunk=chunk, prefill_slowdown=1.75),
        clock=lambda: next(time) + 0.5 * seconds.random(), start=False,
    )  # fmt: skip
    source, cached = random.Random(8), 0
    for _ in range(6):
        heard = [Heard(request) for request in requests]
        order = [*heard]
        for each, tokens in zip(requests, wanted, strict=True):
            # As in a chat: what was generated comes back in a prompt, and what is asked next begins in the same way.
            prompt = (*each.prompt, *tokens[: source.randint(1, 12)])[:40]
            order.append(Heard(GenerationRequest(prompt, replace(GREEDY, max_new_tokens=4))))
        source.shuffle(order)
        working = True
        while order or working:
            if order and source.random() < 0.5:
                one = order.pop()
                engine.submit(one.request, one)
            working = engine.step()
        assert [each.ids() for each in heard] == wanted
        cached += sum(each.prompt is not None and each.prompt.cached_tokens > 0 for each in heard)
    engine.close()
    assert cached


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}])
def test_speculation_changes_no_token(bundles: dict[str, Bundle], sampling: dict[str, Any]) -> None:
    bundle = bundles["int8 after fp32"]
    plain, ours = (
        OnnxBackend(bundle, "ort/int8", speculation=each, prefill_graph="ort/fp32") for each in (False, True)
    )
    assert ours.verify_step is not None
    for prompt in PROMPTS:
        params = replace(GREEDY, max_new_tokens=26, **sampling)
        assert generate(ours, [prompt], params, EOS) == generate(plain, [prompt], params, EOS)


def test_graphs_of_fp32_verify_nothing_on_the_prompts_graph(tmp_path: Path) -> None:
    bundle = write_pair(tmp_path / "bundle", ("fp32", "int8"), ())
    assert OnnxBackend(bundle, "ort/fp32", speculation=True, prefill_graph="ort/int8").verify_step is None
    backend = OnnxSlotBackend(bundle, "ort/fp32", slots=1, max_length=40, speculation=True, prefill_graph="ort/int8")
    assert backend.verify_step is None
    backend.close()


OPENERS: list[Callable[..., Any]] = [
    lambda bundle, **options: OnnxBackend(bundle, "ort/int4", **options),
    lambda bundle, **options: OnnxSlotBackend(bundle, "ort/int4", slots=1, max_length=40, **options),
]


@pytest.mark.parametrize("opener", OPENERS)
def test_caches_of_two_kinds_are_refused(opener: Callable[..., Any], tmp_path: Path) -> None:
    bundle = write_pair(tmp_path / "bundle", ("int8", "int4"), ("int4",))
    with pytest.raises(InputError, match="'ort/int8' cannot prefill for 'ort/int4': their KV caches are not of one"):
        opener(bundle, prefill_graph="ort/int8")
    with pytest.raises(InputError, match="no graph 'ort/int9'"):
        opener(bundle, prefill_graph="ort/int9")


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Bundles of two graphs whose certificates say something of the pair."""
    folder, count = tmp_path_factory.mktemp("proofs"), itertools.count()

    def make(said: Any) -> Bundle:
        return write_pair(folder / str(next(count)), ("int8", "int4"), ("int8", "int4"), said)

    return make


def test_the_certificate_decides(proofs: Callable[..., Bundle]) -> None:
    verified, few = proofs(proof("verified")), proofs(proof("too few tokens"))
    assert find_prefill_graph(verified, "ort/int4") == "ort/int8"
    assert find_prefill_graph(verified, "ort/int4", "ort/int8") == "ort/int8"
    assert find_prefill_graph(verified, "ort/int8") is None
    assert find_prefill_graph(verified, "ort/int4", "same") is None
    assert find_prefill_graph(verified, "ort/int4", "ort/int4") is None
    assert find_prefill_graph(verified, "ort/int4", device="cuda") is None
    # As of a graph: too few tokens are enough for who asks for it by name.
    assert find_prefill_graph(few, "ort/int4") is None
    assert find_prefill_graph(few, "ort/int4", "ort/int8") == "ort/int8"
    for graph, wanted, device, message in [
        ("ort/int4", "ort/int9", "cpu", "no graph 'ort/int9'; did you mean 'ort/int8'"),
        ("ort/int4", "ort/int8", "cuda", "on the processor only, not on cuda"),
        ("ort/int8", "ort/int4", "cpu", "does not prove 'ort/int4' as the prefill graph of 'ort/int8'; ask for 'same'"),
    ]:
        with pytest.raises(InputError, match=message):
            find_prefill_graph(verified, graph, wanted, device)


@pytest.mark.parametrize(
    "said",
    [
        None,
        proof("left out"),
        proof("verified", "ort/int9"),
        proof("verified", 3),
        {"ort/int4": {"prefill_graph": {"problem": "its perplexity"}}},
        {"ort/int4": {"prefill_graph": 3}},
        {"ort/int4": 3},
        [],
        3,
    ],
)
def test_without_a_proof_the_graph_prefills_for_itself(proofs: Callable[..., Bundle], said: Any) -> None:
    bundle = proofs(said)
    assert find_prefill_graph(bundle, "ort/int4") is None
    with pytest.raises(InputError, match="the certificate does not prove 'ort/int8'"):
        find_prefill_graph(bundle, "ort/int4", "ort/int8")
    backend: Any = load_backend(bundle, "onnx", "ort/int4")
    assert backend.prefill_graph is None


def test_what_users_call(proofs: Callable[..., Bundle]) -> None:
    bundle = proofs(proof("verified"))
    loaded: dict[str, Any] = {
        each: load_backend(bundle, "onnx", "ort/int4", prefill_graph=each) for each in ("auto", "same", "ort/int8")
    }
    assert [each.prefill_graph for each in loaded.values()] == ["ort/int8", None, "ort/int8"]
    wanted = {name: generate(backend, [PROMPTS[0]], GREEDY, EOS) for name, backend in loaded.items()}
    assert wanted["auto"] == wanted["ort/int8"] != wanted["same"]
    for name in ("auto", "same"):
        engine = open_engine(bundle, "ort/int4", config=EngineConfig(slots=2, prefill_graph=name))
        request = GenerationRequest(tuple(PROMPTS[0]), GREEDY)
        heard = Heard(request)
        engine.submit(request, heard)
        assert engine.drain(60)
        engine.close()
        assert heard.ids() == list(wanted[name][0].token_ids)
    with pytest.raises(InputError, match="tensorflow has no prefill graphs; ask for 'ort/int8' with '--runtime onnx'"):
        load_backend(bundle, "tensorflow", prefill_graph="ort/int8")
    with pytest.raises(InputError, match="prefill_graph is ''; it must be 'auto', 'same' or a graph's name"):
        EngineConfig(prefill_graph="")


def test_the_commands(proofs: Callable[..., Bundle], capfd: pytest.CaptureFixture[str], fails: Fails) -> None:
    bundle = proofs(proof("verified"))
    command = ["generate", str(bundle.folder), "some more", "--graph", "ort/int4", "--max-new-tokens", "24"]
    printed = []
    for more in ([], ["--prefill-graph", "ort/int8"], ["--prefill-graph", "same"]):
        assert run([*command, "--ignore-eos", "--json", *more]) == 0
        printed.append(json.loads(capfd.readouterr().out)["token_ids"])
    assert printed[0] == printed[1] != printed[2]
    fails([*command, "--prefill-graph", "ort/int9"], 2, "no graph 'ort/int9'; did you mean 'ort/int8'")
    fails([*command[:3], "--graph", "auto:int4", "--prefill-graph", "ort/int8"], 2, "chooses the graph")
    serve = ["serve", str(bundle.folder), "--port", "0"]
    fails(
        [*serve, "--graph", "ort/int8", "--prefill-graph", "ort/int4"], 2, "the certificate does not prove 'ort/int4'"
    )
    fails([*serve, "--runtime", "tensorflow", "--prefill-graph", "same"], 2, "--prefill-graph is for --runtime onnx")
    fails([*serve[:2], "--graph", "auto", "--prefill-graph", "ort/int8"], 2, "ask for --prefill-graph auto or same")


def test_auto_measures_with_the_prefill_graph(proofs: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rate(bundle: Bundle, graph: str, threads: int, batch_size: int, prefill_graph: str) -> float:
        asked.append(prefill_graph)
        return 1.0

    monkeypatch.setattr(autotune, "generation_rate", rate)
    monkeypatch.setattr(autotune, "thread_counts", lambda replicas: [2, 1])
    monkeypatch.setattr(Autotuner, "graphs", lambda self, bundle: {"ort/int4": None})
    monkeypatch.setattr(tuning_cache, "read", lambda question: None)
    monkeypatch.setattr(tuning_cache, "write", lambda question, answer: question["prefill_graph"])
    bundle = proofs(proof("verified"))
    for each in ("auto", "same"):
        tuner = autotuner("auto:int4", prefill_graph=each)
        assert tuner is not None and tuner.choose(bundle) == Setting("ort/int4", 2)
    assert asked == ["auto", "auto", "same", "same"]


def test_memory_counts_both(proofs: Callable[..., Bundle]) -> None:
    bundle = proofs(proof("verified"))
    both, one = (estimate_memory(bundle, "ort/int4", EngineConfig(prefill_graph=each)) for each in ("auto", "same"))
    assert both.weights == one.weights + 2 * bundle.graph_size("ort/int8") and both.cache == one.cache
    assert estimate_memory(bundle, "ort/int4", EngineConfig(), "cuda") == one
    loaders = [EngineLoader(graph="ort/int4", devices=each, replicas=2) for each in (("cpu",), ("cpu", "cuda"))]
    assert [each.estimate(bundle) for each in loaders] == [2 * both.total, both.total + one.total]
