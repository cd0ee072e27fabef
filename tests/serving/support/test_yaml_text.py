"""The YAML that is written is read by PyYAML as the same values."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.support.yaml_text import yaml_text

# Every character that YAML can hold, half a surrogate pair left out.
AWKWARD = ["on", "No", "~", "1e3", "0x1f", "2024-01-01", "a: b", "- a", "#", "a #b", "|", "\x7f", "\u2028"]
AWKWARD += ["x\ny\n", "x\n\ny\n", " x\ny\n", "x\n\n", "é\n", "x\r\ny\n", "x\n\ty\n", "\n\n"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(AWKWARD)
SCALARS = TEXTS | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False, width=16)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=20
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_what_is_written_reads_back(value: Any) -> None:
    assert yaml.safe_load(yaml_text([value], "two\nlines")) == value


def test_documents_follow_each_other_and_long_texts_stay_readable() -> None:
    text = yaml_text([{"a": [{"b": "x\n  y\n", "c": []}]}, {"d": "http://x:1", "e": "on"}])
    assert list(yaml.safe_load_all(text)) == [{"a": [{"b": "x\n  y\n", "c": []}]}, {"d": "http://x:1", "e": "on"}]
    assert text == 'a:\n  - b: |\n      x\n        y\n    c: []\n---\nd: "http://x:1"\ne: "on"\n'


@pytest.mark.parametrize("image", ["gpt2-bundle-serve:0.1.0-cpu", "a.example/b:1", "/tmp", "apps/v1"])
def test_images_and_paths_are_plain(image: str) -> None:
    assert yaml_text([{"image": image}]) == f"image: {image}\n"
