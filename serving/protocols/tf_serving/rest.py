"""TensorFlow Serving's REST API (tensorflow/serving, docs/api_rest.md) over the engine.

GET /v1/models/NAME itself is shared with OpenAI's API, whose handler gives the status alone to who asks as TensorFlow
Serving's clients do.
"""

from __future__ import annotations

import base64
import binascii
import functools
import reprlib
from collections.abc import Coroutine
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.errors import InputError
from serving.protocols.json_requests import number_array, while_connected
from serving.protocols.model_status import model_status, parse_version
from serving.protocols.tf_serving.signatures import SIGNATURES, Arrays, Call, Signature, Tensor, check_names, find, run
from serving.server.errors import UnsupportedCallError
from serving.server.event_queue import time_limit, with_model
from serving.server.registry import ModelRegistry, ServedModel
from serving.server.request_bodies import parse_object, read_bytes, reading
from serving.server.settings import Settings
from serving.server.tracing import COMPLETION, start_span


def signature_map() -> dict[str, Any]:
    """The signatures as TensorFlow's SignatureDefMap in JSON."""
    return {
        "signature_def": {
            name: {
                "inputs": {key: _tensor_info(f"{name}_{key}", tensor) for key, tensor in signature.inputs.items()},
                "outputs": {key: _tensor_info(key, tensor) for key, tensor in signature.outputs.items()},
                "method_name": "tensorflow/serving/predict",
            }
            for name, signature in SIGNATURES.items()
        }
    }


def _tensor_info(name: str, tensor: Tensor) -> dict[str, Any]:
    dims = [{"size": "-1", "name": ""} for _ in range(tensor.rank)]
    return {
        "name": f"{name}:0",
        "dtype": tensor.type_name,
        "tensor_shape": {"dim": dims, "unknown_rank": False},
    }


def routes(registry: ModelRegistry, settings: Settings) -> list[Route]:
    """Status of a version, metadata and predict. Handlers raise; the application turns errors into answers."""

    async def status(request: Request) -> Response:
        return JSONResponse(model_status(registry, request.path_params["name"], _version(request)))

    async def metadata(request: Request) -> Response:
        model = registry.get(request.path_params["name"], _version(request))
        spec = {"name": model.name, "signature_name": "", "version": str(model.version)}
        return JSONResponse({"model_spec": spec, "metadata": {"signature_def": signature_map()}})

    async def predict(request: Request) -> Response:
        model_name, version = request.path_params["name"], _version(request)
        registry.get(model_name, version)  # A missing model is said before a wrong body.
        data = await read_bytes(request)
        name, by_rows, inputs = await reading(data, lambda: _read_predict(data, settings.max_prompts))
        request_id = getattr(request.state, "request_id", "")
        limit = time_limit(request, settings.request_timeout)

        def work(model: ServedModel) -> Coroutine[Any, Any, Arrays]:
            span = functools.partial(start_span, COMPLETION, request.headers, model.name)
            most = (settings.max_prompts, settings.max_prompt_tokens)
            return run(name, Call(model.engine, limit, request_id, *most, span), inputs)

        _, outputs = await while_connected(request, with_model(registry, model_name, version, work))
        return JSONResponse({"predictions": _as_rows(outputs)} if by_rows else {"outputs": _as_columns(outputs)})

    async def refused(request: Request) -> Response:
        method = request.url.path.rpartition(":")[2]
        raise UnsupportedCallError(f"{method} is not offered here; use predict")

    async def post_only(request: Request) -> Response:
        raise HTTPException(405, headers={"Allow": "POST"})

    made: list[Route] = []
    for path in ("/v1/models/{name}", "/v1/models/{name}/versions/{version}", "/v1/models/{name}/labels/{label}"):
        described = not path.endswith("{label}")  # Which is there to be refused in words.
        if path != "/v1/models/{name}":
            made.append(Route(path, status, methods=["GET"], include_in_schema=described))
        made.append(Route(f"{path}/metadata", metadata, methods=["GET"], include_in_schema=described))
        made.append(Route(f"{path}:predict", predict, methods=["POST"], include_in_schema=described))
        for method in ("classify", "regress"):
            made.append(Route(f"{path}:{method}", refused, methods=["POST"], include_in_schema=False))
        # Else a GET would be for a version, or a model, of that name.
        made.append(Route(f"{path}:predict", post_only, include_in_schema=False))
    # A version may hold a colon as far as the router knows, so the longer paths come first.
    return sorted(made, key=lambda route: -len(route.path))


def _read_predict(data: bytes, most: int) -> tuple[str, bool, Arrays]:
    """The signature's name, whether the body has rows, at most `most`, and the inputs. Raises InputError."""
    body = parse_object(data)
    name = body.get("signature_name", "serving_default")
    if not isinstance(name, str):
        raise InputError("signature_name must be text")
    signature = find(name)
    by_rows = "instances" in body
    if by_rows == ("inputs" in body):
        raise InputError('the body must have either "instances", a list of rows, or "inputs", columns by name')
    columns = _columns(signature, body["instances"], most) if by_rows else _named(signature, body["inputs"])
    return name, by_rows, {key: _array(key, signature.inputs.get(key), value) for key, value in columns.items()}


