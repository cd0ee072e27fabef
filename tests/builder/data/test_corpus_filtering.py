"""What each switch of the corpus changes and drops, to the count, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.data import corpus_filtering
from builder.data.cleaning import trim
from builder.data.corpus_filtering import Tally, boilerplate_lines, filter_documents
from builder.data.deduplication import count_bands, shingles
from builder.data.documents import Document
from builder.recipe import CleaningRecipe, CorpusRecipe, Recipe

HEADER = "Licensed to you under the terms of the license."


def run(texts: list[str], folder: Path, **settings: object) -> tuple[list[str], Tally]:
    """Curate `texts` with keys of [corpus] and [cleaning]; what is kept, and the counts."""
    known = {field.name for field in dataclasses.fields(CleaningRecipe)}
    cleaning = CleaningRecipe(**{key: value for key, value in settings.items() if key in known})  # type: ignore[arg-type]
    corpus = CorpusRecipe(**{key: value for key, value in settings.items() if key not in known})  # type: ignore[arg-type]
    tally = Tally()
    documents = (Document(str(number), text) for number, text in enumerate(texts))
    recipe = Recipe(corpus=corpus, cleaning=cleaning)
    kept = [document.text for document, _ in filter_documents(documents, recipe, folder / "scratch", tally)]
    assert not (folder / "scratch").exists()
    return kept, tally


def sentences(seed: int, words: int = 120) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(words)]


@pytest.mark.parametrize(
    ("setting", "dirty", "after", "removed"),
    [
        ({"html": True}, "<b>A sentence of</b> some length.", "A sentence of some length.", 7),
        ({"invisible": True}, "A sentence\u200b of some\x07 length.", "A sentence of some length.", 2),
        ({"unicode": "NFKC"}, "A sentence of ﬁne length.", "A sentence of fine length.", -1),
        ({"symbols": "collapse"}, "A sentence ===== of length.", "A sentence === of length.", 2),
        ({"symbols": "drop"}, "=====\nA sentence of some length.", "A sentence of some length.", 6),
        ({"white_space": "lines"}, "A sentence \r\nof some length.\n", "A sentence\nof some length.", 3),
    ],
)
def test_a_cleaning_step_changes_and_counts_what_it_is_for(
    tmp_path: Path, setting: dict[str, object], dirty: str, after: str, removed: int
) -> None:
    clean_text = "Another sentence, and clean."
    assert run([dirty, clean_text], tmp_path)[0] == [dirty, clean_text]
    kept, tally = run([dirty, clean_text], tmp_path, **setting)
    assert kept == [after, clean_text]
    assert tally.cleaning == {next(iter(setting)): {"documents": 1, "characters_removed": removed}}
    assert [(sample["before"], sample["after"]) for sample in tally.samples] == [(dirty, after)]


def test_blanks_at_the_ends_are_no_sample(tmp_path: Path) -> None:
    _, tally = run(["A sentence of some length. \r\n"], tmp_path, white_space="lines")
    assert tally.cleaning["white_space"]["documents"] == 1 and tally.samples == []


def test_all_off_changes_counts_and_samples_nothing(tmp_path: Path) -> None:
    text = "<p>\ufeffﬁ ===== \r\n\r\n\r\n" * 3
    kept, tally = run([text], tmp_path)
    assert (kept, tally.cleaning, tally.samples) == ([text], {}, [])


def test_lines_of_many_documents_go_and_lines_of_few_stay(tmp_path: Path) -> None:
    bodies = [f"Body number {number} is of its own kind." for number in range(6)]
    texts = [f"{HEADER}\nshort\n{body}" if number < 4 else body for number, body in enumerate(bodies)]
    kept, tally = run(texts, tmp_path, boilerplate_documents=4)
    assert kept == [f"short\n{body}" for body in bodies[:4]] + bodies[4:]
    assert tally.cleaning == {"boilerplate": {"documents": 4, "characters_removed": 4 * (len(HEADER) + 1)}}
    assert run(texts, tmp_path, boilerplate_documents=5)[0] == texts


def test_a_line_repeated_in_one_document_is_not_boilerplate() -> None:
    assert boilerplate_lines([f"{HEADER}\n" * 9], 2, 1) == set()
    assert boilerplate_lines([f" {HEADER}", f"{HEADER}\t"], 2, 1) == {HEADER}


@given(st.lists(st.lists(st.sampled_from("abcdefghij"), max_size=6), max_size=40), st.integers(2, 5))
def test_bounded_counting_never_takes_a_rare_line(documents: list[list[str]], least: int) -> None:
    texts = ["\n".join(lines) for lines in documents]
    exact = {line for line in "abcdefghij" if sum(line in lines for lines in documents) >= least}
    assert boilerplate_lines(texts, least, 1) == exact
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_filtering, "_COUNTED_LINES", 3)
        assert boilerplate_lines(texts, least, 1) <= exact


def test_lengths_are_pruned_or_trimmed_and_counted(tmp_path: Path) -> None:
    texts = ["x" * 9, "y" * 10, "one two three four five six", "z" * 20]
    kept, tally = run(texts, tmp_path, min_characters=10, max_characters=20)
    assert (kept, dict(tally.dropped)) == (["y" * 10, "z" * 20], {"too short": 1, "too long": 1})
    assert dict(tally.lengths) == {8: 1, 16: 1}
    kept, tally = run(texts, tmp_path, min_characters=10, max_characters=20, trim=True)
    assert kept == ["y" * 10, trim(texts[2], 20)[0], "z" * 20]
    assert tally.cleaning == {"trim": {"documents": 1, "characters_removed": len(texts[2]) - len(kept[1])}}


def test_near_duplicates_go_and_distinct_documents_stay(tmp_path: Path) -> None:
    originals = [sentences(seed) for seed in range(200)]
    copies = [[*words[:60], "changed", *words[61:]] for words in originals[:50]]
    distinct = [words[:60] + sentences(1000 + seed, 60) for seed, words in enumerate(originals[:50])]
    texts = [" ".join(words) for words in originals + copies + distinct]
    kept, tally = run(texts, tmp_path, near_duplicates=True)
    assert kept == texts[:200] + texts[250:]
    assert dict(tally.dropped) == {"near-duplicate": 50}
    assert run(texts, tmp_path)[0] == texts
    assert run(texts, tmp_path, near_duplicates=True, near_threshold=0.98)[0] == texts


def test_exact_copies_are_counted_as_such_with_both_switches_on(tmp_path: Path) -> None:
    text = " ".join(sentences(1))
    tally = run([text, text.replace(" ", "\n"), text.upper()], tmp_path, near_duplicates=True)[1]
    assert dict(tally.dropped) == {"duplicate": 1, "near-duplicate": 1}


def test_the_same_seed_finds_the_same_near_duplicates(tmp_path: Path) -> None:
    draw = random.Random(7)
    base = sentences(3, 60)
    texts = [" ".join(word if draw.random() > 0.03 else f"w{n}" for word in base) for n in range(80)]
    first, second = (run(texts, tmp_path, near_duplicates=True)[0] for _ in range(2))
    assert first == second
    assert 1 < len(first) < 80


def test_shingles_are_words_or_where_there_are_no_spaces_characters() -> None:
    assert shingles("One two, THREE four", 3) == {"one two three", "two three four"}
    assert shingles("one two", 3) == {"one two"}
    assert shingles("...", 3) == {"..."}
    assert shingles("长城在中国的北方是很有名的地方啊！是吗", 5) >= {"长 城 在 中 国", "城 在 中 国 的"}


@pytest.mark.parametrize(("threshold", "permutations"), [(0.8, 128), (0.5, 128), (0.3, 16), (1.0, 100), (0.9, 127)])
def test_bands_divide_the_permutations_and_catch_what_is_alike(threshold: float, permutations: int) -> None:
    bands = count_bands(threshold, permutations)
    rows = permutations // bands
    assert bands * rows == permutations
    assert 1 - (1 - min(1.0, threshold + 0.05) ** rows) ** bands > 0.9


def test_what_is_a_near_duplicate_does_not_depend_on_the_process(tmp_path: Path) -> None:
    program = (
        "import random\n"
        "from pathlib import Path\n"
        "import sys\n"
        "from builder.data.deduplication import NearDuplicates, sign\n"
        "from builder.recipe import CorpusRecipe\n"
        "recipe, draw = CorpusRecipe(near_threshold=0.5), random.Random(1)\n"
        "texts = [' '.join(draw.choice(['a', f'w{n}']) for n in range(60)) for _ in range(60)]\n"
        "signatures = sign(texts + [text[:200] for text in texts], recipe, 3)\n"
        "print(NearDuplicates(recipe, Path(sys.argv[1])).repeats(signatures).tolist())\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / salt)], env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True, text=True, check=True,
        ).stdout
        for salt in ("1", "2")
    }  # fmt: skip
    assert len(answers) == 1 and "True" in answers.pop()
