"""Servers as targets: TensorFlow Serving started here or elsewhere, our own by each protocol, generate_stream."""

from __future__ import annotations

import asyncio
import json
import stat
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from benchmarks.suite.figures.record_rows import peak_rss
from benchmarks.suite.load.events import differing
from benchmarks.suite.load.schedule import Lengths, Planner
from benchmarks.suite.targets import started_tf_serving
from benchmarks.suite.targets.base import timestamps_of
from benchmarks.suite.targets.generate import split_model
from benchmarks.suite.targets.open import default_targets, open_defaults, open_target
from serving.bundle import open_bundle
from serving.errors import InputError, RuntimeMissingError, ServerError
from serving.sampling.detokenizer import load_tokenizer
from tests.benchmarks.suite.test_targets import drive
from tests.serving.tf_serving_emulator import serving

ROOT = Path(__file__).parents[3]


def program(folder: Path, text: str, name: str = "server") -> str:
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def bundle(real_bundle):
    return open_bundle(real_bundle, check="sizes")


@pytest.fixture
def schedule(bundle):
    return Planner(range(1, 90), bundle.manifest.model.n_positions).concurrency(2, 3, Lengths(3, 5), Lengths(4, 4))


@pytest.fixture
def expected(bundle, schedule):
    return drive(schedule, open_target(bundle, "ort/fp32", batch=4))


def agree(found, expected):
    assert [each.error for each in found] == [None] * len(found)
    assert all(each.tokens is not None for each in found) and differing(found, expected) == []


@pytest.mark.slow
def test_a_tensorflow_serving_elsewhere_gives_the_same_tokens_by_every_way(bundle, schedule, expected):
    with serving(bundle.folder / "savedmodel/1", bundle.manifest.name) as server:
        for kind in ("tfserving", "tfserving-rest", "tfserving-predict", "tfserving-rest-predict"):
            server.run_calls.clear()
            address = server.url if "rest" in kind else server.address
            target = open_target(bundle, f"{kind}={address}", batch=1, emulator=True)
            found = drive(schedule, target)
            agree(found, expected)
            whole = kind.endswith("predict")
            assert target.emulator and target.label.endswith("whole answers" if whole else "its slots")
            assert all(each.streamed is not whole and each.counted for each in found)
            # A whole answer is one call, or another behind each end token.
            made = {"serving_default"} if whole else {"prefill_slots", "decode_slots", "release_slots"}
            assert set(server.run_calls) == made
            if whole:
                assert sum(len(set(each.token_times)) for each in found) == len(server.run_calls)


@pytest.mark.slow
def test_slots_that_the_server_lacks_are_whole_answers_and_past_the_end_token_another_call(bundle, schedule, expected):
    with serving(bundle.folder / "savedmodel/1", bundle.manifest.name) as server:
        for name in ("prefill_slots", "decode_slots", "release_slots"):
            del server.servable.signatures[name]
        calls = []
        plain = server.run

        def run(signature, inputs):
            calls.append(int(inputs["max_new_tokens"][0]))
            outputs = plain(signature, inputs)
            # As the graph would if its second token were the end token.
            made = min(2, int(outputs["lengths"][0])) if len(calls) == 1 else int(outputs["lengths"][0])
            outputs = outputs | {"lengths": outputs["lengths"] * 0 + made}
            if len(calls) == 1:
                target._inner._eos = int(outputs["token_ids"][0][1])
            return outputs

        server.run = run
        target = open_target(bundle, f"tfserving={server.address}", batch=1)
        one = type(schedule)(schedule.scenario, "", {}, schedule.requests[:1], 1)
        agree(drive(one, target), expected[:1])
    assert calls[:2] == [4, 2] and "whole answers" in target.label


def test_tensorflow_serving_is_started_driven_and_ended(bundle, schedule, expected, tmp_path, monkeypatch):
    script = f'#!/bin/sh\nexec {sys.executable} -m tests.benchmarks.suite.model_server_emulator "$@"\n'
    monkeypatch.setenv("TENSORFLOW_MODEL_SERVER", program(tmp_path, script))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(started_tf_serving.tempfile, "tempdir", None)
    target = open_target(bundle, "tfserving", batch=1)
    seen = {}

    async def work():
        from benchmarks.suite.driver import play
        from benchmarks.suite.load.clock import WallClock

        await target.start()
        try:
            found = await play(schedule, target, WallClock(), 60)
            seen.update(pid=target.pid(), rss=peak_rss(target.pid()))
            return found
        finally:
            await target.stop()

    with serving(bundle.folder / "savedmodel/1", bundle.manifest.name) as server:
        ports = (server.address.rpartition(":")[2], server.url.rpartition(":")[2])
        monkeypatch.setenv("MODEL_SERVER_BEHIND", ",".join(ports))
        agree(asyncio.run(work()), expected)
        assert set(server.run_calls) == {"prefill_slots", "decode_slots", "release_slots"}
    assert target.emulator and "is not TensorFlow ModelServer" in target.label and seen["rss"] > 5 << 20
    assert target.pid() is None and not Path(f"/proc/{seen['pid']}").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["server"]


