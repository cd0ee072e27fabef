"""What every client of a model server shares: the transport that it calls, and what a stream gives out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

EMPTY_PROMPT = "a prompt may not be empty; the end-of-text token alone starts a new text"


class Transport(Protocol):
    """One protocol to one model. Each call ends within `timeout` seconds or raises ServerError."""

    def predict(self, signature: str, inputs: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Outputs by name as arrays."""

    def metadata(self, timeout: float) -> dict[str, Any]:
        """Signature to {"inputs": {name: {"dtype": "DT_INT32", "shape": [-1]}}, "outputs": ...}; shape may be None."""

    def status(self, timeout: float) -> list[dict[str, Any]]:
        """For each version: `version`, `state` (such as AVAILABLE), `error_code`, `error_message`."""


class RetryingClient(Protocol):
    """What streams over slots ask of a client: calls that are sent again while the server is busy or away."""

    timeout: float
    sleep: Callable[[float], None]

    def predict(
        self, inputs: Mapping[str, Any], signature: str = "serving_default", *, idempotent: bool = True
    ) -> dict[str, Any]:
        """Run a signature; returns its outputs by name as arrays."""

    def repeat(
        self,
        signature: str,
        inputs: Mapping[str, Any],
        timeout: float | None = None,
        late: Callable[[dict[str, Any] | None], None] | None = None,
    ) -> dict[str, Any]:
        """Run a signature that may be retried; `late` receives an answer that comes after the timeout."""

    def end_token(self) -> int:
        """The token that ends a text."""

    def jitter(self, pause: float) -> float:
        """`pause` shortened by a random part."""


@dataclass(frozen=True)
class Piece:
    """What came of prompt `index`; `finish_reason` is set in its last piece, "stop" or "length".

    `text` may be "" where a character, or what may become a stop text, is not whole yet.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"] | None = None


def as_text(value: object) -> str:
    """A string tensor's value as it came: bytes by gRPC and base64, else str."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
