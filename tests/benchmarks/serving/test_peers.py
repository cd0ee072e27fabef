"""Other servers beside ours: what they are given to read, and turns of whoever starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import pytest

from benchmarks.serving.peer_files import vocabulary, write_folder, write_model
from benchmarks.serving.peers import Peer, compare, peers
from tests.tiny_build import TinyBuild

# Answers everything with three plain events, whose text is no error although it says so, and no [DONE].
_SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert b'"prompt": " ' in body and b"logprobs" not in body, body
        self.send_response(200)
        self.end_headers()
        for reason in (b"null", b"null", b'"length"'):
            self.wfile.write(b'data: {"choices": [{"index": 0, "text": "error", "finish_reason": %s}]}\\n\\n' % reason)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
_PLAIN = {"text": True, "plain": True}


def test_servers_take_turns_and_one_that_does_not_start_is_named(tmp_path: Path) -> None:
    found = [
        Peer("here", [sys.executable, "-c", _SERVER, "{port}"], "/health", _PLAIN, ""),
        Peer("gone", [sys.executable, "-c", "raise SystemExit('no such model')"], "/health", _PLAIN, ""),
    ]
    record = compare(found, [1, 2], 0.2, 1, {"prompt_tokens": 8, "new_tokens": 6}, tmp_path)
    assert [(done["server"], done["clients"]) for done in record["rounds"]] == [("here", 1), ("here", 2)]
    for done in record["rounds"]:
        complete = done["outcomes"]["complete"]
        assert set(done["outcomes"]) == {"complete", "hung"} and complete > 0
        # Three events of a text of full length are its six tokens.
        assert done["tokens"] == pytest.approx(6 * complete)
    assert list(record["failed"]) == ["gone"]
    assert "no such model" in (tmp_path / "gone.log").read_text(encoding="utf-8")


def test_the_gguf_file_has_no_end_and_a_text_for_each_id(built: TinyBuild, tmp_path: Path) -> None:
    write_model(built.bundle, tmp_path / "model.gguf", "q8_0")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert set(fields["tokenizer.ggml.token_type"].contents()) == {gguf.TokenType.NORMAL}
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0


def test_every_id_of_the_model_has_a_text(tmp_path: Path) -> None:
    bundle, folder = tmp_path / "bundle", tmp_path / "folder"
    bundle.mkdir()
    (bundle / "vocab.json").write_text('{"a": 0, "b": 2}', encoding="utf-8")
    (bundle / "config.json").write_text('{"vocab_size": 5, "eos_token_id": 2}', encoding="utf-8")
    (bundle / "tokenizer.json").write_text('{"model": {"vocab": {}}, "added_tokens": [1]}', encoding="utf-8")
    (bundle / "model.safetensors").write_bytes(b"weights")
    assert vocabulary(bundle) == ["a", "<1>", "b", "<3>", "<4>"]
    write_folder(bundle, folder)
    write_folder(bundle, folder)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["eos_token_id"] is None
    assert len(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]) == 5


def test_only_what_is_installed_takes_part(tmp_path: Path) -> None:
    assert [peer.name for peer in peers(tmp_path, "int8", tmp_path, None, tmp_path)] == ["gpt2-bundle"]
