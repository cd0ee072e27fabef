"""The builtin Chinese text: the same every time, large enough to learn from, and what it says is so."""

from __future__ import annotations

from pathlib import Path

from builder.data.chinese_sentences import read_chinese_sentences, spell
from builder.data.corpus import prepare_corpus
from builder.recipe_reader import read_recipe

ROOT = Path(__file__).parents[3]


def test_numbers_are_written_as_they_are_read() -> None:
    expected = {0: "零", 7: "七", 10: "十", 12: "十二", 20: "二十", 99: "九十九", 105: "一百零五", 110: "一百一十",
                2008: "二千零八", 1010: "一千零一十"}  # fmt: skip
    assert {number: spell(number) for number in expected} == expected
    assert len({spell(number) for number in range(10_000)}) == 10_000


def test_what_it_says_is_so() -> None:
    text = "".join(document.text for document in read_chinese_sentences())
    numbers = {spell(number): number for number in range(200)}
    sums = 0
    for sentence in text.split("。"):
        left, found, right = sentence.partition("等于")
        if found and "加" in left:
            first, second = left.strip("”").split("加")
            assert numbers[first] + numbers[second] == numbers[right], sentence
            sums += 1
    assert sums > 500
    assert "二〇" not in text and "一九九六年是鼠年，下一个鼠年是二零零八年。" in text
    assert not any(sentence.startswith("二零零零年不是闰年") for sentence in text.split("。"))


def test_the_recipe_reads_it_without_a_network(tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "recipes" / "chinese.toml")
    report = prepare_corpus(recipe, tmp_path / "corpus")
    assert report.source == "generated Chinese sentences"
    assert 300_000 < report.characters < 1_000_000 and report.split == "documents"
    assert report == prepare_corpus(recipe, tmp_path / "again")
