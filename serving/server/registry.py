"""The models that a server serves: names, versions and their states, as TensorFlow Serving names them."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

from serving.bundle import Bundle
from serving.bundle.examples import example_messages, example_prompts
from serving.chat import ChatTemplate, chat_template
from serving.engine.api import Engine
from serving.errors import BundleError, GPT2BundleError, cut


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
    _chat: list[ChatTemplate | None] = field(default_factory=list, init=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, compare=False)

    def chat_template(self) -> ChatTemplate | None:
        """The bundle's chat template, None where it has none; its files are read at the first call.

        Raises BundleError for files that are not what they say.
        """
        with self._lock:
            if not self._chat:
                self._chat.append(chat_template(self.bundle))
            return self._chat[0]

    def close(self) -> None:
        """Close the engine, and the processes of the chat template."""
        self.engine.close()
        with self._lock:
            for template in self._chat:
                if template is not None:
                    template.close()

    @cached_property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits of all files' hashes, by which answers of different bundles can be told apart."""
        hashes = sorted(f"{artifact.path} {artifact.sha256}\n" for artifact in self.bundle.manifest.artifacts)
        return hashlib.sha256("".join(hashes).encode("utf-8", "surrogateescape")).hexdigest()[:8]

    @cached_property
    def example_prompt(self) -> str:
        """A text that this model may be asked to continue, from the bundle's held-out text."""
        return example_prompts(self.bundle.folder)[0]

    @cached_property
    def example_message(self) -> str | None:
        """A message that this model may be sent in a chat; None where it has no chat template."""
        try:
            found = self.chat_template()
        except BundleError:
            return None
        return next(iter(example_messages(self.bundle.folder)), "Hello") if found is not None else None


@dataclass
class ModelRegistry:
    """Versions by model. Any thread may call it, and a swap is atomic."""

    _models: dict[str, dict[int, ServedModel]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, model: ServedModel) -> None:
        """Make a version known."""
        with self._lock:
            self._models.setdefault(model.name, {})[model.version] = model

    def remove(self, name: str, version: int) -> None:
        """Forget a version, and with the last one the model."""
        with self._lock:
            versions = self._models.get(name, {})
            versions.pop(version, None)
            if not versions:
                self._models.pop(name, None)

    def take_over(self, model: ServedModel, before: ServedModel | None) -> None:
        """Let `model` answer from now on and `before` no more, with no moment between at which neither or both do."""
        with self._lock:
            model.state = State.AVAILABLE
            if before is not None:
                before.state = State.UNLOADING

    def names(self) -> list[str]:
        """All models, in the order in which they came."""
        with self._lock:
            return list(self._models)

    def versions(self, name: str) -> list[ServedModel]:
        """All versions of `name` in any state, the newest first. Raises ModelNotFoundError.

        Raises ModelNotReadyError as long as there is no model at all, since any name may still come.
        """
        with self._lock:
            return self._versions(name)

    def _versions(self, name: str) -> list[ServedModel]:
        if not self._models:
            raise ModelNotReadyError("no model is loaded yet; try again when /health/ready says so")
        if name not in self._models:
            known = ", ".join(map(repr, self._models))
            raise ModelNotFoundError(f"no model {cut(name)!r} is served here; there is {cut(known, 200)}")
        return sorted(self._models[name].values(), key=lambda model: -model.version)

    def get(self, name: str, version: int | None = None) -> ServedModel:
        """The version asked for, or the newest available one. Raises ModelNotFoundError or ModelNotReadyError."""
        with self._lock:
            versions = [model for model in self._versions(name) if version in (None, model.version)]
            if not versions:
                raise ModelNotFoundError(f"the model {name!r} has no version {version}")
            for model in versions:
                if model.state == State.AVAILABLE:
                    return model
        raise ModelNotReadyError(f"the model {name!r} is not ready; try again when /health/ready says so")
