"""Schemathesis asks a server of small real graphs what its OpenAPI description allows, and much that it does not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.serving.commands.test_serve import process

# Only one of its checks is left out: that whatever fits the schemas is accepted. A model's vocabulary, its context and
# an engine's slots bound what a request may ask, and a schema cannot say that.
OPTIONS = (
    "--phases examples,coverage,fuzzing,stateful --max-examples 12 --generation-deterministic --request-timeout 30"
)
OPTIONS += " --continue-on-failure --exclude-checks positive_data_acceptance --no-color"


@pytest.mark.ecosystem
def test_no_request_crashes_the_server_or_gets_an_answer_that_is_not_described(
    real_bundle: Path, tmp_path: Path
) -> None:
    program = os.environ.get("SCHEMATHESIS")
    if not program:
        pytest.skip("SCHEMATHESIS names no 'st' of Schemathesis 4; run 'make test-openapi'")
    command = [str(Path(program).absolute()), "run", *OPTIONS.split()]
    with process(real_bundle, "--request-timeout", "5", "--queue", "64") as (server, url):
        assert server.stderr is not None
        # The log is read at the end, and a pipe that is full would stop the server.
        with (tmp_path / "log").open("w") as log:
            reading = subprocess.Popen(["cat"], stdin=server.stderr, stdout=log)
            done = subprocess.run(
                [*command, f"{url}/openapi.json"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
            )
            server.terminate()
            assert server.wait(60) == 0
            reading.wait(60)
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout and said.count(" 200 ") > 50
    assert "Traceback" not in said and " 500 " not in said, said[-20_000:]
