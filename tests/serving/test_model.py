"""The library, `from serving import load`: over the closed form, and over real graphs in both runtimes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import serving
from serving import Completion, Model, SamplingParams, load
from serving.backends import loader
from serving.bundle import open_bundle
from serving.errors import BundleError, InputError
from tests.closed_form import ClosedFormBackend, byte_tokenizer, greedy, logits_after

TOKENIZER = byte_tokenizer()
ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(bundle_folder: Path) -> Model:
    return Model(open_bundle(bundle_folder), ClosedFormBackend())


def decoded(ids: list[int] | tuple[int, ...]) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return np.asarray(wide - np.log(np.exp(wide).sum()))


def test_one_prompt_gives_one_completion(model: Model) -> None:
    ids = TOKENIZER.encode("hi").ids
    found = model.generate("hi", max_new_tokens=20, ignore_eos=True)
    wanted = greedy(ids, 20, 257)
    assert found == Completion(decoded(wanted), tuple(wanted), "length", 2)
    assert str(found) == found.text
    assert model.generate("hi", SamplingParams(max_new_tokens=20, ignore_eos=True)) == found
    assert model.generate("", max_new_tokens=4, ignore_eos=True).token_ids == tuple(greedy([256], 4, 257))


def test_a_list_is_one_batch_and_keeps_its_order(model: Model) -> None:
    prompts = ["a longer prompt", "hi", ""]
    found = model.generate(prompts, max_new_tokens=9, ignore_eos=True)
    assert found == [model.generate(prompt, max_new_tokens=9, ignore_eos=True) for prompt in prompts]
    assert isinstance(model.backend, ClosedFormBackend) and model.backend.prefills[0][0] == 3
    assert model.generate(["hi"], max_new_tokens=1) == [model.generate("hi", max_new_tokens=1)]
    assert model.generate([]) == []
    several = [SamplingParams(max_new_tokens=2, ignore_eos=True), SamplingParams(max_new_tokens=5, ignore_eos=True)]
    assert [len(each.token_ids) for each in model.generate(["hi", "ho"], several)] == [2, 5]


def test_a_stop_text_ends_one_row_and_not_the_other(model: Model) -> None:
    text = model.generate("hi", max_new_tokens=20, ignore_eos=True).text
    stop = next(each for each in text[3:] if each != "\ufffd")
    first, second = model.generate(["hi", "ho"], max_new_tokens=20, ignore_eos=True, stop=stop)
    assert first.text == text[: text.index(stop)] and first.finish_reason == "stop"
    assert second == model.generate("ho", max_new_tokens=20, ignore_eos=True, stop=(stop,))
    ended = model.generate("hi", max_new_tokens=20, stop_token_ids=[greedy(TOKENIZER.encode("hi").ids, 3, 257)[2]])
    assert ended.finish_reason == "stop" and len(ended.token_ids) == 3


@pytest.mark.parametrize("stop", [(), "\u00e9"])
def test_a_stream_joins_to_the_completion(model: Model, stop: str) -> None:
    sampling = {"max_new_tokens": 30, "temperature": 3.0, "seed": 5, "ignore_eos": True, "stop": stop, "logprobs": 1}
    stream = model.stream("hi", **sampling)
    assert stream.completion.token_ids == ()
    parts = list(stream)
    assert len(parts) > 3 and all(parts)
    assert stream.completion == model.generate("hi", **sampling)
    assert "".join(parts) == stream.completion.text
    assert list(stream) == []


def test_log_probabilities_are_the_models_own(model: Model) -> None:
    sampling = {"max_new_tokens": 8, "temperature": 2.0, "seed": 3, "ignore_eos": True, "logit_bias": {5: 40.0}}
    found = model.generate(["hi", "a longer one"], logprobs=3, **sampling)
    assert [each.token_ids for each in found] == [
        each.token_ids for each in model.generate(["hi", "a longer one"], **sampling)
    ]
    for prompt, each in zip(("hi", "a longer one"), found, strict=True):
        tokens = TOKENIZER.encode(prompt).ids
        assert each.logprobs is not None and len(each.logprobs) == 8
        for token, logprobs in zip(each.token_ids, each.logprobs, strict=True):
            wanted = log_softmax(logits_after(tokens, 257))
            assert logprobs.own == pytest.approx(wanted[token], abs=1e-6)
            top = np.argsort(-wanted, kind="stable")[:3].tolist()
            assert [id for id, _ in logprobs.top] == top
            assert [nats for _, nats in logprobs.top] == pytest.approx(wanted[top], abs=1e-6)
            tokens.append(token)


def test_mistakes_say_what_is_wrong(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no sampling parameter 'max_new_token'; did you mean 'max_new_tokens'"):
        model.generate("hi", max_new_token=3)
    with pytest.raises(InputError, match="temperature is -1"):
        model.stream("hi", temperature=-1)
    with pytest.raises(InputError, match="seed was given with a SamplingParams"):
        model.generate("hi", SamplingParams(), seed=3)
    with pytest.raises(InputError, match="2 prompts but 3 sets"):
        model.generate(["a", "b"], [SamplingParams()] * 3)
    with pytest.raises(InputError, match="logprobs is 21; it must be from 0 to 20"):
        model.stream("hi", logprobs=21)
    with pytest.raises(InputError, match="a prompt is int; it must be a text"):
        model.generate([40, 41])  # type: ignore[list-item]
    with pytest.raises(InputError, match="leaves no room in a context of 64"):
        model.stream("x" * 64)
    with pytest.raises(InputError, match="lone surrogates"):
        model.generate("\ud800")
    with pytest.raises(InputError, match="there is no such folder"):
        load(tmp_path / "missing")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load(tmp_path)


def test_load_asks_for_graph_runtime_and_device(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_backend(bundle: object, *rest: object) -> ClosedFormBackend:
        asked.append(rest)
        return ClosedFormBackend()

    monkeypatch.setattr(loader, "load_backend", load_backend)
    load(bundle_folder)
    load(str(bundle_folder), graph="ort/int8", device="cuda:1")
    load(bundle_folder, runtime="tensorflow")
    load(bundle_folder, threads=3, speculation="on", prefill_graph="same")
    assert asked == [
        ("onnx", None, "cpu", None, "auto", "auto"),
        ("onnx", "ort/int8", "cuda:1", None, "auto", "auto"),
        ("tensorflow", None, "cpu", None, "auto", "auto"),
        ("onnx", None, "cpu", 3, "on", "same"),
    ]


def test_both_runtimes_give_one_text(real_bundle: Path) -> None:
    one, other = load(real_bundle), load(real_bundle, runtime="tensorflow")
    prompts = ["a", "some more"]
    for sampling in ({}, {"temperature": 1.0, "top_k": 5, "seed": 3}):
        first = one.generate(prompts, max_new_tokens=6, logprobs=2, **sampling)
        second = other.generate(prompts, max_new_tokens=6, logprobs=2, **sampling)
        assert [each.text for each in first] == [each.text for each in second]
        assert first[0].text == "".join(one.stream("a", max_new_tokens=6, **sampling))
        for left, right in zip(first, second, strict=True):
            assert left.logprobs is not None and right.logprobs is not None
            assert [each.own for each in left.logprobs] == pytest.approx(
                [each.own for each in right.logprobs], abs=1e-4
            )


def test_names_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, serving; print('numpy' in sys.modules, 'load' in dir(serving));"
        "from serving import load; print(load.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "serving.model"]
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        serving.lod  # type: ignore[attr-defined] # noqa: B018
