"""Benchmarks that are programs of their own."""

from __future__ import annotations

import pytest

from benchmarks.common.standalone import run
from benchmarks.experiments import savedmodel_slots


def test_an_error_that_the_user_can_mend_is_one_line_and_its_exit_code(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(lambda: savedmodel_slots.main([str(tmp_path)]))
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "manifest.json" in line
