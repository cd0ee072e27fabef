"""Sessions of a bundle's ONNX files: on which device, and whether a file is what the manifest says of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from serving.backends.base import SamplingRequest
from serving.backends.devices import cuda_options, parse_device
from serving.backends.onnx_prompts import with_fast_prompts
from serving.backends.verify_steps import is_small
from serving.bundle import Bundle
from serving.bundle.strict_json import ADVICE, shown
from serving.errors import BundleError, RuntimeMissingError

SAMPLING_GRAPH = "ort/choose"
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
INT8_CACHES = (1, 28)
"""The first ONNX Runtime that runs graphs with caches in int8 rightly; see docs/decisions/int8-kv-cache.md."""
_SINKS = (1, 28)
_UNREAD_OUTPUTS = (1, 31)
"""The first versions whose attention was seen to take a sink, and to run with one output (docs/decisions)."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def device_zeros(shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> Any:
    """An OrtValue of zeros on `device`, such as "cuda:1"."""
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), *parse_device(device))


def runtime_version() -> str:
    """The version of ONNX Runtime."""
    return str(ort.__version__)


def open_graph(
    bundle: Bundle,
    graph_name: str,
    device: str,
    threads: int | None,
    edit: Callable[[bytes], bytes] | None = None,
    spin: bool = True,
) -> Any:
    """A session of one of the manifest's graphs, such as "ort/int8"; see `open_session`.

    Raises BundleError too if the file's tensors are not those that the manifest says, and RuntimeMissingError if ONNX
    Runtime is too old for the graph.
    """
    _check_version(bundle, graph_name)
    path = bundle.graph(graph_name).path

    def change(data: bytes) -> bytes:
        if parse_device(device)[0] == "cpu":
            data = _with_fast_prompts(bundle, graph_name, data)
        return data if edit is None else edit(data)

    try:
        session = open_session(bundle, path, device, threads, edit=change, spin=spin)
    except BundleError:
        # A change goes by the manifest. Where that is wrong, the graph as it is says what is wrong.
        session = open_session(bundle, path, device, threads, spin=spin)
    problem = _tensor_problem(bundle, graph_name, session)
    if problem:
        raise BundleError(f"{bundle.folder}: the graph {graph_name!r} {problem}; {ADVICE}")
    return session


def _with_fast_prompts(bundle: Bundle, graph_name: str, data: bytes) -> bytes:
    version = _version()
    # What a version without a number is like was not seen.
    return with_fast_prompts(
        data,
        bundle.manifest.model.n_head,
        branches=version is not None and version >= _SINKS and not is_small(bundle, graph_name),
        unread=version is not None and version >= _UNREAD_OUTPUTS,
    )


def _version() -> tuple[int, ...] | None:
    """ONNX Runtime's first two numbers; None if it says something else."""
    version = re.match(r"(\d+)\.(\d+)", ort.__version__)
    return None if version is None else tuple(map(int, version.groups()))


def _check_version(bundle: Bundle, graph_name: str) -> None:
    """Refuse a graph with caches in int8 where they fail at load or in the first step, or, in 1.27, come out wrong."""
    version = _version()
    caches = (spec for name, spec in bundle.graph(graph_name).inputs.items() if name.startswith("past_key_values."))
    if version is None or not any(spec.dtype == "int8" for spec in caches):
        return
    if version < INT8_CACHES:
        least = ".".join(map(str, INT8_CACHES))
        raise RuntimeMissingError(
            f"the graph {graph_name!r} keeps its caches in int8, which takes ONNX Runtime {least} or newer, and "
            f"{ort.__version__} is installed here; run: pip install --upgrade 'onnxruntime>={least}', or ask for "
            "'ort/fp32'"
        )


