"""A server that answers on a known schedule, in a process of its own: what the suite must find, to the percent.

`python -m benchmarks.suite.selfcheck.fake_server --first 0.05 --step 0.01` prints its port. It speaks as much of
OpenAI's API as `targets.openai` does: token i of a request comes `first + i * step` seconds after the request did,
whatever else is under way; by how much it missed that at worst, its models say as `lateness`. With both 0 it is the
null server, whose every timestamp is the client's own. The text is the prompt's ids.
"""

from __future__ import annotations

import argparse
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer(ThreadingHTTPServer):
    """See the module."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, first: float, step: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.first, self.step = first, step
        self.lateness = 0.0


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": "fake", "object": "model"}]}
        body = json.dumps(models | {"lateness": self.server.lateness}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        began = time.monotonic()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        made = body["max_tokens"]
        for index in range(made):
            # Each timestamp is counted from the beginning, so that lateness does not add up.
            timestamp = began + self.server.first + index * self.server.step
            if (left := timestamp - time.monotonic()) > 0:
                time.sleep(left)
            self.server.lateness = max(self.server.lateness, time.monotonic() - timestamp)
            token = body["prompt"][index % len(body["prompt"])]
            self._event({"choices": [{"index": 0, "text": f" {token}"}]})
        self._event({"choices": [], "usage": {"completion_tokens": made}})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, value: Any) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=float, default=0.0, help="seconds to the first token")
    parser.add_argument("--step", type=float, default=0.0, help="seconds from token to token")
    settings = parser.parse_args()
    server = FakeServer(settings.first, settings.step)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
