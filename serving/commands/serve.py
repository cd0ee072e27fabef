"""`gpt2-bundle serve`: serve a bundle by OpenAI's protocol and others, until a signal."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serving.commands.engine_options import ENGINE_OPTIONS, check_packages, engine_loader, with_options
from serving.commands.param_types import BundlePath, Host, Number, Origin, Seconds, Size
from serving.errors import InputError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from serving.entrypoints.model_manager import ModelManager
    from serving.entrypoints.runner import Companion
    from serving.server.registry import ServedModel
    from serving.server.settings import Settings
    from serving.server.state import Server

_GRPC_LIMIT = 2**31 - 1

_FILE = click.Path(path_type=Path)
_OPTIONS = [
    *ENGINE_OPTIONS,
    click.option("--queue", default=256, show_default=True, type=click.IntRange(0, 1_000_000),
                 help="Maximum number of waiting requests, per replica. Further requests get status 429."),
    click.option("--host", type=Host(), default="localhost", show_default=True,
                 help="Listen on this address; localhost is 127.0.0.1 and ::1, 0.0.0.0 is every interface."),
    click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535),
                 help="Listen on this HTTP port; 0 takes a free one."),
    click.option("--grpc-port", type=click.IntRange(0, 65535),
                 help="Serve gRPC too, on this port of the same host; 0 takes a free one.  [default: no gRPC]"),
    click.option("--watch", default=0.0, show_default=True, type=Seconds(), metavar="SECONDS",
                 help="Look for new versions in the folder at this interval; 0 never looks."),
    click.option("--memory-budget", type=Size(),
                 help="Maximum memory of all loaded versions together.  [default: the machine's available memory]"),
    click.option("--request-timeout", default=600.0, show_default=True, type=Seconds(), metavar="SECONDS",
                 help="Maximum time of a request, with its time in the queue; 0 means no limit."),
    click.option("--ping", default=15.0, show_default=True, type=Seconds(), metavar="SECONDS",
                 help="Interval of comment lines in a stream that waits for its first token; 0 sends no such lines."),
    click.option("--max-connections", default=1000, show_default=True, type=click.IntRange(1, 1_000_000),
                 help="Maximum number of open HTTP connections. Further ones get status 503."),
    click.option("--drain-timeout", default=30.0, show_default=True, type=Seconds(), metavar="SECONDS",
                 help="Time that accepted requests have to finish after SIGTERM."),
    click.option("--max-body", default="4MiB", show_default=True, type=Size(),
                 help="Maximum size of a request body. A larger one gets status 413."),
    click.option("--max-prompts", default=1024, show_default=True, type=click.IntRange(1, 4096),
                 help="Maximum number of prompts, or rows, of one request. More get status 400."),
    click.option("--max-prompt-tokens", type=click.IntRange(1),
                 help="Maximum length of a prompt. A longer one gets status 400.  [default: --max-model-len]"),
    click.option("--api-key", multiple=True, metavar="KEY",
                 help="Require this API key, or one of several. Other users of the machine can read a command line; "
                      "prefer --api-key-file or the variable GPT2_BUNDLE_API_KEYS.  [default: no key required]"),
    click.option("--api-key-file", type=_FILE, help="Require an API key from this file, which has one on each line."),
    click.option("--rate-limit", type=Number(0, 1_000_000_000, min_open=True), metavar="N",
                 help="Maximum number of requests per minute, for each key or client address.  [default: no limit]"),
    click.option("--ssl-certfile", type=_FILE, help="Serve HTTPS with this PEM certificate chain.  [default: HTTP]"),
    click.option("--ssl-keyfile", type=_FILE, help="Use this PEM private key of the certificate."),
    click.option("--cors-origin", type=Origin(), multiple=True, metavar="ORIGIN",
                 help="Let pages of this origin call the server. May be repeated.  [default: none]"),
    click.option("--log-format", default="text", show_default=True, type=click.Choice(["text", "json"]),
                 help="Write log lines as text or as JSON objects."),
    click.option("--no-access-log", is_flag=True, help="Do not log each request.  [default: log each request]"),
]  # fmt: skip


@click.command()
@click.argument("bundle", type=BundlePath())
@with_options(_OPTIONS)
def serve(bundle: Path, **options: Any) -> None:
    """Serve the bundle in the folder BUNDLE, or the newest of its versions 1, 2, ..., over HTTP and gRPC.

    SIGTERM or Ctrl-C stops the server: it refuses new requests and finishes accepted ones. A second signal does not
    wait for them.
    """
    certificate, key = options["ssl_certfile"], options["ssl_keyfile"]
    if (certificate is None) != (key is None):
        raise InputError("--ssl-certfile and --ssl-keyfile belong together; give both")
    if options["grpc_port"] is not None and options["max_body"] > _GRPC_LIMIT:
        raise InputError("--max-body is over 2 GiB, and gRPC takes at most that; lower it or leave out --grpc-port")
    app, versions = build_server(bundle, options)
    from serving.entrypoints.runner import Address, Runner

    companions = _companions(app.state.server, options)

    def announce(url: str, model: ServedModel) -> None:
        with contextlib.suppress(OSError):  # A closed standard output does not stop the server.
            click.echo(f"serving {model.name} version {model.version} at {url}")

    address = Address(options["host"], options["port"], certificate, key)
    Runner(app, versions, address, options["watch"], companions).run(announce)


def build_server(bundle: Path, options: dict[str, Any]) -> tuple[Starlette, ModelManager]:
    """The application of `gpt2-bundle serve BUNDLE` with these options, and what loads its versions.

    Raises InputError for options that exclude each other and for a folder without a bundle, and RuntimeMissingError.
    """
    loader = engine_loader(options)
    check_packages()
    from serving.entrypoints import logging_setup
    from serving.entrypoints.http_app import build_app
    from serving.entrypoints.model_manager import ModelManager
    from serving.entrypoints.version_sources import check_source
    from serving.protocols.open_inference import http as open_inference_http
    from serving.protocols.tf_serving import rest as tf_rest
    from serving.server import tracing
    from serving.server.registry import ModelRegistry
    from serving.server.state import Server

    check_source(bundle)
    settings = server_settings(options)
    logging_setup.configure(options["log_format"], access=not options["no_access_log"])
    tracing.configure()
    registry = ModelRegistry()
    server = Server(registry, settings)
    app = build_app(registry, settings, [*tf_rest.routes(registry, settings), *open_inference_http.routes()], server)
    return app, ModelManager(bundle, server, loader, options["served_model_name"], options["memory_budget"])


def server_settings(options: dict[str, Any]) -> Settings:
    """The server's settings that `options` of `gpt2-bundle serve` ask for. Raises InputError for wrong API keys."""
    from serving.server.auth import KEYS_VARIABLE, read_keys
    from serving.server.settings import Settings

    return Settings(
        request_timeout=options["request_timeout"] or None,
        drain_timeout=options["drain_timeout"],
        ping_seconds=options["ping"],
        max_connections=options["max_connections"],
        max_body_bytes=options["max_body"],
        max_prompts=options["max_prompts"],
        max_prompt_tokens=options["max_prompt_tokens"],
        api_keys=read_keys(options["api_key_file"], os.environ.get(KEYS_VARIABLE), options["api_key"]),
        rate_limit=options["rate_limit"],
        cors_origins=options["cors_origin"],
    )


def _companions(server: Server, options: dict[str, Any]) -> list[Companion]:
    if options["grpc_port"] is None:
        return []
    from serving.entrypoints.grpc_server import GrpcCompanion

    certificate, key = options["ssl_certfile"], options["ssl_keyfile"]
    try:
        tls = (key.read_bytes(), certificate.read_bytes()) if certificate is not None else None
    except OSError as error:
        raise InputError(
            f"the certificate or its key cannot be used: {error}; check --ssl-certfile and --ssl-keyfile"
        ) from None
    return [GrpcCompanion(server, options["host"], options["grpc_port"], tls)]
