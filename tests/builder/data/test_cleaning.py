"""Cleaning one text: each step by example, and for any text without an error and without a second opinion."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.data.cleaning import (
    collapse_symbols,
    drop_symbols,
    normalize,
    remove_invisible,
    remove_lines,
    steps,
    strip_html,
    tidy_space,
    trim,
)
from builder.recipe import CleaningRecipe

# Text as it comes, and text in which what the steps look for is everywhere.
ODD = "ab=-─═ \t\n\r\x0b\x0c\x1b\x1f[m0\x85\xa0\xad\u0301\u200b\u200c\u200d\u2028\ufeffﬁe<>/&;#!?lt"
TEXTS = st.one_of(st.text(), st.text(alphabet=ODD, max_size=60))


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [
        (lambda text: normalize(text, "NFC"), "cafe\u0301 ﬁ", "café ﬁ"),
        (lambda text: normalize(text, "NFKC"), "cafe\u0301 ﬁ Ａ", "café fi A"),
        (remove_invisible, "\ufeffzero\u200bwidth so\xadft\x07 \x1b[31mred\x1b[0m\t\r\n", "zerowidth soft red\t\r\n"),
        (collapse_symbols, "Title\n======\na ~~~~ b --- c ────┐", "Title\n===\na ~~~ b --- c ─"),
        (collapse_symbols, "好！！！！吗。。。。～～～～～※※※※★★★★★【【【【", "好！！！吗。。。～～～※※※★★★【【【"),
        (drop_symbols, "好！！！！！吗\n　※※※\n★★★　★★★\n～～～\n【【【【标题】】】】\n", "好 吗\n 标题 \n"),
        (drop_symbols, "Title\n======\n  ---- ====\na~~~~b -- c\n╔═════╗", "Title\na b -- c\n"),
        (strip_html, "<p>Fish &amp; <b>chips</b></p><script>x < 1</script><!-- no -->ok", "\nFish & chips\nok"),
        (strip_html, "5 &gt; 4", "5 > 4"),
        (strip_html, "<td>1</td><td>2</td>", " 1  2 "),
        (lambda text: tidy_space(text, words=False), "\n  a  b \r\n\t\r\n\n\nc\u2028d\n ", "  a  b\n\nc\nd"),
        (lambda text: tidy_space(text, words=True), "  a \t b\xa0c\n  d", "  a b c\n  d"),
        (lambda text: remove_lines(text, {"license"}), "a\n  license \nb", "a\nb"),
        (lambda text: trim(text, 12), "first line\nsecond line", "first line"),
        (lambda text: trim(text, 12), "one two three four", "one two"),
        (lambda text: trim(text, 7), "one two three", "one two"),
        (lambda text: trim(text, 5), "abcdefgh", "abcde"),
    ],
)
def test_each_step_by_example(step: Callable[[str], tuple[str, bool]], before: str, after: str) -> None:
    assert step(before) == (after, True)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (lambda text: normalize(text, "NFC"), "café ﬁ"),
        (remove_invisible, "می\u200cخواهم 👩\u200d💻\ta\r\nb"),
        (collapse_symbols, "a --- b ... c ((((([[[[[\"\"\"\"\"''''' |"),
        (collapse_symbols, "真的！！！……评分★★★☆☆ ああーーーー １００００００ 々々々々 ））））"),
        (drop_symbols, "评分★★★ 等等。。。 ああーーーー ））））"),
        (drop_symbols, "a --- b ... c )))))) 10000000 ─"),
        (strip_html, "List<String> x = a < b && c > d; def f[T](x: <T>) -> 'a<b'"),
        (strip_html, "<![x"),
        (lambda text: tidy_space(text, words=True), "  a b\n\n  c"),
        (lambda text: remove_lines(text, {"license"}), "a license\nb"),
        (lambda text: trim(text, 3), "abc"),
    ],
)
def test_what_is_no_dirt_stays(step: Callable[[str], tuple[str, bool]], text: str) -> None:
    assert step(text) == (text, False)


def test_an_element_that_nothing_closes_does_not_swallow_the_document() -> None:
    assert strip_html("Put it in <head> and go on.")[0] == "Put it in  and go on."
    assert strip_html("Use <script> to run it.")[0] == "Use  to run it."


def test_an_escaped_tag_is_text() -> None:
    assert strip_html("write &lt;b&gt; for bold") == ("write <b> for bold", True)


RECIPES = [
    CleaningRecipe(invisible=invisible, unicode=form, symbols=symbols, white_space=white_space)
    for invisible, form, symbols, white_space in itertools.product(
        (False, True), ("none", "NFC", "NFKC"), ("keep", "collapse", "drop"), ("keep", "lines", "words")
    )
]


def clean(text: str, recipe: CleaningRecipe) -> tuple[str, bool]:
    """A text after every step that `recipe` switches on, and whether that changed it."""
    cleaned = text
    for _, step in steps(recipe):
        cleaned, _ = step(cleaned)
    return cleaned, cleaned != text


@given(TEXTS, st.sampled_from(RECIPES))
def test_cleaning_twice_is_cleaning_once(text: str, recipe: CleaningRecipe) -> None:
    once, changed = clean(text, recipe)
    assert changed == (once != text)
    assert clean(once, recipe) == (once, False)


@given(TEXTS)
def test_every_step_takes_any_text_and_says_truly_whether_it_changed_it(text: str) -> None:
    everything = CleaningRecipe(html=True, invisible=True, unicode="NFKC", symbols="drop", white_space="words")
    for result, changed in (clean(text, everything), strip_html(text), drop_symbols(text), remove_invisible(text)):
        assert changed == (result != text)


@given(TEXTS, st.integers(1, 70))
def test_trimmed_text_is_a_beginning_within_the_limit(text: str, limit: int) -> None:
    trimmed, changed = trim(text, limit)
    assert len(trimmed) <= limit and text.startswith(trimmed) and changed == (len(text) > limit)
    assert trim(trimmed, limit) == (trimmed, False)


@pytest.mark.parametrize("text", ["=" * 200_000 + "a", "=-" * 100_000, " " * 200_000, "<" * 100_000, "─ " * 100_000])
def test_hostile_text_takes_linear_time(text: str) -> None:
    clean(text, CleaningRecipe(html=True, invisible=True, unicode="NFKC", symbols="drop", white_space="words"))
