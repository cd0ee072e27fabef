"""The signatures that the Open Inference Protocol offers, and a request for one: checked here, run elsewhere.

A request names a signature by its parameter `signature_name`; without it, it is "generate", whose tensors have the
names of Triton's generate extension and whose options are those of OpenAI's completions, with the same defaults.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError
from serving.protocols.open_inference.tensors import TYPES, TensorSpec, from_values
from serving.protocols.openai.schema import CompletionRequest
from serving.protocols.openai.unsupported import STRUCTURED, refuse_unsupported
from serving.protocols.tf_serving import signatures as tf_signatures
from serving.protocols.tf_serving.signatures import SIGNATURES
from serving.sampling import DECLARATIONS
from serving.server.errors import FieldError
from serving.server.request_bodies import check_fields

Arrays = dict[str, NDArray[Any]]
Specs = Mapping[str, TensorSpec]

GENERATE = "generate"
_OPTIONS = {each.wire: each.datatype for each in DECLARATIONS.values()}
OPTIONS = (*_OPTIONS, "stop")
"""Fields of OpenAI's completions that "generate" takes, as tensors or as parameters of the request."""
_DATATYPES = {"string": "BYTES", "int32": "INT32", "int64": "INT64", "float32": "FP32"}


def _generate_specs() -> tuple[Specs, Specs]:
    options = {name: TensorSpec(datatype, optional=True) for name, datatype in _OPTIONS.items()}
    inputs = {"text_input": TensorSpec("BYTES"), **options}
    inputs |= {"stop": TensorSpec("BYTES", optional=True), "stream": TensorSpec("BOOL", optional=True)}
    outputs = {
        "text_output": TensorSpec("BYTES"),
        "token_ids": TensorSpec("INT32", 2),
        "lengths": TensorSpec("INT32"),
        "prompt_tokens": TensorSpec("INT32"),
        "finish_reason": TensorSpec("BYTES"),
    }
    return inputs, outputs


def _specs_of(signature: tf_signatures.Signature) -> tuple[Specs, Specs]:
    def specs(tensors: Mapping[str, tf_signatures.Tensor]) -> Specs:
        return {name: TensorSpec(_DATATYPES[tensor.kind], tensor.rank) for name, tensor in tensors.items()}

    return specs(signature.inputs), specs(signature.outputs)


SPECS: dict[str, tuple[Specs, Specs]] = {
    GENERATE: _generate_specs(),
    **{name: _specs_of(signature) for name, signature in SIGNATURES.items()},
}
"""For each signature its inputs and its outputs."""


@dataclass(frozen=True)
class InferRequest:
    """A request, whatever it came by; `version` is "" for the newest one, `outputs` empty for all of them.

    `headers` are HTTP's, or gRPC's metadata, which may name the span that the request is a child of.
    """

    model: str
    version: str
    inputs: Arrays
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    timeout: float | None = None
    request_id: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def signature(self) -> str:
        """The name of the signature. Raises InputError if there is none of that name."""
        return signature_name(self.parameters.get("signature_name", GENERATE))

    @property
    def stream(self) -> bool | None:
        """What the tensor or parameter `stream` says; None without it. Raises InputError."""
        value = self.parameters.get("stream")
        if "stream" in self.inputs:
            flags = self.inputs["stream"].reshape(-1).tolist()
            value = flags[0] if len(flags) == 1 else "not one value"
        if value is not None and not isinstance(value, bool):
            raise InputError("stream must be true or false")
        return value

    def limit(self) -> float | None:
        """Seconds that it may take: `timeout`, and Triton's parameter of that name, in microseconds, if it is less."""
        asked = self.parameters.get("timeout", 0)
        if isinstance(asked, bool) or not isinstance(asked, int) or asked < 0:
            raise InputError("the parameter timeout must be a whole number of microseconds; 0 asks for none")
        limits = [seconds for seconds in (self.timeout, asked / 1e6 if asked else None) if seconds is not None]
        return min(limits, default=None)


def signature_name(value: Any) -> str:
    """`value` if there is such a signature. Raises InputError."""
    if not isinstance(value, str) or value not in SPECS:
        raise InputError(f"no signature {str(value)[:80]!r} is served; signature_name is one of {', '.join(SPECS)}")
    return value


def refuse_parameters(name: str, parameters: Container[str]) -> None:
    """Refuse what Triton does for a tensor by its parameters and is not done here. Raises InputError."""
    for key in ("shared_memory_region", "classification"):
        if key in parameters:
            raise InputError(f"{name[:80]} asks for {key}, which this server does not have")


