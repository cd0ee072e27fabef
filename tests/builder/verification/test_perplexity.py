"""Perplexity by sliding window: what is scored, with which context, and what the command says."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from builder.data.tokenizer import load_tokenizer
from builder.keras_backend import keras
from builder.model.gpt2 import GPT2
from builder.model.pretrained import load_model
from builder.recipe import InstructionRecipe
from builder.verification.paired_loss import perplexity_interval
from builder.verification.perplexity import evaluate_bundle, model_losses, read_ids, score, windows
from serving.cli import run
from serving.errors import InputError
from tests.builder.training.test_trainer import GEOMETRY
from tests.tiny_build import Fails, TinyBuild


@pytest.mark.parametrize("window", [1, 2, 5, 16])
@pytest.mark.parametrize("count", [2, 3, 16, 17, 18, 50])
def test_every_token_but_the_first_is_scored_once_with_the_context_that_is_promised(count: int, window: int) -> None:
    for stride in range(1, window + 1):
        scored = []
        for number, (begin, first) in enumerate(windows(count, window, stride)):
            for place in range(first, min(window, count - 1 - begin)):
                scored.append(begin + place + 1)
                assert number == 0 or place + 1 >= window - stride + 1
        assert scored == list(range(1, count))


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (7, 7), (7, 1), (3, 2)])
def test_the_sum_is_that_of_each_token_alone(window: int, stride: int) -> None:
    keras.utils.set_random_seed(3)
    model = GPT2.create(GEOMETRY)
    ids = np.random.default_rng(1).integers(0, 32, 40).astype(np.int32)
    expected = 0.0
    for target in range(1, len(ids)):
        begin = 0 if target <= window else -(-(target - window) // stride) * stride
        logits = model(ids[None, begin:target]).numpy()[0, -1].astype(np.float64)
        expected += math.log(np.exp(logits).sum()) - logits[ids[target]]
    losses = score(model_losses(model), ids, window, stride)
    assert len(losses) == 39
    assert losses.sum() == pytest.approx(expected, rel=1e-5)


def test_the_command_measures_a_bundle(built: TinyBuild, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.txt"
    text.write_text("Return the value of a list. " * 8)
    capsys.readouterr()
    assert run(["evaluate", str(built.bundle), "--text", str(text), "--stride", "16", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["window"] == 48 and record["stride"] == 16
    assert record["tokens"] == len(read_ids(built.bundle, str(text))[0]) - 1
    assert 1 < record["perplexity"] < 300
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert run(["evaluate", str(built.bundle), "--text", str(text), "--stride", "16"]) == 0
    assert f"perplexity {record['perplexity']:.3f} " in capsys.readouterr().out


def test_a_graph_is_measured_as_it_is_served(
    built: TinyBuild, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("Return the value of a list. Raises an error when none. " * 12)
    found = {}
    for graph in ("ort/fp32", "ort/int8", "onnx/portable", "savedmodel"):
        capsys.readouterr()
        assert run(["evaluate", str(built.bundle), "--text", str(text), "--graph", graph, "--json"]) == 0
        found[graph] = json.loads(capsys.readouterr().out.splitlines()[-1])
    exact = evaluate_bundle(built.bundle, str(text))
    for graph, record in found.items():
        low, high = record["perplexity_relative_interval"]
        assert record["reference_perplexity"] == exact["perplexity"] and record["tokens"] == exact["tokens"]
        assert record["perplexity"] == pytest.approx(exact["perplexity"] * (1 + record["perplexity_relative"]))
        assert low <= record["perplexity_relative"] <= high
        assert abs(record["perplexity_relative"]) < (2e-2 if graph == "ort/int8" else 1e-5), graph
    assert found["ort/int8"]["perplexity"] != exact["perplexity"]
    assert run(["evaluate", str(built.bundle), "--text", str(text), "--graph", "ort/int8"]) == 0
    assert re.search(r"ort/int8: [+-]\d\.\d{3}% \(95 %: .* from the Keras weights", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ("ort/int9", "'ort/int9'; did you mean"),
        ("ort/choose", "chooses tokens and has no weights"),
        ("savedmodel/prefill", "name 'savedmodel'"),
    ],
)
def test_a_graph_that_cannot_be_measured_is_refused(built: TinyBuild, fails: Fails, graph: str, words: str) -> None:
    fails(["evaluate", str(built.bundle), "--text", str(built.corpus), "--graph", graph], 2, words)


def test_the_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    inside = 0
    for _ in range(400):
        noise = random.normal(0, 0.1, 2001)
        low, high = perplexity_interval(0.01 + (noise[1:] + noise[:-1]) / 2) or (0.0, 0.0)
        inside += low <= math.expm1(0.01) <= high
    assert 0.91 < inside / 400 < 0.98
    assert perplexity_interval(np.zeros(31)) is None


def test_of_records_the_responses_alone_are_scored(built: TinyBuild, tmp_path: Path) -> None:
    pairs = (("give a list", "return the list"), ("raise", "an error is raised"), ("x", ""))
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps({"q": prompt, "a": answer}) + "\n" for prompt, answer in pairs))
    recipe = InstructionRecipe(prompt_field="q", response_field="a")
    ids, counted = read_ids(built.bundle, str(path), instruction=recipe)
    tokenizer = load_tokenizer(built.bundle)
    answers = tokenizer.decode(ids[counted].tolist(), skip_special_tokens=False)
    assert answers == "return the list<|endoftext|>an error is raised<|endoftext|>"
    assert "give a list" in tokenizer.decode(ids[~counted].tolist())

    model = load_model(built.bundle)
    scored, rest = (score(model_losses(model), ids, 16, 5, which) for which in (counted, ~counted))
    every = score(model_losses(model), ids, 16, 5)
    assert scored.sum() + rest.sum() == pytest.approx(every.sum(), rel=1e-6) and len(scored) + len(rest) == len(every)
    figures = evaluate_bundle(built.bundle, str(path), window=16, stride=5, instruction=recipe)
    assert figures["tokens"] == len(scored) == counted.sum()
    assert figures["loss"] == pytest.approx(scored.mean())


def test_a_transform_is_applied_to_the_text_that_is_evaluated(
    built: TinyBuild, tmp_path: Path, capfd: pytest.CaptureFixture[str], fails: Fails
) -> None:
    (tmp_path / "own.py").write_text("def words(text):\n    return text.replace('valueof', 'value of')\n")
    transform = f"{tmp_path / 'own.py'}:words"
    bundle = tmp_path / "bundle"
    shutil.copytree(built.bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["provenance"]["recipe"]["corpus"]["transform"] = transform
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for name, text in (("joined.txt", "Return the valueof a list. "), ("split.txt", "Return the value of a list. ")):
        (tmp_path / name).write_text(text * 8)

    def measured(folder: Path, name: str, *options: str) -> float:
        capfd.readouterr()
        command = ["evaluate", str(folder), "--text", str(tmp_path / name), "--json", *options]
        assert run(command) == 0
        return float(json.loads(capfd.readouterr().out.splitlines()[-1])["perplexity"])

    split, joined = measured(built.bundle, "split.txt"), measured(built.bundle, "joined.txt")
    assert split != joined
    assert measured(bundle, "joined.txt", "--transform", transform) == split
    assert measured(bundle, "joined.txt", "--transform", "none") == joined
    # The bundle's own word runs no code: a manifest may name anything.
    fails(["evaluate", str(bundle), "--text", str(tmp_path / "joined.txt")], 2, f"--transform {transform}", "none")
    fails(["evaluate", str(built.bundle), "--text", str(tmp_path / "joined.txt"), "--transform", "gone.py:f"], 2,
          "--transform: no file gone.py")  # fmt: skip


def test_what_cannot_be_measured_is_refused(built: TinyBuild, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("words")
    for options, words in (
        ({"window": 49}, "--window 49: the model reads from 1 to 48"),
        ({"window": 8, "stride": 9}, "--stride 9: it must be from 1 to the window, 8"),
        ({"stride": 0}, "--stride 0"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate_bundle(built.bundle, str(text), **options)


def test_a_text_that_is_not_there_is_refused_by_the_option_that_named_it(built: TinyBuild, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for text, words in (
        (tmp_path / "gone.txt", "no such file or folder; check --text"),
        (tmp_path / "*.md", "the glob matches nothing; check --text"),
        (tmp_path / "empty.txt", "leave it out of --text"),
        ("", "--text has an empty entry"),
    ):
        with pytest.raises(InputError, match=words):
            read_ids(built.bundle, str(text))
