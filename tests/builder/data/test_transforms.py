"""The user's own function on each text: where it is found, what becomes of its errors, and jieba's words."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from builder.data import corpus_filtering
from builder.data.corpus import iter_texts, prepare_corpus
from builder.data.transforms import load_transform, transform_hash
from builder.recipe import CleaningRecipe, CorpusRecipe, Recipe
from builder.recipe_reader import read_recipe
from builder.stages.run_keys import Run
from serving.errors import InputError

SOURCE = "def words(text):\n    return text.replace('ab', 'a b')\n"


def write(folder: Path, source: str = SOURCE) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(source)
    return f"{folder / 'own.py'}:words"


@pytest.mark.parametrize("workers", [1, 2])
def test_texts_go_through_it_before_they_are_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(corpus_filtering, "_CHUNK_DOCUMENTS", 10)
    (tmp_path / "texts.txt").write_text("".join(f"ab ==== number {n} of the lines\n" for n in range(200)))
    corpus = CorpusRecipe(paths=(str(tmp_path / "texts.txt"),), document="line", transform=write(tmp_path))
    recipe = Recipe(corpus=corpus, cleaning=CleaningRecipe(symbols="collapse"))
    report = prepare_corpus(recipe, tmp_path / "out", workers)
    assert next(iter_texts(tmp_path / "out" / "train.jsonl")).startswith("a b === number")
    assert list(report.cleaning) == ["transform", "symbols"] and report.cleaning["transform"]["documents"] == 200


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def words(text):\n    return text / 2\n", ["own.py:words raised TypeError", "on the text 'some text'"]),
        ("def words(text):\n    raise SystemExit\n", ["raised SystemExit (no message)"]),
        ("def words(text):\n    return text.split()\n", ["returned a list; it must return the text as a string"]),
        ("words = 3\n", ["has no function 'words'"]),
        ("import nothing_of_this_name\n", ["cannot be imported: ModuleNotFoundError"]),
        ("def words(text:\n", ["cannot be imported: SyntaxError"]),
    ],
)
def test_what_goes_wrong_in_it_is_one_line(tmp_path: Path, source: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_transform(write(tmp_path, source))("some text")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    for name, words in (("words", "write it as"), ("a.py:", "write it as"), ("none.py:words", "no file none.py"),
                        ("no.module:words", "no module 'no.module'")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            transform_hash(name)
    with pytest.raises(InputError, match="write it as FILE"):
        read_recipe(None, ["corpus.transform=words"])
    assert load_transform("textwrap:dedent")("  a")[0] == "a"


def test_a_changed_source_is_another_run(tmp_path: Path) -> None:
    def key(name: str) -> str:
        return Run(read_recipe(None, [f"corpus.transform={name}"]), tmp_path / "run").prepare_key()

    before = key(write(tmp_path))
    assert key(f"{tmp_path}/./own.py:words") == before
    assert key(write(tmp_path, SOURCE + "# more\n")) != before
    assert key(write(tmp_path, SOURCE)) == before


@pytest.mark.skipif(importlib.util.find_spec("jieba") is None, reason="needs jieba")
def test_jieba_puts_spaces_between_words() -> None:
    step = load_transform(f"{Path(__file__).parents[3] / 'recipes' / 'jieba_words.py'}:words")
    assert step("我来到北京清华大学\n好的")[0] == "我 来到 北京 清华大学\n好 的"
