"""The certificate: it passes on a build as it is, and fails by name when any one artifact of it says something else."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.progress import Reporter
from serving.bundle import open_bundle, write_manifest
from serving.cli import run
from serving.errors import BundleError, ParityError
from tests.closed_form import greedy
from tests.tiny_build import TinyBuild

END = 7


@pytest.fixture
def bundle(built: TinyBuild, tmp_path: Path) -> Path:
    """A copy of the built bundle, to be spoilt."""
    return Path(shutil.copytree(built.bundle, tmp_path / "tiny"))


def sign(folder: Path) -> None:
    """Write the manifest anew, so that the folder is a whole bundle of whatever is in it now."""
    manifest = open_unchecked(folder)
    write_manifest(
        folder, **{field: getattr(manifest, field) for field in ("name", "model", "graphs", "provenance", "quality")},
        parity=manifest.parity,
    )  # fmt: skip


def open_unchecked(folder: Path) -> Any:
    from serving.bundle.manifest import from_json

    return from_json((folder / "manifest.json").read_bytes(), str(folder))


def add_to_tensor(path: Path, name: str, index: tuple[int, int], amount: float) -> None:
    """Change one number of one tensor of a safetensors file in place."""
    with path.open("r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        entry = json.loads(file.read(length))[name]
        place = 8 + length + entry["data_offsets"][0] + 4 * int(np.ravel_multi_index(index, entry["shape"]))
        file.seek(place)
        value = struct.unpack("<f", file.read(4))[0]
        file.seek(place)
        file.write(struct.pack("<f", value + amount))


def check(folder: Path) -> None:
    from builder.verification.certificate import verify

    verify(open_bundle(folder), 3, Reporter())


def failure(folder: Path) -> str:
    with pytest.raises(ParityError) as caught:
        check(folder)
    assert str(caught.value).endswith("; nothing was published")
    return str(caught.value)


def resave(folder: Path, change: Callable[[Any], None]) -> None:
    """Write the SavedModel of the bundle's model anew after `change(model)`."""
    from builder.model.pretrained import load_model
    from builder.recipe import ExportRecipe
    from builder.stages.export import servable

    model = load_model(folder)
    change(model)
    shutil.rmtree(folder / "savedmodel" / "1")
    servable(model, folder, ExportRecipe(), Reporter()).save(folder / "savedmodel" / "1")


# One artifact says something else than the others.


@pytest.mark.parametrize(
    ("path", "name"), [("ort/fp32", "ort/fp32"), pytest.param("onnx", "onnx/portable", marks=pytest.mark.slow)]
)
def test_another_weight_in_one_graph_is_found_there(bundle: Path, path: str, name: str) -> None:
    add_to_tensor(bundle / path / "model.onnx_data", "transformer.h.1.mlp.c_fc.weight", (3, 5), 1.0)
    sign(bundle)
    assert f"parity failed in {name} at prefill: logits differ by" in failure(bundle)


@pytest.mark.slow
def test_a_position_that_only_decoding_reaches_is_found_in_decoding(bundle: Path) -> None:
    longest = max(map(len, json.loads((bundle / "golden.json").read_text())["prompts"]))
    add_to_tensor(bundle / "onnx" / "model.onnx_data", "transformer.wpe.weight", (longest, 0), 3.0)
    sign(bundle)
    assert "parity failed in onnx/portable at first_decode: logits differ by" in failure(bundle)


@pytest.mark.slow
def test_another_weight_in_the_savedmodel_is_found_there(bundle: Path) -> None:
    def change(model: Any) -> None:
        variable = model.trainable_variables[0]
        variable.assign(np.asarray(variable) * 1.05)

    resave(bundle, change)
    sign(bundle)
    assert "parity failed in savedmodel at prefill: logits differ by" in failure(bundle)


