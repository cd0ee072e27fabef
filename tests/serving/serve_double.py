"""Serves doubles as a process of its own: python -m tests.serving.serve_double FOLDER PACE DRAIN [LOADING [FLUSH]].

Times are in seconds."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from serving.bundle import Bundle
from serving.engine.api import Engine, Observer
from serving.entrypoints import logging_setup, runner
from serving.entrypoints.http_app import build_app
from serving.entrypoints.model_manager import ModelManager
from serving.entrypoints.runner import Address, Runner
from serving.server.registry import ModelRegistry
from serving.server.settings import Settings
from tests.serving.double_engine import DoubleEngine


class Loader:
    """Opens doubles."""

    def estimate(self, bundle: Bundle) -> int:
        return 0

    def open(self, bundle: Bundle, observer: Observer) -> Engine:
        if len(sys.argv) > 4:
            logging.getLogger("gpt2_bundle").info("loading")
            time.sleep(float(sys.argv[4]))
        return DoubleEngine(slots=4, queue=64, pace=float(sys.argv[2]), observer=observer)


if __name__ == "__main__":
    logging_setup.configure("json", access=False)
    if len(sys.argv) > 5:
        runner.FLUSH_SECONDS = float(sys.argv[5])
    app = build_app(ModelRegistry(), Settings(drain_timeout=float(sys.argv[3])))
    versions = ModelManager(Path(sys.argv[1]), app.state.server, Loader(), None, None)
    Runner(app, versions, Address(port=0), 0.05).run(lambda url, model: print(url, flush=True))
