"""A server as a process: its start, its signals, its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.entrypoints.runner import Address
from serving.errors import GPT2BundleError
from tests.closed_form import write_bundle

ROOT = Path(__file__).parents[3]


@contextlib.contextmanager
def process(folder: Path, *times: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of doubles over `folder`, and its URL; `times` are pace, drain, loading and flush in seconds."""
    command = [sys.executable, "-m", "tests.serving.serve_double", str(folder), *map(str, times)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server, server.stdout.readline().strip()
        finally:
            server.kill()


def post(url: str, **body: Any) -> tuple[int, str]:
    """Status and text of a completion; 0 where the connection was refused or cut."""
    data = json.dumps({"prompt": [1], "temperature": 0, "ignore_eos": True, **body}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_no_accepted_request(tmp_path: Path, number: signal.Signals) -> None:
    write_bundle(tmp_path / "1", "tiny")
    answers: list[tuple[int, str]] = []
    with process(tmp_path, 0.01, 30) as (server, url):
        signalled = threading.Event()

        def client(index: int) -> None:
            while not signalled.is_set():
                answers.append(post(url, max_tokens=20, stream=index % 2 == 0))
            answers.append(post(url, max_tokens=20))

        threads = [threading.Thread(target=client, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(0.6)
        server.send_signal(number)
        signalled.set()
        for thread in threads:
            thread.join(30)
        assert server.wait(30) == 0
        assert server.stderr is not None
        log = server.stderr.read()
    assert {status for status, _ in answers} <= {0, 200, 503} and "Traceback" not in log
    whole = [text for status, text in answers if status == 200]
    assert len(whole) >= 12
    for text in whole:
        assert text.endswith("data: [DONE]\n\n") if text.startswith("data") else json.loads(text)["choices"]
        assert '"error"' not in text and '"finish_reason": "length"' in text.replace('":"', '": "')
    assert "every accepted request has ended" in log


def test_what_does_not_end_in_time_is_told_so(tmp_path: Path) -> None:
    write_bundle(tmp_path / "1", "tiny")
    with process(tmp_path, 0.01, 0.3) as (server, url):
        answers: list[tuple[int, str]] = []
        threads = [
            threading.Thread(target=lambda stream=stream: answers.append(post(url, max_tokens=1000, stream=stream)))
            for stream in (True, False)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        server.terminate()
        for thread in threads:
            thread.join(10)
        assert server.wait(10) == 0
    assert sorted(status for status, _ in answers) == [200, 504]
    assert all('"timeout"' in text for _, text in answers)


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    write_bundle(tmp_path / "1", "tiny")
    with process(tmp_path, 0.05, 100) as (server, url):
        answers: list[tuple[int, str]] = []
        clients = [
            threading.Thread(target=lambda stream=stream: answers.append(post(url, max_tokens=1000, stream=stream)))
            for stream in (True, False)
        ]
        for client in clients:
            client.start()
        time.sleep(0.3)
        server.terminate()
        time.sleep(0.2)
        assert server.poll() is None
        server.terminate()
        assert server.wait(10) == 0
        for client in clients:
            client.join(10)
        assert server.stderr is not None
        log = server.stderr.read()
    assert sorted(status for status, _ in answers) == [200, 504] and all('"timeout"' in text for _, text in answers)
    assert "Traceback" not in log and "what was left got an error" in log


def test_clients_that_are_stuck_do_not_hold_up_the_end(tmp_path: Path) -> None:
    write_bundle(tmp_path / "1", "tiny")
    body = json.dumps({"prompt": [[1]] * 64, "max_tokens": 100, "ignore_eos": True, "stream": True, "logprobs": 9})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    with process(tmp_path, 0, 5, 0, 0.3) as (server, url), socket.socket() as deaf, socket.socket() as mute:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        for client, sent in (deaf, head + body), (mute, head + body[:9]):
            client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            client.sendall(sent.encode())
        time.sleep(1)
        server.terminate()
        assert server.wait(10) == 0
        assert server.stderr is not None
        log = server.stderr.read()
    assert "Traceback" not in log and "closed 2 connections" in log, log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_while_the_model_loads_is_a_clean_end(tmp_path: Path, number: signal.Signals, signals: int) -> None:
    write_bundle(tmp_path / "1", "tiny")
    command = [
        sys.executable,
        "-m",
        "tests.serving.serve_double",
        str(tmp_path),
        "0",
        "30",
        str(1 if signals == 1 else 60),
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stderr is not None
        lines = [server.stderr.readline()]
        assert "loading" in lines[0]
        for _ in range(signals):
            server.send_signal(number)
            time.sleep(0.3)
        assert server.wait(20) == 0
        lines += server.stderr.readlines()
        assert not server.stdout.read()
    assert all(json.loads(line)["level"] == "info" for line in lines), lines


def test_a_new_version_is_found_by_itself(tmp_path: Path) -> None:
    write_bundle(tmp_path / "1", "tiny")
    with process(tmp_path, 0, 5) as (server, url):
        write_bundle(tmp_path / "2", "tiny")
        deadline = time.monotonic() + 10
        while '"v2-' not in post(url)[1]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.terminate()
        assert server.wait(10) == 0


def test_pipes_among_the_versions_do_not_hold_up_the_watch(tmp_path: Path) -> None:
    write_bundle(tmp_path / "1", "tiny")
    with process(tmp_path, 0, 5) as (server, url):
        (tmp_path / "2").mkdir()
        os.mkfifo(tmp_path / "2" / "manifest.json")
        write_bundle(tmp_path / "3", "tiny")
        weights = tmp_path / "3" / "ort/fp32/model.onnx_data"
        weights.unlink()
        os.mkfifo(weights)
        os.mkfifo(tmp_path / "4")
        time.sleep(0.5)
        assert post(url)[0] == 200
        write_bundle(tmp_path / "5", "tiny")
        deadline = time.monotonic() + 20
        while '"v5-' not in post(url)[1]:
            assert time.monotonic() < deadline, "the watch stands still"
            time.sleep(0.02)
        server.terminate()
        assert server.wait(20) == 0
        assert server.stderr is not None
        log = server.stderr.read()
    assert log.count("refused") == 1 and "not a plain file" in log and "Traceback" not in log


def test_localhost_is_both_loopback_addresses() -> None:
    address = Address(port=0)
    with address.bind() as listener:
        port = listener.getsockname()[1]
        assert address.url(listener) == f"http://127.0.0.1:{port}"
        (beside,) = address.beside(listener)
        with beside, socket.create_connection(("::1", port), 5), socket.create_connection(("127.0.0.1", port), 5):
            assert beside.getsockname()[:2] == ("::1", port)
            assert address.beside(listener) == [], "taken by somebody else"
        assert Address("127.0.0.1").beside(listener) == [] == Address("::1").beside(listener)
    with Address("::1", 0).bind() as listener:
        assert Address("::1", 0).url(listener) == f"http://[::1]:{listener.getsockname()[1]}"


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(GPT2BundleError, match=rf"port {port} on 127\.0\.0\.1 is taken; choose another with --port"):
            Address(port=port).bind()
    with pytest.raises(GPT2BundleError, match=r"cannot listen on 192\.0\.2\.1"):
        Address(host="192.0.2.1").bind()


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is one of Linux")
def test_a_connection_that_the_system_took_is_answered_at_the_end(tmp_path: Path) -> None:
    """Clients that connect again and again, without a pause, until nothing listens: each gets an answer or no
    connection."""
    write_bundle(tmp_path / "1", "tiny")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
    body = json.dumps({"prompt": [1], "max_tokens": 1, "temperature": 0}).encode()
    request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    ends: list[str] = []
    with process(tmp_path, 0, 30) as (server, url):
        host, _, port = url.removeprefix("http://").partition(":")

        def client() -> None:
            while not ends or ends[-1] != "over":
                try:
                    connection = socket.create_connection((host, int(port)), timeout=30)
                except OSError:
                    ends.append("over")
                    return
                with connection:
                    try:
                        connection.sendall(request)
                        ends.append("answered" if connection.recv(12)[9:] in (b"200", b"429", b"503") else "lost")
                    except OSError:
                        ends.append("lost")

        threads = [threading.Thread(target=client) for _ in range(24)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert server.wait(30) == 0
    assert ends.count("answered") > 100 and ends.count("lost") == 0, {end: ends.count(end) for end in set(ends)}
