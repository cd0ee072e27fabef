"""The requests of docs/guides/tensorflow-serving.md, run as they stand there."""

from __future__ import annotations

import contextlib
import io
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.clients.grpc_transport import GrpcTransport
from serving.clients.tf_serving import TFServingClient
from serving.sampling import SamplingParams
from tests.serving.tf_serving_emulator import Emulator, serving

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "tensorflow-serving.md"
ROWS = (("Return the", 0.0, 0), ("Raise a", 0.7, 7), ("Return the", 1.0, 7))


@pytest.fixture(scope="module")
def server(real_bundle: Path) -> Iterator[Emulator]:
    with serving(real_bundle / "savedmodel/1", "gpt2-docs") as emulator:
        yield emulator


def test_three_prompts_with_three_temperatures(server: Emulator) -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    rows, columns = (json.loads(body) for body in re.findall(r":predict -d '(.*?)'\n", guide, re.DOTALL))
    (program,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)

    def post(body: object) -> dict[str, object]:
        url = f"{server.url}/v1/models/gpt2-docs:predict"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as answer:
            made: dict[str, object] = json.load(answer)
        return made

    client = TFServingClient(GrpcTransport(server.address, "gpt2-docs"))
    alone = [
        client.generate([text], SamplingParams(max_new_tokens=16, temperature=heat, top_p=0.9, seed=seed))[0].text
        for text, heat, seed in ROWS
    ]
    assert len(set(alone)) == 3
    assert [row["text"] for row in post(rows)["predictions"]] == alone  # type: ignore[attr-defined]
    assert post(columns)["outputs"]["text"] == alone  # type: ignore[index]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program.replace("127.0.0.1:8500", server.address), {})
    assert printed.getvalue() == f"{alone}\n"