def _version(request: Request) -> int | None:
    """The version that the path names; None if it names none. Raises InputError."""
    if "label" in request.path_params:
        raise InputError(f"Unrecognized servable version label: {request.path_params['label']}; name a version instead")
    return parse_version(request.path_params.get("version"))


def _named(signature: Signature, inputs: Any) -> dict[str, Any]:
    """Columns by name; a signature of one input takes its value bare."""
    if isinstance(inputs, dict) and set(inputs) != {"b64"}:
        check_names(signature, inputs)
        return inputs
    if len(signature.inputs) > 1:
        raise InputError(f'"inputs" must be an object with {", ".join(signature.inputs)}')
    return {next(iter(signature.inputs)): inputs}


def _columns(signature: Signature, instances: Any, most: int) -> dict[str, Any]:
    """Columns of a list of rows, each an object, or the bare value of a signature of one input."""
    if not isinstance(instances, list) or not instances:
        raise InputError('"instances" must be a list of at least one row')
    if len(instances) > most:
        raise InputError(f'"instances" has {len(instances)} rows; it must have 1 to {most}')
    if len(signature.inputs) == 1 and not (isinstance(instances[0], dict) and set(instances[0]) != {"b64"}):
        return {next(iter(signature.inputs)): instances}
    for index, row in enumerate(instances):
        if not isinstance(row, dict) or row.keys() != instances[0].keys():
            raise InputError(f'row {index} of "instances" must be an object with the names of row 0')
    check_names(signature, instances[0])
    return {key: [row[key] for row in instances] for key in instances[0]}


def _array(name: str, tensor: Tensor | None, value: Any) -> NDArray[Any]:
    """A JSON value as an array of the signature's type; one that the signature does not have is left to `run`."""
    if tensor is None:
        return np.empty(0)
    shape = _shape(name, tensor, value)
    flat = _flat(value, len(shape))
    numbers = None if tensor.kind == "string" else number_array(flat, tensor.dtype)
    if numbers is not None:
        return numbers.reshape(shape)
    array: NDArray[Any] = np.empty(len(flat), tensor.dtype)
    for index, element in enumerate(flat):
        array[index] = _element(name, tensor, element)
    return array.reshape(shape)


def _shape(name: str, tensor: Tensor, value: Any) -> tuple[int, ...]:
    """The shape of nested lists of the tensor's depth, checked. Raises InputError."""
    if not isinstance(value, list):
        raise InputError(f"{name} must be a list with a value for each row")
    if tensor.rank == 1:
        return (len(value),)
    if not all(isinstance(row, list) for row in value):
        raise InputError(f"{name} must be a list of lists, one for each row")
    widths = {len(row) for row in value}
    if len(widths) > 1:
        raise InputError(f"{name} has rows of {min(widths)} to {max(widths)} values; pad them to one length")
    return (len(value), *widths) if widths else (0, 0)


def _flat(value: Any, rank: int) -> list[Any]:
    return value if rank == 1 else [element for row in value for element in row]


def _element(name: str, tensor: Tensor, value: Any) -> Any:
    if tensor.kind == "string":
        return _bytes(name, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must hold numbers, and has {_shown(value)}")
    if tensor.kind == "float32":
        return _float(value)
    limits = np.iinfo(tensor.dtype)
    if not isinstance(value, int) or not limits.min <= value <= limits.max:
        raise InputError(f"{name} must hold integers of {tensor.kind}, and has {_shown(value)}")
    return value


def _float(value: int | float) -> np.float32:
    """Beyond float32 a number becomes infinite, which the signature refuses in its own words."""
    try:
        with np.errstate(over="ignore"):
            return np.float32(value)
    except OverflowError:  # An integer that no float holds.
        return np.float32(np.inf)


def _bytes(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        # A lone surrogate, which JSON can say and UTF-8 cannot, is not a character.
        return value.encode("utf-8", "replace")
    if isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str):
        try:
            return base64.b64decode(value["b64"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"{name} has base64 that cannot be read: {error}") from None
    raise InputError(f'{name} must hold text or {{"b64": "..."}}, and has {_shown(value)}')


def _shown(value: Any) -> str:
    return reprlib.repr(value)


def _plain(array: NDArray[Any]) -> Any:
    return [each.decode("utf-8", "replace") if isinstance(each, bytes) else each for each in array.tolist()]


def _as_columns(outputs: Arrays) -> Any:
    columns = {key: _plain(value) for key, value in outputs.items()}
    return columns if len(columns) > 1 else next(iter(columns.values()))


def _as_rows(outputs: Arrays) -> Any:
    columns = {key: _plain(value) for key, value in outputs.items()}
    if len(columns) == 1:
        return next(iter(columns.values()))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
