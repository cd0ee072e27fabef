"""`gpt2-bundle serve`: a bundle behind OpenAI's protocol and others, until a signal says to end."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serving.commands.engine_options import ENGINE_OPTIONS, check_packages, engine_loader, with_options
from serving.commands.param_types import Host, Number, Origin, Seconds, Size
from serving.errors import InputError

if TYPE_CHECKING:
    from serving.entrypoints.runner import Companion
    from serving.server.registry import ServedModel
    from serving.server.settings import Settings
    from serving.server.state import Server

_GRPC_LIMIT = 2**31 - 1

_FILE = click.Path(path_type=Path)
_OPTIONS = [
    *ENGINE_OPTIONS,
    click.option("--queue", default=256, show_default=True, type=click.IntRange(0, 1_000_000),
                 help="Requests that may wait, for each replica; more get 429."),
    click.option("--host", type=Host(), default="localhost", show_default=True,
                 help="Address to listen on; localhost is 127.0.0.1 and ::1, 0.0.0.0 every interface."),
    click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one."),
    click.option("--grpc-port", type=click.IntRange(0, 65535),
                 help="gRPC beside, on the same host; 0 takes a free one."),
    click.option("--watch", default=0.0, show_default=True, type=Seconds(), metavar="SECONDS",
                 help="Look for new versions this often; 0 never does."),
    click.option("--memory-budget", type=Size(),
                 help="For all loaded versions together.  [default: what the machine has available]"),
    click.option("--request-timeout", default=600.0, show_default=True, type=Seconds(), metavar="SECONDS",
                 help="For a whole request; 0 is without end."),
    click.option("--ping", default=15.0, show_default=True, type=Seconds(), metavar="SECONDS",
                 help="Send a comment line this often in a stream that waits for its first token; 0 never does."),
    click.option("--max-connections", default=1000, show_default=True, type=click.IntRange(1, 1_000_000),
                 help="Open HTTP connections at most; further ones get 503."),
    click.option("--drain-timeout", default=30.0, show_default=True, type=Seconds(), metavar="SECONDS",
                 help="For accepted requests to end after SIGTERM."),
    click.option("--max-body", default="4MiB", show_default=True, type=Size(), help="A larger request body gets 413."),
    click.option("--max-prompts", default=1024, show_default=True, type=click.IntRange(1, 4096),
                 help="Prompts, or rows, of one request; more get 400."),
    click.option("--max-prompt-tokens", type=click.IntRange(1),
                 help="A longer prompt gets 400.  [default: the context's room]"),
    click.option("--api-key-file", type=_FILE, help="One key a line; GPT2_BUNDLE_API_KEYS adds more, with commas."),
    click.option("--rate-limit", type=Number(0, 1_000_000_000, min_open=True), metavar="N",
                 help="Requests a minute for each key, or client address."),
    click.option("--tls-cert", type=_FILE, help="Certificate chain in PEM; makes it HTTPS."),
    click.option("--tls-key", type=_FILE, help="The certificate's private key in PEM."),
    click.option("--cors-origin", type=Origin(), multiple=True, metavar="ORIGIN",
                 help="Whose pages may call this server; may be given several times."),
    click.option("--log-format", default="text", show_default=True, type=click.Choice(["text", "json"])),
    click.option("--no-access-log", is_flag=True, help="No line for each request."),
]  # fmt: skip


@click.command()
@click.argument("bundle", type=_FILE)
@with_options(_OPTIONS)
def serve(bundle: Path, **options: Any) -> None:
    """Serve the bundle in the folder BUNDLE, or the newest of the versions 1, 2, ... in it, by HTTP.

    SIGTERM or Ctrl-C ends it: nothing new is taken, what was accepted is finished. A second one does not wait.
    """
    certificate, key = options["tls_cert"], options["tls_key"]
    if (certificate is None) != (key is None):
        raise InputError("--tls-cert and --tls-key belong together; give both")
    if options["grpc_port"] is not None and options["max_body"] > _GRPC_LIMIT:
        raise InputError("--max-body is over 2 GiB, and gRPC takes at most that; lower it or leave out --grpc-port")
    loader = engine_loader(options)
    check_packages()
    from serving.entrypoints import logging_setup
    from serving.entrypoints.http_app import build_app
    from serving.entrypoints.model_versions import Versions
    from serving.entrypoints.runner import Address, Runner
    from serving.entrypoints.version_sources import check_source
    from serving.protocols.open_inference import http as open_inference_http
    from serving.protocols.tf_serving import rest as tf_rest
    from serving.server import tracing
    from serving.server.registry import ModelRegistry
    from serving.server.state import Server

    check_source(bundle)
    settings = _settings(options)
    logging_setup.configure(options["log_format"], access=not options["no_access_log"])
    tracing.configure()
    registry = ModelRegistry()
    server = Server(registry, settings)
    app = build_app(registry, settings, [*tf_rest.routes(registry, settings), *open_inference_http.routes()], server)
    versions = Versions(bundle, server, loader, options["name"], options["memory_budget"])
    companions = _companions(server, options)

    def announce(url: str, model: ServedModel) -> None:
        with contextlib.suppress(OSError):  # Nobody reads it, which keeps nobody from being served.
            click.echo(f"serving {model.name} version {model.version} at {url}")

    address = Address(options["host"], options["port"], certificate, key)
    Runner(app, versions, address, options["watch"], companions).run(announce)


def _settings(options: dict[str, Any]) -> Settings:
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
        api_keys=read_keys(options["api_key_file"], os.environ.get(KEYS_VARIABLE)),
        rate_limit=options["rate_limit"],
        cors_origins=options["cors_origin"],
    )


def _companions(server: Server, options: dict[str, Any]) -> list[Companion]:
    if options["grpc_port"] is None:
        return []
    from serving.entrypoints.grpc_server import GrpcCompanion

    certificate, key = options["tls_cert"], options["tls_key"]
    try:
        tls = (key.read_bytes(), certificate.read_bytes()) if certificate is not None else None
    except OSError as error:
        raise InputError(
            f"the certificate or its key cannot be used: {error}; check --tls-cert and --tls-key"
        ) from None
    return [GrpcCompanion(server, options["host"], options["grpc_port"], tls)]
