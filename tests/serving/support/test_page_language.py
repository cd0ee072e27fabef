"""A page says its language, and a text in it its own where its letters look otherwise."""

from __future__ import annotations

import pytest

from serving.support.html_page import language_attribute, page


@pytest.mark.parametrize(
    ("text", "attribute"),
    [
        ("话说天下 and more", ' lang="zh"'),
        ("漢字とかな", ' lang="ja"'),
        ("한국어", ' lang="ko"'),
        ("Grüße, привет", ""),
        ("", ""),
    ],
)
def test_the_language_of_a_text(text: str, attribute: str) -> None:
    assert language_attribute(text) == attribute


def test_a_page_is_in_english() -> None:
    assert b'<html lang="en">' in page("title", "body")