def open_session(
    bundle: Bundle,
    path: str,
    device: str,
    threads: int | None,
    captured: bool = False,
    edit: Callable[[bytes], bytes] | None = None,
    spin: bool = True,
) -> Any:
    """A session of the ONNX file `path` of `bundle` on `device`, "cpu" or "cuda:N"; `captured` by CUDA graphs.

    `edit` changes the model in memory, after its hash was checked. Without `spin`, threads sleep as soon as a run ends:
    two sessions that take turns would otherwise wait on each other's cores.

    Raises RuntimeMissingError if ONNX Runtime does not run on the device, BundleError if it cannot load the file.
    """
    kind, number = parse_device(device)
    provider = check_provider(kind)
    options = ort.SessionOptions()
    # The weights must live until the session has copied them.
    graph, weights = _read_graph(bundle, path)
    graph = graph if edit is None else edit(graph)
    _give_weights(options, weights, bundle.path(path).parent)
    if not spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    providers: list[Any] = [PROVIDERS["cpu"]]
    if kind == "cpu":
        # With it, steps of int8 at 64 rows took a fifth longer once their shapes came again (docs/decisions).
        options.enable_mem_pattern = False
    else:
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        providers = [(provider, cuda_options(number, captured)), *providers]
    try:
        # Without its fallback, which prints several lines and continues on the CPU.
        session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's errors share no narrower base.
        reason = " ".join(str(error).split())
        if kind != "cpu" and "CUDA" in reason:
            raise RuntimeMissingError(
                f"ONNX Runtime cannot start on {device!r} here ({reason[:300]}); look for its number in nvidia-smi, "
                "or ask for 'cpu'"
            ) from None
        raise BundleError(f"{bundle.folder}: ONNX Runtime cannot load {path}: {reason}") from None
    if session.get_providers()[0] != provider:
        # Its libraries are not there, or there is no such device: ONNX Runtime only warns and continues without it.
        raise RuntimeMissingError(
            f"ONNX Runtime cannot start on {device!r} here; look for its driver and libraries, or ask for 'cpu'"
        )
    return session


def _read_graph(bundle: Bundle, path: str) -> tuple[bytes, dict[str, bytes]]:
    """The ONNX file `path` of `bundle`, and by name the weight files next to it that it uses, read and hashed here.

    From a path, ONNX Runtime maps the weights into memory: a file that is overwritten later would change the answers,
    and one that is cut would end the process.
    """
    graph = bundle.read(path)
    folder = path.rpartition("/")[0]
    names = [item.path for item in bundle.manifest.artifacts if item.path.rpartition("/")[0] == folder]
    beside = {name.rpartition("/")[2]: name for name in names if name.rpartition(".")[2] not in ("onnx", "json")}
    return graph, {name: bundle.read(full) for name, full in beside.items() if name.encode() in graph}


def _give_weights(options: Any, weights: dict[str, bytes], folder: Path) -> None:
    if weights:
        sizes = [len(data) for data in weights.values()]
        options.add_external_initializers_from_files_in_memory(list(weights), list(weights.values()), sizes)
    # Where any other file that the graph names is looked for, in place of the working folder.
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder.resolve()))


def check_provider(kind: str) -> str:
    """The provider's name. Raises RuntimeMissingError if this ONNX Runtime has none for the kind of device."""
    provider = PROVIDERS[kind]
    if provider not in ort.get_available_providers():
        raise RuntimeMissingError(
            f"the ONNX Runtime that is installed here does not run on {kind!r} (it has no {provider}); "
            "run: pip install 'gpt2-bundle[onnx-gpu]'"
        )
    return provider


def _tensor_problem(bundle: Bundle, graph_name: str, session: Any) -> str | None:
    """Where the tensors of `session` differ from the manifest's, by name, rank or a size that both have as a number."""
    graph, model = bundle.graph(graph_name), bundle.manifest.model
    for side, specs, found in (
        ("input", graph.inputs, session.get_inputs()),
        ("output", graph.outputs, session.get_outputs()),
    ):
        shapes = {tensor.name: tensor.shape for tensor in found}
        for name, spec in specs.items():
            if name not in shapes:
                return f"has no {side} {shown(name)}, which the manifest names"
            shape, said = shapes[name], list(spec.shape)
            if name.startswith(("past_key_values.", "present.")) and len(said) == 4:
                said[1], said[3] = model.n_head, graph.cache_head_dim(model)
            elif name == "logits":
                said[-1] = model.vocab_size
            if len(said) != len(shape) or any(
                isinstance(one, int) and isinstance(other, int) and one != other
                for one, other in zip(said, shape, strict=True)
            ):
                return f"has {name} of shape {_sizes(shape)}, and the manifest's model needs {_sizes(said)}"
    pairs = sum(name.startswith("past_key_values.") for name in graph.inputs)
    if pairs not in (0, 2 * model.n_layer):
        return f"has caches for {pairs // 2} blocks, and the manifest's model has {model.n_layer}"
    return None


def _sizes(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def bind_sampling_request(binding: Any, request: SamplingRequest) -> None:
    """Bind what the choice graph is asked, all but the logits."""
    logits_processor = request.logits_processor
    for name, value in (
        *request.sampling.arrays().items(),
        ("draw", request.draw),
        *((f"edit_{name}", getattr(logits_processor, name)) for name in ("ids", "bias", "repetition", "penalty")),
        ("candidates", np.array([request.candidates], np.int64)),
    ):
        binding.bind_cpu_input(name, value)
