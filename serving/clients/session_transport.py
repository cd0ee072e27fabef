"""A SavedModel's signatures in a TensorFlow session of this process, called as a server of TensorFlow Serving is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.backends.loader import runtime_errors
from serving.bundle import Bundle
from serving.bundle.private_copy import private_copy
from serving.clients.transport import Transport
from serving.errors import InputError, ServerError


class SessionTransport:
    """The SavedModel of a bundle as a `serving.clients.transport.Transport`, with variables of its own."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises BundleError for a SavedModel that holds what no export does, before any of it runs."""
        with runtime_errors("tensorflow"):
            from serving.backends.tensorflow import GRAPH, SavedModelSession
            from serving.support.tensorflow_import import tf
        self._tf = tf
        place = bundle.graph(GRAPH).path.rpartition("/")[0]
        with private_copy(bundle, place) as folder:
            self._session = SavedModelSession(folder, bundle.folder / place)
        self._signatures = self._session.signatures

    def predict(self, signature: str, inputs: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """See `Transport.predict`. Raises InputError for a signature or inputs that the model has not."""
        if signature not in self._signatures:
            raise InputError(f"the model has no signature {signature!r}; it has {', '.join(sorted(self._signatures))}")
        definition = self._signatures[signature]
        if set(inputs) != set(definition.inputs):
            raise InputError(f"{signature} takes {', '.join(sorted(definition.inputs))}, not {', '.join(inputs)}")
        arrays = {
            name: np.asarray(inputs[name], self._tf.as_dtype(info.dtype).as_numpy_dtype)
            for name, info in definition.inputs.items()
        }
        options = self._tf.compat.v1.RunOptions(timeout_in_ms=max(1, int(timeout * 1000)))
        try:
            return self._session.run(signature, options, **arrays)
        except self._tf.errors.OpError as error:
            code = _code(error)
            raise ServerError(f"TensorFlow: {code}: {' '.join(error.message.split())}", code) from None

    def metadata(self, timeout: float) -> dict[str, Any]:
        """See `Transport.metadata`."""
        return {
            name: {
                "inputs": {key: _spec(info) for key, info in sorted(definition.inputs.items())},
                "outputs": {key: _spec(info) for key, info in sorted(definition.outputs.items())},
            }
            for name, definition in sorted(self._signatures.items())
        }

    def status(self, timeout: float) -> list[dict[str, Any]]:
        """See `Transport.status`."""
        return [{"version": 1, "state": "AVAILABLE", "error_code": "OK", "error_message": ""}]


def _code(error: Any) -> str:
    """The status by gRPC's name: DeadlineExceededError is DEADLINE_EXCEEDED."""
    name = type(error).__name__.removesuffix("Error")
    return "".join(f"_{letter}" if letter.isupper() and place else letter for place, letter in enumerate(name)).upper()


def _spec(info: Any) -> dict[str, Any]:
    from tensorflow.core.framework import types_pb2

    shape = info.tensor_shape
    sizes = None if shape.unknown_rank else [dim.size for dim in shape.dim]
    return {"dtype": types_pb2.DataType.Name(info.dtype), "shape": sizes}


def load_slot_transport(bundle: Bundle) -> Transport:
    """The SavedModel of `bundle` in TensorFlow in this process, as a server for `open_slot_engine`.

    Raises RuntimeMissingError as `load_backend` does.
    """
    return SessionTransport(bundle)