def check(request: InferRequest) -> None:
    """Refuse inputs and outputs that the signature does not have, and inputs that are not what it takes."""
    inputs, outputs = SPECS[request.signature]
    for name in request.outputs:
        if name not in outputs:
            raise InputError(f"{request.signature} has no output {name[:80]!r}; it has {', '.join(outputs)}")
    for name, array in list(request.inputs.items()):
        if name not in inputs:
            raise InputError(f"{request.signature} has no input {name[:80]!r}; it has {', '.join(inputs)}")
        request.inputs[name] = _fitted(name, array, inputs[name])
    first = next(iter(inputs))
    for name, spec in inputs.items():
        given = name in request.inputs or (name in request.parameters and name != first)
        if not given and not spec.optional:
            raise InputError(f"the input {name} is missing; {request.signature} takes {', '.join(inputs)}")
    request.limit()
    request.stream  # noqa: B018


def _fitted(name: str, array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    """`array` as `spec` has it: Triton's clients send [n, 1] for [n], and INT64 where INT32 would do."""
    sent = next(datatype for datatype, kind in TYPES.items() if array.dtype == kind)
    if array.ndim == spec.rank + 1 and array.shape[-1] == 1:
        array = array.reshape(array.shape[:-1])
    if (sent, spec.datatype) == ("INT64", "INT32"):
        narrow = array.astype(np.int32)
        if not np.array_equal(narrow, array):
            raise InputError(f"{name} must be INT32, and has INT64 values beyond it")
        return narrow
    if (sent, spec.datatype) == ("INT32", "INT64"):
        return array.astype(np.int64)
    if sent != spec.datatype:
        raise InputError(f"{name} must be {spec.datatype}, and {sent} was sent")
    if array.ndim != spec.rank:
        raise InputError(f"{name} must have {spec.rank} axes, and {array.ndim} were sent")
    return array


def selected(request: InferRequest, outputs: Arrays) -> Arrays:
    """The outputs that were asked for, in that order."""
    return {name: outputs[name] for name in request.outputs or outputs}


def filled(request: InferRequest) -> Arrays:
    """The inputs of a signature of the SavedModel, those with one value a row also from the parameters."""
    specs, _ = SPECS[request.signature]
    inputs = dict(request.inputs)
    rows = len(inputs[next(iter(specs))])
    for name, spec in specs.items():
        if name not in inputs and spec.rank == 1:
            inputs[name] = from_values(name, spec.datatype, [rows], [request.parameters[name]] * rows)
    return inputs


def refuse_options(fields: Mapping[str, Any]) -> None:
    """Raise FieldError for one of `fields` that changes an answer and is not done in this protocol."""
    CompletionRequest.refuse(fields)
    refuse_unsupported(fields, STRUCTURED)


def bodies(request: InferRequest, most: int) -> list[CompletionRequest]:
    """Each text with its options as a body of OpenAI's completions, which checks them."""
    count = len(request.inputs["text_input"])
    if not 1 <= count <= most:
        raise InputError(f"text_input has {count} texts; it must have 1 to {most}")
    texts = [each.decode("utf-8", "replace") for each in request.inputs["text_input"].tolist()]
    refuse_options(request.parameters)
    shared = {name: request.parameters[name] for name in OPTIONS if name in request.parameters}
    columns: dict[str, list[Any]] = {}
    for name, array in request.inputs.items():
        if name == "stop":
            shared["stop"] = [each.decode("utf-8", "replace") for each in array.tolist()]
        elif name in _OPTIONS:
            if len(array) not in (1, len(texts)):
                raise FieldError(f"{name} has {len(array)} values; it must have 1, or one for each text", name)
            values = [_number(value) for value in array]
            columns[name] = values if len(values) == len(texts) else values * len(texts)
    made = []
    for index, text in enumerate(texts):
        own = {name: column[index] for name, column in columns.items()}
        made.append(check_fields({"prompt": text, **shared, **own}, CompletionRequest))
        if made[-1].max_tokens == 0:
            raise FieldError("max_tokens is 0; ask for at least 1", "max_tokens")
    return made


def _number(value: Any) -> Any:
    """An element of a tensor as Python has it; 0.8 in float32 as the 0.8 of JSON, so that the text is the same."""
    return float(str(value)) if isinstance(value, np.float32) else value.item()
