"""The versions of a model and their states, as the TensorFlow Serving and OpenAI protocols report them."""

from __future__ import annotations

from typing import Any

from serving.errors import InputError
from serving.server.registry import ModelNotFoundError, ModelRegistry

_MAX_VERSION = 2**63 - 1


def model_status(registry: ModelRegistry, name: str, version: int | None = None) -> dict[str, Any]:
    """`model_version_status` of all versions of `name`, or of one. Raises ModelNotFoundError."""
    versions = [model for model in registry.versions(name) if version in (None, model.version)]
    if not versions:
        raise ModelNotFoundError(f"the model {name!r} has no version {version}")
    return {
        "model_version_status": [
            {
                "version": str(model.version),
                "state": model.state.name,
                "status": {"error_code": "UNKNOWN" if model.message else "OK", "error_message": model.message},
            }
            for model in versions
        ]
    }


def parse_version(text: str | None) -> int | None:
    """A version number; None for none, and for 0, by which OpenVINO's clients ask for the newest. Raises InputError."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= _MAX_VERSION):
        raise InputError(f"{text[:40]!r} is not a version; it must be a whole number")
    return int(text) or None
