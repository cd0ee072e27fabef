"""What the Open Inference Protocol says of the server and its models, as the JSON of Triton's extensions.

The messages of gRPC have the same fields.
"""

from __future__ import annotations

from typing import Any

from serving import __version__
from serving.protocols.model_status import parse_version
from serving.protocols.open_inference.signatures import GENERATE, SPECS, Specs
from serving.server.registry import ModelNotFoundError, ServedModel, State
from serving.server.state import Server

PLATFORM = "gpt2-bundle"
EXTENSIONS = ["binary_tensor_data", "generate", "model_configuration", "model_repository", "statistics"]
_STATES = {
    State.START: "LOADING",
    State.LOADING: "LOADING",
    State.AVAILABLE: "READY",
    State.UNLOADING: "UNLOADING",
    State.END: "UNAVAILABLE",
}


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions."""
    return {"name": "gpt2-bundle", "version": __version__, "extensions": EXTENSIONS}


def model_metadata(server: Server, name: str, version: str, signature: str = GENERATE) -> dict[str, Any]:
    """The versions that can answer, and a signature's tensors. Raises InputError and as `ModelRegistry.get` does."""
    model = server.registry.get(name, parse_version(version))
    inputs, outputs = SPECS[signature]
    versions = [each.version for each in server.registry.versions(name) if each.state == State.AVAILABLE]
    return {
        "name": model.name,
        "versions": [str(each) for each in sorted(versions)],
        "platform": PLATFORM,
        "inputs": _tensors(inputs),
        "outputs": _tensors(outputs),
    }


def _tensors(specs: Specs) -> list[dict[str, Any]]:
    return [{"name": name, "datatype": spec.datatype, "shape": [-1] * spec.rank} for name, spec in specs.items()]


def model_config(server: Server, name: str, version: str, signature: str = GENERATE) -> dict[str, Any]:
    """What Triton's model configuration says of this: a signature's tensors, and that text can be streamed."""
    model = server.registry.get(name, parse_version(version))
    inputs, outputs = SPECS[signature]

    def tensors(specs: Specs) -> list[dict[str, Any]]:
        names = {"BYTES": "STRING"}
        return [
            {"name": key, "data_type": f"TYPE_{names.get(spec.datatype, spec.datatype)}", "dims": [-1] * spec.rank}
            for key, spec in specs.items()
        ]

    taken = tensors(inputs)
    for each, spec in zip(taken, inputs.values(), strict=True):
        each["optional"] = spec.optional
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        # The first axis is written in every shape here, which is what 0 says.
        "max_batch_size": 0,
        "input": taken,
        "output": tensors(outputs),
        "parameters": {"signature_names": {"string_value": ",".join(SPECS)}},
        "model_transaction_policy": {"decoupled": signature == GENERATE},
    }


def repository_index(server: Server, ready: bool) -> list[dict[str, Any]]:
    """All versions of all models with their states, or only those that are `ready`."""
    return [
        {
            "name": model.name,
            "version": str(model.version),
            "state": _STATES[model.state],
            "reason": " ".join(model.message.split()),
        }
        for name in server.registry.names()
        for model in server.registry.versions(name)
        if model.state == State.AVAILABLE or not ready
    ]


def is_ready(server: Server, name: str, version: str) -> bool:
    """Whether the version, or any if it is "", can answer. Raises InputError and ModelNotFoundError."""
    number = parse_version(version)
    models = [model for model in server.registry.versions(name) if number in (None, model.version)]
    if not models:
        raise ModelNotFoundError(f"the model {name!r} has no version {version}")
    return not server.draining and any(model.state == State.AVAILABLE for model in models)


def statistics(server: Server, name: str, version: str) -> dict[str, Any]:
    """Requests of the engine, whatever protocol they came by, of all models if `name` is "".

    `compute_infer` is of the engine's steps, which requests share; the other durations are of requests.
    """
    number = parse_version(version)
    names = [name] if name else server.registry.names()
    models = [model for each in names for model in server.registry.versions(each) if number in (None, model.version)]
    if name and not models:
        raise ModelNotFoundError(f"the model {name!r} has no version {version}")
    return {"model_stats": [_statistics(server, model) for model in models]}


def _statistics(server: Server, model: ServedModel) -> dict[str, Any]:
    counts = server.metrics.model(model.name, model.version)
    outcomes, seconds = dict(counts.outcomes), dict(counts.seconds)
    good = [reason for reason in outcomes if reason in ("stop", "length")]
    bad = [reason for reason in outcomes if reason not in good]
    queue, steps = counts.histograms["request_queue_time_seconds"], counts.histograms["step_seconds"]
    done = sum(outcomes[reason] for reason in good)

    def duration(count: int, total: float) -> dict[str, int]:
        return {"count": count, "ns": round(total * 1e9)}

    return {
        "name": model.name,
        "version": str(model.version),
        "last_inference": round(counts.last_finished * 1000),
        "inference_count": done,
        "execution_count": sum(steps.counts),
        "inference_stats": {
            "success": duration(done, sum(seconds.get(reason, 0.0) for reason in good)),
            "fail": duration(sum(outcomes[reason] for reason in bad), sum(seconds.get(reason, 0.0) for reason in bad)),
            "queue": duration(sum(queue.counts), queue.sum),
            "compute_infer": duration(sum(steps.counts), steps.sum),
        },
    }
