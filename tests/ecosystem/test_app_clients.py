"""Frameworks, KServe's clients and load generators ask a server unchanged and get what plain HTTP gets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import make_once
from tests.ecosystem.chat_bundle import write_chat_bundle
from tests.ecosystem.conftest import ROOT, python_of
from tests.serving.commands.test_serve import process

pytestmark = pytest.mark.ecosystem
HERE = Path(__file__).parent
PROMPT = "ab cd"
# Tokens that wait for a busy event loop come in one chunk: a few of this small model may all do.
TOKENS = 96
OVERFLOW = "context_length_exceeded"
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_DISABLE_TELEMETRY": "1"}


class Served(NamedTuple):
    """Where the server is: its base URL, and the address of its gRPC port."""

    url: str
    grpc: str
    folder: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = make_once(tmp_path_factory, "chat", write_chat_bundle)
    with process(folder, "--grpc-port", "0", "--no-access-log") as (server, url):
        assert server.stderr is not None
        port = next(found[1] for line in server.stderr if (found := re.search(r"gRPC at .* port (\d+)", line)))
        # Nobody may leave the server's standard error full: it would wait there.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield Served(url, f"localhost:{port}", folder)


def post(url: str, path: str, **body: Any) -> Any:
    """The answer to a plain request, greedy unless `body` says otherwise."""
    data = json.dumps({"max_tokens": TOKENS, "temperature": 0, **body}).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def complete(url: str, prompt: str = PROMPT, **body: Any) -> tuple[list[str], list[int]]:
    answer = post(url, "/v1/completions", prompt=prompt, **body)
    return [choice["text"] for choice in answer["choices"]], _counts(answer["usage"])


def chat(url: str, **body: Any) -> tuple[list[str], list[int]]:
    answer = post(url, "/v1/chat/completions", messages=[{"role": "user", "content": PROMPT}], **body)
    return [choice["message"]["content"] for choice in answer["choices"]], _counts(answer["usage"])


def _counts(usage: dict[str, int]) -> list[int]:
    return [usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]]


def ran(command: list[Any], **more: Any) -> str:
    """The standard output of a client's program."""
    environment = {**os.environ, **QUIET, **more}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def check(found: dict[str, Any], ask: Any) -> None:
    """Hold a client's answers to plain HTTP's. `ask` sends the client's prompt."""
    ((text,), usage) = ask()
    assert len(set(text)) > 5 and usage[0] + usage[1] == usage[2]
    assert found["whole"] == text and found["usage"] == usage
    if "streamed" in found:
        assert found["streamed"] == text and found["chunks"] > 1
    assert found["stopped"] == ask(stop=text[2])[0][0] == text[: text.index(text[2])]
    assert found["seeds"] == [ask(temperature=1, seed=seed)[0][0] for seed in (7, 7, 8)]
    assert found["seeds"][0] != found["seeds"][2]
    assert found["overflow"] == OVERFLOW


@pytest.mark.parametrize(
    ("environment", "client"), [("frameworks", "llm"), ("llamaindex", "llama_index"), ("frameworks", "dspy")]
)
def test_a_framework_gets_what_plain_http_gets(served: Served, environment: str, client: str) -> None:
    python = python_of(environment)
    found = json.loads(ran([python, HERE / "app_clients.py", client, served.url, "chat"]).splitlines()[-1])
    # DSPy's text models write this after a prompt.
    prompt = f"{PROMPT}\n\nBEGIN RESPONSE:" if client == "dspy" else PROMPT
    check(found["completion"], lambda **body: complete(served.url, prompt, **body))
    check(found["chat"], lambda **body: chat(served.url, **body))
    if client == "dspy":
        texts, _ = complete(served.url, prompt, n=3, temperature=1, seed=7)
        assert found["n"] == texts and len(set(texts)) == 3
        assert found["structured"][0] in ("good", "bad") and found["structured"][1] in (True, False)


def test_the_ai_sdk_gets_what_plain_http_gets(served: Served) -> None:
    modules, node = ROOT / ".node-ai/node_modules", shutil.which("node")
    if node is None or not modules.is_dir():
        pytest.skip("no node on PATH, or no .node-ai here; run 'make .node-ai/installed'")
    output = ran([node, HERE / "ai_sdk_client.mjs", modules, served.url, "chat"])
    found = json.loads(output.splitlines()[-1])
    # The AI SDK writes a conversation into a completion's prompt so, and stops at the next turn.
    prompt = f"user:\n{PROMPT}\n\nassistant:\n"
    check(found["completion"], lambda **body: complete(served.url, prompt, **body))
    check(found["chat"], lambda **body: chat(served.url, **body))
    for each in (found["completion"], found["chat"]):
        assert each["streamed_usage"] == each["usage"] and each["finish"] == ["length", "length", "stop"]
        assert each["streamed_overflow"] == [OVERFLOW]
        assert each["aborted"] and each["after"] == each["whole"]
    assert found["structured"]["ok"] in (True, False) and found["structured"]["kind"] in ("a", "b")


