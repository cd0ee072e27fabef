"""`gpt2-bundle serve` as a process over a real bundle, in both runtimes; its refusals, each one line."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton_grpc

from serving.backends.loader import load_backend
from serving.bundle import open_bundle
from serving.clients.grpc_transport import GrpcTransport
from serving.commands.param_types import Size
from serving.generation import generate
from serving.sampling import SamplingParams
from tests.closed_form import byte_tokenizer
from tests.serving.tf_serving_emulator import serving
from tests.tiny_build import Fails

ROOT = Path(__file__).parents[3]
PROMPT = [1, 2, 3]


@contextlib.contextmanager
def process(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command on a free port, and its URL once it serves."""
    command = [sys.executable, "-m", "serving.cli", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None and server.stderr is not None
            line = server.stdout.readline()
            assert line, server.stderr.read()
            yield server, line.split()[-1]
        finally:
            server.kill()


def completion(url: str, **body: Any) -> str:
    """The answer's body."""
    data = json.dumps({"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **body}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("runtime", ["onnx", pytest.param("tensorflow", marks=pytest.mark.slow)])
def test_each_runtime_says_what_generate_says(real_bundle: Path, runtime: str) -> None:
    backend = load_backend(open_bundle(real_bundle), "onnx")
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    (expected,) = generate(backend, [PROMPT], params, 256)
    text = byte_tokenizer().decode(expected.token_ids, skip_special_tokens=False)
    with process(
        real_bundle, "--runtime", runtime, "--max-num-seqs", "2", "--replicas", "2", "--log-format", "json"
    ) as served:
        server, url = served
        whole = json.loads(completion(url))["choices"][0]
        chunks = completion(url, stream=True).split("\n\n")
        server.terminate()
        assert server.wait(60) == 0
        assert server.stderr is not None
        log = server.stderr.read()
    assert whole["text"] == text and whole["finish_reason"] == "length"
    assert "".join(json.loads(chunk[6:])["choices"][0]["text"] for chunk in chunks[:-2]) == text
    assert chunks[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [event["status"] for event in events if event.get("path") == "/v1/completions"] == [200, 200]
    assert "every accepted request has ended" in log and "Traceback" not in log


def test_it_is_a_front_to_another_server_and_speaks_grpc(real_bundle: Path) -> None:
    with serving(real_bundle / "savedmodel/1", "bytes") as emulator, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken.close()
        options = ["--runtime", "tf-serving", "--tf-serving", emulator.url, "--grpc-port", str(port)]
        with process(real_bundle, *options) as (server, url):
            assert json.loads(completion(url))["usage"]["completion_tokens"] == 6
            versions = GrpcTransport(f"127.0.0.1:{port}", "bytes").status(10)
            assert [each["state"] for each in versions] == ["AVAILABLE"]
            with urllib.request.urlopen(f"{url}/v2/models/bytes") as answer:
                assert json.load(answer)["versions"] == ["1"]
            with triton_grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
                assert client.is_model_ready("bytes", "1")
            server.terminate()
            assert server.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--runtime", "tensorflow", "--graph", "ort/fp32"], 2, "--graph is for --runtime onnx"),
        (["--runtime", "tf-serving"], 2, "needs an address"),
        (["--tf-serving", "http://127.0.0.1:1"], 2, "is for --runtime tf-serving"),
        (["--runtime", "tf-serving", "--tf-serving", "nonsense"], 2, "not an address of a server"),
        (["--runtime", "tf-serving", "--tf-serving", "grpc:127.0.0.1:1", "--replicas", "2"], 2, "one set of slots"),
        (["--ssl-certfile", "cert.pem"], 2, "belong together"),
        (["--ssl-certfile", "none.pem", "--ssl-keyfile", "none.pem"], 2, "check --ssl-certfile and --ssl-keyfile"),
        (["--memory-budget", "many"], 2, "is not a size"),
        (["--memory-budget", "1KiB"], 1, "raise --memory-budget"),
        (["--max-model-len", "4000"], 2, "the model's context is"),
        (["--graph", "ort/fp23"], 2, "did you mean 'ort/fp32'"),
        (["--api-key-file", "none"], 2, "cannot be read"),
        (["--api-key", "short"], 2, "8 or more printable ASCII characters"),
        (["--max-num-batched-tokens", "64", "--runtime", "tensorflow"], 2, "is for --runtime onnx"),
        (["--host", ""], 2, "127.0.0.1, or 0.0.0.0 for every interface"),
        (["--served-model-name", "a:b"], 2, "'a:b' must be 1 to 100 letters"),
        (["--watch", "nan"], 2, "'nan' is not a number"),
        (["--prefill-slowdown", "nan"], 2, "'nan' is not a number"),
        (["--watch", "inf"], 2, "not in the range"),
        (["--drain-timeout", "1e300"], 2, "not in the range"),
        (["--request-timeout", "nan"], 2, "'nan' is not a number"),
        (["--rate-limit", "inf"], 2, "not in the range"),
        (["--cors-origin", "https://example.org/"], 2, "is not an origin"),
        (["--cors-origin", "example.org"], 2, "is not an origin"),
        (["--max-body", "3GiB", "--grpc-port", "0"], 2, "gRPC takes at most"),
        (["--tf-serving", "grpc:", "--runtime", "tf-serving"], 2, "is not an address of a gRPC server"),
        (["--device", "cuda:x"], 2, "no device 'cuda:x'"),
        (["--device", "cud"], 2, "did you mean 'cuda'"),
        (["--device", "cpu,"], 2, "no device ''"),
        (["--device", "cpu", "--device", "cuda:1"], 2, "give --replicas 2"),
        (["--device", "cpu", "--runtime", "tensorflow"], 2, "--device is for --runtime onnx"),
        (["--prefill-slowdown", "2", "--runtime", "tensorflow"], 2, "--prefill-slowdown is for --runtime onnx"),
        (["--prefill-slowdown", "2", "--prefill-chunk", "16"], 2, "exclude each other"),
        (["--speculation", "fast"], 2, "'fast' is not one of"),
        (["--speculation", "off", "--runtime", "tensorflow"], 2, "--speculation is for --runtime onnx"),
    ],
)
def test_refusals(bundle_folder: Path, fails: Fails, options: list[str], code: int, words: str) -> None:
    fails(["serve", str(bundle_folder), "--port", "0", *options], code, words)


def test_a_taken_port_and_a_missing_folder(bundle_folder: Path, tmp_path: Path, fails: Fails) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        fails(["serve", str(bundle_folder), "--port", port], 1, f"port {port} on 127.0.0.1 is taken")
    fails(["serve", str(tmp_path / "none"), "--port", "0"], 2, "there is no such folder")


def test_missing_packages_are_named(bundle_folder: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    fails(["serve", str(bundle_folder), "--port", "0"], 1, "pip install 'gpt2-bundle[serve]'")


def test_sizes() -> None:
    size = Size()
    assert [size.convert(text, None, None) for text in ("7", "512MiB", "1.5 GB")] == [7, 2**29, 1_500_000_000]
