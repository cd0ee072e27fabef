"""What a client refuses by itself, since a server answers it with a fault: no rows, unequal rows, a wrong rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.errors import InputError


def check_inputs(inputs: Mapping[str, Any], signature: Mapping[str, Any]) -> None:
    """Raise InputError for inputs, arrays or nested lists by name, that no signature takes.

    `signature` is the signature's `inputs` of `Transport.metadata`; names that it does not have are left to the server.
    """
    rows: dict[str, int] = {}
    for name, value in inputs.items():
        shape = _shape(name, value)
        wanted = signature.get(name, {}).get("shape")
        if wanted is not None and len(wanted) != len(shape):
            raise InputError(f"{name} must have {len(wanted)} axes, the first for rows, and has {len(shape)}")
        if not shape:
            raise InputError(f"{name} must be a list with a value for each row")
        rows[name] = shape[0]
    if rows and not all(rows.values()):
        empty = next(name for name, count in rows.items() if not count)
        raise InputError(f"{empty} has no rows; a request needs one at least, since a server may never answer it")
    if len(set(rows.values())) > 1:
        raise InputError(
            f"the inputs have unequal rows: {', '.join(f'{name} {count}' for name, count in rows.items())}"
        )


def _shape(name: str, value: Any) -> tuple[int, ...]:
    try:
        shape: tuple[int, ...] = np.shape(_without_text(value))
        return shape
    except ValueError:
        raise InputError(f"{name} has rows of unequal lengths; pad them to one length") from None


def _without_text(value: Any) -> Any:
    """`value` with a number in the place of each text, which JSON writes as {"b64": ...} too."""
    if isinstance(value, np.ndarray):
        return value
    return [_without_text(each) for each in value] if isinstance(value, (list, tuple)) else 0
