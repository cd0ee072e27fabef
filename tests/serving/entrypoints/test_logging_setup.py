"""The server's log lines, and what becomes of them where standard error is gone."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from serving.entrypoints import logging_setup


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_line_is_json_and_goes_to_the_standard_error_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    monkeypatch.setattr(sys, "stderr", closed)
    logging_setup.configure("json")
    closed.close()
    now = io.StringIO()
    monkeypatch.setattr(sys, "stderr", now)
    logging.getLogger("gpt2_bundle.access").info("%s %d", "GET", 404, extra={"request_id": "r1"})
    line = json.loads(now.getvalue())
    assert (line["message"], line["level"], line["request_id"]) == ("GET 404", "info", "r1")


@pytest.mark.parametrize("kind", ["closed", "full", "none"])
def test_a_standard_error_that_takes_nothing_raises_nothing(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    said = io.StringIO()
    stream = None if kind == "none" else Full() if kind == "full" else io.StringIO()
    if kind == "closed":
        assert stream is not None
        stream.close()
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr("traceback.print_exception", lambda *args, **kwargs: said.write("traceback"))
    monkeypatch.setattr(sys, "stderr", stream)
    logging_setup.configure("text")
    logging.getLogger("gpt2_bundle.server").info("a line")
    assert not said.getvalue()