@pytest.mark.slow
def test_the_same_savedmodel_again_is_no_failure(bundle: Path) -> None:
    resave(bundle, lambda model: None)
    sign(bundle)
    check(bundle)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("serving.backends.tensorflow.TensorFlowBackend.generate", "savedmodel/serving_default"),
        ("builder.tf_export.session_servable.SessionServable.generate", "savedmodel/serving_default (Session API)"),
        (
            "builder.tf_export.session_servable.SessionServable.generate_by_slots",
            "savedmodel/decode_slots (Session API)",
        ),
    ],
)
def test_a_loop_in_the_graph_that_chooses_otherwise_is_found(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, target: str, name: str
) -> None:
    module, _, attribute = target.rpartition(".")
    real = getattr(__import__(module.rpartition(".")[0], fromlist=["_"]), module.rpartition(".")[2])
    generate = getattr(real, attribute)

    def wrong(self: Any, prompts: Any, *, max_new_tokens: int) -> Any:
        answers = generate(self, prompts, max_new_tokens=max_new_tokens)
        answers[-1][-1] += 1
        return answers

    monkeypatch.setattr(real, attribute, wrong)
    assert f"parity failed in {name}: only 22 of 24 greedy tokens are those of Keras" in failure(bundle)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("tokenize", r"savedmodel/tokenize: only 3 of 4 texts are encoded as"),
        ("generate_text", r"savedmodel/generate_text: only \d of [1-4] texts are continued as"),
    ],
)
def test_a_tokenizer_in_the_graph_that_is_another_is_found(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, method: str, words: str
) -> None:
    from builder.tf_export.session_servable import SessionServable

    real = getattr(SessionServable, method)

    def wrong(self: Any, texts: Any, **options: Any) -> Any:
        answers = real(self, texts, **options)
        return [*answers[:-1], answers[-1] + answers[-1][:1]]

    monkeypatch.setattr(SessionServable, method, wrong)
    assert re.search(f"parity failed in {words} by the bundle's tokenizer", failure(bundle))


