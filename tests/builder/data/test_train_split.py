"""The share held out is near what was asked for, whatever the shape of the documents, or one line says why not."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.data.corpus import prepare_corpus
from builder.data.documents import read_file
from builder.data.text_boundaries import is_character_boundary, last_boundary, nearest_boundary
from builder.recipe import CorpusRecipe, InstructionRecipe, Recipe
from serving.errors import InputError

WORDS = {
    "english": "some words of a line that never ends and has its sentences. " * 20_000,
    "chinese": "话说天下大势，分久必合，合久必分。" * 60_000,
    "unbroken": "x" * 100_000,
}


def write_jsonl(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prepared(path: Path, folder: Path, fraction: float = 0.05, instruction: InstructionRecipe | None = None) -> float:
    """The share held out; nothing is lost, and neither side is empty."""
    corpus = CorpusRecipe(paths=(str(path),), validation_fraction=fraction, min_characters=1, deduplicate=False)
    recipe = Recipe(corpus=corpus, instruction=instruction or InstructionRecipe())
    report = prepare_corpus(recipe, folder)
    assert report.train.documents and report.validation.documents
    return report.validation.characters / report.characters


def test_six_titles_over_one_long_line_each(tmp_path: Path) -> None:
    for number in range(6):
        body = " ".join(f"word{number * 3000 + place}" for place in range(3000))
        path = tmp_path / "in" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"Title {number}\n{body}\n")
    assert 0.04 < prepared(tmp_path / "in", tmp_path / "out") < 0.06


@pytest.mark.parametrize("words", ["english", "chinese"])
def test_short_headings_over_one_line_of_a_megabyte(tmp_path: Path, words: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("# One\n## Two\n" + WORDS[words][:1_000_000], encoding="utf-8")
    assert 0.04 < prepared(path, tmp_path / "out") < 0.06
    (end,) = (document.text for document in read_file(tmp_path / "out" / "validation.jsonl"))
    assert end[:5] in (" some", "话说天下大")


def test_a_long_record_beside_short_ones(tmp_path: Path) -> None:
    texts = [WORDS["english"][:300], WORDS["chinese"][:305], WORDS["english"][1000:101_002]]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert 0.04 < prepared(path, tmp_path / "out") < 0.06
    assert prepared(path, tmp_path / "out", fraction=0.3) == pytest.approx(0.3, abs=0.05)


def test_a_record_of_megabytes_and_a_small_one(tmp_path: Path) -> None:
    texts = [WORDS["english"] * 3, "A short text of a few words."]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert 0.04 < prepared(path, tmp_path / "out") < 0.06


def test_one_character_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(InputError, match="1 characters in 1 document are too few to hold out"):
        prepared(path, tmp_path / "out", 0.5)


def test_records_that_may_not_be_cut_are_refused_with_the_share_that_is_possible(tmp_path: Path) -> None:
    asked = InstructionRecipe(prompt_field="q", response_field="a")
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": f"{n}+{n}?", "a": str(2 * n) * 30} for n in range(10, 15)])
    with pytest.raises(InputError, match=r"5 documents can be split at 0\.2 but.*corpus\.validation_fraction=0\.2$"):
        prepared(path, tmp_path / "out", instruction=asked)
    assert prepared(path, tmp_path / "out", 0.2, asked) == pytest.approx(0.2, abs=0.02)
    path = write_jsonl(tmp_path / "b.jsonl", [{"q": "a?", "a": "short"}, {"q": "b?", "a": WORDS["english"][:9000]}])
    with pytest.raises(InputError, match="may not be cut"):
        prepared(path, tmp_path / "out", instruction=asked)


SIZES = st.one_of(st.integers(1, 60), st.integers(60, 3000), st.integers(3000, 100_000))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=40),
    line=st.sampled_from([1, 40, 400, 10**6]),
    words=st.sampled_from(sorted(WORDS)),
    fraction=st.sampled_from([0.01, 0.05, 0.2, 0.5]),
)
def test_any_shape_of_plain_documents(tmp_path: Path, sizes: list[int], line: int, words: str, fraction: float) -> None:
    texts = ["\n".join(WORDS[words][start : start + line] for start in range(0, size, line))[:size] for size in sizes]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    try:
        share = prepared(path, tmp_path / "out", fraction)
    except InputError as error:
        assert "too few to hold out" in str(error)
        assert sum(sizes) <= 60 / fraction, "enough text for twenty characters"
        return
    # Half of 23 characters is 12.
    most = max(0.51, (sum(sizes) + 1) / (2 * sum(sizes)))
    assert fraction / 2 <= share <= min(most, 2 * fraction)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(SIZES, min_size=2, max_size=60), fraction=st.sampled_from([0.05, 0.2, 0.5]))
def test_any_shape_of_pairs(tmp_path: Path, sizes: list[int], fraction: float) -> None:
    records = [
        {"q": f"{number}?", "a": WORDS["english"][number : number + size].strip() or "x"}
        for number, size in enumerate(sizes)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    asked = InstructionRecipe(prompt_field="q", response_field="a")
    try:
        share = prepared(path, tmp_path / "out", fraction, asked)
    except InputError as error:
        assert "validation_fraction" in str(error) and "\n" not in str(error)
        return
    assert fraction / 2 <= share <= min(0.51, 2 * fraction)


def test_no_border_is_inside_a_character() -> None:
    text = "e\u0301" * 50 + "👩\u200d👩\u200d👧" * 20 + "👍🏽" * 30 + "\r\n" * 10 + "각".join("한글")
    cuts = {nearest_boundary(text, place, max(1, place - 5), place + 5) for place in range(5, len(text) - 5)} - {0}
    assert len(cuts) > 30
    for cut in cuts:
        assert is_character_boundary(text, cut)
        assert not unicodedata.combining(text[cut]) and text[cut] not in "\u200d🏽" and text[cut - 1] != "\u200d"
    text = text.replace("\r\n", "")
    assert all(is_character_boundary(text, last_boundary(text, limit)) for limit in range(12, len(text)))


def test_a_trimmed_text_ends_at_a_sentence_of_a_script_without_spaces() -> None:
    text = "话说天下大势。分久必合，合久必分！真的吗？（当然。）是的"
    assert text[: last_boundary(text, 27)] == "话说天下大势。分久必合，合久必分！真的吗？（当然。）"
    assert text[: last_boundary(text, 24)] == "话说天下大势。分久必合，合久必分！真的吗？"
    assert text[: last_boundary(text, 18)] == "话说天下大势。分久必合，合久必分！"
    assert "one two three"[: last_boundary("one two three", 9)] == "one two"
    assert "one\ntwo three"[: last_boundary("one\ntwo three", 7)] == "one"
