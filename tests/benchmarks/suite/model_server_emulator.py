"""An executable that takes the flags of tensorflow_model_server and is none: the emulator of the client's tests.

Where MODEL_SERVER_BEHIND is `GRPC_PORT,REST_PORT`, it passes its connections on to a emulator that listens there, and
need not load TensorFlow by itself.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", action="version", version="a emulator")
    for flag in ("--port", "--rest_api_port"):
        parser.add_argument(flag, type=int, required=True)
    for flag in ("--model_name", "--model_base_path"):
        parser.add_argument(flag, required=True)
    for flag in ("--enable_batching", "--batching_parameters_file", "--monitoring_config_file",
                 "--rest_api_timeout_in_ms", "--rest_api_num_threads", "--grpc_max_threads",
                 "--file_system_poll_wait_seconds",
                 "--tensorflow_intra_op_parallelism", "--tensorflow_inter_op_parallelism"):  # fmt: skip
        parser.add_argument(flag)
    given = parser.parse_args()
    # Without batching the server takes no parameters for it either.
    assert bool(given.batching_parameters_file) is (given.enable_batching == "true")
    for file in filter(None, (given.batching_parameters_file, given.monitoring_config_file)):
        Path(file).read_text(encoding="utf-8")
    version = Path(given.model_base_path) / "1"
    assert (version / "saved_model.pb").is_file()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if behind := os.environ.get("MODEL_SERVER_BEHIND"):
        for port, other in zip((given.port, given.rest_api_port), behind.split(","), strict=True):
            listening = socket.create_server(("127.0.0.1", port))
            threading.Thread(target=_pass_on, args=(listening, int(other)), daemon=True).start()
        while True:
            signal.pause()
    # Only now: TensorFlow takes seconds, and --version none.
    from tests.serving.tf_serving_emulator import serving

    with serving(version, given.model_name, given.rest_api_port, given.port):
        while True:
            signal.pause()


def _pass_on(listening: socket.socket, port: int) -> None:
    while True:
        caller, _ = listening.accept()
        called = socket.create_connection(("127.0.0.1", port))
        for ends in ((caller, called), (called, caller)):
            threading.Thread(target=_copy, args=ends, daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, sink):
            end.close()


if __name__ == "__main__":
    main()
