"""Every backend says what Keras says, on one small bundle with real weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.backends.base import Backend
from serving.backends.loader import load_backend
from serving.bundle import Bundle, open_bundle
from serving.errors import BundleError, InputError
from serving.generation import generate, stream
from serving.sampling import SamplingParams
from tests.oracles import recompute
from tests.oracles.fixtures import max_difference, read_cases

TOLERANCE = 1e-4
LIMIT = 48
END = 256
BACKENDS = {
    "shared": ("onnx", "ort/fp32"),
    "concatenated": ("onnx", "onnx/portable"),
    "tensorflow": ("tensorflow", None),
}


@pytest.fixture(scope="module")
def bundle(real_bundle: Path) -> Bundle:
    return open_bundle(real_bundle)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest, bundle: Bundle) -> Backend:
    return load_backend(bundle, *BACKENDS[request.param])


def ragged(backend: Backend, starts: list[int], capacity: int) -> tuple[Any, Any, Any]:
    """Rows of the fixture's text, each begun with `starts` of its tokens: state, text and logits."""
    case = read_cases("bytes")["full"]
    rows = np.arange(len(starts)) % 2
    state, logits = backend.prefill(
        [case.ids[row, :start].tolist() for row, start in zip(rows, starts, strict=True)], capacity
    )
    return state, case.ids[rows], (logits, case.logits[rows])


def test_prefill_and_every_step_are_pytorchs(backend: Backend) -> None:
    starts = np.array([3, 11, 1, 7])
    state, text, (logits, wanted) = ragged(backend, starts.tolist(), LIMIT)
    rows, lengths = np.arange(4), starts
    while True:
        assert logits.shape == (4, 257) and logits.dtype == np.float32
        difference = max_difference(logits, wanted[rows, lengths - 1])
        assert difference < TOLERANCE, (difference, lengths)
        if lengths.max() == LIMIT:
            break
        logits = backend.decode(state, text[rows, lengths])
        lengths = lengths + 1


def test_a_row_is_the_same_alone(backend: Backend) -> None:
    starts = [5, 2, 9]
    state, text, (together, _) = ragged(backend, starts, 20)
    steps = [together.copy()]
    for step in range(8):
        # A copy, since the next step may write into the same memory.
        steps.append(backend.decode(state, text[np.arange(3), np.array(starts) + step]).copy())
    for row, start in enumerate(starts):
        alone, logits = backend.prefill([text[row, :start].tolist()], 20)
        for step, expected in enumerate(steps):
            assert max_difference(logits[0], expected[row]) < 2e-5
            if step < 8:
                logits = backend.decode(alone, text[[row], start + step])


@pytest.mark.parametrize("tokens", [1, 18, 27])
def test_prompts_in_parts_are_prompts_at_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    backend = load_backend(bundle, "onnx", "ort/fp32")
    starts = [5, 2, 9, 3, 1]
    state, text, (logits, _) = ragged(backend, starts, 20)
    wanted = [logits.copy(), *[backend.decode(state, text[range(5), step]).copy() for step in (10, 11)]]
    passes = []
    run = backend._session.run_with_iobinding
    monkeypatch.setattr(backend._session, "run_with_iobinding", lambda binding: (passes.append(binding), run(binding)))
    monkeypatch.setattr("serving.backends.onnx.PREFILL_TOKENS", tokens)
    state, _, (logits, _) = ragged(backend, starts, 20)
    assert len(passes) == {1: 5, 18: 3, 27: 2}[tokens]
    got = [logits.copy(), *[backend.decode(state, text[range(5), step]).copy() for step in (10, 11)]]
    assert max(max_difference(*pair) for pair in zip(got, wanted, strict=True)) < 2e-5


