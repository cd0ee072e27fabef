"""Cleaning, deduplication and the split, whose every document is on one side by its text alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from builder.data.corpus import CorpusReport, iter_texts, prepare_corpus
from builder.recipe import CorpusRecipe, Recipe
from serving.errors import InputError


def recipe_for(path: Path, seed: int = 1, **settings: object) -> Recipe:
    corpus = dataclasses.replace(CorpusRecipe(paths=(str(path),)), **settings)  # type: ignore[arg-type]
    return Recipe(seed=seed, corpus=corpus)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def sides(folder: Path) -> tuple[list[str], list[str]]:
    return list(iter_texts(folder / "train.jsonl")), list(iter_texts(folder / "validation.jsonl"))


def numbered(count: int) -> list[str]:
    return [f"Document number {number} says something about itself." for number in range(count)]


def test_counts_files_and_report_agree(tmp_path: Path) -> None:
    texts = [*numbered(400), "short", "", numbered(1)[0].replace(" ", "\n  ")]
    report = prepare_corpus(recipe_for(jsonl(tmp_path / "a.jsonl", texts)), tmp_path / "out")
    assert (report.documents_read, report.dropped, report.split) == (403, {"duplicate": 1, "too short": 2}, "documents")
    train, validation = sides(tmp_path / "out")
    assert sorted(train + validation) == sorted(numbered(400))
    assert 8 <= len(validation) <= 40
    assert (report.train.documents, report.validation.documents) == (len(train), len(validation))
    assert report.characters == sum(map(len, train + validation))
    both = b"".join((tmp_path / "out" / name).read_bytes() for name in ("train.jsonl", "validation.jsonl"))
    assert report.sha256 == hashlib.sha256(both).hexdigest()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == dataclasses.asdict(report)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.json",
        "train.jsonl",
        "validation.jsonl",
    ]


def test_the_side_depends_on_text_and_seed_only(tmp_path: Path) -> None:
    prepare_corpus(recipe_for(jsonl(tmp_path / "a.jsonl", numbered(600))), tmp_path / "all")
    prepare_corpus(recipe_for(jsonl(tmp_path / "b.jsonl", numbered(600)[::-2])), tmp_path / "half")
    prepare_corpus(recipe_for(tmp_path / "a.jsonl", seed=2), tmp_path / "other")
    every, half, other = (sides(tmp_path / name) for name in ("all", "half", "other"))
    assert set(half[0]) <= set(every[0])
    assert set(half[1]) <= set(every[1])
    assert set(other[1]) != set(every[1])


def test_copies_that_are_kept_stay_on_one_side(tmp_path: Path) -> None:
    texts = numbered(200) + [text.upper().lower().capitalize() for text in numbered(200)] + numbered(200)
    report = prepare_corpus(recipe_for(jsonl(tmp_path / "a.jsonl", texts), deduplicate=False), tmp_path / "out")
    train, validation = sides(tmp_path / "out")
    assert report.documents == 600
    assert not set(train) & set(validation)


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered(100))
    first, second = (prepare_corpus(recipe_for(path), tmp_path / name) for name in ("one", "two"))
    assert first == second


@pytest.mark.parametrize("seed", range(30))
def test_one_long_document_is_split_at_a_line(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n".join(numbered(200)))
    report = prepare_corpus(recipe_for(path, seed), tmp_path / "out")
    (train,), (validation,) = sides(tmp_path / "out")
    assert report.split == "ends of documents"
    assert train + validation == path.read_text()
    assert train.endswith("\n")
    assert 0.045 <= len(validation) / (len(train) + len(validation)) < 0.055


def test_a_few_documents_never_leave_a_side_empty_or_swollen(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["\n".join(numbered(100)), *numbered(5)])
    for seed in range(40):
        report = prepare_corpus(recipe_for(path, seed), tmp_path / "out")
        assert 0.01 <= report.validation.characters / report.characters <= 0.25
        assert report.train.documents


def test_a_few_documents_are_taken_by_their_hashes_until_the_share_is_reached(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered(20))
    for seed in range(20):
        report: CorpusReport = prepare_corpus(recipe_for(path, seed), tmp_path / "out")
        assert 1 <= report.validation.documents <= 2 and report.documents == 20


def test_one_line_is_too_little(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Only this one line, and nothing else.")
    with pytest.raises(InputError, match=r"37 characters in 1 document are too few.*some 1024 characters"):
        prepare_corpus(recipe_for(path), tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()


def test_nothing_kept_says_why(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(InputError, match=r"none of the 2 documents read was kept \(2 too short\)"):
        prepare_corpus(recipe_for(path), tmp_path / "out")


def test_iter_texts_of_what_is_not_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such corpus; run 'gpt2-bundle prepare' first"):
        list(iter_texts(tmp_path / "train.jsonl"))
    (tmp_path / "train.jsonl").write_text('{"name": "a", "text": "b"}\n{"nam')
    with pytest.raises(InputError, match="line 2: not a document"):
        list(iter_texts(tmp_path / "train.jsonl"))


def test_line_separators_inside_a_text_survive(tmp_path: Path) -> None:
    text = "carriage\r, feed\x0c, next\x85, separator\u2028 and tab\t" * 2
    prepare_corpus(recipe_for(jsonl(tmp_path / "a.jsonl", [text, *numbered(40)])), tmp_path / "out")
    assert text in [*sides(tmp_path / "out")[0], *sides(tmp_path / "out")[1]]
