"""The guide's table of ports, probes and metrics is the one that deployments are made of."""

from __future__ import annotations

from serving.deploy.endpoints import PROBES, markdown_table
from serving.deploy.workload import _READ_RATE
from tests.docs.pages import ROOT

PAGE = ROOT / "docs/guides/deploy.md"


def test_the_guide_has_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition("<!-- endpoints -->\n")[2].partition("\n<!-- /endpoints -->")[0] == markdown_table()
    megabytes = _READ_RATE * PROBES[0].period // 1_000_000
    assert f"one more failure for each {megabytes} MB" in text