def test_a_server_that_says_tensorflow_modelserver_is_no_stand_in(tmp_path, monkeypatch):
    said = "echo 'TensorFlow ModelServer: 2.21.0-rc1+dev'; echo 'TensorFlow Library: 2.21.0'"
    monkeypatch.setenv("TENSORFLOW_MODEL_SERVER", program(tmp_path, f"#!/bin/sh\n{said}\n"))
    found = started_tf_serving.find_server()
    assert not found.emulator and found.label == "tensorflow_model_server 2.21.0-rc1+dev"


def test_a_server_that_does_not_start_says_its_last_words_in_one_line(bundle, tmp_path, monkeypatch):
    script = "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho first >&2\necho 'no such flag' >&2\nexit 7\n"
    monkeypatch.setenv("TENSORFLOW_MODEL_SERVER", program(tmp_path, script))
    with pytest.raises(ServerError, match="ended with 7 before it was ready: first / no such flag") as caught:
        drive(None, open_target(bundle, "tfserving", batch=1))
    assert "\n" not in str(caught.value)


def test_a_server_that_never_is_ready_is_ended_at_the_time_limit(bundle, tmp_path, monkeypatch):
    script = "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\ntrap '' TERM\necho loading\nwhile :; do sleep 0.1; done\n"
    monkeypatch.setenv("TENSORFLOW_MODEL_SERVER", program(tmp_path, script))
    monkeypatch.setattr(started_tf_serving, "_START", 2.5)
    monkeypatch.setattr(started_tf_serving, "_STOP", 0.3)
    server = started_tf_serving.TFServingProcess("tfserving", bundle, started_tf_serving.find_server(), "grpc")
    with pytest.raises(ServerError, match=r"no model was AVAILABLE after 2\.5 s: loading"):
        server.start()
    process = server._process
    server.stop()
    assert process.returncode == -9


ENGINE = """#!/bin/sh
case "$1 $2" in
  "info "*) exit 0 ;;
  "image inspect") exit {image} ;;
  "inspect --format") echo 0 ;;
  "stop "*) kill "$(cat {folder}/pid)" ;;
  "run "*) echo $$ > {folder}/pid; printf '%s\\n' "$@" > {folder}/arguments; exec sleep 60 ;;
esac
"""


