"""Labels: read from every kind of file that has them, and balanced to the document on the training side alone."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from builder.data.corpus import prepare_corpus
from builder.data.documents import read_file
from builder.data.sources import read_documents
from builder.recipe import CorpusRecipe, Recipe
from serving.errors import InputError

COUNTS = {"news": 200, "poems": 30, "": 7}


def labeled(path: Path) -> Path:
    records = [
        {"text": f"Document {number} of kind {label!r}, not like the others.", "kind": label or None}
        for label, count in COUNTS.items()
        for number in range(count)
    ]
    random.Random(5).shuffle(records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepared(folder: Path, balance: str, cap: int = 0, seed: int = 1) -> tuple[list[str], list[str], dict[str, object]]:
    """The texts of both sides, and the report."""
    corpus = CorpusRecipe(
        paths=(str(labeled(folder / "a.jsonl")),), label_field="kind", balance=balance, label_cap=cap,
        validation_fraction=0.2,
    )  # fmt: skip
    out = folder / "out"
    prepare_corpus(Recipe(seed=seed, corpus=corpus), out)
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "train.jsonl", "validation.jsonl"]
    train, validation = ([document.text for document in read_file(out / f"{side}.jsonl")] for side in SIDES)
    return train, validation, json.loads((out / "report.json").read_text())


SIDES = ("train", "validation")


def by_label(texts: list[str]) -> Counter[str]:
    return Counter(text.split("'")[1] for text in texts)


@pytest.mark.parametrize(("balance", "cap"), [("cap", 50), ("cap", 1000), ("down", 0), ("up", 0)])
def test_each_label_gets_its_exact_share_of_the_training_side_only(tmp_path: Path, balance: str, cap: int) -> None:
    train, validation, report = prepared(tmp_path, "none")
    before = by_label(train)
    target = {
        "cap": {label: min(cap, count) for label, count in before.items()},
        "down": dict.fromkeys(before, min(before.values())),
        "up": dict.fromkeys(before, max(before.values())),
    }[balance]
    balanced, same, report = prepared(tmp_path, balance, cap)
    assert by_label(balanced) == target
    assert same == validation
    assert report["labels"] == {label: {"before": before[label], "after": target[label]} for label in sorted(before)}
    assert report["train"] == {"documents": len(balanced), "characters": sum(map(len, balanced))}
    assert set(balanced) <= set(train)
    copies = Counter(balanced)
    if balance == "up":
        for label in before:
            times = [copies[text] for text in train if by_label([text])[label]]
            assert max(times) - min(times) <= 1
        assert all(first != second for first, second in itertools.pairwise(balanced))
    else:
        assert max(copies.values()) == 1
        assert balanced == [text for text in train if text in copies]


def test_the_draw_follows_the_seed(tmp_path: Path) -> None:
    assert prepared(tmp_path, "down") == prepared(tmp_path, "down")
    train = prepared(tmp_path, "none")[0]
    drawn = {tuple(text in prepared(tmp_path, "cap", 20)[0] for text in train)}
    drawn.add(tuple(text in prepared(tmp_path, "cap", 20, seed=2)[0] for text in train))
    assert len(drawn) == 2


def test_labels_come_from_every_kind_with_fields(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "t", "k": 3}\n{"text": "t", "k": true}\n{"text": "t", "k": null}\n')
    (tmp_path / "b.csv").write_text("k,text\nx,t\n,t\n")
    parquet.write_table(pyarrow.table({"text": ["t", "t"], "k": ["x", None]}), tmp_path / "c.parquet")
    documents = list(read_documents(CorpusRecipe(paths=(str(tmp_path),), label_field="k")))
    assert [document.label for document in documents] == ["3", "True", "", "x", "", "x", ""]
    assert {document.label for document in read_documents(CorpusRecipe(paths=(str(tmp_path),)))} == {""}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "t", "kind": 1}', r"line 1: no field 'kin' to read \(corpus.label_field\).*'kind'"),
        ("a.jsonl", '{"text": "t", "kin": [1]}', "line 1: field 'kin' is a list"),
        ("a.csv", "text\nt\n", "no field 'kin'"),
        ("a.txt", "some text", "this kind of file has no field 'kin'"),
    ],
)
def test_a_missing_label_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        list(read_documents(CorpusRecipe(paths=(str(tmp_path / name),), label_field="kin")))
