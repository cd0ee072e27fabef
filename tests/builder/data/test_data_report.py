"""The data report: a page that parses, shows the counts, and lets no text of a document become markup."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from builder.data.data_report import vocabulary_coverage
from builder.recipe import CleaningRecipe, CorpusRecipe, Recipe, TokenizerRecipe, TrainingRecipe
from builder.stages.prepare import prepare

EVIL = '<img src=x onerror="alert(1)"></pre><script>alert(2)</script>&amp; "quoted" \u200b'


class Page(HTMLParser):
    """The tags of a page in order, whether each was closed in turn, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(folder: Path, recipe: Recipe) -> tuple[Page, dict[str, object]]:
    prepare(recipe, folder / "run", lambda line: None)
    page = Page((folder / "run" / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    return page, json.loads((folder / "run" / "prepare.json").read_text())


def evil_recipe(folder: Path) -> Recipe:
    records = [{"text": f"{EVIL} number {n} {'and so on ' * n}", "kind": f"<b>{n % 2}</b>"} for n in range(60)]
    path = folder / "<i>a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, records[5], {**records[0], "text": ""}]))
    return Recipe(
        corpus=CorpusRecipe(paths=(str(path),), label_field="kind", max_tokens=100, trim=True),
        cleaning=CleaningRecipe(invisible=True),
        tokenizer=TokenizerRecipe(vocab_size=300),
        training=TrainingRecipe(sequence_length=32),
    )


def test_the_page_parses_and_no_document_becomes_markup(tmp_path: Path) -> None:
    page, _ = report(tmp_path, evil_recipe(tmp_path))
    assert not {"script", "img", "b", "i", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert EVIL in page.text
    assert "<b>1</b>" in page.text and "<i>a.jsonl:1" in page.text


def test_the_page_shows_what_was_counted(tmp_path: Path) -> None:
    page, summary = report(tmp_path, evil_recipe(tmp_path))
    for words in ("duplicate", "too short", "over max_tokens", "invisible", "256 to 511", "used in training"):
        assert words in page.text
    assert f"{summary['tokens']['train']:,}" in page.text  # type: ignore[index]
    counts = summary["over_max_tokens"]
    assert sum(counts.values()) > 0  # type: ignore[attr-defined]


def test_a_corpus_left_as_it_is_gives_a_page_without_empty_sections(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"Line {n} of a book about {n % 5}.\n" for n in range(300)))
    recipe = dataclasses.replace(
        evil_recipe(tmp_path), corpus=CorpusRecipe(paths=(str(tmp_path / "a.txt"),)), cleaning=CleaningRecipe()
    )
    page, summary = report(tmp_path, recipe)
    assert page.tags.count("h2") == 3
    assert "over_max_tokens" not in summary


def test_coverage_counts_entries_and_unseen_tokens() -> None:
    train, validation = np.array([0, 1, 1, 4], np.uint16), np.array([1, 2, 2, 3, 4], np.uint16)
    assert vocabulary_coverage([train[:2], train[2:]], [validation], 6) == {
        "entries": 6,
        "used_in_training": 3,
        "used_in_validation": 4,
        "validation_tokens_unseen_in_training": 3,
    }
