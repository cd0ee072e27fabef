"""The charts and tables of README and docs come from the newest record, and a change of either is found."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from benchmarks.common.runtime_process import ROOT
from benchmarks.common.statistics import SAME, UNKNOWN
from benchmarks.peers.publish import PAGES, chart, conditions, main, newest_record, summary, table
from benchmarks.suite.record import read_record
from serving.errors import GPT2BundleError, InputError


@pytest.fixture(scope="module")
def record():
    return read_record(newest_record(ROOT / "benchmarks" / "results"))


def test_pages_and_charts_are_those_of_the_newest_record():
    result = CliRunner().invoke(main, ["--check"], catch_exceptions=False)
    assert result.exit_code == 0


def test_every_block_of_a_page_is_filled_and_readme_has_chart_and_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- peers:(\w+) -->\n(.*?)<!-- /peers:\1 -->", text, re.DOTALL))
    assert blocks["chart"].count("peers-") == 2 and blocks["summary"].count("|---") > 3
    assert "<!-- peers:table -->" in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_a_changed_figure_a_changed_record_and_a_missing_one_are_found(tmp_path, record):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    with pytest.raises(InputError, match="make bench-peers"):
        newest_record(results)
    for page in PAGES:
        if (ROOT / page).exists():
            (tmp_path / page).parent.mkdir(exist_ok=True)
            shutil.copyfile(ROOT / page, tmp_path / page)
    (results / "2026-01-01-peers-cpu.json").write_text("{}")
    (results / "2999-01-01-peers-cpu.json").write_text(json.dumps(record))
    root = ["--root", str(tmp_path)]
    assert CliRunner().invoke(main, root, catch_exceptions=False).exit_code == 0
    assert CliRunner().invoke(main, [*root, "--check"], catch_exceptions=False).exit_code == 0
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text().replace("| 1 | ", "| 1 | 9", 1))
    with pytest.raises(GPT2BundleError, match=r"README\.md: not what 2999-01-01-peers-cpu\.json gives"):
        CliRunner().invoke(main, [*root, "--check"], catch_exceptions=False)
    faster = json.loads(json.dumps(record))
    faster["points"][0]["rows"][0]["figures"]["step_ms"] = [0.01]
    (results / "2999-01-02-peers-cpu.json").write_text(json.dumps(faster))
    with pytest.raises(GPT2BundleError, match=r"docs/benchmarks\.md: not what 2999-01-02"):
        CliRunner().invoke(main, [*root, "--check"], catch_exceptions=False)


def test_bold_is_whoever_is_not_distinguishable_from_the_best(record):
    made = json.loads(json.dumps(record))
    point = next(each for each in made["points"] if each["point"] == "int8, batch 4")
    over = {row["target"]: {"call": "higher"} for row in point["rows"]} | {"ort/int8": {"call": SAME}}
    del over["openvino/int8"]
    point["comparisons"]["step_ms"] = {"best": "openvino/int8", "winner": None, "over_best": over}
    (line,) = (line for line in summary(made).splitlines() if line.startswith("| 4 |"))
    steps = {row["target"]: statistics.median(row["figures"]["step_ms"]) for row in point["rows"] if not row["errors"]}
    assert all(f"**{steps[name]:.2f}**" in line for name in ("ort/int8", "openvino/int8"))
    assert f"**{steps['llama/int8']:.2f}**" not in line
    told = "\n".join(conditions(made))
    assert "decode openvino/int8, ort/int8 not distinguishable" in told and "equal" not in told
    over["ort/int8"]["call"] = "higher"
    assert "decode openvino/int8 ahead" in "\n".join(conditions(made))
    for each in over.values():
        each["call"] = UNKNOWN
    (line,) = (line for line in summary(made).splitlines() if line.startswith("| 4 |"))
    assert f"**{steps['openvino/int8']:.2f}**" not in line
    assert "decode openvino/int8 fastest (too few rounds for a verdict)" in "\n".join(conditions(made))
    point["session"]["others_cpu_share"] = 0.2
    assert "DISTURBED: other programs took 20% of the cores" in table(made, "r.json")


def test_a_chart_is_well_formed_and_has_a_bar_for_each_runtime_of_each_point(record):
    rows = sum(not row["errors"] for point in record["points"] for row in point["rows"])
    point = next(each for each in record["points"] if each["point"] == "int8, batch 16")
    (ours,) = (row["figures"] for row in point["rows"] if row["target"] == "ort/int8")
    bar = f"gpt2-bundle, int8, batch 16: {statistics.median(ours['step_tokens_per_second']):,.0f} tokens/s"
    for theme in ("light", "dark"):
        root = ElementTree.fromstring(chart(record, theme))
        titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
        assert len(titles) == rows and bar in map(str, titles)
        width, height = (float(root.get(name)) for name in ("width", "height"))
        for each in root.iter("{http://www.w3.org/2000/svg}rect"):
            assert 0 <= float(each.get("x")) <= width and 0 <= float(each.get("y")) <= height
