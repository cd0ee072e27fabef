"""What a client makes of answers that no server of its protocol gives: one sentence, in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from serving.errors import InputError, ServerError

MAX_ANSWER = 64 << 20
"""Bytes of a whole answer, and elements of one of its tensors."""
_WRONG = (InputError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


@contextlib.contextmanager
def reading(server: str, protocol: str) -> Iterator[None]:
    """A block that takes an answer of `server` apart; what fails in it is the answer's fault, as ServerError."""
    try:
        yield
    except _WRONG:
        raise ServerError(
            f"{server}: the answer is not one of {protocol}; is that what runs there?", "INTERNAL"
        ) from None


def check_outputs(outputs: Mapping[str, Any], specs: Mapping[str, Any], rows: int) -> None:
    """Raise ServerError unless `outputs` are those of `specs`, in kind and number of axes, and have `rows` rows."""
    for name, spec in specs.items():
        found = outputs.get(name)
        if found is None:
            raise ServerError(f"the answer has no {name!r}, which the model's signature names", "INTERNAL")
        value, shape = np.asarray(found), spec.get("shape")
        texts = spec.get("dtype") == "DT_STRING"
        if texts != (value.dtype.kind == "O") and value.size:
            kind = "texts" if texts else "numbers"
            raise ServerError(f"the answer's {name!r} does not hold {kind}, as the model's signature says", "INTERNAL")
        by_row = bool(shape) and shape[0] == -1 and value.ndim > 0
        if shape is not None and (value.ndim != len(shape) or (by_row and len(value) != rows)):
            raise ServerError(
                f"the answer's {name!r} has the shape {list(value.shape)}, which {rows} rows cannot have", "INTERNAL"
            )