def test_a_container_engine_runs_the_official_image_with_the_deployment(bundle, tmp_path, monkeypatch):
    program(tmp_path, ENGINE.format(image=0, folder=tmp_path), "docker")
    for name in ("sh", "cat", "sleep"):
        (tmp_path / name).symlink_to(Path("/bin") / name)
    monkeypatch.delenv("TENSORFLOW_MODEL_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(started_tf_serving, "_START", 0.5)
    target = open_target(bundle, "tfserving", batch=1)
    assert not target.emulator and target.label == f"{started_tf_serving.image()} in docker"
    with pytest.raises(ServerError, match="no model was AVAILABLE"):
        drive(None, target)
    given = (tmp_path / "arguments").read_text().split("\n")
    assert given[given.index("--entrypoint") + 1 :][:2] == ["tensorflow_model_server", started_tf_serving.image()]
    name = bundle.manifest.name
    assert f"type=bind,source={bundle.folder.resolve()}/savedmodel,target=/models/{name},readonly" in given
    flags = [flag for flag in given if flag.startswith("--") and "=" in flag]
    assert flags[:3] == ["--port=8500", "--rest_api_port=8501", "--model_config_file=/config/models.config"]
    assert not any("batching" in flag for flag in flags)
    assert "--rest_api_timeout_in_ms=600000" in flags and len(flags) == len({flag.split("=")[0] for flag in flags})

    program(tmp_path, ENGINE.format(image=1, folder=tmp_path), "docker")
    with pytest.raises(RuntimeMissingError, match="run: docker pull tensorflow/serving"):
        started_tf_serving.find_server()


def test_what_is_not_here_is_said_by_name(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORFLOW_MODEL_SERVER", "no-such-binary")
    assert "tfserving" in default_targets(bundle)
    opened, missing = open_defaults(bundle, ["ort/fp32", "tfserving"], batch=1)
    assert [target.name for target in opened] == ["ort/fp32"]
    assert list(missing) == ["tfserving"] and "no-such-binary" in missing["tfserving"]
    monkeypatch.delenv("TENSORFLOW_MODEL_SERVER")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeMissingError, match=r"not on this machine .*, and no container engine is"):
        started_tf_serving.find_server()


@pytest.mark.parametrize("kind", ["server-tfserving", "server-tfserving-rest"])
def test_our_own_server_by_tensorflow_servings_protocols(kind, bundle, schedule, expected):
    target = open_target(bundle, f"{kind}=ort/fp32", batch=4)
    found = drive(schedule, target)
    agree(found, expected)
    assert all(not each.streamed for each in found) and not target.emulator


def test_names_without_an_address_and_servers_that_are_not_there(bundle):
    with pytest.raises(InputError, match="names nothing after the '='"):
        open_target(bundle, "tfserving=", batch=1)
    for name in ("tfserving=127.0.0.1:1", "tfserving-rest=127.0.0.1:1", "triton=127.0.0.1:1"):
        with pytest.raises(ServerError, match=r"no connection|UNAVAILABLE|is it running") as caught:
            drive(None, open_target(bundle, name, batch=1))
        assert name in str(caught.value)


class Triton(BaseHTTPRequestHandler):
    """Two tokens to an event by its own count, or without counts; and a repository of one or two models."""

    events: ClassVar = []
    models: ClassVar = ["ensemble"]
    asked: ClassVar = []

    def do_GET(self):
        self._answer(b"{}")

    def do_POST(self):
        self.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        if self.path.endswith("/index"):
            self._answer(json.dumps([{"name": name, "state": "READY"} for name in self.models]).encode())
        else:
            self._answer(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in self.events))

    def _answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def triton():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Triton)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_triton_streams_text_and_its_tokens_are_counted_as_it_says(bundle, schedule, triton, monkeypatch):
    one = type(schedule)(schedule.scenario, "", {}, schedule.requests[:1], 1)
    monkeypatch.setattr(Triton, "events", [{"text_output": "ab", "num_output_tokens": 2}] * 2)
    monkeypatch.setattr(Triton, "asked", [])
    (found,) = drive(one, open_target(bundle, f"triton={triton}", batch=1))
    assert (found.text, found.counted, found.error, len(found.token_times)) == ("abab", True, None, 4)
    _, (path, body) = Triton.asked
    assert path == "/v2/models/ensemble/generate_stream" and body["parameters"]["max_tokens"] == 4
    assert body["text_input"] == load_tokenizer(bundle).decode(list(one.requests[0].prompt), skip_special_tokens=False)

    monkeypatch.setattr(Triton, "events", [{"text_output": "a"}, {"text_output": "b"}])
    (found,) = drive(one, open_target(bundle, f"triton={triton}/gpt2", batch=1))
    assert "2 tokens instead of 4" in found.error
    monkeypatch.setattr(Triton, "events", [{"text_output": "a"}, {"error": "out\nof memory"}])
    (found,) = drive(one, open_target(bundle, f"openinference={triton}", batch=1))
    assert "of memory" in found.error and Triton.asked[-1][0].startswith(f"/v2/models/{bundle.manifest.name}/")
    monkeypatch.setattr(Triton, "models", ["a", "b"])
    with pytest.raises(InputError, match="a, b; name one, as URL/MODEL"):
        drive(one, open_target(bundle, f"triton={triton}", batch=1))


def test_pieces_that_are_fewer_than_tokens_share_only_where_the_server_says_that_all_were_made():
    assert timestamps_of([1.0, 2.0], [1, 2], None, 3, 9.0) == ([1.0, 2.0, 2.0], True)
    assert timestamps_of([1.0, 2.0], [], None, 2, 9.0) == ([1.0, 2.0], True)
    assert timestamps_of([1.0, 2.0], [], "length", 4, 9.0) == ([1.0, 1.0, 2.0, 2.0], False)
    assert timestamps_of([1.0, 2.0], [], "stop", 4, 9.0) == ([1.0, 2.0], False)
    assert split_model("http://h:1/m") == ("http://h:1", "m") and split_model("h:1") == ("h:1", None)


def canonical(bundle, schedule):
    """The requests whose prompts are the tokens that a server makes of their text."""
    tokenizer = load_tokenizer(bundle)
    text = "".join(chr(ord("a") + index % 26) for index in range(60))
    ids = tokenizer.encode(text).ids
    return Planner(ids, bundle.manifest.model.n_positions).concurrency(2, 3, Lengths(3, 5), Lengths(4, 4))


@pytest.mark.parametrize("kind", ["server-openinference", "server-openinference-grpc"])
def test_our_own_server_by_the_open_inference_protocol_streams_the_same_tokens(kind, bundle, schedule):
    asked = canonical(bundle, schedule)
    expected = drive(asked, open_target(bundle, "ort/fp32", batch=4))
    found = drive(asked, open_target(bundle, f"{kind}=ort/fp32", batch=4))
    agree(found, expected)
    assert all(each.streamed and each.counted for each in found)
