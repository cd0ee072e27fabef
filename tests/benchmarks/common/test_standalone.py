"""Benchmarks that are programs of their own."""

from __future__ import annotations

import contextlib
import json

import click
import pytest
from click.testing import CliRunner

from benchmarks.common.standalone import measurement, run
from benchmarks.experiments import savedmodel_slots
from serving.bundle import open_bundle


def test_an_error_that_the_user_can_mend_is_one_line_and_its_exit_code(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(lambda: savedmodel_slots.main([str(tmp_path)]))
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "manifest.json" in line


def test_a_measurement_is_a_command_whose_record_has_its_options(real_bundle, tmp_path):
    @measurement(click.option("--shape", default="round"), graph="ort/int8", repeats=3, streams="1,4")
    def main(bundle, graph, shape, repeats, streams):
        """Measure nothing."""
        return {"graphs": len(bundle.manifest.graphs), "told": (graph, shape, repeats, streams)}

    output = tmp_path / "deep" / "record.json"
    options = ["--repeats", "2", "--streams", "8", "--shape", "flat", "--output", str(output)]
    result = CliRunner().invoke(main, [str(real_bundle), *options], catch_exceptions=False)
    assert result.exit_code == 0 and result.output == ""
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["told"] == ["ort/int8", "flat", 2, "8"] and record["repeats"] == 2 and record["graph"] == "ort/int8"
    assert record["graphs"] > 1 and record["bundle"] and record["environment"]["cores"] >= 1
    assert "Measure nothing." in CliRunner().invoke(main, ["--help"]).output


@pytest.mark.parametrize(
    ("options", "lengths", "words"),
    [
        ([], "half", "the model's context is"),
        (["--prompt-tokens", "7", "--new-tokens", "3"], (7, 3), ""),
        (["--new-tokens", "10"], None, "--prompt-tokens 100000 and --new-tokens 10 do not fit"),
    ],
)
def test_default_lengths_fit_into_the_context(real_bundle, options, lengths, words, capsys):
    half = open_bundle(real_bundle, check="sizes").manifest.model.n_positions // 2

    @measurement(prompt_tokens=100_000, new_tokens=128)
    def main(bundle, graph, prompt_tokens, new_tokens):
        return {"told": (prompt_tokens, new_tokens)}

    with contextlib.ExitStack() as stack:
        if lengths is None:
            stack.enter_context(pytest.raises(SystemExit))
        run(lambda: main([str(real_bundle), *options], standalone_mode=False))
    out, err = capsys.readouterr()
    assert words in err
    if lengths is not None:
        assert json.loads(out)["told"] == ([half, half] if lengths == "half" else list(lengths))