@pytest.mark.slow
def test_a_score_that_is_off_is_found_in_the_perplexity(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.backends.tensorflow import TensorFlowBackend

    score = TensorFlowBackend.score
    monkeypatch.setattr(TensorFlowBackend, "score", lambda self, texts: [row * 1.001 for row in score(self, texts)])
    assert "parity failed in savedmodel at perplexity: " in failure(bundle)


@pytest.mark.slow
def test_a_draft_is_verified_and_a_wrong_one_is_never_published(
    built: TinyBuild, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = built.copy(tmp_path)
    assert run(["export", *tiny.options()]) == 0
    draft, record = tiny.run / "export" / "bundle", tiny.run / "export" / "verification.json"
    assert open_bundle(draft).manifest.parity == {"verified": False}
    assert run(["verify", *tiny.options(), "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[-1]) == json.loads(record.read_text()) and err == ""
    assert "onnx/portable: 24 of 24 greedy tokens equal, largest logit difference" in out

    add_to_tensor(draft / "onnx" / "model.onnx_data", "transformer.wte.weight", (0, 0), 1.0)
    sign(draft)
    record.unlink()
    (tiny.bundle / "README.md").write_text("damaged, so that it is not taken for this recipe's")
    before = {path: path.read_bytes() for path in tiny.dist.rglob("*") if path.is_file()}
    assert run(tiny.build()) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: parity failed in onnx/portable at prefill: ") and err.count("\n") == 1
    assert {path: path.read_bytes() for path in tiny.dist.rglob("*") if path.is_file()} == before
    assert not record.exists()


# The golden record is input too.


@pytest.mark.parametrize(
    "change",
    [
        lambda golden: golden.pop("prompts"),
        lambda golden: golden.update(prompts=[]),
        lambda golden: golden.update(prompts=[[]]),
        lambda golden: golden.update(prompts=[[300]]),
        lambda golden: golden.update(prompts=[[-1]]),
        lambda golden: golden.update(prompts=[["a"]]),
        lambda golden: golden.update(prompts=[[1.5]]),
        lambda golden: golden.update(prompts=[[1] * 48]),
        lambda golden: golden.update(prompts="abc"),
        lambda golden: golden.update(new_tokens=0),
        lambda golden: golden.update(new_tokens="6"),
        lambda golden: golden.update(text=[1]),
        lambda golden: golden.update(text=[1, 2**70]),
        lambda golden: golden.update(tolerances={}),
        lambda golden: golden.update(tolerances={"max_abs": "wide", "perplexity_relative": 1}),
        lambda golden: golden.update(tolerances={"max_abs": "0.5", "perplexity_relative": 1}),
        lambda golden: golden.update(tolerances={"max_abs": float("nan"), "perplexity_relative": 1}),
    ],
)
def test_a_golden_record_that_is_none(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    golden = json.loads((bundle / "golden.json").read_text())
    change(golden)
    (bundle / "golden.json").write_text(json.dumps(golden))
    sign(bundle)
    with pytest.raises(BundleError, match="not a golden record") as caught:
        check(bundle)
    assert "\n" not in str(caught.value)


def test_a_golden_record_that_is_not_json(bundle: Path) -> None:
    for content in (b"", b"[]", b"\xff\xfe", b"{"):
        (bundle / "golden.json").write_bytes(content)
        sign(bundle)
        with pytest.raises(BundleError, match="not a golden record"):
            check(bundle)


# Counting the tokens of a loop that stops at the end token.

Generate = Callable[[Any, int], list[list[int]]]
VOCABULARY = 31


def stopping(prompts: list[list[int]], count: int) -> list[list[int]]:
    """The closed form's greedy tokens up to and with the end token, as the graph's loop gives them."""
    answers = [greedy(prompt, count, VOCABULARY) for prompt in prompts]
    return [answer[: answer.index(END) + 1] if END in answer else answer for answer in answers]


def equal(generate: Generate, new_tokens: int = 40) -> tuple[int, int]:
    from builder.verification.certificate import _equal_tokens

    prompts = [[1, 2, 3], [4], [5, 6]]
    candidates = np.array([greedy(prompt, new_tokens, VOCABULARY) for prompt in prompts])
    assert (candidates == END).sum() > 2, "the case needs end tokens on the way"
    return _equal_tokens(generate, prompts, candidates, END), candidates.size


def test_a_loop_is_asked_on_behind_each_end_token() -> None:
    assert equal(stopping) == (120, 120)


def test_a_loop_that_gives_fewer_tokens_than_it_may_is_not_equal() -> None:
    count, size = equal(lambda prompts, count: [answer[:3] for answer in stopping(prompts, count)])
    assert count < size


def test_a_loop_that_gives_nothing_ends_the_count() -> None:
    assert equal(lambda prompts, count: [[] for _ in prompts])[0] == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_wrong_token_ends_its_row_only(place: int) -> None:
    def wrong(prompts: list[list[int]], count: int) -> list[list[int]]:
        answers = stopping(prompts, count)
        for prompt, answer in zip(prompts, answers, strict=True):
            if prompt == [4]:
                answer[place] = (answer[place] + 1) % VOCABULARY
        return answers

    count, size = equal(wrong)
    assert 80 <= count < size


def test_a_loop_that_goes_on_behind_the_end_token_is_not_equal() -> None:
    count, size = equal(lambda prompts, count: [greedy(prompt, count, VOCABULARY) for prompt in prompts])
    assert count < size


def test_the_summary_is_the_worst_of_the_certificate(built: TinyBuild) -> None:
    from builder.verification.certificate import summary

    certificate = json.loads((built.bundle / "verification.json").read_text())
    certificate["greedy"]["savedmodel/serving_default"]["equal"] = 21
    certificate["runtimes"]["savedmodel"]["perplexity_relative"] = 0.5
    texts = certificate["text"]
    assert texts["encoded"] == texts["encoded_equal"] == 4 and 1 <= texts["continued"] == texts["continued_equal"]
    ours = summary(certificate)
    assert (ours["greedy_equal"], ours["greedy_tokens"], ours["perplexity_relative"]) == (21, 24, 0.5)
    assert dataclasses.asdict(open_bundle(built.bundle).manifest)["parity"]["certificate"] == "verification.json"


@pytest.mark.slow
def test_a_graph_that_chooses_another_token_is_found(bundle: Path) -> None:
    import onnx

    path = bundle / "ort" / "choose" / "model.onnx"
    model = onnx.load(str(path))
    last = next(node for node in model.graph.node if "token" in node.output)
    zero = next(each.name for each in model.graph.initializer if each.name == "int64_0_2")
    last.op_type = "Mul"
    last.input.append(zero)
    onnx.save(model, str(path))
    sign(bundle)
    message = failure(bundle)
    assert "parity failed in ort/choose: only " in message and "(greedy)" in message
