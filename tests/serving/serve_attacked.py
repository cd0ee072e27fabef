"""Serves doubles with all protocols of HTTP: python -m tests.serving.serve_attacked FOLDER PACE SETTINGS.

PACE is in seconds, SETTINGS are those of `Settings` as JSON.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
from pathlib import Path

from serving.bundle import Bundle
from serving.engine.api import Engine, Observer
from serving.entrypoints import logging_setup
from serving.entrypoints.http_app import build_app
from serving.entrypoints.model_manager import ModelManager
from serving.entrypoints.runner import Address, Runner
from serving.server.registry import ModelRegistry
from serving.server.settings import Settings
from serving.server.state import Server
from tests.serving.double_engine import DoubleEngine
from tests.serving.protocols.open_inference.double_server import all_routes


class Loader:
    """Opens doubles."""

    def estimate(self, bundle: Bundle) -> int:
        return 0

    def open(self, bundle: Bundle, observer: Observer) -> Engine:
        return DoubleEngine(slots=4, queue=2000, pace=float(sys.argv[2]), observer=observer)


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)  # Says into the log where each thread is.
    logging_setup.configure("text")
    settings = Settings(**json.loads(sys.argv[3]))
    registry = ModelRegistry()
    server = Server(registry, settings)
    app = build_app(registry, settings, all_routes(registry, settings), server)
    versions = ModelManager(Path(sys.argv[1]), server, Loader(), None, None)
    Runner(app, versions, Address(port=0), 0).run(lambda url, model: print(url, flush=True))