def test_kserves_clients_get_what_plain_http_gets(served: Served) -> None:
    program = HERE / "kserve_client.py"
    found = json.loads(ran([python_of("kserve"), program, served.url, served.grpc, "chat"]).splitlines()[-1])
    (text,), _ = complete(served.url, max_tokens=6)
    wanted = {"text": text, "lengths": 6, "prompt_tokens": 5, "finish_reason": "length"}
    assert found["v1"]["ready"] == [True, True] and found["v1"]["answer"] == [wanted]
    assert found["v1"]["wrong"][0] == 400 and "the signature takes" in found["v1"]["wrong"][1]
    assert found["v1"]["unknown"][0] == 404 and "no model 'none'" in found["v1"]["unknown"][1]
    token_ids = post(served.url, "/v1/completions", prompt=PROMPT, max_tokens=6, return_token_ids=True)
    outputs = {
        "text_output": [text], "token_ids": [token_ids["choices"][0]["token_ids"]], "lengths": [6],
        "prompt_tokens": [5], "finish_reason": ["length"],
    }  # fmt: skip
    for protocol, statuses in (("v2", (400, 404)), ("grpc", ("INVALID_ARGUMENT", "NOT_FOUND"))):
        each = found[protocol]
        assert all(each["ready"])
        assert each["answers"] == [["chat", "own", outputs]] * 2
        assert each["chosen"] == [["chat", "own", {"text_output": [text], "lengths": [6]}]] * 2
        assert (each["overflow"][0], each["unknown"][0]) == statuses
        assert "maximum context length is 8192 tokens" in each["overflow"][1]
        assert "no model 'none'" in each["unknown"][1]


def test_locusts_users_get_the_answer_every_time(served: Served, tmp_path: Path) -> None:
    locust = python_of("frameworks").with_name("locust")
    (text,), _ = complete(served.url)
    command = [locust, "--locustfile", HERE / "locust_users.py", "--headless", "--host", served.url]
    command += ["--users", "6", "--spawn-rate", "6", "--run-time", "8s", "--stop-timeout", "20"]
    ran([*command, "--csv", tmp_path / "own"], EXPECTED=text)
    rows = [line.split(",") for line in (tmp_path / "own_stats.csv").read_text().splitlines()]
    requests, failures = rows[0].index("Request Count"), rows[0].index("Failure Count")
    counts = {row[1]: (int(row[requests]), int(row[failures])) for row in rows[1:]}
    assert {"whole", "overflow", "stream"} <= counts.keys()
    assert all(made > 0 and not failed for made, failed in counts.values()), counts


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_aiperf_counts_what_the_server_says(served: Served, tmp_path: Path, kind: str) -> None:
    aiperf, requests, tokens = python_of("aiperf").with_name("aiperf"), 12, 16
    command = [aiperf, "profile", "--model", "chat", "--url", served.url, "--endpoint-type", kind, "--streaming"]
    command += ["--tokenizer", served.folder, "--request-count", requests, "--concurrency", "4", "--ui", "none"]
    command += ["--synthetic-input-tokens-mean", "64", "--output-tokens-mean", tokens, "--use-server-token-count"]
    command += ["--extra-inputs", "ignore_eos:true", "--artifact-dir", tmp_path, "--random-seed", "3"]
    ran([*command, *(["--per-chunk-usage"] if kind == "chat" else [])])
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == requests and report["error_summary"] == []
    assert report["total_usage_completion_tokens"]["avg"] == report["total_output_tokens"]["avg"] == requests * tokens
    total = report["total_usage_prompt_tokens"]["avg"] + requests * tokens
    assert report["total_usage_total_tokens"]["avg"] == total
    assert report["time_to_first_token"]["avg"] > 0 and report["inter_token_latency"]["avg"] > 0
    scraped = json.loads((tmp_path / "server_metrics_export.json").read_text())["summary"]
    assert scraped["endpoints_successful"] == [f"{served.url}/metrics"]
