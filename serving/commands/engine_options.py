"""Options of every command that runs a bundle's engine behind the protocols, and the loader that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from serving.commands.param_types import ModelName, Number
from serving.errors import InputError, RuntimeMissingError

if TYPE_CHECKING:
    from serving.entrypoints.engine_loader import EngineLoader

# Options that decide how the ONNX runtime works; the SavedModel's slots were decided at export.
_ONNX_OPTIONS = ("graph", "device", "max_length", "prefill_slowdown", "prefill_chunk", "threads")

ENGINE_OPTIONS = [
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
    click.option("--prefill-slowdown", type=Number(1, 1000), metavar="TIMES",
                 help="How many times as long as without it a step of running texts may take that reads a prompt too; "
                      "more where several wait.  [default: 2.25]"),
    click.option("--prefill-chunk", type=click.IntRange(1, 4096),
                 help="Read so many tokens of a prompt beside each step instead, however long that takes."),
    click.option("--prefix-cache/--no-prefix-cache", default=True, show_default=True,
                 help="Reuse the KV cache of prompts that begin alike; with API keys, for each key apart."),
    click.option("--threads", type=click.IntRange(1, 1024), help="Of each replica.  [default: the cores, shared out]"),
    click.option("--name", type=ModelName(), metavar="NAME", help="The model's name.  [default: the bundle's]"),
]  # fmt: skip


def with_options(options: Sequence[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command `options`, in their order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def check_packages() -> None:
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


def engine_loader(options: dict[str, Any]) -> EngineLoader:
    """The loader that `options` ask for. Raises InputError for those that exclude each other."""
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