@pytest.mark.parametrize("columns", [4, 8, 16])
def test_a_long_prompt_in_chunks_is_the_prompt_at_once(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """To the bit; a chunk of one token, which has others, never comes about."""
    monkeypatch.setattr("serving.backends.onnx_session.is_small", lambda *_: False)
    backend = load_backend(bundle, "onnx", "ort/fp32")
    prompts = [np.random.default_rng(length).integers(0, 256, length).tolist() for length in (17, 9, 2)]
    wanted = [backend.prefill([prompt], 20)[1].copy() for prompt in prompts]
    seen: list[int] = []
    binding = type(backend._session.io_binding())
    bind = binding.bind_cpu_input

    def watched(self: Any, name: str, value: Any) -> None:
        bind(self, name, value)
        if name == "input_ids":
            seen.append(value.shape[1])

    monkeypatch.setattr(binding, "bind_cpu_input", watched)
    monkeypatch.setattr("serving.backends.onnx.PREFILL_TOKENS", 1)
    monkeypatch.setattr("serving.backends.onnx.PREFILL_COLUMNS", columns)
    state, together = backend.prefill(prompts, 20)
    assert min(seen) > 1
    assert max(seen) <= columns
    assert len(seen) == sum(-(-len(prompt) // columns) for prompt in prompts)
    np.testing.assert_array_equal(together, np.concatenate(wanted))
    alone, logits = backend.prefill(prompts[:1], 20)
    np.testing.assert_array_equal(logits, wanted[0])
    np.testing.assert_array_equal(
        backend.decode(alone, np.array([5]))[0], backend.decode(state, np.array([5, 6, 7]))[0]
    )


def test_states_do_not_disturb_each_other(backend: Backend) -> None:
    """Two open batches, stepped in turn; the one's logits are read after the other's step."""
    case = read_cases("bytes")["full"]
    first, _ = backend.prefill([case.ids[0, :4].tolist()], 12)
    second, _ = backend.prefill([case.ids[1, :6].tolist(), case.ids[0, :2].tolist()], 30)
    for step in range(4):
        one = backend.decode(first, case.ids[0, [4 + step]])
        two = backend.decode(second, np.array([case.ids[1, 6 + step], case.ids[0, 2 + step]]))
        assert max_difference(one[0], case.logits[0, 4 + step]) < TOLERANCE
        assert max_difference(two[0], case.logits[1, 6 + step]) < TOLERANCE
        assert max_difference(two[1], case.logits[0, 2 + step]) < TOLERANCE


def test_generation_is_the_whole_text_again(backend: Backend) -> None:
    random = np.random.default_rng(3)
    prompts = [random.integers(0, 256, random.integers(1, LIMIT)).tolist() for _ in range(12)]
    params = [
        SamplingParams(
            max_new_tokens=int(random.integers(1, 30)),
            temperature=float(random.choice([0.0, 0.7, 1.5])),
            top_k=int(random.choice([0, 5, 40])),
            top_p=float(random.choice([0.5, 0.95, 1.0])),
            seed=int(random.integers(0, 2**63)),
        )
        for _ in prompts
    ]
    wanted = [
        recompute.generate("bytes", prompt, each.max_new_tokens, each.temperature, each.top_k, each.top_p, each.seed)
        for prompt, each in zip(prompts, params, strict=True)
    ]
    results = generate(backend, prompts, params, END)
    assert [list(result.token_ids) for result in results] == wanted
    assert {result.finish_reason for result in results} == {"stop", "length"}
    assert list(stream(backend, prompts[0], params[0], END)) == wanted[0]


def test_the_loop_in_the_graph_is_the_hosts(bundle: Bundle) -> None:
    in_graph: Any = load_backend(bundle, "tensorflow")
    host = load_backend(bundle, "onnx")
    prompts = [[1, 2, 3], [5], [0] * 6, list(range(40)), [9] * 47]
    for options in ({}, {"temperature": 0.9, "top_k": 20}, {"temperature": 1.3, "top_p": 0.8}):
        params = [SamplingParams(max_new_tokens=20, seed=seed, **options) for seed in range(10, 15)]
        tokens = in_graph.generate(prompts, max_new_tokens=20, seeds=[each.seed for each in params], **options)
        assert tokens == [list(result.token_ids) for result in generate(host, prompts, params, END)]
    assert in_graph.generate([[5]], max_new_tokens=4) == [recompute.generate("bytes", [5], 4)]


def test_scores_are_those_of_the_logits(bundle: Bundle) -> None:
    backend: Any = load_backend(bundle, "tensorflow")
    case = read_cases("bytes")["full"]
    texts = [case.ids[0].tolist(), case.ids[1, :5].tolist(), [7]]
    scores = backend.score(texts)
    assert [len(score) for score in scores] == [48, 5, 1]
    exact = case.logits.astype(np.float64)
    log_probs = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    for row in (0, 1):
        text = np.array(texts[row])
        wanted = log_probs[row, np.arange(len(text) - 1), text[1:]]
        assert scores[row][0] == 0 and max_difference(scores[row][1:], wanted) < TOLERANCE


def test_capacity_is_held_to(backend: Backend) -> None:
    for prompts, capacity, message in (
        ([], 5, "no prompts; give at least one"),
        ([[1]], LIMIT + 1, "a capacity of 49 does not fit the context of 48 tokens"),
        ([[1], [1, 2, 3]], 2, "prompt 1 has 3 tokens; it must have from 1 to 2"),
        ([[1], []], 2, "prompt 1 has 0 tokens; it must have from 1 to 2"),
    ):
        with pytest.raises(InputError, match=message):
            backend.prefill(prompts, capacity)
    state, _, _ = ragged(backend, [2, 4], 5)
    backend.decode(state, np.array([1, 1]))
    with pytest.raises(InputError, match="row 1 has reached its capacity of 5 tokens; prefill with a larger one"):
        backend.decode(state, np.array([1, 1]))


def test_a_prompt_may_fill_its_capacity(backend: Backend) -> None:
    case = read_cases("bytes")["full"]
    for length in (1, 5, LIMIT):
        _, logits = backend.prefill([case.ids[0, :length].tolist()], length)
        assert max_difference(logits[0], case.logits[0, length - 1]) < TOLERANCE


def test_names_and_sizes(backend: Backend) -> None:
    assert (backend.vocab_size, backend.n_positions) == (257, LIMIT)
    assert backend.name in {"ort/fp32", "onnx/portable", "savedmodel"}


def test_the_loader_names_what_there_is(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="no runtime 'onx'; did you mean 'onnx'"):
        load_backend(bundle, "onx")
    with pytest.raises(InputError, match="no graph 'ort/fp23'; did you mean 'ort/fp32'"):
        load_backend(bundle, "onnx", "ort/fp23")
    with pytest.raises(InputError, match="the graph 'savedmodel/decode' runs in tensorflow, not in onnx"):
        load_backend(bundle, "onnx", "savedmodel/decode")
    assert load_backend(bundle, "onnx").name == "ort/fp32"


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", [cut, lambda data: b"", lambda data: b"\xff" * 99])
@pytest.mark.parametrize(
    ("runtime", "path"), [("onnx", "ort/fp32/model.onnx"), ("tensorflow", "savedmodel/1/saved_model.pb")]
)
def test_a_broken_graph_is_one_line(
    real_bundle: Path, tmp_path: Path, runtime: str, path: str, damage: Callable[[bytes], bytes]
) -> None:
    folder = Path(shutil.copytree(real_bundle, tmp_path / "broken"))
    (folder / path).write_bytes(damage((folder / path).read_bytes()))
    bundle = Bundle(folder, open_bundle(real_bundle).manifest)
    with pytest.raises(BundleError) as caught:
        load_backend(bundle, runtime)
    message = str(caught.value)
    assert message.startswith(str(folder)) and "has changed" in message
    assert "\n" not in message and len(message) < 600


def test_missing_weights_are_one_line(real_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(real_bundle, tmp_path / "broken"))
    (folder / "ort/fp32/model.onnx_data").unlink()
    (folder / "savedmodel/1/variables/variables.index").unlink()
    bundle = Bundle(folder, open_bundle(real_bundle).manifest)
    for runtime in ("onnx", "tensorflow"):
        with pytest.raises(BundleError, match=r"cannot load|is missing") as caught:
            load_backend(bundle, runtime)
        assert "\n" not in str(caught.value)


HEAVY = {"tensorflow", "keras", "onnxruntime", "onnx", "torch", "transformers"}


def loaded_by(code: str, *arguments: str) -> set[str]:
    """The heavy packages that a fresh interpreter has imported after `code`."""
    code += "\nprint(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", "import sys\n" + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return HEAVY & set(done.stdout.splitlines()[-1].split())


def test_nothing_heavy_is_loaded_before_it_is_asked_for(real_bundle: Path) -> None:
    assert (
        loaded_by("import serving, serving.cli, serving.bundle, serving.generation, serving.backends.loader") == set()
    )
    assert loaded_by("from serving.cli import run\nassert run(['--help']) == 0") == set()
    inspect = "from serving.cli import run\nassert run(['inspect', sys.argv[1]]) == 0"
    assert loaded_by(inspect, str(real_bundle)) == set()


def test_a_runtime_loads_itself_only(real_bundle: Path) -> None:
    code = (
        "from serving.backends.loader import load_backend\nfrom serving.bundle import open_bundle\n"
        "load_backend(open_bundle(sys.argv[1]), sys.argv[2]).prefill([[1, 2]], 4)"
    )
    assert loaded_by(code, str(real_bundle), "onnx") == {"onnxruntime"}
    assert loaded_by(code, str(real_bundle), "tensorflow") & {"onnx", "onnxruntime", "torch"} == set()
