"""Tools of others open one bundle's folder as it is, cut texts as it does and continue them with our greedy tokens."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.bundle import Bundle
from serving.cli import run
from tests.ecosystem.conftest import NEW_TOKENS, ROOT, TEXTS, Answers, ask, ours, python_of
from tests.serving.chromium import CHROMIUM, browser

pytestmark = pytest.mark.ecosystem
HERE = Path(__file__).parent
NODE = ROOT / ".node-transformers/node_modules"


def compare(answer: dict[str, Any], expected: Answers) -> None:
    assert [len(tokens) for tokens in answer["answers"]] == [NEW_TOKENS] * len(TEXTS)
    assert answer["tokens"] == expected.tokens
    assert answer["answers"] == expected.answers


def test_transformers(varied: Bundle, expected: Answers) -> None:
    compare(ask([python_of("peer-torch"), HERE / "transformers_generate.py", varied.folder]), expected)


def test_optimum_in_a_left_padded_batch(varied: Bundle, expected: Answers) -> None:
    answer = ask([python_of("optimum"), HERE / "optimum_generate.py", varied.folder])
    assert answer["uses_cache"]
    compare(answer, expected)


def test_plain_onnxruntime(varied: Bundle, expected: Answers) -> None:
    compare(ask([python_of("onnxruntime"), HERE / "onnxruntime_generate.py", varied.folder]), expected)


@pytest.mark.parametrize("graph", ["ort/fp32", "ort/int8", "ort/int4"])
def test_onnxruntime_genai(varied: Bundle, expected: Answers, graph: str) -> None:
    answer = ask([python_of("genai"), HERE / "genai_generate.py", varied.folder / graph])
    # A quantized graph says what it says in this project.
    compare(answer, expected if graph == "ort/fp32" else ours(varied, graph))


def test_keras_hub(varied: Bundle, expected: Answers) -> None:
    compare(ask([python_of("peer-keras_hub"), HERE / "keras_hub_generate.py", varied.folder]), expected)


@pytest.mark.parametrize("graph", ["onnx/model.onnx", "ort/fp32/model.onnx"])
def test_openvino(varied: Bundle, expected: Answers, graph: str) -> None:
    compare(ask([python_of("openvino"), HERE / "openvino_generate.py", varied.folder, graph]), expected)


def test_tensorflows_session_as_tensorflow_serving_loads_it(varied: Bundle, expected: Answers) -> None:
    # KerasHub's environment has TensorFlow, and nothing of this project.
    command = [python_of("peer-keras_hub"), HERE / "tf_session_generate.py", varied.folder / "savedmodel/1"]
    compare(ask(command), expected)


def test_llama_cpp_by_gguf(varied: Bundle, expected: Answers, tmp_path: Path) -> None:
    python, path = python_of("peer-llama"), tmp_path / "model.gguf"
    assert run(["export", str(varied.folder), "--gguf", str(path)]) == 0
    answer = ask([python, HERE / "llama_generate.py", path])
    compare(answer, expected)
    model = varied.manifest.model
    assert answer["texts"] == list(TEXTS)
    assert (answer["bos"], answer["eos"], answer["name"]) == (
        model.bos_token_id, model.eos_token_id, varied.manifest.name,
    )  # fmt: skip


@pytest.mark.parametrize("outtype", ["f16", "q8_0", "q4_0"])
def test_llama_cpp_loads_the_other_types(varied: Bundle, expected: Answers, tmp_path: Path, outtype: str) -> None:
    python, path = python_of("peer-llama"), tmp_path / "model.gguf"
    assert run(["export", str(varied.folder), "--gguf", str(path), "--outtype", outtype]) == 0
    answer = ask([python, HERE / "llama_generate.py", path])
    assert answer["tokens"] == expected.tokens
    # Rounding changes a choice somewhere, and everything after it. The first token is still the same one.
    assert outtype == "q4_0" or [row[0] for row in answer["answers"]] == [row[0] for row in expected.answers]


@pytest.fixture
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("no node on PATH; install Node.js 20 or newer")
    if not NODE.is_dir():
        pytest.skip("no .node-transformers here; run 'make test-ecosystem', or 'make .node-transformers/installed'")
    return found


def test_transformers_js_on_node(varied: Bundle, expected: Answers, node: str) -> None:
    library = NODE / "@huggingface/transformers/dist/transformers.node.mjs"
    script, folder = HERE / "transformers_js_generate.mjs", varied.folder
    compare(ask([node, script, library, f"{folder.parent}/", folder.name]), expected)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


_PAGE = """<!doctype html><script type="module">
import * as transformers from "/library/transformers.min.js";
import { answer } from "/program.mjs";
transformers.env.allowLocalModels = true;
transformers.env.allowRemoteModels = false;
transformers.env.localModelPath = "/models/";
transformers.env.backends.onnx.wasm.wasmPaths = "/runtime/";
answer(transformers, "%s", %s, %d).then(
  (found) => { window.found = JSON.stringify(found); }, (error) => { window.found = String(error.stack ?? error); });
</script>"""


@pytest.fixture
def site(varied: Bundle, node: str, tmp_path: Path) -> Iterator[str]:
    """The address of a folder with a page, transformers.js, ONNX Runtime's WebAssembly and the bundle."""
    folder = tmp_path / "site"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / varied.folder.name).symlink_to(varied.folder)
    (folder / "library").symlink_to(NODE / "@huggingface/transformers/dist")
    (folder / "runtime").symlink_to(NODE / "onnxruntime-web/dist")
    (folder / "program.mjs").symlink_to(HERE / "transformers_js_generate.mjs")
    page = _PAGE % (varied.folder.name, json.dumps(TEXTS), NEW_TOKENS)
    (folder / "index.html").write_text(page, encoding="utf-8")
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_transformers_js_in_a_page(expected: Answers, site: str, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.open(site)
        page.wait("window.found")
        compare(json.loads(page.run("window.found")), expected)
        assert all(url.startswith((site, "blob:", "data:")) for url in page.requested())
