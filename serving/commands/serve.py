"""`gpt2-bundle serve`: a bundle behind OpenAI's protocol and others, until a signal says to end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serving.commands.param_types import Host, ModelName, Number, Origin, Seconds, Size
from serving.errors import InputError, RuntimeMissingError

if TYPE_CHECKING:
    from serving.entrypoints.engine_loader import EngineLoader
    from serving.entrypoints.runner import Companion
    from serving.server.registry import ServedModel
    from serving.server.settings import Settings
    from serving.server.state import Server

_GRPC_LIMIT = 2**31 - 1
# Options that decide how the ONNX runtime works; the SavedModel's slots were decided at export.
_ONNX_OPTIONS = ("graph", "device", "max_length", "prefill_slowdown", "prefill_chunk", "threads")


_FILE = click.Path(path_type=Path)
_OPTIONS = [
    click.option("--runtime", default="onnx", show_default=True,
                 type=click.Choice(["onnx", "tensorflow", "tf-serving"]),
                 help="Where the model runs: here, or in a remote TensorFlow Serving."),
    click.option("--graph", metavar="NAME", help="An ONNX graph by its name in the manifest.  [default: ort/fp32]"),
    click.option("--device", multiple=True, metavar="DEVICE",
                 help="cpu, cuda or cuda:N, for ONNX Runtime; several, with commas or one by one, are the replicas' in "
                      "turns.  [default: cpu]"),
    click.option("--tf-serving", metavar="ADDRESS",
                 help="TensorFlow Serving with this model: http://HOST:8501 or grpc:HOST:8500."),
    click.option("--replicas", default=1, show_default=True, type=click.IntRange(1, 256),
                 help="Engines beside each other, each with all of the model."),
    click.option("--slots", type=click.IntRange(1, 1024),
                 help="Texts that grow at once, for each replica.  [default: 16, or what the SavedModel has]"),
    click.option("--max-length", type=click.IntRange(2), help="Positions of a slot.  [default: the model's context]"),
    click.option("--queue", default=256, show_default=True, type=click.IntRange(0, 1_000_000),
                 help="Requests that may wait, for each replica; more get 429."),
    click.option("--prefill-slowdown", type=Number(1, 1000), metavar="TIMES",
                 help="How many times as long as without it a step of running texts may take that reads a prompt too; "
                      "more where several wait.  [default: 2.25]"),
    click.option("--prefill-chunk", type=click.IntRange(1, 4096),
                 help="Read so many tokens of a prompt beside each step instead, however long that takes."),
    click.option("--prefix-cache/--no-prefix-cache", default=True, show_default=True,
                 help="Reuse the KV cache of prompts that begin alike; with API keys, for each key apart."),
    click.option("--threads", type=click.IntRange(1, 1024), help="Of each replica.  [default: the cores, shared out]"),
    click.option("--name", type=ModelName(), metavar="NAME", help="The model's name.  [default: the bundle's]"),
    click.option("--host", type=Host(), default="127.0.0.1", show_default=True,
                 help="Address to listen on; 0.0.0.0 is every interface."),
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
    click.option("--max-prompt-tokens", type=click.IntRange(1),
                 help="A longer prompt gets 400.  [default: the context's room]"),
    click.option("--api-key-file", type=_FILE, help="One key a line; GPT2_BUNDLE_API_KEYS adds more, with commas."),
    click.option("--rate-limit", type=Number(0, 1_000_000_000, min_open=True), metavar="N",
                 help="Requests a minute for each key, or client address."),
    click.option("--tls-cert", type=_FILE, help="Certificate chain in PEM; makes it HTTPS."),
    click.option("--tls-key", type=_FILE, help="The certificate's private key in PEM."),
    click.option("--cors-origin", type=Origin(), multiple=True, metavar="ORIGIN",
                 help="Whose pages may call this server; may be given several times."),
    click.option("--log-format", default="text", show_default=True, type=click.Choice(["text", "json"]),
                 help="Format of the log lines."),
    click.option("--no-access-log", is_flag=True, help="No line for each request."),
]  # fmt: skip


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("bundle", type=_FILE)
@_with_options
def serve(bundle: Path, **options: Any) -> None:
    """Serve the bundle in the folder BUNDLE, or the newest of the versions 1, 2, ... in it, by HTTP.

    SIGTERM or Ctrl-C ends it: nothing new is taken, what was accepted is finished. A second one does not wait.
    """
    certificate, key = options["tls_cert"], options["tls_key"]
    if (certificate is None) != (key is None):
        raise InputError("--tls-cert and --tls-key belong together; give both")
    if options["grpc_port"] is not None and options["max_body"] > _GRPC_LIMIT:
        raise InputError("--max-body is over 2 GiB, and gRPC takes at most that; lower it or leave out --grpc-port")
    loader = _loader(options)
    _check_packages()
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


def _check_packages() -> None:
    """Raise RuntimeMissingError, with what installs them, unless the server's packages are there."""
    try:
        import prometheus_client  # noqa: F401
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise RuntimeMissingError(
            f"serving needs the package {error.name!r}, which is not installed here; "
            "run: pip install 'gpt2-bundle[serve]'"
        ) from None


def _loader(options: dict[str, Any]) -> EngineLoader:
    from serving.backends.devices import parse_devices
    from serving.engine.config import EngineConfig
    from serving.entrypoints.engine_loader import EngineLoader

    runtime, address = options["runtime"], options["tf_serving"]
    if runtime == "tf-serving" and address is None:
        raise InputError("--runtime tf-serving needs an address: --tf-serving http://HOST:8501 or grpc:HOST:8500")
    if runtime != "tf-serving" and address is not None:
        raise InputError("--tf-serving is for --runtime tf-serving; give both")
    if runtime != "onnx":
        for name in _ONNX_OPTIONS:
            if options[name] not in (None, ()):
                raise InputError(f"--{name.replace('_', '-')} is for --runtime onnx; leave it out")
    if options["prefill_slowdown"] and options["prefill_chunk"]:
        raise InputError("--prefill-slowdown and --prefill-chunk exclude each other; leave one out")
    config = EngineConfig(
        slots=options["slots"] or EngineConfig.slots,
        max_length=options["max_length"],
        prefill_chunk=options["prefill_chunk"],
        prefix_cache=options["prefix_cache"],
        prefill_slowdown=options["prefill_slowdown"] or EngineConfig.prefill_slowdown,
        queue_limit=options["queue"],
        threads=options["threads"],
    )
    devices = parse_devices(options["device"] or "cpu")
    return EngineLoader(runtime, options["graph"], devices, options["replicas"], options["slots"], config, address)


def _settings(options: dict[str, Any]) -> Settings:
    from serving.server.auth import KEYS_VARIABLE, read_keys
    from serving.server.settings import Settings

    return Settings(
        request_timeout=options["request_timeout"] or None,
        drain_timeout=options["drain_timeout"],
        ping_seconds=options["ping"],
        max_connections=options["max_connections"],
        max_body_bytes=options["max_body"],
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
