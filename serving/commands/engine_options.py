"""Options of every command that runs a bundle's engine behind the protocols, and the loader that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from serving.commands.param_types import GraphName, ModelName, Number
from serving.errors import InputError, RuntimeMissingError

if TYPE_CHECKING:
    from serving.entrypoints.engine_loader import EngineLoader

# Options that decide how the ONNX runtime works; the SavedModel's slots were decided at export.
_ONNX_OPTIONS = (
    "graph",
    "device",
    "max_model_len",
    "max_num_batched_tokens",
    "prefill_slowdown",
    "prefill_chunk",
    "threads",
    "speculation",
    "prefill_graph",
)

ENGINE_OPTIONS = [
    click.option("--runtime", default="onnx", show_default=True,
                 type=click.Choice(["onnx", "tensorflow", "tf-serving"]),
                 help="Run the model in this process (onnx, tensorflow) or in a remote TensorFlow Serving."),
    click.option("--graph", type=GraphName(), metavar="NAME",
                 help="Serve this ONNX graph, by its name in the manifest. auto measures once which number of threads "
                      "is the fastest here for --max-num-seqs, and auto:int8 also which precision down to int8.  "
                      "[default: ort/fp32]"),
    click.option("--device", multiple=True, metavar="DEVICE",
                 help="Run ONNX Runtime on cpu, cuda or cuda:N. Several devices, separated by commas or in several "
                      "options, are given to the replicas in turns.  [default: cpu]"),
    click.option("--tf-serving", metavar="ADDRESS",
                 help="Call TensorFlow Serving at this address: http://HOST:8501 or grpc:HOST:8500."),
    click.option("--replicas", default=1, show_default=True, type=click.IntRange(1, 256),
                 help="Load the model this many times; each request goes to the least busy replica."),
    click.option("--max-num-seqs", type=click.IntRange(1, 1024), metavar="N",
                 help="Maximum number of sequences decoded concurrently, per replica.  "
                      "[default: 16, or the slots of the SavedModel]"),
    click.option("--max-model-len", type=click.IntRange(2), metavar="TOKENS",
                 help="Maximum length of a sequence, prompt and output together.  [default: the model's context]"),
    click.option("--max-num-batched-tokens", type=click.IntRange(1, 65536), metavar="TOKENS",
                 help="Maximum number of tokens in one step: a prefill chunk, and one for each running sequence.  "
                      "[default: 512]"),
    click.option("--prefill-slowdown", type=Number(1, 1000), metavar="TIMES",
                 help="Upper bound on how much a prefill chunk may lengthen a decode step, as a multiple of a "
                      "decode-only step. The bound grows with the number of waiting prompts.  [default: 2.25]"),
    click.option("--prefill-chunk", type=click.IntRange(1, 4096), metavar="TOKENS",
                 help="Use prefill chunks of this fixed size while sequences decode, instead of --prefill-slowdown."),
    click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=True, show_default=True,
                 help="Reuse the KV cache of prompts that begin alike. With API keys, each key has its own prefixes."),
    click.option("--threads", type=click.IntRange(1, 1024),
                 help="Number of ONNX Runtime threads of each replica.  [default: the cores, divided by the replicas]"),
    click.option("--speculation", type=click.Choice(["auto", "on", "off"]),
                 help="Verify several drafted tokens in one step while a sequence runs alone, with the same tokens: "
                      "where the certificate proves it for ort/fp32 (auto), also in quantized graphs, which take a "
                      "second copy of their weights (on), or never (off).  [default: auto]"),
    click.option("--prefill-graph", type=GraphName(), metavar="NAME",
                 help="Prefill prompts with this ONNX graph: auto is the one that the certificate names for --graph "
                      "(ort/int8 for ort/int4), which takes memory of its own, and same is --graph itself.  "
                      "[default: auto]"),
    click.option("--served-model-name", type=ModelName(), metavar="NAME",
                 help="Serve the model under this name.  [default: the bundle's name]"),
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


def engine_loader(options: dict[str, Any], say: Callable[[str], None] | None = None) -> EngineLoader:
    """The loader that `options` ask for. Raises InputError for those that exclude each other.

    `say` is called with what `--graph auto` chose; None means the log.
    """
    from serving.backends.autotune import autotuner, log
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
        slots=options["max_num_seqs"] or EngineConfig.slots,
        max_length=options["max_model_len"],
        max_num_batched_tokens=options["max_num_batched_tokens"] or EngineConfig.max_num_batched_tokens,
        prefill_chunk=options["prefill_chunk"],
        prefix_cache=options["enable_prefix_caching"],
        prefill_slowdown=options["prefill_slowdown"] or EngineConfig.prefill_slowdown,
        queue_limit=options["queue"],
        threads=options["threads"],
        speculation=options["speculation"] or EngineConfig.speculation,
        prefill_graph=options["prefill_graph"] or EngineConfig.prefill_graph,
    )
    devices = parse_devices(options["device"] or "cpu")
    tuner = autotuner(
        options["graph"],
        devices=devices,
        threads=config.threads,
        batch_size=config.slots,
        replicas=options["replicas"],
        prefill_graph=config.prefill_graph,
        say=say or log.info,
    )
    graph = options["graph"] if tuner is None else None
    return EngineLoader(runtime, graph, devices, options["replicas"], options["max_num_seqs"], config, address, tuner)
