"""The one table from errors to answers: every protocol says the same thing about the same failure.

Only messages of errors that a caller can mend are sent out. Everything else is logged with the request's id, and the
answer is one fixed sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

from serving.chat import RendererBusyError
from serving.engine.api import DrainingError, FinishEvent, QueueFullError
from serving.errors import GPT2BundleError, InputError, one_line
from serving.server.registry import ModelNotFoundError, ModelNotReadyError

INTERNAL_SENTENCE = "internal error; the server's log has it under this request's id"


class UnauthenticatedError(GPT2BundleError):
    """No API key, or one that is not known here."""


class RateLimitError(GPT2BundleError):
    """A caller asks more often than it may; `retry_after` is in how many seconds to try again, at least 1."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BodyTooLargeError(GPT2BundleError):
    """A request's body is over the limit."""


class BodyEncodingError(GPT2BundleError):
    """A request's body is packed in a way that is not unpacked here."""


class BodiesFullError(GPT2BundleError):
    """The bodies of all requests together are over the limit."""


class BodyTimeoutError(GPT2BundleError):
    """A request's body did not come in time."""


class DeadlineExceededError(GPT2BundleError):
    """A request was not done within its time."""


class GenerationEndedError(GPT2BundleError):
    """The engine ended a request that was not cancelled: the server is closing."""


class GenerationFailedError(GPT2BundleError):
    """The engine could not continue a request. The message is for the log."""


class ClientGoneError(GPT2BundleError):
    """The client closed its connection and does not read the answer."""


class UnsupportedCallError(GPT2BundleError):
    """A call of a protocol that this server does not offer."""


class ReplicaLostError(GPT2BundleError):
    """The replica that answered a request is gone; the same request may be sent again."""


@dataclass(frozen=True)
class Kind:
    """What a type of error is in each protocol. `openai_type` and `openai_code` are OpenAI's error fields."""

    status: int
    grpc_code: str
    openai_type: str
    openai_code: str | None = None


@dataclass(frozen=True)
class Failure:
    """One failure as it goes out: `retry_after` in seconds, for the Retry-After header, where there is one."""

    kind: Kind
    message: str
    param: str | None = None
    retry_after: int | None = None

    @property
    def internal(self) -> bool:
        """Whether the error itself belongs into the log and not into the answer."""
        return self.kind.status == 500


class FieldError(InputError):
    """A field of a request is wrong; `param` names it."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(FieldError):
    """A prompt, or it and what is to be added, does not fit the model's context of `n_positions` tokens.

    The sentence begins as OpenAI's does, by which clients know this error.
    """

    def __init__(self, n_positions: int, problem: str, param: str) -> None:
        super().__init__(f"This model's maximum context length is {n_positions} tokens; {problem}", param)


RETRY_SECONDS = 1
"""When to try again what is unavailable now and says no time of its own."""

INVALID = Kind(400, "INVALID_ARGUMENT", "invalid_request_error")
INTERNAL = Kind(500, "INTERNAL", "server_error")

TABLE: dict[type[BaseException], Kind] = {
    InputError: INVALID,
    ContextLengthError: Kind(400, "INVALID_ARGUMENT", "invalid_request_error", "context_length_exceeded"),
    UnauthenticatedError: Kind(401, "UNAUTHENTICATED", "authentication_error", "invalid_api_key"),
    ModelNotFoundError: Kind(404, "NOT_FOUND", "invalid_request_error", "model_not_found"),
    BodyTimeoutError: Kind(408, "DEADLINE_EXCEEDED", "invalid_request_error"),
    BodyTooLargeError: Kind(413, "RESOURCE_EXHAUSTED", "invalid_request_error"),
    BodyEncodingError: Kind(415, "INVALID_ARGUMENT", "invalid_request_error"),
    QueueFullError: Kind(429, "RESOURCE_EXHAUSTED", "rate_limit_error", "queue_full"),
    RateLimitError: Kind(429, "RESOURCE_EXHAUSTED", "rate_limit_error", "rate_limit_exceeded"),
    ClientGoneError: Kind(499, "CANCELLED", "invalid_request_error"),
    UnsupportedCallError: Kind(501, "UNIMPLEMENTED", "invalid_request_error"),
    RendererBusyError: Kind(503, "UNAVAILABLE", "server_error", "overloaded"),
    BodiesFullError: Kind(503, "UNAVAILABLE", "server_error", "overloaded"),
    DrainingError: Kind(503, "UNAVAILABLE", "server_error", "draining"),
    ModelNotReadyError: Kind(503, "UNAVAILABLE", "server_error", "model_not_ready"),
    ReplicaLostError: Kind(503, "UNAVAILABLE", "server_error", "replica_lost"),
    GenerationEndedError: Kind(503, "UNAVAILABLE", "server_error", "draining"),
    DeadlineExceededError: Kind(504, "DEADLINE_EXCEEDED", "server_error", "timeout"),
}
"""By the most derived type; whatever has no line is INTERNAL. 499 is nginx's status for a client that went away."""


def failure_of(error: BaseException) -> Failure:
    """What to answer to `error`. The message of an error that is not in the table is not sent out."""
    kind = next((TABLE[base] for base in type(error).__mro__ if base in TABLE), INTERNAL)
    if kind is INTERNAL:
        return Failure(INTERNAL, INTERNAL_SENTENCE)
    retry_after = getattr(error, "retry_after", RETRY_SECONDS if kind.status == 503 else None)
    return Failure(kind, one_line(error), getattr(error, "param", None), retry_after)


def error_of(event: FinishEvent) -> GPT2BundleError | None:
    """The error that an ending stands for; None for one that is a result ("stop", "length")."""
    match event.reason:
        case "timeout":
            return DeadlineExceededError(event.message or "the request was not done within its time")
        case "cancelled":
            return GenerationEndedError("the server is closing and ended this request; try again")
        case "error":
            return InputError(event.message) if event.by_request else GenerationFailedError(event.message)
        case _:
            return None
