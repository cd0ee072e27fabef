"""An executable that takes the flags of tensorflow_model_server and is none: the stand-in of the client's tests."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tests.serving.tf_serving_stand_in import serving


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", action="version", version="a stand-in")
    for flag in ("--port", "--rest_api_port"):
        parser.add_argument(flag, type=int, required=True)
    for flag in ("--model_name", "--model_base_path"):
        parser.add_argument(flag, required=True)
    for flag in ("--enable_batching", "--batching_parameters_file", "--monitoring_config_file",
                 "--rest_api_timeout_in_ms", "--file_system_poll_wait_seconds",
                 "--tensorflow_intra_op_parallelism", "--tensorflow_inter_op_parallelism"):  # fmt: skip
        parser.add_argument(flag)
    given = parser.parse_args()
    # Without batching the server takes no parameters for it either.
    assert bool(given.batching_parameters_file) is (given.enable_batching == "true")
    for file in filter(None, (given.batching_parameters_file, given.monitoring_config_file)):
        Path(file).read_text(encoding="utf-8")
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True) or sys.exit(0))
    with serving(Path(given.model_base_path) / "1", given.model_name, given.rest_api_port, given.port):
        while True:
            signal.pause()


if __name__ == "__main__":
    main()
