"""The models that a server serves: names, versions and their states, as TensorFlow Serving names them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import IntEnum

from serving.bundle import Bundle
from serving.engine.api import Engine
from serving.errors import GPT2BundleError


class ModelNotFoundError(GPT2BundleError):
    """No such model or version is served here."""


class ModelNotReadyError(GPT2BundleError):
    """The model is known, but no version of it can answer now."""


class State(IntEnum):
    """A version's state, with the numbers of TensorFlow Serving's ModelVersionStatus."""

    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


@dataclass
class ServedModel:
    """One version of one model; `created` is seconds since the epoch."""

    name: str
    version: int
    bundle: Bundle
    engine: Engine
    created: int
    state: State = State.START
    message: str = ""


@dataclass
class ModelRegistry:
    """Versions by model. Any thread may ask; whoever swaps versions changes states here."""

    _models: dict[str, dict[int, ServedModel]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, model: ServedModel) -> None:
        """Make a version known."""
        with self._lock:
            self._models.setdefault(model.name, {})[model.version] = model

    def remove(self, name: str, version: int) -> None:
        """Forget a version."""
        with self._lock:
            self._models.get(name, {}).pop(version, None)

    def names(self) -> list[str]:
        """All models, in the order in which they came."""
        with self._lock:
            return list(self._models)

    def versions(self, name: str) -> list[ServedModel]:
        """All versions of `name` in any state, the newest first. Raises ModelNotFoundError."""
        with self._lock:
            if name not in self._models:
                known = ", ".join(map(repr, self._models)) or "none"
                raise ModelNotFoundError(f"no model {name!r} is served here; there is {known}")
            return sorted(self._models[name].values(), key=lambda model: -model.version)

    def get(self, name: str, version: int | None = None) -> ServedModel:
        """The version asked for, or the newest available one. Raises ModelNotFoundError or ModelNotReadyError."""
        versions = self.versions(name)
        if version is not None:
            versions = [model for model in versions if model.version == version]
            if not versions:
                raise ModelNotFoundError(f"the model {name!r} has no version {version}")
        for model in versions:
            if model.state == State.AVAILABLE:
                return model
        raise ModelNotReadyError(f"the model {name!r} is not ready; try again when /health/ready says so")
