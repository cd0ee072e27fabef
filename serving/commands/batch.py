"""`gpt2-bundle batch`: a file of requests answered without a server, by the server's own handlers."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from serving.commands.engine_options import ENGINE_OPTIONS, check_packages, engine_loader, with_options
from serving.commands.param_types import BundlePath, Size
from serving.errors import InputError

_FILE = click.Path(path_type=Path)
_PROGRESS_SECONDS = 10.0


@click.command()
@click.argument("bundle", type=BundlePath())
@click.argument("requests", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("answers", type=_FILE)
@with_options(
    [
        *ENGINE_OPTIONS,
        click.option("--concurrency", type=click.IntRange(1, 4096),
                     help="Maximum number of requests in flight.  [default: twice --max-num-seqs]"),
        click.option("--max-body", default="4MiB", show_default=True, type=Size(),
                     help="Maximum size of a request body. A line with a larger one becomes an error."),
        click.option("--memory-budget", type=Size(),
                     help="Maximum memory of the model.  [default: the machine's available memory]"),
    ]
)  # fmt: skip
def batch(bundle: Path, requests: Path, answers: Path, **options: Any) -> int:
    """Answer each line of REQUESTS with the bundle in the folder BUNDLE, and append the answers to ANSWERS.

    Both files have OpenAI's batch lines. Run the same command again after an interruption: it answers what is left.
    The exit code is 1 if any line of ANSWERS is an error.
    """
    if answers.exists() and answers.samefile(requests):
        raise InputError(f"{answers}: requests and answers are one file; name another for the answers")
    loader = engine_loader({**options, "queue": 1_000_000}, say=partial(click.echo, err=True))
    check_packages()
    from serving.entrypoints import logging_setup
    from serving.entrypoints.batch_files import AnswerFile
    from serving.entrypoints.batch_runner import run_batch
    from serving.entrypoints.http_app import build_app
    from serving.entrypoints.model_manager import ModelManager
    from serving.protocols.open_inference import http as open_inference_http
    from serving.protocols.tf_serving import rest as tf_rest
    from serving.server.registry import ModelRegistry
    from serving.server.settings import Settings
    from serving.server.state import Server

    logging_setup.configure("text", access=False)
    logging.getLogger("gpt2_bundle").setLevel(logging.WARNING)
    with AnswerFile(answers) as written:
        most = options["max_body"]
        settings = Settings(request_timeout=None, max_body_bytes=most, max_bodies_bytes=sys.maxsize)
        registry = ModelRegistry()
        server = Server(registry, settings)
        app = build_app(
            registry, settings, [*tf_rest.routes(registry, settings), *open_inference_http.routes()], server
        )
        versions = ModelManager(bundle, server, loader, options["served_model_name"], options["memory_budget"])
        progress = _Progress(written.answered)
        try:
            slots = versions.start().engine.stats().slots
            concurrency = options["concurrency"] or 2 * slots
            work = run_batch(app, requests, written, concurrency=concurrency, max_body=most, progress=progress)
            asyncio.run(work)
        finally:
            versions.close()
        new = written.answered - progress.before
        click.echo(f"{answers}: {written.answered} answers, {new} of them new, {written.failed} errors")
        return 1 if written.failed else 0


class _Progress:
    """Progress lines on standard error, if it is a terminal."""

    def __init__(self, before: int) -> None:
        self.before = before
        self._count, self._began = 0, time.monotonic()
        self._next = self._began + _PROGRESS_SECONDS
        self._shown = sys.stderr.isatty()

    def __call__(self) -> None:
        self._count += 1
        now = time.monotonic()
        if self._shown and now >= self._next:
            self._next = now + _PROGRESS_SECONDS
            rate = self._count / (now - self._began)
            click.echo(f"{self.before + self._count} answered, {rate:.1f} a second", err=True)
